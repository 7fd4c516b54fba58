"""Embedded worlds: posts whose best summary, and whose exact Q-function, are known.

A post states facts; its summary is one line that ends with EOS. The summaries' *writers* are a
small stochastic grammar, the reference policy π_ref of this world, so for each token of a summary
π_ref, the reward and the exact soft V, Q̃ and advantage follow from one backup on a layered graph
(`qlearn.exact`), with no language model.

There are two worlds, each with variants: slot summaries (`qlearn.lm.slots`: "slots", "delayed",
"xor") and trips (`qlearn.lm.trips`: "trips", "trips-delayed"). Both are frozen: results were
measured on them, and a test compares `fingerprint` with what it was then.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from qlearn.exact.preferences import sample_preferences
from qlearn.exact.soft import SoftPrior, soft_backup_prior
from qlearn.exact.tree import ABSENT, TERMINAL, Tree
from qlearn.lm import slots, trips
from qlearn.lm.decode import sample
from qlearn.lm.grammar import (  # noqa: F401  (for importers of this module)
    EOS,
    MARKS,
    PAD,
    Edge,
    Grammar,
    Post,
    as_text,
    as_words,
    vocabulary,
    write_post,
)
from qlearn.lm.slots import LONGEST, VARIANTS  # noqa: F401  (as above: the first world's)

UNREADABLE = -2.0  # what a line earns for leaving the grammar, beside what it had earned so far
GRAMMARS = {name: g for g in (slots.GRAMMAR, trips.GRAMMAR) for name in g.variants}
WORLDS = tuple(GRAMMARS)  # every name that `data` can have


@dataclass(frozen=True)
class World:
    """The embedded world of a name; see the module. Raises ValueError for an unknown one."""

    variant: str = "slots"

    def __post_init__(self):
        if self.variant not in WORLDS:
            raise ValueError(f"There is no world {self.variant!r}; choose one of {list(WORLDS)}.")

    @property
    def grammar(self) -> Grammar:
        return GRAMMARS[self.variant]

    @property
    def start(self) -> tuple[str, int]:
        """The state, (node, memory), of a line's first word."""
        return self.grammar.start, 0

    @property
    def longest(self) -> int:
        """Tokens of the longest line that writers write, EOS included."""
        return self.graph[0].horizon

    def vocabulary(self) -> list[str]:
        """All words, EOS and the padding first, in a fixed order."""
        return vocabulary(self.grammar)

    # --- posts and their writers -------------------------------------------------------------

    def posts(self, n: int, seed: int | str) -> list[Post]:
        """`n` posts with facts drawn evenly; the same seed gives the same posts."""
        rng = random.Random(f"posts {seed}")
        return [write_post(self.grammar, rng) for _ in range(n)]

    def edges(self, node: str, memory: int = 0) -> tuple[Edge, ...]:
        """What writers may do next in a state of the grammar; probabilities sum to 1."""
        return _edges(self.variant, node, memory)

    def write(self, post: Post, rng: random.Random) -> list[str]:
        """One summary by the writers: its words, EOS last."""
        words, (node, memory) = [], self.start
        while node is not None:
            edges = self.edges(node, memory)
            (edge,) = rng.choices(edges, [e.prob for e in edges])
            words.append(edge.word.spell(post))
            node, memory = edge.node, edge.memory
        return words

    def parse(self, post: Post, words: Sequence[str]) -> list[Edge] | None:
        """The edges that spell `words` (EOS last), or None where the grammar cannot write them."""
        path = self._read(post, words)
        return path if self._complete(path, words) else None

    def _read(self, post: Post, words: Sequence[str]) -> list[Edge]:
        """The edges of the longest beginning of `words` that the grammar can write."""
        path, (node, memory) = [], self.start
        for word in words:
            edges = () if node is None else self.edges(node, memory)
            found = next((e for e in edges if e.word.spell(post) == word), None)
            if found is None:
                break
            path.append(found)
            node, memory = found.node, found.memory
        return path

    @staticmethod
    def _complete(path: list[Edge], words: Sequence[str]) -> bool:
        return len(path) == len(words) and bool(path) and path[-1].node is None

    def reward(self, post: Post, words: Sequence[str]) -> float:
        """The true reward of a line: what its readable beginning earns, and `UNREADABLE` after."""
        path = self._read(post, words)
        earned = sum(edge.reward for edge in path)
        return earned if self._complete(path, words) else earned + UNREADABLE

    # --- the exact truth ---------------------------------------------------------------------

    @cached_property
    def graph(self) -> tuple[Tree, tuple[dict, ...]]:
        """The grammar as a layered graph, and the row of each (node, memory) in each level.

        The same for every post: a fact told right is one edge whatever the fact.
        """
        levels, level = [], {self.start: 0}
        while level:
            levels.append(level)
            level = {}
            for state in levels[-1]:
                for edge in self.edges(*state):
                    if edge.node is not None:
                        level.setdefault((edge.node, edge.memory), len(level))
        width = max(len(self.edges(*state)) for level in levels for state in level)
        child = []
        for level, below in zip(levels, [*levels[1:], {}], strict=True):
            table = torch.full((len(level), width), ABSENT)
            for state, row in level.items():
                for a, edge in enumerate(self.edges(*state)):
                    ends = edge.node is None
                    table[row, a] = TERMINAL if ends else below[edge.node, edge.memory]
            child.append(table)
        return Tree(tuple(child)), tuple(levels)

    def field(self, number: Callable[[Edge], float], absent: float) -> tuple[Tensor, ...]:
        """An edge field of `graph` from a function of its edges, `absent` elsewhere."""
        tree, levels = self.graph
        tables = [torch.full(c.shape, absent, dtype=torch.float64) for c in tree.child]
        for table, level in zip(tables, levels, strict=True):
            for state, row in level.items():
                for a, edge in enumerate(self.edges(*state)):
                    table[row, a] = number(edge)
        return tuple(tables)

    @cached_property
    def log_ref(self) -> tuple[Tensor, ...]:
        """log π_ref of the writers as an edge field of `graph`."""
        return tuple(x.log() for x in self.field(lambda edge: edge.prob, absent=0.0))

    def solve(self, beta: float) -> SoftPrior:
        """The exact soft V*, Q̃* and log π* of the writers' world at `beta`."""
        return _solve(self, beta)

    def explain(self, post: Post, words: list[str], beta: float) -> list[dict] | None:
        """The exact truth about each word of a line that writers can write, else None.

        Keys: word, kind, wrong, reward, logp_ref (nats), value V*(s), q_tilde Q̃*(s,a),
        advantage Q̃* − V* = β log π*/π_ref, and one_step `‖e_a − π_ref(·|s)‖²` (the map of D4).
        """
        path = self.parse(post, words)
        if path is None:
            return None
        (_, levels), solved = self.graph, self.solve(beta)
        rows, state = [], self.start
        for t, edge in enumerate(path):
            s, edges = levels[t][state], self.edges(*state)
            a = edges.index(edge)
            value, q = solved.value[t][s].item(), solved.q_tilde[t][s, a].item()
            rows.append(
                dict(
                    word=words[t], kind=edge.kind, wrong=edge.wrong, reward=edge.reward,
                    logp_ref=self.log_ref[t][s, a].item(), value=value, q_tilde=q,
                    advantage=q - value,
                    one_step=1 - 2 * edge.prob + sum(e.prob**2 for e in edges),
                )
            )  # fmt: skip
            state = (edge.node, edge.memory)
        return rows

    # --- rows for training -------------------------------------------------------------------

    def sft_rows(self, n: int, seed: int | str) -> list[dict[str, str]]:
        """`n` rows {prompt, completion}: a post and one summary by the writers."""
        rng = random.Random(f"writers {seed}")
        return [
            {"prompt": post.prompt, "completion": as_text(self.write(post, rng))}
            for post in self.posts(n, seed)
        ]

    def label(
        self, posts: list[Post], first: list[str], second: list[str], seed: int
    ) -> list[dict[str, str]]:
        """Rows {prompt, chosen, rejected}: Bradley-Terry labels on the true reward of two lines."""
        scores = [
            torch.tensor([self.reward(p, as_words(x)) for p, x in zip(posts, texts, strict=True)])
            for texts in (first, second)
        ]
        generator = torch.Generator().manual_seed(seed)
        wins = sample_preferences(*scores, generator).tolist()
        return [
            {"prompt": post.prompt, "chosen": a if w else b, "rejected": b if w else a}
            for post, a, b, w in zip(posts, first, second, wins, strict=True)
        ]


@cache
def _solve(world: World, beta: float) -> SoftPrior:
    tree, _ = world.graph
    return soft_backup_prior(tree, world.field(lambda e: e.reward, 0.0), world.log_ref, beta)


@cache
def _edges(variant: str, node: str, memory: int) -> tuple[Edge, ...]:
    return GRAMMARS[variant].edges(variant, node, memory)


def draw_pairs(world: World, model, tokenizer, n: int, seed: int | str) -> list[dict[str, str]]:
    """`n` rows {prompt, chosen, rejected}: `model` writes both lines, a true judge labels them."""
    posts = world.posts(n, f"pairs {seed}")
    prompts = [post.prompt for post in posts for _ in range(2)]
    rng, most = random.Random(f"labels {seed}"), world.longest + 4
    lines = sample(model, tokenizer, prompts, max_new_tokens=most, seed=rng.randrange(2**31))
    return world.label(posts, lines[::2], lines[1::2], rng.randrange(2**31))


def fingerprint(world: World) -> str:
    """Twelve hex digits that change with any word, probability, reward, post or line of a world."""
    states = [(state, world.edges(*state)) for level in world.graph[1] for state in level]
    tables = [(state, [astuple(edge) for edge in edges]) for state, edges in states]
    facts = [sorted(post.facts.items()) for post in world.posts(50, "fingerprint")]
    rows = [sorted(row.items()) for row in world.sft_rows(50, "fingerprint")]
    everything = repr((world.vocabulary(), tables, UNREADABLE, facts, rows))
    return hashlib.sha256(everything.encode()).hexdigest()[:12]


#: The name that the book uses: `SlotWorld()` is the first world, World("slots").
SlotWorld = World
