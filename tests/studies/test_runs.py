"""Shared runs: trained once, named by settings and source, never half there."""

import hashlib
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


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "ppo", "rloo"])
def test_claim_every_helper_is_its_recipe_with_the_seed_model_and_world(calls, monkeypatch, kind):
    """The settings are the recipe's but for what was said; the folder is the one that was made."""
    helper = {"sft": runs.sft_run, "reward": runs.reward_run, "dpo": runs.dpo_run}
    helper = helper.get(kind, runs.ppo_run)
    module = {"rloo": "ppo"}.get(kind, kind)

    def training(config):
        calls.append(config)
        Path(config.output_dir, "made").touch()

    monkeypatch.setattr(getattr(runs, module), "run", training)
    given = {"seed": 3} | ({} if kind == "sft" else {"model": "somewhere"})
    more = {"recipe": "tiny-rloo"} if kind == "rloo" else {}
    folder = helper(*given.values(), "trips", learning_rate=0.125, **more)
    (config,) = calls
    assert Path(folder, "made").exists() and Path(folder).parent == runs.FOLDER
    recipe = runs.recipes.read(f"tiny-{kind}", type(config))
    for key, value in (recipe | given | {"data": "trips", "learning_rate": 0.125}).items():
        assert getattr(config, key) == value, key
    assert helper(*given.values(), learning_rate=0.125, **more) != folder
    assert calls[-1].data == "slots"


def test_claim_folders_are_made_where_even_their_parent_is_missing(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "a" / "b")
    assert Path(runs.rows_file([{"a": 1}])).read_text() == '{"a": 1}\n'
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "c" / "d")
    assert runs.summary(runs.trained(training(calls), config())) == {"after": 0.5}


def test_claim_a_runs_files_are_read_as_they_stand(tmp_path):
    """Metrics are a line each, settings are YAML."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "J": 0.5}\n{"step": 2, "J": -1}\n')
    (tmp_path / "qlearn.yaml").write_text("beta: 0.25\ndata: slots\nreference: null\n")
    assert runs.history(str(tmp_path)) == [{"step": 1, "J": 0.5}, {"step": 2, "J": -1}]
    assert runs.settings(str(tmp_path)) == {"beta": 0.25, "data": "slots", "reference": None}


def test_claim_seeds_are_measured_in_their_order_by_the_shared_workers(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(runs, "workers", lambda: pool)
        assert runs.each_seed(lambda seed: {"x": 2 * seed}, [3, 1, 2]) == [
            {"x": 6}, {"x": 2}, {"x": 4}]  # fmt: skip


def test_claim_a_worker_is_a_fresh_process_of_one_thread(monkeypatch):
    """No process is started here: the pool is asked what it was made with."""
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda n, **given: (n, given))
    n, given = runs.workers.__wrapped__()
    assert n == runs.WORKERS and given["mp_context"].get_start_method() == "spawn"
    assert given["initializer"] is runs.torch.set_num_threads and given["initargs"] == (1,)


def test_claim_a_run_depends_on_the_library_up_to_the_training_loops(monkeypatch, tmp_path):
    """The source's name is of every file that a training can run, in one order, and of no other."""
    from types import SimpleNamespace

    names = ["errors.py", "exact/a.py", "exact/z.py", "lm/b.py", "losses.py", "options.py",
             "train/c.py"]  # fmt: skip
    for name in [*reversed(names), "findings/d.py", "studies/e.py", "lm/notes.txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"x = {name!r}\n")
    monkeypatch.setattr(runs, "qlearn", SimpleNamespace(__file__=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(runs.Path, "glob", reversed_glob(runs.Path.glob))
    digest = runs.source.__wrapped__
    parts = tuple(runs.code(tmp_path / name) for name in names)
    first = digest()
    assert first == hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    for name in ("findings/d.py", "studies/e.py", "lm/notes.txt"):
        (tmp_path / name).write_text("x = 0\n")
    assert digest() == first
    for name in names:
        (tmp_path / name).write_text("x = 0\n")
        assert digest() != first, name
        first = digest()


def reversed_glob(glob):
    """A folder's files in the order that sorting must undo."""
    return lambda self, pattern: sorted(glob(self, pattern), reverse=True)
