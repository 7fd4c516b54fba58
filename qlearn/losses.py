"""The losses, as pure functions of tensors, shared by the exact trees and the language models.

Each takes log-probabilities or scores and returns one number a pair or a scalar; none knows what a
model, a batch or a device is.

  bradley_terry   Eq. 1    −log σ(R_w − R_l)
  dpo             Eqs 4, 9
  ppo_clip        the clipped surrogate of PPO, for Eqs 2 and 3
  value_clip      what PPO's value head learns from
  gae             advantages from rewards and values
  leave_one_out   advantages from whole returns of one prompt
  whiten          mean 0, variance 1
  nll             the supervised loss

On entry each checks shapes, types and settings, and raises ValueError: a (B,) beside a (B, 1) would
broadcast in silence. Numbers are not checked, for that would wait for the device at every step:
NaN, ∞ − ∞ and 0 · ∞ come out as NaN, and a training run skips such a step and says so.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qlearn.exact.check import check_number, check_tensors
from qlearn.exact.preferences import bradley_terry_logp
from qlearn.exact.soft import implicit_reward


class DPO(NamedTuple):
    """A DPO loss (B,) with the implicit returns (B,) it compares, which carry no gradient."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(R_w − R_l): the negative log-likelihood of each preference, (B,) to (B,), in nats.

    Raises: ValueError unless both are of floats and of one shape.
    Source: Eq. 1; `eq-bradley-terry` in the book.
    """
    check_tensors(chosen=chosen, rejected=rejected)
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
    Raises: ValueError unless the four are of floats and of one shape, and β positive and finite.
    Source: Eqs 4 and 9; `eq-dpo-loss` in the book.
    """
    check_tensors(
        logp_chosen=logp_chosen, logp_rejected=logp_rejected,
        ref_logp_chosen=ref_logp_chosen, ref_logp_rejected=ref_logp_rejected,
    )  # fmt: skip
    chosen = implicit_reward(logp_chosen, ref_logp_chosen, beta)
    rejected = implicit_reward(logp_rejected, ref_logp_rejected, beta)
    return DPO(bradley_terry(chosen, rejected), chosen.detach(), rejected.detach())


def ppo_clip(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """−min( ρ A, clip(ρ, 1 − ε, 1 + ε) A ), ρ = π/π_old: the PPO loss of every token.

    Elementwise. Its gradient at π = π_old is that of −ρ A; once ρ has left the interval in the
    direction that A asks for, the token is left alone.

    Raises: ValueError unless the three are of floats and of one shape, and clip is positive; ∞ is
    no clip.
    Source: Schulman et al. (2017), Eq. 7; `eq-ppo` in the book.
    """
    check_tensors(logp=logp, old_logp=old_logp, advantage=advantage)
    check_number("clip", clip, above=0, infinite=True)
    ratio = (logp - old_logp).exp()
    return -(ratio * advantage).minimum(ratio.clamp(1 - clip, 1 + clip) * advantage)


def value_clip(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """½ max( (V − G)², (V_c − G)² ), V_c = V held within ± clip of V_old: a state's value loss.

    Elementwise. Like `ppo_clip` it stops pushing once V has moved by more than `clip` towards G.

    Raises: ValueError unless the three are of floats and of one shape, and clip is positive; ∞ is
    no clip.
    Source: the authors' implementation of PPO (baselines, 2017); `eq-value-loss` in the book.
    """
    check_tensors(value=value, old_value=old_value, target=target)
    check_number("clip", clip, above=0, infinite=True)
    near = old_value + (value - old_value).clamp(-clip, clip)
    return ((value - target) ** 2).maximum((near - target) ** 2) / 2


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(A, G): generalised advantages of every token, and the returns A + V that values learn from.

    A_t = Σ_k (γλ)^k δ_{t+k},  δ_t = r_t + γ V(s_{t+1}) − V(s_t),  V = 0 after the last token.

    Shapes: reward, value (of the state in which the token is chosen) and mask, all (B, T), mask 1
    on a row's tokens, which stand first. Both results are 0 where the mask is 0. λ = 1 is the
    return less the value, λ = 0 the one-step error. What stands where the mask is 0 is not read.

    Raises: ValueError unless the three are tables of one shape, the first two of floats, and γ and
    λ lie in [0, 1].
    Source: Schulman et al. (2016), Eq. 16; `eq-gae` in the book.
    """
    check_tensors(mask, reward=reward, value=value)
    check_number("gamma", gamma, least=0, most=1)
    check_number("lam", lam, least=0, most=1)
    if reward.ndim != 2:
        raise ValueError(f"reward must be a table (B, T), not {tuple(reward.shape)}.")
    off = mask == 0
    value = value.masked_fill(off, 0.0)
    advantage = torch.zeros_like(reward + value)
    ahead = next_value = advantage.new_zeros(len(reward))
    for t in reversed(range(reward.shape[1])):
        error = reward[:, t] + gamma * next_value - value[:, t]
        ahead = (error + gamma * lam * ahead).masked_fill(off[:, t], 0.0)
        advantage[:, t], next_value = ahead, value[:, t]
    return advantage, advantage + value


def leave_one_out(returns: Tensor) -> Tensor:
    """Each return less the mean of the prompt's other returns: (prompts, k) to (prompts, k), k ≥ 2.

    The baseline does not know the response that it is taken from, so the gradient stays unbiased.

    Raises: ValueError unless returns is a table of floats with at least two a prompt.
    Source: Kool et al. (2019); `eq-rloo` in the book.
    """
    check_tensors(returns=returns)
    if returns.ndim != 2 or returns.shape[1] < 2:
        raise ValueError(
            f"returns must be a table (prompts, k), k at least 2, not {tuple(returns.shape)}: "
            "one response has no other to be compared with."
        )
    k = returns.shape[1]
    return (returns - returns.mean(dim=1, keepdim=True)) * k / (k - 1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x − mean) / (standard deviation + 10⁻⁸) over the places where the mask is 1; 0 elsewhere.

    Where nothing varies it is 0, and noise of 10⁻⁸ is not blown up to 1. What stands where the mask
    is 0 is not read.

    Raises: ValueError unless x is of floats and has the mask's shape, or where x² overflows.
    """
    check_tensors(mask, x=x)
    kept = x[mask.bool()]
    if (kept == kept[:1]).all():  # else rounding of the mean would be divided by itself
        return torch.zeros_like(x)
    deviation = kept.std(unbiased=False)
    if deviation.isinf():
        raise ValueError(f"x is too large for a variance in {x.dtype}; scale it down first.")
    return ((x - kept.mean()) / (deviation + 1e-8)).masked_fill(mask == 0, 0.0)


def nll(logp: Tensor, mask: Tensor) -> Tensor:
    """−Σ mask · log π / Σ mask: the mean over all response tokens of the batch, a scalar, in nats.

    Shapes: logp and mask (B, T), mask 1 on response tokens; what stands elsewhere is not read. The
    mean is over tokens, not rows, so micro-batches must be weighted by their token counts.
    Raises: ValueError unless logp is of floats and has the mask's shape, or without a token.
    Source: the supervised loss of stage 1; `eq-sft` in the book.
    """
    check_tensors(mask, logp=logp)
    if not mask.any():
        raise ValueError("The batch has no response token, so its mean is not defined.")
    return -logp.masked_fill(mask == 0, 0.0).sum() / mask.sum()
