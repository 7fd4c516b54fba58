"""Soft Bellman backups on the token MDP: Eqs 2, 3, 5, 6, 7, 10 and 11 of the paper.

The literature writes the same optimum in two conventions. They share V and π and differ in Q:

  reference inside the reward   Q = r + β log π_ref + V(s')   V = β log Σ_a exp(Q/β)
  reference as prior            Q̃ = r + V(s')                 V = β log Σ_a π_ref exp(Q̃/β)

so Q = Q̃ + β log π_ref. The first is the paper's (`soft_backup`, `.q`), the second is
`soft_backup_prior` with `.q_tilde`. The advantage Q − V is β log π in the first and
Q̃ − V = β log(π/π_ref) in the second; only the second is what DPO's implicit reward estimates.

Every edge field is a tuple of float64 tensors (n_t, A), every state field of (n_t,); see
`qlearn.exact.tree`. Rewards, values and β are in the same unit; log-probabilities are in nats.

Three assumptions can be lifted one by one. β may be a state field, one price a state; γ < 1
discounts what follows; and a `ChanceTree` draws the next state, so that V(s') is E V(s').
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qlearn.exact.chance import ChanceTree
from qlearn.exact.tree import Levels, Tree

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

    Source: Eq. 6; `eq-soft-value` in the book.
    """
    return (beta * torch.logsumexp(q / beta, dim=-1, keepdim=True)).squeeze(-1)


def soft_value_prior(q_tilde: Tensor, log_ref: Tensor, beta: float | Tensor) -> Tensor:
    """V(s) = β log Σ_a π_ref(a|s) exp(Q̃(s,a)/β): the same V as `soft_value`, (..., A) to (...).

    Source: the KL-prior form of Eq. 6; `eq-soft-bellman-prior` in the book.
    """
    return (beta * torch.logsumexp(log_ref + q_tilde / beta, dim=-1, keepdim=True)).squeeze(-1)


def soft_backup(tree: MDP, reward: Levels, log_ref: Levels, beta: Beta, gamma: float = 1.0) -> Soft:
    """The optimal policy of the KL-regularised token MDP, the reference inside the reward.

    Q*(s,a) = r(s,a) + β log π_ref(a|s) + γ V*(s'),  V* by `soft_value`,  log π* = (Q* − V*)/β,
    backwards from V*(terminal) = 0.

    Raises: ValueError for β that is not positive and finite, fields of the wrong shape or dtype,
    rewards that are not finite, a reference that is not a distribution or leaves out an action.
    Source: Eqs 5, 6 and 7; `eq-soft-bellman` in the book.
    """
    check_problem(tree, reward, log_ref, beta, gamma)

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
    value = [soft_value(x, beta_at(beta, t)) for t, x in enumerate(q)] + [None]
    return tuple(
        q[t] - beta_at(beta, t) * log_ref[t] - gamma * tree.next_value(t, value[t + 1])
        for t in range(tree.horizon)
    )


def jacobian(tree: MDP, logp: Levels, gamma: float = 1.0) -> Tensor:
    """∂Q*(s,a)/∂r(s'',a'') = P_π*( visit (s'',a'') | s,a ), discounted: (E, E), E = Σ_t n_t A.

    Rows and columns are in the order of `Tree.split`. Each edge visits itself, and otherwise only
    deeper ones: the matrix is unit-triangular, so its determinant is 1. `logp` is log π*.

    Source: `eq-jacobian` in the book.
    """
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

    Source: Eqs 10 and 11; `eq-implicit-reward` in the book.
    """
    return beta * (logp - ref_logp)


def implicit_rewards(logp: Levels, log_ref: Levels, beta: Beta) -> Levels:
    """The implicit reward of every edge, β log π/π_ref, where β may differ from state to state.

    It is 0 where the reference is, so at actions that are ABSENT.

    Source: Eq. 11; `eq-implicit-reward` in the book.
    """
    levels = enumerate(zip(logp, log_ref, strict=True))
    return tuple(
        implicit_reward(p, ref, beta_at(beta, t)).masked_fill(ref == -math.inf, 0.0)
        for t, (p, ref) in levels
    )


def evaluate(tree: MDP, logp: Levels, reward: Levels, gamma: float = 1.0) -> tuple[Levels, Levels]:
    """(V^π, Q^π) of any policy: Q^π = r + γ V^π(s') and V^π = Σ_a π Q^π, without a penalty.

    Tokens that π never writes count nothing in V^π.

    Source: policy evaluation; `eq-policy-evaluation` in the book.
    """
    values, qs, value = [], [], None
    for t in reversed(range(tree.horizon)):
        qs.append(reward[t] + gamma * tree.next_value(t, value))
        p = logp[t].exp()
        value = torch.where(p > 0, p * qs[-1], 0.0).sum(dim=-1)
        values.append(value)
    return tuple(reversed(values)), tuple(reversed(qs))


def expected_return(tree: MDP, logp: Levels, reward: Levels, gamma: float = 1.0) -> Tensor:
    """E_π Σ_t γ^t r(s_t, a_t) from each prompt: (n_prompts,), by `evaluate`."""
    return evaluate(tree, logp, reward, gamma)[0][0]


def reach(tree: MDP, logp: Levels) -> Levels:
    """d_π(s): the probability that a response of π passes through each state: (n_t,) a level.

    Each prompt has probability 1.

    Source: the state distribution of the policy gradient theorem; `eq-policy-gradient` in the book.
    """
    found = [torch.ones(tree.shapes[0][0], dtype=torch.float64)]
    for t in range(tree.horizon - 1):
        found.append(tree.push(t, found[t][:, None] * logp[t].exp()))
    return tuple(found)


def kl_reward(logp: Levels, reward: Levels, log_ref: Levels, beta: Beta) -> Levels:
    """r − β log(π/π_ref) on every edge: the reward with the price of distance, as PPO is paid.

    Source: Eqs 2 and 3; `eq-objective` in the book.
    """
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
    """KL(π ‖ π') over whole responses, from each prompt: (n_prompts,), in nats (chain rule)."""
    levels = zip(logp, log_other, strict=True)
    return expected_return(tree, logp, tuple(p - q for p, q in levels))


def regret(
    tree: MDP, logp: Levels, reward: Levels, log_ref: Levels, beta: Beta, gamma: float = 1.0
) -> Tensor:
    """V*(s₀) − J(π) from each prompt: (n_prompts,); equal to β KL(π ‖ π*) for every π.

    With one price a state or a discount it is E_π Σ_t γ^t β(s_t) KL(π(·|s_t) ‖ π*(·|s_t)).

    Source: `eq-regret` in the book.
    """
    best = soft_backup(tree, reward, log_ref, beta, gamma).value[0]
    return best - objective(tree, logp, reward, log_ref, beta, gamma)


def beta_at(beta: Beta, t: int) -> float | Tensor:
    """β for the edges of level t: the number itself, or a column (n_t, 1) of a state field."""
    return beta[t][:, None] if isinstance(beta, tuple) else beta


def check_problem(
    tree: MDP, reward: Levels, log_ref: Levels, beta: Beta, gamma: float = 1.0, name: str = "reward"
) -> None:
    """Raises ValueError with one sentence unless the fields fit the tree and β and γ are usable."""
    check_beta(beta, tree)
    if not (isinstance(gamma, int | float) and 0 < gamma <= 1):
        raise ValueError(f"gamma must lie in (0, 1], not {gamma!r}.")
    check_field(tree, reward, name)
    check_field(tree, log_ref, "log_ref")
    for t, (r, ref) in enumerate(zip(reward, log_ref, strict=True)):
        absent = tree.absent(t)
        # A sum is finite exactly when all its terms are, and costs a fifth of testing each.
        present = r if absent is None else r.masked_fill(absent, 0.0)
        if not present.sum().isfinite():
            s, a = _first(~present.isfinite())
            raise ValueError(
                f"{name} of action {a} in state {s} of level {t} is {r[s, a]}, not a finite number."
            )
        present = ref if absent is None else ref.masked_fill(absent, 0.0)
        if not present.sum().isfinite():
            s, a = _first(~present.isfinite())
            raise ValueError(
                f"log_ref of action {a} in state {s} of level {t} is {ref[s, a]}: the reference "
                "never writes it, so its reward cannot be known; mark the action ABSENT instead."
            )
        if absent is not None and not ref.masked_fill(absent, -math.inf).equal(ref):
            s, a = _first(absent & (ref != -math.inf))
            raise ValueError(
                f"log_ref must be -inf for action {a} in state {s} of level {t}, which is ABSENT."
            )
        off = ref.exp().sum(dim=-1) - 1
        if off.abs().max() > 1e-8:
            s = int(off.abs().argmax())
            raise ValueError(
                f"log_ref is not a distribution: in state {s} of level {t} the probabilities sum "
                f"to 1 {'+' if off[s] > 0 else '-'} {abs(off[s].item()):.3g}."
            )


def check_field(tree: MDP, field: Levels, name: str) -> None:
    """Raises ValueError unless `field` is an edge field of `tree` in float64."""
    shapes = [tuple(x.shape) for x in field]
    if shapes != tree.shapes:
        raise ValueError(
            f"{name} must have one (states, actions) table a level, {tree.shapes}; got {shapes}."
        )
    if any(x.dtype != torch.float64 for x in field):
        raise ValueError(f"{name} must be float64: the exact floor promises 1e-10.")


def check_beta(beta: Beta, tree: MDP | None = None) -> None:
    """Raises ValueError unless β is a positive, finite number, or one such number a state."""
    if isinstance(beta, tuple) and tree is not None:
        if [len(b) for b in beta] != [n for n, _ in tree.shapes]:
            raise ValueError("beta must be a number, or a state field with one (n_t,) row a level.")
        for t, b in enumerate(beta):
            bad = ~(b.isfinite() & (b > 0))
            if bad.any():
                s = _first(bad)[0]
                raise ValueError(
                    f"beta must be positive and finite; in state {s} of level {t} it is {b[s]:g}."
                )
    elif not (isinstance(beta, int | float) and math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a positive, finite number, not {beta!r}.")


def _first(where: Tensor) -> list[int]:
    return where.nonzero()[0].tolist()


def _backwards(tree: MDP, level, gamma: float) -> tuple[Levels, Levels, Levels]:
    """Runs `level(t, γ V(s'))` from the deepest level up and collects (V, Q, log π)."""
    found, value = [], None
    for t in reversed(range(tree.horizon)):
        following = tree.next_value(t, value)
        value, q, logp = level(t, following if gamma == 1 else gamma * following)
        found.append((value, q, logp))
    values, qs, logps = zip(*reversed(found), strict=True)
    return values, qs, logps
