"""Measured numbers: JSON files that `make results` writes and that every sentence quotes from."""

import json
from importlib.resources import files


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
    """`NAME:dotted.key:FORMAT` as text: the value at that key, printed with that format."""
    name, key, style = [*reference.split(":", 2), "", ""][:3]
    value = lookup(f"{name}:{key}")
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{key!r} in qlearn/results/{name}.json is not one number or word.")
    return format(value, style)
