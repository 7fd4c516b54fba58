"""What a trained policy is measured by, on lines and models whose numbers are worked out anew."""

import random
from statistics import fmean, stdev

import pytest
import torch

from qlearn import recipes
from qlearn.exact.soft import soft_value_prior
from qlearn.findings.credit import Credit, agreement
from qlearn.findings.likelihood import log_ratio_and_kl
from qlearn.lm.logprobs import collate, completion_logps, sum_logps
from qlearn.lm.worlds import EOS, World, as_text
from qlearn.studies import slot_world
from qlearn.studies.displacement import return_law
from qlearn.studies.heat_maps import as_rows
from qlearn.studies.slot_world import by_kind, held_out, puzzle
from qlearn.train.dpo import DPOConfig

BETA = 0.5


def word_logps(model, row):
    """log π of each word of one row."""
    with torch.no_grad():
        return completion_logps(model, collate([row], model.device))[0][0]


def credits_by_hand(policy, reference, rows, beta):
    """The credit of each row from the two models' own log-probabilities."""
    found = []
    for row in rows:
        p, ref = word_logps(policy, row), word_logps(reference, row)
        found.append(Credit(p, ref, beta * (p - ref), (beta * (p - ref)).cumsum(0), -ref))
    return found


def test_claim_a_measure_is_of_the_policy_against_its_reference(model, other, tokenizer):
    """Agreement of β log π/π_ref, and KL(writers ‖ reference) as a mean over lines, in nats."""
    world = World()
    found = slot_world.measure(world, model, other, tokenizer, BETA, 6, 3)
    _, rows, truths = held_out(world, tokenizer, BETA, 6, 3)
    credits = credits_by_hand(model, other, rows, BETA)
    for key, x in agreement(credits, truths).items():
        assert found.pop(key) == pytest.approx(x, abs=1e-4)
    writers = torch.tensor([sum(token["logp_ref"] for token in truth) for truth in truths])
    gaps = writers - sum_logps(other, rows, 8)
    assert found.pop("kl_writers_to_reference") == pytest.approx(gaps.mean().item(), abs=1e-3)
    kinds = found.pop("by_kind")
    assert kinds.keys() == by_kind(credits, truths).keys() and not found
    for kind, x in by_kind(credits, truths).items():
        assert kinds[kind] == pytest.approx(x, abs=1e-4)


def test_claim_means_by_kind_are_of_the_words_of_that_kind():
    """Two lines, three kinds: means of both advantages, how many, and the kinds in order."""

    def said(*advantages):
        return Credit(*[torch.tensor(advantages)] * 5)

    def true(*pairs):
        return [{"kind": kind, "advantage": x} for kind, x in pairs]

    credits = [said(0.5, -1.0), said(1.5, -3.0, 0.25)]
    truths = [true(("right", 0.2), ("habit", -2.0)),
              true(("right", 0.4), ("habit", -1.0), ("free", 0.0))]  # fmt: skip
    found = by_kind(credits, truths)
    assert list(found) == ["free", "habit", "right"]
    assert found["free"] == {"found": 0.25, "exact": 0.0, "tokens": 1}
    assert found["habit"] == {"found": -2.0, "exact": -1.5, "tokens": 2}
    assert found["right"] == pytest.approx({"found": 1.0, "exact": 0.3, "tokens": 2})


def test_claim_rewards_are_means_over_posts_and_garbles_are_a_share(monkeypatch):
    """Three sampled lines, one of them no line; greedy ones are all readable."""
    world, asked = World(), []
    posts = world.posts(3, "held out 5")
    written = [world.write(post, random.Random(i)) for i, post in enumerate(posts)]
    garbled = written[0][:3]

    def sample(model, tokenizer, prompts, **how):
        asked.append((model, tokenizer, prompts, how))
        lines = written if how["greedy"] else [garbled, *written[1:]]
        return [as_text(words) for words in lines]

    monkeypatch.setattr(slot_world, "sample", sample)
    found = slot_world.rewards(world, "policy", "tokenizer", 3, 5)
    true = [world.reward(post, words) for post, words in zip(posts, written, strict=True)]
    assert len(set(true)) > 1 and true[0] != -2.0
    sampled = fmean([world.reward(posts[0], [*garbled, EOS]), *true[1:]])
    assert found == pytest.approx({
        "sampled": sampled, "sampled_unreadable": 1 / 3, "greedy": fmean(true),
        "greedy_unreadable": 0.0,
    })  # fmt: skip
    prompts = [post.prompt for post in posts]
    how = {"max_new_tokens": world.longest + 4, "seed": 5}
    assert asked == [("policy", "tokenizer", prompts, how | {"greedy": greedy})
                     for greedy in (False, True)]  # fmt: skip


def test_eq_16_the_mean_log_ratio_is_of_the_references_own_lines(
    model, other, tokenizer, monkeypatch
):
    """log π/π_ref of whole lines; its distance from −KL in standard errors of the difference."""
    world, asked = World(), []
    posts = world.posts(5, "own lines 7")
    lines = [world.write(post, random.Random(i)) for i, post in enumerate(posts)]

    def sample(writer, _, prompts, **how):
        asked.append((writer, prompts, how))
        return [as_text(words) for words in lines]

    monkeypatch.setattr(slot_world, "sample", sample)
    found = slot_world.mean_log_ratio(world, model, other, tokenizer, 5, 7)
    how = {"max_new_tokens": world.longest + 4, "seed": 7}
    assert asked == [(other, [post.prompt for post in posts], how)]
    rows = as_rows(tokenizer, list(zip(posts, lines, strict=True)))
    ratio = (sum_logps(model, rows, 8) - sum_logps(other, rows, 8)).tolist()
    kl = log_ratio_and_kl(model, other, rows)[1].tolist()
    apart = [r - k for r, k in zip(ratio, kl, strict=True)]
    assert found == pytest.approx({
        "mean_log_ratio": fmean(ratio), "minus_kl": fmean(kl),
        "standard_errors_apart": fmean(apart) / (stdev(apart) / 5**0.5),
    }, rel=1e-3)  # fmt: skip
    assert found["minus_kl"] < 0


def test_claim_the_puzzle_has_a_false_salary_and_a_false_day():
    """Chapter 09 asks the reader for the two; every other word is as good as another."""
    world = World()
    post, words = puzzle(world)
    told = world.explain(post, words, BETA)
    assert [row["word"] for row in told if row["wrong"]] == ["54k", "Monday"]
    assert all(row["advantage"] > -0.01 for row in told if not row["wrong"])
    assert "nurse" in post.prompt and "Delhi" in post.prompt and "52k" in post.prompt
    assert "Sunday" in post.prompt


def test_claim_the_puzzles_credit_is_by_word(model, other, tokenizer):
    post, words = puzzle(World())
    (credit,) = credits_by_hand(model, other, as_rows(tokenizer, [(post, words)]), BETA)
    by_word = dict(zip(words, credit.advantage.tolist(), strict=True))
    salary, day = by_word.pop("54k"), by_word.pop("Monday")
    found = slot_world.puzzle_credit(model, other, tokenizer, BETA)
    expected = {"54k": salary, "Monday": day, "others_lowest": min(by_word.values())}
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("data", ["slots", "trips"])
def test_claim_a_seed_compares_dpo_and_its_control_with_the_model_they_start_from(
    made, by_name, monkeypatch, data
):
    """Every collaborator says what it was given: which model against which, n, β and seed."""
    by_name(slot_world)
    monkeypatch.setattr(slot_world.runs, "summary", lambda folder: {"after": {"after": folder}})
    monkeypatch.setattr(slot_world, "rewards", lambda *given: given)
    monkeypatch.setattr(slot_world, "measure", lambda *given: {"measure": given})
    monkeypatch.setattr(slot_world, "mean_log_ratio", lambda *given: {"ratio": given})
    monkeypatch.setattr(slot_world, "puzzle_credit", lambda *given: given)
    found = slot_world.run_seed(4, data, n=9)
    (sft, start), (dpo, plain), (shuffled, control) = made.items()
    assert (start.seed, start.data, plain.seed, plain.data) == (4, data, 4, data)
    assert plain.model == control.model == sft
    assert (plain.shuffle_labels, control.shuffle_labels) == (False, True)
    world, tokenizer = World(data), f"tokenizer of {sft}"
    reference = (sft, tokenizer)
    expected = {"reference_rewards": (world, reference, tokenizer, 9, 4)}
    for name, folder in (("dpo", dpo), ("shuffled", shuffled)):
        policy = (folder, tokenizer)
        expected[name] = {
            "after": folder,
            "measure": (world, policy, reference, tokenizer, 0.5, 9, 4),
            "ratio": (world, policy, reference, tokenizer, 9, 4),
            "rewards": (world, policy, tokenizer, 9, 4),
        }
        if data == "slots":
            expected[name]["puzzle"] = (policy, reference, tokenizer, 0.5)
    assert found == expected


@pytest.mark.parametrize("data", ["slots", "trips"])
def test_reference_the_results_file_has_the_exact_values_of_its_world(made, monkeypatch, data):
    """Three numbers of the world from its law of returns, which knows no states."""
    asked = []

    def run_seed(seed, data):
        asked.append((seed, data))
        return {"x": {"y": float(seed)}, "text": "left out"}

    monkeypatch.setattr(slot_world, "run_seed", run_seed)
    found = slot_world.run([1, 2, 6], data)
    assert asked == [(seed, data) for seed in (1, 2, 6)]
    beta = recipes.read("tiny-dpo", DPOConfig)["beta"]
    returns, log_ref = return_law(World(data))
    tilted = (log_ref + returns / beta).softmax(0)
    assert found["exact"] == pytest.approx({
        "beta": beta,
        "value": soft_value_prior(returns, log_ref, beta).item(),
        "writers_reward": (log_ref.exp() * returns).sum().item(),
        "optimal_reward": (tilted * returns).sum().item(),
    }, abs=1e-9)  # fmt: skip
    assert found["seeds"] == [1, 2, 6] and [x["x"]["y"] for x in found["per_seed"]] == [1, 2, 6]
    assert found["mean"].keys() == {"x"} and found["mean"]["x"]["y"]["mean"] == 3.0


def test_reference_a_summary_has_students_interval():
    """Of 1, 2, 6: mean 3, standard error √7/√3, and t₂ at 97.5 % is 4.303 (any table)."""
    found = slot_world.summarise([{"x": {"y": x}} for x in (1.0, 2.0, 6.0)])["x"]["y"]
    half = 4.302653 * (7 / 3) ** 0.5
    assert found == pytest.approx(
        {"mean": 3.0, "low": 3 - half, "high": 3 + half, "least": 1.0, "most": 6.0}, abs=1e-5
    )
