"""Worked solutions of the book's exercises, one module a chapter, all of them tested.

For exercise k of chapter NN the module chNN holds `solution_k`, what the book shows folded away,
and `check_k(answer)`, which raises AssertionError with a hint where the answer is wrong.
"""

from qlearn.exact.tree import Levels, Tree


def require_function(answer: object) -> None:
    """Raises AssertionError with a hint unless the answer is a function."""
    assert callable(answer), "The answer should be a function, without its brackets."


def require_levels(field: object, tree: Tree) -> Levels:
    """The answer as an edge field of `tree`; AssertionError with a hint where it is none."""
    assert isinstance(field, tuple | list), "Return one table a level, in a tuple."
    shapes = [tuple(x.shape) for x in field]
    assert shapes == [tuple(x.shape) for x in tree.child], "One number for each state and token."
    return tuple(field)
