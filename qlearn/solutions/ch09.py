"""Solutions to "Your language model is a Q-function, literally"."""

import math

import torch

from qlearn.solutions import require_function


def solution_1(logp, ref_logp, beta):
    """Credit of each token and the running value after it."""
    credit, value, so_far = [], [], 0.0
    for p, ref in zip(logp, ref_logp, strict=True):
        credit.append(beta * (p - ref))
        so_far += credit[-1]
        value.append(so_far)
    return credit, value


def check_1(answer):
    require_function(answer)
    logp, ref_logp, beta = [-0.5, -2.0, -1.0], [-1.0, -0.5, -1.0], 0.2
    got = answer(logp, ref_logp, beta)
    assert isinstance(got, tuple | list) and len(got) == 2, (
        "Return two lists: credits, running values."
    )
    for found, expected, name in zip(
        got, ([0.1, -0.3, 0.0], [0.1, -0.2, -0.2]), ("credits", "running values"), strict=True
    ):
        close = [math.isclose(f, e, abs_tol=1e-9) for f, e in zip(found, expected, strict=True)]
        assert all(close), f"The {name} of {logp} against {ref_logp} at β = 0.2 are {expected}."


def solution_2(right, wrong, p_wrong, beta):
    """The optimal policy's probability of the wrong word."""
    bad = p_wrong * math.exp(wrong / beta)
    good = (1 - p_wrong) * math.exp(right / beta)
    return bad / (bad + good)


def check_2(answer):
    require_function(answer)
    for right, wrong, p, beta in ((0.5, -1.0, 0.65, 0.5), (0.0, 0.0, 0.3, 2.0), (1.0, 0.0, 0.9, 1)):
        got = answer(right, wrong, p, beta)
        tilt = math.log(p / (1 - p)) + (wrong - right) / beta
        expected = 1 / (1 + math.exp(-tilt))
        assert isinstance(got, int | float) and math.isclose(got, expected, rel_tol=1e-6), (
            f"At rewards {right} and {wrong}, p = {p} and β = {beta} it is {expected:.4f}: "
            "weigh each word by π_ref exp(r/β), then normalise."
        )


def bug_3(logits, ids, prompt_length):
    """log π of the response: the sum over its tokens."""
    logp = logits.log_softmax(-1)
    return sum(logp[t, ids[t]] for t in range(prompt_length, len(ids)))


def solution_3(logits, ids, prompt_length):
    """The row that predicts token t is the one before it, t − 1."""
    logp = logits.log_softmax(-1)
    return sum(logp[t - 1, ids[t]] for t in range(prompt_length, len(ids)))


def check_3(answer):
    require_function(answer)
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(6, 5, generator=generator), [3, 1, 4, 1, 0, 2]
    expected = sum(math.log(logits[t].softmax(0)[ids[t + 1]]) for t in (1, 2, 3, 4))
    got = float(answer(logits, ids, 2))
    assert math.isclose(got, expected, rel_tol=1e-4), (
        f"For the test sequence the sum is {expected:.4f}, not {got:.4f}. A causal model's output "
        "at position t is its forecast of which token?"
    )


def solution_4(c_here, c_next, beta):
    """Q = β · logits, so a shift of the logits by c moves r = Q − β log π_ref − V(s') likewise."""
    return beta * (c_here - c_next)


def check_4(answer):
    require_function(answer)
    for here, there, beta in ((1.0, 0.0, 0.5), (0.0, 2.0, 0.1), (3.0, 3.0, 1.0)):
        got, expected = answer(here, there, beta), beta * (here - there)
        assert isinstance(got, int | float) and math.isclose(got, expected, abs_tol=1e-9), (
            f"Shifts {here} here and {there} below at β = {beta} change the reward by {expected}: "
            "both Q(s, a) and V(s') move."
        )
