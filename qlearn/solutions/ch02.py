"""Exercises of the chapter "From max to softmax"."""

import math

import torch
from torch import Tensor

from qlearn.solutions import require_function


def solution_1(win: float, lose: float, p: float, beta: float) -> float:
    """V = β log( p exp(win/β) + (1 − p) exp(lose/β) )."""
    top = max(win, lose)
    total = p * math.exp((win - top) / beta) + (1 - p) * math.exp((lose - top) / beta)
    return top + beta * math.log(total)


def check_1(answer) -> None:
    require_function(answer)
    for win, lose, p, beta in (
        (1.0, 0.0, 0.5, 0.5),
        (-2.0, 3.0, 0.9, 2.0),
        (40.0, -30.0, 0.2, 1e-3),
        (-30.0, 40.0, 0.3, 1e-3),
    ):
        try:
            got = answer(win, lose, p, beta)
        except OverflowError:
            raise AssertionError(
                f"exp overflows at returns {win} and {lose}, β = {beta}: take the larger out first."
            ) from None
        assert isinstance(got, int | float | Tensor), "Return one number."
        pair = torch.tensor([win, lose], dtype=torch.float64) / beta
        truth = beta * (pair + torch.tensor([p, 1 - p], dtype=torch.float64).log()).logsumexp(0)
        mean = p * win + (1 - p) * lose
        assert abs(float(got) - mean) > 1e-9, "That is the mean return; V is above it."
        no_ref = beta * pair.logsumexp(0)
        assert abs(float(got) - no_ref) > 1e-9, "Where is the reference? It weighs each answer."
        if abs(float(got) - truth) < 1e-9:
            continue
        best = (pair + torch.tensor([p, 1 - p], dtype=torch.float64).log()).softmax(0)
        earned = (best * pair).sum() * beta
        assert abs(float(got) - earned) > 1e-9, "That is the mean return of π*, before the price."
        assert abs(float(got) - truth / beta) > 1e-9, "That is V/β: a β is missing in front."
        assert abs(float(got) - truth) > 1e-5, "Nearly: compute in float64, as Python's floats do."
        raise AssertionError(
            f"At returns {win} and {lose}, p = {p}, β = {beta} the value is {truth.item():.6g}."
        )


def bug_2(returns: Tensor, log_ref: Tensor, beta: float) -> Tensor:
    """log π* of each answer, the best policy under the price β."""
    return (returns / beta).log_softmax(0)


def solution_2(returns: Tensor, log_ref: Tensor, beta: float) -> Tensor:
    """log π* of each answer, the best policy under the price β."""
    return (log_ref + returns / beta).log_softmax(0)


def check_2(answer) -> None:
    require_function(answer)
    generator = torch.Generator().manual_seed(22)
    for beta in (0.2, 1.0, 3.0):
        returns, logits = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        ref = logits.softmax(0)
        got = answer(returns, ref.log(), beta)
        assert isinstance(got, Tensor) and got.shape == (6,), "Return one number an answer."
        weights = ref * (returns / beta).exp()
        assert abs(got.sum() - 1) > 1e-9, "Return log-probabilities, not probabilities."
        assert abs(got.exp().sum() - 1) < 1e-9, "The probabilities of all answers must sum to 1."
        uniform = (returns / beta).softmax(0)
        assert (got.exp() - uniform).abs().max() > 1e-9, (
            "The same policy whatever the reference? An answer that it never writes is not cheap."
        )
        assert (got.exp() - weights / weights.sum()).abs().max() < 1e-9, (
            "Each probability should be π_ref(y) exp(R(y)/β), divided by the sum of them all."
        )


def solution_3(value, beta: float) -> float:
    """KL(π* ‖ π_ref) = −dV/dβ."""
    h = 1e-4 * beta
    return (value(beta - h) - value(beta + h)) / (2 * h)


def check_3(answer) -> None:
    require_function(answer)
    generator = torch.Generator().manual_seed(23)
    for beta in (0.3, 1.0, 2.0):
        returns, logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        log_ref = logits.log_softmax(0)

        def value(price, returns=returns, log_ref=log_ref):
            return price * (log_ref + returns / price).logsumexp(0).item()

        best = (log_ref + returns / beta).log_softmax(0)
        truth = (best.exp() * (best - log_ref)).sum().item()
        got = answer(value, beta)
        assert isinstance(got, int | float), "Return one number."
        assert abs(got + truth) > 1e-3 * truth, "The sign: a divergence is never negative."
        assert abs(got - truth) < 1e-3 * truth, (
            f"At β = {beta} the divergence is {truth:.4f}. It is a slope of V: take "
            "a step of about β/10000, to both sides."
        )


def solution_4(p: float, target: float) -> float:
    """β at which odds(target) = odds(p) exp(1/β)."""
    return 1 / (math.log(target / (1 - target)) - math.log(p / (1 - p)))


def check_4(answer) -> None:
    require_function(answer)
    for p, target in ((0.5, 0.9), (0.01, 0.5), (0.3, 0.31)):
        try:
            beta = answer(p, target)
        except ZeroDivisionError:
            raise AssertionError(
                f"Division by zero at p = {p}, target = {target}: where is p?"
            ) from None
        assert isinstance(beta, int | float) and beta > 0, "Return a positive number, β."
        good, bad = p * math.exp(min(1 / beta, 700)), 1 - p
        found = good / (good + bad)
        assert abs(found - target) < 1e-9, (
            f"At β = {beta:.4g} the good answer has probability {found:.4g}, not {target}: "
            "compare its odds under the policy and under the reference."
        )
