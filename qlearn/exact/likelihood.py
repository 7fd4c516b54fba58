"""Why likelihoods fall: the mean implicit return of chosen, rejected and reference answers."""

from typing import NamedTuple

import torch
from torch import Tensor

from qlearn.exact.check import check_tensors
from qlearn.exact.soft import soft_value_prior


class Means(NamedTuple):
    """Mean implicit returns at the optimum: of chosen, rejected and reference answers."""

    chosen: Tensor
    rejected: Tensor
    reference: Tensor


def sign_law(returns: Tensor, log_ref: Tensor, beta: float) -> Means:
    """The mean implicit returns of the best policy when pairs come from the reference.

    E_w r̂ = E_ref R + ½ E[Δ tanh(Δ/2)] − V*,  E_l r̂ = E_ref R − ½ E[Δ tanh(Δ/2)] − V*,
    E_ref r̂ = E_ref R − V* ≤ 0, with Δ = R(y) − R(y') of two independent reference answers and
    Bradley-Terry labels. The margin E[Δ tanh(Δ/2)] does not depend on β.

    Shapes: returns and log_ref (L,), the answers to one prompt; scalars come back, in reward units.
    Raises: ValueError for shapes that differ, returns that are not finite or too far apart for
    their type, a reference that is not a distribution, or β that is not positive and finite.
    Source: `eq-sign-law` in the book.
    """
    check_tensors(returns=returns, log_ref=log_ref)
    if returns.ndim != 1 or not returns.isfinite().all():
        raise ValueError("returns must be one row of finite numbers, the answers to one prompt.")
    if not abs(log_ref.exp().sum().item() - 1) <= 1e-5:  # also in float32
        raise ValueError("log_ref must hold log-probabilities that sum to 1 over the answers.")
    p = log_ref.exp()
    mean = (p * returns).sum()
    gap = returns[:, None] - returns[None, :]
    half_margin = (p[:, None] * p[None, :] * gap * torch.tanh(gap / 2)).sum() / 2
    value = soft_value_prior(returns, log_ref, beta)
    if not (half_margin.isfinite() and value.isfinite()):
        raise ValueError("The returns are too far apart for their type; use float64.")
    return Means(mean + half_margin - value, mean - half_margin - value, mean - value)
