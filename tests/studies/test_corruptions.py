"""Minimal edits: one word changed, its kind told truthfully by the grammar, in both worlds."""

import random

import pytest

from qlearn.lm.worlds import UNREADABLE, WORLDS, World, as_words
from qlearn.studies.corruptions import (
    CONTROLS,
    KINDS,
    WRONG,
    correct_line,
    corruptions,
    edits,
    stitches,
)

N = 150
every = pytest.mark.parametrize("name", WORLDS)


@every
def test_claim_one_word_changes_and_the_labels_say_which(name):
    """All kinds in every line; words, originals and labels are aligned and differ at one place."""
    made = corruptions(World(name), N, "one word")
    assert len(made) == N * len(KINDS) >= 500
    for x in made:
        assert len(x.words) == len(x.original) == len(x.edited) == len(x.kinds) == len(x.facts)
        changed = [a != b for a, b in zip(x.words, x.original, strict=True)]
        assert tuple(changed) == x.edited and sum(changed) == 1 and changed[x.at]
        assert x.row["prompt"] == x.post.prompt
        assert tuple(as_words(x.row["completion"])) == x.words
        assert (x.facts[x.at] is None) == (x.kinds[x.at] == "free")
    assert [x.kinds[x.at] for x in made] == list(KINDS) * N
    assert [x.cluster for x in made] == [i for i in range(N) for _ in KINDS]


@every
def test_claim_originals_are_right_and_edits_are_what_they_are_called(name):
    """By the grammar: an original has no wrong edge; a habit or slip is read as one wrong edge of
    that kind, a control as none, at the same pay; a never is not read beyond its place."""
    world = World(name)
    for x in corruptions(world, N, "kinds"):
        original = world.parse(x.post, x.original)
        assert not any(edge.wrong for edge in original)
        kind, path = x.kinds[x.at], world.parse(x.post, x.words)
        loss = world.reward(x.post, x.original) - world.reward(x.post, x.words)
        if kind == "never":
            assert path is None and world.reward(x.post, x.words) <= UNREADABLE + sum(
                edge.reward for edge in original[: x.at]
            )
            continue
        wrong = [i for i, edge in enumerate(path) if edge.wrong]
        if kind in CONTROLS:
            assert wrong == [] and loss == pytest.approx(0)
            old, new = original[x.at], path[x.at]
            assert (old.prob, old.reward, old.kind) == (new.prob, new.reward, new.kind)
        else:
            assert wrong == [x.at] and path[x.at].kind == kind and loss > 0
            kept = [edge.kind for i, edge in enumerate(original) if i != x.at]
            assert kept == [k for i, k in enumerate(x.kinds) if i != x.at]


@every
def test_claim_wrong_values_are_never_the_posts_own(name):
    """The fact's value in the post, in any of its words, is not what a wrong edit writes."""
    world = World(name)
    forms = {fact.name: fact.forms for fact in world.grammar.facts}
    for x in corruptions(world, N, "values", kinds=WRONG):
        fact = x.facts[x.at]
        true = forms[fact][x.post.facts[fact]]
        assert x.original[x.at] in true and x.words[x.at] not in true
        assert x.words[x.at] in {word for value in forms[fact] for word in value}


def test_claim_habits_are_the_worlds_own():
    """One step up and one day late in the first world; the other place, one step down, the next
    unit in the second. Each fact with a habit gets edited."""
    seen = set()
    for name in ("slots", "trips"):
        world = World(name)
        forms = {fact.name: [f[0] for f in fact.forms] for fact in world.grammar.facts}
        for x in corruptions(world, N, "habits", kinds=("habit",)):
            fact, word = x.facts[x.at], x.words[x.at]
            seen.add(fact)
            if fact == "origin":
                assert word == forms["goal"][x.post.facts["goal"]]
            else:
                step = -1 if fact == "price" else 1
                values = forms[fact]
                assert word == values[(x.post.facts[fact] + step) % len(values)]
    assert seen == {"salary", "day", "origin", "price", "unit"}


@every
def test_claim_the_second_error_is_the_same_alone_and_after_the_first(name):
    """N4: both lines can be written; they differ at the first error alone."""
    world = World(name)
    made = stitches(world, N, "stitch")
    assert len(made) > 0.9 * N
    for alone, after in ((x.alone, x.after) for x in made):
        assert alone.original == after.original and alone.cluster == after.cluster
        assert alone.at == after.at and alone.words[alone.at] == after.words[after.at]
        assert (sum(alone.edited), sum(after.edited)) == (1, 2)
        differ = [
            i for i, (a, b) in enumerate(zip(alone.words, after.words, strict=True)) if a != b
        ]
        assert differ == [after.edited.index(True)]
        for x in (alone, after):
            path = world.parse(x.post, x.words)
            assert [e.wrong for e in path] == list(x.edited)
            assert [e.kind for e in path] == list(x.kinds)


@every
def test_claim_same_seed_same_corruptions(name):
    world = World(name)
    for make in (corruptions, stitches):
        assert make(world, 20, 1) == make(world, 20, 1) != make(world, 20, 2)
    posts = {x.post.prompt for x in corruptions(world, 50, 0)}
    assert not posts & {post.prompt for post in world.posts(2000, "pairs dpo 0")}


def test_claim_correct_lines_are_as_free_as_the_writers():
    """Lengths as the writers' own, and both words for a value in even shares."""
    world, rng = World("slots"), random.Random(0)
    posts = world.posts(1500, "free")
    right = [correct_line(world, post, rng) for post in posts]
    theirs = [world.write(post, rng) for post in posts]
    means = [sum(map(len, lines)) / len(lines) for lines in (right, theirs)]
    assert means[0] == pytest.approx(means[1], abs=0.25)
    assert not any(edge.wrong for path in right for edge in path)
    second = [edge.word.form for path in right for edge in path if edge.word.fact == "level"]
    assert 0.45 < sum(second) / len(second) < 0.55


def test_claim_places_are_drawn_evenly_whatever_the_number_of_words():
    """A level has 10 slips and a city 11 of other words, yet each of three places has a third."""
    made = corruptions(World("slots"), 600, "even", kinds=("slip",))
    for fact in ("level", "role", "city"):
        assert 0.26 < sum(x.facts[x.at] == fact for x in made) / 600 < 0.41


def test_claim_edits_that_would_not_be_equally_good_are_left_out():
    """In the xor world an opening's tone matters, so a control keeps it."""
    world = World("xor")
    post = world.posts(1, 0)[0]
    path = correct_line(world, post, random.Random(0))
    openings = [word for i, word in edits(world, post, path, "free") if i == 0]
    assert len(openings) == 11  # 12 hopeful, 12 worried
    with pytest.raises(ValueError, match="There is no kind of edit 'typo'"):
        edits(world, post, path, "typo")
