"""DPO on language models: equality with TRL, step 0, learning, saving, the shuffled control."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlearn import losses
from qlearn.errors import InputError, RunStopped
from qlearn.lm.data import PREFERENCE_COLUMNS, encode
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.train import dpo, engine, sft
from qlearn.train.dpo import DPOConfig
from qlearn.train.sft import SFTConfig
from tests.families import FAMILIES, tiny_llama


def config(**changes):
    given = dict(
        model="tiny", data="slots", output_dir="unused", beta=0.3, per_device_train_batch_size=8,
        logging_steps=1, learning_rate=1e-3, warmup_steps=0,
    )  # fmt: skip
    return DPOConfig(**(given | changes))


@pytest.fixture
def pairs(tokenizer, preference_rows):
    return encode(list(enumerate(preference_rows, 1)), PREFERENCE_COLUMNS, tokenizer, 256)[0]


def test_reference_trl_loss_gradient_and_rewards(
    tokenizer, model, other, pairs, preference_rows, tmp_path
):
    """Equal to TRL's DPOTrainer to 1e-5: policy ≠ reference, completions of unequal lengths."""
    assert len({len(ids) for pair in pairs[:8] for ids in pair.completions}) > 2
    compare_with_trl(tokenizer, model, other, preference_rows[:8], tmp_path)


@pytest.mark.parametrize("family", ["llama", "llama3", "gpt2"])
def test_reference_trl_where_a_text_begins_with_a_begin_token(family, tmp_path):
    """As above with the tokenizer's own begin token, and without a padding token."""
    tokenizer, words = FAMILIES[family](), "a b c d e f g h".split()
    rows = [
        {"prompt": " ".join(words[i:] + words[:i]), "chosen": f" {words[i]} he is late!",
         "rejected": f" no {words[i - 1]}."}
        for i in range(8)
    ]  # fmt: skip
    models = [tiny_llama(tokenizer, seed) for seed in (1, 2)]
    if family == "llama":
        pairs, _ = encode(list(enumerate(rows, 1)), PREFERENCE_COLUMNS, tokenizer, 256)
        assert all(pair.prompt[0] == tokenizer.bos_token_id for pair in pairs)
    compare_with_trl(tokenizer, *models, rows, tmp_path)


def compare_with_trl(tokenizer, model, other, rows, tmp_path):
    """Loss, rewards and gradients on one batch of `rows`, each side from the text on."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    pairs, _ = encode(list(enumerate(rows, 1)), PREFERENCE_COLUMNS, tokenizer, 256)
    trainer = trl.DPOTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(other),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), beta=0.3, per_device_train_batch_size=8, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to=[], max_length=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    metrics = trainer._metrics["train"]

    ref_sums = dpo.reference_sums(other, pairs, config())
    out, chosen, rejected = dpo.pair_loss(model, pairs, ref_sums, beta=0.3)
    out.loss.mean().backward()
    ours = dpo.pair_metrics([(out, chosen.detach(), rejected.detach())])
    assert (out.loss - math.log(2)).abs().mean() > 0.01  # the comparison is not of ln 2
    assert out.loss.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
                "logps/rejected", "rewards/accuracies"):  # fmt: skip
        # Rewards are differences of sums of tens of nats: 1e-5 absolute is below 1e-6 of those.
        assert ours[key] == pytest.approx(metrics[key][-1], rel=1e-5, abs=1e-5), key
    for (name, p), q in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        scale = q.grad.abs().max()
        assert (p.grad - q.grad).abs().max() <= 1e-5 * scale + 1e-8, name


def test_claim_step_0_is_ln_2_with_zero_rewards(model, pairs):
    """Traps 13 and 21: bit-equal log-probabilities; a tie is not a win."""
    reference = copy.deepcopy(model)
    ref_sums = dpo.reference_sums(reference, pairs, config())
    history = dpo.train(model, pairs, ref_sums, config(max_steps=1), starts_at_reference=True)
    first = history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/margins"]) < 1e-5


def test_claim_stale_reference_sums_stop_the_run(model, other, pairs):
    """Sums of another model, said to be the policy's own, are caught before the first update."""
    before = copy.deepcopy(model.state_dict())
    stale = dpo.reference_sums(other, pairs, config())
    with pytest.raises(RunStopped, match="not ln 2"):
        dpo.train(model, pairs, stale, config(max_steps=2), starts_at_reference=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.01, 0.3, 20.0])
def test_claim_an_honest_step_0_passes_in_any_precision_and_at_any_beta(model, pairs, dtype, beta):
    """The bound grows with β and the sums: an absolute one stopped honest runs at large β."""
    settings = config(dtype=dtype, beta=beta, max_steps=1, per_device_train_batch_size=5)
    ref_sums = dpo.reference_sums(copy.deepcopy(model), pairs, settings)
    history = dpo.train(model, pairs, ref_sums, settings, starts_at_reference=True)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3 * beta)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.01, 0.3])
def test_bug_dropout_stops_a_run_at_step_0(model, pairs, dtype, beta):
    """At a rate of 0.1 no reward is far from 0; as a share of |log π| it is far from rounding."""
    settings = config(dtype=dtype, beta=beta, max_steps=1)
    ref_sums = dpo.reference_sums(copy.deepcopy(model), pairs, settings)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    model.train()
    with pytest.raises(RunStopped, match="where rounding explains"):
        dpo.train(model, pairs, ref_sums, settings, starts_at_reference=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bug_a_reference_one_update_old_stops_a_run_at_step_0(model, pairs, dtype):
    """One update at a learning rate of 1e-5 on other pairs."""
    settings = config(dtype=dtype, beta=0.1, max_steps=1, learning_rate=1e-5)
    stale = dpo.reference_sums(model, pairs, settings)
    dpo.train(model, pairs[32:], stale[32:], settings)
    with pytest.raises(RunStopped, match="stale reference sums"):
        dpo.train(model, pairs, stale, settings, starts_at_reference=True)


def test_bug_rewards_that_are_no_numbers_stop_a_run_at_step_0(pairs):
    """A comparison with NaN is false, so `> bound` would let it pass."""
    bad = torch.tensor([0.0, math.nan])
    out = losses.DPO(bad, bad, torch.zeros(2))
    with pytest.raises(RunStopped, match="add up to nan"):
        dpo.check_step_0(out, 1e-3)


def test_claim_sums_not_means(model, other, pairs):
    """Trap 11: the reward is β times the sum over tokens, so it grows with the response."""
    ref_sums = dpo.reference_sums(other, pairs[:4], config())
    out, chosen, _ = dpo.pair_loss(model, pairs[:4], ref_sums, beta=0.3)
    for i, pair in enumerate(pairs[:4]):
        ids = torch.tensor([pair.prompt + pair.completions[0]])
        logp = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        total = logp[len(pair.prompt) - 1 :].sum().item()
        assert chosen[i].item() == pytest.approx(total, rel=1e-4)
        reward = 0.3 * (total - ref_sums[i, 0].item())
        assert out.chosen_reward[i].item() == pytest.approx(reward, abs=1e-3)


def test_claim_accumulation_equals_one_large_batch(tokenizer, pairs):
    """Trap 17: 4 × 2 pairs and 1 × 8 pairs give the same steps."""
    per_split = []
    for size, parts in ((8, 1), (2, 4)):
        model = load_model("tiny", tokenizer, seed=3)
        settings = config(
            per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=4
        )
        ref_sums = dpo.reference_sums(model, pairs, settings)
        history = dpo.train(model, pairs, ref_sums, settings)
        per_split.append([record["loss"] for record in history])
    assert per_split[0] == pytest.approx(per_split[1], abs=1e-5)


def test_claim_training_learns_the_pairs_and_shuffling_flips_half(model, pairs):
    """The margin of the training pairs rises above 0; the reference does not move."""
    reference = copy.deepcopy(model)
    settings = config(num_train_epochs=4)
    ref_sums = dpo.reference_sums(reference, pairs, settings)
    dpo.train(model, pairs, ref_sums, settings)
    after = dpo.evaluate(model, pairs, ref_sums, settings)
    assert after["eval_loss"] < 0.6 and after["eval_rewards/accuracies"] > 0.7
    low, high = after["eval_rewards/accuracies_95"]
    assert 0.9 < low < after["eval_rewards/accuracies"] == high == 1.0
    rows = [(i, {"prompt": "p", "chosen": "c", "rejected": "r"}) for i in range(400)]
    swapped = sum(row["chosen"] == "r" for _, row in dpo.shuffled(rows, seed=0))
    assert 150 < swapped < 250 and dpo.shuffled(rows, 0) == dpo.shuffled(rows, 0)


def test_claim_both_recipes_run_end_to_end(tmp_path, write_jsonl, preference_rows, capsys):
    """SFT then DPO from files: outputs load in transformers, quarantine and summary are there."""
    first = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in preference_rows]
    broken = {"prompt": "x", "completion": None}
    supervised = write_jsonl("sft.jsonl", [*first, broken])
    preferences = write_jsonl("pairs.jsonl", preference_rows)
    a, b = tmp_path / "a", tmp_path / "b"
    sft.run(
        SFTConfig(model="tiny", tokenizer="slots", data=supervised, output_dir=str(a),
                  max_steps=3, max_quarantine=0.1, eval_data=preferences.replace("pairs", "sft"))
    )  # fmt: skip
    bad = [json.loads(line) for line in (a / "quarantine.jsonl").read_text().splitlines()]
    assert {(x["row"], x["reason"]) for x in bad} == {(65, "completion is missing or None")}
    summary = dpo.run(
        DPOConfig(model=str(a), data=preferences, output_dir=str(b), max_steps=3, logging_steps=1)
    )
    assert summary["first_logged"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    said = capsys.readouterr().out
    assert "all 6 held-out pairs tie (policy equals reference)" in said
    assert "accuracy 0.000" not in said.partition("before: ")[2].partition("\n")[0]
    assert summary["before"]["eval_rewards/ties"] == 1.0
    assert summary["before"]["eval_rewards/accuracies"] == 0.0
    assert json.loads((b / "summary.json").read_text())["after"]["eval_pairs"] == 6
    lines = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    names = {"loss", "learning_rate", "grad_norm", "num_tokens", "logps/chosen", "logps/rejected",
             "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
             "pairs_per_second"}  # fmt: skip
    assert names <= set(lines[0])
    assert AutoModelForCausalLM.from_pretrained(b).dtype == torch.float32


def test_claim_too_many_bad_rows_end_the_run(tmp_path, write_jsonl, preference_rows):
    rows = write_jsonl("pairs.jsonl", [*preference_rows, {"prompt": "x"}, {"prompt": "y"}])
    given = config(tokenizer="slots", data=rows, output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match="max-quarantine"):
        dpo.run(given)
    assert (tmp_path / "out" / "quarantine.jsonl").exists()


def test_claim_a_reference_with_another_tokenizer_is_refused(tmp_path):
    """As many rows, other words: compared by what they do."""
    trips = load_tokenizer("trips")
    load_model("tiny", trips).save_pretrained(tmp_path / "ref")
    trips.save_pretrained(tmp_path / "ref")
    given = config(reference=str(tmp_path / "ref"), output_dir=str(tmp_path / "out"), world_rows=8)
    with pytest.raises(InputError, match="tokenizer and the reference's are not the same: token"):
        dpo.run(given)


def test_claim_a_reference_with_a_padded_table_is_lawful(tmp_path, model, tokenizer, capsys):
    model.resize_token_embeddings(len(tokenizer) + 8)
    engine.save(model, tokenizer, str(tmp_path / "ref"), {})
    dpo.run(
        config(reference=str(tmp_path / "ref"), output_dir=str(tmp_path / "out"), world_rows=40,
               max_steps=1, max_quarantine=0.9)
    )  # fmt: skip
    assert "the policy has 224 rows for tokens and the reference 232" in capsys.readouterr().out


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_claim_beta_must_be_positive_and_finite(beta):
    with pytest.raises(InputError, match="beta must be positive and finite"):
        config(beta=beta)


def test_claim_the_world_is_drawn_from_the_reference(tmp_path):
    """`--data slots` needs no file: the model writes both lines of each pair, a judge labels."""
    summary = dpo.run(
        config(world_rows=40, max_steps=2, output_dir=str(tmp_path / "w"), max_quarantine=0.9)
    )
    assert summary["before"]["eval_pairs"] >= 1
