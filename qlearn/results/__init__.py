"""Measured numbers: JSON files that `make results` writes and that every sentence quotes from."""

import json
from importlib.resources import files


def load(name: str) -> dict:
    """The results file NAME.json of this package; ValueError where there is none."""
    file = files(__name__) / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"There is no results file {name}.json in qlearn/results.")
    return json.loads(file.read_text(encoding="utf-8"))


def quote(reference: str) -> str:
    """`NAME:dotted.key:FORMAT` as text: the value at that key, printed with that format."""
    name, _, rest = reference.partition(":")
    key, _, style = rest.partition(":")
    try:
        value = _lookup(load(name), key.split("."))
    except (LookupError, TypeError):
        raise ValueError(f"qlearn/results/{name}.json has no key {key!r}.") from None
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{key!r} in qlearn/results/{name}.json is not one number or word.")
    return format(value, style)


def _lookup(value, keys):
    for key in keys:
        value = value[int(key) if isinstance(value, list) and key.isdigit() else key]
    return value
