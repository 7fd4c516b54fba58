"""What a heat map follows: the measurement tells advantage from reward where they differ."""

import random

import pytest
import torch

from qlearn.findings.credit import Credit
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import WORLDS, World
from qlearn.studies.heat_maps import as_rows, follows, negotiation, places, showcase

BETA = 0.5


def oracle(world, key):
    """A `credit` that says the exact advantage, or the true reward, of the held-out lines."""
    posts, rng = world.posts(60, "held out 0"), random.Random("held out 0")
    truths = [world.explain(post, world.write(post, rng), BETA) for post in posts]

    def credit(rows):
        found = [torch.tensor([word[key] for word in truth]) for truth in truths]
        assert [len(x) for x in found] == [len(completion) for _, completion in rows]
        return [Credit(x, x, x, x, x) for x in found]

    return credit


@pytest.mark.parametrize("key", ["advantage", "reward"])
def test_eq_10_delayed_rewards_tell_the_two_apart(tokenizer, key):
    """E4: a map that is the advantage correlates 1 with it and little with the reward."""
    world = World("delayed")
    found = follows(world, oracle(world, key), tokenizer, BETA, seed=0, n=60)
    other = {"advantage": "reward", "reward": "advantage"}[key]
    assert found[f"pearson_{key}"] == pytest.approx(1, abs=1e-6)
    assert found[f"pearson_{other}"] == pytest.approx(found["advantage_with_reward"], abs=1e-6)
    assert found["advantage_with_reward"] < 0.5
    place = found["by_place"]
    assert list(place) == sorted(place)
    assert place["end_charged"]["exact"] == pytest.approx(0, abs=1e-9)
    assert place["end_charged"]["reward"] == pytest.approx(-1.2)
    assert place["salary_habit"]["exact"] < -1 and place["salary_habit"]["reward"] == 0


def test_claim_xor_pays_the_second_word_only():
    """E5: neither tone of opening has an exact advantage; verbs are charged or paid."""
    world = World("xor")
    found = follows(world, oracle(world, "advantage"), load_tokenizer("slots"), BETA, 0, n=60)
    place = found["by_place"]
    assert place["opening_free"]["exact"] == pytest.approx(0, abs=1e-9)
    assert place["verb_charged"]["exact"] < -1 and place["verb_paid"]["exact"] > 0.2


def test_claim_places_name_every_word_once_known():
    world = World("delayed")
    post, words = showcase(world)
    labels = places(world, world.parse(post, words))
    assert len(labels) == len(words) and labels[0] == "opening_free" and labels[1] == "colon_fixed"
    assert "salary_habit" in labels and labels[-1] == "end_charged"


@pytest.mark.parametrize("name", WORLDS)
def test_claim_the_showcase_errs_where_its_variant_looks(name):
    world = World(name)
    post, words = showcase(world)
    assert showcase(world) == (post, words) and len(words) >= 0.8 * world.longest
    wanted = {"xor": "verb_charged", "trips": "price_habit", "trips-delayed": "price_habit"}
    rng = random.Random("showcase")
    lines = [(post, world.write(post, rng)) for post in world.posts(1000, "showcase")]
    fit = [
        line
        for line in lines
        if len(line[1]) / world.longest >= 0.8
        and wanted.get(name, "salary_habit") in places(world, world.parse(*line))
    ]
    assert (post, words) == fit[0]


def test_claim_our_negotiation_has_two_errors_of_the_papers_kind(tokenizer):
    """The good summary is right in every fact; the other turns junior to chief and 38k to 54k."""
    world = World()
    post, good, bad = negotiation()
    told = world.explain(post, good, BETA)
    assert not any(word["wrong"] for word in told)
    assert sum(word["kind"] == "right" for word in told) == 5
    assert [(a, b) for a, b in zip(good, bad, strict=True) if a != b] == [
        ("junior", "chief"), ("38k", "54k")]  # fmt: skip
    assert world.parse(post, bad) is None  # nobody writes that salary
    assert tokenizer.unk_token_id not in [i for row in as_rows(tokenizer, [(post, good)]) for i in
                                          row[0] + row[1][:-1]]  # fmt: skip
