"""What the loops log, evaluate and share out, each value from a second formula on small tables."""

import contextlib
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from qlearn import losses
from qlearn.lm.data import PREFERENCE_COLUMNS, SFT_COLUMNS, Example, as_pairs, encode
from qlearn.lm.grammar import EOS as EOS_WORD
from qlearn.train import dpo, engine, ppo, reward, rollout, sft, steps
from qlearn.train.engine import Log, Updates
from qlearn.train.masters import Masters
from qlearn.train.passes import passes
from qlearn.train.ppo import PPOConfig
from qlearn.train.rollout import Rollout, Task

EOS = 0
GIVEN = dict(
    model="tiny", data="slots", output_dir="unused", logging_steps=1, learning_rate=1e-3,
    warmup_steps=0,
)  # fmt: skip
LENGTHS = [2, 5, 3, 1]
EXAMPLES = [Example(i, [5, 6 + i, 7], ([8 + i, 9, 4, 3, EOS][:n],)) for i, n in enumerate(LENGTHS)]


class Reached(Exception):
    """Raised by a planted collaborator, where a test has seen enough."""


def sft_config(**changes):
    return sft.SFTConfig(**(GIVEN | changes))


def ppo_config(**changes):
    return PPOConfig(**(GIVEN | dict(beta=0.5, max_new_tokens=6) | changes))


@pytest.fixture
def pairs(tokenizer, preference_rows):
    rows = list(enumerate(preference_rows, 1))[:12]
    return encode(rows, PREFERENCE_COLUMNS, tokenizer, 256)[0]


def table_of(lengths: Sequence[int], seed: int) -> tuple[torch.Tensor, ...]:
    """(mask, logp, ref_logp) of responses of these lengths, 0 behind their ends."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    logps = -torch.rand(2, *mask.shape, generator=torch.Generator().manual_seed(seed)) - 0.1
    return mask, *(logps * mask)


def rollout_of(examples, lengths, seed=0) -> Rollout:
    mask, logp, ref_logp = table_of(lengths, seed)
    score = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed + 1))
    return Rollout(examples, logp, ref_logp, mask, score, torch.tensor(lengths) < 5)


def objectives(seen: Rollout, beta: float) -> list[dict[str, float]]:
    """The objective metrics of each response, from plain sums of Python numbers."""
    rows = []
    for length, logp, ref, score in zip(
        seen.mask.sum(1).tolist(), seen.logp.tolist(), seen.ref_logp.tolist(),
        seen.score.tolist(), strict=True,
    ):  # fmt: skip
        kl = math.fsum(p - q for p, q in zip(logp[:length], ref[:length], strict=True))
        rows.append(
            {"objective/kl": kl, "objective/entropy": -math.fsum(logp[:length]),
             "objective/non_score_reward": -beta * kl,
             "objective/rlhf_reward": score - beta * kl, "objective/scores": score}
        )  # fmt: skip
    return rows


# --- rollouts ----------------------------------------------------------------------------------


def test_claim_rollout_metrics_are_means_of_sums_over_a_response():
    """KL, entropy and price are sums over tokens and means over responses; entropy_avg a token's"""
    seen = rollout_of(EXAMPLES, LENGTHS)
    rows = objectives(seen, 0.3)
    expected = {key: fmean(row[key] for row in rows) for key in rows[0]}
    expected["val/num_eos_tokens"] = 3  # all but the one of five tokens
    expected["policy/entropy_avg"] = sum(r["objective/entropy"] for r in rows) / sum(LENGTHS)
    assert seen.metrics(0.3) == pytest.approx(expected, abs=1e-6)


def test_claim_evaluate_weighs_every_response_alike(monkeypatch):
    """Over shares of unequal size: plain means, J ± 1.96 s/√n, the share without an end."""
    found = []

    def respond(task, part, generator):
        assert task.config.num_generations == 1
        lengths = [1 + (7 * i + len(found)) % 5 for i in range(len(part))]
        found.append(rollout_of(list(part), lengths, seed=len(found)))
        return found[-1]

    monkeypatch.setattr(rollout, "respond", respond)
    task = Task(None, None, None, None, ppo_config(beta=0.3, algorithm="rloo"))
    result = rollout.evaluate(task, list(range(300)))
    rows = [row for seen in found for row in objectives(seen, 0.3)]
    assert len(rows) == 300 and len(found) > 1
    expected = {f"eval_{key}": fmean(row[key] for row in rows) for key in rows[0]}
    returns = [row["objective/rlhf_reward"] for row in rows]
    half = 1.96 * stdev(returns) / math.sqrt(300)
    assert result.pop("eval_objective/rlhf_reward_95") == pytest.approx(
        [fmean(returns) - half, fmean(returns) + half], abs=1e-5
    )
    expected["eval_missing_eos"] = sum(int((seen.mask.sum(1) == 5).sum()) for seen in found) / 300
    assert result == pytest.approx(expected | {"eval_rows": 300}, abs=1e-5)


def test_claim_shares_are_all_the_items_in_order():
    """The last share may be smaller, and no item is lost."""
    assert list(rollout.shares("abcde", 2)) == ["ab", "cd", "e"]
    assert list(rollout.shares("abcde", 5)) == ["abcde"]


def test_claim_the_world_reads_exactly_the_words_written(tokenizer):
    """An ended line is its words and the end; a cut one is all its words and no end."""
    world = SimpleNamespace(reward=lambda post, words: float(told.append((post, words)) or 0))
    told, post = [], SimpleNamespace(prompt="I am a chef in Rome.")
    prompt = rollout.encode_prompts(tokenizer, [post.prompt])[0]
    words = [tokenizer.decode([i]).strip() for i in (5, 6, 7)]
    rollout.world_judge(world, [post], tokenizer)([(prompt, [5, 6, 7, EOS]), (prompt, [5, 6, 7])])
    assert told == [(post, [*words, EOS_WORD]), (post, words)]


# --- one step of reinforcement learning --------------------------------------------------------


def test_claim_the_schedule_counts_every_update():
    """5 steps of 3 passes with 4 updates each are 60."""
    given = ppo_config(num_ppo_epochs=3, num_mini_batches=4)
    assert steps.n_updates(SimpleNamespace(n_steps=5), given) == 60


def test_eq_ppo_surrogate_of_ratios_by_hand():
    """ρ of ½, 1, 1.1 and 2 at ε = 0.2, gains and losses: the loss, and what was clipped."""
    ratio, gain = [0.5, 0.5, 1.0, 1.1, 2.0, 2.0], [1.0, -1.0, 2.0, -3.0, 1.0, -1.0]
    held = [0.8, 0.8, 1.0, 1.1, 1.2, 1.2]
    old = torch.tensor([-1.0, -2.0, -0.5, -0.7, -3.0, -2.5])
    terms = steps.surrogate(old + torch.tensor(ratio).log(), old, torch.tensor(gain), 0.2)
    loss = [-min(r * a, h * a) for r, a, h in zip(ratio, gain, held, strict=True)]
    expected = {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": [math.log(r) ** 2 / 2 for r in ratio],
        "policy/clipfrac_avg": [0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
        "val/ratio": ratio,
        "val/ratio_var": [(r - 1) ** 2 for r in ratio],
    }
    assert terms.keys() == expected.keys()
    for key in expected.keys() - {"policy/clipfrac_avg"}:
        assert terms[key].tolist() == pytest.approx(expected[key], abs=1e-5)
    clear = [0, 1, 4, 5]  # elsewhere the two sides are equal but for rounding
    assert terms["policy/clipfrac_avg"][clear].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_claim_learn_takes_the_mean_over_the_actions_of_its_responses(model, monkeypatch):
    """Responses one at a time, in tables no wider than their own: Σ over tokens / their number."""
    seen = rollout_of(EXAMPLES, LENGTHS)
    weight = torch.tensor(1.0, requires_grad=True)
    numbers, told = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) + 1, []

    def terms(batch, part):
        width = max(LENGTHS[i] for i in part)
        return {"loss": weight * numbers[part, :width], "extra": 2 * numbers[part, :width]}

    updates = SimpleNamespace(step=lambda loss, rows: told.append((loss, rows)) or {"loss": 7.0})
    task = Task(model, None, None, None, ppo_config(per_device_train_batch_size=1))
    done = steps.learn(task, updates, seen, seen.mask, [3, 0, 2], terms)
    mean = fmean(numbers[i, t].item() for i in (3, 0, 2) for t in range(LENGTHS[i]))
    assert done == {"loss": 7.0, "extra": pytest.approx(2 * mean)}
    assert told[0][0].item() == pytest.approx(mean) == weight.grad.item()
    assert told[0][1] == [3, 0, 2]


def test_claim_report_is_the_mean_of_the_updates_made(monkeypatch):
    """Skipped updates are left out; eps is responses so far by seconds so far."""
    seen, told = rollout_of(EXAMPLES, LENGTHS), []
    log = SimpleNamespace(rows=6, started=10.0, update=lambda *a, **k: told.append((a, k)))
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: 14.0))
    done = [{"loss": 1.0, "learning_rate": 0.5}, None, {"loss": 4.0, "learning_rate": 0.25}]
    steps.report(log, done, seen, ppo_config(beta=0.3))
    means = {"loss": 2.5, "learning_rate": 0.375, "lr": 0.375}
    assert told[0] == ((means | seen.metrics(0.3), 4), {"episode": 10, "eps": 2.5})
    steps.report(log, [None], seen, ppo_config())
    assert told[1] == ((None, 4), {"episode": 10, "eps": 2.5})


def random_head(model, seed=0) -> nn.Linear:
    head = ppo.value_head(model)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(seed))
    return head


def plain_values(model, head, example) -> list[float]:
    """V of the states before each token of one response, the slow way."""
    ids = example.prompt + example.completions[0]
    with torch.no_grad():
        states = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        return head(states)[len(example.prompt) - 1 : -1, 0].tolist()


def test_claim_values_are_the_heads_numbers_before_each_token(model):
    """Read in batches of two, one state before each token, 0 behind a response's end."""
    head = random_head(model)
    task = Task(model, None, None, None, ppo_config(per_device_train_batch_size=2))
    found = ppo.values(task, head, rollout_of(EXAMPLES, LENGTHS))
    for row, example in zip(found.tolist(), EXAMPLES, strict=True):
        n = len(example.completions[0])
        assert row[:n] == pytest.approx(plain_values(model, head, example), abs=1e-4)
        assert not any(row[n:])


def test_eq_value_loss_of_every_token_by_hand(model):
    """½ max((V − G)², (V_c − G)²), the weighted sum with the policy's, and where the clip tells."""
    head, seen, ids = random_head(model), rollout_of(EXAMPLES, LENGTHS), [2, 0]  # narrower
    task = Task(model, None, None, None, ppo_config(vf_coef=0.7, cliprange_value=0.2))
    old, advantage, target = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(5))
    for i in range(4):
        value = torch.tensor(plain_values(model, head, EXAMPLES[i]))
        old[i, : len(value)] = value - torch.tensor([0.5, -0.5, 0.1, 0.6, 0.3])[: len(value)]
    target = old + torch.tensor([3.0, 3.0, -2.0, 1.0, 1.0])
    batch = rollout.collate(as_pairs([EXAMPLES[i] for i in ids]))
    terms = ppo.token_terms(task, head, seen, old, advantage, target, batch, ids)
    assert terms["loss"].shape == (2, 3)
    fractions = []
    for k, i in enumerate(ids):
        for t, v in enumerate(plain_values(model, head, EXAMPLES[i])):
            o, g = old[i, t].item(), target[i, t].item()
            near = o + max(-0.2, min(0.2, v - o))
            loss = max((v - g) ** 2, (near - g) ** 2) / 2
            policy = terms["loss/policy_avg"][k, t].item()
            assert terms["loss/value_avg"][k, t].item() == pytest.approx(loss, abs=1e-3)
            assert terms["loss"][k, t].item() == pytest.approx(policy + 0.7 * loss, abs=1e-3)
            if abs(v - o) > 0.2:  # inside the clip the two are equal but for rounding
                fractions.append((near - g) ** 2 > (v - g) ** 2)
                assert terms["val/clipfrac_avg"][k, t].item() == fractions[-1]
    assert True in fractions and False in fractions


def test_claim_a_value_that_has_not_moved_is_not_clipped(model):
    """Two equal losses are no clipping: the fraction is exactly 0."""
    head, seen, ids = random_head(model), rollout_of(EXAMPLES, LENGTHS), [0, 1, 2, 3]
    task = Task(model, None, None, None, ppo_config())
    batch = rollout.collate(as_pairs(EXAMPLES))
    with torch.no_grad():
        value = ppo.read(model, head, batch)[1]
        terms = ppo.token_terms(task, head, seen, value, value, value + 1, batch, ids)
    assert not terms["val/clipfrac_avg"].any()


@pytest.mark.parametrize("whiten", [True, False])
def test_claim_advantages_are_whitened_where_asked(model, other, tokenizer, monkeypatch, whiten):
    """The loss sees GAE's advantages, with mean 0 and variance 1 only by whiten_advantages."""

    def stop(task, seen, terms):
        raise Reached(seen, *terms.args[3:5])

    monkeypatch.setattr(ppo, "check_step_0", stop)
    task = Task(
        model, other, tokenizer, lambda rows: torch.arange(float(len(rows))),
        ppo_config(whiten_advantages=whiten, per_device_train_batch_size=4),
    )  # fmt: skip
    with pytest.raises(Reached) as caught:
        ppo.train_ppo(task, [replace(x, completions=()) for x in EXAMPLES])
    seen, value, advantage = caught.value.args
    expected = losses.gae(seen.rewards(0.5), value, seen.mask, gamma=1.0, lam=0.95)[0]
    if whiten:
        mean = (expected * seen.mask).sum() / seen.mask.sum()
        assert (advantage * seen.mask).sum() / seen.mask.sum() == pytest.approx(0, abs=1e-5)
        assert mean.abs() > 0.1
    else:
        assert torch.equal(advantage, expected)


def test_claim_the_summary_has_the_seconds_of_training_alone(tmp_path, monkeypatch):
    """From before the training to after it, neither evaluation with it."""
    monkeypatch.setattr(ppo, "evaluate", lambda task, prompts: {})
    monkeypatch.setattr(ppo, "_sentence", lambda metrics: "")
    monkeypatch.setattr(ppo, "train_ppo", lambda *_: [{"step": 1}])
    clock = iter([10.0, 13.5])
    monkeypatch.setattr(ppo, "time", SimpleNamespace(process_time=lambda: next(clock)))
    summary = ppo.run(ppo_config(output_dir=str(tmp_path), world_rows=20))
    assert summary == {
        "before": {}, "after": {}, "first_logged": {"step": 1}, "cpu_seconds": 3.5,
    }  # fmt: skip


def test_claim_a_prompt_of_one_token_is_room_enough(model):
    """A context of 256 less 255 new tokens leaves one for the prompt."""
    assert ppo.room(model, ppo_config(max_new_tokens=255)) == 2


# --- fine-tuning, preferences, rewards ---------------------------------------------------------


def plain_sum(model, prompt, ids) -> float:
    """log π of a completion, the slow way."""
    with torch.no_grad():
        logp = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return sum(logp[len(prompt) - 1 + t, i].item() for t, i in enumerate(ids))


def test_eq_sft_evaluate_is_a_mean_over_tokens_and_over_responses(model):
    sums = [plain_sum(model, x.prompt, x.completions[0]) for x in EXAMPLES]
    assert sft.evaluate(model, EXAMPLES, batch_size=3) == {
        "eval_loss": pytest.approx(-sum(sums) / sum(LENGTHS), abs=1e-4),
        "eval_nll_per_response": pytest.approx(-sum(sums) / 4, abs=1e-4),
        "eval_rows": 4,
    }


def test_claim_sft_loss_is_the_mean_over_the_tokens_of_an_update(model):
    """Responses of 1 to 5 tokens in passes of one: each token weighs the same."""
    sums = [plain_sum(model, x.prompt, x.completions[0]) for x in EXAMPLES]
    settings = sft_config(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1)
    record = sft.train(model, EXAMPLES, settings)[0]
    assert record["loss"] == pytest.approx(-sum(sums) / sum(LENGTHS), abs=1e-4)
    assert record["num_tokens"] == sum(len(x.prompt) for x in EXAMPLES) + sum(LENGTHS)


def test_claim_num_tokens_counts_a_prompt_with_each_completion(model, tokenizer, pairs):
    """Both loops on pairs: every token that went through the model, over two updates."""
    count = sum(len(x.prompt) + len(ids) for x in pairs[:8] for ids in x.completions)
    given = GIVEN | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    settings = dpo.DPOConfig(**given)
    history = dpo.train(model, pairs[:8], dpo.reference_sums(model, pairs[:8], settings), settings)
    assert history[-1]["num_tokens"] == count and len(history) == 2
    judge = reward.with_head(model, tokenizer)
    history = reward.train(judge, pairs[:8], reward.RewardConfig(**given))
    assert history[-1]["num_tokens"] == count and len(history) == 2


def test_claim_a_reference_pass_has_as_many_rows_as_a_training_pass(model, pairs, monkeypatch):
    """Training reads both completions of 3 pairs at once; so the reference reads 6 rows."""
    sizes = []
    monkeypatch.setattr(
        dpo, "sum_logps", lambda m, rows, n: sizes.append(n) or torch.zeros(len(rows))
    )
    settings = dpo.DPOConfig(**GIVEN | dict(per_device_train_batch_size=3))
    assert dpo.reference_sums(model, pairs, settings).shape == (12, 2)
    assert sizes == [6, 6]


def test_claim_evaluate_counts_the_wins_of_dpo(model, other, pairs):
    """The interval is that of the counted wins, neither of all pairs nor of none."""
    settings = dpo.DPOConfig(**GIVEN)
    ref = dpo.reference_sums(other, pairs, settings)
    gain = (dpo.reference_sums(model, pairs, settings) - ref).tolist()
    wins = sum(chosen > rejected for chosen, rejected in gain)
    result = dpo.evaluate(model, pairs, ref, settings)
    assert 0 < wins < 12 and result["eval_rewards/accuracies"] == pytest.approx(wins / 12)
    assert result["eval_rewards/accuracies_95"] == engine.wilson(wins, 12)


def test_claim_a_tie_of_scores_is_not_a_win(model, tokenizer, pairs):
    """A head of zeros: every pair ties, so 0 of 12 are won."""
    result = reward.evaluate(reward.with_head(model, tokenizer), pairs)
    assert result["eval_accuracy"] == 0.0 and result["eval_ties"] == 1.0
    assert result["eval_accuracy_95"] == engine.wilson(0, 12)


def test_claim_labels_are_swapped_below_one_half(monkeypatch):
    """A coin of ½ or more leaves a row as it is, and what is no dict is passed on to quarantine."""
    coins = iter([0.25, 0.5, 0.75, 0.25])
    coin = SimpleNamespace(random=lambda: next(coins))
    monkeypatch.setattr(dpo, "random", SimpleNamespace(Random=lambda seed: coin))
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    other_way = {"prompt": "p", "chosen": "r", "rejected": "c"}
    found = dpo.shuffled([(1, row), (2, row), (3, row), (4, "no dict")], 0)
    assert found == [(1, other_way), (2, row), (3, row), (4, "no dict")]


@pytest.mark.parametrize("module", [sft, dpo, reward], ids=lambda m: m.__name__.split(".")[-1])
def test_claim_a_foreign_tokenizer_is_looked_at_and_the_models_own_is_not(
    module, tmp_path, monkeypatch
):
    """The note on a model that is surprised by the ids is for a tokenizer that the user named."""

    def stop(word):
        def stopped(*_, **__):
            raise Reached(word)

        return stopped

    kind = {sft: sft.SFTConfig, dpo: dpo.DPOConfig, reward: reward.RewardConfig}[module]
    monkeypatch.setattr(module, "note_if_surprised", stop("noted"))
    monkeypatch.setattr(module, "evaluate", stop("not noted"))
    for name, word in (("slots", "noted"), (None, "not noted")):
        given = GIVEN | dict(
            output_dir=str(tmp_path / word), world_rows=20, tokenizer=name, max_quarantine=0.5
        )  # fmt: skip
        with pytest.raises(Reached, match=f"^{word}$"):
            module.run(kind(**given))


# --- the engine --------------------------------------------------------------------------------


def test_claim_updates_are_counted_by_hand():
    """25 rows in updates of 3 × 4 are 3 an epoch; max_steps is the last word."""
    given = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert engine.n_updates(25, sft_config(**given)) == 3
    assert engine.n_updates(24, sft_config(num_train_epochs=2, **given)) == 4
    assert engine.n_updates(25, sft_config(max_steps=7, **given)) == 7
    assert len(list(engine.plan(24, sft_config(num_train_epochs=2, **given)))) == 4


def test_claim_the_log_averages_since_its_last_line(tmp_path, monkeypatch):
    """Two updates a line, the last line by itself; speed is rows by seconds since the last line."""
    clock = iter([100.0, 104.0, 106.0])
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    path = tmp_path / "metrics.jsonl"
    with Log("t", 3, 2, str(path), "rows") as log:
        log.update({"loss": 1.0}, 4, n=4)
        assert not log.history
        log.update({"loss": 2.0}, 8, n=12)
        assert len(path.read_text().splitlines()) == 1  # a run that dies later has left it
        log.update({"loss": 5.0}, 6, n=18)
    assert log.history == [
        {"step": 2, "n": 12, "loss": 1.5, "seconds": 4.0, "rows_per_second": 3.0},
        {"step": 3, "n": 18, "loss": 5.0, "seconds": 6.0, "rows_per_second": 3.0},
    ]


def test_claim_any_row_may_be_held_out_and_the_order_is_kept():
    """Both parts are in the order of the rows; the last row, too, can be held out."""
    rows = random.Random(0).sample(range(5000), 1000)
    train, held_out = engine.split_rows(rows, 0.3, seed=1)
    assert len(held_out) == 300 and sorted(train + held_out) == sorted(rows)
    for part in (train, held_out):
        places = [rows.index(x) for x in part]
        assert places == sorted(places)
    assert {engine.split_rows("abc", 0.34, seed)[1][0] for seed in range(40)} == set("abc")


def test_claim_a_typed_begin_token_is_noted_only_where_there_is_one(
    tokenizer, tmp_path, monkeypatch, capsys
):
    """No row begins so: no note. Two rows do: a note with their number."""
    rows = [(1, {"prompt": "I am a chef in Rome.", "completion": " I am a chef."})]
    settings = sft_config(output_dir=str(tmp_path))
    engine.usable(rows, SFT_COLUMNS, tokenizer, settings, 256, "rows")
    assert "note:" not in capsys.readouterr().out
    monkeypatch.setattr(engine, "begins_typed", lambda examples: [1, 2])
    engine.usable(rows, SFT_COLUMNS, tokenizer, settings, 256, "rows")
    assert "note: 2 prompts of rows" in capsys.readouterr().out


def test_claim_a_row_may_be_as_long_as_the_context(model):
    """256 of 256 is allowed."""
    assert engine.context_length(model, sft_config(max_length=256)) == 256


def test_claim_float32_runs_plain_and_bfloat16_by_autocast():
    """The context sets the type of a matrix product, or leaves it."""
    a, cpu = torch.ones(2, 2), torch.device("cpu")
    assert isinstance(engine.precision(cpu, torch.float32), contextlib.nullcontext)
    for dtype in (torch.float32, torch.bfloat16):
        with engine.precision(cpu, dtype):
            assert (a @ a).dtype == dtype


def test_claim_emulated_bfloat16_is_none(monkeypatch):
    """A GPU that only emulates bfloat16 would be slower by it; auto takes float32 there."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert engine.choose_dtype("auto", torch.device("cuda")) == torch.float32


def test_claim_adamw_is_fused_and_without_decay(model):
    """One kernel for all tables, and nothing pulls the weights to 0."""
    settings = sft_config(learning_rate=0.5)
    with Log("t", 3, 1, None, "rows") as log:
        told = Updates(model, settings, 3, log).optimiser.defaults
    assert (told["fused"], told["weight_decay"], told["lr"]) == (True, 0.0, 0.5)


def test_claim_the_settings_are_written_in_their_order(tmp_path):
    """qlearn.yaml begins with what a reader looks for, the model and the data."""
    settings = sft_config(output_dir=str(tmp_path))
    engine.open_output(settings)
    written = yaml.safe_load((tmp_path / "qlearn.yaml").read_text())
    assert written == vars(settings)
    assert list(written) == list(vars(settings)) != sorted(written)


# --- passes and masters ------------------------------------------------------------------------


def test_claim_a_pass_may_fill_its_budget():
    """Two rows padded to 9 are 18 of 18; and the rows behind a long one share its budget of 10."""
    assert passes([3, 9, 4, 8], budget=18) == [[1, 3], [2, 0]]
    assert passes([10, 5, 1, 1, 1], budget=10) == [[0], [1, 2], [3, 4]]


def test_claim_publish_rounds_the_masters_into_the_model(model):
    """Every trained weight of the model is its master, rounded to bfloat16."""
    masters = Masters(model)
    with torch.no_grad():
        for master in masters.parameters:
            master.add_(1.0)
    masters.publish()
    weights = [p for p in model.parameters() if p.requires_grad]
    assert len(weights) == len(masters.parameters) > 0
    for weight, master in zip(weights, masters.parameters, strict=True):
        assert torch.equal(weight, master.to(torch.bfloat16))
