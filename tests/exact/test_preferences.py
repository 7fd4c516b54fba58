"""Bradley-Terry, Plackett-Luce and the exact preference loss against the textbook fractions."""

import math

import pytest
import torch

from qlearn.exact import preferences

SCORES = torch.tensor([1.3, -0.4, 0.2, 2.0], dtype=torch.float64)


def test_eq_01_bradley_terry_is_the_softmax_of_two():
    """p(w ≻ l) = exp R_w / (exp R_w + exp R_l)."""
    for winner in SCORES.tolist():
        for loser in SCORES.tolist():
            expected = math.exp(winner) / (math.exp(winner) + math.exp(loser))
            got = preferences.bradley_terry_logp(torch.tensor(winner), torch.tensor(loser))
            assert math.exp(got) == pytest.approx(expected, rel=1e-6)


def test_claim_plackett_luce_draws_without_replacement():
    """A ranking is a series of softmax draws, each from what is left; rankings sum to one."""
    from itertools import permutations

    total = 0.0
    for order in permutations(range(4)):
        left, expected = list(order), 1.0
        for k in order:
            expected *= math.exp(SCORES[k]) / sum(math.exp(SCORES[j]) for j in left)
            left.remove(k)
        got = preferences.plackett_luce_logp(SCORES[list(order)]).exp().item()
        assert got == pytest.approx(expected, abs=1e-14)
        total += got
    assert total == pytest.approx(1.0, abs=1e-12)
    pair = preferences.plackett_luce_logp(SCORES[:2])
    assert pair == pytest.approx(preferences.bradley_terry_logp(SCORES[0], SCORES[1]).item())


def test_claim_sampled_preferences_have_bradley_terry_frequency():
    """20,000 coins at p = σ(1): the frequency lies within five standard errors."""
    n, p = 20_000, 1 / (1 + math.exp(-1.0))
    generator = torch.Generator().manual_seed(0)
    wins = preferences.sample_preferences(torch.ones(n), torch.zeros(n), generator)
    assert abs(wins.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_eq_09_population_loss_is_the_double_sum():
    """The mean over unordered pairs of the cross-entropy, and least at the judge's own scores."""
    student = torch.tensor([0.1, 0.5, -1.0, 0.0], dtype=torch.float64)
    cross, pairs = 0.0, 0
    for i in range(4):
        for j in range(i):
            p = 1 / (1 + math.exp(SCORES[j] - SCORES[i]))
            q = 1 / (1 + math.exp(student[j] - student[i]))
            cross -= p * math.log(q) + (1 - p) * math.log(1 - q)
            pairs += 1
    got = preferences.population_loss(student, SCORES)
    assert got.item() == pytest.approx(cross / pairs, abs=1e-13)
    best = preferences.population_loss(SCORES, SCORES)
    shifted = preferences.population_loss(SCORES + 3.0, SCORES)
    assert best < got and shifted.item() == pytest.approx(best.item(), abs=1e-13)


def test_claim_what_has_no_chance_is_never_preferred(monkeypatch):
    """A coin of 0 can be drawn, and a coin of ½ at even odds: p(coin < p) is p on the grid."""
    coins = torch.tensor([0.0, 0.5, 0.0, 0.25], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *a, **k: coins)
    a, b = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([2000.0, 0.0, 0.0, 0.0])
    judged = preferences.sample_preferences(a, b, torch.Generator())
    assert judged.tolist() == [False, False, True, True]


@pytest.mark.parametrize("n", range(2, 10))
def test_claim_a_ring_of_victories_is_a_tie(n):
    """i beats i + 1, and the last beats the first: a chain of n − 1 victories, and equal returns.

    One victory less and no chain leads from the first to the last.
    """
    wins = torch.eye(n).roll(1, dims=1)
    assert preferences.fit_returns(wins).abs().max() < 1e-8
    wins[-1, 0] = 0
    with pytest.raises(ValueError, match="No chain of victories leads from response 1 to"):
        preferences.fit_returns(wins)


def test_claim_one_rare_defeat_among_balanced_votes_is_too_uneven():
    """10¹² : 1 between the first two: ln 10¹² apart, which float64 misses by a fifth of a nat.

    Responses 1 and 2 are balanced, so only the rare defeat of response 0 tells.
    """
    rare = torch.tensor([[0.0, 1e12, 0.0], [1.0, 0.0, 1e12], [0.0, 1e12, 0.0]])
    with pytest.raises(ValueError, match="votes on response 0 are too uneven"):
        preferences.fit_returns(rare)
    plain = torch.tensor([[0.0, 1e3, 0.0], [1.0, 0.0, 1e3], [0.0, 1e3, 0.0]])
    found = preferences.fit_returns(plain)
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=torch.float64) * math.log(1e3)
    assert torch.allclose(found, expected, atol=1e-6)
