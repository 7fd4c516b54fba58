"""What an embedded world is made of: facts, words, edges of a grammar, and the text they make.

A world's writers are a small stochastic grammar: in each state they choose an *edge*, one token of
the line, with a known probability and a known reward. The builders below make the edges of one
state; `qlearn.lm.slots` and `qlearn.lm.trips` are grammars, `qlearn.lm.worlds` what is true of any.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

EOS = "<|endoftext|>"  # the end, and the padding, as Pythia's tokenizer names them
PAD = "<|padding|>"
MARKS = ":,;.!?/"  # stand next to a word, and are tokens of their own
RIGHT, WRONG = 0.5, -1.0  # what a fact told right or wrong pays, times its weight
OWED = {0: 0.0, 1: RIGHT, 2: WRONG}  # what a fact pays at the end, by what the state remembers


@dataclass(frozen=True)
class Post:
    """A post, and the index of each fact's value in its `Fact.forms`."""

    prompt: str
    facts: dict[str, int]


@dataclass(frozen=True)
class Fact:
    """Its values, each with the words that can express it (the first is the posts'), its weight."""

    name: str
    forms: tuple[tuple[str, ...], ...]
    weight: float

    def told(self, offset: int = 0, form: int = 0) -> "Word":
        """The word for the post's value, or for one `offset` steps from it (then it is wrong)."""
        return Word(None, self.name, offset, form, self.forms)


@dataclass(frozen=True)
class Word:
    """A way to go on: a literal word, or a fact's value, `offset` steps from the post's."""

    text: str | None = None
    fact: str | None = None
    offset: int = 0
    form: int = 0
    forms: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    def spell(self, post: Post) -> str:
        if self.fact is None:
            return self.text
        return self.forms[(post.facts[self.fact] + self.offset) % len(self.forms)][self.form]


@dataclass(frozen=True)
class Edge:
    """One token of a summary: how likely writers are to choose it, what it pays, where it leads.

    kind is one of: fixed, choice (of how to go on), free, right, slip, habit.
    """

    word: Word
    prob: float
    reward: float
    kind: str
    node: str | None  # None: the summary is over
    memory: int  # what a later reward or choice still depends on; 0 for nothing

    @property
    def wrong(self) -> bool:
        return self.kind in ("slip", "habit")


@dataclass(frozen=True)
class Grammar:
    """The data of a world: what posts say, and what writers do in each state (node, memory)."""

    name: str  # of the world, and of its tokenizer
    variants: tuple[str, ...]  # names of worlds with these posts; `edges` tells them apart
    start: str  # the node of a line's first word
    facts: tuple[Fact, ...]
    draw: Callable[[random.Random], dict[str, int]]  # the facts of a post
    frame: tuple[str, str, str, str]  # a post's first line and its three headings
    titles: tuple[str, ...]
    sentences: tuple[tuple[str, ...], ...]  # a post has one of each group; "" leaves it out
    words: tuple[str, ...]  # all words of lines that tell no fact
    edges: Callable[[str, str, int], tuple[Edge, ...]]  # of a variant in a state


def fixed(text: str, to: str, memory: int = 0) -> tuple[Edge, ...]:
    """The one word that can follow."""
    return (Edge(Word(text), 1.0, 0.0, "fixed", to, memory),)


def free(
    words: Sequence[str], to: str, memory: int | Sequence[int] = 0, pays: Sequence[float] = ()
) -> tuple[Edge, ...]:
    """Any of `words`, all equally likely; `memory` and `pays` can differ between them."""
    memories = [memory] * len(words) if isinstance(memory, int) else memory
    pays = pays or [0.0] * len(words)
    return tuple(
        Edge(Word(w), 1 / len(words), pay, "free", to, m)
        for w, m, pay in zip(words, memories, pays, strict=True)
    )


def choice(options: dict[str, tuple[float, str]], memory: int = 0) -> tuple[Edge, ...]:
    """How to go on: {word: (probability, node)}."""
    return tuple(
        Edge(Word(word), p, 0.0, "choice", to, memory) for word, (p, to) in options.items()
    )


def slip(
    fact: Fact, rate: float, to: str, memory: int = 0, offsets: Sequence[int] = ()
) -> tuple[Edge, ...]:
    """A fact told right, but for a `rate` of slips spread over `offsets` (all other values)."""
    forms = len(fact.forms[0])
    offsets = offsets or range(1, len(fact.forms))
    edges = []
    for offset in (0, *offsets):
        p = 1 - rate if offset == 0 else rate / len(offsets)
        pay = fact.weight * (RIGHT if offset == 0 else WRONG)
        kind = "right" if offset == 0 else "slip"
        edges += [
            Edge(fact.told(offset, form), p / forms, pay, kind, to, memory) for form in range(forms)
        ]
    return tuple(edges)


def habit(
    fact: Fact, mistake: Word, rate: float, to: str, memory: int | tuple[int, int] = 0,
    delayed: bool = False,
) -> tuple[Edge, ...]:  # fmt: skip
    """A fact told right, or with probability `rate` by the word of one and the same `mistake`.

    `memory` can differ, (after right, after wrong). Where `delayed`, it is what the end then owes.
    """
    right, wrong = (0.0, 0.0) if delayed else (fact.weight * RIGHT, fact.weight * WRONG)
    after = (1, 2) if delayed else (memory, memory) if isinstance(memory, int) else memory
    return (
        Edge(fact.told(), 1 - rate, right, "right", to, after[0]),
        Edge(mistake, rate, wrong, "habit", to, after[1]),
    )


def end(fact: Fact, memory: int) -> tuple[Edge, ...]:
    """The end of the line, which pays what is still owed for `fact`."""
    return (Edge(Word(EOS), 1.0, OWED[memory] * fact.weight, "fixed", None, 0),)


def write_post(grammar: Grammar, rng: random.Random) -> Post:
    """One post: its facts, a sentence of each group in any order, a title."""
    facts = grammar.draw(rng)
    spoken = {fact.name: fact.forms[facts[fact.name]][0] for fact in grammar.facts}
    parts = [rng.choice(options) for options in grammar.sentences]
    rng.shuffle(parts)
    body = " ".join(part for part in parts if part).format(**spoken)
    first, title, text, line = grammar.frame
    return Post(
        "\n\n".join([first, f"{title} {rng.choice(grammar.titles)}", f"{text} {body}", line]), facts
    )


def vocabulary(grammar: Grammar) -> list[str]:
    """All words, EOS and the padding first, in a fixed order."""
    words = [word for fact in grammar.facts for forms in fact.forms for word in forms]
    words += grammar.words
    groups = (grammar.titles, *grammar.sentences, grammar.frame)
    for sentence in (sentence for group in groups for sentence in group):
        words += split_words(sentence.replace("{", " {").replace("}", "} "))
    kept = [word for word in words if not word.startswith("{")]
    return [EOS, PAD, *dict.fromkeys([*kept, *MARKS])]


def as_text(words: Sequence[str]) -> str:
    """A completion as data files hold it: one leading space, no EOS."""
    text = ""
    for word in words[:-1] if words[-1] == EOS else words:
        text += word if word in MARKS else " " + word
    return text


def as_words(text: str) -> list[str]:
    """The inverse of `as_text`: the words of a completion, EOS last."""
    return [*split_words(text), EOS]


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, as a world's tokenizer splits them."""
    for mark in MARKS:
        text = text.replace(mark, f" {mark} ")
    return text.split()
