"""Exercises of the chapter "RLHF with a language model"."""

import math

import torch
from torch import Tensor

from qlearn.solutions import require_function


def solution_1(rewards, values, lam):
    """Σ_k λ^k δ_{t+k} for each token, from the last one backwards; γ = 1."""
    advantages, ahead, next_value = [], 0.0, 0.0  # nothing is earned after the last token
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        ahead = r + next_value - v + lam * ahead
        next_value = v
        advantages.append(ahead)
    return advantages[::-1]


def check_1(answer):
    require_function(answer)
    for rewards, values, lam in (
        ([0.0, -0.1, 2.0], [0.5, 1.0, 1.5], 0.5),
        ([0.0, -0.1, 2.0], [0.5, 1.0, 1.5], 1.0),
        ([0.3, 0.0, 0.0, -1.0], [0.0, 0.2, -0.4, 0.1], 0.0),
        ([1.0], [0.25], 0.95),
    ):
        got = answer(list(rewards), list(values), lam)
        n, case = len(rewards), f"For rewards {rewards}, values {values} and λ = {lam}"
        assert isinstance(got, list | tuple | Tensor) and len(got) == n, (
            "Return one number a token."
        )
        got = [float(x) for x in got]
        truth = _double_sum(rewards, [*values, 0.0], lam)
        beyond = _double_sum(rewards, [*values, values[-1]], lam)
        assert _far(got, beyond), (
            "You forecast a value after the last token. Nothing follows the end: it is 0."
        )
        if n > 1 and lam not in (0.0, 1.0):
            targets = [a + v for a, v in zip(truth, values, strict=True)]
            assert _far(got, targets), "Those are the returns for the value head: subtract V."
            assert _far(got, _double_sum(rewards, [*values, 0.0], 1.0)), "Where is λ?"
        assert not _far(got, truth), (
            f"{case} the advantages are {[round(x, 4) for x in truth]}, not "
            f"{[round(x, 4) for x in got]}: each is δ_t plus λ times the next advantage."
        )


def solution_2(scores, log_ratios, beta):
    """β log mean exp(G/β), with the largest G taken out so that nothing overflows."""
    returns = [s - beta * x for s, x in zip(scores, log_ratios, strict=True)]
    top = max(returns)
    return top + beta * math.log(sum(math.exp((g - top) / beta) for g in returns) / len(returns))


def check_2(answer):
    require_function(answer)
    for scores, log_ratios, beta in (
        ([1.0, -2.0, 0.5, 2.0], [0.3, -1.5, 0.0, 1.2], 0.5),
        ([0.0, 1.0, 1.0], [0.0, 0.0, 0.0], 0.1),
        ([700.0, 701.0], [0.5, -0.5], 0.1),
    ):
        try:
            got = float(answer(list(scores), list(log_ratios), beta))
        except OverflowError:
            raise AssertionError(
                "exp overflowed: take the largest return out of the logarithm before."
            ) from None
        score, ratio = (torch.tensor(x, dtype=torch.float64) for x in (scores, log_ratios))

        def ceiling(g, beta=beta):
            return (beta * (torch.logsumexp(g / beta, 0) - math.log(len(g)))).item()

        truth = ceiling(score - beta * ratio)
        assert not math.isinf(got), "exp overflowed: take the largest return out before."
        if ratio.any():
            assert abs(got - ceiling(score)) > 1e-6, (
                "These are a trained policy's samples: its price is part of the return."
            )
            assert abs(got - ceiling(score + beta * ratio)) > 1e-6, (
                "The sign: what π writes more often than π_ref is charged, not paid."
            )
        assert abs(got - beta * math.log(len(scores)) - truth) > 1e-6, (
            "Divide by the number of samples: it is a mean of exponentials, not a sum."
        )
        assert abs(got - (score - beta * ratio).mean().item()) > 1e-6, (
            "That is J. The ceiling is β times the logarithm of a mean of exp(G/β)."
        )
        assert abs(got - truth) < 1e-3, (  # an answer in single precision passes
            f"For scores {scores}, log-ratios {log_ratios} and β = {beta} it is {truth:.4f}, "
            f"not {got:.4f}."
        )


def bug_3(logp, ref_logp, mask, score, beta):
    """The reward of each token, Eq. 3: (B, T)."""
    rewards = -beta * (logp - ref_logp) * mask
    rewards[:, -1] += score
    return rewards


def solution_3(logp, ref_logp, mask, score, beta):
    """The reward of each token, Eq. 3: (B, T)."""
    rewards = -beta * (logp - ref_logp) * mask
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(mask)), last] += score
    return rewards


def check_3(answer):
    require_function(answer)
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp = -torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)
    lengths, score = [5, 2, 4], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mask = torch.tensor([[int(t < n) for t in range(5)] for n in lengths])
    got = answer(logp.clone(), ref_logp.clone(), mask.clone(), score.clone(), 0.3)
    assert isinstance(got, Tensor) and got.shape == (3, 5), "Return a tensor (B, T)."
    assert not _apart(got[0], solution_3(logp, ref_logp, mask, score, 0.3)[0]), (
        "The first response has no padding, and its rewards were right before the repair."
    )
    assert not got[1, 2:].any(), (
        f"The second response has two tokens, yet column 5 is paid {got[1, 4].item():.2f}. Nothing "
        "that GAE does not see can teach anything: on which token does a response end?"
    )
    for b, n in enumerate(lengths):
        for t in range(5):
            truth = -0.3 * (logp[b, t] - ref_logp[b, t]) if t < n else torch.zeros(())
            truth = truth + (score[b] if t == n - 1 else 0.0)
            assert abs(got[b, t] - truth) < 1e-9, (
                f"Response {b + 1} has {n} tokens; token {t + 1} should be paid {truth:.4f}, not "
                f"{got[b, t]:.4f}."
            )


def solution_4(log_ref, returns, beta, extra):
    """The two prices add up: π ∝ π_ref exp(R/(β + β'))."""
    weights = [p + r / (beta + extra) for p, r in zip(log_ref, returns, strict=True)]
    top = max(weights)
    total = top + math.log(sum(math.exp(w - top) for w in weights))
    return [w - total for w in weights]


def check_4(answer):
    require_function(answer)
    log_ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    returns = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    for beta, extra in ((0.5, 0.5), (0.1, 0.4), (1.0, 0.0)):
        got = answer(log_ref.tolist(), returns.tolist(), beta, extra)
        assert isinstance(got, list | tuple | Tensor) and len(got) == 3, (
            "Return log π of each response."
        )
        got = torch.tensor([float(x) for x in got], dtype=torch.float64)
        assert abs(got.logsumexp(0)) < 1e-6, (
            "The probabilities must sum to 1, and the answer is their logarithms."
        )
        if extra:
            for price, hint in (
                (beta, "That is the optimum with one price only. The second one pulls too."),
                (extra, "That is the optimum with the loss's price only. The reward has one too."),
                (beta * extra, "Prices of one and the same distance add up."),
            ):
                wrong = (log_ref + returns / price).log_softmax(0)
                assert (got - wrong).abs().max() > 1e-6 or abs(price - beta - extra) < 1e-9, hint
        logits = got.clone().requires_grad_()
        logp = logits.log_softmax(0)
        kl = (logp.exp() * (logp - log_ref)).sum()
        climbed = (logp.exp() * returns).sum() - beta * kl - extra * kl
        (slope,) = torch.autograd.grad(climbed, logits)
        assert slope.abs().max() < 1e-6, (
            f"At β = {beta} and β' = {extra} the run would not rest there: write both prices into "
            "one objective and read off its β."
        )


def _double_sum(rewards, values, lam):
    """GAE as it is defined; `values` has one entry more, for the state after the last token."""
    error = [r + values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum(lam**k * e for k, e in enumerate(error[t:])) for t in range(len(rewards))]


def _far(got, other):
    return any(abs(x - y) > 1e-9 for x, y in zip(got, other, strict=True))


def _apart(x, y):
    return (x - y).abs().max() > 1e-9
