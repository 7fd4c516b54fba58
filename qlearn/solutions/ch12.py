"""Exercises of the chapter "Search"."""

import itertools
import math
import random

from qlearn.solutions import require_function


def solution_1(reward, ref_logp, beta):
    """J of always giving one response: its return, less β log 1/π_ref of it."""
    return sum(reward) + beta * sum(ref_logp)


def check_1(answer) -> None:
    require_function(answer)
    reward, ref_logp = [0.5, -1.0, 2.0], [-0.7, -2.0, -0.3]
    for beta in (0.4, 2.0):
        got = answer(reward, ref_logp, beta)
        assert isinstance(got, int | float), "Return one number."
        typical = {
            1.5: "That is the return. The objective also charges for leaving the reference.",
            1.5 + 3.0 * beta: "Wrong sign: a rare response costs more, not less.",
            1.5 - 3.0: "Where is β? A nat costs β.",
            1.5 - beta: "Add up the tokens; a mean over them is another objective.",
            0.5 - beta: "Add up the tokens; a mean over them is another objective.",
        }
        for wrong, hint in typical.items():
            assert not math.isclose(got, wrong, abs_tol=1e-9), hint
        assert math.isclose(got, 1.5 - 3.0 * beta, abs_tol=1e-9), (
            f"For {reward}, {ref_logp} and β = {beta} it is {1.5 - 3.0 * beta:.1f}. The policy "
            "gives the response with probability 1, so log π of it is 0."
        )


def bug_2(logp, width):
    """The likeliest response that a beam of `width` finds: a tuple of tokens."""
    alive = {(): 0.0}
    while True:
        grown = {
            (*y, token): total + p
            for y, total in alive.items()
            for token, p in logp(y).items()
        }  # fmt: skip
        kept = sorted(grown, key=grown.get, reverse=True)[:width]
        finished = [y for y in kept if y[-1] == "end"]
        if finished:
            return finished[0]
        alive = {y: grown[y] for y in kept}


def solution_2(logp, width):
    """The likeliest response that a beam of `width` finds: a tuple of tokens."""
    alive, best, score = {(): 0.0}, None, -math.inf
    while alive and max(alive.values()) > score:  # totals only fall
        grown = {
            (*y, token): total + p
            for y, total in alive.items()
            for token, p in logp(y).items()
        }  # fmt: skip
        kept = sorted(grown, key=grown.get, reverse=True)[:width]
        for y in kept:
            if y[-1] == "end" and grown[y] > score:
                best, score = y, grown[y]
        alive = {y: grown[y] for y in kept if y[-1] != "end"}
    return best


def check_2(answer) -> None:
    require_function(answer)
    for seed in range(20):
        logp = _policy(seed)
        total = {y: _total(logp, y) for y in _responses()}
        for width, name in ((1, "Width 1 is"), (2, "Width 2 finds"), (100, "All prefixes kept is")):
            got = answer(logp, width)
            assert isinstance(got, tuple) and got in total, (
                f'Return a response as a tuple of tokens that ends with "end", not {got!r}.'
            )
            expected = max(total, key=total.get) if width == 100 else solution_2(logp, width)
            assert total[got] <= total[expected] + 1e-9, (
                f"Yours finds {got}, which a beam of width {width} loses. Rank all continuations "
                "together: one that has ended takes a place in its step."
            )
            assert got == expected, (
                f"{name} {expected} with log-probability {total[expected]:.2f}; yours is {got} "
                f"with {total[got]:.2f}. Can an unfinished text still win when another has ended?"
            )


def solution_3(logp, tau, beta, value):
    """V* − β KL(q‖π*) for q ∝ π*^(1/τ)."""
    weights = [math.exp(p / tau) for p in logp]
    q = [w / sum(weights) for w in weights]
    kl = sum(x * (math.log(x) - p) for x, p in zip(q, logp, strict=True) if x > 0)
    return value - beta * kl


def check_3(answer) -> None:
    require_function(answer)
    probability, beta, value = [0.5, 0.2, 0.2, 0.1], 0.5, 1.3
    logp = [math.log(p) for p in probability]
    for tau in (1.0, 0.5, 2.0, 0.1):
        got = answer(logp, tau, beta, value)
        assert isinstance(got, int | float), "Return one number."
        q = [p ** (1 / tau) for p in probability]
        q = [x / sum(q) for x in q]
        pairs = list(zip(q, probability, strict=True))
        kl = sum(x * math.log(x / p) for x, p in pairs if x > 0)
        back = sum(p * math.log(p / x) for x, p in pairs)
        upside_down = [p**tau for p in probability]
        upside_down = [x / sum(upside_down) for x in upside_down]
        typical = [
            (value - beta * back, "KL(π*‖q) is the wrong way round: the lines are drawn from q."),
            (value + beta * kl, "Nothing beats V*: check the sign."),
            (value - kl, "Where is β?"),
            (
                value + beta * sum(x * math.log(p) for x, p in pairs),
                "The divergence has log q too: the entropy of q is missing.",
            ),
            (
                value
                - beta
                * sum(x * math.log(x / p) for x, p in zip(upside_down, probability, strict=True)),
                "Dividing by a small τ makes a distribution sharper: π*^(1/τ).",
            ),
        ]
        expected = value - beta * kl
        for wrong, hint in typical:
            if not math.isclose(wrong, expected, abs_tol=1e-6):
                assert not math.isclose(got, wrong, abs_tol=1e-6), hint
        assert math.isclose(got, expected, abs_tol=1e-6), (
            f"At τ = {tau} it is {expected:.4f}: V* less β times how far q is from π*."
        )


def solution_4(prefix):
    """Two good beginnings keep a better end out of the beam."""
    even = {"a": math.log(1 / 2), "b": math.log(1 / 2)}
    third = dict.fromkeys("abc", math.log(1 / 3))
    if len(prefix) == 3:
        return {"end": 0.0}
    if not prefix:
        return {"a": math.log(0.51), "b": math.log(0.49)}
    if len(prefix) == 1:
        return third if prefix == ("a",) else even
    return {"a": 0.0} if prefix[0] == "a" else third


def check_4(answer) -> None:
    require_function(answer)
    alive, longest = [()], 6
    for _ in range(longest):
        longer = []
        for prefix in alive:
            row = answer(prefix)
            assert isinstance(row, dict) and row, (
                f"For the prefix {prefix} return a dictionary {{token: log-probability}}."
            )
            total = sum(math.exp(p) for p in row.values())
            assert abs(total - 1) < 1e-6, f"After {prefix} the probabilities sum to {total:.4f}."
            longer += [(*prefix, token) for token in row if token != "end"]
        alive = longer
    assert not alive, f'Every response must reach "end" within {longest} tokens.'
    one, two = (solution_2(answer, width) for width in (1, 2))
    assert one and two, "A beam found no response."
    narrow, wide = _total(answer, one), _total(answer, two)
    assert wide < narrow - 1e-9, (
        f"Width 1 finds {one} with {narrow:.3f}, width 2 {two} with {wide:.3f}. Let the second "
        "beginning have two children that both beat the children of the first."
    )


def _responses(longest: int = 3):
    """All responses over a, b and end, of at most `longest` words before the end."""
    for n in range(longest + 1):
        for words in itertools.product("ab", repeat=n):
            yield (*words, "end")


def _policy(seed: int, longest: int = 3):
    """A random policy: prefix to {token: log-probability}."""
    rng = random.Random(seed)
    table = {}
    for y in _responses(longest):
        weights = [rng.random() ** 2 + 1e-3 for _ in range(3)]
        tokens = ("a", "b", "end")
        table[y[:-1]] = {
            token: math.log(w / sum(weights)) for token, w in zip(tokens, weights, strict=True)
        }
        if len(y) == longest + 1:
            table[y[:-1]] = {"end": 0.0}
    return table.__getitem__


def _total(logp, y) -> float:
    return sum(logp(y[:t])[y[t]] for t in range(len(y)))
