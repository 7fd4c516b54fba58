"""What all training loops share: settings, the plan of batches, the update, the log, the output.

The loops themselves are in `sft`, `reward`, `ppo` and `dpo`; each reads top to bottom.
"""

import dataclasses
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import yaml
from scipy.stats import binomtest
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from qlearn.errors import InputError, RunStopped
from qlearn.lm import data as data_module
from qlearn.lm.data import Example, Fault, begins_typed
from qlearn.lm.encoding import RULE
from qlearn.lm.rows import read_rows
from qlearn.lm.tokenizers import check_knows
from qlearn.lm.worlds import WORLDS, World
from qlearn.options import LARGEST_SEED, check_ranges, check_text, option, required, same_place

HELD_OUT = " (held out)"  # behind the name of a file, for the part that is not trained on
PATIENCE = 3  # steps in a row that may be skipped for a loss or gradient that is not finite
TIMING_KEYS = (
    "seconds",
    "eps",
    "pairs_per_second",
    "rows_per_second",
)  # all else repeats with the seed


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings that every training run has. Names follow TRL where the meaning is the same."""

    model: str = required(
        "the model to train: a directory, a hub id, tiny, or random:pythia-14m (any Pythia shape)"
    )
    data: str = required(
        "rows to learn from: a .jsonl or .parquet file, a hub id[:split], or an embedded world "
        f"({', '.join(WORLDS)})"
    )
    output_dir: str = required("where the model, metrics.jsonl and qlearn.yaml go")
    tokenizer: str | None = option(None, "a directory or hub id; default: the model's own")
    eval_data: str | None = option(None, "held-out rows; default: a share of the data")
    eval_fraction: float = option(0.1, "the share of the data held out where no eval_data is given")
    world_rows: int = option(8192, "how many rows to draw where the data is an embedded world")
    max_steps: int | None = option(None, "stop after this many updates; default: num_train_epochs")
    num_train_epochs: int = option(1, "passes over the data")
    per_device_train_batch_size: int = option(16, "rows in one forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes in one update")
    learning_rate: float = option(1e-5, "AdamW's learning rate after warm-up")
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = option(
        "cosine", "how the learning rate falls after warm-up"
    )
    warmup_steps: int = option(20, "updates over which the learning rate rises from 0")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    max_length: int | None = option(None, "the longest row in tokens; default: the model's context")
    max_quarantine: float = option(0.01, "the share of unusable rows at which the run ends")
    seed: int = option(
        0, "the same seed gives the same run on one machine's CPU", at_least=0, below=LARGEST_SEED
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "what the body computes in; weights and log-probabilities stay float32"
    )
    logging_steps: int = option(10, "updates between two lines of metrics.jsonl")
    overwrite: bool = option(False, "replace an earlier run in output_dir")

    def __post_init__(self):
        check_ranges(self)
        positive = (
            "world_rows", "max_steps", "num_train_epochs", "per_device_train_batch_size",
            "gradient_accumulation_steps", "learning_rate", "max_grad_norm", "max_length",
            "logging_steps",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be positive and finite, not {value}.")
        for name in ("eval_fraction", "max_quarantine"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), not {getattr(self, name)}.")
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps must not be negative, not {self.warmup_steps}.")


# --- devices -----------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device meant by `name`. Raises InputError where it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, here in there.items() if here)
    if not there[name]:
        here = ", ".join(kind for kind, is_here in there.items() if is_here)
        raise InputError(f"There is no {name} device here; use --device {here} or auto.")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What the model's body computes in; says so where a GPU has no bfloat16."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "bfloat16" if has_bf16 else "float32"
        if device.type == "cuda" and not has_bf16:
            print("This GPU has no bfloat16; computing in float32 (slower, same results).")
    if name == "bfloat16" and device.type == "cuda" and not has_bf16:
        raise InputError("This GPU has no bfloat16; use --dtype float32 or auto.")
    return getattr(torch, name)


def precision(device: torch.device, dtype: torch.dtype):
    """The context in which forward passes run: autocast to `dtype`, or nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


# --- rows --------------------------------------------------------------------------------------


def split_rows(rows: Sequence, fraction: float, seed: int) -> tuple[list, list]:
    """(train, held out): a random share of the rows, the same for the same seed."""
    held_out = set(random.Random(seed).sample(range(len(rows)), round(fraction * len(rows))))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


def load_examples(
    config: TrainingConfig,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    draw: Callable[[World], list[dict]],
    prepare: Callable[[list], list] = list,
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples of the configured source, all of them validated.

    `draw` makes the rows where the source is an embedded world; `prepare` changes the numbered
    training rows once the held-out ones are set apart.

    Raises: InputError as `usable`, where nothing is held out, or for a world's unknown words.
    """
    if config.data in WORLDS:
        world = World(config.data)
        check_knows(tokenizer, world)
        rows = list(enumerate(draw(world), start=1))
    else:
        rows = read_rows(config.data, columns)
    if config.eval_data:
        held_out, name = read_rows(config.eval_data, columns), config.eval_data
    else:
        rows, held_out = split_rows(rows, config.eval_fraction, config.seed)
        name = config.data + HELD_OUT
    if not held_out:
        raise InputError("No row is held out; pass --eval-data or a larger --eval-fraction.")
    return tuple(
        usable(part, columns, tokenizer, config, max_length, source)
        for part, source in ((prepare(rows), config.data), (held_out, name))
    )


def usable(
    rows: Sequence[tuple[int, dict]],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    max_length: int,
    source: str,
) -> list[Example]:
    """The validated rows of one source; its unusable ones go to quarantine.jsonl and are counted.

    Raises: InputError where the quarantine holds more than config.max_quarantine allows.
    """
    examples, faults = data_module.encode(rows, columns, tokenizer, max_length)
    write_quarantine(config.output_dir, source, faults)
    print(f"{source}: {len(examples)} rows, {len(faults)} in quarantine")
    typed = begins_typed(examples)
    if typed:
        print(
            f"note: {len(typed)} prompts of {source} begin with a typed {tokenizer.bos_token}; it "
            "counts once."
        )
    file = source.removesuffix(HELD_OUT)
    data_module.check_quarantine(faults, len(rows), config.max_quarantine, file)
    return examples


def write_quarantine(output_dir: str, source: str, faults: Sequence[Fault]) -> None:
    """Appends each fault to quarantine.jsonl: source, row, reason, preview."""
    if faults:
        with open(os.path.join(output_dir, "quarantine.jsonl"), "a", encoding="utf-8") as file:
            for fault in faults:
                print(json.dumps({"source": source, **dataclasses.asdict(fault)}), file=file)


def context_length(model: PreTrainedModel, config: TrainingConfig) -> int:
    """The longest row: config.max_length, at most the model's context."""
    context = getattr(model.config, "max_position_embeddings", 2048)
    if config.max_length and config.max_length > context:
        raise InputError(
            f"max_length is {config.max_length} but the model's context is {context} tokens; "
            "lower it or leave it out."
        )
    return config.max_length or context


# --- the plan and the update -------------------------------------------------------------------


def n_updates(n_rows: int, config: TrainingConfig) -> int:
    """How many updates a run makes; an epoch's last batch may be smaller and is not dropped."""
    if n_rows == 0:
        raise InputError(
            "There are no rows to train on; lower --eval-fraction, or look at the file with "
            "`qlearn data check`."
        )
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return config.max_steps or config.num_train_epochs * math.ceil(n_rows / rows)


def plan(n_rows: int, config: TrainingConfig) -> Iterator[list[list[int]]]:
    """For each update the row indices of its forward passes; every epoch has every row once."""
    total, size = n_updates(n_rows, config), config.per_device_train_batch_size
    step = 0
    for epoch in itertools.count():
        order = list(range(n_rows))
        random.Random(f"{config.seed} {epoch}").shuffle(order)
        rows = size * config.gradient_accumulation_steps
        for start in range(0, n_rows, rows):
            if step == total:
                return
            batch = order[start : start + rows]
            yield [batch[i : i + size] for i in range(0, len(batch), size)]
            step += 1


class Updates:
    """The optimiser of one run: AdamW, a schedule, clipping, and patience with NaN.

    A loss or gradient that is not finite changes no weight: the step is skipped and logged as what
    it is with the numbers of its rows; the third in a row raises RunStopped.
    """

    def __init__(self, model: PreTrainedModel, config: TrainingConfig, n_steps: int, log: "Log"):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # fused: one kernel for all tables, four times faster on CPU
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        self.schedule = get_scheduler(
            config.lr_scheduler_type, self.optimiser, config.warmup_steps, n_steps
        )
        self.max_grad_norm, self.log = config.max_grad_norm, log
        self.bad_in_a_row = 0

    def step(self, loss: Tensor, rows: Sequence[int]) -> dict | None:
        """Applies the gradients that `backward` has left; returns what to log, None if skipped."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        seen = {"loss": loss.item(), "grad_norm": norm.item()}
        rate = self.schedule.get_last_lr()[0]
        finite = all(math.isfinite(x) for x in seen.values())
        if finite:
            self.bad_in_a_row = 0
            self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        if finite:
            return {**seen, "learning_rate": rate}
        self.bad_in_a_row += 1
        self.log.skipped(seen, rows)
        if self.bad_in_a_row == PATIENCE:
            raise RunStopped(
                f"Stopped: {PATIENCE} steps in a row had a loss or gradient that is not finite, "
                f"the last on rows {list(rows)[:8]}; lower --learning-rate or look at those rows."
            )
        return None


# --- the log and the output --------------------------------------------------------------------


class Log:
    """metrics.jsonl and the progress bar. Each line is the mean over the updates since the last."""

    def __init__(self, title: str, n_steps: int, every: int, path: str | None, unit: str):
        self.bar = tqdm(total=n_steps, desc=title, unit="step", disable=None, mininterval=1.0)
        self.every, self.n_steps, self.unit = every, n_steps, unit
        self.file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115
        self.history: list[dict] = []
        self.step = self.rows = 0
        self.window: list[dict] = []
        self.started = self.window_started = time.perf_counter()
        self.window_rows = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.file:
            self.file.close()

    def update(self, metrics: dict | None, n_rows: int, **totals) -> None:
        """One update done: `metrics` are averaged, `totals` are counts so far."""
        self.step += 1
        self.rows += n_rows
        self.window_rows += n_rows
        if metrics is not None:
            self.window.append(metrics)
        self.bar.update()
        if self.window and (self.step % self.every == 0 or self.step == self.n_steps):
            now = time.perf_counter()
            speed = self.window_rows / max(now - self.window_started, 1e-9)
            means = {
                key: sum(m[key] for m in self.window) / len(self.window) for key in self.window[0]
            }
            self.write({"step": self.step, **totals, **means, "seconds": now - self.started,
                        f"{self.unit}_per_second": speed})  # fmt: skip
            shown = {"loss": means["loss"]}
            for name in ("margins", "accuracies"):
                if f"rewards/{name}" in means:
                    shown[name] = means[f"rewards/{name}"]
            self.bar.set_postfix(
                {k: f"{v:.3f}" for k, v in shown.items()} | {f"{self.unit}/s": f"{speed:.1f}"}
            )
            self.window, self.window_rows, self.window_started = [], 0, now

    def skipped(self, seen: dict, rows: Sequence[int]) -> None:
        """A step without an update, with the values as they were ("nan", "inf") and its rows."""
        values = {key: x if math.isfinite(x) else str(x) for key, x in seen.items()}
        self.write({"step": self.step + 1, "skipped": True, **values, "rows": list(rows)})
        self.bar.write(f"step {self.step + 1} skipped: {values} on rows {list(rows)[:8]}")

    def write(self, record: dict) -> None:
        self.history.append(record)
        if self.file:
            print(json.dumps(record), file=self.file, flush=True)


RUN_FILES = ("metrics.jsonl", "quarantine.jsonl", "qlearn.yaml", "summary.json", "config.json")


def open_output(config: TrainingConfig) -> None:
    """Makes output_dir and writes the resolved configuration, qlearn.yaml, into it.

    Raises: InputError where the directory holds a run and `overwrite` is not set, cannot be
    written, or is read by this very run: `overwrite` would delete it first.
    """
    path = config.output_dir
    check_text("--output-dir", path)
    written = [path, *(os.path.join(path, name) for name in RUN_FILES)]
    for name in ("model", "reference", "reward", "tokenizer", "data", "eval_data"):
        source = getattr(config, name, None)
        if any(same_place(place, source) for place in written):
            raise InputError(
                f"{source} is the {name} that this run reads, and the run would write over it; "
                "choose another --output-dir."
            )
    there = [name for name in RUN_FILES if os.path.exists(os.path.join(path, name))]
    if there and not config.overwrite:
        raise InputError(
            f"{path} already holds a run ({', '.join(there)}); choose another --output-dir or pass "
            "--overwrite."
        )
    try:
        os.makedirs(path, exist_ok=True)
        for name in there:
            os.remove(os.path.join(path, name))
        with open(os.path.join(path, "qlearn.yaml"), "w", encoding="utf-8") as file:
            yaml.safe_dump(dataclasses.asdict(config), file, sort_keys=False)
    except OSError as error:
        raise InputError(
            f"Cannot write to {path}: {error.strerror}; choose another --output-dir."
        ) from error


def wilson(wins: int, n: int) -> list[float]:
    """[low, high]: the 95 % interval of a share of `n`, Wilson's."""
    interval = binomtest(wins, n).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def compared(
    name: str, accuracy: float, interval: list[float], margin: float, ties: float, n: int,
    why_all_tie: str = "",
) -> str:  # fmt: skip
    """How `n` held-out pairs came out, as words for a run's sentence. `ties` is a share.

    A tie is not a win, so where all pairs tie an accuracy of 0 would read as a model that is always
    wrong: the words say instead that they tie, and why.
    """
    if ties == 1:
        return f"all {n} held-out pairs tie" + (f" ({why_all_tie})" if why_all_tie else "")
    low, high = interval
    n_ties = round(ties * n)
    tied = f", {n_ties} of them {'a tie' if n_ties == 1 else 'ties'}" if n_ties else ""
    return (
        f"{name} {accuracy:.3f} [{low:.3f}, {high:.3f}], margin {margin:.4f} on {n} held-out "
        f"pairs{tied}"
    )


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: str, summary: dict
) -> None:
    """A directory that transformers' `from_pretrained` loads, with summary.json beside.

    The tokenizer is written as it came in; summary.json also names the rule by which rows became
    ids, because weights are of use only with the rule they were trained by.

    Raises: RunStopped, and saves nothing, where training has left numbers that are not finite.
    """
    for name, value in summary.get("after", {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RunStopped(
                f"Stopped: after training {name} is {value}, so the model is not saved; lower "
                "--learning-rate."
            )
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    with open(os.path.join(output_dir, "summary.json"), "w", encoding="utf-8") as file:
        json.dump(summary | {"encoding": RULE}, file, indent=1)
    print(f"saved to {output_dir}")
