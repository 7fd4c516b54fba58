"""The grid of decoders: the exact forecast, what a cell holds, and contrasts with known answers."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from qlearn.findings.search import exact_forecast
from qlearn.lm.decode import Decoded, Decoding, decode
from qlearn.lm.worlds import UNREADABLE, SlotWorld
from qlearn.studies import contrasts as grid
from qlearn.studies import search
from qlearn.studies.search import DECODERS, cell, exact_truth, judge
from qlearn.studies.slot_world import summarise

BETA = 0.5


@pytest.mark.parametrize("variant", ["slots", "delayed", "xor"])
def test_claim_the_exact_forecast_is_reward_so_far_and_value(tokenizer, variant):
    """On every prefix of written lines, against `explain`; V*(s₀) at the prompt, R at the end."""
    world, rng = SlotWorld(variant), random.Random(0)
    posts = world.posts(5, "forecast")
    forecast = exact_forecast(world, posts, tokenizer, BETA)
    for post in posts:
        words = world.write(post, rng)
        ids = tokenizer.convert_tokens_to_ids(words)
        prompt = tokenizer(post.prompt).input_ids
        found = forecast([(prompt, ids[:n]) for n in range(len(ids) + 1)]).tolist()
        truth, earned = world.explain(post, words, BETA), 0.0
        for row, worth in zip(truth, found, strict=False):
            assert abs(worth - (earned + row["value"])) < 1e-5
            earned += row["reward"]
        assert abs(found[-1] - world.reward(post, words)) < 1e-5
        assert abs(found[0] - exact_truth(world, BETA)["value"]) < 1e-5
        wrong = [*ids[:3], ids[0]]
        so_far = sum(row["reward"] for row in truth[:3])
        assert abs(forecast([(prompt, wrong)]).item() - (so_far + UNREADABLE)) < 1e-5


def test_claim_sampling_beats_the_mode_on_the_objective_exactly():
    """F3 in the slot world: no single line is worth what sampling from π* is worth."""
    for beta in (0.1, 0.5, 2.0):
        truth = exact_truth(SlotWorld(), beta)
        assert truth["objective_of_mode"] < truth["value"] - 10 * beta


def test_claim_a_cell_accounts_for_every_line(model, other, tokenizer):
    world = SlotWorld()
    posts = world.posts(8, "cell")
    rng, how = random.Random(1), Decoding(max_new_tokens=20)
    rivals = [0.5] * 8
    found = decode(model, tokenizer, [post.prompt for post in posts], how)
    for i in range(4):  # and four lines that writers could write
        words = world.write(posts[i], rng)
        tokens = tokenizer.convert_tokens_to_ids(words)
        found[i] = Decoded("", found[i].prompt, tokens, 0.0, ended=True)
    found[3] = found[3]._replace(tokens=found[3].tokens[:-1], ended=False)  # cut before its end
    columns = cell(world, posts, rivals, found, model, other, tokenizer, BETA, how)
    assert columns["unreadable"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert columns["unended"][3] == 1 and columns["length"].tolist() == [
        len(d.tokens) for d in found
    ]
    for i, (post, d) in enumerate(zip(posts, found, strict=True)):
        reward, _ = judge(world, post, d, tokenizer)
        assert columns["reward"][i] == reward
        assert columns["win"][i] == (1 if reward > 0.5 else 0.5 if reward == 0.5 else 0)
    ratio = columns["logp"] - columns["ref_logp"]
    assert np.abs(columns["implicit"] - BETA * ratio).max() < 1e-4
    assert np.abs(columns["objective"] - (columns["reward"] - columns["implicit"])).max() < 1e-9
    fixed = cell(world, posts, rivals, found, model, other, tokenizer, BETA, DECODERS["greedy"])
    expected = columns["reward"] + BETA * columns["ref_logp"]
    assert np.abs(fixed["objective"] - expected).max() < 1e-9
    cold = cell(world, posts, rivals, found, model, other, tokenizer, BETA, DECODERS["cold"])
    assert "objective" not in cold


def test_claim_best_of_n_takes_the_highest_score_among_the_first_n():
    scores = np.array([[0.0, 3.0, 1.0, 9.0], [5.0, 4.0, 8.0, 2.0]])
    assert [search.best_of(n, scores).tolist() for n in (1, 2, 3, 4)] == [
        [0, 4], [1, 4], [1, 6], [3, 6]]  # fmt: skip


def columns(reward, length=None):
    reward = np.asarray(reward, dtype=float)
    length = np.zeros(len(reward)) if length is None else np.asarray(length, dtype=float)
    return {"reward": reward, "length": length, "win": (np.sign(reward) + 1) / 2}


def test_claim_length_control_finds_the_effect_beside_length():
    """Reward rises by 0.3 a token; of the gain of 1.2, 0.6 is two tokens' worth of length."""
    rng = np.random.default_rng(0)
    length = 2 + rng.normal(size=2000)
    reward = 0.6 + 0.3 * length + 0.1 * rng.normal(size=2000)
    found = grid.at_equal_length(reward, length)
    assert found["low"] < 0.6 < found["high"] and abs(found["slope"] - 0.3) < 0.02
    assert found["high"] - found["low"] < 0.05
    plain = grid.at_equal_length(np.array([1.0, 2.0, 3.0]), np.full(3, 4.0))
    assert plain["effect"] == 2.0 and plain["slope"] == 0.0


def test_claim_contrasts_have_their_known_answers():
    seeds = np.repeat([0, 1], 50)
    worse = columns(np.tile([-1.0, 1.0], 50), np.full(100, 9.0))
    better = columns(np.ones(100), np.full(100, 10.0))
    found = grid.contrast(better, worse, seeds)
    assert found["win"]["mean"] == 0.5 and found["reward"]["mean"] == 1.0
    assert found["length"]["mean"] == 1.0 and found["seeds"]["win"]["mean"] == 0.5
    assert found["win"]["low"] > 0.35 and abs(found["p_value"] - 2 * 0.5**50) < 1e-20
    same = grid.contrast(worse, worse, seeds)
    assert same["p_value"] == 1.0 and same["win"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    model, control = ({"a": better, "b": worse}, {"a": worse, "b": better})
    gained = grid.gain_contrast(model, control, "a", "b")
    assert gained["win"]["mean"] == 1.0 and gained["p_value"] < 1e-6
    assert grid.gain_contrast(model, model, "a", "b")["p_value"] == 1.0


def test_claim_over_optimisation_is_seen_where_it_is_planted():
    """Implicit reward up, true reward up and then down: a negative curve for the true one only."""
    seeds = np.repeat([0, 1, 2], 10)
    widths = [1, *grid.WIDTHS]
    model = {}
    for n in widths:
        x = np.log2(n)
        c = columns(np.full(30, -((x - 2) ** 2))) | {"implicit": np.full(30, x) + 0.01 * seeds}
        model.update({"greedy": c} if n == 1 else {f"beam{n}": c, f"beam{n}_mean": c})
    found = grid.over_optimisation({"dpo": model}, seeds)["dpo"]
    assert found["implicit_change"]["mean"] > 4 and found["reward_curve"]["high"] < -0.9
    assert abs(found["implicit_curve"]["mean"]) < 1e-9 and found["reward_change"]["mean"] < 0


def test_claim_all_p_values_are_adjusted_together():
    rng = np.random.default_rng(0)
    seeds = np.repeat([0, 1], 40)
    names = {name for pair in grid.PAIRS for name in pair}
    cells = {m: {d: columns(rng.normal(size=80)) for d in names} for m in ("sft", "dpo")}
    found = grid.contrasts(cells, seeds)
    assert len(found) == 2 * len(grid.PAIRS) + 2
    assert all(x["p_holm"] >= x["p_value"] for x in found.values())
    least = min(found.values(), key=lambda x: x["p_value"])
    assert abs(least["p_holm"] - min(1, least["p_value"] * len(found))) < 1e-12


def test_claim_the_grid_takes_further_policies(monkeypatch, tmp_path, save_models):
    """The results file's shape, with untrained models where trained ones would be."""
    save_models(tmp_path, sft=1, rlhf=2)

    def short(policy, tokenizer, prompts, how, **rest):
        how = replace(how, max_new_tokens=3, beams=min(how.beams, 2))
        return decode(policy, tokenizer, prompts, how, **rest)

    monkeypatch.setattr(search, "decode", short)
    monkeypatch.setattr(search.runs, "sft_run", lambda seed: str(tmp_path / "sft"))
    monkeypatch.setattr(search.runs, "each_seed", lambda f, xs: [f(x) for x in xs])
    policies = {"rlhf": (lambda seed, reference: reference.replace("sft", "rlhf"), 0.3)}
    found = search.run([0, 1], policies, n_posts=3)
    assert found["betas"] == {"rlhf": 0.3} and found["posts_per_seed"] == 3
    best = [f"best{n}" for n in search.BEST_OF]
    assert set(found["mean"]["rlhf"]) == {*DECODERS, *best}
    assert set(found["mean"]["sft"]) == {*DECODERS, "guided1", "guided5"}
    assert found["mean"]["sft"]["sample"]["implicit"]["mean"] == 0.0
    assert abs(found["mean"]["rlhf"]["sample"]["implicit"]["mean"]) > 0.1
    assert "rlhf_over_sft_beam5_over_greedy" in found["contrasts"]
    first = found["samples"][0]
    assert first["post"].startswith("SUBREDDIT") and set(first["rlhf"]) == {*DECODERS, *best}
    chosen = [found["mean"]["rlhf"][name]["implicit"]["mean"] for name in best]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1] - 0.05  # more to choose from
    assert set(found["verifier"]) == {f"rlhf_{a}_over_{b}" for a, b in grid.VERIFIER_PAIRS}
    change = found["verifier"]["rlhf_best16_over_best1"]["length"]["mean"]
    lengths = [found["mean"]["rlhf"][name]["length"]["mean"] for name in best]
    assert abs(change - (lengths[-1] - lengths[0])) < 1e-9
    quoted = json.loads(json.dumps(found, allow_nan=False))  # plain numbers only
    assert not any("." in key or ":" in key for key in quoted["contrasts"])


def test_claim_guided_search_reaches_the_best_lines_on_a_writer(tokenizer, other):
    """An untrained model that proposes every word, guided by the exact value, writes true lines."""
    world = SlotWorld()
    posts = world.posts(3, "guided")
    how = Decoding(decoder="guided", beams=2, candidates=224, beta=0.02, max_new_tokens=23)
    found = decode(
        other, tokenizer, [post.prompt for post in posts], how,
        forecast=exact_forecast(world, posts, tokenizer, 0.02),
    )  # fmt: skip
    assert [round(judge(world, p, d, tokenizer)[0], 6) for p, d in zip(posts, found, strict=True)] \
        == [2.3] * 3  # fmt: skip
    assert torch.isfinite(torch.tensor([d.score for d in found])).all()


def graded(rng, seeds, names, keys=("win", "reward", "length", "implicit")):
    """A grid's model with random columns: {decoder: {column: (N,)}}; wins are 0, ½ or 1."""
    n = len(seeds)
    return {
        name: {k: rng.integers(0, 3, n) / 2 if k == "win" else rng.normal(size=n) for k in keys}
        for name in names
    }


def test_claim_a_contrast_is_first_less_second_on_the_same_posts():
    """Means by hand, by seed too; McNemar counts strict wins only, so ties are no wins."""
    rng, seeds = np.random.default_rng(0), np.repeat([0, 1, 2], 20)
    model = graded(rng, seeds, "ab")
    first, second = model["a"], model["b"]
    first["win"] = np.resize([1.0, 0.5, 0.5, 1.0, 1.0], 60)
    second["win"] = np.resize([0.5, 1.0, 0.0, 1.0, 0.0], 60)
    found = grid.contrast(first, second, seeds)
    for key in ("win", "reward", "length"):
        by_seed = [(first[key] - second[key])[seeds == s].mean() for s in (0, 1, 2)]
        assert found[key]["mean"] == pytest.approx(np.mean(by_seed))
        assert found["seeds"][key] == pytest.approx(
            summarise([{"x": float(x)} for x in by_seed])["x"]
        )
    # of five posts first alone wins two and second alone one: 24 against 12
    expected = 2 * sum(math.comb(36, k) for k in range(13)) / 2**36
    assert found["p_value"] == pytest.approx(expected)


def test_claim_reward_at_equal_length_is_a_mean_only_where_there_is_no_line():
    """Rewards of at most 0 have their line all the same; a mean has its standard error."""
    reward, length = np.array([-3.0, -1.0, 0.0]), np.array([-2.0, 0.0, 1.0])
    fitted = grid.at_equal_length(reward, length)
    assert fitted["slope"] == pytest.approx(1) and fitted["effect"] == pytest.approx(-1)
    plain = grid.at_equal_length(np.array([1.0, 2.0, 6.0]), np.full(3, 4.0))
    half = 1.96 * (7 / 3) ** 0.5  # the sample variance is 7
    assert plain == pytest.approx({"effect": 3.0, "low": 3 - half, "high": 3 + half, "slope": 0.0})


def test_claim_every_contrast_is_of_the_better_over_the_worse():
    """Each decoder has a reward of its own, so each difference names its two decoders."""
    seeds = np.repeat([0, 1], 4)
    pairs = grid.PAIRS + grid.VERIFIER_PAIRS
    names = sorted({name for pair in pairs for name in pair})
    worth = {name: float(2**i) for i, name in enumerate(names)}
    model = {d: columns(np.full(8, x)) for d, x in worth.items()}
    cells = {"sft": model, "dpo": model}
    for found, named, models in (
        (grid.contrasts(cells, seeds), grid.PAIRS, ("sft", "dpo")),
        (grid.verifier(cells, seeds), grid.VERIFIER_PAIRS, ("dpo",)),
    ):
        plain = {key: x for key, x in found.items() if "over_sft" not in key}
        assert {key: x["reward"]["mean"] for key, x in plain.items()} == {
            f"{name}_{better}_over_{worse}": worth[better] - worth[worse]
            for name in models for better, worse in named
        }  # fmt: skip


def test_claim_over_optimisation_is_by_seed_and_by_penalty():
    """Changes from greedy to the widest beam, and the parabola over log₂ width, seed by seed."""
    rng, seeds = np.random.default_rng(1), np.repeat([0, 1, 2], 5)
    names = ["greedy", *(f"beam{n}{end}" for n in grid.WIDTHS for end in ("", "_mean"))]
    model = graded(rng, seeds, names)
    found = grid.over_optimisation({"dpo": model}, seeds)
    assert list(found) == ["dpo", "dpo_mean"]
    x = np.log2([1.0, *grid.WIDTHS])
    design = np.stack([x**2, x, np.ones_like(x)], axis=1)
    for ending in ("", "_mean"):
        for key in ("implicit", "reward", "length"):
            y = np.array([
                [model[d][key][seeds == s].mean() for s in (0, 1, 2)]
                for d in ("greedy", *(f"beam{n}{ending}" for n in grid.WIDTHS))
            ])  # fmt: skip
            change = found[f"dpo{ending}"][f"{key}_change"]
            assert change["mean"] == pytest.approx((y[-1] - y[0]).mean())
            assert (change["least"], change["most"]) == pytest.approx(
                (min(y[-1] - y[0]), max(y[-1] - y[0]))
            )
            curve = np.linalg.lstsq(design, y, rcond=None)[0][0]
            assert found[f"dpo{ending}"][f"{key}_curve"]["mean"] == pytest.approx(curve.mean())


def test_claim_a_line_wins_over_its_own_rival(model, other, tokenizer):
    """Rivals that earn 1 less, the same (but for rounding), and 1 more than the line."""
    world = SlotWorld()
    posts, how = world.posts(3, "rivals"), Decoding(max_new_tokens=20)
    found = []
    for i, post in enumerate(posts):
        tokens = tokenizer.convert_tokens_to_ids(world.write(post, random.Random(i)))
        found.append(Decoded("", tokenizer(post.prompt).input_ids, tokens, 0.0, ended=True))
    rewards = [judge(world, p, d, tokenizer)[0] for p, d in zip(posts, found, strict=True)]
    rivals = [rewards[0] - 1, rewards[1] + 1e-12, rewards[2] + 1]
    columns = cell(world, posts, rivals, found, model, other, tokenizer, BETA, how)
    assert columns["win"].tolist() == [1.0, 0.5, 0.0] and columns["reward"].tolist() == rewards


def test_claim_the_grids_policies_are_dpo_at_three_prices_and_ppo(made):
    """Each trainer asks for its recipe at its β, from the reference it is given."""
    folders = {name: trainer(3, "ref") for name, (trainer, _) in search.POLICIES.items()}
    assert {name: (made[x].beta, made[x].model, made[x].seed) for name, x in folders.items()} == {
        "dpo_low": (0.1, "ref", 3), "dpo": (0.5, "ref", 3), "dpo_high": (2.0, "ref", 3),
        "ppo": (0.5, "ref", 3)}  # fmt: skip
    assert all(made[x].beta == search.POLICIES[name][1] for name, x in folders.items())
    assert search.dpo_policy(3, "ref", 0.25) != folders["dpo"]
    assert "ppo" in folders["ppo"] and "dpo" in folders["dpo"]


def test_claim_two_lines_are_told_with_their_true_rewards():
    found = [Decoded(f" line {i} ", [], [], 0.0, ended=True) for i in range(4)]
    assert search.told({"reward": np.array([1.5, -2.0, 3.0, 4.0])}, found) == [
        "+1.5 line 0", "-2.0 line 1"]  # fmt: skip


def test_claim_the_grids_means_are_over_posts(monkeypatch, made):
    """Two seeds and two models with columns of known means; two posts are printed, as drawn."""
    asked = []

    def run_model(seed_and_name, policies, n_posts):
        seed, name = seed_and_name
        asked.append((seed, name, n_posts))
        column = np.array([0.0, 1.0, 5.0]) + 10 * seed
        return {"sample": ({"reward": column, "win": column / 10}, [f"{seed}{name}{i}" for i in
                                                                  range(2)])}  # fmt: skip

    monkeypatch.setattr(search, "run_model", run_model)
    pooled = {}
    for part in ("contrasts", "over_optimisation", "verifier"):
        monkeypatch.setattr(
            search, part, lambda cells, which, part=part: pooled.update({part: (cells, which)})
        )
    found = search.run([3, 5], {"a": (None, 0.25)}, n_posts=3)
    assert asked == [(s, name, 3) for s in (3, 5) for name in ("sft", "a")]
    assert [made[x].seed for x in made] == [3, 5]  # the references, trained first
    assert found["mean"]["a"]["sample"]["reward"]["mean"] == 42.0
    assert found["mean"]["sft"]["sample"]["win"]["mean"] == pytest.approx(4.2)
    for cells, which in pooled.values():
        assert which.tolist() == [3, 3, 3, 5, 5, 5]
        assert cells["a"]["sample"]["reward"].tolist() == [30, 31, 35, 50, 51, 55]
    assert pooled.keys() == {"contrasts", "over_optimisation", "verifier"}
    posts, lines, rewards = search.held_out(SlotWorld(), 3, 2)
    assert found["samples"] == [
        {"post": posts[i].prompt, "writer": f"{rewards[i]:+.1f} {lines[i]}",
         "sft": {"sample": f"3sft{i}"}, "a": {"sample": f"3a{i}"}}
        for i in range(2)
    ]  # fmt: skip


def test_claim_every_decoder_may_write_four_words_more_than_the_longest_line(
    monkeypatch, tmp_path, save_models
):
    """So that a line which does not end is seen; the verifier's samples are the reference's."""
    save_models(tmp_path, sft=1, policy=2)
    lengths = []

    def short(policy, tokenizer, prompts, how, **rest):
        lengths.append(how.max_new_tokens)
        return decode(policy, tokenizer, prompts, replace(how, max_new_tokens=2), **rest)

    monkeypatch.setattr(search, "decode", short)
    monkeypatch.setattr(search, "DECODERS", {"greedy": DECODERS["greedy"]})
    monkeypatch.setattr(search.runs, "sft_run", lambda seed: str(tmp_path / "sft"))
    search.run_model((0, "p"), {"p": (lambda *_: str(tmp_path / "policy"), 0.3)}, n_posts=2)
    assert lengths == [23, 23] and SlotWorld().longest == 19
