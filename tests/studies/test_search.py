"""The grid of decoders: the exact forecast, what a cell holds, and contrasts with known answers."""

import json
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
