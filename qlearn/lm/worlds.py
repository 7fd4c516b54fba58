"""The slot-summary world: posts whose best summary, and whose exact Q-function, are known.

A post states five facts; its summary is one line that ends with EOS. The summaries' *writers* are a
small stochastic grammar, the reference policy π_ref of this world, so for each token of a summary
π_ref, the reward and the exact soft V, Q̃ and advantage follow from one backup on a layered graph
(`qlearn.exact`), with no language model.

Writers err in two ways: rare slips (a wrong city), and two habits that are wrong more often than
right (the deadline one day late, the salary rounded up), so that a wrong word need not surprise.
They also choose freely among many equally good words, so that a surprising word need not be wrong.

Variants: "slots" pays each fact where it is written; "delayed" pays the salary's reward at EOS;
"xor" pays a verb by whether its tone matches the opening's.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from qlearn.exact.preferences import sample_preferences
from qlearn.exact.soft import SoftPrior, soft_backup_prior
from qlearn.exact.tree import ABSENT, TERMINAL, Tree
from qlearn.lm.decode import sample

EOS = "<|endoftext|>"  # the end, and the padding, as Pythia's tokenizer names them
PAD = "<|padding|>"
VARIANTS = ("slots", "delayed", "xor")
MARKS = ":,;.!?/"  # stand next to a word, and are tokens of their own
LONGEST = 19  # tokens of the longest summary, EOS included
UNREADABLE = -2.0  # what a line earns for leaving the grammar, beside what it had earned so far

# The facts, and the words that can express each; the first is the one that posts use.
LEVELS = (
    ("trainee", "apprentice"), ("junior", "novice"), ("senior", "veteran"),
    ("lead", "principal"), ("deputy", "assistant"), ("chief", "head"),
)  # fmt: skip
ROLES = "nurse teacher welder baker coder chef lawyer plumber pilot clerk barber editor".split()
CITIES = "Oslo Lima Cairo Delhi Paris Quito Tokyo Dublin Vienna Lisbon Athens Boston".split()
SALARIES = [f"{thousands}k" for thousands in range(32, 56, 2)]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FORMS = {
    "level": LEVELS,
    "role": tuple((word,) for word in ROLES),
    "city": tuple((word,) for word in CITIES),
    "salary": tuple((word,) for word in SALARIES),
    "day": tuple((word,) for word in DAYS),
}

# Reward of a fact: RIGHT or WRONG times its weight. A slip has rate SLIP over all other values; a
# habit writes the next value (one day late, one step up) at rate HABIT.
RIGHT, WRONG = 0.5, -1.0
WEIGHT = {"level": 0.8, "role": 1.0, "city": 0.6, "salary": 1.2, "day": 1.0}
SLIP = {"level": 0.04, "role": 0.05, "city": 0.06}
HABIT = {"salary": 0.60, "day": 0.65}
TONE = 0.8  # the reward, up or down, of the "xor" variant

# The free choices. In the first two, the first half sounds hopeful, the second half worried.
OPENINGS = (
    "Happy Excited Thrilled Cheerful Hopeful Proud Eager Glad Curious Grateful Relieved "
    "Confident Torn Nervous Anxious Stuck Puzzled Scared Worried Confused Uneasy Wary Tired "
    "Doubtful"
).split()
VERBS = (
    "likes enjoys welcomes wants loves favours admires prefers weighs doubts questions "
    "debates fears dreads resents suspects"
).split()
PLACES = "in from near".split()
OFFERS = "offer contract package deal position job post role salary proposal".split()
REPLIES = "reply answer decision response verdict choice word signature".split()
DUES = "due needed expected wanted required".split()
ASKS = "advice tips thoughts ideas opinions help insight guidance".split()
WELCOMES = "welcome appreciated wanted please needed".split()

TITLES = (
    "Should I take the offer?", "Is this a fair offer?", "How do I decide?",
    "Need advice about a new job", "Would you say yes?", "Am I asking for too much?",
)  # fmt: skip
ABOUT_ME = (
    "I am a {level} {role} in {city}.", "I work as a {level} {role} and live in {city}.",
    "{city} is my home and I am a {level} {role}.", "For years I was a {level} {role} in {city}.",
)  # fmt: skip
ABOUT_PAY = (
    "They offered me {salary} a year.", "The new firm would pay {salary}.",
    "My letter says {salary} before tax.", "We settled on {salary} in the end.",
)  # fmt: skip
ABOUT_TIME = (
    "I must answer by {day}.", "They want to hear from me on {day}.",
    "The deadline is {day}.", "On {day} it is too late.",
)  # fmt: skip
ASIDES = (
    "My partner thinks I am crazy.", "I have never done this before.", "My boss knows nothing.",
    "The commute would be long.", "I could sleep on it.", "My friends say no.",
)  # fmt: skip


@dataclass(frozen=True)
class Post:
    """A post in TL;DR's form, and the index of each fact's value in `FORMS`."""

    prompt: str
    facts: dict[str, int]


@dataclass(frozen=True)
class Word:
    """A way to go on: a literal word, or a fact told right (offset 0) or wrong (offset ≥ 1)."""

    text: str | None = None
    fact: str | None = None
    offset: int = 0
    form: int = 0

    def spell(self, post: Post) -> str:
        if self.fact is None:
            return self.text
        values = FORMS[self.fact]
        return values[(post.facts[self.fact] + self.offset) % len(values)][self.form]


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
    memory: int  # what a later reward still depends on; 0 for nothing

    @property
    def wrong(self) -> bool:
        return self.kind in ("slip", "habit")


@dataclass(frozen=True)
class SlotWorld:
    """The slot-summary world; see the module. Raises ValueError for an unknown variant."""

    variant: str = "slots"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"There is no world {self.variant!r}; choose one of {list(VARIANTS)}.")

    # --- posts and their writers -------------------------------------------------------------

    def posts(self, n: int, seed: int | str) -> list[Post]:
        """`n` posts with facts drawn evenly; the same seed gives the same posts."""
        rng = random.Random(f"posts {seed}")
        return [_post(rng) for _ in range(n)]

    def edges(self, node: str, memory: int = 0) -> tuple[Edge, ...]:
        """What writers may do next in a state of the grammar; probabilities sum to 1."""
        return _edges(self.variant, node, memory)

    def write(self, post: Post, rng: random.Random) -> list[str]:
        """One summary by the writers: its words, EOS last."""
        words, node, memory = [], "opening", 0
        while node is not None:
            edges = self.edges(node, memory)
            (edge,) = rng.choices(edges, [e.prob for e in edges])
            words.append(edge.word.spell(post))
            node, memory = edge.node, edge.memory
        return words

    def parse(self, post: Post, words: list[str]) -> list[Edge] | None:
        """The edges that spell `words` (EOS last), or None where the grammar cannot write them."""
        path = self._read(post, words)
        return path if self._complete(path, words) else None

    def _read(self, post: Post, words: list[str]) -> list[Edge]:
        """The edges of the longest beginning of `words` that the grammar can write."""
        path, node, memory = [], "opening", 0
        for word in words:
            edges = () if node is None else self.edges(node, memory)
            found = next((e for e in edges if e.word.spell(post) == word), None)
            if found is None:
                break
            path.append(found)
            node, memory = found.node, found.memory
        return path

    @staticmethod
    def _complete(path: list[Edge], words: list[str]) -> bool:
        return len(path) == len(words) and bool(path) and path[-1].node is None

    def reward(self, post: Post, words: list[str]) -> float:
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
        levels, level = [], {("opening", 0): 0}
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
        advantage Q̃* − V* = β log π*/π_ref, and one_step ‖e_a − π_ref(·|s)‖² (the map of D4).
        """
        path = self.parse(post, words)
        if path is None:
            return None
        (_, levels), solved = self.graph, self.solve(beta)
        rows, state = [], ("opening", 0)
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

    @staticmethod
    def vocabulary() -> list[str]:
        """All words, EOS and the padding first, in a fixed order."""
        words = [w for values in FORMS.values() for forms in values for w in forms]
        words += OPENINGS + VERBS + PLACES + OFFERS + REPLIES + DUES + ASKS + WELCOMES
        sentences = (*TITLES, *ABOUT_ME, *ABOUT_PAY, *ABOUT_TIME, *ASIDES, *_FRAME)
        for sentence in sentences:
            words += split_words(sentence.replace("{", " {").replace("}", "} "))
        kept = [w for w in words if not w.startswith("{")]
        return [EOS, PAD, *dict.fromkeys([*kept, *MARKS, "a"])]


def draw_pairs(world: SlotWorld, model, tokenizer, n: int, seed: int | str) -> list[dict[str, str]]:
    """`n` rows {prompt, chosen, rejected}: `model` writes both lines, a true judge labels them."""
    posts = world.posts(n, f"pairs {seed}")
    prompts = [post.prompt for post in posts for _ in range(2)]
    rng = random.Random(f"labels {seed}")
    lines = sample(model, tokenizer, prompts, max_new_tokens=LONGEST + 4, seed=rng.randrange(2**31))
    return world.label(posts, lines[::2], lines[1::2], rng.randrange(2**31))


def as_text(words: list[str]) -> str:
    """A completion as data files hold it: one leading space, no EOS."""
    text = ""
    for word in words[:-1] if words[-1] == EOS else words:
        text += word if word in MARKS else " " + word
    return text


def as_words(text: str) -> list[str]:
    """The inverse of `as_text`: the words of a completion, EOS last."""
    return [*split_words(text), EOS]


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, as the world's tokenizer splits them."""
    for mark in MARKS:
        text = text.replace(mark, f" {mark} ")
    return text.split()


_FRAME = ("SUBREDDIT: r/jobs", "TITLE:", "POST:", "TL;DR:")


def _post(rng: random.Random) -> Post:
    # The highest salary is never a fact, so that rounding up stays inside the list.
    facts = {
        fact: rng.randrange(len(values) - (fact == "salary")) for fact, values in FORMS.items()
    }
    spoken = {fact: FORMS[fact][i][0] for fact, i in facts.items()}
    parts = [rng.choice(options) for options in (ABOUT_ME, ABOUT_PAY, ABOUT_TIME, ASIDES)]
    rng.shuffle(parts)
    body = " ".join(parts).format(**spoken)
    frame = [_FRAME[0], f"{_FRAME[1]} {rng.choice(TITLES)}", f"{_FRAME[2]} {body}", _FRAME[3]]
    return Post("\n\n".join(frame), facts)


@cache
def _solve(world: SlotWorld, beta: float) -> SoftPrior:
    tree, _ = world.graph
    return soft_backup_prior(tree, world.field(lambda e: e.reward, 0.0), world.log_ref, beta)


@cache
def _edges(variant: str, node: str, memory: int) -> tuple[Edge, ...]:
    def free(words, to, memories=None):
        memories = memories or [memory] * len(words)
        return tuple(
            Edge(Word(w), 1 / len(words), 0.0, "free", to, m)
            for w, m in zip(words, memories, strict=True)
        )

    def choice(**options):
        marks = {"clause": ",", "ask": ";", "stop": ".", "cheer": "!"}
        nodes = {"clause": "reply", "ask": "ask", "stop": "end", "cheer": "end"}
        return tuple(
            Edge(Word(marks[k]), p, 0.0, "choice", nodes[k], memory) for k, p in options.items()
        )

    match node:
        case "opening":
            return free(OPENINGS, "colon", _tones(OPENINGS) if variant == "xor" else None)
        case "colon":
            return (Edge(Word(":"), 1.0, 0.0, "fixed", "level", memory),)
        case "level":
            return _slip("level", "role", memory)
        case "role":
            return _slip("role", "place", memory)
        case "place":
            return free(PLACES, "city")
        case "city":
            return _slip("city", "verb", memory)
        case "verb" if variant == "xor":
            return tuple(
                Edge(Word(w), 1 / len(VERBS), TONE if m == memory else -TONE, "free", "article", 0)
                for w, m in zip(VERBS, _tones(VERBS), strict=True)
            )
        case "verb":
            return free(VERBS, "article")
        case "article":
            return (Edge(Word("a"), 1.0, 0.0, "fixed", "salary", memory),)
        case "salary":
            return _habit("salary", "offer", memory, delayed=variant == "delayed")
        case "offer":
            return free(OFFERS, "after offer")
        case "after offer":
            return choice(clause=0.8, ask=0.1, stop=0.05, cheer=0.05)
        case "reply":
            return free(REPLIES, "due")
        case "due":
            return free(DUES, "day")
        case "day":
            return _habit("day", "after day", memory)
        case "after day":
            return choice(ask=0.4, stop=0.3, cheer=0.3)
        case "ask":
            return free(ASKS, "welcome")
        case "welcome":
            return free(WELCOMES, "after welcome")
        case "after welcome":
            return choice(stop=0.5, cheer=0.5)
        case "end":
            owed = {0: 0.0, 1: RIGHT, 2: WRONG}[memory] * WEIGHT["salary"]
            return (Edge(Word(EOS), 1.0, owed, "fixed", None, 0),)
    raise ValueError(f"The grammar has no node {node!r}.")


def _tones(words: list[str]) -> list[int]:
    """1 for the hopeful half of a list, 2 for the worried half."""
    return [1 + (2 * i >= len(words)) for i in range(len(words))]


def _slip(fact: str, to: str, memory: int) -> tuple[Edge, ...]:
    n, forms = len(FORMS[fact]), len(FORMS[fact][0])
    edges = []
    for offset in range(n):
        p = 1 - SLIP[fact] if offset == 0 else SLIP[fact] / (n - 1)
        pay = WEIGHT[fact] * (RIGHT if offset == 0 else WRONG)
        kind = "right" if offset == 0 else "slip"
        edges += [
            Edge(Word(None, fact, offset, form), p / forms, pay, kind, to, memory)
            for form in range(forms)
        ]
    return tuple(edges)


def _habit(fact: str, to: str, memory: int, delayed: bool = False) -> tuple[Edge, ...]:
    right, wrong = (0.0, 0.0) if delayed else (WEIGHT[fact] * RIGHT, WEIGHT[fact] * WRONG)
    owed = (1, 2) if delayed else (memory, memory)
    return (
        Edge(Word(None, fact, 0), 1 - HABIT[fact], right, "right", to, owed[0]),
        Edge(Word(None, fact, 1), HABIT[fact], wrong, "habit", to, owed[1]),
    )
