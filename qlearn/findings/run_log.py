"""The log of a training run, ours or TRL's: found, read, and its oddities named."""

import json
from contextlib import contextmanager
from pathlib import Path

from qlearn.errors import InputError

OURS, TRLS = "metrics.jsonl", "trainer_state.json"


def read_metrics(run: str) -> list[dict]:
    """The logged lines of a run: metrics.jsonl, or log_history of the latest trainer_state.json.

    `run` is the directory, or the file itself.

    Raises: InputError where there is neither, or it cannot be read.
    """
    return _read(find_log(run))


def find_log(run: str) -> Path:
    """The log of a run: the file itself, ours, or that of TRL's checkpoint with the most steps."""
    root = Path(run)
    if not run:
        raise InputError("The run's directory is an empty name; pass a run's directory or its log.")
    if root.is_file():
        return root
    if not root.is_dir():
        raise InputError(f"There is no file or directory {run}; pass a run's directory or its log.")
    if (root / OURS).is_file():
        return root / OURS
    states = sorted(root.glob(f"**/{TRLS}"))
    if not states:
        raise InputError(f"{run} holds neither {OURS} nor {TRLS}; pass a run's directory.")
    if len(states) == 1:
        return states[0]

    def steps(path: Path) -> float:
        step = _read_json(path).get("global_step", 0)
        return step if is_finite(step) else 0

    return max(states, key=steps)


def _read(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        lines = []
        with _readable(path):
            for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
                if line.strip():
                    lines.append((number, json.loads(line)))
        for number, line in lines:
            if not isinstance(line, dict):
                raise InputError(
                    f"{path}, line {number}: not an object of logged numbers; is it a run's log?"
                )
        return [line for _, line in lines]
    log = _read_json(path).get("log_history")
    if not (isinstance(log, list) and all(isinstance(line, dict) for line in log)):
        raise InputError(
            f"{path} has no log_history, a list of objects with logged numbers; is it TRL's?"
        )
    return log


def _read_json(path: Path) -> dict:
    with _readable(path):
        state = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(state, dict):
        raise InputError(
            f"{path} holds {kind(state)}, not an object with a log_history; is it TRL's?"
        )
    return state


@contextmanager
def _readable(path: Path):
    """Any way in which a file cannot be read becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text; pass the run's log as it was written."
        ) from error
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path} cannot be read as JSON{where}; is it cut off?") from error


def is_finite(x) -> bool:
    """Whether a logged value is a number that can be reckoned with: no NaN, infinity, text."""
    number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return number and abs(x) < 1e100


def kind(x) -> str:
    """A logged value as it stands in a sentence.

    >>> kind(float("nan")), kind("0.1"), kind([1, 2])
    ('nan', 'a text', 'a list')
    """
    if isinstance(x, float):
        return f"{x:g}"
    names = {str: "a text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(x), f"a {type(x).__name__}")
