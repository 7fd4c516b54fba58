"""`qlearn inspect`: the credit of every token of your own response, under your own models."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlearn.errors import InputError
from qlearn.findings.credit import Credit, token_credit
from qlearn.findings.objective import Objective, objective_of
from qlearn.findings.precision import AT_LEAST, enough_memory_for_float32, log_ratio_noise, lower
from qlearn.lm.data import (
    PREFERENCE_COLUMNS,
    SFT_COLUMNS,
    Example,
    as_pairs,
    boundary_merges,
    encode,
)
from qlearn.lm.logprobs import Row
from qlearn.lm.models import explain_table_sizes, load_model, note_if_surprised
from qlearn.lm.rows import read_rows
from qlearn.lm.tokenizers import load_tokenizer, own_tokenizer
from qlearn.options import (
    BETAS,
    check_output,
    check_ranges,
    check_text,
    option,
    required,
    write_text,
)
from qlearn.show import inspector
from qlearn.show.inspector import Inspected, Measure
from qlearn.show.pieces import credit_of_pieces, pieces
from qlearn.train.engine import choose_device, context_length


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Settings of `qlearn inspect`."""

    policy: str = required("the trained model: a directory or hub id")
    reference: str = required("the model it was trained from")
    prompt: str | None = option(None, "the text before the response")
    response: str | None = option(None, "the response; most begin with a space")
    data: str | None = option(None, "instead of prompt and response: a file of preference pairs")
    row: int = option(1, "which row of data (in JSONL: which line)", at_least=1)
    beta: float | None = option(
        None, "default: as the policy's own qlearn.yaml or training_args.bin says", **BETAS
    )
    tokenizer: str | None = option(None, "default: the policy's own")
    html: str = option("inspect.html", "where the heat map goes; an older one is replaced")
    json: str | None = option(
        None, "where all numbers go, in full; - for the screen, in place of the tables"
    )
    max_length: int | None = option(None, "default: the model's context", at_least=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto: float32 where memory allows, whatever the weights are stored in"
    )

    def __post_init__(self):
        check_ranges(self)
        typed = [text is not None for text in (self.prompt, self.response)]
        if typed != [self.data is None] * 2 or (self.data is None and self.row != 1):
            raise InputError("Pass either --prompt and --response, or --data (and --row).")
        for flag, text in (("--prompt", self.prompt), ("--response", self.response)):
            check_text(flag, text or "")
        check_output("--html", self.html, self.data)
        if self.json not in (None, "-"):
            check_output("--json", self.json, self.data, self.html)


def run(config: InspectConfig) -> None:
    """Writes one HTML page, and the JSON file that is asked for; then prints a table a response."""
    only_json = config.json == "-"
    with redirect_stdout(sys.stderr) if only_json else nullcontext():  # notes, of all that is read
        measure, responses, numbers = inspect(config)
        prompt = numbers["prompt"]
        page = inspector.html(responses, prompt, measure, config.policy, config.reference)
        write_text("--html", config.html, page)
    text = json.dumps(numbers, indent=1, allow_nan=False)
    if only_json:
        print(text)
        return
    if config.json is not None:
        write_text("--json", config.json, text + "\n")
    heading = f"β = {measure.beta:g}" if measure.objective.is_advantage else "in nats"
    for response in responses:
        print(f"\n{response.title} ({heading})\n{inspector.table(response, measure)}")
    print(f"\nheat map: {os.path.abspath(config.html)}")


def inspect(config: InspectConfig) -> tuple[Measure, list[Inspected], dict]:
    """(what was measured, each response in pieces, all numbers as `record` has them)."""
    objective = read_objective(config)
    tokenizer = load_tokenizer(config.tokenizer or config.policy)
    dtype, policy, reference = load_models(config, tokenizer)
    row, columns = chosen_row(config)
    example = encoded(row, columns, tokenizer, context_length(policy, config))
    rows = [(example.prompt, ids) for ids in example.completions]
    if config.tokenizer:
        note_if_surprised(policy, rows, config.policy)
    noise = None
    if dtype != torch.float32:
        more = more_rows(config, columns, tokenizer, context_length(policy, config), rows)
        noise = log_ratio_noise(policy, reference, [*rows, *more], dtype)
        policy, reference = lower(policy, dtype), lower(reference, dtype)
    measure = Measure(objective, str(dtype).removeprefix("torch."), noise)
    credits = token_credit(policy, reference, rows, measure.beta)
    check_finite(credits, columns[1:])
    prompt = as_text(row[1]["prompt"])
    prompt = tokenizer.decode(example.prompt) if prompt is None else prompt
    responses = []
    for name, ids, credit in zip(columns[1:], example.completions, credits, strict=True):
        parts = pieces(tokenizer, prompt, as_text(row[1][name]), example.prompt, ids)
        responses.append(Inspected(name, parts, credit_of_pieces(credit, parts)))
    numbers = record(config, measure, prompt, example, responses, credits, tokenizer)
    return measure, responses, numbers


def read_objective(config: InspectConfig) -> Objective:
    """The policy's objective; says why credit is no advantage, or that --beta overrides a file."""
    objective = objective_of(config.policy, config.beta)
    if not objective.is_advantage:
        hint = " (pass --beta if it was plain DPO)" if objective.takes_beta else ""
        print(
            f"note: {objective.problem}; so the column is log_ratio, in nats, and no unit of "
            f"reward is known{hint}."
        )
    elif objective.recorded is not None and objective.recorded != objective.beta:
        print(
            f"note: --beta {objective.beta:g} is used, though {objective.source} says "
            f"{objective.recorded:g}."
        )
    return objective


def load_models(
    config: InspectConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.dtype, PreTrainedModel, PreTrainedModel]:
    """(dtype to score in, policy, reference), float32 weights on the device."""
    device = choose_device(config.device)
    dtype = "float32" if config.dtype == "auto" else config.dtype
    too_large = config.dtype != "float32" and not _fit([config.policy, config.reference], device)
    if too_large:
        dtype = "bfloat16"
        print(
            f"note: two models in float32 do not fit into the memory of {device}; they are "
            "read in bfloat16 (--dtype float32 tries all the same)."
        )
    stored = {"dtype": torch.bfloat16} if too_large else {}
    own = own_tokenizer(config.reference, tokenizer, "reference", given=bool(config.tokenizer))
    policy = load_model(config.policy, tokenizer, **stored).to(device)
    reference = load_model(config.reference, own, **stored).to(device)
    explain_table_sizes(policy, reference, "reference")
    return getattr(torch, dtype), policy, reference


def _fit(folders: list[str], device: torch.device) -> bool:
    try:
        return enough_memory_for_float32(folders, device)
    except Exception:  # a torn file, whose many errors have no common class: load_model names it
        return True


def encoded(row: tuple[int, dict], columns: Sequence[str], tokenizer, max_length: int) -> Example:
    """The row as token ids. Raises InputError where it cannot be scored."""
    examples, faults = encode([row], columns, tokenizer, max_length)
    if faults:
        raise InputError(f"This response cannot be scored: {faults[0].reason}.")
    if boundary_merges(examples):
        print(
            "note: a token straddles the seam of prompt and response, so the response takes it "
            "along; a response that begins with a space usually avoids that."
        )
    if examples[0].typed_begin:
        print(f"note: the prompt begins with a typed {tokenizer.bos_token}; it counts once.")
    return examples[0]


def more_rows(
    config: InspectConfig, columns: Sequence[str], tokenizer, max_length: int, rows: Sequence[Row]
) -> list[Row]:
    """Rows of the same file to measure a noise on, where one pair has too few tokens for that."""
    missing, found = AT_LEAST - sum(len(ids) for _, ids in rows), []
    if config.data is not None and missing > 0:
        others = [r for r in read_rows(config.data, columns)[:AT_LEAST] if r[0] != config.row]
        for example in encode(others, columns, tokenizer, max_length)[0]:
            if missing > 0:
                found += as_pairs([example])
                missing -= len(example.completions[0])
    return found


def chosen_row(config: InspectConfig) -> tuple[tuple[int, dict], tuple[str, ...]]:
    """The numbered row to inspect, and its columns."""
    if config.data is None:
        return (1, {"prompt": config.prompt, "completion": config.response}), SFT_COLUMNS
    rows = dict(read_rows(config.data, PREFERENCE_COLUMNS))
    if config.row not in rows:
        raise InputError(f"{config.data} has no row {config.row}; it has rows 1 to {max(rows)}.")
    return (config.row, rows[config.row]), PREFERENCE_COLUMNS


def check_finite(credits: Sequence[Credit], names: Sequence[str]) -> None:
    """Raises InputError where a model gives a log-probability that is no number."""
    for name, credit in zip(names, credits, strict=True):
        for model, logp in (("policy", credit.logp), ("reference", credit.ref_logp)):
            bad = (~logp.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise InputError(
                    f"The {model} gives {logp[bad[0]].item()} as the log-probability of token "
                    f"{bad[0] + 1} of the {name}; look for weights that are not finite, or try "
                    "--dtype float32."
                )


def as_text(column) -> str | None:
    """A column as it was typed; None for messages, which a template turned into text."""
    return column if isinstance(column, str) else None


def record(
    config: InspectConfig,
    measure: Measure,
    prompt: str,
    example: Example,
    responses: Sequence[Inspected],
    credits: Sequence[Credit],
    tokenizer: PreTrainedTokenizerBase,
) -> dict:
    """All numbers of a page, as `--json` writes them; floats keep every digit.

    policy, reference, prompt, prompt_ids: what was scored.
    objective: {beta, loss, source, problem}, see `Objective`; beta is null where it is unknown.
    column: "advantage" (units of reward) or "log_ratio" (nats): the key of the credit below.
    dtype, device: of the two forward passes. noise: null in float32, else `Noise` in nats.
    versions: of qlearn, torch and transformers.
    responses: for each its title, its text, and
      a number a token: ids, tokens (as the tokenizer writes them), logp, ref_logp, surprisal, in
        nats, and advantage and value, or log_ratio;
      pieces: [text, number of tokens], in order: tokens that share a character are one piece;
      sums: of logp, ref_logp and the credit, and `error`, of the credit's sum, null in float32.
    """
    return {
        "policy": config.policy,
        "reference": config.reference,
        "prompt": prompt,
        "prompt_ids": example.prompt,
        "beta": measure.objective.beta,
        "objective": measure.objective._asdict(),
        "column": measure.column,
        "dtype": measure.dtype,
        "device": str(choose_device(config.device)),
        "noise": None if measure.noise is None else measure.noise._asdict(),
        "versions": {
            "qlearn": _version("qlearn"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "responses": [
            _response(measure, response, ids, credit, tokenizer)
            for response, ids, credit in zip(responses, example.completions, credits, strict=True)
        ],
    }


def _response(
    measure: Measure, response: Inspected, ids: list[int], credit: Credit, tokenizer
) -> dict:
    named = {"logp": credit.logp, "ref_logp": credit.ref_logp, measure.column: credit.advantage}
    running = {"value": credit.value} if measure.objective.is_advantage else {}
    columns = {**named, **running, "surprisal": credit.surprisal}
    return {
        "title": response.title,
        "text": "".join(piece.text for piece in response.pieces),
        "ids": ids,
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        **{name: x.tolist() for name, x in columns.items()},
        "pieces": [[piece.text, piece.n_tokens] for piece in response.pieces],
        "sums": {
            **{name: inspector.total(x) for name, x in named.items()},
            "error": measure.error(len(ids)),
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except Exception:  # run from a source tree that nobody has installed
        return "source"
