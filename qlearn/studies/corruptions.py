"""Minimal edits of correct lines, for the credit study: one word changed, and known to be wrong.

A correct line is by a writer who words and ends lines as a world's writers do, but tells every
fact right. An edit changes one of its words and leaves the others as they are. Kinds of edit:

  habit        a fact's value becomes the one that the writers' habit writes
  slip         a fact's value becomes one that the writers' slips write
  never        a fact's value becomes one that writers never write there
  free         a free choice becomes another word, equally likely and equally good
  paraphrase   a fact's word becomes another word for the same value

The first three are wrong and the last two are controls: a heat map that marks those marks change,
not guilt. Report `never` by itself: the writers' grammar has no exact truth for such a line (π_ref
is 0 there), and in the slot world only its salary and its day have values that nobody writes.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from qlearn.lm.grammar import Edge, Post, as_text
from qlearn.lm.worlds import World

WRONG = ("habit", "slip", "never")
CONTROLS = ("free", "paraphrase")
KINDS = (*WRONG, *CONTROLS)


@dataclass(frozen=True)
class Corruption:
    """A line with one word changed, or two; the tuples have one entry a word, EOS last.

    kinds: an edited word's kind in `KINDS`, any other word's kind in the grammar (`Edge.kind`);
    facts: the fact that the word should tell, or None; cluster: the number of the post.
    """

    cluster: int
    post: Post
    original: tuple[str, ...]
    words: tuple[str, ...]
    edited: tuple[bool, ...]
    kinds: tuple[str, ...]
    facts: tuple[str | None, ...]

    @property
    def row(self) -> dict[str, str]:
        """The line as data files hold it, {prompt, completion}."""
        return {"prompt": self.post.prompt, "completion": as_text(self.words)}

    @property
    def at(self) -> int:
        """The position of the (last) edited word."""
        return max(i for i, edited in enumerate(self.edited) if edited)


@dataclass(frozen=True)
class Stitch:
    """The same second error in the same line, alone and after a first one (N4)."""

    alone: Corruption
    after: Corruption


def correct_line(world: World, post: Post, rng: random.Random) -> list[Edge]:
    """The edges of a line by the writers, each of whose facts is told right.

    Where a fact is due, its right words keep the writers' odds among themselves. (Lines by the
    writers in which no fact happens to be wrong are short: a habit is hard to escape twice.)
    """
    path, state = [], world.start
    while state[0] is not None:
        edges = [edge for edge in world.edges(*state) if not edge.wrong]
        (edge,) = rng.choices(edges, [e.prob for e in edges])
        path.append(edge)
        state = (edge.node, edge.memory)
    return path


def edits(world: World, post: Post, path: Sequence[Edge], kind: str) -> list[tuple[int, str]]:
    """Every edit of one `kind` of a correct line: (position, the word written instead).

    An edit's line is one that writers can write, but for kind "never".

    Raises: ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind of edit {kind!r}; choose one of {list(KINDS)}.")
    words, found, state = [edge.word.spell(post) for edge in path], [], world.start
    for i, edge in enumerate(path):
        options = world.edges(*state)
        if kind == "never" and edge.kind == "right":
            written = {e.word.spell(post) for e in options}
            values = (word for forms in edge.word.forms for word in forms)
            found += [(i, word) for word in values if word not in written]
        for other in _instead(options, edge, kind):
            word = other.word.spell(post)
            if world.parse(post, _put(words, {i: word})) is not None:
                found.append((i, word))
        state = (edge.node, edge.memory)
    return found


def corruptions(
    world: World, n: int, seed: int | str, kinds: Sequence[str] = KINDS
) -> list[Corruption]:
    """For each of `n` posts a correct line, and for each kind one edit of it, drawn evenly.

    A place is drawn first and then a word, so that a fact of many values is not edited more often.
    A line that has no place for a kind gives none of it.
    """
    made = []
    for cluster, post, path, rng in _lines(world, n, f"corruptions {seed}"):
        for kind in kinds:
            options = edits(world, post, path, kind)
            if options:
                i, word = _draw(options, rng)
                made.append(_corrupt(cluster, post, path, {i: (word, kind)}))
    return made


def stitches(world: World, n: int, seed: int | str) -> list[Stitch]:
    """For each of `n` posts two wrong facts of one correct line: the second alone, and after the
    first. Each is as writers err, by habit or by slip, in either company.

    A line without two such places gives none.
    """
    made = []
    for cluster, post, path, rng in _lines(world, n, f"stitches {seed}"):
        errors = {}
        for kind in ("habit", "slip"):
            for i, word in edits(world, post, path, kind):
                errors.setdefault(i, []).append((word, kind))
        pairs = list(combinations(sorted(errors), 2))
        rng.shuffle(pairs)
        for i, j in pairs:
            first, second = rng.choice(errors[i]), rng.choice(errors[j])
            after = _corrupt(cluster, post, path, {i: first, j: second})
            read = world.parse(post, after.words)
            if read is not None and [read[k].kind for k in (i, j)] == [first[1], second[1]]:
                made.append(Stitch(_corrupt(cluster, post, path, {j: second}), after))
                break
    return made


def _lines(world: World, n: int, seed: str) -> Iterator[tuple]:
    rng = random.Random(seed)
    for cluster, post in enumerate(world.posts(n, seed)):
        yield cluster, post, correct_line(world, post, rng), rng


def _instead(options: Sequence[Edge], edge: Edge, kind: str) -> list[Edge]:
    """Which of a state's `options` an edit of a kind puts in the place of `edge`."""
    if kind in CONTROLS:
        of = "free" if kind == "free" else "right"
        same = [e for e in options if edge.kind == of == e.kind and _as_good(e, edge)]
        return [e for e in same if e is not edge]
    return [e for e in options if edge.kind == "right" and e.kind == kind]


def _as_good(a: Edge, b: Edge) -> bool:
    return (a.prob, a.reward, a.node, a.memory) == (b.prob, b.reward, b.node, b.memory)


def _draw(options: Sequence[tuple[int, str]], rng: random.Random) -> tuple[int, str]:
    place = rng.choice(sorted({i for i, _ in options}))
    return place, rng.choice([word for i, word in options if i == place])


def _put(words: Sequence[str], changes: dict[int, str]) -> list[str]:
    return [changes.get(i, word) for i, word in enumerate(words)]


def _corrupt(
    cluster: int, post: Post, path: Sequence[Edge], changes: dict[int, tuple[str, str]]
) -> Corruption:
    words = [edge.word.spell(post) for edge in path]
    new = {i: word for i, (word, _) in changes.items()}
    kinds = [changes[i][1] if i in changes else edge.kind for i, edge in enumerate(path)]
    return Corruption(
        cluster, post, tuple(words), tuple(_put(words, new)),
        edited=tuple(i in changes for i in range(len(words))), kinds=tuple(kinds),
        facts=tuple(edge.word.fact for edge in path),
    )  # fmt: skip
