"""The embedded worlds' six requirements, by the reference alone: no model is trained here.

Expectations over the writers are exact: probabilities of reaching each edge of the grammar's graph.
"""

import math
import random
from dataclasses import replace

import pytest
import torch
from scipy.stats import rankdata

from qlearn.errors import InputError
from qlearn.lm import slots, trips, worlds
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import check_knows, default_tokenizer, load_tokenizer
from qlearn.lm.worlds import (
    EOS,
    LONGEST,
    UNREADABLE,
    VARIANTS,
    WORLDS,
    SlotWorld,
    World,
    as_text,
    as_words,
    draw_pairs,
    fingerprint,
)
from qlearn.train import sft
from qlearn.train.sft import SFTConfig

BETA = 0.5
FROZEN = {
    "slots": "6e38d652307b",
    "delayed": "752ee60827d1",
    "xor": "a53248711f34",
    "trips": "3ac97db755ee",
    "trips-delayed": "fcf32c0171d8",
}
FACTS = ("right", "slip", "habit")  # kinds of token that tell a fact

both = pytest.mark.parametrize("name", ["slots", "trips"])
every = pytest.mark.parametrize("name", WORLDS)


def states(world):
    return [state for level in world.graph[1] for state in level]


def visits(world):
    """(state, edge, probability that writers take it) for every edge, going forward."""
    (_, levels), reach = world.graph, {world.start: 1.0}
    found = []
    for _ in levels:
        below = {}
        for state, p in reach.items():
            for edge in world.edges(*state):
                found.append((state, edge, p * edge.prob))
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


@both
@pytest.mark.parametrize("tokens", ["all", "facts"])
@pytest.mark.parametrize("score", ["surprisal", "one_step"])
def test_claim_surprise_is_not_guilt(name, score, tokens):
    """Requirement 1: under the reference, surprisal and the one-step map of D4 tell wrong tokens
    from right ones no better than chance (AUROC 0.4 to 0.6), over all tokens and over facts."""
    world = World(name)
    chosen = [x for x in visits(world) if tokens == "all" or x[1].kind in FACTS]
    if score == "surprisal":
        scores = [-math.log(edge.prob) for _, edge, _ in chosen]
    else:
        scores = [
            1 - 2 * edge.prob + sum(e.prob**2 for e in world.edges(*state))
            for state, edge, _ in chosen
        ]
    got = auroc(scores, [p for *_, p in chosen], [edge.wrong for _, edge, _ in chosen])
    assert 0.4 <= got <= 0.6


@both
def test_claim_both_kinds_of_wrong_and_of_right_are_common(name):
    """Requirement 1: slips are rare and surprising, habits common and expected; free choices are
    surprising and never wrong."""
    per_kind = {}
    for _, edge, p in visits(World(name)):
        per_kind.setdefault(edge.kind, []).append((p, -math.log(edge.prob)))
    often = {kind: sum(p for p, _ in x) for kind, x in per_kind.items()}
    surprise = {kind: sum(p * s for p, s in x) / often[kind] for kind, x in per_kind.items()}
    assert often["habit"] > 1 and 0.1 < often["slip"] < 0.3
    assert often["free"] > 4 and often["right"] > 2
    assert surprise["habit"] < 0.6 < 1 < surprise["free"] < surprise["slip"]


@both
def test_claim_greedy_writers_are_not_optimal(name):
    """Requirement 2: the reference's most likely line earns far less than the optimum."""
    world = World(name)
    post, (node, memory), greedy = world.posts(1, 0)[0], world.start, []
    while node is not None:
        edge = max(world.edges(node, memory), key=lambda e: e.prob)
        greedy.append(edge)
        node, memory = edge.node, edge.memory
    words = [edge.word.spell(post) for edge in greedy]
    best = world.solve(1e-3).value[0].item()
    assert world.reward(post, words) < 0 < 2 < best


@both
def test_claim_length_is_free(name):
    """Requirement 3: short and long lines are both common, and neither pays by being long."""
    world, rng = World(name), random.Random(0)
    posts = world.posts(2000, "length")
    lines = [world.write(post, rng) for post in posts]
    lengths = torch.tensor([float(len(line)) for line in lines])
    assert lengths.min() <= 12 and lengths.max() == world.longest and lengths.std() > 2
    right = [world.parse(post, line) for post, line in zip(posts, lines, strict=True)]
    perfect = torch.tensor([not any(edge.wrong for edge in path) for path in right])
    assert lengths[perfect].std() > 2  # faultless lines come in all lengths too
    paid = torch.tensor([sum(edge.reward for edge in path) for path in right])
    assert abs(torch.corrcoef(torch.stack([paid, lengths]))[0, 1]) < 0.2


@pytest.mark.parametrize(
    "pair", [("slots", "delayed", "salary"), ("trips", "trips-delayed", "price")]
)
def test_claim_delayed_world_moves_the_reward_and_not_the_credit(pair):
    """Requirement 4 (E4): one fact's reward is paid at EOS, its advantage stays at the fact."""
    now, late, fact = World(pair[0]), World(pair[1]), pair[2]
    rng, told = random.Random(3), 0
    for post in now.posts(50, "delayed"):
        line = now.write(post, rng)
        paid, owed = now.explain(post, line, BETA), late.explain(post, line, BETA)
        at = [i for i, edge in enumerate(now.parse(post, line)) if edge.word.fact == fact]
        told += len(at)
        for i in at:
            assert owed[i]["reward"] == 0 and owed[-1]["reward"] == paid[i]["reward"] != 0
        assert paid[-1]["reward"] == 0
        for a, b in zip(paid, owed, strict=True):
            assert a["advantage"] == pytest.approx(b["advantage"], abs=1e-12)
        assert sum(t["reward"] for t in paid) == pytest.approx(sum(t["reward"] for t in owed))
    assert told > 20


def test_claim_xor_world_credits_the_second_token():
    """Requirement 4 (E5): the verb's tone pays only against the opening's, and gets all credit."""
    world, rng = SlotWorld("xor"), random.Random(4)
    for post in world.posts(50, "xor"):
        tokens = world.explain(post, world.write(post, rng), BETA)
        verb = next(token for token in tokens if token["word"] in slots.VERBS)
        hopeful = tokens[0]["word"] in slots.OPENINGS[:12]
        agrees = hopeful == (verb["word"] in slots.VERBS[:8])
        assert tokens[0]["advantage"] == pytest.approx(0, abs=1e-12)
        assert (verb["advantage"] > 0) == agrees and abs(verb["advantage"]) > 0.2


@both
def test_claim_labels_are_bradley_terry_on_the_true_reward(name):
    """Requirement 5: over 4,000 pairs the better line wins as often as σ(ΔR) says."""
    world, rng = World(name), random.Random(5)
    posts = world.posts(4000, "labels")
    first, second = ([as_text(world.write(p, rng)) for p in posts] for _ in range(2))
    rows = world.label(posts, first, second, seed=1)
    assert rows == world.label(posts, first, second, seed=1)
    assert rows != world.label(posts, first, second, seed=2)
    gaps = torch.tensor([
        world.reward(p, as_words(a)) - world.reward(p, as_words(b))
        for p, a, b in zip(posts, first, second, strict=True)
    ])  # fmt: skip
    wins = torch.tensor([float(row["chosen"] == a) for row, a in zip(rows, first, strict=True)])
    surprise = (wins - gaps.sigmoid()).mean()
    assert abs(surprise) < 4 * 0.5 / math.sqrt(len(posts))
    assert wins[gaps > 1].mean() > 0.75 and wins[gaps < -1].mean() < 0.25


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("slots", "SUBREDDIT: r/jobs\n\nTITLE: ", "\n\nTL;DR:"),
     ("trips", "TO: booking desk\n\nSUBJECT: ", "\n\nNOTE:")],
)  # fmt: skip
def test_claim_posts_and_lines_read_like_english(name, first, last):
    """Requirement 6: whole sentences with the facts in place, lines of one opening and one stop."""
    world, rng = World(name), random.Random(6)
    for post in world.posts(200, "english"):
        assert post.prompt.startswith(first) and post.prompt.endswith(last)
        body = post.prompt.split("\n\n")[2]
        assert "{" not in body and "  " not in body and body[-1] in ".!?"
        for fact in world.grammar.facts:
            assert fact.forms[post.facts[fact.name]][0] in body
        line = as_text(world.write(post, rng))
        assert line[0] == " " and line[1].isupper() and line[-1] in ".!" and "  " not in line


@every
def test_claim_exact_advantage_equals_enumeration_of_the_grammar(name):
    """V* by brute force over all ways to finish a line: β log E_ref exp(R/β), recursively."""
    world = World(name)

    def mean_exp(node, memory):
        if node is None:
            return 1.0
        return sum(
            e.prob * math.exp(e.reward / BETA) * mean_exp(e.node, e.memory)
            for e in _merged(world.edges(node, memory))
        )

    expected = BETA * math.log(mean_exp(*world.start))
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


@every
def test_claim_probabilities_of_every_state_sum_to_one(name):
    world = World(name)
    for state in states(world):
        assert sum(e.prob for e in world.edges(*state)) == pytest.approx(1, abs=1e-12)
    assert world.longest == (LONGEST if name in VARIANTS else 27)


@every
def test_claim_a_word_says_which_edge_was_taken(name):
    """No two edges of a state spell the same word, or a line's probability would be ambiguous."""
    world = World(name)
    for post in world.posts(20, "edges"):
        for state in states(world):
            spelled = [edge.word.spell(post) for edge in world.edges(*state)]
            assert len(set(spelled)) == len(spelled)


@both
def test_claim_text_and_words_are_inverse(name):
    world, rng = World(name), random.Random(7)
    for post in world.posts(200, "inverse"):
        words = world.write(post, rng)
        assert as_words(as_text(words)) == words and words[-1] == EOS
        assert world.parse(post, words) is not None


@both
def test_claim_unreadable_lines_cost(name):
    """A line that leaves the grammar keeps what it had earned and pays for leaving."""
    world = World(name)
    post = world.posts(1, 2)[0]
    words = world.write(post, random.Random(2))
    assert world.parse(post, words[:-2]) is None and world.explain(post, words[:-2], BETA) is None
    earned = sum(e.reward for e in world.parse(post, words))
    assert world.reward(post, [*words[:-1], "nurse", EOS]) == pytest.approx(earned + UNREADABLE)
    assert world.reward(post, [EOS]) == UNREADABLE


def test_claim_unknown_worlds_are_named():
    with pytest.raises((InputError, ValueError), match="There is no world 'sloths'"):
        SlotWorld("sloths")


# --- the second world --------------------------------------------------------------------------


def test_claim_worlds_share_no_fact_and_no_free_choice():
    """Nothing that one world's writers can say about a post is a word of the other's facts."""
    said = [
        {w for fact in module.FACTS for forms in fact.forms for w in forms}
        | {w for w in module.GRAMMAR.words if w not in ("in", "from")}
        for module in (slots, trips)
    ]
    assert said[0] & said[1] == set() and min(map(len, said)) > 100


def test_claim_trip_writers_swap_round_down_and_change_the_unit():
    """The habits are as the module says: two wrong words for a swap, and inside the lists."""
    world, rng, swaps = World("trips"), random.Random(9), 0
    for post in world.posts(400, "habits"):
        line = world.write(post, rng)
        path = world.parse(post, line)
        told = {
            world.edges(*before)[0].word.fact: (edge, word)
            for before, edge, word in zip(_states(world, path), path, line, strict=True)
        }
        value = {fact.name: fact.forms[post.facts[fact.name]][0] for fact in trips.FACTS}
        assert value["origin"] != value["goal"]
        (first, origin), (second, goal) = told["origin"], told["goal"]
        if first.wrong:
            swaps += 1
            assert origin == value["goal"] and goal in (value["origin"], value["goal"])
            assert second.wrong == (goal == value["origin"])
        if "price" in told and told["price"][0].wrong:
            assert int(told["price"][1]) == int(value["price"]) - 30
        if "unit" in told and told["unit"][0].wrong:
            units = trips.UNITS
            assert told["unit"][1] == units[(units.index(value["unit"]) + 1) % len(units)]
    assert 0.5 < swaps / 400 < 0.66


def _states(world, path):
    return [world.start, *((edge.node, edge.memory) for edge in path[:-1])]


@every
def test_claim_each_world_has_a_tokenizer_that_knows_its_words(name):
    """Text survives tokenising, one token a word, and nothing is unknown."""
    world, rng = World(name), random.Random(10)
    tokenizer = load_tokenizer(default_tokenizer("tiny", name))
    check_knows(tokenizer, world)
    for post in world.posts(100, "tokens"):
        line = world.write(post, rng)
        ids = tokenizer(post.prompt + as_text(line)).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) < 200
        ids = tokenizer(as_text(line)).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == line[:-1]
        assert tokenizer.decode(ids) == as_text(line).strip()


def test_claim_a_tokenizer_of_another_world_is_refused(tmp_path):
    with pytest.raises(InputError, match="words of the world trips"):
        check_knows(load_tokenizer("slots"), World("trips"))
    config = SFTConfig(model="tiny", data="trips", tokenizer="slots", output_dir=str(tmp_path))
    with pytest.raises(InputError, match="or --tokenizer trips"):
        sft.run(config)


def test_claim_training_takes_any_world_by_its_name(tmp_path):
    """`--data trips` needs no file and no tokenizer: three steps of supervised fine-tuning."""
    config = SFTConfig(
        model="tiny", data="trips", output_dir=str(tmp_path / "a"), world_rows=60, max_steps=3
    )
    assert sft.run(config)["before"]["eval_rows"] == 6
    assert len(load_tokenizer(str(tmp_path / "a"))) == len(World("trips").vocabulary())


def test_claim_pairs_come_from_any_model_in_any_world():
    """What `qlearn dpo --data trips` learns from; an untrained model's lines are unreadable."""
    world, tokenizer = World("trips"), load_tokenizer("trips")
    rows = draw_pairs(world, load_model("tiny", tokenizer, seed=0), tokenizer, 6, "pairs")
    assert [row["prompt"] for row in rows] == [p.prompt for p in world.posts(6, "pairs pairs")]
    for row, post in zip(rows, world.posts(6, "pairs pairs"), strict=True):
        lengths = [len(as_words(row[side])) - 1 for side in ("chosen", "rejected")]
        assert row["chosen"] != row["rejected"] and max(lengths) <= world.longest + 4
        assert world.reward(post, as_words(row["rejected"])) == UNREADABLE


# --- what guards the worlds --------------------------------------------------------------------


@every
def test_claim_worlds_are_frozen(name):
    """Results were measured on these very worlds. A change of theirs is a change of all results."""
    assert fingerprint(World(name)) == FROZEN[name], (
        f"The world {name} is not what the results were measured on: undo the change, or measure "
        "every results file of this world again (make results) and then write its new fingerprint "
        "here."
    )


@pytest.mark.parametrize("change", [dict(prob=0.4), dict(reward=0.1), dict(kind="free")])
def test_claim_fingerprint_sees_one_edge(change, monkeypatch):
    """One edge of the last state of a grammar, changed in any field."""
    before = fingerprint(World("trips"))
    edges = World.edges

    def changed(self, node, memory=0):
        found = edges(self, node, memory)
        return tuple(replace(e, **change) for e in found) if node == "after thing 3" else found

    monkeypatch.setattr(World, "edges", changed)
    assert fingerprint(World("trips")) != before


def test_claim_auroc_of_this_file_is_the_usual_one():
    """The weighted AUROC above, at equal weights, against scipy's ranks."""
    rng = random.Random(8)
    scores = [rng.randrange(5) for _ in range(60)]
    wrong = [rng.random() < 0.4 for _ in range(60)]
    ranks, n = rankdata(scores), sum(wrong)
    usual = (ranks[torch.tensor(wrong).numpy()].sum() - n * (n + 1) / 2) / (n * (60 - n))
    assert auroc(scores, [1.0] * 60, wrong) == pytest.approx(usual)


@every
def test_claim_one_step_is_the_squared_distance_of_a_word_from_the_writers(name):
    """‖e_a − π_ref(·|s)‖² over the words of each state, and log π_ref, reward and kind beside."""
    world = World(name)
    post = world.posts(1, "one step")[0]
    line = world.write(post, random.Random(2))
    path = world.parse(post, line)
    states = zip(_states(world, path), path, world.explain(post, line, BETA), strict=True)
    for before, edge, row in states:
        edges = world.edges(*before)
        distance = sum(((e is edge) - e.prob) ** 2 for e in edges)
        assert row["one_step"] == pytest.approx(distance, abs=1e-12)
        assert row["logp_ref"] == pytest.approx(math.log(edge.prob), abs=1e-12)
        assert (row["reward"], row["kind"], row["wrong"]) == (edge.reward, edge.kind, edge.wrong)


def test_claim_pairs_are_drawn_with_room_and_with_seeds_of_their_own(monkeypatch):
    """Four tokens more than the writers need; as many samples and labels as names of a draw."""
    asked, labels, label = [], [], World.label

    def write(model, tokenizer, prompts, *, max_new_tokens, seed):
        asked.append((prompts, max_new_tokens, seed))
        return [f" line {i}" for i in range(len(prompts))]

    def spy(world, posts, first, second, seed):
        labels.append((first, second, seed))
        return label(world, posts, first, second, seed)

    monkeypatch.setattr(worlds, "sample", write)
    monkeypatch.setattr(World, "label", spy)
    for name in range(12):
        draw_pairs(World("slots"), None, None, 3, name)
        prompts = [post.prompt for post in World("slots").posts(3, f"pairs {name}")]
        assert asked[-1][:2] == ([p for p in prompts for _ in range(2)], LONGEST + 4)
        assert labels[-1][:2] == ([" line 0", " line 2", " line 4"],
                                  [" line 1", " line 3", " line 5"])  # fmt: skip
    for seeds in ({seed for *_, seed in asked}, {seed for *_, seed in labels}):
        assert len(seeds) == 12 and max(seeds) > 2**16


@pytest.mark.parametrize(("tone", "agrees"), [(1, slice(0, 8)), (2, slice(8, 16))])
def test_claim_a_verb_pays_where_its_tone_is_the_openings(tone, agrees):
    """What the state remembers is the tone: 1 for the hopeful half of a list, 2 for the other."""
    openings = slots.edges("xor", "opening", 0)
    assert [edge.memory for edge in openings] == [1] * 12 + [2] * 12
    verbs = slots.edges("xor", "verb", tone)
    assert [edge.word.text for edge in verbs] == slots.VERBS
    for i, edge in enumerate(verbs):
        pays = 0.8 if i in range(*agrees.indices(16)) else -0.8
        assert edge.reward == pays and edge.memory == 0
