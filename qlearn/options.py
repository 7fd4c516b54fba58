"""How a configuration declares a field: its default, its sentence in `--help`, its range.

The checks that every configuration needs stand here once. They raise InputError before any model
is read, so that a wrong flag costs a second and not the run.
"""

import math
import os
from dataclasses import field, fields

from qlearn.errors import InputError

LARGEST_SEED = 10**18  # what torch, numpy and random all take
BETAS = {"above": 1e-20, "below": 1e20}  # whose products with nats float32 holds


def option(
    default,
    text: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
):
    """A field of a configuration: its default, what `--help` says about it, and its range.

    `check_ranges` reads the range; a number outside it, or one that is not finite, is refused.
    """
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    return field(default=default, metadata={"help": text, "range": limits})


def required(text: str):
    """A field of a configuration that has no default."""
    return field(metadata={"help": text})


def check_ranges(config) -> None:
    """Raises InputError for the first field of a configuration that lies outside its range.

    A field that is None is not set, and passes.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Config:
    ...     beta: float = option(0.1, "the weight of the KL penalty", above=0)
    >>> check_ranges(Config(beta=-1.0))
    Traceback (most recent call last):
    qlearn.errors.InputError: beta must be positive and finite, not -1.0.
    """
    for f in fields(config):
        limits, value = f.metadata.get("range", {}), getattr(config, f.name)
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        if limits and value is not None and not _inside(value, **limits):
            raise InputError(f"{f.name} must {_in_words(**limits)}, not {value}.")


def _inside(value, above=-math.inf, at_least=-math.inf, below=math.inf, at_most=math.inf) -> bool:
    # A huge integer cannot become a float; it compares well without.
    finite = isinstance(value, int) or math.isfinite(value)
    return finite and above < value < below and at_least <= value <= at_most


def _in_words(above=None, at_least=None, below=None, at_most=None) -> str:
    low, high = (at_least, above), (at_most, below)
    if high == (None, None):
        if low == (None, 0):
            return "be positive and finite"
        return "not be negative" if low == (0, None) else f"be at least {at_least:g}"
    left = f"[{at_least:g}" if above is None else f"({above:g}"
    right = f"{at_most:g}]" if below is None else f"{below:g})"
    return f"lie in {left}, {right}"


def check_text(what: str, text: str) -> None:
    """Raises InputError where a text holds half a character, which no tokenizer can read.

    Such lone surrogates come from a command line that is not UTF-8 and from cut JSON escapes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} is not valid text: character {error.start + 1} is half of a character "
            "(a lone surrogate); write it in UTF-8."
        ) from error


def same_place(path: str, other: str | None) -> bool:
    """Whether two paths lead to one file or directory, through links too; None leads nowhere."""
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def check_output(flag: str, path: str, *others: str | None) -> None:
    """Raises InputError where no file can be written at `path`: asked before the work, not after.

    `flag` is the one to change, as `--html`. `others` are the files that are read, or written too.
    """
    folder = os.path.dirname(path) or "."
    if not path:
        raise InputError(f"{flag} is empty; name a file, or leave it out.")
    if any(same_place(path, other) for other in others):
        problem = "another flag names the same file"
    elif os.path.isdir(path):
        problem = "it is a directory"
    elif not os.path.isdir(folder):
        problem = f"there is no directory {folder}"
    elif not os.access(path if os.path.exists(path) else folder, os.W_OK):
        problem = "permission denied"
    else:
        return
    raise InputError(f"Cannot write {path}: {problem}; pass another {flag}.")


def write_text(flag: str, path: str, text: str) -> None:
    """Writes a file in UTF-8. Raises InputError where that fails.

    A path that is not text, which a page may name, is written with a replacement.
    """
    try:
        with open(path, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}; pass another {flag}.") from error
