"""The token MDP with chance: the next state is drawn, as when a tool or a user replies.

A token is still chosen by the policy; then outcome k happens with a probability that the policy
cannot move. Theorem 1 does not survive this (chapter 08), which is why the class stands apart.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qlearn.exact.check import check_below, check_fields, check_mass, check_number
from qlearn.exact.tree import ABSENT, Levels, Tree, lift


@dataclass(frozen=True)
class ChanceTree:
    """`child[t][s, a, k]` is the row of level t + 1 (or `TERMINAL`) where outcome k leads.

    Outcome k of action a in state s has probability `prob[t][s, a, k]`; an impossible outcome, or
    one of an action that is absent, is marked `ABSENT` and has probability 0.

    Shapes: child int64 and prob float64, one (n_t, A, K) table a level.
    Raises: ValueError where the tables differ in shape, name a row that does not exist, or where
    the probabilities of an action do not sum to 1.
    Source: `eq-chance-leftover` in the book.
    """

    child: Levels
    prob: Levels

    def __post_init__(self):
        shapes = [tuple(x.shape) for x in self.child]
        if any(len(s) != 3 for s in shapes) or shapes != [tuple(x.shape) for x in self.prob]:
            raise ValueError("child and prob must have one (states, actions, outcomes) table each.")
        check_fields(shapes, prob=self.prob)
        Tree(tuple(table.flatten(1) for table in self.child))  # checks where the rows lead
        for t, (table, p) in enumerate(zip(self.child, self.prob, strict=True)):
            total, present = p.sum(dim=-1), (table != ABSENT).any(dim=-1)
            wrong = ~((total - present.double()).abs() <= 1e-8) | ~(p >= 0).all(dim=-1)
            wrong |= ((table == ABSENT) & (p != 0)).any(dim=-1)
            if wrong.any():
                s, a = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"prob of action {a} in state {s} of level {t} sums to {total[s, a]:.6g}; the "
                    "outcomes of an action must sum to 1, and an ABSENT one has probability 0."
                )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(n_t, A) for each level: the shapes of an edge field."""
        return [(table.shape[0], table.shape[1]) for table in self.child]

    @property
    def horizon(self) -> int:
        """The largest number of tokens in a response."""
        return len(self.child)

    def absent(self, t: int) -> Tensor | None:
        """Where level t has no such action: bool (n_t, A), or None where it has them all."""
        mask = (self.child[t] == ABSENT).all(dim=-1)
        return mask if mask.any() else None

    def next_value(self, t: int, value_below: Tensor | None) -> Tensor:
        """E[ V(s') | s, a ] for each edge of level t, with V(terminal) = 0: (n_t, A).

        Raises: ValueError unless `value_below` has one number a state of level t + 1.
        """
        table = self.child[t]
        if value_below is not None:
            check_below(self, t, value_below)
        if value_below is None or not len(value_below):
            return torch.zeros((), dtype=torch.float64).expand(table.shape[:2])
        value = torch.where(table >= 0, value_below[table.clamp(min=0)], 0.0)
        return torch.where(self.prob[t] > 0, self.prob[t] * value, 0.0).sum(dim=-1)

    def push(self, t: int, mass: Tensor) -> Tensor:
        """The probability that reaches each state of level t + 1 from edges with this `mass`.

        Raises: ValueError unless `mass` has one number an edge of level t.
        """
        check_mass(self, t, mass)
        table, share = self.child[t], self.prob[t] * mass[..., None]
        below = mass.new_zeros(len(self.child[t + 1]) if t + 1 < self.horizon else 0)
        return below.index_add(0, table[table >= 0], share[table >= 0])

    @property
    def realised(self) -> Tree:
        """The tree of all that can happen: its actions are the pairs (a, k), numbered a · K + k."""
        return self._realised[0]

    @cached_property
    def _realised(self) -> tuple[Tree, Levels]:
        return Tree(tuple(table.flatten(1) for table in self.child)).unfold()

    def spread(self, field: Levels) -> Levels:
        """An edge field (n_t, A) on the edges of `realised`: each outcome gets its action's.

        Raises: ValueError for a field that does not fit.
        """
        check_fields(self.shapes, dtype=None, field=field)
        wide = (x.repeat_interleave(c.shape[2], 1) for x, c in zip(field, self.child, strict=True))
        return self.lift(tuple(wide))

    def lift(self, field: Levels) -> Levels:
        """A state field, or an edge field over pairs (a, k), on the states of `realised`."""
        return lift(field, self._realised[1])

    def log_prob(self) -> Levels:
        """log p(outcome | s, a) on the edges of `realised`, −inf where impossible."""
        return self.lift(tuple(p.flatten(1).log() for p in self.prob))


def with_chance(tree: Tree, other: Levels, p_other: float) -> ChanceTree:
    """The same tree, whose every step goes to row `other[t][s, a]` instead with chance `p_other`.

    Steps that end a response, and rows of `other` that are negative, stay as they are.

    Raises: ValueError for a probability outside [0, 1), or tables that do not fit.
    """
    check_number("p_other", p_other, least=0, below=1)
    check_fields(tree.shapes, dtype=torch.int64, other=other)
    child, prob = [], []
    for table, swap in zip(tree.child, other, strict=True):
        moves = (table >= 0) & (swap >= 0)
        second = torch.where(moves, swap, ABSENT)
        p = p_other * moves.double()
        first = (table != ABSENT).double() - p
        child.append(torch.stack([table, second], dim=-1))
        prob.append(torch.stack([first, p], dim=-1))
    return ChanceTree(tuple(child), tuple(prob))
