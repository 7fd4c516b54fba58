"""Theorem 1 with an assumption removed: the predicted leftover, and that it matters.

Ids and tolerances: paper.md §3.1. The oracle enumerates values and trajectories in plain Python.
"""

import itertools
import math

import pytest
import torch

from qlearn.exact import leftovers, shaping, soft
from qlearn.exact.chance import ChanceTree, with_chance
from qlearn.exact.tree import ABSENT, TERMINAL, Tree

from . import oracle
from .worlds import (
    BETAS,
    EOS,
    SEEDS,
    as_dict,
    by_oracle,
    flat,
    furthest,
    random_field,
    random_policy,
    random_states,
    small_problem,
)  # fmt: skip

COMPLETE = oracle.responses(3, 3, EOS)


def surplus(tree, reward, log_ref, beta, gamma=1.0):
    """(Σ_t β log π*/π_ref, V*(s₀)) of the library: what DPO would believe of each response."""
    best = soft.soft_backup(tree, reward, log_ref, beta, gamma)
    return tree.path_sums(soft.implicit_rewards(best.logp, log_ref, beta)), best.value


def worst_preference(wrong, right):
    """The largest error in a Bradley-Terry probability, over all pairs."""
    one, two = (1 / (1 + (x[None, :] - x[:, None]).exp()) for x in (wrong, right))
    return (one - two).abs().max().item()


def returns_of(tree, reward):
    r = as_dict(tree, reward)
    return torch.tensor([oracle.total(r, y) for y in tree.leaves()], dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_claim_a_potential_at_the_ends_changes_preferences(beta):
    """C5: Φ(end) ≠ 0 adds Φ(end) − Φ(s₀) to each return. `eq-end-leftover`"""
    worst = 0.0
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        potential, ends = random_states(tree, seed), random_field(tree, seed + 77)
        shaped = shaping.shape_reward(tree, reward, potential, ends, keep_preferences=False)
        phi = as_dict(tree, ends)
        at_end = torch.tensor([phi[y[:-1], y[-1]] for y in tree.leaves()], dtype=torch.float64)
        implied, _ = surplus(tree, shaped, log_ref, beta)
        paid, ref = as_dict(tree, shaped), as_dict(tree, log_ref)
        true = returns_of(tree, reward)
        value = oracle.soft_value((0,), COMPLETE, paid, ref, beta)
        predicted = true + at_end - potential[0] - value
        assert (implied - predicted).abs().max() < 1e-10
        worst = max(worst, worst_preference(implied, true))
    assert worst > 1e-2


@pytest.mark.parametrize("beta", BETAS)
def test_claim_pairs_across_prompts_keep_both_values(beta):
    """C6: V*(s₀') − V*(s₀) stays behind. `eq-prompt-leftover`"""
    worst = 0.0
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed, n_prompts=2)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        start = [
            oracle.soft_value((p,), oracle.responses(3, 3, EOS, p), r, ref, beta) for p in (0, 1)
        ]
        implied, value = surplus(tree, reward, log_ref, beta)
        true = returns_of(tree, reward)
        error = (implied[:, None] - implied[None, :]) - (true[:, None] - true[None, :])
        leaves = tree.leaves()
        for i, j in itertools.product(range(0, len(leaves), 3), repeat=2):
            expected = start[leaves[j][0]] - start[leaves[i][0]]
            assert abs(error[i, j].item() - expected) < 1e-10
        assert (error - leftovers.prompt_leftover(tree, value)).abs().max() < 1e-10
        worst = max(worst, worst_preference(implied, true))
    assert worst > 1e-2


@pytest.mark.parametrize("beta", BETAS)
def test_claim_truncated_responses_keep_a_value(beta):
    """C7: a response cut after two tokens keeps V*(s_T). `eq-truncation-leftover`"""
    worst = 0.0
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        value = oracle.values(COMPLETE, r, ref, beta)
        best = soft.soft_backup(tree, reward, log_ref, beta)
        implied = tree.prefix_sums(soft.implicit_rewards(best.logp, log_ref, beta))[1]
        kept = as_dict(tree, tree.prefix_sums(reward))
        left = leftovers.truncation_leftover(tree, best.value, 2)
        for s, prefix in enumerate(tree.prefixes()[1]):
            for a in range(3):
                expected = value.get((*prefix, a), 0.0)
                error = implied[s, a].item() - (kept[prefix, a] - value[0,])
                assert abs(error - expected) < 1e-10
                assert abs(left[s, a].item() - expected) < 1e-10
        true = tree.prefix_sums(reward)[1].flatten()
        worst = max(worst, worst_preference(implied.flatten(), true))
    assert worst > 1e-2


def chance_problem(seed):
    """The small problem, where each step goes to the next state of its level with chance 0.3."""
    tree, reward, log_ref = small_problem(seed)
    siblings = tuple(torch.where(c >= 0, c.roll(1, 1).roll(1, 0), -1) for c in tree.child)
    return with_chance(tree, siblings, 0.3), reward, log_ref


def chance_value(tree, t, s, reward, log_ref, beta):
    """V of row s of level t by plain recursion: the soft maximum over actions of r + E V."""
    terms = []
    for a in range(len(log_ref[t][s])):
        ahead = sum(
            p * (chance_value(tree, t + 1, c, reward, log_ref, beta) if c >= 0 else 0.0)
            for c, p in zip(tree.child[t][s, a].tolist(), tree.prob[t][s, a].tolist(), strict=True)
        )
        terms.append(log_ref[t][s, a].item() + (reward[t][s, a].item() + ahead) / beta)
    return beta * oracle.log_sum_exp(terms)


@pytest.mark.parametrize("beta", BETAS)
def test_claim_chance_leaves_the_noise_of_the_value(beta):
    """C8: Σ_t ( E[V(s')] − V(s') ) along what happened; mean 0, yet preferences differ.

    `eq-chance-leftover`
    """
    worst = 0.0
    for seed in SEEDS:
        tree, reward, log_ref = chance_problem(seed)
        best = soft.soft_backup(tree, reward, log_ref, beta)
        value = [
            [chance_value(tree, t, s, reward, log_ref, beta) for s in range(n)]
            for t, (n, _) in enumerate(tree.shapes)
        ]
        for v, found in zip(value, best.value, strict=True):
            assert (torch.tensor(v, dtype=torch.float64) - found).abs().max() < 1e-10
        implied = soft.implicit_rewards(best.logp, log_ref, beta)
        sums, true, left, chance = [], [], [], []
        for path, steps, weight in chance_paths(tree):
            sums.append(sum(implied[t][s, a].item() for t, s, a, _ in steps))
            true.append(sum(reward[t][s, a].item() for t, s, a, _ in steps))
            noise = 0.0
            for t, s, a, after in steps:
                row, p = tree.child[t][s, a].tolist(), tree.prob[t][s, a].tolist()
                mean = sum(q * value[t + 1][c] for c, q in zip(row, p, strict=True) if c >= 0)
                noise += mean - (value[t + 1][after] if after >= 0 else 0.0)
            left.append(noise)
            chance.append((path, math.log(weight)))
        leaves = tree.realised.leaves()
        order = [leaves.index(path) for path, _ in chance]
        got = leftovers.chance_leftover(tree, best.value)[order]
        log_p = tree.realised.path_sums(tree.log_prob())[order]
        wide = tree.realised.path_sums(tree.spread(implied))[order]
        sums, true, left = (torch.tensor(x, dtype=torch.float64) for x in (sums, true, left))
        assert (sums - (true - value[0][0] + left)).abs().max() < 1e-10
        assert (got - left).abs().max() < 1e-10 and (wide - sums).abs().max() < 1e-10
        assert all(abs(log_p[i].item() - w) < 1e-12 for i, (_, w) in enumerate(chance))
        worst = max(worst, worst_preference(sums, true))
    assert worst > 1e-2


def test_claim_chances_are_those_asked_for():
    """0.3 is 0.3 to the last bit of float64, an end stays an end, and an absent action absent."""
    tree = Tree(
        (torch.tensor([[0, 1, TERMINAL]]), torch.tensor([[TERMINAL, ABSENT, TERMINAL]] * 2))
    )
    other = (torch.tensor([[1, 0, 0]]), torch.full((2, 3), TERMINAL))
    made = with_chance(tree, other, 0.3)
    assert made.prob[0].tolist() == [[[0.7, 0.3], [0.7, 0.3], [1.0, 0.0]]]
    assert made.prob[1].tolist() == [[[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]] * 2
    assert made.child[0].tolist() == [[[0, 1], [1, 0], [TERMINAL, ABSENT]]]


def chance_paths(tree, t=0, s=0, path=(0,), steps=(), weight=1.0):
    """Every realised response: its name in `realised`, its (t, s, a, next row) and chance."""
    n_outcomes = tree.child[t].shape[2]
    for a in range(tree.shapes[t][1]):
        for k in range(n_outcomes):
            after, p = tree.child[t][s, a, k].item(), tree.prob[t][s, a, k].item()
            if after == ABSENT:
                continue
            grown = (*path, a * n_outcomes + k), (*steps, (t, s, a, after)), weight * p
            if after == TERMINAL:
                yield grown
            else:
                yield from chance_paths(tree, t + 1, after, *grown)


@pytest.mark.parametrize("beta", BETAS)
def test_eq_02_regret_with_chance_is_still_beta_kl(beta):
    """A3 with chance: V*(s₀) − J(π) = β E_π Σ_t KL(π ‖ π*), and reach is pushed mass.

    `eq-regret`
    """
    for seed in range(5):
        tree, reward, log_ref = chance_problem(seed)
        best = soft.soft_backup(tree, reward, log_ref, beta).logp
        policy = random_policy(tree, seed + 9)
        kl, mass = 0.0, [torch.zeros(n, dtype=torch.float64) for n, _ in tree.shapes]
        for _, steps, chance in chance_paths(tree):
            p = chance * math.exp(sum(policy[t][s, a].item() for t, s, a, _ in steps))
            kl += p * sum((policy[t][s, a] - best[t][s, a]).item() for t, s, a, _ in steps)
            for t, s, _, _ in steps:
                mass[t][s] += p
        got = soft.regret(tree, policy, reward, log_ref, beta).item()
        assert abs(got - beta * kl) < 1e-10
        reached = soft.reach(tree, policy)
        assert furthest(reached, mass) < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_claim_a_discount_leaves_values_and_weights_heal_it(beta):
    """C9: −(1−γ) Σ_{t≥1} V(s_t) stays; γ-weighted log-ratios fit γ-discounted returns again.

    `eq-discount-leftover`
    """
    worst, gamma = 0.0, 0.8
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)

        def value_of(prefix, r=r, ref=ref):
            if (prefix[-1] == EOS and len(prefix) > 1) or len(prefix) == 4:
                return 0.0
            return beta * oracle.log_sum_exp([
                ref[prefix, a] + (r[prefix, a] + gamma * value_of((*prefix, a))) / beta
                for a in range(3)
            ])  # fmt: skip

        implied, value = surplus(tree, reward, log_ref, beta, gamma)
        found = {s: v for ss, vs in zip(tree.prefixes(), value, strict=True)
                 for s, v in zip(ss, vs.tolist(), strict=True)}  # fmt: skip
        v = {s: value_of(s) for s in found}
        assert all(abs(v[s] - x) < 1e-10 for s, x in found.items())
        left = leftovers.discount_leftover(tree, value, gamma)
        best = soft.soft_backup(tree, reward, log_ref, beta, gamma)
        ratios = soft.implicit_rewards(best.logp, log_ref, beta)
        healed = tree.path_sums(leftovers.discounted(ratios, gamma))
        for i, y in enumerate(tree.leaves()):
            later = sum(v.get(y[:n], 0.0) for n in range(2, len(y)))
            expected = oracle.total(r, y) - v[0,] - (1 - gamma) * later
            assert abs(implied[i].item() - expected) < 1e-10
            assert abs(left[i].item() + (1 - gamma) * later) < 1e-10
            paid = sum(gamma**t * r[step] for t, step in enumerate(oracle.steps(y)))
            assert abs(healed[i].item() - (paid - v[0,])) < 1e-10
        for (s, a), q in as_dict(tree, best.q).items():
            assert abs(q - (r[s, a] + beta * ref[s, a] + gamma * v.get((*s, a), 0.0))) < 1e-10
        again = soft.reward_from_q(tree, best.q, log_ref, beta, gamma)
        assert (flat(again) - flat(reward)).abs().max() < 1e-10
        worst = max(worst, worst_preference(implied, returns_of(tree, reward)))
    assert worst > 1e-2


def test_claim_what_the_reference_never_writes_cannot_be_known():
    """C10: π_ref = 0: π* = 0 there, two rewards agree on all else, and the library says so."""
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        shut = tuple(x.clone() for x in log_ref)
        shut[0][0, 2] = -math.inf
        shut = tuple(x.log_softmax(-1) for x in shut)
        with pytest.raises(ValueError, match="action 2 in state 0 of level 0 is -inf"):
            soft.soft_backup(tree, reward, shut, 0.5)
        other = tuple(x.clone() for x in reward)
        other[0][0, 2] += 7.0
        results = []
        for r in (reward, other):
            table, ref = as_dict(tree, r), as_dict(tree, shut)
            written = [y for y in COMPLETE if oracle.total(ref, y) > -math.inf]
            true = [oracle.total(table, y) for y in written]
            prior = [oracle.total(ref, y) for y in written]
            results.append((true, oracle.gibbs(true, prior, 0.5)))
        assert results[0] == results[1] and len(written) < len(COMPLETE)
        # ABSENT is the honest spelling: the subtree is no longer part of the problem.
        child = tuple(c.clone() for c in tree.child)
        child[0][0, 2] = ABSENT
        keep = [slice(None), slice(0, 1), slice(0, 2)]
        child = (child[0], child[1][keep[1]], child[2][keep[2]])
        smaller = Tree(child)
        cut = [tuple(x[k] for x, k in zip(f, keep, strict=True)) for f in (reward, other, shut)]
        solved = [soft.soft_backup(smaller, r, cut[2], 0.5) for r in cut[:2]]
        logp = [best.logp for best in solved]
        assert logp[0][0][0, 2] == -math.inf and torch.equal(flat(logp[0]), flat(logp[1]))
        value, _, best = by_oracle(smaller, cut[0], cut[2], 0.5)
        assert all(furthest(x.value, value) < 1e-10 for x in solved)
        assert furthest([x.exp() for x in logp[1]], [x.exp() for x in best]) < 1e-12
        named = dict(zip(smaller.leaves(), smaller.path_sums(logp[0]).tolist(), strict=True))
        expected = dict(zip(written, results[0][1], strict=True))
        assert all(abs(named[y] - x) < 1e-10 for y, x in expected.items())


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_claim_a_price_in_each_state_still_telescopes(scale):
    """C11: with β(s), Σ_t β(s_t) log π*/π_ref = R − V*(s₀), and Bradley-Terry stays exact.

    `eq-state-beta`, `eq-two-stage`
    """
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        price = tuple(scale * (0.5 + x.abs()) for x in random_states(tree, seed))
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        b = {s: x for ss, xs in zip(tree.prefixes(), price, strict=True)
             for s, x in zip(ss, xs.tolist(), strict=True)}  # fmt: skip

        def value_of(prefix, r=r, ref=ref, b=b):
            if prefix not in b:
                return 0.0
            return b[prefix] * oracle.log_sum_exp([
                ref[prefix, a] + (r[prefix, a] + value_of((*prefix, a))) / b[prefix]
                for a in range(3)
            ])  # fmt: skip

        implied, value = surplus(tree, reward, log_ref, price)
        true = returns_of(tree, reward)
        assert abs(value[0].item() - value_of((0,))) < 1e-10
        assert (implied - (true - value[0])).abs().max() < 1e-10
        assert worst_preference(implied, true) < 1e-10
        prior = soft.soft_backup_prior(tree, reward, log_ref, price)
        best = soft.soft_backup(tree, reward, log_ref, price)
        assert (flat(prior.logp) - flat(best.logp)).abs().max() < 1e-10
        again = soft.reward_from_q(tree, best.q, log_ref, price)
        assert (flat(again) - flat(reward)).abs().max() < 1e-10
        # Regret is E_π Σ_t β(s_t) KL_t, by enumeration of responses.
        policy = random_policy(tree, seed + 5)
        p, star = as_dict(tree, policy), as_dict(tree, best.logp)
        cost = sum(
            math.exp(oracle.total(p, y))
            * sum(b[s] * (p[s, a] - star[s, a]) for s, a in oracle.steps(y))
            for y in COMPLETE
        )
        assert abs(soft.regret(tree, policy, reward, log_ref, price).item() - cost) < 1e-10


def test_claim_bad_prices_discounts_and_depths_are_named():
    tree, reward, log_ref = small_problem(0)
    price = tuple(torch.ones(n, dtype=torch.float64) for n, _ in tree.shapes)
    price[1][1] = -1
    with pytest.raises(ValueError, match="in state 1 of level 1 it is -1"):
        soft.soft_backup(tree, reward, log_ref, price)
    with pytest.raises(ValueError, match="one \\(n_t,\\) row a level"):
        soft.soft_backup(tree, reward, log_ref, price[:2])
    for gamma in (0, 1.5, "0.9"):
        with pytest.raises(ValueError, match="gamma must lie in"):
            soft.soft_backup(tree, reward, log_ref, 0.5, gamma)
    for depth in (0, 3):
        with pytest.raises(ValueError, match="depth must lie between 1 and 2"):
            leftovers.truncation_leftover(tree, random_states(tree, 0), depth)


def test_claim_bad_chance_is_named():
    child = (torch.tensor([[[TERMINAL, TERMINAL], [TERMINAL, ABSENT]]]),)
    good = torch.tensor([[[0.4, 0.6], [1.0, 0.0]]], dtype=torch.float64)
    assert ChanceTree(child, (good,)).realised.leaves() == [(0, 0), (0, 1), (0, 2)]
    with pytest.raises(ValueError, match=r"prob of action 0 in state 0 of level 0 sums to 0\.8"):
        ChanceTree(child, (good * torch.tensor([[[0.5, 1.0], [1.0, 1.0]]]),))
    with pytest.raises(ValueError, match="prob of action 1 in state 0 of level 0"):
        ChanceTree(child, (good - torch.tensor([[[0.0, 0.0], [0.5, -0.5]]]),))
    with pytest.raises(ValueError, match="one \\(states, actions, outcomes\\) table each"):
        ChanceTree(child, (good[..., :1],))
    with pytest.raises(ValueError, match="p_other must lie in"):
        with_chance(Tree.full(2, 2), Tree.full(2, 2).child, 1.0)
