"""The reward model: where the score is read, what transformers and TRL make of it, learning."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from qlearn.errors import InputError
from qlearn.lm.data import PREFERENCE_COLUMNS, as_pairs, encode
from qlearn.lm.logprobs import collate
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.train import engine, reward
from qlearn.train.reward import RewardConfig


def config(**changes):
    given = dict(
        model="tiny", data="slots", output_dir="unused", per_device_train_batch_size=8,
        logging_steps=1, learning_rate=1e-3, warmup_steps=0,
    )  # fmt: skip
    return RewardConfig(**(given | changes))


@pytest.fixture
def pairs(tokenizer, preference_rows):
    return encode(list(enumerate(preference_rows, 1)), PREFERENCE_COLUMNS, tokenizer, 256)[0]


@pytest.fixture
def judge(model, tokenizer):
    """A reward model whose head is not 0."""
    found = reward.with_head(model, tokenizer)
    torch.nn.init.normal_(found.score.weight, generator=torch.Generator().manual_seed(0))
    return found


def padded(rows, pad):
    """Rows as one table, padded on the right as transformers' tokenizers do."""
    width = max(len(p) + len(c) for p, c in rows)
    return torch.tensor([p + c + [pad] * (width - len(p) - len(c)) for p, c in rows])


def test_reference_transformers_gives_the_same_scores(judge, tokenizer, pairs, tmp_path):
    """Saved, loaded by AutoModelForSequenceClassification and padded by it: equal to 1e-5."""
    engine.save(judge, tokenizer, str(tmp_path), {})
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again = reward.load_reward_model(str(tmp_path), tokenizer)
    rows = as_pairs(pairs, 0)
    assert len({len(p) + len(c) for p, c in rows}) > 3
    with torch.no_grad():
        expected = theirs(padded(rows, tokenizer.pad_token_id)).logits[:, 0]
    ours = reward.scores(judge, rows, batch_size=7)
    assert expected.std() > 0.1  # the comparison is not one of zeros
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.equal(ours, reward.scores(again, rows, batch_size=7))
    assert theirs.config.pad_token_id != theirs.config.eos_token_id


def test_claim_the_score_is_read_at_the_end_of_text(judge, tokenizer, pairs):
    """Trap 24: with pad = eos transformers would read the token before; lengths do not."""
    row = as_pairs(pairs)[0]
    ids = torch.tensor([row[0] + row[1]])
    with torch.no_grad():
        hidden = judge.base_model(ids).last_hidden_state[0]
        numbers = judge.score(hidden)[:, 0]
    assert row[1][-1] == tokenizer.eos_token_id
    for eos_is_pad in (False, True):
        judge.config.pad_token_id = tokenizer.eos_token_id if eos_is_pad else 1
        with torch.no_grad():
            theirs = judge(ids).logits[0, 0]
        assert reward.scores(judge, [row])[0].item() == pytest.approx(numbers[-1].item(), abs=1e-5)
        assert theirs.item() == pytest.approx(numbers[-1 - eos_is_pad].item(), abs=1e-5)


def test_claim_a_cut_response_is_scored_at_its_last_token(judge, pairs):
    prompt, completion = as_pairs(pairs)[0]
    with torch.no_grad():
        numbers = judge.score(judge.base_model(torch.tensor([prompt + completion[:5]]))[0])[0, :, 0]
    longer = as_pairs(pairs)[1]
    found = reward.scores(judge, [(prompt, completion[:5]), longer])
    assert found[0].item() == pytest.approx(numbers[-1].item(), abs=1e-5)


def test_claim_prefix_scores_are_the_scores_of_prefixes(judge, pairs):
    """Number t is the score of the first t tokens alone; the differences add up to the score."""
    rows = as_pairs(pairs)[:5]
    for (prompt, completion), found in zip(rows, reward.prefix_scores(judge, rows, 2), strict=True):
        assert found.shape == (len(completion) + 1,)
        cut = [(prompt[:-1], [prompt[-1], *completion[:t]]) for t in range(len(completion) + 1)]
        assert torch.allclose(found, reward.scores(judge, cut), atol=1e-4)
        assert (found[0] + found.diff().sum()).item() == pytest.approx(found[-1].item(), abs=1e-4)


def test_claim_step_0_is_ln_2(model, tokenizer, pairs):
    """The head starts at 0, whatever the seed, and leaves the body as it was."""
    judge = reward.with_head(model, tokenizer)
    body = copy.deepcopy(model.base_model.state_dict())
    history = reward.train(judge, pairs, config(max_steps=1))
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert history[0]["accuracy"] == 0 and history[0]["max_reward"] == 0
    assert all(torch.equal(x, model.base_model.state_dict()[key]) for key, x in body.items())


def test_reference_trl_loss_and_metrics(judge, tokenizer, pairs, preference_rows, tmp_path):
    """Equal to TRL's RewardTrainer on the same rows: loss to 1e-5, and its metrics."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = [
        {key: text + tokenizer.eos_token if key != "prompt" else text for key, text in row.items()}
        for row in preference_rows[:8]
    ]
    trainer = trl.RewardTrainer(
        copy.deepcopy(judge),
        args=trl.RewardConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to=[], max_length=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.train()  # where it collects metrics
    theirs = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    found = reward.evaluate(judge, pairs[:8])
    assert abs(found["eval_loss"] - math.log(2)) > 1e-3
    assert found["eval_loss"] == pytest.approx(theirs.item(), rel=1e-5)
    for key in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        expected = trainer._metrics["train"][key][-1]
        assert found[f"eval_{key}"] == pytest.approx(expected, abs=1e-5), key


def test_claim_training_learns_the_pairs(model, tokenizer, pairs):
    judge = reward.with_head(model, tokenizer)
    reward.train(judge, pairs[:32], config(num_train_epochs=8, learning_rate=3e-3))
    after = reward.evaluate(judge, pairs[:32])
    low, high = after["eval_accuracy_95"]
    assert after["eval_loss"] < 0.4 and 0.7 < low < after["eval_accuracy"] <= high
    assert after["eval_pairs"] == 32


def test_claim_accumulation_equals_one_large_batch(model, tokenizer, pairs):
    """Trap 17: 4 × 2 pairs and 1 × 8 pairs give the same steps."""
    losses = []
    for size, parts in ((8, 1), (2, 4)):
        settings = config(
            per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=4
        )
        history = reward.train(reward.with_head(model, tokenizer), pairs, settings)
        losses.append([record["loss"] for record in history])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_claim_the_recipe_runs_end_to_end(tmp_path, write_jsonl, preference_rows, capsys):
    """From a file: the output loads, metrics have TRL's names, the same seed gives the same."""
    data = write_jsonl("pairs.jsonl", preference_rows)
    runs = []
    for name in ("a", "b"):
        folder = tmp_path / name
        given = config(tokenizer="slots", data=data, output_dir=str(folder), max_steps=3)
        summary = reward.run(given)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        timing = engine.TIMING_KEYS
        runs.append([{k: v for k, v in x.items() if k not in timing} for x in lines])
    assert runs[0] == runs[1] and [x["step"] for x in lines] == [1, 2, 3]
    names = {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens"}
    assert names <= set(lines[0])
    assert summary["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    said = capsys.readouterr().out
    assert "all 6 held-out pairs tie (every score is the same)" in said
    assert summary["before"]["eval_ties"] == 1.0
    loaded = reward.load_reward_model(str(folder), load_tokenizer(str(folder)))
    assert loaded.dtype == torch.float32 and summary["after"]["eval_pairs"] == 6


def test_claim_the_world_is_drawn_from_the_model(tmp_path):
    """`--data slots` needs no file: the model writes both lines, a true judge labels them."""
    summary = reward.run(
        config(world_rows=40, max_steps=2, output_dir=str(tmp_path / "w"), max_quarantine=0.9)
    )
    assert summary["before"]["eval_pairs"] >= 1


def test_claim_a_language_model_is_no_reward_model(model, tokenizer, tmp_path):
    """transformers would give it a random head and only warn."""
    engine.save(model, tokenizer, str(tmp_path), {})
    with pytest.raises(InputError, match="holds no reward model"):
        reward.load_reward_model(str(tmp_path), tokenizer)
    with pytest.raises(InputError, match="There is no reward model"):
        reward.load_reward_model(str(tmp_path / "nowhere"), tokenizer)


def test_claim_another_tokenizer_is_refused(tmp_path):
    """The ids that a policy writes would mean other words to the reward model."""
    trips = load_tokenizer("trips")
    engine.save(reward.with_head(load_model("tiny", trips), trips), trips, str(tmp_path), {})
    with pytest.raises(InputError, match="are not the same"):
        reward.load_reward_model(str(tmp_path), load_tokenizer("slots"))


def test_claim_an_architecture_without_a_classifier_is_refused(model, tokenizer):
    class Odd(BertConfig):
        model_type = "odd"

    model.config = Odd()
    with pytest.raises(InputError, match="no sequence classifier for odd"):
        reward.with_head(model, tokenizer)


def test_claim_gradients_reach_the_body(judge, pairs):
    """The score is of the whole body: every weight but unread token rows can move."""
    batch = collate(as_pairs(pairs[:4]), "cpu")
    reward.last_scores(judge, batch).sum().backward()
    still = [name for name, p in judge.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
