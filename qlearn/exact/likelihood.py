"""Why likelihoods fall: the mean implicit return of chosen, rejected and reference answers."""

from typing import NamedTuple

import torch
from torch import Tensor

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
    Source: `eq-sign-law` in the book.
    """
    p = log_ref.exp()
    mean = (p * returns).sum()
    gap = returns[:, None] - returns[None, :]
    half_margin = (p[:, None] * p[None, :] * gap * torch.tanh(gap / 2)).sum() / 2
    value = soft_value_prior(returns, log_ref, beta)
    return Means(mean + half_margin - value, mean - half_margin - value, mean - value)
