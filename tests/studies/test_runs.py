"""Shared runs: trained once, named by settings and source, never half there."""

import json
from pathlib import Path

import pytest

from qlearn.studies import runs
from qlearn.train.dpo import DPOConfig


@pytest.fixture
def calls(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(runs, "source", lambda: "this source")
    return []


def training(calls):
    def run(config):
        calls.append(config)
        with open(f"{config.output_dir}/summary.json", "w") as file:
            json.dump({"after": config.beta}, file)

    return run


def config(**changes):
    return DPOConfig(**{"model": "m", "data": "slots", "output_dir": "", "beta": 0.5} | changes)


def test_claim_a_run_is_made_once_and_named_by_its_settings(calls):
    one, again = (runs.trained(training(calls), config()) for _ in range(2))
    other = runs.trained(training(calls), config(beta=0.25))
    assert one == again != other and len(calls) == 2
    assert runs.summary(one) == {"after": 0.5} and runs.summary(other) == {"after": 0.25}


def test_claim_a_changed_source_trains_anew(calls, monkeypatch):
    runs.trained(training(calls), config())
    monkeypatch.setattr(runs, "source", lambda: "another")
    runs.trained(training(calls), config())
    assert len(calls) == 2


def test_claim_what_a_source_says_in_words_changes_nothing(tmp_path):
    one, same, other = (tmp_path / f"{name}.py" for name in "abc")
    one.write_text('"""A."""\n\ndef f(x):\n    """B."""\n    return x  # twice\n')
    same.write_text('"""C."""\n\ndef f(x):\n    return x\n')
    other.write_text("def f(x):\n    return 2 * x\n")
    assert runs.code(one) == runs.code(same) != runs.code(other)


def test_claim_an_interrupted_run_is_not_there(calls):
    def broken(given):
        calls.append(given)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.trained(broken, config())
    folder = runs.trained(training(calls), config())
    assert len(calls) == 2 and runs.summary(folder)


def test_claim_recipes_reach_the_run(calls, monkeypatch):
    """The helpers are the recipes with seed, model, data and whatever else is said."""
    monkeypatch.setattr(runs.dpo, "run", training(calls))
    runs.dpo_run(3, "somewhere", "xor", world_rows=512)
    (given,) = calls
    assert (given.seed, given.model, given.data, given.world_rows) == (3, "somewhere", "xor", 512)
    assert (given.beta, given.learning_rate) == (0.5, 0.0004)


def test_claim_a_file_of_rows_is_named_by_what_it_holds(calls):
    rows = [{"prompt": "a", "completion": "b"}]
    one, again, other = map(runs.rows_file, (rows, list(rows), rows * 2))
    assert one == again != other and one.endswith(".jsonl")
    assert [json.loads(line) for line in Path(other).read_text().splitlines()] == rows * 2
