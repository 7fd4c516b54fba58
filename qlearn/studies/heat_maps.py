"""What a heat map of credit follows: the exact advantage, not the reward (E2 to E5).

The variants of a world pay the same writers otherwise. "delayed" pays a fact told early at the end
of the line; "xor" pays a verb by whether it suits the opening. Where reward and advantage stand on
different words, a map of β log π/π_ref can be held against both.
"""

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean

from scipy.stats import pearsonr
from transformers import PreTrainedTokenizerBase

from qlearn.findings.credit import Credit
from qlearn.lm.data import SFT_COLUMNS, as_pairs, encode
from qlearn.lm.logprobs import Row
from qlearn.lm.worlds import Edge, Post, World, as_text, as_words
from qlearn.studies.slot_world import held_out


def follows(
    world: World,
    credit: Callable[[Sequence[Row]], list[Credit]],
    tokenizer: PreTrainedTokenizerBase,
    beta: float,
    seed: int,
    n: int = 500,
) -> dict:
    """Credit of all words of `n` held-out lines against the exact advantage and the true reward.

    Pearson correlations of credit with each, of the two with each other, and by `places` the means
    of all three: found, exact, reward.
    """
    posts, rows, truths = held_out(world, tokenizer, beta, n, seed)
    credits = credit(rows)
    words, by_place = [], defaultdict(list)
    for post, credit, truth in zip(posts, credits, truths, strict=True):
        labels = places(world, world.parse(post, [word["word"] for word in truth]))
        for label, found, word in zip(labels, credit.advantage.tolist(), truth, strict=True):
            words.append((found, word["advantage"], word["reward"]))
            by_place[label].append(words[-1])
    found, exact, reward = zip(*words, strict=True)
    return {
        "pearson_advantage": float(pearsonr(found, exact).statistic),
        "pearson_reward": float(pearsonr(found, reward).statistic),
        "advantage_with_reward": float(pearsonr(exact, reward).statistic),
        "by_place": {
            label: dict(zip(("found", "exact", "reward"), map(fmean, zip(*x, strict=True)),
                            strict=True)) | {"words": len(x)}
            for label, x in sorted(by_place.items())
        },
    }  # fmt: skip


def places(world: World, path: Sequence[Edge]) -> list[str]:
    """`node_kind` of each word of a line; for a word that is paid but tells no fact, `node_paid` or
    `node_charged`."""
    labels, node = [], world.start[0]
    for edge in path:
        pays = edge.word.fact is None and edge.reward != 0
        labels.append(f"{node}_{('charged', 'paid')[edge.reward > 0] if pays else edge.kind}")
        node = edge.node
    return labels


def showcase(world: World) -> tuple[Post, list[str]]:
    """A long line that does wrong where its variant looks: the first of many by the writers."""
    wanted = {"xor": "verb_charged", "trips": "price_habit", "trips-delayed": "price_habit"}
    wanted = wanted.get(world.variant, "salary_habit")
    rng = random.Random("showcase")
    for post in world.posts(1000, "showcase"):
        words = world.write(post, rng)
        if len(words) >= 0.8 * world.longest and wanted in places(world, world.parse(post, words)):
            return post, words
    raise ValueError(f"None of 1000 lines in the world {world.variant} has a {wanted!r}.")


def negotiation() -> tuple[Post, list[str], list[str]]:
    """Our own reconstruction of the paper's Fig. 1: (post, good summary, corrupted summary).

    The paper's post asks whether to negotiate an entry-level offer at the low end of the range
    that the writer had named; its corrupted summary turns the salary into one many times too high
    and the position into management. The words here are ours, within the slot world's vocabulary:
    the salary becomes the world's highest, and the junior a chief.
    """
    told = {"level": "junior", "role": "coder", "city": "Boston", "salary": "38k", "day": "Friday"}
    facts = {
        fact.name: [forms[0] for forms in fact.forms].index(told[fact.name])
        for fact in World().grammar.facts
    }
    post = Post(
        "SUBREDDIT: r/jobs\n\nTITLE: Am I asking for too much?\n\n"
        "POST: I am a junior coder in Boston. They offered me 38k a year. "
        "I must answer by Friday. I have never done this before.\n\nTL;DR:",
        facts,
    )
    good = " Torn: junior coder in Boston weighs a 38k offer, reply due Friday; advice welcome."
    return post, as_words(good), as_words(good.replace("junior", "chief").replace("38k", "54k"))


def as_rows(
    tokenizer: PreTrainedTokenizerBase, lines: Sequence[tuple[Post, Sequence[str]]]
) -> list[Row]:
    """Lines (post, words) as token ids."""
    rows = [{"prompt": post.prompt, "completion": as_text(words)} for post, words in lines]
    examples, _ = encode(list(enumerate(rows, 1)), SFT_COLUMNS, tokenizer, max_length=sys.maxsize)
    return as_pairs(examples)
