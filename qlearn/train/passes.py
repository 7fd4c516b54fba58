"""How an update's rows are split into passes through the model: rows of like length together.

The split changes no number: the mean is over the update, whatever its passes. It only decides how
much padding is computed, and the most tokens that are in memory at once.
"""

from collections.abc import Sequence

from qlearn.errors import InputError


def passes(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row indices of each pass; padded to its longest row, none has more than `budget` tokens.

    Rows are taken in order of length and shared out evenly: as few passes as the budget allows,
    and of about equal size, since a small last pass would leave the machine idle.

    >>> passes([3, 9, 4, 8], budget=18)
    [[1, 3], [2, 0]]

    Raises: InputError where a row alone is over the budget, naming its index.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > budget:
        raise InputError(
            f"Row {order[0]} of the update has {lengths[order[0]]} tokens, more than the budget of "
            f"{budget} tokens a pass; raise the budget or lower --max-length."
        )
    fewest = len(_greedy(order, lengths, budget))
    # the smallest budget that still gives as few passes: the passes then are of about equal size
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        split = _greedy(order, lengths, middle)
        if len(split) <= fewest and all(lengths[part[0]] <= middle for part in split):
            high = middle
        else:
            low = middle + 1
    return _greedy(order, lengths, high)


def _greedy(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Fills one pass after the other, longest rows first; a pass's first row is its longest."""
    split: list[list[int]] = []
    for i in order:
        if split and lengths[split[-1][0]] * (len(split[-1]) + 1) <= budget:
            split[-1].append(i)
        else:
            split.append([i])
    return split
