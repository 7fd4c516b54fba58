"""The engine: the plan of batches, the update, what happens at NaN, the output directory."""

import json
import math

import pytest
import torch
import yaml

from qlearn.errors import InputError, RunStopped
from qlearn.lm.data import SFT_COLUMNS, encode
from qlearn.train import engine, sft
from qlearn.train.sft import SFTConfig


def config(**changes):
    given = dict(model="tiny", data="slots", output_dir="unused", per_device_train_batch_size=4)
    return SFTConfig(**(given | changes))


@pytest.fixture(scope="module")
def examples(tokenizer):
    from qlearn.lm.worlds import SlotWorld

    rows = SlotWorld().sft_rows(22, "engine")
    return encode(list(enumerate(rows, start=1)), SFT_COLUMNS, tokenizer, 256)[0]


def test_claim_every_epoch_has_every_row_once():
    """Traps 19 and 20: no row twice, none dropped, the last batch smaller; epochs differ."""
    steps = list(engine.plan(22, config(num_train_epochs=2, gradient_accumulation_steps=2)))
    assert len(steps) == engine.n_updates(
        22, config(num_train_epochs=2, gradient_accumulation_steps=2)
    )
    epochs = [[i for parts in steps[k : k + 3] for part in parts for i in part] for k in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(22))] * 2
    assert epochs[0] != epochs[1]
    assert [[len(part) for part in parts] for parts in steps[:3]] == [[4, 4], [4, 4], [4, 2]]


def test_claim_max_steps_can_pass_the_end_of_the_data():
    steps = list(engine.plan(5, config(max_steps=7)))
    assert len(steps) == 7 == engine.n_updates(5, config(max_steps=7))


def test_claim_accumulation_equals_one_large_batch(tokenizer, examples):
    """Trap 17: 1 × 8 and 8 × 1 rows of unequal lengths give the same steps."""
    from qlearn.lm.models import load_model

    losses, weights = [], []
    for size, parts in ((8, 1), (1, 8)):
        model = load_model("tiny", tokenizer, seed=3)
        settings = config(
            per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=4,
            logging_steps=1, learning_rate=1e-3, warmup_steps=0,
        )  # fmt: skip
        history = sft.train(model, examples, settings)
        losses.append([record["loss"] for record in history])
        weights.append(model.get_output_embeddings().weight.detach())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(*weights, atol=2e-4)


def test_claim_same_seed_same_metrics(tokenizer, examples, tmp_path):
    """Two runs on CPU write identical metrics but for timing keys."""
    from qlearn.lm.models import load_model

    runs = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        model = load_model("tiny", tokenizer, seed=3)
        sft.train(model, examples, config(max_steps=5, logging_steps=2), str(path))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        runs.append([{k: v for k, v in x.items() if k not in engine.TIMING_KEYS} for x in lines])
    assert runs[0] == runs[1] and [x["step"] for x in runs[0]] == [2, 4, 5]
    assert {"loss", "grad_norm", "learning_rate", "num_tokens"} <= set(runs[0][0])


class Poisoned(torch.nn.Module):
    """One weight; the loss is nan where the plan says so."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))


def poisoned_run(bad_steps, path):
    model, log_steps = Poisoned(), []
    with engine.Log("test", 6, 1, str(path), unit="rows") as log:
        updates = engine.Updates(model, config(warmup_steps=0), 6, log)
        for step in range(1, 7):
            loss = (model.w * (math.nan if step in bad_steps else 1.0)).sum()
            loss.backward()
            done = updates.step(loss.detach(), rows=[10 * step])
            log.update(done, 1)
            log_steps.append(model.w.item())
    return log_steps


def test_claim_a_step_that_is_not_finite_changes_nothing(tmp_path):
    """It is skipped, logged as what it is with its rows, and training goes on."""
    path = tmp_path / "metrics.jsonl"
    weights = poisoned_run({2, 3, 5}, path)
    assert weights[0] == weights[1] == weights[2] != weights[3] == weights[4] != weights[5]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    skipped = [r for r in records if r.get("skipped")]
    assert [(r["step"], r["loss"], r["rows"]) for r in skipped] == [
        (2, "nan", [20]), (3, "nan", [30]), (5, "nan", [50]),
    ]  # fmt: skip
    assert all(math.isfinite(r["loss"]) for r in records if not r.get("skipped"))


def test_claim_the_third_bad_step_in_a_row_stops_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(RunStopped, match=r"3 steps in a row .* rows \[50\]"):
        poisoned_run({3, 4, 5}, path)
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_claim_an_infinite_gradient_is_skipped_too(model):
    """The loss can be finite when a gradient is not."""
    with engine.Log("test", 1, 1, None, unit="rows") as log:
        updates = engine.Updates(model, config(), 1, log)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.get_output_embeddings().weight.grad = torch.full_like(
            model.get_output_embeddings().weight, math.inf
        )
        assert updates.step(torch.tensor(1.0), rows=[1]) is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert log.history[0]["grad_norm"] in ("inf", "nan")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(learning_rate=-1.0), "learning_rate must be positive"),
        (dict(learning_rate=math.nan), "learning_rate must be positive and finite"),
        (dict(max_steps=0), "max_steps must be positive"),
        (dict(eval_fraction=1.0), r"eval_fraction must lie in \[0, 1\)"),
        (dict(warmup_steps=-1), "warmup_steps must not be negative"),
    ],
)
def test_claim_bad_settings_are_named(change, sentence):
    with pytest.raises(InputError, match=sentence):
        config(**change)


def test_claim_a_device_that_is_not_there_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="There is no cuda device here; use --device cpu"):
            engine.choose_device("cuda")
    assert engine.choose_device("auto").type in ("cpu", "cuda", "mps")


def test_claim_a_gpu_without_bfloat16_says_so(monkeypatch, capsys):
    """auto falls back to float32 aloud; an explicit bfloat16 is refused."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    gpu = torch.device("cuda")
    assert engine.choose_dtype("auto", gpu) == torch.float32
    assert "no bfloat16" in capsys.readouterr().out
    with pytest.raises(InputError, match="use --dtype float32"):
        engine.choose_dtype("bfloat16", gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert engine.choose_dtype("auto", gpu) == torch.bfloat16
    assert engine.choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_claim_masters_stay_float32_in_bfloat16(tokenizer, examples):
    """Trap 15: the body computes in bfloat16, the weights it updates do not."""
    from qlearn.lm.models import load_model

    model = load_model("tiny", tokenizer)
    sft.train(model, examples, config(max_steps=2, dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_claim_an_old_run_is_not_overwritten(tmp_path):
    settings = config(output_dir=str(tmp_path / "run"))
    engine.open_output(settings)
    saved = yaml.safe_load((tmp_path / "run" / "qlearn.yaml").read_text())
    assert saved["learning_rate"] == settings.learning_rate and saved["model"] == "tiny"
    with pytest.raises(InputError, match="already holds a run"):
        engine.open_output(settings)
    (tmp_path / "run" / "metrics.jsonl").write_text("old\n")
    engine.open_output(config(output_dir=str(tmp_path / "run"), overwrite=True))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_claim_an_unwritable_output_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write to"):
        engine.open_output(config(output_dir=str(tmp_path / "file" / "run")))


def test_claim_held_out_rows_are_disjoint_and_fixed():
    train, held = engine.split_rows(range(100), 0.1, seed=1)
    assert sorted([*train, *held]) == list(range(100)) and len(held) == 10
    assert engine.split_rows(range(100), 0.1, seed=1) == (train, held)
    assert engine.split_rows(range(100), 0.1, seed=2) != (train, held)


def test_claim_longer_than_the_context_is_refused(model):
    assert engine.context_length(model, config()) == 256
    with pytest.raises(InputError, match="context is 256 tokens"):
        engine.context_length(model, config(max_length=257))


@pytest.mark.parametrize("ties, why, words", [
    (1.0, "", "all 8 held-out pairs tie"),
    (1.0, "policy equals reference", "all 8 held-out pairs tie (policy equals reference)"),
    (0.0, "", "accuracy 0.000 [0.000, 0.324], margin -1.0000 on 8 held-out pairs"),
    (1 / 8, "", "accuracy 0.000 [0.000, 0.324], margin -1.0000 on 8 held-out pairs, "
                "1 of them a tie"),
    (2 / 8, "", "accuracy 0.000 [0.000, 0.324], margin -1.0000 on 8 held-out pairs, "
                "2 of them ties"),
])  # fmt: skip
def test_bug_an_accuracy_of_0_is_told_from_ties(ties, why, words):
    """It read *reward accuracy 0.000* where policy and reference were the same."""
    said = engine.compared("accuracy", 0.0, engine.wilson(0, 8), -1.0, ties, 8, why)
    assert said == words
