"""Search and tilted policies on exact trees. Ids and tolerances: paper.md §3.1."""

import math

import pytest
import torch

from qlearn.exact import search, soft
from qlearn.exact.tree import Tree

from . import oracle
from .worlds import (
    BETAS,
    EOS,
    SEEDS,
    as_dict,
    flat,
    furthest,
    random_policy,
    random_states,
    small_problem,
)

COMPLETE = oracle.responses(3, 3, EOS)


@pytest.mark.parametrize("beta", BETAS)
def test_eq_13_guided_search_is_likelihood_search(beta):
    """F1: Σ(r + β log π_ref) + V(s_{K+1}) = +V(s₀) + β Σ log π*.

    `eq-guided` on the left, `eq-guided-is-likelihood` in all. The printed −V(s₀) errs by exactly
    2 |V(s₀)|.
    """
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        value = oracle.values(COMPLETE, r, ref, beta)
        logp = soft.soft_backup(tree, reward, log_ref, beta).logp
        star = as_dict(tree, logp)
        guided = as_dict(tree, search.guided_scores(tree, reward, log_ref, beta))
        likely = as_dict(tree, search.likelihood_scores(tree, logp, beta))
        for (s, a), score in guided.items():
            prefix = (*s, a)
            earned = oracle.total(r, prefix) + beta * oracle.total(ref, prefix)
            assert abs(score - (earned + value.get(prefix, 0.0))) < 1e-10
            assert abs(likely[s, a] - beta * oracle.total(star, prefix)) < 1e-10
            assert abs(score - (value[0,] + likely[s, a])) < 1e-10
            printed = -value[0,] + likely[s, a]
            assert abs(abs(score - printed) - 2 * abs(value[0,])) < 1e-10
        for depth in (1, 2, 3):
            one, two = (
                search.best_prefix(tree, scores, depth)
                for scores in (
                    search.guided_scores(tree, reward, log_ref, beta),
                    search.likelihood_scores(tree, logp, beta),
                )
            )
            reached = {y[: depth + 1] for y in COMPLETE}  # cut at the depth, or ended before
            assert one == two == max(reached, key=lambda y: guided[y[:-1], y[-1]])


def test_claim_three_notions_of_best_response_differ():
    """F2: argmax log π* = argmax R + β log π_ref, argmax r̂ = argmax R; greedy is a third string."""
    three = 0
    for seed in range(50):
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        logp = soft.soft_backup(tree, reward, log_ref, 0.7).logp
        likeliest = search.best_prefix(tree, search.likelihood_scores(tree, logp, 0.7))
        implied = tree.prefix_sums(soft.implicit_rewards(logp, log_ref, 0.7))
        highest = search.best_prefix(tree, implied)
        assert likeliest == max(
            COMPLETE, key=lambda y: oracle.total(r, y) + 0.7 * oracle.total(ref, y)
        )
        assert highest == max(COMPLETE, key=lambda y: oracle.total(r, y))
        three += len({likeliest, highest, greedy(as_dict(tree, logp))}) == 3
    assert three > 0


def greedy(logp):
    y = (0,)
    while (y, 0) in logp:
        y = (*y, max(range(sum(s == y for s, _ in logp)), key=lambda a: logp[y, a]))
    return y


@pytest.mark.parametrize("beta", BETAS)
def test_claim_sampling_beats_the_best_single_response(beta):
    """F3: J(δ_y) = V*(s₀) + β log π*(y) < V*(s₀) = J(π*); the best y is the mode: `eq-one-line`."""
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        best = soft.soft_backup(tree, reward, log_ref, beta)
        star = as_dict(tree, best.logp)
        scores = {}
        for y in COMPLETE:
            only_y = tuple(torch.full(s, -math.inf, dtype=torch.float64) for s in tree.shapes)
            rows = [list(level) for level in tree.prefixes()]
            for t, level in enumerate(rows):
                for s, prefix in enumerate(level):
                    only_y[t][s, y[t + 1] if y[: t + 1] == prefix and t + 1 < len(y) else 0] = 0.0
            j = soft.expected_return(
                tree, only_y, soft.kl_reward(only_y, reward, log_ref, beta)
            ).item()  # fmt: skip
            expected = oracle.total(r, y) + beta * oracle.total(ref, y)
            assert abs(j - expected) < 1e-10
            assert abs(j - (best.value[0].item() + beta * oracle.total(star, y))) < 1e-10
            assert j < best.value[0].item() or oracle.total(star, y) > -1e-10
            scores[y] = j
        assert max(scores, key=scores.get) == search.best_prefix(
            tree, search.likelihood_scores(tree, best.logp, beta)
        )
        found = search.best_objective(tree, reward, log_ref, beta).item()
        assert abs(found - max(scores.values())) < 1e-10


def test_claim_beam_goes_from_greedy_to_the_mode():
    """F4: all prefixes kept: the mode; one kept: greedy; and a wider beam can score worse."""
    tree = Tree.full(4, 4, eos=EOS)
    complete = oracle.responses(4, 4, EOS)
    for seed in range(100):
        policy = tuple((2 * x).log_softmax(-1) for x in random_policy(tree, seed))
        logp = as_dict(tree, policy)
        total = {y: oracle.total(logp, y) for y in complete}
        mode, score = search.beam(tree, policy, width=400)
        assert mode == max(total, key=total.get) and abs(score - total[mode]) < 1e-12
        found = [search.beam(tree, policy, width=w) for w in range(1, 6)]
        assert all(abs(score - total[y]) < 1e-12 for y, score in found)
        assert found[0][0] == greedy(logp)
    # Two prefixes kept are both below the second word; the first word's sure ending is lost.
    tree = Tree.full(3, 3, eos=None)
    third = [1 / 3] * 3
    rows = [[0.5, 0.49, 0.01]], [third, [0.5, 0.5, 0.0], third], [[1.0, 0, 0]] * 3 + [third] * 6
    policy = tuple(torch.tensor(x, dtype=torch.float64).log() for x in rows)
    (one, score), (two, lower) = (search.beam(tree, policy, width=w) for w in (1, 2))
    assert one[:2] == (0, 0)
    assert two[:2] == (0, 1) and lower < score - 0.5
    with pytest.raises(ValueError, match="at least one prefix, not 0"):
        search.beam(tree, policy, width=0)


def test_claim_length_normalisation_changes_the_winner_and_lengthens_it():
    """F5: score / len^α is no longer guided search; the winner grows longer with α."""
    lengths = {alpha: [] for alpha in (0.0, 0.5, 1.0)}
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        policy = soft.soft_backup(tree, reward, log_ref, 1.0).logp
        logp = as_dict(tree, policy)
        for alpha, seen in lengths.items():
            y, score = search.beam(tree, policy, 12, alpha)

            def normalised(y, logp=logp, alpha=alpha):
                return oracle.total(logp, y) / (len(y) - 1) ** alpha

            assert y == max(COMPLETE, key=normalised) and abs(score - normalised(y)) < 1e-12
            seen.append(len(y) - 1)
    means = [sum(x) / len(x) for x in lengths.values()]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("beta", BETAS)
def test_claim_a_wrong_value_leaves_its_bellman_error(beta):
    """F6: guided search with V̂ less likelihood search on its policy is V̄(s₀) + Σ_{t=1..K} (V̄ − V̂).

    V̄ is the one-step backup of V̂; the difference is constant iff V̂ solves the Bellman equation:
    `eq-value-error`.
    """
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        guess = random_states(tree, seed)
        hat = {s: x for ss, xs in zip(tree.prefixes(), guess, strict=True)
               for s, x in zip(ss, xs.tolist(), strict=True)}  # fmt: skip
        logp, backed = search.induced_policy(tree, reward, log_ref, beta, guess)
        bar = {}
        for s in hat:
            q = [ref[s, a] + (r[s, a] + hat.get((*s, a), 0.0)) / beta for a in range(3)]
            bar[s] = beta * oracle.log_sum_exp(q)
        for level, found in zip(tree.prefixes(), backed, strict=True):
            assert all(abs(bar[s] - x) < 1e-10 for s, x in zip(level, found.tolist(), strict=True))
        guided = as_dict(tree, search.guided_scores(tree, reward, log_ref, beta, guess))
        likely = as_dict(tree, search.likelihood_scores(tree, logp, beta))
        for (s, a), score in guided.items():
            inner = [s[:n] for n in range(2, len(s) + 1)]
            expected = bar[0,] + sum(bar[x] - hat[x] for x in inner)
            assert abs(score - likely[s, a] - expected) < 1e-10
        right = soft.soft_backup(tree, reward, log_ref, beta)
        again, same = search.induced_policy(tree, reward, log_ref, beta, right.value)
        assert (flat(again) - flat(right.logp)).abs().max() < 1e-10
        assert furthest(same, right.value) < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_eq_14_mixing_by_token_is_exact_only_in_corners(beta):
    """G1, `thm-when-exact`: a mix of log π_ref and log π*_β with weight α against π*_{β/α}."""
    worst = 0.0
    for seed in SEEDS:
        for horizon in (1, 3):
            tree, reward, log_ref = small_problem(seed, horizon=horizon)
            complete = oracle.responses(3, horizon, EOS)
            r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
            tuned = soft.soft_backup(tree, reward, log_ref, beta).logp
            for alpha in (0.0, 0.5, 1.0, 2.0):
                mixed = as_dict(tree, tuple(
                    search.tilt(q, p, q, alpha) for p, q in zip(tuned, log_ref, strict=True)
                ))  # fmt: skip
                returns = [alpha * oracle.total(r, y) for y in complete]
                exact = oracle.gibbs(returns, [oracle.total(ref, y) for y in complete], beta)
                gap = max(
                    abs(oracle.total(mixed, y) - x) for y, x in zip(complete, exact, strict=True)
                )
                if horizon == 1 or alpha in (0.0, 1.0):
                    assert gap < 1e-12 * max(1, 100 / beta)
                else:
                    worst = max(worst, gap)
    assert worst > 1e-2


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_claim_mixing_is_exact_in_the_additive_world(beta):
    """G1 in the regime of E3: rewards by position, a reference blind to the prefix, one length.

    A corner of `thm-when-exact`.
    """
    tree = Tree.full(3, 3, eos=None)
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        rho, logits = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
        ref = logits.log_softmax(-1)
        reward = tuple(rho[t].repeat(n, 1) for t, (n, _) in enumerate(tree.shapes))
        log_ref = tuple(ref[t].repeat(n, 1) for t, (n, _) in enumerate(tree.shapes))
        tuned = soft.soft_backup(tree, reward, log_ref, beta).logp
        mixed = tuple(search.tilt(q, p, q, 0.5) for p, q in zip(tuned, log_ref, strict=True))
        exact = soft.soft_backup(tree, reward, log_ref, beta / 0.5).logp
        assert (flat(mixed) - flat(exact)).abs().max() < 1e-12 / beta


def test_eq_15_borrowed_advantages_miss_the_tilt_of_another_base():
    """G2: KL(exact tilt of π_base ‖ token-by-token tilt) > 0 for another base, 0 for the same.

    So tilting by `eq-borrowed-advantage` is not RLHF of the base: `thm-when-exact`.
    """
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        r = as_dict(tree, reward)
        tuned = soft.soft_backup(tree, reward, log_ref, 0.5).logp
        for base, same in ((random_policy(tree, seed + 11), False), (log_ref, True)):
            mixed = as_dict(tree, tuple(
                search.tilt(b, p, q, 1.0) for b, p, q in zip(base, tuned, log_ref, strict=True)
            ))  # fmt: skip
            b = as_dict(tree, base)
            exact = oracle.gibbs(
                [oracle.total(r, y) for y in COMPLETE], [oracle.total(b, y) for y in COMPLETE], 0.5
            )
            kl = math.fsum(
                math.exp(x) * (x - oracle.total(mixed, y))
                for x, y in zip(exact, COMPLETE, strict=True)
            )
            assert abs(kl) < 1e-12 if same else kl > 1e-4
