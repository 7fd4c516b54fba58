"""Measured numbers: JSON files that `make results` writes and that every sentence quotes from."""

import json
import math
from importlib.resources import files

# seconds: what a reader is told, in words that another machine would not change
DURATIONS = {
    5: "5 seconds", 10: "10 seconds", 15: "15 seconds", 20: "20 seconds", 30: "half a minute",
    45: "three quarters of a minute", 60: "a minute", 90: "a minute and a half", 120: "two minutes",
    180: "three minutes", 300: "five minutes", 600: "ten minutes", 1200: "twenty minutes",
    1800: "half an hour", 3600: "an hour",
}  # fmt: skip


def load(name: str) -> dict:
    """The results file NAME.json of this package; ValueError where there is none."""
    file = files(__name__) / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"There is no results file {name}.json in qlearn/results.")
    return json.loads(file.read_text(encoding="utf-8"))


def lookup(reference: str):
    """What the results file NAME.json holds at `NAME:dotted.key`; ValueError where nothing."""
    name, _, path = reference.partition(":")
    value = load(name)
    try:
        for key in path.split("."):
            value = value[int(key) if isinstance(value, list) and key.isdigit() else key]
    except (LookupError, TypeError):
        raise ValueError(f"qlearn/results/{name}.json has no key {path!r}.") from None
    return value


def quote(reference: str) -> str:
    """`NAME:dotted.key:FORMAT` as text: the value at that key, printed with that format.

    FORMAT is one of Python's, or `duration`: seconds in words, as `duration` rounds them.
    """
    name, key, style = [*reference.split(":", 2), "", ""][:3]
    value = lookup(f"{name}:{key}")
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{key!r} in qlearn/results/{name}.json is not one number or word.")
    return duration(value) if style == "duration" else format(value, style)


def duration(seconds: float) -> str:
    """The round time next to `seconds` (by ratio) in words: 27 is "half a minute".

    Raises: ValueError where `seconds` is no number above 0.
    """
    if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ValueError(f"A duration must be a number of seconds above 0, not {seconds!r}.")
    return DURATIONS[min(DURATIONS, key=lambda known: abs(math.log(seconds / known)))]
