"""Eqs 8, 12 and 17 of the paper, each with its sides computed apart."""

import itertools
import math

import pytest
import torch

from qlearn.exact import preferences, search, soft
from qlearn.exact.tree import Tree

from . import oracle
from .worlds import BETAS, EOS, as_dict, problem, random_field, small_problem

COMPLETE = oracle.responses(4, 4, EOS)


def number(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_eq_08_the_best_policy_implies_the_judges_preferences(beta):
    """σ of the difference of two sums of β log π*/π_ref is the judge's p, for all pairs.

    The left side adds up token log-ratios of the library's π*; the right side is e^R/(e^R + e^R')
    of the returns alone. For a policy that is not π* the two differ. `eq-telescope`
    """
    for seed in range(10):
        tree, reward, log_ref = problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        star = as_dict(tree, soft.soft_backup(tree, reward, log_ref, beta).logp)
        ratio = {
            y: number(math.fsum(beta * (star[e] - ref[e]) for e in oracle.steps(y)))
            for y in COMPLETE
        }
        plain = {y: oracle.total(r, y) for y in COMPLETE}
        worst = 0.0
        for w, lost in itertools.permutations(COMPLETE[seed::7], 2):
            judge = math.exp(plain[w]) / (math.exp(plain[w]) + math.exp(plain[lost]))
            implied = preferences.bradley_terry_logp(ratio[w], ratio[lost]).exp().item()
            assert abs(implied - judge) < 1e-10
            worst = max(worst, abs(0.5 - judge))
        assert worst > 0.1  # the reference itself, log-ratio 0, implies one half everywhere


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_eq_12_guided_decoding_takes_the_best_beginning_of_each_depth(beta):
    """max over beginnings of Σ (r + β log π_ref) + V*(s_{K+1}), by a loop over all beginnings.

    V* comes from enumeration of what can follow; a finished response has no value left.
    `eq-guided`
    """
    complete = oracle.responses(3, 3, EOS)
    for seed in range(20):
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        value = oracle.values(complete, r, ref, beta)
        scores = search.guided_scores(tree, reward, log_ref, beta)
        got = as_dict(tree, scores)
        by_hand = {
            y[:n]: oracle.total(r, y[:n]) + beta * oracle.total(ref, y[:n]) + value.get(y[:n], 0)
            for y in complete for n in range(2, len(y) + 1)
        }  # fmt: skip
        assert {(*s, a) for s, a in got} == set(by_hand)
        assert all(abs(got[y[:-1], y[-1]] - x) < 1e-10 for y, x in by_hand.items())
        for depth in (1, 2, 3):
            rivals = {
                y: x for y, x in by_hand.items()
                if len(y) == depth + 1 or (len(y) <= depth and y[-1] == EOS)
            }  # fmt: skip
            assert search.best_prefix(tree, scores, depth) == max(rivals, key=rivals.get)


def test_eq_17_the_hybrid_reward_adds_a_text_and_squared_errors_at_two_prices():
    """β Σ log π_θ/π_ref of the text, and γ T E_t ω (‖ε − ε_ref‖² − ‖ε − ε_φ‖²) of the image.

    The text's part against `oracle.total` on the path. The image's part: for each step the mean of
    the log-ratio of two normal steps over the law of x_{t−1} given x_t and x_0, by quadrature with
    Bayes' rule, added over the steps; against T times the mean over steps of the squared errors.
    `eq-two-stage`, `eq-gaussian-step`
    """
    beta, gamma, b, steps, var = 0.3, 1.7, 0.2, 4, 0.15
    tree = Tree.full(3, 2, eos=EOS)
    policy, ref = (tuple(x.log_softmax(-1) for x in random_field(tree, s)) for s in (1, 2))
    price = tuple(torch.full((n,), beta, dtype=torch.float64) for n, _ in tree.shapes)
    by_token = tree.path_sums(soft.implicit_rewards(policy, ref, price)).tolist()
    p, q = as_dict(tree, policy), as_dict(tree, ref)
    for text, y in zip(by_token, tree.leaves(), strict=True):
        assert abs(text - beta * (oracle.total(p, y) - oracle.total(q, y))) < 1e-12

    draws = torch.randn(steps, 3, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
    x0, grid = 0.7, torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    path, squares = 0.0, []
    for k, (eps, tuned, untuned) in enumerate(draws.tolist(), start=1):
        alpha, before = (1 - b) ** k, (1 - b) ** (k - 1)
        xk = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * eps
        kappa = b / math.sqrt((1 - b) * (1 - alpha))
        # The law of x_{k−1}: x_0 to x_{k−1} to x_k. At k = 1 it is x_0 itself.
        forward = -((xk - math.sqrt(1 - b) * grid) ** 2) / (2 * b)
        spread = max(1 - before, 1e-6)
        law = (forward - (grid - math.sqrt(before) * x0) ** 2 / (2 * spread)).softmax(0)
        two = (
            torch.distributions.Normal(xk / math.sqrt(1 - b) - kappa * e, math.sqrt(var))
            for e in (tuned, untuned)
        )
        one, other = (normal.log_prob(grid) for normal in two)
        path += (law * (one - other)).sum().item()
        omega = kappa**2 / (2 * var)
        squares.append(omega * ((eps - untuned) ** 2 - (eps - tuned) ** 2))
    right = gamma * steps * (sum(squares) / steps)
    assert abs(gamma * path - right) < 1e-4 and abs(right) > 0.1

    # At a joint optimum of two stages the sum of both parts is the return less V*.
    returns = tree.path_sums(random_field(tree, 3))
    field, two_prices = tree.only_at_end(returns), (price[0], price[1] / beta * gamma)
    best = soft.soft_backup(tree, field, ref, two_prices)
    hybrid = tree.path_sums(soft.implicit_rewards(best.logp, ref, two_prices))
    assert (hybrid - (returns - best.value[0])).abs().max() < 1e-10
