"""Solutions to "Why likelihoods fall"."""

import math

import torch
from torch import Tensor

from qlearn.findings.likelihood import variance_of_margin
from qlearn.solutions import require_function


def solution_1(returns, probs, beta):
    """E_ref R − V*: the mean return less the soft value."""
    mean = sum(p * r for p, r in zip(probs, returns, strict=True))
    z = sum(p * math.exp(r / beta) for p, r in zip(probs, returns, strict=True))
    return mean - beta * math.log(z)


def check_1(answer) -> None:
    require_function(answer)
    for returns, probs, beta in (
        ([1.0, -2.0, 0.5], [0.2, 0.5, 0.3], 0.5),
        ([0.0, 2.0], [0.1, 0.9], 2.0),
        ([3.0, 3.0, 3.0], [0.3, 0.3, 0.4], 1.0),
    ):
        got = answer(returns, probs, beta)
        assert isinstance(got, int | float), "Return one number."
        R, p = (torch.tensor(x, dtype=torch.float64) for x in (returns, probs))
        mean, value = (p @ R).item(), beta * (p.log() + R / beta).logsumexp(0).item()
        if abs(mean - value) > 1e-9:
            for wrong, hint in (
                (value - mean, "The sign: rewards are measured from V*, which is the larger one."),
                (-value, "That is −V*; the average answer also earns something, E_ref R."),
                (mean - R.max().item(), "V* is the soft best return, not the best one."),
                (mean - value / beta, "A β is missing in front of the logarithm."),
                (mean - (R / beta).exp().mean().log().item() * beta,
                 "Weigh each answer by its probability, in both means."),
                (mean - (p @ R.exp()).log().item(), "The exponent is R/β, and β stands in front."),
            ):  # fmt: skip
                assert abs(got - wrong) > 1e-9, hint
        assert abs(got - (mean - value)) < 1e-9, (
            f"For returns {returns} with probabilities {probs} at β = {beta} it is "
            f"{mean - value:.6f}: E_ref R less β log E_ref exp(R/β)."
        )


def bug_2(logp: Tensor, log_ref: Tensor) -> Tensor:
    """Minus the divergence of policy and reference, summed over the states of a line."""
    return -(logp.exp() * (logp - log_ref)).sum()


def solution_2(logp: Tensor, log_ref: Tensor) -> Tensor:
    """−Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t)): the mean is taken by whoever wrote the line."""
    return -(log_ref.exp() * (log_ref - logp)).sum()


def check_2(answer) -> None:
    require_function(answer)
    generator = torch.Generator().manual_seed(0)
    for length in (1, 4):
        logp, log_ref = torch.randn(
            2, length, 5, generator=generator, dtype=torch.float64
        ).log_softmax(-1)
        got = answer(logp, log_ref)
        assert not isinstance(got, Tensor) or got.numel() == 1, (
            "Return one number: the states of a line add up."
        )
        got = float(got)
        expected = sum(
            math.exp(q) * (p - q)
            for row, other in zip(logp.tolist(), log_ref.tolist(), strict=True)
            for p, q in zip(row, other, strict=True)
        )
        by_policy = -(logp.exp() * (logp - log_ref)).sum().item()
        assert abs(got - by_policy) > 1e-9, (
            "That averages by the policy. The tokens were drawn by the reference: whose mean of "
            "log π/π_ref does the left side of the equation estimate?"
        )
        assert abs(got + expected) > 1e-9, "The sign: the mean log-ratio is minus a divergence."
        assert length == 1 or abs(got - expected / length) > 1e-9, (
            "The states of a line add up; a mean over them breaks the chain rule."
        )
        assert abs(got - expected) < 1e-9, (
            f"For the test line of {length} tokens it is {expected:.4f}, not {got:.4f}."
        )


def solution_3(p_w, ref, beta):
    """β KL(p_w ‖ π_ref), reached by π = p_w."""
    return beta * sum(w * math.log(w / q) for w, q in zip(p_w, ref, strict=True) if w > 0)


def check_3(answer) -> None:
    require_function(answer)
    for p_w, ref, beta in (
        ([0.5, 0.3, 0.2], [0.1, 0.3, 0.6], 0.5),
        ([0.25, 0.75], [0.25, 0.75], 0.1),
        ([1.0, 0.0], [0.5, 0.5], 2.0),
    ):
        try:
            got = answer(p_w, ref, beta)
        except (ValueError, ZeroDivisionError):
            raise AssertionError(
                "A logarithm or a division failed: an answer of probability 0 adds nothing."
            ) from None
        assert isinstance(got, int | float), "Return one number."
        expected = beta * sum(
            w * (math.log(w) - math.log(q)) for w, q in zip(p_w, ref, strict=True) if w
        )
        if expected > 1e-9:
            assert abs(got) > 1e-9, "Nought is the ceiling only where the reference equals p_w."
            assert abs(got + expected) > 1e-9, "The sign: a ceiling cannot lie below nought."
            assert abs(got - expected / beta) > 1e-9 or beta == 1, "A β is missing: it is a reward."
            if all(p_w):
                other = beta * sum(
                    q * (math.log(q) - math.log(w)) for w, q in zip(p_w, ref, strict=True)
                )
                assert abs(got - other) > 1e-9 or abs(other - expected) < 1e-9, (
                    "That is KL(π_ref ‖ p_w); the mean is over chosen answers."
                )
        assert abs(got - expected) < 1e-9, (
            f"With p_w = {p_w}, π_ref = {ref} and β = {beta} it is {expected:.6f}. Which π makes "
            "KL(p_w ‖ π) least? An answer of probability 0 adds nothing."
        )


def solution_4(margin):
    """β = v/m, at least 1 because v ≥ m."""
    return variance_of_margin(margin) / margin


def check_4(answer) -> None:
    require_function(answer)
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    weight = (-(z**2) / 2).softmax(0)
    for v in (0.2, 1.0, 3.0):
        gap = math.sqrt(2 * v) * z
        margin = (weight * gap * (gap / 2).tanh()).sum().item()
        got = answer(margin)
        assert isinstance(got, int | float) and got > 0, "Return β, a positive number."
        assert abs(got - margin / v) > 1e-4, "Upside down: at a β below 1 chosen is negative."
        assert abs(got - v / (2 * margin)) > 1e-4, (
            "The chosen reward lies above the mean of the two by half the margin, not by all of it."
        )
        assert abs(got - v / margin) < 1e-4, (
            f"Where the margin is {margin:.4f} the variance is {v}. At β = {got:.4f} the chosen "
            f"reward is {-v / (2 * got) + margin / 2:+.4f}, which should be nought."
        )
