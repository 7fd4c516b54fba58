"""Preference and supervised data: validated and tokenised. Nothing is dropped without a word.

Rows have the columns `prompt, completion` (supervised) or `prompt, chosen, rejected` (preferences):
TRL's names. A column is a text or a list of messages, {"role": ..., "content": ...}, all columns of
a row alike. `qlearn.lm.rows` reads them.

Faults of a file end the run with an `InputError`. Faults of a row put the row in quarantine with
its number and the reason; more of those than allowed also end the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from qlearn.errors import InputError, reason_of
from qlearn.lm.encoding import Encoded, encode_messages, encode_rows, typed_begin
from qlearn.lm.rows import Unreadable, preview_of

SFT_COLUMNS = ("prompt", "completion")
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")


KINDS = {
    int: "a number", float: "a number", bool: "true or false", dict: "an object", list: "a list",
    str: "a text", bytes: "binary data", type(None): "null",
}  # fmt: skip


# Its own, and those of what a template does with messages that it does not expect.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class Example:
    """One row as token ids: the prompt, and one completion or a chosen and a rejected one.

    Completions of text end with the end-of-text token; `row` is the row's number in its source,
    from 1. `n_straddling` of the prompt's tokens went to the completions (see
    `qlearn.lm.encoding`), and `typed_begin` tells whether a begin token stood in the text.
    """

    row: int
    prompt: list[int]
    completions: tuple[list[int], ...]
    n_straddling: int = 0
    typed_begin: bool = False


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used: its number in the source, why, and how it begins."""

    row: int
    reason: str
    preview: str


def fault_of(
    row: object, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> str | None:
    """Why a row cannot be used, in words, or None.

    With a tokenizer also: text that would become a special token. A begin token at the front of the
    prompt is none, since the tokenizer begins a text so.
    """
    if isinstance(row, Unreadable):
        return row.reason
    if not isinstance(row, dict):
        return f"the row is {kind_of(row)}, not an object with {', '.join(columns)}"
    for column in columns:
        value = row.get(column)
        reason = _column_fault(value)
        if reason is None and tokenizer is not None:
            typed = typed_begin(tokenizer, value) if column == "prompt" else ""
            reason = _special_fault(value, typed, tokenizer.all_special_tokens)
        if reason:
            return f"{column} {reason}"
    kinds = {column: "messages" if isinstance(row[column], list) else "text" for column in columns}
    if len(set(kinds.values())) > 1:
        return ", ".join(f"{column} is {kind}" for column, kind in kinds.items()) + "; not both"
    if len(columns) == 3 and row["chosen"] == row["rejected"]:
        return "chosen equals rejected, so the pair says nothing"
    return None


def _column_fault(value: object) -> str | None:
    """What is wrong with a text or a list of messages, as "is empty"; or None."""
    if value is None:
        return "is missing or None"
    if not isinstance(value, str | list):
        return f"is {kind_of(value)}, not text"
    for message in value if isinstance(value, list) else ():
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "is a list, but not one of messages with role and content"
        if not isinstance(message.get("content"), str):
            kind = kind_of(message.get("content"))
            return f"has a message whose content is {kind}, not text"
    for text in texts_of(value):
        half = half_a_character(text)
        if half is not None:
            return f"has half a character (a lone surrogate) at character {half + 1}"
    return None if any(text.strip() for text in texts_of(value)) else "is empty"


def _special_fault(value: str | list, typed: str, special: Sequence[str]) -> str | None:
    for text in texts_of(value):
        for token in special:
            if token in text.removeprefix(typed):
                return f"contains the special token {token} as text"
    return None


def kind_of(value: object) -> str:
    """What a value of JSON or parquet is, in words: "a number", "an object"."""
    return KINDS.get(type(value), f"a {type(value).__name__}")


def half_a_character(text: str) -> int | None:
    """Where a text holds a lone surrogate, which no tokenizer can read, counted from 0; or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def texts_of(value: str | list[dict]) -> list[str]:
    """The texts of a column: itself, or the contents of its messages."""
    return [value] if isinstance(value, str) else [message["content"] for message in value]


def encode(
    rows: Sequence[tuple[int, dict]],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[list[Example], list[Fault]]:
    """Validated token ids of every usable row, and the faults of all others.

    `qlearn.lm.encoding` says which ids. Nothing is ever cut off: a row longer than `max_length`
    tokens is a fault, because a completion without its end has no terminal value.

    Raises: InputError where rows are messages and the tokenizer has no chat template.
    """
    rows = list(rows)  # read more than once
    reasons = [fault_of(row, columns, tokenizer) for _, row in rows]
    judged = list(zip(rows, reasons, strict=True))
    faults = [Fault(number, why, preview_of(row)) for (number, row), why in judged if why]
    usable = [numbered for numbered, why in judged if not why]
    examples = []
    all_ids = _ids_of([row for _, row in usable], columns, tokenizer)
    for (number, row), ids in zip(usable, all_ids, strict=True):
        reason = ids if isinstance(ids, str) else _token_fault(ids, columns, max_length)
        if reason:
            faults.append(Fault(number, reason, preview_of(row)))
        else:
            typed = bool(typed_begin(tokenizer, row["prompt"]))
            examples.append(Example(number, *ids, typed))
    return examples, sorted(faults, key=lambda fault: fault.row)


def _ids_of(
    rows: Sequence[dict], columns: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded | str]:
    """The ids of each row, of text or of messages, or why its chat template refuses it."""
    values = [tuple(row[column] for column in columns) for row in rows]
    texts = [value for value in values if isinstance(value[0], str)]
    if len(texts) < len(rows) and tokenizer.chat_template is None:
        raise InputError(
            "The rows are messages, but the tokenizer has no chat template that turns them into "
            "text; pass the tokenizer of a chat model with --tokenizer, or write the rows as text."
        )
    of_text = iter(encode_rows(tokenizer, texts))
    return [
        next(of_text) if isinstance(value[0], str) else _templated(row, value, tokenizer)
        for row, value in zip(rows, values, strict=True)
    ]


def _templated(row: dict, messages: tuple, tokenizer) -> Encoded | str:
    settings = row.get("chat_template_kwargs") or {}
    try:
        return encode_messages(tokenizer, messages, tools=row.get("tools"), **settings)
    except TEMPLATE_ERRORS as error:
        return f"the chat template refuses its messages: {reason_of(error)}"


def _token_fault(encoded: Encoded, columns, max_length) -> str | None:
    prompt, completions, _ = encoded
    if not prompt:
        return "the prompt has no token of its own"
    if len(prompt) > max_length:
        return f"the prompt has {len(prompt)} tokens, longer than the context of {max_length}"
    for column, ids in zip(columns[1:], completions, strict=True):
        if not ids:  # a template may write nothing for a message
            return f"the {column} has no token of its own"
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


def boundary_merges(examples: Sequence[Example]) -> list[int]:
    """Numbers of the rows in which a token straddles the seam of prompt and completion.

    There a model is trained on another end of the prompt than it reads when it writes; a completion
    that begins with a space, and a prompt that does not end with one, avoid it.
    """
    return [example.row for example in examples if example.n_straddling]


def begins_typed(examples: Sequence[Example]) -> list[int]:
    """Numbers of the rows whose prompt has a begin token typed at its front; it counts once."""
    return [example.row for example in examples if example.typed_begin]


def as_pairs(examples: Sequence[Example], which: int = 0) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of each example's completion number `which`."""
    return [(example.prompt, example.completions[which]) for example in examples]
