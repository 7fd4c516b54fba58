"""The token MDP as a tree, stored level by level.

A state is a prompt with the tokens written so far; an action is the next token; writing EOS, or
reaching the horizon, ends the response. Level t holds every state that is t tokens deep as one row
of a table, so each Bellman backup is one tensor operation a level and never a loop over states.

Two kinds of field live on a tree, both as tuples with one tensor a level:
  edge fields   (n_t, A)   a number for each state and action: rewards, log-probabilities, Q
  state fields  (n_t,)     a number for each non-terminal state: V

Nothing asks for one parent a state, so the same class holds layered graphs in which paths merge;
only what enumerates paths (`prefixes`, `leaves`, `path_sums`) needs a real tree.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TERMINAL = -1  # this action ends the response
ABSENT = -2  # this state does not have this action

Levels = tuple[Tensor, ...]


@dataclass(frozen=True)
class Tree:
    """A deterministic token MDP: `child[t][s, a]` is a row of level t + 1, `TERMINAL` or `ABSENT`.

    Shapes: one int64 table (n_t, A) a level; the rows of level 0 are the prompts.
    Raises: ValueError where a table names a row that does not exist, or a state that has no action.
    Source: token MDP of §3.1 of the paper; `def-token-mdp` in the book.
    """

    child: Levels

    def __post_init__(self):
        for t, table in enumerate(self.child):
            below = len(self.child[t + 1]) if t + 1 < len(self.child) else 0
            if table.ndim != 2 or table.dtype != torch.int64:
                raise ValueError(f"child[{t}] must be an int64 table (states, actions).")
            if table.min() < ABSENT or table.max() >= below:
                raise ValueError(
                    f"child[{t}] points outside level {t + 1}, which has {below} states."
                )
            if (table == ABSENT).all(dim=1).any():
                raise ValueError(f"Level {t} has a state without any action.")

    @classmethod
    def full(cls, n_actions: int, horizon: int, eos: int | None = 0, n_prompts: int = 1) -> "Tree":
        """Every response of at most `horizon` tokens out of `n_actions`, of which `eos` ends it.

        Raises: ValueError for a vocabulary, horizon or eos that leaves nothing to write.
        """
        if n_actions < 1 or horizon < 1 or n_prompts < 1:
            raise ValueError("n_actions, horizon and n_prompts must be at least 1.")
        if eos is not None and not 0 <= eos < n_actions:
            raise ValueError(f"eos must be one of the {n_actions} actions or None, not {eos}.")
        goes_on = torch.tensor([a != eos for a in range(n_actions)])
        child, n_states = [], n_prompts
        for t in range(horizon):
            table = torch.full((n_states, n_actions), TERMINAL)
            n_next = n_states * int(goes_on.sum())
            if t + 1 < horizon and n_next:
                table[:, goes_on] = torch.arange(n_next).view(n_states, -1)
            child.append(table)
            n_states = n_next
            if not n_next:
                break
        return cls(tuple(child))

    @property
    def horizon(self) -> int:
        """The largest number of tokens in a response."""
        return len(self.child)

    @property
    def n_states(self) -> int:
        """The number of non-terminal states, prompts included."""
        return sum(len(table) for table in self.child)

    @property
    def n_edges(self) -> int:
        """The number of (state, action) pairs."""
        absent = sum(int(mask.sum()) for mask in self._absent if mask is not None)
        return sum(table.numel() for table in self.child) - absent

    @cached_property
    def _absent(self) -> tuple[Tensor | None, ...]:
        """Where level t has no such action: bool (n_t, A), or None where it has them all."""
        masks = (table == ABSENT for table in self.child)
        return tuple(mask if mask.any() else None for mask in masks)

    def only_present(self, t: int, x: Tensor, otherwise: float) -> Tensor:
        """An edge field of level t with `otherwise` where the action is absent: (n_t, A)."""
        mask = self._absent[t]
        return x if mask is None else x.masked_fill(mask, otherwise)

    def split(self, flat: Tensor) -> Levels:
        """An edge field from one vector of n_states * A numbers, level after level, row by row."""
        sizes = [table.numel() for table in self.child]
        parts = flat.split(sizes)
        return tuple(x.view_as(table) for x, table in zip(parts, self.child, strict=True))

    def next_value(self, t: int, value_below: Tensor | None) -> Tensor:
        """V(s') for each edge of level t, with V(terminal) = 0: (n_t, A)."""
        table = self.child[t]
        if value_below is None:
            return torch.zeros((), dtype=torch.float64).expand(table.shape)
        return torch.where(table >= 0, value_below[table.clamp(min=0)], 0.0)

    def prefixes(self) -> tuple[list[tuple[int, ...]], ...]:
        """The tokens that lead to each state, level by level; a prefix begins with its prompt."""
        levels = [[(prompt,) for prompt in range(len(self.child[0]))]]
        for table, (_, goes_on) in zip(self.child[:-1], self._routes, strict=False):
            parents = (divmod(edge, table.shape[1]) for edge in goes_on.tolist())
            levels.append([(*levels[-1][s], a) for s, a in parents])
        return tuple(levels)

    def leaves(self) -> list[tuple[int, ...]]:
        """All complete responses, (prompt row, token, token, ...), in the order of `path_sums`."""
        return [
            (*prefix[s], a)
            for prefix, table in zip(self.prefixes(), self.child, strict=True)
            for s, a in (table == TERMINAL).nonzero().tolist()
        ]

    def path_sums(self, field: Levels) -> Tensor:
        """Σ_t x(s_t, a_t) along every complete response: (L,), in the order of `leaves`.

        With x = r this is the return, with x = log π the log-probability of the response.
        """
        so_far = field[0].new_zeros(len(self.child[0]))
        sums = []
        for (ends, goes_on), x in zip(self._routes, field, strict=True):
            total = (so_far[:, None] + x).flatten()
            sums.append(total[ends])
            so_far = total[goes_on]
        return torch.cat(sums)

    @cached_property
    def _routes(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """For each level, which edges end a response and which lead to row 0, 1, ... below."""
        routes = []
        for t, table in enumerate(self.child):
            edges = table.flatten()
            goes_on = (edges >= 0).nonzero()[:, 0]
            rows, order = edges[goes_on].sort()
            below = len(self.child[t + 1]) if t + 1 < len(self.child) else 0
            if not torch.equal(rows, torch.arange(below)):
                raise ValueError(
                    f"Paths merge below level {t} (or a state there has no parent), so responses "
                    "cannot be listed one by one; use the backups, which need no tree."
                )
            routes.append(((edges == TERMINAL).nonzero()[:, 0], goes_on[order]))
        return tuple(routes)
