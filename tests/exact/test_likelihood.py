"""Where the mean implicit reward lies: Eq. 16, bookkeeping and the sign law."""

import itertools
import math

import pytest
import torch

from qlearn.exact import likelihood, soft

from . import oracle
from .worlds import BETAS, EOS, SEEDS, as_dict, random_policy, small_problem

COMPLETE = oracle.responses(3, 3, EOS)


def test_eq_16_mean_log_ratio_under_the_reference_is_minus_the_kl():
    """H1: by token in every state, and by response, for any policy. `eq-mean-log-ratio`"""
    for seed in SEEDS:
        tree, _, log_ref = small_problem(seed)
        policy = random_policy(tree, seed + 21)
        p, ref = as_dict(tree, policy), as_dict(tree, log_ref)
        whole = [(oracle.total(ref, y), oracle.total(p, y)) for y in COMPLETE]
        mean = math.fsum(math.exp(q) * (x - q) for q, x in whole)
        assert abs(soft.sequence_kl(tree, log_ref, policy).item() + mean) < 1e-12
        by_state = 0.0
        for s in {s for s, _ in p}:
            kl = sum(math.exp(ref[s, a]) * (ref[s, a] - p[s, a]) for a in range(3))
            by_state += math.exp(oracle.total(ref, s)) * kl
        assert abs(by_state + mean) < 1e-12
        ratios = soft.implicit_rewards(policy, log_ref, 0.3)
        got = soft.expected_return(tree, log_ref, ratios).item()
        assert abs(got - 0.3 * mean) < 1e-12


def test_claim_mean_log_ratio_under_any_law_is_a_difference_of_kls():
    """H2: E_p log π/π_ref = KL(p ‖ π_ref) − KL(p ‖ π), for data that neither model wrote.

    `eq-bookkeeping`
    """
    for seed in SEEDS:
        tree, _, log_ref = small_problem(seed)
        policy, data = random_policy(tree, seed + 21), random_policy(tree, seed + 22)
        p, ref, d = (as_dict(tree, x) for x in (policy, log_ref, data))
        whole = [[oracle.total(x, y) for x in (d, p, ref)] for y in COMPLETE]
        mean = math.fsum(math.exp(w) * (x - q) for w, x, q in whole)
        one, two = (soft.sequence_kl(tree, data, x).item() for x in (log_ref, policy))
        assert abs(mean - (one - two)) < 1e-12
        ratios = soft.implicit_rewards(policy, log_ref, 1.0)
        assert abs(soft.expected_return(tree, data, ratios).item() - mean) < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_claim_sign_law_of_chosen_rewards(beta):
    """H3: chosen, rejected and reference means at the optimum, by a loop over labelled pairs.

    `eq-sign-law`
    """
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        learned = as_dict(tree, soft.implicit_rewards(
            soft.soft_backup(tree, reward, log_ref, beta).logp, log_ref, beta
        ))  # fmt: skip
        rows = [(math.exp(oracle.total(ref, y)), oracle.total(r, y), oracle.total(learned, y))
                for y in COMPLETE]  # fmt: skip
        chosen = rejected = mean = 0.0
        for (p, one, hat), (q, two, other) in itertools.product(rows, rows):
            wins = oracle.sigmoid(one - two)
            chosen += p * q * (wins * hat + (1 - wins) * other)
            rejected += p * q * (wins * other + (1 - wins) * hat)
            mean += p * q * hat
        law = likelihood.sign_law(tree.path_sums(reward), tree.path_sums(log_ref), beta)
        for got, expected in zip(law, (chosen, rejected, mean), strict=True):
            assert abs(got.item() - expected) < 1e-10
        assert law.rejected < law.reference < min(law.chosen, 0)


def test_claim_chosen_rewards_are_negative_for_gaussian_returns_up_to_beta_one():
    """H3: negative at every β ≤ 1 for Gaussian returns; the two-point counterexample is not.

    `eq-gaussian-margin`
    """
    grid = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    for scale in (0.3, 1.0, 2.0):
        log_p = (-(grid**2) / 2).log_softmax(0)
        for beta in (0.05, 0.1, 0.5, 1.0):
            law = likelihood.sign_law(scale * grid, log_p, beta)
            assert law.chosen < 0
            if beta >= 0.5 and scale <= 1:  # elsewhere the tail of the grid matters
                assert abs(law.reference.item() + scale**2 / (2 * beta)) < 1e-3
    assert likelihood.sign_law(0.3 * grid, log_p, 3.0).chosen > 0
    points = torch.tensor([0.0, 2.0], dtype=torch.float64)
    law = likelihood.sign_law(points, torch.tensor([0.1, 0.9], dtype=torch.float64).log(), 1.0)
    value = math.log(0.1 + 0.9 * math.exp(2))
    wins = oracle.sigmoid(2.0)
    expected = 2 * (0.81 + 2 * 0.09 * wins) - value
    assert law.chosen.item() == pytest.approx(expected, abs=1e-12) and expected > 0.02


def test_claim_sft_on_the_chosen_distribution_makes_them_fall():
    """H4: π_ref = p_w: E_{p_w} r̂ = −β KL(p_w ‖ π) ≤ 0 for every policy. `eq-sft-chosen`"""
    for seed in SEEDS:
        tree, _, chosen_law = small_problem(seed)
        policy = random_policy(tree, seed + 31)
        p, w = as_dict(tree, policy), as_dict(tree, chosen_law)
        kl = math.fsum(
            math.exp(oracle.total(w, y)) * (oracle.total(w, y) - oracle.total(p, y))
            for y in COMPLETE
        )
        ratios = soft.implicit_rewards(policy, chosen_law, 0.4)
        got = soft.expected_return(tree, chosen_law, ratios).item()
        assert abs(got + 0.4 * kl) < 1e-12 and got < 0
