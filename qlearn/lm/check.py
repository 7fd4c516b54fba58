"""`qlearn data check`: what is in a file of rows, and what is wrong with it, before training."""

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
from transformers import AutoConfig

from qlearn.errors import InputError
from qlearn.lm.data import (
    PREFERENCE_COLUMNS,
    SFT_COLUMNS,
    Fault,
    begins_typed,
    boundary_merges,
    check_quarantine,
    encode,
    fault_of,
)
from qlearn.lm.pretrained import from_pretrained
from qlearn.lm.rows import preview_of, read_rows, require_columns
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.options import check_ranges, option, required

MAX_LENGTH = 2048  # tokens, where no model is named


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Settings of `qlearn data check FILE`."""

    data: str = required("a .jsonl or .parquet file, or a hub id[:split]")
    policy: str | None = option(
        None, "the model the rows are for: adds their lengths, up to its context"
    )
    tokenizer: str | None = option(
        None, "adds the lengths: a directory or hub id; slots or trips for the embedded worlds"
    )
    max_length: int | None = option(
        None, "the longest row in tokens; default: the policy's context, else 2048", at_least=1
    )
    max_quarantine: float = option(
        0.01, "the share of unusable rows at which training would end", at_least=0, at_most=1
    )

    def __post_init__(self):
        check_ranges(self)
        if self.max_length and not (self.policy or self.tokenizer):
            raise InputError("max_length counts tokens; pass --policy or --tokenizer as well.")


def run(config: CheckConfig) -> None:
    """Prints the report; raises InputError where training would refuse the file.

    What is wrong with the structure of a file needs no tokenizer and no network.
    """
    rows = read_rows(config.data, ("prompt",))
    columns = columns_of(rows)
    require_columns(rows, columns, config.data)
    if config.policy or config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer or config.policy)
        examples, faults = encode(rows, columns, tokenizer, longest(config))
    else:
        tokenizer, examples, faults = None, [], structural_faults(rows, columns)
    bad = {fault.row for fault in faults}
    good = [(number, row) for number, row in rows if number not in bad]
    print(f"{config.data}: {len(rows)} rows of {', '.join(columns)}")
    print(f"usable rows: {len(good)}")
    if tokenizer is None:
        print("  lengths and tokens: pass --policy DIR or --tokenizer")
    else:
        for name, lengths in token_lengths(examples, columns).items():
            low, mid, high = np.percentile(lengths, [0, 50, 100]).astype(int)
            print(f"  {name:10} tokens: least {low}, median {mid}, most {high}")
        _list("boundary merges", boundary_merges(examples))
        _list("begin tokens typed (each counts once)", begins_typed(examples))
    _list("duplicates", duplicates(good, columns))
    print(f"quarantined rows: {len(faults)}")
    for reason, count in Counter(fault.reason for fault in faults).most_common():
        at = [fault.row for fault in faults if fault.reason == reason]
        print(f"  {count} x {reason} (row {', '.join(map(str, at[:8]))}{', ...' * (count > 8)})")
    check_quarantine(faults, len(rows), config.max_quarantine, config.data)


def structural_faults(rows, columns) -> list[Fault]:
    """The rows that no tokenizer could make usable."""
    reasons = ((number, row, fault_of(row, columns)) for number, row in rows)
    return [Fault(number, reason, preview_of(row)) for number, row, reason in reasons if reason]


def longest(config: CheckConfig) -> int:
    """The longest row allowed, in tokens."""
    if config.max_length or not config.policy:
        return config.max_length or MAX_LENGTH
    settings = from_pretrained(AutoConfig, config.policy, "model configuration")
    return getattr(settings.get_text_config(), "max_position_embeddings", MAX_LENGTH)


def columns_of(rows) -> tuple[str, ...]:
    """Preference columns where any row has one of them, else supervised ones."""
    keys = {key for _, row in rows if isinstance(row, dict) for key in row}
    return PREFERENCE_COLUMNS if keys & {"chosen", "rejected"} else SFT_COLUMNS


def duplicates(rows, columns) -> list[int]:
    """Numbers of the rows whose columns all equal those of an earlier row."""
    seen, again = set(), []
    for number, row in rows:
        text = json.dumps([row[column] for column in columns], sort_keys=True, default=str)
        if text in seen:
            again.append(number)
        seen.add(text)
    return again


def token_lengths(examples, columns) -> dict[str, list[int]]:
    """Tokens of each column over all usable rows, end of text included."""
    if not examples:
        return {}
    lengths = {"prompt": [len(e.prompt) for e in examples]}
    for i, column in enumerate(columns[1:]):
        lengths[column] = [len(e.completions[i]) for e in examples]
    return lengths


def _list(what: str, rows: list[int]) -> None:
    where = f" (row {', '.join(map(str, rows[:8]))}{', ...' * (len(rows) > 8)})" if rows else ""
    print(f"{what}: {len(rows)}{where}")
