"""Solutions to "Who gets the credit?"."""

import math
from itertools import pairwise

from torch import Tensor

from qlearn.solutions import require_function


def solution_1(pay, p, beta):
    """Each word's pay less the soft mean of all of them."""
    expected = beta * math.log(sum(q * math.exp(x / beta) for x, q in zip(pay, p, strict=True)))
    return [x - expected for x in pay]


def check_1(answer):
    require_function(answer)
    for pay, p, beta in (([0.5, -1.0], [0.35, 0.65], 0.5), ([0.3, -0.6], [0.94, 0.06], 0.5),
                         ([1.0, 0.0, -2.0], [0.2, 0.5, 0.3], 0.1)):  # fmt: skip
        got = answer(pay, p, beta)
        assert _is_row(got) and len(got) == len(pay), "Return one number a word, a list."
        assert not _close(got, pay), (
            "That is the pay. What is the forecast before the word? Subtract it."
        )
        mean = sum(q * x for x, q in zip(pay, p, strict=True))
        assert not _close(got, [x - mean for x in pay]), (
            "You subtracted the plain mean. The forecast of the optimal policy is the soft mean, "
            "β log E exp(pay/β)."
        )
        expected = solution_1(pay, p, beta)
        assert not _close(got, [x / beta for x in expected]), (
            "That is log π/π_ref, in nats; credit is β times as much."
        )
        assert _close(got, expected), (
            f"For pay {pay}, probabilities {p} and β = {beta} the credits are {_round(expected)}, "
            f"not {_round(got)}."
        )


def solution_2(scores, edited):
    """All pairs (edited, other): a win counts 1, a tie ½."""
    hits = [s for s, e in zip(scores, edited, strict=True) if e]
    others = [s for s, e in zip(scores, edited, strict=True) if not e]
    wins = sum((h > o) + (h == o) / 2 for h in hits for o in others)
    return wins / (len(hits) * len(others))


def check_2(answer):
    require_function(answer)
    for scores, edited, expected in (
        ([3.0, 1.0, 2.0, 0.0], [True, False, False, False], 1.0),
        ([1.0, 1.0, 0.0, 2.0], [True, False, False, False], 0.5),
        ([0.2, 0.9, 0.2, 0.5, 0.2], [True, True, False, False, False], 4 / 6),
    ):
        got = answer(scores, edited)
        assert isinstance(got, int | float), "Return one number."
        ties = sum(a == b for a, e in zip(scores, edited, strict=True) if e
                   for b, f in zip(scores, edited, strict=True) if not f)  # fmt: skip
        pairs = sum(edited) * (len(edited) - sum(edited))
        for share, said in ((-0.5, "not at all"), (0.5, "as wins")):
            off = expected + share * ties / pairs
            assert not ties or not math.isclose(got, off, abs_tol=1e-9), (
                f"You counted ties {said}. A tie counts half, so that a score that says nothing "
                "gets 0.5."
            )
        assert math.isclose(expected, 0.5) or not math.isclose(got, 1 - expected, abs_tol=1e-9), (
            "The wrong way round: count how often the edited word scores higher."
        )
        assert math.isclose(got, expected, abs_tol=1e-9), (
            f"For scores {scores} with edited {edited} it is {expected:.4f}, not {got:.4f}."
        )


def bug_3(forecast):
    """Each word's credit, from the forecasts before and after it."""
    words = range(len(forecast) - 1)
    return [forecast[t] - forecast[t - 1] for t in words]


def solution_3(forecast):
    """Word t takes the forecast from entry t to entry t + 1."""
    return [after - before for before, after in pairwise(forecast)]


def check_3(answer):
    require_function(answer)
    for forecast in ([0.5, 0.5, -0.8, -0.8], [1.0, 0.0, 0.25, 0.25, 2.0]):
        got = answer(list(forecast))
        words = len(forecast) - 1
        assert _is_row(got) and len(got) == words, (
            f"{len(forecast)} forecasts make {words} words: the first is the prompt's."
        )
        expected = [forecast[t + 1] - forecast[t] for t in range(words)]
        late = [forecast[t] - forecast[t - 1] for t in range(words)]
        assert not _close(got, late), (
            f"For forecasts {forecast} the blame lands one word late. And what does index −1 read "
            "at the first word?"
        )
        assert not _close(got, [-x for x in expected]), "The sign: credit is after minus before."
        assert _close(got, expected), f"For forecasts {forecast} the credits are {expected}."


def solution_4(q, p, beta):
    """Credit is the forecast after the first bit less the forecast before it."""
    after = {
        0: beta * math.log(p * math.exp(1 / beta) + 1 - p),  # a 1 pays
        1: beta * math.log((1 - p) * math.exp(1 / beta) + p),  # a 0 pays
    }
    mean = q * math.exp(after[1] / beta) + (1 - q) * math.exp(after[0] / beta)
    return after[1] - beta * math.log(mean)


def check_4(answer):
    require_function(answer)
    for q, p, beta in ((0.2, 0.7, 0.5), (0.5, 0.9, 0.5), (0.7, 0.2, 1.0), (0.9, 0.99, 0.2)):
        got = answer(q, p, beta)
        assert isinstance(got, int | float), "Return one number."
        expected = solution_4(q, p, beta)
        for other, hint in (
            (solution_4(1 - q, 1 - p, beta), "That is the credit of a first bit 0. After a 1 it is "
             "the second bit 0 that pays, and the reference writes it with probability 1 − p."),
            (solution_4(q, 1 - p, beta), "After a 1 it is the second bit 0 that pays, and the "
             "reference writes it with probability 1 − p."),
            (solution_4(0.5, p, beta), "You took the first bit for a fair coin. The forecast "
             "before it is a soft mean with weights q and 1 − q."),
        ):  # fmt: skip
            mistaken = math.isclose(got, other, abs_tol=1e-9)
            assert not mistaken or math.isclose(other, expected, abs_tol=1e-9), hint
        assert math.isclose(got, expected, abs_tol=1e-9), (
            f"At q = {q}, p = {p} and β = {beta} the credit of a first bit 1 is {expected:.4f}, "
            f"not {got:.4f}: the forecast after it, less the forecast before it, each a soft mean."
        )


def _is_row(got):
    return isinstance(got, list | tuple | Tensor)


def _close(a, b):
    return len(a) == len(b) and all(
        math.isclose(x, y, abs_tol=1e-9) for x, y in zip(a, b, strict=True)
    )


def _round(values):
    return [round(x, 4) for x in values]
