"""Rows of a source: a JSONL or parquet file, or a hub id ("org/name" or "org/name:split").

A source that cannot be read ends with an `InputError`. A row that cannot be read, in a source that
can, is an `Unreadable` with the reason, and goes into quarantine with its number.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlearn.errors import InputError, reason_of
from qlearn.lm import hub

FILE_KINDS = (".jsonl", ".parquet")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^/\\]+)?")
# All that is ever read of a row; the last two go to a chat template, as in TRL.
COLUMNS = ("prompt", "completion", "chosen", "rejected", "tools", "chat_template_kwargs")
LONGEST_INTEGER = 4000  # digits; Python reads no more than 4,300
PREVIEW = 120  # characters of a row that a quarantine shows


@dataclass(frozen=True)
class Unreadable:
    """Stands in a source for a row that cannot be read: why, and how it begins."""

    reason: str
    preview: str


Row = dict | Unreadable | list | str | float | None  # what a line of JSON may hold


def read_rows(source: str, columns: Sequence[str]) -> list[tuple[int, Row]]:
    """Every row of a source with its number, from 1 (in JSONL the number of its line).

    Raises: InputError for a source that does not exist, a malformed line, an empty file, or a
    column that no row has.
    """
    kind = os.path.splitext(source)[1].lower()
    if kind in FILE_KINDS:
        if not os.path.isfile(source):
            raise InputError(f"There is no file {source}.")
        rows = list(_read_jsonl(source) if kind == ".jsonl" else _read_parquet(source))
    elif os.path.exists(source):
        raise InputError(f"{source} must be a .jsonl or .parquet file.")
    elif not HUB_ID.fullmatch(source):
        raise InputError(f"There is no file {source}, and no hub id is written like that.")
    else:
        rows = _read_hub(source)
    if not rows:
        raise InputError(f"{source} is empty: it holds no row.")
    require_columns(rows, columns, source)
    return rows


def require_columns(rows: Sequence[tuple[int, Row]], columns: Sequence[str], source: str) -> None:
    """Raises InputError where no row has one of the columns, saying what to do with those it has.

    Prompts are never guessed from what two completions share: where they part is the user's to say.
    """
    names = sorted({key for _, row in rows if isinstance(row, dict) for key in row})
    missing = [c for c in columns if c not in names]
    if not missing or all(isinstance(row, Unreadable) for _, row in rows):
        return  # rows that cannot be read have faults of their own
    if "prompt" in missing and {"chosen", "rejected"} <= set(names):
        raise InputError(
            f"{source} has no column prompt: its prompts are implicit, the beginning that chosen "
            "and rejected share. Move that beginning into a column prompt, as "
            "`dataset.map(trl.extract_prompt)` does."
        )
    if "messages" in names:
        raise InputError(
            f"{source} holds whole conversations in a column messages. Write all but the last "
            "message into a column prompt and the last, as a list of one, into completion."
        )
    raise InputError(
        f"{source} has no column {', '.join(missing)}; it has {', '.join(names) or 'none'}. "
        f"Rename its columns to {', '.join(columns)}."
    )


def preview_of(row: Row) -> str:
    """How a row begins."""
    if isinstance(row, Unreadable):
        return row.preview
    try:
        return str(row)[:PREVIEW]
    except RecursionError:
        return "..."


# --- the three kinds of source -----------------------------------------------------------------


def _read_jsonl(path: str) -> Iterator[tuple[int, Row]]:
    # A byte-order mark at the beginning is no part of the first row.
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parsed(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error.msg}).") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error.reason}).") from error


def _parsed(line: str) -> Row:
    """The row of one line of JSON. Raises json.JSONDecodeError where it is none."""
    try:
        return json.loads(line, object_pairs_hook=_object, parse_int=_integer)
    except _Twice as error:
        reason = f"the row names {error} twice"
    except RecursionError:
        reason = "the row is nested too deeply"
    return Unreadable(reason, line.strip()[:PREVIEW])


class _Twice(Exception):
    """An object of JSON that names a key twice; which of its values was meant is unknown."""


def _object(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return values


def _integer(digits: str) -> int | float:
    # Only a text is ever used; a number need not be exact to be refused, or ignored.
    return int(digits) if len(digits) <= LONGEST_INTEGER else float("inf")


def _read_parquet(path: str) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file ({reason_of(error)}).") from error
    names = table.column_names
    blank = dict.fromkeys(names)  # other columns are named but not read: their types are many
    known = table.select([name for name in names if name in COLUMNS])
    for start in range(table.num_rows):
        try:
            (row,) = known.slice(start, 1).to_pylist() or [{}]
            yield start + 1, blank | row
        except (UnicodeDecodeError, pyarrow.ArrowException, ValueError, OverflowError) as error:
            yield start + 1, Unreadable(f"the row cannot be read ({reason_of(error)})", "...")


def _read_hub(source: str) -> list[tuple[int, Row]]:
    import datasets

    name, _, split = source.partition(":")
    reached = hub.can_be_reached()
    try:
        table = datasets.load_dataset(name, split=split or "train")
        return list(enumerate(table, start=1))
    except Exception as error:  # the hub's many failures have no common class
        reason = reason_of(error) if reached else hub.reason()
        raise InputError(
            f"Could not read {source!r} as a file or from the hub; pass the path of a local .jsonl "
            f"or .parquet file instead ({reason})."
        ) from error
