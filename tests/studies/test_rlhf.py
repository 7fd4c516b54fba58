"""The measurement of RLHF: its estimates against what is known exactly, its curves."""

import math
import random
from statistics import fmean, stdev

import pytest
import torch

from qlearn.exact.soft import soft_value_prior
from qlearn.lm.data import Example
from qlearn.lm.models import load_model
from qlearn.lm.worlds import World
from qlearn.studies import rlhf
from qlearn.studies.displacement import return_law
from qlearn.train.reward import RewardConfig
from qlearn.train.rollout import Rollout


def sampled(logp, log_ref, score, n, seed=0):
    """`n` one-token responses drawn from exp(logp)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(logp.exp(), n, replacement=True, generator=generator)
    mask = torch.ones(n, 1, dtype=torch.int64)
    examples = [Example(0, [1], ([int(a)],)) for a in y]
    return Rollout(examples, logp[y][:, None], log_ref[y][:, None], mask, score[y], y > 0)


def test_eq_06_both_estimates_of_the_ceiling_agree_with_it():
    """From π_ref's samples and, with less noise, from π's: β log E_ref exp(R/β). `eq-any-policy`"""
    generator = torch.Generator().manual_seed(1)
    score, log_ref, noise = torch.randn(3, 6, generator=generator)
    beta, log_ref = 0.5, log_ref.log_softmax(0)
    exact = (beta * torch.logsumexp(log_ref + score / beta, 0)).item()
    near = (log_ref + score / beta + 0.2 * noise).log_softmax(0)
    found = {}
    for name, logp in (("reference", log_ref), ("policy", near)):
        parts = [sampled(logp, log_ref, score, 2000, seed) for seed in (0, 1)]
        found[name] = rlhf.objective(parts, beta)
        ceiling = found[name]["ceiling"]
        assert abs(ceiling["value"] - exact) < 3 * ceiling["error"]
        exact_j = (logp.exp() * (score - beta * (logp - log_ref))).sum().item()
        assert abs(found[name]["J"] - exact_j) < 3 * found[name]["error"]
        assert found[name]["J"] < exact
        assert found[name]["J"] == pytest.approx(
            found[name]["score"] - beta * found[name]["kl"], abs=1e-5
        )
    assert found["policy"]["ceiling"]["error"] < found["reference"]["ceiling"]["error"] / 2
    assert found["reference"]["kl"] == 0
    share = torch.cat([~part.ended for part in parts]).float().mean().item()
    assert found["policy"]["missing_eos"] == pytest.approx(share)


def test_claim_returns_are_constant_at_the_optimum():
    """Hence the gradient's noise vanishes there: G is V for every response."""
    score, log_ref = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.2, 0.5, 0.3]).log()
    best = (log_ref + score / 0.5).log_softmax(0)
    found = rlhf.objective([sampled(best, log_ref, score, 500)], 0.5)
    assert found["spread"] < 1e-6 and found["J"] == pytest.approx(found["ceiling"]["value"])


def test_claim_curves_are_thinned_and_keep_the_end():
    def line(i, seed):
        return {"episode": i, "objective/rlhf_reward": i + seed, "objective/scores": 0.0,
                "objective/kl": 1.0}  # fmt: skip

    found = rlhf.curve([[line(i, seed) for i in range(1, 91)] for seed in (0, 2)])
    assert found["episode"] == list(range(3, 91, 3))
    assert found["J"]["mean"][-1] == 91 and found["J"]["least"][-1] == 90
    assert found["J"]["most"][0] == 5
    logged = [line(i, 0) for i in (10, 20, 30)]
    assert rlhf.episodes_to(logged, 15.0) == 20 and rlhf.episodes_to(logged, 99.0) == math.inf


def test_claim_responses_are_of_the_policy_to_held_out_posts(tmp_path, save_models, monkeypatch):
    """Five posts in parts of two: every prompt whole and in order, one response each, one draw."""
    save_models(tmp_path, policy=1, reference=2)
    monkeypatch.setattr(rlhf, "BATCH", 2)
    asked = []

    def respond(task, prompts, generator):
        asked.append((task, generator))
        return prompts

    monkeypatch.setattr(rlhf, "respond", respond)
    found = rlhf.responses(str(tmp_path / "policy"), str(tmp_path / "reference"), 5, 3)
    assert [len(part) for part in found] == [2, 2, 1]
    world = World()
    posts = world.posts(5, "rlhf held out 3")
    task, generator = asked[0]
    prompts = [example.prompt for part in found for example in part]
    assert prompts == [list(task.tokenizer(post.prompt).input_ids) for post in posts]
    assert all(x is generator for _, x in asked) and generator.initial_seed() == 3
    for seed, saved in ((1, task.policy), (2, task.reference)):
        weight = load_model("tiny", task.tokenizer, seed).get_output_embeddings().weight
        assert torch.equal(saved.get_output_embeddings().weight, weight)
    line = world.write(posts[4], random.Random(0))
    ids = task.tokenizer.convert_tokens_to_ids(line)
    assert task.judge([(prompts[4], ids)]).item() == pytest.approx(world.reward(posts[4], line))
    assert task.config.num_generations == 1 and task.config.missing_eos_penalty == 0
    assert rlhf.settings().num_generations == 4 and rlhf.settings().beta == task.config.beta


def test_reference_errors_are_standard_errors_of_the_mean():
    """Of J: s/√n. Of β log mean e^{G/β}: β s_w/(w̄ √n) with w = e^{G/β}, the delta method."""
    beta, logp, ref = 0.5, torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    score = torch.tensor([1.0, -0.5, 0.25])
    rollout = Rollout(
        [], logp[:, None], ref[:, None], None, score, torch.tensor([True, False, True])
    )
    found = rlhf.objective([rollout], beta)
    returns = [0.75, 0.0, 0.25]  # R − ½ (log π − log π_ref)
    weights = [math.exp(x / beta) for x in returns]
    error = beta * stdev(weights) / fmean(weights) / 3**0.5
    value = beta * math.log(fmean(weights))
    assert found.pop("ceiling") == pytest.approx({"value": value, "error": error})
    assert found == pytest.approx({
        "J": 1 / 3, "error": stdev(returns) / 3**0.5, "spread": stdev(returns), "score": 0.25,
        "kl": -0.5 / 3, "missing_eos": 1 / 3,
    })  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """`responses` says what it was asked for, and `objective` says that and β."""
    monkeypatch.setattr(rlhf, "responses", lambda *given: given)
    monkeypatch.setattr(rlhf, "objective", lambda seen, beta: {"seen": seen, "beta": beta})


def test_claim_a_fraction_is_the_share_of_the_way_from_the_reference(made, monkeypatch):
    """J from 0.2; a ceiling of the model's at 1.2; V* of the writers from the law of returns."""
    asked = {}

    def objective(seen, beta):
        asked[seen] = beta
        policy = seen[0].rsplit("/", 1)[-1].split("-")[0]
        j = 0.2 if policy == "sft" else 0.7
        return {"J": j, "ceiling": {"value": 1.2 if policy == "sft" else None}}

    monkeypatch.setattr(rlhf, "responses", lambda *given: given)
    monkeypatch.setattr(rlhf, "objective", objective)
    best = soft_value_prior(*return_law(World()), 0.5).item()
    nearly = 0.2 + 0.8 * (best - 0.2)
    logged = [{"episode": n, "objective/rlhf_reward": j}
              for n, j in ((10, nearly - 1e-3), (20, nearly + 1e-3), (30, nearly + 1))]  # fmt: skip
    monkeypatch.setattr(rlhf.runs, "history", lambda folder: logged)
    monkeypatch.setattr(rlhf.runs, "summary", lambda folder: {"cpu_seconds": folder})
    found = rlhf.run_seed(6, n_posts=5, world_rows=64)
    (sft, _), (ppo, ppo_config), (rloo, rloo_config) = made.items()
    assert asked == {(sft, sft, 10, 6): 0.5, (ppo, sft, 5, 6): 0.5, (rloo, sft, 5, 6): 0.5}
    assert (ppo_config.algorithm, rloo_config.algorithm) == ("ppo", "rloo")
    for config in (ppo_config, rloo_config):
        assert (config.seed, config.model, config.world_rows) == (6, sft, 64)
    assert found.pop("reference") == {"J": 0.2, "ceiling": {"value": 1.2}}
    for name, folder in (("ppo", ppo), ("rloo", rloo)):
        row = found.pop(name)
        assert row.pop("fraction") == pytest.approx(0.5 / (best - 0.2), abs=1e-9)
        assert row.pop("fraction_of_model") == pytest.approx(0.5)
        assert row == {
            "J": 0.7, "ceiling": {"value": None}, "episodes": 30, "episodes_to_80": 20.0,
            "cpu_seconds": folder, "history": logged,
        }  # fmt: skip
    assert not found


def test_claim_a_level_is_reached_where_it_is_met():
    logged = [{"episode": 7, "objective/rlhf_reward": 0.5}]
    assert rlhf.episodes_to(logged, 0.5) == 7 and rlhf.episodes_to(logged, 0.6) == math.inf


def test_claim_a_learned_reward_is_judged_by_the_true_one(made, measured, monkeypatch):
    """PPO on the seed's reward model, with a charge for no end; J is of the true reward."""
    monkeypatch.setattr(rlhf.runs, "summary", lambda folder: {
        when: {"eval_accuracy": (folder, when), "eval_objective/scores": (folder, when)}
        for when in ("before", "after")
    })  # fmt: skip
    found = rlhf.learned_reward(4, n_posts=5)
    (sft, _), (judge, judging), (ppo, config) = made.items()
    assert isinstance(judging, RewardConfig) and (judging.seed, judging.model) == (4, sft)
    assert (config.seed, config.model, config.reward) == (4, sft, judge)
    assert config.missing_eos_penalty == 1.0
    assert found == {
        "accuracy": (judge, "after"),
        "true": {"seen": (ppo, sft, 5, 4), "beta": 0.5},
        "learned_score_before": (ppo, "before"),
        "learned_score_after": (ppo, "after"),
    }


def test_claim_short_sight_is_ppo_with_a_lower_lambda(made, measured):
    found = rlhf.short_sight(4, n_posts=5)
    (sft, _), (ppo, config) = made.items()
    assert (config.lam, config.seed, config.model) == (0.95, 4, sft)
    assert config.reward == "world" and config.algorithm == "ppo"
    assert found == {"seen": (ppo, sft, 5, 4), "beta": 0.5}


def test_claim_a_race_has_means_over_seeds_and_curves_without_the_logs(made, monkeypatch):
    def run_seed(seed, **changes):
        row = {"J": float(seed), "history": [(seed, name) for name in changes]}
        return {"reference": {"J": 0.0}, "ppo": dict(row), "rloo": dict(row) | {"J": -1.0}}

    monkeypatch.setattr(rlhf, "run_seed", run_seed)
    monkeypatch.setattr(rlhf, "curve", lambda logged: logged)
    found = rlhf.race([1, 3], world_rows=64)
    histories = [[(1, "world_rows")], [(3, "world_rows")]]
    assert found["curves"] == {"ppo": histories, "rloo": histories}
    assert found["seeds"] == [1, 3]
    assert found["per_seed"] == [
        {"reference": {"J": 0.0}, "ppo": {"J": float(seed)}, "rloo": {"J": -1.0}} for seed in (1, 3)
    ]
    means = {name: x["J"]["mean"] for name, x in found["mean"].items()}
    assert means == {"reference": 0.0, "ppo": 2.0, "rloo": -1.0}
    value = soft_value_prior(*return_law(World()), 0.5).item()
    assert found["exact"] == pytest.approx({"beta": 0.5, "value": value}, abs=1e-9)


def test_claim_side_questions_are_asked_of_the_first_two_seeds(made, monkeypatch):
    monkeypatch.setattr(rlhf, "race", lambda seeds, **changes: {"raced": list(seeds)} | changes)
    monkeypatch.setattr(rlhf, "learned_reward", lambda seed: ("learned", seed))
    monkeypatch.setattr(rlhf, "short_sight", lambda seed: ("short", seed))
    assert rlhf.run(range(5, 9)) == {
        "raced": [5, 6, 7, 8],
        "learned_reward": {"5": ("learned", 5), "6": ("learned", 6)},
        "lam_95": {"5": ("short", 5), "6": ("short", 6)},
    }
    assert rlhf.run_first([5, 6]) == {"raced": [5, 6], "world_rows": 8192}
