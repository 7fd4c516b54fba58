"""`qlearn inspect`: the credit of every token of your own response, under your own models."""

import os
from dataclasses import dataclass

import yaml

from qlearn.errors import InputError
from qlearn.findings.credit import token_credit
from qlearn.lm.data import PREFERENCE_COLUMNS, SFT_COLUMNS, boundary_merges, encode, read_rows
from qlearn.lm.models import check_same_vocabulary, load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.show import inspector
from qlearn.train.engine import context_length, option, required

TRL_BETA = 0.1  # TRL's default, used where a policy brings no qlearn.yaml


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Settings of `qlearn inspect`."""

    policy: str = required("the trained model: a directory or hub id")
    reference: str = required("the model it was trained from")
    prompt: str | None = option(None, "the text before the response")
    response: str | None = option(None, "the response; most begin with a space")
    data: str | None = option(None, "instead of prompt and response: a file of preference pairs")
    row: int = option(1, "which row of data (in JSONL: which line)")
    beta: float | None = option(None, "default: the policy's own qlearn.yaml, else 0.1")
    tokenizer: str | None = option(None, "default: the policy's own")
    html: str = option("inspect.html", "where the heat map goes; an older one is replaced")
    max_length: int | None = option(None, "default: the model's context")

    def __post_init__(self):
        if (self.data is None) == (self.prompt is None or self.response is None):
            raise InputError("Pass either --prompt and --response, or --data (and --row).")
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise InputError(f"beta must be positive and finite, not {self.beta}.")


def run(config: InspectConfig) -> None:
    """Prints a table for each response and writes one HTML page."""
    tokenizer = load_tokenizer(config.tokenizer or config.policy)
    policy = load_model(config.policy, tokenizer)
    reference = load_model(config.reference, tokenizer)
    check_same_vocabulary(policy, reference)
    beta = config.beta or trained_beta(config.policy)
    row, columns = chosen_row(config)
    examples, faults = encode([row], columns, tokenizer, context_length(policy, config))
    if faults:
        raise InputError(f"This response cannot be scored: {faults[0].reason}.")
    if boundary_merges([row], columns, tokenizer):
        print(
            "note: tokenised jointly, prompt and response would share a token; a response that "
            "begins with a space usually avoids that."
        )
    (example,) = examples
    credits = token_credit(
        policy, reference, [(example.prompt, ids) for ids in example.completions], beta
    )
    responses = [
        inspector.Inspected(name, [tokenizer.decode([i]) for i in ids], credit)
        for name, ids, credit in zip(columns[1:], example.completions, credits, strict=True)
    ]
    for response in responses:
        print(f"\n{response.title} (β = {beta:g})\n{inspector.table(response)}")
    page = inspector.html(responses, row[1]["prompt"], beta, config.policy, config.reference)
    try:
        with open(config.html, "w", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        raise InputError(f"Cannot write {config.html}: {error.strerror}.") from error
    print(f"\nheat map: {os.path.abspath(config.html)}")


def chosen_row(config: InspectConfig) -> tuple[tuple[int, dict], tuple[str, ...]]:
    """The numbered row to inspect, and its columns."""
    if config.data is None:
        return (1, {"prompt": config.prompt, "completion": config.response}), SFT_COLUMNS
    rows = dict(read_rows(config.data, PREFERENCE_COLUMNS))
    if config.row not in rows:
        raise InputError(f"{config.data} has no row {config.row}; it has rows 1 to {max(rows)}.")
    return (config.row, rows[config.row]), PREFERENCE_COLUMNS


def trained_beta(policy: str) -> float:
    """The β in the policy's qlearn.yaml, else TRL's default, said aloud."""
    path = os.path.join(policy, "qlearn.yaml")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
        if isinstance(settings, dict) and "beta" in settings:
            return float(settings["beta"])
    print(f"note: {policy} does not say its β; using {TRL_BETA} (pass --beta for another).")
    return TRL_BETA
