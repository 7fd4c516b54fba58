"""Exercises of the chapter "Borrowed advantages"."""

import math
import random

import torch
from torch import Tensor

from qlearn.solutions import require_function


def solution_1(base, tuned, untuned, alpha):
    """p_base (p_tuned/p_untuned)^α, normalised."""
    weights = [b * (t / u) ** alpha for b, t, u in zip(base, tuned, untuned, strict=True)]
    return [w / sum(weights) for w in weights]


def check_1(answer) -> None:
    require_function(answer)
    base, tuned, untuned = [0.2, 0.5, 0.3], [0.7, 0.2, 0.1], [0.4, 0.4, 0.2]
    for alpha in (1.0, 2.0, 0.5, 0.0):
        got = answer(list(base), list(tuned), list(untuned), alpha)
        assert isinstance(got, list | tuple | Tensor) and len(got) == 3, (
            "Return one probability a token."
        )
        three = list(zip(base, tuned, untuned, strict=True))
        raw = [b * (t / u) ** alpha for b, t, u in three]
        if not math.isclose(sum(raw), 1.0, abs_tol=1e-6):
            assert not _close(got, raw), "Normalise: divide by Z, the sum over the tokens."
        typical = [
            ([b * (u / t) ** alpha for b, t, u in three], "Upside down: tuned over untuned."),
            (
                [b * t**alpha / u for b, t, u in three],
                "The exponent belongs to the whole ratio, untuned included.",
            ),
            ([b * t**alpha for b, t, u in three], "Where is the untuned model?"),
            ([(t / u) ** alpha for b, t, u in three], "Where is the base?"),
            (
                [(b * t / u) ** alpha for b, t, u in three],
                "The base has exponent 1, whatever α is.",
            ),
            (
                [b + alpha * (t - u) for b, t, u in three],
                "Differences of log-probabilities, not of probabilities.",
            ),
        ]
        expected = [w / sum(raw) for w in raw]
        for wrong, hint in typical:
            wrong = [w / sum(wrong) for w in wrong]
            if not _close(wrong, expected):
                assert not _close(got, wrong), hint
        assert _close(got, expected), (
            f"At α = {alpha:g} it is {[round(p, 4) for p in expected]}: base times "
            "(tuned/untuned)^α, normalised."
        )


def bug_2(base_logp: Tensor, advantage: Tensor, price: float) -> Tensor:
    """log π of one state's tokens, tilted by soft advantages at a price."""
    return (base_logp + price * advantage).log_softmax(-1)


def solution_2(base_logp: Tensor, advantage: Tensor, price: float) -> Tensor:
    """log π of one state's tokens, tilted by soft advantages at a price."""
    return (base_logp + advantage / price).log_softmax(-1)


def check_2(answer) -> None:
    require_function(answer)
    generator = torch.Generator().manual_seed(132)
    for price in (0.5, 2.0, 1.0):
        logits, advantage = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        base = logits.log_softmax(-1)
        got = answer(base, advantage, price)
        assert isinstance(got, Tensor) and got.shape == (5,), "Return one number a token."
        weights = base.exp() * (advantage / price).exp()
        assert (got - weights.log()).abs().max() > 1e-9 or price != 0.5, (
            "Normalise: probabilities must sum to 1."
        )
        if price != 1.0:
            assert (got - bug_2(base, advantage, price)).abs().max() > 1e-9, (
                "Halve the price and this policy moves less from the base. Should it?"
            )
        alone = (advantage / price).log_softmax(-1)
        assert (got - alone).abs().max() > 1e-9, "Where is the base?"
        assert (got - (weights / weights.sum()).log()).abs().max() < 1e-9, (
            "Each probability should be that of the base times exp(advantage/price), normalised."
        )


def solution_3(tuned, untuned, alpha):
    """log Σ p_untuned^(1−α) p_tuned^α."""
    return math.log(sum(u * (t / u) ** alpha for t, u in zip(tuned, untuned, strict=True)))


def check_3(answer) -> None:
    require_function(answer)
    tuned, untuned = [0.7, 0.2, 0.1], [0.3, 0.4, 0.3]
    for alpha in (2.0, 0.5, 1.0, 0.0, 3.0):
        got = answer(list(tuned), list(untuned), alpha)
        assert isinstance(got, int | float), "Return one number."
        pairs = list(zip(tuned, untuned, strict=True))
        expected = math.log(sum(u ** (1 - alpha) * t**alpha for t, u in pairs))
        typical = [
            (-expected, "The sign: log Z itself, which the mixture subtracts."),
            (math.exp(expected), "That is Z. Take the logarithm."),
            *(
                (
                    math.log(sum(weight * (t / u) ** alpha for weight, (t, u) in rows)),
                    "The base weighs each token, and here the base is the untuned model.",
                )
                for rows in ([(1.0, x) for x in pairs], [(x[0], x) for x in pairs])
            ),
            (
                alpha * sum(u * math.log(t / u) for t, u in pairs),
                "A mean of logarithms is not the logarithm of a mean.",
            ),
            (
                math.log(sum(t ** (1 - alpha) * u**alpha for t, u in pairs)),
                "Tuned and untuned are swapped.",
            ),
        ]
        for wrong, hint in typical:
            if not math.isclose(wrong, expected, abs_tol=1e-9):
                assert not math.isclose(got, wrong, abs_tol=1e-9), hint
        assert math.isclose(got, expected, abs_tol=1e-9), (
            f"At α = {alpha:g} it is {expected:.4f}. It is 0 at 0 and 1, negative between, "
            "positive beyond."
        )


def solution_4(base, tuned, untuned, alpha):
    """π°(a|s₀) ∝ p_base (p_tuned/p_untuned)^α e^{W(s')}."""

    def weights(s):  # of each token, what may follow included
        return {
            a: p * (tuned[s][a] / untuned[s][a]) ** alpha * ahead((*s, a))
            for a, p in base[s].items()
        }

    def ahead(s):  # e^W
        return sum(weights(s).values()) if s in base else 1.0

    first = weights(())
    return {a: w / sum(first.values()) for a, w in first.items()}


def check_4(answer) -> None:
    require_function(answer)
    for seed in range(5):
        base, tuned, untuned = (_model(f"{seed} {name}") for name in ("base", "tuned", "untuned"))
        for alpha in (2.0, 0.5, 1.0):
            got = answer(base, tuned, untuned, alpha)
            assert isinstance(got, dict) and set(got) == set(base[()]), (
                "Return {token: probability} with the first tokens as keys."
            )
            whole = dict.fromkeys(base[()], 0.0)  # by enumeration of responses
            for y in _responses(base):
                p = _probability(base, y)
                p *= (_probability(tuned, y) / _probability(untuned, y)) ** alpha
                whole[y[0]] += p
            tokens = {a: b * (tuned[()][a] / untuned[()][a]) ** alpha for a, b in base[()].items()}
            by_token, expected = (
                [w[a] / sum(w.values()) for a in base[()]] for w in (tokens, whole)
            )
            found = [got[a] for a in base[()]]
            assert not _close(found, by_token), (
                "That is the mixture itself: each first token still needs the weight of all that "
                "can follow it."
            )
            raw = list(whole.values())
            assert not _close(found, raw) or _close(raw, expected), "Normalise the first token."
            assert _close(found, expected), (
                f"At α = {alpha:g} it is {[round(p, 4) for p in expected]}: add up base times "
                "(tuned/untuned)^α over all responses that begin so."
            )


def _close(one, two) -> bool:
    return all(math.isclose(x, y, abs_tol=1e-9) for x, y in zip(one, two, strict=True))


def _model(name: str, longest: int = 3) -> dict[tuple, dict[str, float]]:
    """A random policy over a, b and end, of at most `longest` tokens."""
    rng, table, alive = random.Random(name), {}, [()]
    for _ in range(longest):
        for s in alive:
            weights = [0.1 + rng.random() ** 3 for _ in range(3)]
            table[s] = {a: w / sum(weights) for a, w in zip("ab.", weights, strict=True)}
        alive = [(*s, a) for s in alive for a in "ab"]
    return table


def _responses(model):
    return [(*s, a) for s, row in model.items() for a in row if (*s, a) not in model]


def _probability(model, y) -> float:
    return math.prod(model[y[:t]][y[t]] for t in range(len(y)))
