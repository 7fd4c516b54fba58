"""Preference and supervised data: read, validate, tokenise. Nothing is dropped without a word.

A source is a JSONL or parquet file or a hub id ("org/name" or "org/name:split") with text columns
`prompt, completion` (supervised) or `prompt, chosen, rejected` (preferences): TRL's names.

Faults of a file end the run with an `InputError`. Faults of a row put the row in quarantine with
its number and the reason; more of those than allowed also end the run.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlearn.errors import InputError, reason_of

SFT_COLUMNS = ("prompt", "completion")
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
FILE_KINDS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Example:
    """One row as token ids: the prompt, and one completion or a chosen and a rejected one.

    Completions end with the end-of-text token; `row` is the row's number in its source, from 1.
    """

    row: int
    prompt: list[int]
    completions: tuple[list[int], ...]


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used: its number in the source, why, and how it begins."""

    row: int
    reason: str
    preview: str


def read_rows(source: str, columns: Sequence[str]) -> list[tuple[int, dict]]:
    """Every row of a source with its number, from 1 (in JSONL the number of its line).

    Raises: InputError for a source that does not exist, a malformed line, an empty file, or a
    column that no row has.
    """
    if source.endswith(FILE_KINDS):
        if not os.path.isfile(source):
            raise InputError(f"There is no file {source}.")
        rows = list(_read_jsonl(source) if source.endswith(".jsonl") else _read_parquet(source))
    elif os.path.exists(source):
        raise InputError(f"{source} must be a .jsonl or .parquet file.")
    else:
        rows = _read_hub(source)
    if not rows:
        raise InputError(f"{source} is empty: it holds no row.")
    require_columns(rows, columns, source)
    return rows


def require_columns(rows: Sequence[tuple[int, dict]], columns: Sequence[str], source: str) -> None:
    """Raises InputError where no row has one of the columns, naming those that there are."""
    found = sorted({key for _, row in rows if isinstance(row, dict) for key in row})
    missing = [c for c in columns if c not in found]
    if missing:
        raise InputError(
            f"{source} has no column {', '.join(missing)}; it has {', '.join(found) or 'none'}. "
            f"Rename its columns to {', '.join(columns)}."
        )


def _read_jsonl(path: str) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error.msg}).") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error.reason}).") from error


def _read_parquet(path: str) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file ({reason_of(error)}).") from error
    yield from enumerate(table.to_pylist(), start=1)


def _read_hub(source: str) -> list[tuple[int, dict]]:
    import datasets

    name, _, split = source.partition(":")
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub's many failures have no common class
        raise InputError(
            f"Could not read {source!r} as a file or from the hub; pass the path of a local .jsonl "
            f"or .parquet file instead ({reason_of(error)})."
        ) from error
    return list(enumerate(table, start=1))


def fault_of(row: object, columns: Sequence[str], special: Sequence[str]) -> str | None:
    """Why a row cannot be used, in words, or None. `special` is text that would become a token."""
    if not isinstance(row, dict):
        return f"the row is a {type(row).__name__}, not an object with {', '.join(columns)}"
    for column in columns:
        value = row.get(column)
        if value is None:
            return f"{column} is missing or None"
        if not isinstance(value, str):
            return f"{column} is a {type(value).__name__}, not text"
        if not value.strip():
            return f"{column} is empty"
        for text in special:
            if text in value:
                return f"{column} contains the special token {text} as text"
    if len(columns) == 3 and row["chosen"] == row["rejected"]:
        return "chosen equals rejected, so the pair says nothing"
    return None


def encode(
    rows: Sequence[tuple[int, dict]],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[list[Example], list[Fault]]:
    """Validated token ids of every usable row, and the faults of all others.

    Prompt and completion are tokenised apart, so no token can straddle the boundary, and each
    completion ends with the end-of-text token. Nothing is ever cut: a row longer than `max_length`
    tokens is a fault, because a completion without its end has no terminal value.
    """
    special = tokenizer.all_special_tokens
    usable, faults = [], []
    for number, row in rows:
        reason = fault_of(row, columns, special)
        if reason:
            faults.append(Fault(number, reason, str(row)[:120]))
        else:
            usable.append((number, row))
    ids = {
        column: tokenizer([row[column] for _, row in usable], add_special_tokens=False).input_ids
        for column in columns
        if usable
    }
    examples = []
    for i, (number, row) in enumerate(usable):
        prompt = ids["prompt"][i]
        ends = tuple([*ids[column][i], tokenizer.eos_token_id] for column in columns[1:])
        reason = _token_fault(prompt, ends, columns, max_length)
        if reason:
            faults.append(Fault(number, reason, str(row)[:120]))
        else:
            examples.append(Example(number, prompt, ends))
    return examples, sorted(faults, key=lambda fault: fault.row)


def _token_fault(prompt, completions, columns, max_length) -> str | None:
    if not prompt:
        return "the prompt has no token"
    if len(prompt) >= max_length:
        return f"the prompt has {len(prompt)} tokens, longer than the context of {max_length}"
    for column, ids in zip(columns[1:], completions, strict=True):
        if len(prompt) + len(ids) > max_length:
            total = len(prompt) + len(ids)
            return f"prompt and {column} have {total} tokens, longer than the {max_length} allowed"
    if len(completions) == 2 and completions[0] == completions[1]:
        return "chosen and rejected become the same tokens"
    return None


def check_quarantine(faults: Sequence[Fault], n_rows: int, allowed: float, source: str) -> None:
    """Raises InputError where more than the allowed share of a source's rows is unusable."""
    if len(faults) > allowed * n_rows:
        first = faults[0]
        raise InputError(
            f"{source}: {len(faults)} of {n_rows} rows cannot be used (the first is row "
            f"{first.row}: {first.reason}), more than --max-quarantine {allowed:g} allows; look at "
            f"them with `qlearn data check {source}`."
        )


def boundary_merges(
    rows: Sequence[tuple[int, dict]], columns: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Numbers of the rows where tokenising prompt and completion jointly gives other tokens.

    There a model that was trained on joint text meets an unfamiliar boundary; a completion that
    begins with a space avoids it.
    """
    merged = []
    for number, row in rows:
        for column in columns[1:]:
            apart, joint = (
                [i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids]
                for texts in ((row["prompt"], row[column]), (row["prompt"] + row[column],))
            )
            if apart != joint:
                merged.append(number)
                break
    return merged


def as_pairs(examples: Sequence[Example], which: int = 0) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of each example's completion number `which`."""
    return [(example.prompt, example.completions[which]) for example in examples]
