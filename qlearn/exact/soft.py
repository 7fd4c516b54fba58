"""Soft Bellman backups on the token MDP: Eqs 2, 3, 5, 6, 7, 10 and 11 of the paper.

The literature writes the same optimum in two conventions. They share V and π and differ in Q:

  reference inside the reward   Q = r + β log π_ref + V(s')   V = β log Σ_a exp(Q/β)
  reference as prior            Q̃ = r + V(s')                 V = β log Σ_a π_ref exp(Q̃/β)

so Q = Q̃ + β log π_ref. The first is the paper's (`soft_backup`, `.q`), the second is
`soft_backup_prior` with `.q_tilde`. The advantage Q − V is β log π in the first and
Q̃ − V = β log(π/π_ref) in the second; only the second is what DPO's implicit reward estimates.

Every edge field is a tuple of float64 tensors (n_t, A), every state field of (n_t,); see
`qlearn.exact.tree`. Rewards, values and β are in the same unit; log-probabilities are in nats.

At an action that is ABSENT log π and Q are −∞, and the reward is a number that nothing reads: 0 in
every result.

Three assumptions can be lifted one by one. β may be a state field, one price a state; γ < 1
discounts what follows; and a `ChanceTree` draws the next state, so that V(s') is E V(s').
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qlearn.exact.chance import ChanceTree
from qlearn.exact.check import (
    check_alike,
    check_beta,
    check_fields,
    check_number,
    check_policy,
    check_problem,
    check_tensors,
)
from qlearn.exact.tree import Levels, Tree, present

MDP = Tree | ChanceTree
Beta = float | Levels  # one price of a nat, or one in each state


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


def soft_value(q: Tensor, beta: float | Tensor) -> Tensor:
    """V(s) = β log Σ_a exp(Q(s,a)/β): the soft maximum of each row, (..., A) to (...).

    β is a number or a column (..., 1).

    Raises: ValueError for a row without a number, or β that is not positive and finite.
    Source: Eq. 6; `eq-soft-value` in the book.
    """
    check_beta(beta)
    top = _largest(q)  # taken out, because Q/β can overflow where V does not
    return (top + beta * torch.logsumexp((q - top) / beta, dim=-1, keepdim=True)).squeeze(-1)


def soft_value_prior(q_tilde: Tensor, log_ref: Tensor, beta: float | Tensor) -> Tensor:
    """V(s) = β log Σ_a π_ref(a|s) exp(Q̃(s,a)/β): the same V as `soft_value`, (..., A) to (...).

    What the reference never writes counts nothing, whatever its Q̃.

    Raises: as `soft_value`.
    Source: the KL-prior form of Eq. 6; `eq-soft-bellman-prior` in the book.
    """
    check_beta(beta)
    q_tilde = torch.where(log_ref == -math.inf, -math.inf, q_tilde)
    top = _largest(q_tilde)
    exponent = log_ref + (q_tilde - top) / beta
    return (top + beta * torch.logsumexp(exponent, dim=-1, keepdim=True)).squeeze(-1)


def soft_backup(tree: MDP, reward: Levels, log_ref: Levels, beta: Beta, gamma: float = 1.0) -> Soft:
    """The optimal policy of the KL-regularised token MDP, the reference inside the reward.

    Q*(s,a) = r(s,a) + β log π_ref(a|s) + γ V*(s'),  V* by `soft_value`,  log π* = (Q* − V*)/β,
    backwards from V*(terminal) = 0.

    Raises: ValueError for β that is not positive and finite, fields of the wrong shape or dtype,
    rewards that are not finite or so large that values overflow, a reference that is not a
    distribution or leaves out an action.
    Source: Eqs 5, 6 and 7; `eq-soft-bellman` in the book.
    """
    check_problem(tree, reward, log_ref, beta, gamma)
    reward = present(tree, reward)

    def level(t, following):
        b = beta_at(beta, t)
        q = reward[t] + b * log_ref[t] + following
        value = soft_value(q, b)
        return value, q, (q - value[:, None]) / b

    return Soft(*_backwards(tree, level, gamma))


def soft_backup_prior(
    tree: MDP, reward: Levels, log_ref: Levels, beta: Beta, gamma: float = 1.0
) -> SoftPrior:
    """The optimal policy of the KL-regularised token MDP, the reference as prior.

    Q̃*(s,a) = r(s,a) + γ V*(s'),  V* by `soft_value_prior`,  log π* = log π_ref + (Q̃* − V*)/β.

    Raises: as `soft_backup`.
    Source: the KL-prior form of Eqs 5, 6 and 7; `eq-soft-bellman-prior` in the book.
    """
    check_problem(tree, reward, log_ref, beta, gamma)
    reward = present(tree, reward)

    def level(t, following):
        b = beta_at(beta, t)
        q_tilde = reward[t] + following
        value = soft_value_prior(q_tilde, log_ref[t], b)
        return value, q_tilde, log_ref[t] + (q_tilde - value[:, None]) / b

    return SoftPrior(*_backwards(tree, level, gamma))


def reward_from_q(tree: MDP, q: Levels, log_ref: Levels, beta: Beta, gamma: float = 1.0) -> Levels:
    """The one reward for which `q` is optimal: r = Q − β log π_ref − γ V_Q(s'), V_Q of `q`.

    The inverse of `soft_backup`, hence Lemma 1: without loops r and Q* determine each other.

    Raises: as `soft_backup`.
    Source: Lemma 1; `eq-inverse-bellman` in the book.
    """
    check_problem(tree, q, log_ref, beta, gamma, name="q")
    q_there = present(tree, q, elsewhere=-math.inf)
    value = [soft_value(x, beta_at(beta, t)) for t, x in enumerate(q_there)] + [None]
    reward = tuple(
        q[t] - beta_at(beta, t) * log_ref[t] - gamma * tree.next_value(t, value[t + 1])
        for t in range(tree.horizon)
    )
    return present(tree, reward)


def jacobian(tree: MDP, logp: Levels, gamma: float = 1.0) -> Tensor:
    """∂Q*(s,a)/∂r(s'',a'') = P_π*( visit (s'',a'') | s,a ), discounted: (E, E), E = Σ_t n_t A.

    Rows and columns are in the order of `Tree.split`. Each edge visits itself, and otherwise only
    deeper ones: the matrix is unit-triangular, so its determinant is 1. `logp` is log π*.

    Raises: ValueError for `logp` that is no policy on the tree, or gamma outside (0, 1].
    Source: `eq-jacobian` in the book.
    """
    check_policy(tree, logp)
    check_number("gamma", gamma, above=0, most=1)
    sizes = [n * a for n, a in tree.shapes]
    identity = torch.eye(sum(sizes), dtype=torch.float64).split(sizes)
    rows, of_state = [], None
    for t in reversed(range(tree.horizon)):
        visits = identity[t].view(*tree.shapes[t], -1).clone()
        if of_state is not None:  # one state field a column: P(visit | state) of the level below
            below = [tree.next_value(t, column) for column in of_state.T]
            visits += gamma * torch.stack(below, dim=-1)
        p = logp[t].exp()
        of_state = torch.where(p[..., None] > 0, p[..., None] * visits, 0.0).sum(dim=1)
        rows.append(visits.flatten(0, 1))
    return torch.cat(rows[::-1])


def implicit_reward(logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """r̂ = β log π − β log π_ref, elementwise: the reward, and soft advantage, a policy implies.

    Of token log-probabilities it is Eq. 11; of the sums over a response, the implicit return.
    What neither of them ever writes has no ratio: NaN.

    Raises: ValueError unless both have one shape, of floats, and β is positive and finite.
    Source: Eqs 10 and 11; `eq-implicit-reward` in the book.
    """
    check_tensors(logp=logp, ref_logp=ref_logp)
    check_beta(beta)
    return beta * (logp - ref_logp)


def implicit_rewards(logp: Levels, log_ref: Levels, beta: Beta) -> Levels:
    """The implicit reward of every edge, β log π/π_ref, where β may differ from state to state.

    It is 0 at actions that neither writes, so where they are ABSENT; +∞ where only the policy
    writes, and −∞ where only the reference does.

    Raises: ValueError for fields of different shapes, or β that is not positive and finite.
    Source: Eq. 11; `eq-implicit-reward` in the book.
    """
    check_alike(logp=logp, log_ref=log_ref)
    check_beta(beta, [tuple(x.shape) for x in logp])
    levels = enumerate(zip(logp, log_ref, strict=True))
    return tuple(
        implicit_reward(p, ref, beta_at(beta, t)).masked_fill(
            (p == -math.inf) & (ref == -math.inf), 0.0
        )
        for t, (p, ref) in levels
    )


def evaluate(tree: MDP, logp: Levels, reward: Levels, gamma: float = 1.0) -> tuple[Levels, Levels]:
    """(V^π, Q^π) of any policy: Q^π = r + γ V^π(s') and V^π = Σ_a π Q^π, without a penalty.

    Tokens that π never writes count nothing in V^π.

    Raises: ValueError for `logp` that is no policy on the tree, a reward of the wrong shape, gamma
    outside (0, 1], or values that are not numbers.
    Source: policy evaluation; `eq-policy-evaluation` in the book.
    """
    check_policy(tree, logp)
    check_fields(tree.shapes, reward=reward)
    check_number("gamma", gamma, above=0, most=1)
    reward = present(tree, reward)
    values, qs, value = [], [], None
    for t in reversed(range(tree.horizon)):
        qs.append(reward[t] + gamma * tree.next_value(t, value))
        p = logp[t].exp()
        value = torch.where(p > 0, p * qs[-1], 0.0).sum(dim=-1)
        if value.isnan().any():
            raise ValueError(
                f"The value of a state of level {t} is not a number: a reward is NaN, or infinite "
                "ones of both signs meet."
            )
        values.append(value)
    return tuple(reversed(values)), tuple(reversed(qs))


def expected_return(tree: MDP, logp: Levels, reward: Levels, gamma: float = 1.0) -> Tensor:
    """E_π Σ_t γ^t r(s_t, a_t) from each prompt: (n_prompts,), by `evaluate`.

    Raises: as `evaluate`.
    """
    return evaluate(tree, logp, reward, gamma)[0][0]


def reach(tree: MDP, logp: Levels) -> Levels:
    """d_π(s): the probability that a response of π passes through each state: (n_t,) a level.

    Each prompt has probability 1.

    Raises: ValueError for `logp` that is no policy on the tree.
    Source: the state distribution of the policy gradient theorem; `eq-policy-gradient` in the book.
    """
    check_policy(tree, logp)
    found = [torch.ones(tree.shapes[0][0], dtype=torch.float64)]
    for t in range(tree.horizon - 1):
        found.append(tree.push(t, found[t][:, None] * logp[t].exp()))
    return tuple(found)


def kl_reward(logp: Levels, reward: Levels, log_ref: Levels, beta: Beta) -> Levels:
    """r − β log(π/π_ref) on every edge: the reward with the price of distance, as PPO is paid.

    Raises: as `implicit_rewards`.
    Source: Eqs 2 and 3; `eq-objective` in the book.
    """
    check_alike(logp=logp, reward=reward, log_ref=log_ref)
    implied = implicit_rewards(logp, log_ref, beta)
    return tuple(r - x for r, x in zip(reward, implied, strict=True))


def objective(
    tree: MDP, logp: Levels, reward: Levels, log_ref: Levels, beta: Beta, gamma: float = 1.0
) -> Tensor:
    """J(π) = E_π Σ_t γ^t [ r − β log(π/π_ref) ] from each prompt: (n_prompts,), in reward units.

    Raises: as `soft_backup`.
    Source: Eq. 2; `eq-objective` in the book.
    """
    check_problem(tree, reward, log_ref, beta, gamma)
    return expected_return(tree, logp, kl_reward(logp, reward, log_ref, beta), gamma)


def sequence_kl(tree: MDP, logp: Levels, log_other: Levels) -> Tensor:
    """KL(π ‖ π') over whole responses, from each prompt: (n_prompts,), in nats (chain rule).

    +∞ where π writes what π' never does.

    Raises: ValueError where one of them is no policy on the tree.
    """
    check_policy(tree, logp)
    check_policy(tree, log_other, "log_other")
    return expected_return(tree, logp, implicit_rewards(logp, log_other, 1.0))


def regret(
    tree: MDP, logp: Levels, reward: Levels, log_ref: Levels, beta: Beta, gamma: float = 1.0
) -> Tensor:
    """V*(s₀) − J(π) from each prompt: (n_prompts,); equal to β KL(π ‖ π*) for every π.

    With one price a state or a discount it is E_π Σ_t γ^t β(s_t) KL(π(·|s_t) ‖ π*(·|s_t)).

    Raises: as `soft_backup`, and for `logp` that is no policy on the tree.
    Source: `eq-regret` in the book.
    """
    best = soft_backup(tree, reward, log_ref, beta, gamma).value[0]
    return best - objective(tree, logp, reward, log_ref, beta, gamma)


def beta_at(beta: Beta, t: int) -> float | Tensor:
    """β for the edges of level t: the number itself, or a column (n_t, 1) of a state field."""
    return beta[t][:, None] if isinstance(beta, tuple) else beta


def _backwards(tree: MDP, level, gamma: float) -> tuple[Levels, Levels, Levels]:
    """Runs `level(t, γ V(s'))` from the deepest level up and collects (V, Q, log π)."""
    found, value = [], None
    for t in reversed(range(tree.horizon)):
        following = tree.next_value(t, value)
        value, q, logp = level(t, following if gamma == 1 else gamma * following)
        if not (value.sum().isfinite() or value.isfinite().all()):
            raise ValueError(
                f"The values of level {t} overflow float64; divide the rewards and beta by one "
                "large number, which leaves the policy as it is."
            )
        found.append((value, q, logp))
    values, qs, logps = zip(*reversed(found), strict=True)
    return values, qs, logps


def _largest(x: Tensor) -> Tensor:
    """The largest number of each row, (..., A) to (..., 1), and 0 where that is not finite."""
    if not (x.ndim and x.shape[-1]):
        raise ValueError("A soft maximum needs at least one number in each row.")
    top = x.detach().amax(dim=-1, keepdim=True)
    return torch.where(top.isfinite(), top, 0.0)
