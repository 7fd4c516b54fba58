"""The law of returns against the exact soft value, and the bookkeeping of where mass goes."""

import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest
import torch

from qlearn import results
from qlearn.exact.soft import expected_return, soft_value_prior
from qlearn.lm.logprobs import sum_logps
from qlearn.lm.worlds import WORLDS, World, as_text, as_words
from qlearn.studies import displacement, one_post
from qlearn.studies.corruptions import correct_line
from qlearn.studies.displacement import WORLD, change_by_kind, law_at, return_law, shares
from qlearn.studies.heat_maps import as_rows


@pytest.mark.parametrize("name", WORLDS)
def test_reference_the_law_of_returns_has_the_worlds_soft_value(name):
    """β log Σ p e^{R/β} over distinct returns = the backup's V*(s₀); Σ p R = the writers' mean."""
    world = World(name)
    returns, log_ref = return_law(world)
    assert log_ref.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert len(set(returns.tolist())) == len(returns) and returns.tolist() == sorted(returns)
    for beta in (0.1, 1.0):
        value = soft_value_prior(returns, log_ref, beta).item()
        assert value == pytest.approx(world.solve(beta).value[0].item(), abs=1e-10)
    reward = world.field(lambda edge: edge.reward, 0.0)
    mean = expected_return(world.graph[0], world.log_ref, reward).item()
    assert displacement.expected(returns, log_ref) == pytest.approx(mean, abs=1e-10)


def test_claim_the_sign_law_turns_between_beta_1_and_2():
    """What N8 predicts in the slot world, exactly: chosen below 0 for β ≤ 1, above 0 for β ≥ 2."""
    law = {beta: law_at(beta, *return_law(WORLD)) for beta in displacement.BETAS}
    assert all((x["chosen"] < 0) == (beta <= 1) for beta, x in law.items())
    assert all(x["rejected"] < x["mean"] < min(0, x["chosen"]) for x in law.values())
    means = [law[beta]["mean"] for beta in sorted(law)]
    assert means == sorted(means)
    margins = [x["chosen"] - x["rejected"] for x in law.values()]
    assert max(margins) - min(margins) < 1e-12


def test_claim_shares_know_each_kind_of_line():
    (post,) = WORLD.posts(1, "shares")
    lines = {
        "correct": [0, 0, 0], "habit": [1, 0, 0], "slip": [1, 0, 1], "unreadable": [0, 1, 0],
    }  # fmt: skip

    def line(habit, broken, slip):
        word = {f.name: f.told().spell(post) for f in WORLD.grammar.facts}
        if habit:
            word["day"] = WORLD.grammar.facts[-1].told(1).spell(post)
        if slip:
            word["city"] = WORLD.grammar.facts[2].told(3).spell(post)
        text = "Torn: {level} {role} in {city} likes a {salary} job, reply due {day}."
        return " " + text.format(**word) + (" welcome" if broken else "")

    for kind, made in lines.items():
        found = shares([post, post], [line(*made), line(0, 0, 0)])
        assert found[kind] == (1 if kind == "correct" else 0.5)
        assert sum(found.values()) == 1


def test_claim_parts_by_kind_add_up(tokenizer, model, other):
    """The split of log π/π_ref by kind of word adds up to the mean over whole lines."""
    rng = random.Random(0)
    lines = [(post, WORLD.write(post, rng)) for post in WORLD.posts(12, "parts")]
    found = change_by_kind(model, other, tokenizer, lines)
    rows = as_rows(tokenizer, lines)
    total = (sum_logps(model, rows, 8) - sum_logps(other, rows, 8)).mean().item()
    assert sum(found.values()) == pytest.approx(total, abs=1e-3) and found["free"] != 0


def test_claim_pairs_are_two_lines_by_the_writers_with_bradley_terry_labels():
    """The better line of 1,500 pairs wins as often as Bradley-Terry says."""
    posts = WORLD.posts(1500, "labels")
    rows = displacement.writers_pairs(posts, "test")
    gaps = torch.tensor([
        WORLD.reward(post, as_words(row["chosen"])) - WORLD.reward(post, as_words(row["rejected"]))
        for post, row in zip(posts, rows, strict=True)
    ])  # fmt: skip
    assert all(WORLD.parse(p, as_words(r["chosen"])) for p, r in zip(posts, rows, strict=True))
    differ = gaps != 0
    expected = torch.sigmoid(gaps.abs())[differ].mean().item()
    assert (gaps > 0)[differ].float().mean().item() == pytest.approx(expected, abs=0.04)
    assert all(as_text(as_words(row["chosen"])) == row["chosen"] for row in rows[:20])


def test_claim_keys_of_beta_can_be_quoted(monkeypatch):
    """`quote` splits at dots, so a key may have none."""
    keys = {displacement.beta_key(beta): {"mean": beta} for beta in displacement.BETAS}
    assert len(keys) == len(displacement.BETAS)
    monkeypatch.setattr(results, "load", lambda name: {"law": keys})
    assert results.quote("any:law.beta_0_25.mean:.2f") == "0.25"


def test_claim_curves_are_means_over_seeds():
    logs = [
        [{"step": s, **dict.fromkeys(displacement.CURVES, s * k)} for s in (4, 8)] for k in (1, 3)
    ]
    found = displacement.curve(logs)
    assert found["step"] == [4, 8]
    assert found["rewards/chosen"] == {"mean": [8, 16], "least": [4, 8], "most": [12, 24]}


def test_claim_paired_differences_have_the_level_that_five_seeds_give():
    found = displacement.paired([-0.7, -0.8, -0.75, -0.9, -0.6])
    assert found["high"] < 0 and found["level"] == pytest.approx(0.9375)
    assert found["p_value"] == pytest.approx(2 / 2**5)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_claim_every_seed_of_pairs_has_labels_of_its_own(monkeypatch):
    """The labels' draw differs from seed to seed, not only the lines."""
    drawn = []
    monkeypatch.setattr(World, "label", lambda self, posts, a, b, seed: drawn.append(seed))
    for seed in range(12):
        displacement.writers_pairs([], seed)
    assert len(set(drawn)) == 12


@pytest.mark.parametrize("arm", displacement.ARMS)
def test_claim_arms_differ_in_where_they_start(made, monkeypatch, arm):
    """Start and policy of each arm: which rows, which rate, how often, and from which model."""
    monkeypatch.setattr(displacement, "PAIRS", 60)
    start, policy = displacement.train_arm(arm, 3)
    rows = displacement.writers_pairs(WORLD.posts(60, "arms 3"), 3)
    folders = list(made)
    sft, config = made[folders[0]], made[policy]
    assert (sft.seed, sft.data, sft.model, sft.learning_rate) == (3, "slots", "tiny", 0.004)
    assert folders[-2:] == [start, policy] and len(folders) == (
        2 if arm in ("sft", "pushed") else 3
    )
    assert (config.seed, config.model, config.beta) == (3, start, 0.5)
    assert (config.warmup_steps, config.logging_steps) == (10, 4)
    pushed = arm == "pushed"
    assert rows_of(config.data) == (rows[:10] if pushed else rows)
    assert config.num_train_epochs == (6 if pushed else 1)
    assert config.learning_rate == pytest.approx(0.004 if pushed else 0.0004)
    before = made[start]
    if arm == "chosen":
        assert (before.seed, before.model, before.learning_rate) == (3, folders[0], 0.001)
        assert rows_of(before.data) == [
            {"prompt": row["prompt"], "completion": row["chosen"]} for row in rows
        ]
    if arm == "posts":
        texts = [row["prompt"] + row["completion"] for row in rows_of(before.data)]
        asked = [f"{text}\n\nTL;DR:" for text in texts]
        assert asked == [post.prompt for post in WORLD.posts(5000, "texts 3")]
        assert (before.seed, before.model, before.tokenizer) == (3, "tiny", "slots")


@pytest.mark.parametrize("arm", ["sft", "posts"])
def test_claim_an_arm_is_measured_before_and_after(
    arm, tmp_path, save_models, tokenizer, model, other, monkeypatch
):
    """Made-up samples; NLL, ends and margin are sums of log π over lines that are drawn anew."""
    save_models(tmp_path, start=1, policy=2)  # the weights of the fixtures model and other
    (tmp_path / "policy" / "qlearn.yaml").write_text("beta: 0.25\n")
    (tmp_path / "policy" / "metrics.jsonl").write_text('{"step": 4}\n')
    folders = tuple(str(tmp_path / name) for name in ("start", "policy"))
    monkeypatch.setattr(displacement, "train_arm", lambda *given: {(arm, 5): folders}[given])
    monkeypatch.setattr(displacement, "HELD_OUT", 6)
    monkeypatch.setattr(displacement, "mean_log_ratio", lambda *given: given)
    posts = WORLD.posts(6, "held out 5")
    rng = random.Random(0)
    written = [[f" {as_text(WORLD.write(post, rng)).strip()} " for post in posts],
               [" Torn:"] * 6]  # fmt: skip
    asked = []

    def sample(policy, _, prompts, **how):
        asked.append((prompts, how))
        return written[len(asked) - 1]

    monkeypatch.setattr(displacement, "sample", sample)
    numbers, told = displacement.measure_arm(arm, 5)
    how = {"max_new_tokens": 23, "seed": 5}
    assert asked == [([post.prompt for post in posts], how)] * 2 and WORLD.longest == 19
    assert told == {
        "samples": {"before": [x.strip() for x in written[0][:4]], "after": ["Torn:"] * 4},
        "curve": [{"step": 4}],
    }

    rng = random.Random("correct 5")
    paths = [correct_line(WORLD, post, rng) for post in posts]
    correct = [(post, [edge.word.spell(post) for edge in path])
               for post, path in zip(posts, paths, strict=True)]  # fmt: skip

    def logp(policy, lines):
        return sum_logps(policy, as_rows(tokenizer, lines), 3).mean().item()

    for name, policy, lines in (("before", model, written[0]), ("after", other, written[1])):
        found = numbers[name]
        assert found.pop("nll_correct") == pytest.approx(-logp(policy, correct), rel=1e-5)
        assert found == shares(posts, lines)
    pairs = displacement.writers_pairs(posts, "held out 5")
    ends = {}
    for which in ("chosen", "rejected"):
        lines = [(p, as_words(row[which])) for p, row in zip(posts, pairs, strict=True)]
        ends[which] = 0.25 * (logp(other, lines) - logp(model, lines))
        by_kind = numbers[f"{which}_by_kind"]
        assert 0.25 * math.fsum(by_kind.values()) == pytest.approx(ends[which], abs=1e-3)
    ends["margin"] = ends["chosen"] - ends["rejected"]
    assert numbers["end"] == pytest.approx(ends, abs=1e-3)
    assert ("own_lines" in numbers) == (arm == "sft")
    if arm == "sft":
        world, policy, reference, _, n, seed = numbers["own_lines"]
        assert (world, n, seed) == (WORLD, 6, 5)
        assert logp(policy, correct) == logp(other, correct)
        assert logp(reference, correct) == logp(model, correct)


def test_eq_16_a_point_of_the_sweep_is_beside_its_law(made, monkeypatch):
    """Tiny numbers of rows: which pairs, rate and β each point has, and what it is held against."""
    monkeypatch.setattr(displacement, "SWEEP_PAIRS", 8)
    monkeypatch.setattr(displacement, "SWEEP_LINES", 6)
    monkeypatch.setattr(displacement, "SWEEP_SIZES", (2, 4))
    own = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64)
    asked = []
    monkeypatch.setattr(displacement, "own_returns", lambda *given: asked.append(given) or own)
    after = {}

    def summary(folder):
        n = len(after) + 1.0
        return after.setdefault(folder, {"after": {"eval_rewards/chosen": n,
                                                   "eval_rewards/rejected": -3 * n}})  # fmt: skip

    monkeypatch.setattr(displacement.runs, "summary", summary)
    found = displacement.sweep(7)
    start, *folders = made
    assert asked == [(start, 7)]
    assert (made[start].seed, made[start].tokenizer) == (7, "slots")
    assert rows_of(made[start].data) == one_post.lines(WORLD, 6, 7)
    rows, held_out = one_post.pairs(WORLD, 8, 7), one_post.pairs(WORLD, 2048, "held out 7")
    points = {(made[x].beta, len(rows_of(made[x].data))): x for x in folders}
    assert points.keys() == {*((b, 8) for b in displacement.BETAS), (0.5, 2), (0.5, 4)}
    mean = expected_return(
        WORLD.graph[0], WORLD.log_ref, WORLD.field(lambda edge: edge.reward, 0.0)
    ).item()
    for (beta, n), folder in points.items():
        config = made[folder]
        assert rows_of(config.data) == rows[:n]
        assert rows_of(config.eval_data) == held_out
        assert (config.seed, config.model) == (7, start)
        assert config.learning_rate == pytest.approx(0.0004 * 0.5 / beta)
        chosen = after[folder]["after"]["eval_rewards/chosen"]
        value = beta * math.log(fmean(math.exp(x / beta) for x in own.tolist()))
        expected = {
            "chosen": chosen, "rejected": -3 * chosen, "mean": -chosen, "margin": 4 * chosen,
            "own_law": pytest.approx(mean - value, abs=1e-9),
        }  # fmt: skip
        if n == 8:
            assert found["betas"][displacement.beta_key(beta)] == expected
        if beta == 0.5:
            assert found["pairs"][str(n)] == expected
    assert list(found["pairs"]) == ["2", "4", "8"] and len(found["betas"]) == 6


def test_claim_own_returns_are_true_rewards_of_the_networks_own_lines(by_name, monkeypatch):
    """Three lines for the one post: two by writers, one cut; four words over the longest."""
    by_name(displacement)
    post, rng, asked = one_post.the_post(WORLD), random.Random(0), []
    lines = [WORLD.write(post, rng) for _ in range(3)]
    lines[1] = lines[1][:3]

    def sample(model, tokenizer, prompts, **how):
        asked.append((model, tokenizer, prompts, how))
        return [as_text(words) for words in lines]

    monkeypatch.setattr(displacement, "sample", sample)
    found = displacement.own_returns("ref", 2, n=3)
    assert found.tolist() == [WORLD.reward(post, as_words(as_text(words))) for words in lines]
    assert len(set(found.tolist())) > 1 and found.dtype == torch.float64
    how = {"max_new_tokens": 23, "seed": 2}
    tokenizer = "tokenizer of ref"
    assert asked == [(("ref", tokenizer), tokenizer, [one_post.PROMPT] * 3, how)]


def test_claim_a_seed_has_every_arm_and_the_sweep(monkeypatch):
    monkeypatch.setattr(displacement, "measure_arm", lambda *given: (given, "told" + given[0]))
    monkeypatch.setattr(displacement, "sweep", lambda seed: ("swept", seed))
    assert displacement.run_seed(3) == {
        "arms": {arm: (arm, 3) for arm in displacement.ARMS},
        "told": {arm: f"told{arm}" for arm in displacement.ARMS},
        "sweep": ("swept", 3),
    }


def test_claim_the_results_file_pairs_sft_with_no_sft_seed_by_seed(made, monkeypatch):
    """Three seeds of made-up ends: sft less posts, its median of pairwise means, and the law."""
    ends = {arm: 10.0 * i for i, arm in enumerate(displacement.ARMS, start=1)}

    def run_seed(seed):
        arms = {
            arm: {"end": {"chosen": end * seed, "rejected": -end, "margin": float(seed)}}
            for arm, end in ends.items()
        }
        curve = [dict.fromkeys(displacement.CURVES, float(seed)) | {"step": 4}]
        told = {arm: {"samples": (arm, seed), "curve": curve} for arm in ends}
        return {"arms": arms, "told": told, "sweep": {"betas": {"x": 2.0 * seed}}}

    monkeypatch.setattr(displacement, "run_seed", run_seed)
    found = displacement.run([1, 2, 6])
    apart = found["with_less_without_sft"]  # sft is 10 and posts 30, times the seed for chosen
    # chosen: -20, -40 and -120, with pairwise means -30, -70 and -80
    assert apart["chosen"]["estimate"] == -55.0
    assert apart["rejected"]["estimate"] == 20.0 and apart["margin"]["estimate"] == 0.0
    assert apart["chosen"]["p_value"] == pytest.approx(2 / 2**3)
    assert found["arms"]["posts"]["end"]["chosen"]["mean"] == 90.0
    assert found["sweep"]["betas"]["x"]["mean"] == 6.0
    assert list(found["law"]) == ["beta_0_1", "beta_0_25", "beta_0_5", "beta_1", "beta_2", "beta_4"]
    assert found["law"]["beta_2"] == law_at(2.0, *return_law(WORLD))
    assert found["writers_return"] == displacement.expected(*return_law(WORLD))
    assert (found["seeds"], found["beta"]) == ([1, 2, 6], 0.5)
    assert found["samples"] == {arm: (arm, 1) for arm in ends}
    for curve in found["curves"].values():
        assert curve["logps/chosen"] == {"mean": [3.0], "least": [1.0], "most": [6.0]}
