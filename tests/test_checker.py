"""The checker takes a right answer whoever holds its numbers: Python, numpy or torch."""

import importlib
from typing import NamedTuple

import numpy as np
import pytest
import torch

import qlearn
from qlearn import checker

from .edges import TESTED, check_refused, edge, public_names
from .test_solutions import EXERCISES


def as_numpy(x):
    """The same answer in numpy's types: scalars, and arrays for tensors."""
    if isinstance(x, bool):
        return np.bool_(x)
    if isinstance(x, float):
        return np.float64(x)
    if isinstance(x, int):
        return np.int64(x)
    return _inside(x, as_numpy, lambda tensor: tensor.detach().numpy())


def as_arrays(x):
    """Scalars as arrays without an axis."""
    return np.asarray(x) if isinstance(x, bool | int | float) else _inside(x, as_arrays)


def as_torch(x):
    """Scalars as tensors without an axis, in float64."""
    if isinstance(x, bool | int | float):
        return torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)
    return _inside(x, as_torch)


def _inside(x, change, of_tensor=lambda tensor: tensor):
    if isinstance(x, torch.Tensor):
        return of_tensor(x)
    if isinstance(x, tuple | list):
        return type(x)(change(y) for y in x)
    if isinstance(x, dict):
        return {key: change(y) for key, y in x.items()}
    return x


@pytest.mark.parametrize("change", [as_numpy, as_arrays, as_torch])
@pytest.mark.parametrize(("chapter", "number"), EXERCISES)
def test_bug_right_answers_in_other_types_are_right(chapter, number, change, capsys):
    """04.2 and 07.2 refused a right numpy.bool_; every exercise takes every kind of number."""
    solution = getattr(importlib.import_module(f"qlearn.solutions.{chapter}"), f"solution_{number}")

    def answer(*args, **settings):
        return change(solution(*args, **settings))

    answer = answer if callable(solution) else change(solution)
    exercise = f"{chapter.removeprefix('ch')}.{number}"
    qlearn.check(exercise, answer)
    assert capsys.readouterr().out == f"{exercise}: correct.\n"


@pytest.mark.parametrize("exercise", ["04.2", "07.2"])
def test_claim_a_wrong_numpy_bool_is_still_wrong(exercise):
    with pytest.raises(AssertionError):
        qlearn.check(exercise, lambda *args: np.bool_(True))
    with pytest.raises(AssertionError, match="True or False"):
        qlearn.check(exercise, lambda *args: 1.0)


class Pair(NamedTuple):
    a: object
    b: object


@edge(checker.plain, checker.check)
def test_claim_plain_keeps_values_and_kinds():
    for x, expected in (
        (np.bool_(True), True), (np.float32(0.5), 0.5), (np.int8(3), 3), (np.array(2.5), 2.5),
        (torch.tensor(False), False), (torch.tensor(7), 7), ("word", "word"), (None, None),
        ([np.float64(1.0)], [1.0]), ((np.int64(1), "end"), (1, "end")),
        ({"a": torch.tensor(1.0)}, {"a": 1.0}), (Pair(np.bool_(False), 1), Pair(False, 1)),
    ):  # fmt: skip
        got = checker.plain(x)
        assert got == expected and type(got) is type(expected)
    got = checker.plain(np.float32([1.5, 2.0]))
    assert got.dtype == torch.float64 and got.tolist() == [1.5, 2.0]
    assert checker.plain(np.array([1, 2])).tolist() == [1, 2]
    assert checker.plain(np.array([True])).dtype == torch.bool
    assert checker.plain(np.zeros((0, 2))).shape == (0, 2)


def test_claim_no_exercise_has_such_a_number():
    for bad in ("99.1", "04.9", "", "04", "x.y", 4.2, None, "04.2.1"):
        check_refused(lambda bad=bad: qlearn.check(bad, 0), "There is no exercise")


def test_claim_the_checker_has_edge_tests():
    assert public_names("qlearn.checker") - TESTED == set()
