"""The slot-summary world's six requirements, by the reference alone: no model is trained here.

Expectations over the writers are exact: probabilities of reaching each edge of the grammar's graph.
"""

import math
import random
from dataclasses import replace

import pytest
import torch
from scipy.stats import rankdata

from qlearn.errors import InputError
from qlearn.lm import worlds
from qlearn.lm.worlds import EOS, LONGEST, UNREADABLE, VARIANTS, SlotWorld, as_text, as_words

BETA = 0.5
WORLD = SlotWorld()
STATES = [state for level in WORLD.graph[1] for state in level]


def visits(world):
    """(edge, probability that writers take it) for every edge of the graph, going forward."""
    (_, levels), reach = world.graph, {("opening", 0): 1.0}
    found = []
    for _ in levels:
        below = {}
        for state, p in reach.items():
            for edge in world.edges(*state):
                found.append((edge, p * edge.prob))
                if edge.node is not None:
                    state_below = (edge.node, edge.memory)
                    below[state_below] = below.get(state_below, 0.0) + p * edge.prob
        reach = below
    return found


def auroc(scores, weights, wrong):
    """P(score of a wrong token > score of a right one), ties half, tokens weighted."""
    above = total = 0.0
    for s, w, bad in zip(scores, weights, wrong, strict=True):
        for s2, w2, bad2 in zip(scores, weights, wrong, strict=True):
            if bad and not bad2:
                total += w * w2
                above += w * w2 * (1.0 if s > s2 + 1e-12 else 0.5 if abs(s - s2) <= 1e-12 else 0.0)
    return above / total


@pytest.mark.parametrize("tokens", ["all", "facts"])
@pytest.mark.parametrize("score", ["surprisal", "one_step"])
def test_claim_surprise_is_not_guilt(score, tokens):
    """Requirement 1: under the reference, surprisal and the one-step map of D4 tell wrong tokens
    from right ones no better than chance (AUROC 0.4 to 0.6), over all tokens and over facts."""
    chosen = [
        (edge, p) for edge, p in visits(WORLD)
        if tokens == "all" or edge.kind in ("right", "slip", "habit")
    ]  # fmt: skip
    scores = []
    for edge, _ in chosen:
        if score == "surprisal":
            scores.append(-math.log(edge.prob))
        else:
            siblings = next(WORLD.edges(*x) for x in STATES if edge in WORLD.edges(*x))
            scores.append(1 - 2 * edge.prob + sum(e.prob**2 for e in siblings))
    got = auroc(scores, [p for _, p in chosen], [edge.wrong for edge, _ in chosen])
    assert 0.4 <= got <= 0.6


def test_claim_both_kinds_of_wrong_and_of_right_are_common():
    """Requirement 1: slips are rare and surprising, habits common and expected; free choices are
    surprising and never wrong."""
    per_kind = {}
    for edge, p in visits(WORLD):
        per_kind.setdefault(edge.kind, []).append((p, -math.log(edge.prob)))
    often = {kind: sum(p for p, _ in x) for kind, x in per_kind.items()}
    surprise = {kind: sum(p * s for p, s in x) / often[kind] for kind, x in per_kind.items()}
    assert often["habit"] > 1 and 0.1 < often["slip"] < 0.3
    assert often["free"] > 4 and often["right"] > 2
    assert surprise["habit"] < 0.6 < 1 < surprise["free"] < surprise["slip"]


def test_claim_greedy_writers_are_not_optimal():
    """Requirement 2: the reference's most likely line earns far less than the optimum."""
    post, node, memory, greedy = WORLD.posts(1, 0)[0], "opening", 0, []
    while node is not None:
        edge = max(WORLD.edges(node, memory), key=lambda e: e.prob)
        greedy.append(edge)
        node, memory = edge.node, edge.memory
    words = [edge.word.spell(post) for edge in greedy]
    best = WORLD.solve(1e-3).value[0].item()
    assert WORLD.reward(post, words) < 0 < 2 < best


def test_claim_length_is_free():
    """Requirement 3: short and long lines are both common, and neither pays by being long."""
    rng = random.Random(0)
    posts = WORLD.posts(2000, "length")
    lines = [WORLD.write(post, rng) for post in posts]
    lengths = torch.tensor([float(len(line)) for line in lines])
    assert lengths.min() <= 12 and lengths.max() == LONGEST and lengths.std() > 2
    right = [WORLD.parse(post, line) for post, line in zip(posts, lines, strict=True)]
    perfect = torch.tensor([not any(edge.wrong for edge in path) for path in right])
    assert lengths[perfect].std() > 2  # faultless lines come in all lengths too


def test_claim_delayed_world_moves_the_reward_and_not_the_credit():
    """Requirement 4 (E4): the salary's reward is paid at EOS, its advantage stays at the salary."""
    now, late = SlotWorld("slots"), SlotWorld("delayed")
    rng = random.Random(3)
    for post in now.posts(50, "delayed"):
        line = now.write(post, rng)
        paid, owed = now.explain(post, line, BETA), late.explain(post, line, BETA)
        at = next(i for i, token in enumerate(paid) if token["word"] in worlds.SALARIES)
        assert owed[at]["reward"] == 0 and owed[-1]["reward"] == paid[at]["reward"]
        assert paid[-1]["reward"] == 0
        for a, b in zip(paid, owed, strict=True):
            assert a["advantage"] == pytest.approx(b["advantage"], abs=1e-12)
        assert sum(t["reward"] for t in paid) == pytest.approx(sum(t["reward"] for t in owed))


def test_claim_xor_world_credits_the_second_token():
    """Requirement 4 (E5): the verb's tone pays only against the opening's, and gets all credit."""
    world, rng = SlotWorld("xor"), random.Random(4)
    for post in world.posts(50, "xor"):
        tokens = world.explain(post, world.write(post, rng), BETA)
        verb = next(token for token in tokens if token["word"] in worlds.VERBS)
        hopeful = tokens[0]["word"] in worlds.OPENINGS[:12]
        agrees = hopeful == (verb["word"] in worlds.VERBS[:8])
        assert tokens[0]["advantage"] == pytest.approx(0, abs=1e-12)
        assert (verb["advantage"] > 0) == agrees and abs(verb["advantage"]) > 0.2


def test_claim_labels_are_bradley_terry_on_the_true_reward():
    """Requirement 5: over 4,000 pairs the better line wins as often as σ(ΔR) says."""
    rng = random.Random(5)
    posts = WORLD.posts(4000, "labels")
    first, second = ([as_text(WORLD.write(p, rng)) for p in posts] for _ in range(2))
    rows = WORLD.label(posts, first, second, seed=1)
    assert rows == WORLD.label(posts, first, second, seed=1)
    gaps = torch.tensor([
        WORLD.reward(p, as_words(a)) - WORLD.reward(p, as_words(b))
        for p, a, b in zip(posts, first, second, strict=True)
    ])  # fmt: skip
    wins = torch.tensor([float(row["chosen"] == a) for row, a in zip(rows, first, strict=True)])
    surprise = (wins - gaps.sigmoid()).mean()
    assert abs(surprise) < 4 * 0.5 / math.sqrt(len(posts))
    assert wins[gaps > 1].mean() > 0.75 and wins[gaps < -1].mean() < 0.25


def test_claim_posts_and_lines_read_like_english():
    """Requirement 6: whole sentences with the facts in place, lines of one opening and one stop."""
    rng = random.Random(6)
    for post in WORLD.posts(200, "english"):
        assert post.prompt.startswith("SUBREDDIT: r/jobs\n\nTITLE: ")
        assert post.prompt.endswith("\n\nTL;DR:") and "{" not in post.prompt
        for fact, value in post.facts.items():
            assert worlds.FORMS[fact][value][0] in post.prompt
        line = as_text(WORLD.write(post, rng))
        assert line[0] == " " and line[1].isupper() and line[-1] in ".!" and "  " not in line


def test_claim_exact_advantage_equals_enumeration_of_the_grammar():
    """V* by brute force over all ways to finish a line: β log E_ref exp(R/β), recursively."""
    for variant in VARIANTS:
        world = SlotWorld(variant)

        def mean_exp(node, memory, world=world):
            if node is None:
                return 1.0
            return sum(
                e.prob * math.exp(e.reward / BETA) * mean_exp(e.node, e.memory)
                for e in _merged(world.edges(node, memory))
            )

        expected = BETA * math.log(mean_exp("opening", 0))
        assert world.solve(BETA).value[0].item() == pytest.approx(expected, abs=1e-12)
        post = world.posts(1, 1)[0]
        tokens = world.explain(post, world.write(post, random.Random(1)), BETA)
        total = sum(t["advantage"] for t in tokens)
        assert total == pytest.approx(sum(t["reward"] for t in tokens) - expected, abs=1e-10)


def _merged(edges):
    """Edges that lead to the same place with the same pay, as one: keeps the recursion small."""
    groups = {}
    for e in edges:
        groups.setdefault((e.node, e.memory, e.reward), []).append(e)
    return [replace(g[0], prob=sum(e.prob for e in g)) for g in groups.values()]


def test_claim_probabilities_of_every_state_sum_to_one():
    for variant in VARIANTS:
        world = SlotWorld(variant)
        for level in world.graph[1]:
            for state in level:
                assert sum(e.prob for e in world.edges(*state)) == pytest.approx(1, abs=1e-12)
    assert world.graph[0].horizon == LONGEST


def test_claim_text_and_words_are_inverse():
    rng = random.Random(7)
    for post in WORLD.posts(200, "inverse"):
        words = WORLD.write(post, rng)
        assert as_words(as_text(words)) == words and words[-1] == EOS
        assert WORLD.parse(post, words) is not None


def test_claim_unreadable_lines_cost():
    """A line that leaves the grammar keeps what it had earned and pays for leaving."""
    post = WORLD.posts(1, 2)[0]
    words = WORLD.write(post, random.Random(2))
    assert WORLD.parse(post, words[:-2]) is None and WORLD.explain(post, words[:-2], BETA) is None
    earned = sum(e.reward for e in WORLD.parse(post, words))
    assert WORLD.reward(post, [*words[:-1], "nurse", EOS]) == pytest.approx(earned + UNREADABLE)
    assert WORLD.reward(post, [EOS]) == UNREADABLE


def test_claim_unknown_worlds_are_named():
    with pytest.raises((InputError, ValueError), match="There is no world 'sloths'"):
        SlotWorld("sloths")


def test_claim_auroc_of_this_file_is_the_usual_one():
    """The weighted AUROC above, at equal weights, against scipy's ranks."""
    rng = random.Random(8)
    scores = [rng.randrange(5) for _ in range(60)]
    wrong = [rng.random() < 0.4 for _ in range(60)]
    ranks, n = rankdata(scores), sum(wrong)
    usual = (ranks[torch.tensor(wrong).numpy()].sum() - n * (n + 1) / 2) / (n * (60 - n))
    assert auroc(scores, [1.0] * 60, wrong) == pytest.approx(usual)
