"""The trained models that the measurements share, each trained once.

A run lives in `_build/runs/`, in a folder named after its settings and after the library's own
source: several results files use the same models, an interrupted `make results` goes on where it
was, and a changed line of the library trains anew. `make clean` forgets them all.
"""

import ast
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml

import qlearn
from qlearn import recipes
from qlearn.train import dpo, ppo, reward, sft
from qlearn.train.dpo import DPOConfig
from qlearn.train.engine import TrainingConfig
from qlearn.train.ppo import PPOConfig
from qlearn.train.reward import RewardConfig
from qlearn.train.sft import SFTConfig

FOLDER = Path("_build/runs")
WORKERS = 2  # processes of one thread each: on tiny models twice as fast as one of two threads


def sft_run(seed: int, world: str = "slots", **changes) -> str:
    """The folder of a model trained as in the recipe tiny-sft, on a world's lines."""
    changes = {"seed": seed, "data": world} | changes
    return trained(sft.run, _recipe("tiny-sft", SFTConfig, **changes))


def dpo_run(seed: int, model: str, world: str = "slots", **changes) -> str:
    """The folder of a policy trained from `model` as in the recipe tiny-dpo, but for `changes`."""
    changes = {"seed": seed, "model": model, "data": world} | changes
    return trained(dpo.run, _recipe("tiny-dpo", DPOConfig, **changes))


def reward_run(seed: int, model: str, world: str = "slots", **changes) -> str:
    """The folder of a reward model trained from `model` as in the recipe tiny-reward."""
    changes = {"seed": seed, "model": model, "data": world} | changes
    return trained(reward.run, _recipe("tiny-reward", RewardConfig, **changes))


def ppo_run(
    seed: int, model: str, world: str = "slots", recipe: str = "tiny-ppo", **changes
) -> str:
    """The folder of a policy trained from `model` as in the recipe tiny-ppo, or in tiny-rloo.

    `reward` among the changes is the folder of a `reward_run`; else the reward is the true one.
    """
    changes = {"seed": seed, "model": model, "data": world} | changes
    return trained(ppo.run, _recipe(recipe, PPOConfig, **changes))


def trained(run: Callable, config: TrainingConfig) -> str:
    """The folder of the run with these settings; trains it where there is none yet.

    `config.output_dir` is not read.
    """
    settings = dataclasses.asdict(config) | {"output_dir": ""}
    path = FOLDER / _digest(type(config).__name__, settings, source())
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = tempfile.mkdtemp(dir=FOLDER, prefix="part-")
        run(dataclasses.replace(config, output_dir=part))
        _publish(part, path)
    return str(path)


def rows_file(rows: Sequence[dict]) -> str:
    """The path of a .jsonl file of these rows, for a run's `data`; its name tells its content."""
    text = jsonl(rows)
    path = FOLDER / f"{_digest(text)}.jsonl"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=FOLDER, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    return str(path)


def jsonl(rows: Sequence[dict]) -> str:
    """Rows as the text of a .jsonl file."""
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def history(folder: str) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    text = Path(folder, "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def summary(folder: str) -> dict:
    """A run's summary.json: its held-out metrics before and after."""
    return json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))


def settings(folder: str) -> dict:
    """A run's qlearn.yaml."""
    return yaml.safe_load(Path(folder, "qlearn.yaml").read_text(encoding="utf-8"))


def each_seed(measure: Callable[[int], dict], seeds: Sequence[int]) -> list[dict]:
    """[measure(seed) for seed in seeds], two at a time, each in a process of one thread.

    `measure` is a function of a module, or a `functools.partial` of one.
    """
    return list(workers().map(measure, seeds))


@cache
def workers() -> ProcessPoolExecutor:
    """The processes that all measurements share, so that none waits for another one's last seed."""
    return ProcessPoolExecutor(
        WORKERS, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )


@cache
def source() -> str:
    """A digest of the library's code up to the training loops: what a run depends on."""
    root = Path(qlearn.__file__).parent
    files = [f for part in ("exact", "lm", "train") for f in (root / part).glob("*.py")]
    files += [root / name for name in ("errors.py", "losses.py", "options.py")]
    return _digest(*(code(f) for f in sorted(files)))


def code(path: Path) -> str:
    """What a source file does: its syntax tree without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        named = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        if named and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def _recipe(name: str, config: type, **changes) -> TrainingConfig:
    return recipes.settings(name, config, output_dir="", **changes)


def _digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _publish(part: str, path: Path) -> None:
    """Renames a finished folder; another process may have been first."""
    try:
        os.rename(part, path)
    except OSError:
        shutil.rmtree(part)
