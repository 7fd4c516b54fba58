"""Soft Bellman backups on the token MDP: Eqs 2, 5, 6, 7, 10 and 11 of the paper.

The literature writes the same optimum in two conventions. They share V and π and differ in Q:

  reference inside the reward   Q = r + β log π_ref + V(s')   V = β log Σ_a exp(Q/β)
  reference as prior            Q̃ = r + V(s')                 V = β log Σ_a π_ref exp(Q̃/β)

so Q = Q̃ + β log π_ref. The first is the paper's (`soft_backup`, `.q`), the second is
`soft_backup_prior` with `.q_tilde`. The advantage Q − V is β log π in the first and
Q̃ − V = β log(π/π_ref) in the second; only the second is what DPO's implicit reward estimates.

Every edge field is a tuple of float64 tensors (n_t, A), every state field of (n_t,); see
`qlearn.exact.tree`. Rewards, values and β are in the same unit; log-probabilities are in nats.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qlearn.exact.tree import Levels, Tree


class Soft(NamedTuple):
    """The optimum with the reference inside the reward: V* (n_t,), Q* and log π* (n_t, A)."""

    value: Levels
    q: Levels
    logp: Levels


class SoftPrior(NamedTuple):
    """The same optimum with the reference as prior: V* (n_t,), Q̃* and log π* (n_t, A)."""

    value: Levels
    q_tilde: Levels
    logp: Levels


def soft_value(q: Tensor, beta: float) -> Tensor:
    """V(s) = β log Σ_a exp(Q(s,a)/β): the soft maximum of each row, (..., A) to (...).

    Source: Eq. 6; `eq-soft-value` in the book.
    """
    return beta * torch.logsumexp(q / beta, dim=-1)


def soft_value_prior(q_tilde: Tensor, log_ref: Tensor, beta: float) -> Tensor:
    """V(s) = β log Σ_a π_ref(a|s) exp(Q̃(s,a)/β): the same V as `soft_value`, (..., A) to (...)."""
    return beta * torch.logsumexp(log_ref + q_tilde / beta, dim=-1)


def soft_backup(tree: Tree, reward: Levels, log_ref: Levels, beta: float) -> Soft:
    """The optimal policy of the KL-regularised token MDP, the reference inside the reward.

    Q*(s,a) = r(s,a) + β log π_ref(a|s) + V*(s'),  V* by `soft_value`,  log π* = (Q* − V*)/β,
    backwards from V*(terminal) = 0.

    Raises: ValueError for β that is not positive and finite, fields of the wrong shape or dtype,
    rewards that are not finite, a reference that is not a distribution or leaves out an action.
    Source: Eqs 5, 6 and 7; `eq-soft-bellman` in the book.
    """
    check_problem(tree, reward, log_ref, beta)

    def level(t, following):
        q = reward[t] + beta * log_ref[t] + following
        value = soft_value(q, beta)
        return value, q, (q - value[:, None]) / beta

    return Soft(*_backwards(tree, level))


def soft_backup_prior(tree: Tree, reward: Levels, log_ref: Levels, beta: float) -> SoftPrior:
    """The optimal policy of the KL-regularised token MDP, the reference as prior.

    Q̃*(s,a) = r(s,a) + V*(s'),  V* by `soft_value_prior`,  log π* = log π_ref + (Q̃* − V*)/β.

    Raises: as `soft_backup`.
    Source: the KL-prior form of Eqs 5, 6 and 7; `eq-soft-bellman-prior` in the book.
    """
    check_problem(tree, reward, log_ref, beta)

    def level(t, following):
        q_tilde = reward[t] + following
        value = soft_value_prior(q_tilde, log_ref[t], beta)
        return value, q_tilde, log_ref[t] + (q_tilde - value[:, None]) / beta

    return SoftPrior(*_backwards(tree, level))


def reward_from_q(tree: Tree, q: Levels, log_ref: Levels, beta: float) -> Levels:
    """The one reward for which `q` is optimal: r = Q − β log π_ref − V_Q(s'), V_Q by `soft_value`.

    The inverse of `soft_backup`, hence Lemma 1: on a finite tree r and Q* determine each other.

    Raises: as `soft_backup`.
    Source: Lemma 1; `eq-inverse-bellman` in the book.
    """
    check_problem(tree, q, log_ref, beta)
    value = [soft_value(x, beta) for x in q] + [None]
    return tuple(
        q[t] - beta * log_ref[t] - tree.next_value(t, value[t + 1]) for t in range(tree.horizon)
    )


def implicit_reward(logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """r̂ = β log π − β log π_ref, elementwise: the reward, and soft advantage, a policy implies.

    Of token log-probabilities it is Eq. 11; of the sums over a response, the implicit return.

    Source: Eqs 10 and 11; `eq-implicit-reward` in the book.
    """
    return beta * (logp - ref_logp)


def expected_return(tree: Tree, logp: Levels, reward: Levels) -> Tensor:
    """E_π Σ_t r(s_t, a_t) from each prompt: (n_prompts,). Tokens that π never writes count nothing.

    Source: policy evaluation, V^π(s) = Σ_a π(a|s) [r(s,a) + V^π(s')].
    """
    value = None
    for t in reversed(range(tree.horizon)):
        p = logp[t].exp()
        value = torch.where(p > 0, p * (reward[t] + tree.next_value(t, value)), 0.0).sum(dim=-1)
    return value


def objective(tree: Tree, logp: Levels, reward: Levels, log_ref: Levels, beta: float) -> Tensor:
    """J(π) = E_π Σ_t [ r − β log(π/π_ref) ] from each prompt: (n_prompts,), in units of reward.

    Source: Eq. 2; `eq-objective` in the book.
    """
    check_problem(tree, reward, log_ref, beta)
    levels = zip(reward, logp, log_ref, strict=True)
    return expected_return(tree, logp, tuple(r - implicit_reward(p, q, beta) for r, p, q in levels))


def sequence_kl(tree: Tree, logp: Levels, log_other: Levels) -> Tensor:
    """KL(π ‖ π') over whole responses, from each prompt: (n_prompts,), in nats (chain rule)."""
    levels = zip(logp, log_other, strict=True)
    return expected_return(tree, logp, tuple(p - q for p, q in levels))


def regret(tree: Tree, logp: Levels, reward: Levels, log_ref: Levels, beta: float) -> Tensor:
    """V*(s₀) − J(π) from each prompt: (n_prompts,); equal to β KL(π ‖ π*) for every π.

    Source: fact 3 of the notes; `eq-regret` in the book.
    """
    best = soft_backup(tree, reward, log_ref, beta).value[0]
    return best - objective(tree, logp, reward, log_ref, beta)


def check_problem(tree: Tree, reward: Levels, log_ref: Levels, beta: float) -> None:
    """Raises ValueError with one sentence unless the fields fit the tree and β is usable."""
    check_beta(beta)
    for name, field in (("reward", reward), ("log_ref", log_ref)):
        shapes = [tuple(x.shape) for x in field]
        if shapes != [tuple(x.shape) for x in tree.child]:
            raise ValueError(f"{name} must have one (states, actions) table a level; got {shapes}.")
        if any(x.dtype != torch.float64 for x in field):
            raise ValueError(f"{name} must be float64: the exact floor promises 1e-10.")
    for t in range(tree.horizon):
        # A sum is finite exactly when all its terms are, and costs a fifth of testing each.
        if not tree.only_present(t, reward[t], 0.0).sum().isfinite():
            raise ValueError(f"reward at level {t} has a value that is not finite.")
        if not tree.only_present(t, log_ref[t], 0.0).sum().isfinite():
            raise ValueError(
                f"log_ref at level {t} gives an action probability 0; β log π_ref and the reward "
                "there are undefined, so mark the action ABSENT instead."
            )
        if not tree.only_present(t, log_ref[t], -math.inf).equal(log_ref[t]):
            raise ValueError(f"log_ref at level {t} must be -inf where an action is ABSENT.")
        if (log_ref[t].exp().sum(dim=-1) - 1).abs().max() > 1e-8:
            raise ValueError(f"log_ref at level {t} is not a distribution: rows must sum to 1.")


def check_beta(beta: float) -> None:
    """Raises ValueError unless β is a positive, finite number."""
    if not (isinstance(beta, int | float) and math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a positive, finite number, not {beta!r}.")


def _backwards(tree: Tree, level) -> tuple[Levels, Levels, Levels]:
    """Runs `level(t, V(s'))` from the deepest level up and collects (V, Q, log π)."""
    found, value = [], None
    for t in reversed(range(tree.horizon)):
        value, q, logp = level(t, tree.next_value(t, value))
        found.append((value, q, logp))
    values, qs, logps = zip(*reversed(found), strict=True)
    return values, qs, logps
