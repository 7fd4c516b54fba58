"""The token MDP as a tree, stored level by level.

A state is a prompt with the tokens written so far; an action is the next token; writing EOS, or
reaching the horizon, ends the response. Level t holds every state that is t tokens deep as one row
of a table, so each Bellman backup is one tensor operation a level and never a loop over states.

Two kinds of field live on a tree, both as tuples with one tensor a level:
  edge fields   (n_t, A)   a number for each state and action: rewards, log-probabilities, Q
  state fields  (n_t,)     a number for each non-terminal state: V

Nothing asks for one parent a state, so the same class holds layered graphs in which paths merge;
only what enumerates paths (`prefixes`, `leaves`, `path_sums`) needs a real tree, which `unfold`
makes of any graph.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from numbers import Integral

import torch
from torch import Tensor

from qlearn.exact.check import check_below, check_fields, check_mass

TERMINAL = -1  # this action ends the response
ABSENT = -2  # this state does not have this action

LARGEST = 100_000_000  # edges of a tree that fits into memory, with its fields
Levels = tuple[Tensor, ...]


@dataclass(frozen=True)
class Tree:
    """A deterministic token MDP: `child[t][s, a]` is a row of level t + 1, `TERMINAL` or `ABSENT`.

    Shapes: one int64 table (n_t, A) a level; the rows of level 0 are the prompts.
    Raises: ValueError where a table names a row that does not exist, for a state without an action
    or a level without a state.
    Source: token MDP of §3.1 of the paper; `def-token-mdp` in the book.
    """

    child: Levels

    def __post_init__(self):
        for t, table in enumerate(self.child):
            if not isinstance(table, Tensor) or table.ndim != 2 or table.dtype != torch.int64:
                raise ValueError(f"child[{t}] must be an int64 table (states, actions).")
        if not self.child or not len(self.child[0]):
            raise ValueError("A tree needs at least one prompt and one level, so one token.")
        for t, table in enumerate(self.child):
            below = len(self.child[t + 1]) if t + 1 < len(self.child) else 0
            if not len(table):
                raise ValueError(f"Level {t} has no state; leave it and those below out.")
            outside = (table < ABSENT) | (table >= below)
            if outside.any():
                s, a = outside.nonzero()[0].tolist()
                raise ValueError(
                    f"Action {a} in state {s} of level {t} leads to row {table[s, a]}, but level "
                    f"{t + 1} has {below} states."
                )
            idle = (table == ABSENT).all(dim=1)
            if idle.any():
                raise ValueError(f"State {int(idle.nonzero()[0])} of level {t} has no action.")

    @classmethod
    def full(cls, n_actions: int, horizon: int, eos: int | None = 0, n_prompts: int = 1) -> "Tree":
        """Every response of at most `horizon` tokens out of `n_actions`, of which `eos` ends it.

        Raises: ValueError for a vocabulary, horizon or eos that leaves nothing to write, and for a
        tree that is too large to enumerate.
        """
        sizes = (n_actions, horizon, n_prompts)
        if not all(isinstance(n, Integral) and n >= 1 for n in sizes):
            raise ValueError("n_actions, horizon and n_prompts must be whole and at least 1.")
        if eos is not None and not (isinstance(eos, Integral) and 0 <= eos < n_actions):
            raise ValueError(f"eos must be one of the {n_actions} actions or None, not {eos}.")
        grows, n_states, n_edges = n_actions - (eos is not None), n_prompts, 0
        for _ in range(horizon if grows else 1):
            n_edges += n_states * n_actions
            n_states *= grows
            if n_edges > LARGEST:
                raise ValueError(
                    f"Responses of {horizon} tokens out of {n_actions} are too many to "
                    f"enumerate: the tree would have more than {LARGEST:,} edges."
                )
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

    @classmethod
    def layered(cls, sizes: Sequence[int], n_prompts: int = 1) -> "Tree":
        """A chain of draws: action a of level t picks value a of `sizes[t]`, whatever came before.

        After the first level paths merge, for a state is the value picked last. The last pick ends
        the response. A toy of diffusion: each level is one denoising step.

        Raises: ValueError without a level or with an empty one.
        Source: the layered graph of Lemma 2; `eq-diffusion-bellman` in the book.
        """
        whole = all(isinstance(n, Integral) and n >= 1 for n in (*sizes, n_prompts))
        if not len(sizes) or not whole:
            raise ValueError("sizes must name at least one level, each with at least one value.")
        rows = [n_prompts, *sizes[:-1]]
        child = [torch.arange(n).repeat(m, 1) for m, n in zip(rows, sizes, strict=True)]
        child[-1] = torch.full_like(child[-1], TERMINAL)
        return cls(tuple(child))

    @classmethod
    def from_graph(
        cls, graph: Mapping[Hashable, Sequence], prompts: Sequence[Hashable]
    ) -> tuple["Tree", tuple[list[Hashable], ...]]:
        """A tree from {state: [state after action 0, after action 1, ...]}, `None` for the end.

        States may have different numbers of actions, and several states may lead to one. Also
        returns the states of each level in the order of its rows. A state that can be reached
        after different numbers of tokens gets a row in each of these levels.

        Raises: ValueError for a loop, naming it; for a state that is not a key; for no prompts.
        """
        for prompt in prompts:
            if prompt not in graph:
                raise ValueError(f"The prompt {prompt!r} is not a state of the graph.")
        for state, following in graph.items():
            for after in following:
                if after is not None and after not in graph:
                    raise ValueError(f"State {state!r} leads to {after!r}, which is not a state.")
        sorter = TopologicalSorter({s: [x for x in xs if x is not None] for s, xs in graph.items()})
        try:
            sorter.prepare()
        except CycleError as error:
            loop = " → ".join(repr(state) for state in reversed(error.args[1]))
            raise ValueError(
                f"The graph has a loop, {loop}: without a discount its values may not exist."
            ) from None
        width = max((len(xs) for xs in graph.values()), default=0)
        levels, child = [list(dict.fromkeys(prompts))], []
        while levels[-1]:
            here = levels[-1]
            after = [x for state in here for x in graph[state] if x is not None]
            levels.append(list(dict.fromkeys(after)))
            row = {state: i for i, state in enumerate(levels[-1])} | {None: TERMINAL}
            table = torch.full((len(here), width), ABSENT)
            for s, state in enumerate(here):
                for a, x in enumerate(graph[state]):
                    table[s, a] = row[x]
            child.append(table)
        return cls(tuple(child)), tuple(levels[:-1])

    def unfold(self) -> tuple["Tree", Levels]:
        """The tree of all paths of a layered graph, and the row here of each of its states.

        States that no path reaches are left out, and so are the levels of which none is left.
        `lift(field, rows)` carries an edge or state field over.
        """
        rows, child = [torch.arange(len(self.child[0]))], []
        for table in self.child:
            if not len(rows[-1]):
                break
            reached = table[rows[-1]]
            goes_on = reached >= 0
            unfolded = reached.clone()
            unfolded[goes_on] = torch.arange(int(goes_on.sum()))
            child.append(unfolded)
            rows.append(reached[goes_on])
        return Tree(tuple(child)), tuple(rows[:-1])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(n_t, A) for each level: the shapes of an edge field."""
        return [tuple(table.shape) for table in self.child]

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
        masks = (table == ABSENT for table in self.child)
        return tuple(mask if mask.any() else None for mask in masks)

    def absent(self, t: int) -> Tensor | None:
        """Where level t has no such action: bool (n_t, A), or None where it has them all."""
        return self._absent[t]

    def split(self, flat: Tensor) -> Levels:
        """An edge field from one vector of n_states * A numbers, level after level, row by row.

        Raises: ValueError for a vector of another length.
        """
        sizes = [table.numel() for table in self.child]
        if not isinstance(flat, Tensor) or tuple(flat.shape) != (sum(sizes),):
            raise ValueError(f"An edge field of this tree is one vector of {sum(sizes)} numbers.")
        parts = flat.split(sizes)
        return tuple(x.view_as(table) for x, table in zip(parts, self.child, strict=True))

    def next_value(self, t: int, value_below: Tensor | None) -> Tensor:
        """V(s') for each edge of level t, with V(terminal) = 0: (n_t, A).

        Raises: ValueError unless `value_below` has one number a state of level t + 1.
        """
        table = self.child[t]
        if value_below is not None:
            check_below(self, t, value_below)
        if value_below is None or not len(value_below):
            return torch.zeros((), dtype=torch.float64).expand(table.shape)
        return torch.where(table >= 0, value_below[table.clamp(min=0)], 0.0)

    def push(self, t: int, mass: Tensor) -> Tensor:
        """The probability that reaches each state of level t + 1 from edges with this `mass`.

        The adjoint of `next_value`: Σ_e mass(e) V(s') = Σ_s' push(s') V(s').

        Raises: ValueError unless `mass` has one number an edge of level t.
        """
        table = self.child[t]
        check_mass(self, t, mass)
        below = mass.new_zeros(len(self.child[t + 1]) if t + 1 < self.horizon else 0)
        return below.index_add(0, table[table >= 0], mass[table >= 0])

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

    def prefix_sums(self, field: Levels) -> Levels:
        """Σ_{i≤t} x(s_i, a_i) from the prompt up to and including every edge: (n_t, A) a level.

        Raises: ValueError for a field that does not fit, or where paths merge.
        Source: `eq-martingale` in the book.
        """
        routes = self._routes
        check_fields(self.shapes, field=field)
        so_far, sums = field[0].new_zeros(len(self.child[0])), []
        for (_, goes_on), x in zip(routes, field, strict=True):
            sums.append(so_far[:, None] + x)
            so_far = sums[-1].flatten()[goes_on]
        return tuple(sums)

    def path_sums(self, field: Levels) -> Tensor:
        """Σ_t x(s_t, a_t) along every complete response: (L,), in the order of `leaves`.

        With x = r this is the return, with x = log π the log-probability of the response.

        Raises: as `prefix_sums`.
        Source: `eq-chain-rule` in the book.
        """
        return self.at_ends(self.prefix_sums(field))

    def at_ends(self, field: Levels) -> Tensor:
        """The numbers of an edge field on the last token of every response: (L,), as `leaves`."""
        check_fields(self.shapes, dtype=None, field=field)
        levels = zip(self._routes, field, strict=True)
        return torch.cat([x.flatten()[ends] for (ends, _), x in levels])

    def prompt_of(self) -> Tensor:
        """The prompt's row of every complete response: int64 (L,), in the order of `leaves`."""
        prompt, found = torch.arange(len(self.child[0])), []
        for (ends, goes_on), table in zip(self._routes, self.child, strict=True):
            of_edge = prompt.repeat_interleave(table.shape[1])
            found.append(of_edge[ends])
            prompt = of_edge[goes_on]
        return torch.cat(found)

    def only_at_end(self, returns: Tensor) -> Levels:
        """The edge field that holds one number a response on its last token and 0 elsewhere.

        The inverse of `at_ends` on sparse fields: `returns` (L,) in the order of `leaves`.

        Raises: ValueError for another number of returns.
        """
        sizes = [len(ends) for ends, _ in self._routes]
        if not isinstance(returns, Tensor) or tuple(returns.shape) != (sum(sizes),):
            raise ValueError(f"returns must be one vector of {sum(sizes)} numbers, one a response.")
        parts = returns.split(sizes)
        field = []
        for (ends, _), table, x in zip(self._routes, self.child, parts, strict=True):
            flat = x.new_zeros(table.numel()).index_copy(0, ends, x)
            field.append(flat.view(table.shape))
        return tuple(field)

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


def lift(field: Levels, rows: Levels) -> Levels:
    """A field of a layered graph on the tree that `Tree.unfold` made of it, by its `rows`.

    Raises: ValueError for a field with fewer levels than the tree.
    """
    if len(field) < len(rows):
        raise ValueError(f"The field has {len(field)} levels, the unfolded tree {len(rows)}.")
    return tuple(x[row] for x, row in zip(field, rows, strict=False))


def present(tree: Tree, field: Levels, elsewhere: float = 0.0) -> Levels:
    """An edge field with the number `elsewhere` at actions that are ABSENT, whatever stood there.

    Raises: ValueError for a field that does not fit the tree.
    """
    check_fields(tree.shapes, dtype=None, field=field)
    levels = ((x, tree.absent(t)) for t, x in enumerate(field))
    return tuple(x if absent is None else x.masked_fill(absent, elsewhere) for x, absent in levels)
