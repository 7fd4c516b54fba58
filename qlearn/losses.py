"""The losses, as pure functions of tensors, shared by the exact trees and the language models.

Each takes log-probabilities or scores and returns one number a pair or a scalar; none knows what a
model, a batch or a device is.

  bradley_terry   Eq. 1    −log σ(R_w − R_l)
  dpo             Eqs 4, 9
  ppo_clip        the clipped surrogate of PPO, for Eqs 2 and 3
  nll             the supervised loss
"""

from typing import NamedTuple

from torch import Tensor

from qlearn.exact.preferences import bradley_terry_logp
from qlearn.exact.soft import implicit_reward


class DPO(NamedTuple):
    """A DPO loss (B,) with the implicit returns (B,) it compares, which carry no gradient."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(R_w − R_l): the negative log-likelihood of each preference, (B,) to (B,), in nats.

    Source: Eq. 1; `eq-bradley-terry` in the book.
    """
    return -bradley_terry_logp(chosen, rejected)


def dpo(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_logp_chosen: Tensor,
    ref_logp_rejected: Tensor,
    beta: float,
) -> DPO:
    """Bradley-Terry on the returns that the policy implies: one logistic regression a pair.

    L = −log σ( β log π(y_w)/π_ref(y_w) − β log π(y_l)/π_ref(y_l) )

    Shapes: four (B,) tensors of log-probabilities of whole responses, each the *sum* over its
    tokens, EOS included (the mean would change β with the length). Nats.
    Source: Eqs 4 and 9; `eq-dpo-loss` in the book.
    """
    chosen = implicit_reward(logp_chosen, ref_logp_chosen, beta)
    rejected = implicit_reward(logp_rejected, ref_logp_rejected, beta)
    return DPO(bradley_terry(chosen, rejected), chosen.detach(), rejected.detach())


def ppo_clip(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """−min( ρ A, clip(ρ, 1 − ε, 1 + ε) A ), ρ = π/π_old: the PPO loss of every token.

    Elementwise. Its gradient at π = π_old is that of −ρ A; once ρ has left the interval in the
    direction that A asks for, the token is left alone.

    Source: Schulman et al. (2017), Eq. 7; `eq-ppo` in the book.
    """
    ratio = (logp - old_logp).exp()
    return -(ratio * advantage).minimum(ratio.clamp(1 - clip, 1 + clip) * advantage)


def nll(logp: Tensor, mask: Tensor) -> Tensor:
    """−Σ mask · log π / Σ mask: the mean over all response tokens of the batch, a scalar, in nats.

    Shapes: logp and mask (B, T), mask 1 on response tokens. The mean is over tokens, not rows, so
    micro-batches must be weighted by their token counts.
    """
    return -(logp * mask).sum() / mask.sum()
