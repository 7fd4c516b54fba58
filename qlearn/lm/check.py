"""`qlearn data check`: what is in a file of rows, and what is wrong with it, before training."""

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from qlearn.lm.data import (
    PREFERENCE_COLUMNS,
    SFT_COLUMNS,
    begins_typed,
    boundary_merges,
    check_quarantine,
    encode,
    read_rows,
    require_columns,
)
from qlearn.lm.tokenizers import load_tokenizer


@dataclass(frozen=True)
class CheckConfig:
    """Settings of `qlearn data check FILE`."""

    data: str = field(metadata={"help": "a .jsonl or .parquet file, or a hub id[:split]"})
    tokenizer: str = field(
        default="EleutherAI/pythia-14m",
        metadata={"help": "a directory or hub id; slots or trips for the embedded worlds"},
    )
    max_length: int = field(default=2048, metadata={"help": "the longest row in tokens"})
    max_quarantine: float = field(
        default=0.01, metadata={"help": "the share of unusable rows at which training would end"}
    )


def run(config: CheckConfig) -> None:
    """Prints the report; raises InputError where training would refuse the file."""
    rows = read_rows(config.data, ("prompt",))
    columns = columns_of(rows)
    require_columns(rows, columns, config.data)
    tokenizer = load_tokenizer(config.tokenizer)
    examples, faults = encode(rows, columns, tokenizer, config.max_length)
    print(f"{config.data}: {len(rows)} rows of {', '.join(columns)}")
    print(f"usable rows: {len(examples)}")
    for name, lengths in token_lengths(examples, columns).items():
        low, mid, high = np.percentile(lengths, [0, 50, 100]).astype(int)
        print(f"  {name:10} tokens: least {low}, median {mid}, most {high}")
    bad = {fault.row for fault in faults}
    good = [(number, row) for number, row in rows if number not in bad]
    _list("boundary merges", boundary_merges(examples))
    _list("begin tokens typed (each counts once)", begins_typed(examples))
    _list("duplicates", duplicates(good, columns))
    print(f"quarantined rows: {len(faults)}")
    for reason, count in Counter(fault.reason for fault in faults).most_common():
        at = [fault.row for fault in faults if fault.reason == reason]
        print(f"  {count} x {reason} (row {', '.join(map(str, at[:8]))}{', ...' * (count > 8)})")
    check_quarantine(faults, len(rows), config.max_quarantine, config.data)


def columns_of(rows) -> tuple[str, ...]:
    """Preference columns where any row has one of them, else supervised ones."""
    keys = {key for _, row in rows if isinstance(row, dict) for key in row}
    return PREFERENCE_COLUMNS if keys & {"chosen", "rejected"} else SFT_COLUMNS


def duplicates(rows, columns) -> list[int]:
    """Numbers of the rows whose columns all equal those of an earlier row."""
    seen, again = set(), []
    for number, row in rows:
        text = json.dumps([row[column] for column in columns], sort_keys=True)
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
