"""The exercise checker: `qlearn.check("06.2", my_answer)`."""

import functools
import importlib

import numpy as np
import torch


def check(exercise: str, answer: object) -> None:
    """Says whether an answer to an exercise of the book is right, and where it is not, a hint.

    `exercise` is its number in the book, as "06.2"; what `answer` should be stands in the exercise.
    A number is a number whoever holds it: numpy's and torch's count as Python's, arrays as tensors.
    Raises: ValueError for an exercise that does not exist, AssertionError with a hint for a wrong
    answer.
    """
    chapter, _, number = str(exercise).partition(".")
    try:
        module = importlib.import_module(f"qlearn.solutions.ch{chapter}")
        judge = getattr(module, f"check_{number}")
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"There is no exercise {exercise!r}.") from error
    if answer is None:
        print(f"{exercise}: no answer yet.")
        return
    judge(_plain_function(answer) if callable(answer) else plain(answer))
    print(f"{exercise}: correct.")


def plain(x: object) -> object:
    """The same answer in Python's and torch's own types, which the checkers of exercises know.

    Scalars of numpy, and arrays and tensors without an axis, become bool, int or float; other
    arrays become tensors, in float64 where they hold floats; tuples, lists and dicts keep their
    kind.
    """
    if isinstance(x, np.generic) or (isinstance(x, np.ndarray | torch.Tensor) and not x.ndim):
        return x.item()
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x.astype(float) if x.dtype.kind == "f" else x.copy())
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list):
        return [plain(value) for value in x]
    if isinstance(x, tuple):
        values = [plain(value) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
    return x


def _plain_function(answer):
    @functools.wraps(answer, updated=())
    def answer_in_plain_types(*args, **kwargs):
        return plain(answer(*args, **kwargs))

    return answer_in_plain_types
