"""Potentials, equivalent rewards and the one that stands for each class (Def. 1, Theorem 1).

Two rewards of one class share the optimal policy and every preference between complete responses.
Each class holds exactly one reward that is its own Q̃: the implicit reward of its optimal policy.
"""

import torch
from torch import Tensor

from qlearn.exact.check import check_fields, check_number, check_reward, check_states
from qlearn.exact.soft import MDP, Beta, soft_backup_prior
from qlearn.exact.tree import TERMINAL, Levels, Tree, present


def shape_reward(
    tree: Tree,
    reward: Levels,
    potential: Levels,
    end_potential: Levels | None = None,
    *,
    keep_preferences: bool = True,
) -> Levels:
    """r'(s,a) = r(s,a) + Φ(s') − Φ(s), with Φ = 0 where a response ends.

    `end_potential`, an edge field, gives the ends a potential of their own. That can change any
    preference, so it is refused unless `keep_preferences` is False. An ABSENT action keeps its
    number.

    Raises: ValueError for an end potential that is not 0 (naming the state and the token) while
    `keep_preferences` is True, a potential of the wrong shape, or numbers that are not finite.
    Source: Definition 1 with its missing condition; `eq-shaping`, `def-equivalent` and
    `eq-class-value` in the book.
    """
    check_reward(tree, reward)
    check_states(tree, potential=potential)
    if end_potential is not None:
        check_fields(tree.shapes, end_potential=end_potential)
    shaped = []
    for t, r in enumerate(reward):
        after = tree.next_value(t, potential[t + 1] if t + 1 < tree.horizon else None)
        if end_potential is not None:
            ends = tree.child[t] == TERMINAL
            wrong = ends & (end_potential[t] != 0)
            if keep_preferences and wrong.any():
                s, a = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"end_potential is {end_potential[t][s, a]:g} after action {a} in state {s} of "
                    f"level {t}; where a response ends the potential must be 0, or preferences "
                    "change; pass keep_preferences=False to see how."
                )
            after = torch.where(ends, end_potential[t], after)
        moved, absent = r + after - potential[t][:, None], tree.absent(t)
        shaped.append(moved if absent is None else torch.where(absent, r, moved))
    check_reward(tree, shaped, "the shaped reward")
    return tuple(shaped)


def find_potential(tree: Tree, reward: Levels, other: Levels, tol: float = 1e-8) -> Levels:
    """The potential Φ, 0 at the ends, with other = reward + Φ(s') − Φ(s): a state field.

    It exists if and only if the two rewards are equivalent, and then it is unique: backwards from
    the ends, Φ(s) = Φ(s') − (other − reward)(s,a) must be the same for every action, up to `tol`
    or, where the rewards are large, their rounding.

    Raises: ValueError naming the state where two actions disagree, if they are not equivalent, and
    for rewards that are not finite.
    Source: Definition 1; `def-equivalent` in the book.
    """
    for name, field in (("reward", reward), ("other", other)):
        check_reward(tree, field, name)
    check_number("tol", tol, least=0)
    reward, other = present(tree, reward), present(tree, other)
    largest = max(x.abs().max().item() for x in (*reward, *other))
    potential, below = [], None
    for t in reversed(range(tree.horizon)):
        claim = tree.next_value(t, below) - (other[t] - reward[t])
        if not claim.isfinite().all():
            raise ValueError("The rewards are too far apart for float64; scale both down.")
        absent = tree.absent(t)
        if absent is not None:  # an absent action claims what its neighbours do
            claim = torch.where(absent, claim.masked_fill(absent, -torch.inf).amax(1, True), claim)
        spread = claim.amax(dim=1) - claim.amin(dim=1)
        if spread.max() > max(tol, 1e-12 * largest):
            s = int(spread.argmax())
            raise ValueError(
                f"The rewards are not equivalent: in state {s} of level {t} the actions ask for "
                f"potentials {spread[s]:.3g} apart, so some preference differs."
            )
        below = claim.mean(dim=1)
        potential.append(below)
    return tuple(reversed(potential))


def canonical_reward(tree: MDP, reward: Levels, log_ref: Levels, beta: Beta) -> Levels:
    """𝒜(r) = r + V*(s') − V*(s) = Q̃* − V* = β log π*/π_ref: the class's own representative.

    The only equivalent reward with Σ_a π_ref exp(𝒜(r)/β) = 1 in every state. Its values are all
    0, it is its own Q̃, and 𝒜(𝒜(r)) = 𝒜(r). At actions that are ABSENT it is 0.

    Raises: as `soft_backup`.
    Source: Eqs 10 and 11, Theorem 1; `eq-advantage`, `eq-canonical`, `eq-idempotent`, `thm-one`,
    `eq-culprit` and `eq-additive-credit` in the book.
    """
    best = soft_backup_prior(tree, reward, log_ref, beta)
    advantage = tuple(q - v[:, None] for q, v in zip(best.q_tilde, best.value, strict=True))
    return present(tree, advantage)


def difference_matrix(tree: Tree) -> Tensor:
    """What judges can see: one row a response but the first of each prompt, one column an edge.

    A row counts the edges of its response less those of the prompt's first response, so that
    `difference_matrix(tree) @ flat_reward` holds every difference of returns within a prompt.
    Shape (L − n_prompts, Σ_t n_t A), columns in the order of `Tree.split`; a prompt with one
    response has no row.

    Raises: ValueError where paths merge.
    Source: `eq-rank` and `thm-rank` in the book.
    """
    rows = paths(tree)
    prompt = tree.prompt_of()
    first = torch.tensor([int((prompt == p).nonzero()[0]) for p in prompt.unique().tolist()])
    keep = torch.ones(len(rows), dtype=torch.bool).index_fill(0, first, False)
    return (rows - rows[first[prompt]])[keep]


def paths(tree: Tree) -> Tensor:
    """Which edges each response takes: (L, Σ_t n_t A) of 0 and 1, so that paths @ r = returns.

    Raises: ValueError where paths merge.
    """
    sizes = [table.numel() for table in tree.child]
    eye = torch.eye(sum(sizes), dtype=torch.float64)
    columns = [tree.path_sums(tree.split(unit)) for unit in eye]
    return torch.stack(columns, dim=1)


def invisible_rewards(tree: Tree) -> Tensor:
    """A basis of the rewards that no preference can see: one row a state, (n_states, Σ_t n_t A).

    Row s is the shaping by the potential that is 1 in state s alone: −1 on the tokens written
    there, +1 on the token that leads there, 0 where an action is ABSENT. On a tree without absent
    actions these n rows span the null space of `difference_matrix`, whose rank is therefore
    L − n_prompts.

    Source: `eq-rank` and `thm-rank` in the book.
    """
    sizes = [n for n, _ in tree.shapes]
    zero = tuple(torch.zeros(shape, dtype=torch.float64) for shape in tree.shapes)
    units = torch.eye(sum(sizes), dtype=torch.float64)
    shaped = (shape_reward(tree, zero, unit.split(sizes)) for unit in units)
    return torch.stack([torch.cat([x.flatten() for x in field]) for field in shaped])
