"""Soft Bellman backups against brute-force enumeration. Tolerances: paper.md §3.1."""

import itertools
import math

import pytest
import torch

from qlearn.exact import soft
from qlearn.exact.tree import ABSENT, TERMINAL, Tree

from . import oracle
from .worlds import (
    BETAS,
    EOS,
    HORIZON,
    N_ACTIONS,
    SEEDS,
    as_dict,
    by_oracle,
    flat,
    furthest,
    problem,
    random_policy,
    small_problem,
)  # fmt: skip

COMPLETE = oracle.responses(N_ACTIONS, HORIZON, EOS)


def prefixes_with(tree, state_field):
    for prefixes, values in zip(tree.prefixes(), state_field, strict=True):
        yield from zip(prefixes, values.tolist(), strict=True)


@pytest.mark.parametrize("beta", BETAS)
def test_eq_06_value_is_the_log_mean_exp_of_the_return(beta):
    """A1: V*(s) = β log E_ref exp(R/β) in every state, by enumeration of all responses.

    `eq-closed-form`, `eq-soft-value`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        value = soft.soft_backup(tree, reward, log_ref, beta).value
        for prefix, v in prefixes_with(tree, value):
            assert abs(v - oracle.soft_value(prefix, COMPLETE, r, ref, beta)) < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_claim_a_choice_scores_the_soft_maximum_less_its_distance(beta):
    """One choice: J(p) = V − β KL(p ‖ p*) for every p, in plain sums.

    `eq-one-choice-score`, `thm-one-choice`
    """
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        q, logits, other = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        ref, p = logits.log_softmax(0).tolist(), other.log_softmax(0).tolist()
        value = soft.soft_value_prior(q, logits.log_softmax(0), beta).item()
        rows = list(zip(p, ref, q.tolist(), strict=True))
        score = math.fsum(math.exp(a) * (worth - beta * (a - b)) for a, b, worth in rows)
        kl = math.fsum(math.exp(a) * (a - b - (worth - value) / beta) for a, b, worth in rows)
        assert abs(score - (value - beta * kl)) < 1e-10
        assert abs(math.fsum(math.exp(b + (w - value) / beta) for _, b, w in rows) - 1) < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_eq_05_token_policy_is_the_sequence_gibbs_law(beta):
    """A2: Π_t π*(a_t|s_t) = π_ref(y) exp(R(y)/β) / Z for every response.

    `eq-gibbs`, `eq-soft-policy`, `eq-one-choice`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        logp = as_dict(tree, soft.soft_backup(tree, reward, log_ref, beta).logp)
        tilted = [oracle.total(ref, y) + oracle.total(r, y) / beta for y in COMPLETE]
        log_z = oracle.log_sum_exp(tilted)
        for y, x in zip(COMPLETE, tilted, strict=True):
            assert abs(math.exp(oracle.total(logp, y)) - math.exp(x - log_z)) < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_eq_02_regret_is_beta_times_kl(beta):
    """A3: V*(s₀) − J(π) = β KL(π ‖ π*) for random π, both sides by enumeration.

    `eq-regret`, `eq-objective`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        policy = random_policy(tree, 900 + seed)
        r, ref, p = (as_dict(tree, x) for x in (reward, log_ref, policy))
        value = oracle.soft_value((0,), COMPLETE, r, ref, beta)
        log_pi = [oracle.total(p, y) for y in COMPLETE]
        log_ref_y = [oracle.total(ref, y) for y in COMPLETE]
        returns = [oracle.total(r, y) for y in COMPLETE]
        rows = list(zip(log_pi, log_ref_y, returns, strict=True))
        j = math.fsum(math.exp(lp) * (g - beta * (lp - lr)) for lp, lr, g in rows)
        kl = math.fsum(math.exp(lp) * (lp - (lr + (g - value) / beta)) for lp, lr, g in rows)
        assert abs(value - j - beta * kl) < 1e-10
        assert abs(soft.objective(tree, policy, reward, log_ref, beta).item() - j) < 1e-10
        assert abs(soft.regret(tree, policy, reward, log_ref, beta).item() - beta * kl) < 1e-10
        best = soft.soft_backup(tree, reward, log_ref, beta).logp
        assert abs(soft.sequence_kl(tree, policy, best).item() - kl) < 1e-9 / beta


@pytest.mark.parametrize("beta", BETAS)
def test_eq_07_two_conventions_share_value_and_policy(beta):
    """A5: Q − β log π_ref = Q̃, with the same V and the same π, all three those of the oracle.

    `eq-soft-bellman`, `eq-soft-bellman-prior`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        inside = soft.soft_backup(tree, reward, log_ref, beta)
        prior = soft.soft_backup_prior(tree, reward, log_ref, beta)
        value, q_tilde, logp = by_oracle(tree, reward, log_ref, beta)
        assert furthest(prior.value, value) < 1e-10 and furthest(prior.q_tilde, q_tilde) < 1e-10
        assert furthest(prior.logp, logp) < 1e-10 / beta
        for t in range(tree.horizon):
            shifted = inside.q[t] - beta * log_ref[t]
            assert (shifted - prior.q_tilde[t]).abs().max() < 1e-12
            assert (inside.value[t] - prior.value[t]).abs().max() < 1e-12
            assert (inside.logp[t].exp() - prior.logp[t].exp()).abs().max() < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_eq_07_reward_and_q_determine_each_other(beta):
    """B1: r → Q* → r and Q → r → Q* are both the identity (Lemma 1).

    The oracle inverts Eq. 7 edge by edge; V_Q of a terminal state is 0.
    `eq-inverse-bellman`, `eq-soft-bellman`, `lem-bijection`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        q = soft.soft_backup(tree, reward, log_ref, beta).q
        back = soft.reward_from_q(tree, q, log_ref, beta)
        assert furthest(back, reward) < 1e-10
        arbitrary = problem(seed + 300)[1]
        made = soft.reward_from_q(tree, arbitrary, log_ref, beta)
        again = soft.soft_backup(tree, made, log_ref, beta).q
        assert furthest(again, arbitrary) < 1e-10
        q_of, ref, made_of = (as_dict(tree, x) for x in (arbitrary, log_ref, made))
        for (prefix, a), r in made_of.items():
            below = (*prefix, a)
            ends = a == EOS or len(below) == HORIZON + 1
            row = [] if ends else [q_of[below, b] / beta for b in range(N_ACTIONS)]
            v = beta * oracle.log_sum_exp(row) if row else 0.0
            assert abs(r - (q_of[prefix, a] - beta * ref[prefix, a] - v)) < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_claim_logit_shift_is_potential_shaping(beta):
    """B4: Q → Q + c(s) leaves π alone, moves r by c(s) − c(s'), and no response's preference.

    Here c is random in every non-terminal state but the prompt's enters every return alike, so
    differences of returns, hence Bradley-Terry, stay. `eq-logit-shift`
    """
    for seed in SEEDS:
        tree, _, log_ref = problem(seed)
        q = problem(seed + 100)[1]
        generator = torch.Generator().manual_seed(seed)
        c = [torch.randn(len(x), generator=generator, dtype=torch.float64) for x in tree.child]
        shifted = tuple(x + y[:, None] for x, y in zip(q, c, strict=True))
        r, moved = (soft.reward_from_q(tree, x, log_ref, beta) for x in (q, shifted))
        offset = dict(prefixes_with(tree, c))
        before, after = as_dict(tree, r), as_dict(tree, moved)
        for (prefix, a), x in before.items():
            expected = offset[prefix] - offset.get((*prefix, a), 0.0)
            assert abs(after[prefix, a] - x - expected) < 1e-12
        for x, y in zip(q, shifted, strict=True):
            difference = (x / beta).softmax(-1) - (y / beta).softmax(-1)
            assert difference.abs().max() < 1e-12
        moved_by = [oracle.total(after, y) - oracle.total(before, y) for y in COMPLETE]
        assert max(moved_by) - min(moved_by) < 1e-11
        assert abs(moved_by[0] - offset[(0,)]) < 1e-11


def test_claim_value_falls_from_the_maximum_to_the_mean_as_beta_grows():
    """A4: slope −1 and coefficient Var/2 at large β, the bound at β = 1e-3, monotone in between.

    `eq-large-beta`, `eq-small-beta`, `eq-value-bounds`, `thm-dial`
    """
    betas = torch.logspace(3.3, 4.3, 6, dtype=torch.float64)
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        returns = torch.tensor([oracle.total(r, y) for y in COMPLETE], dtype=torch.float64)
        p = torch.tensor([oracle.total(ref, y) for y in COMPLETE], dtype=torch.float64).exp()
        mean = (p * returns).sum()
        variance = (p * (returns - mean) ** 2).sum()

        def value(beta, tree=tree, reward=reward, log_ref=log_ref):
            return soft.soft_backup(tree, reward, log_ref, float(beta)).value[0].item()

        gaps = torch.tensor([value(b) - mean.item() for b in betas], dtype=torch.float64)
        x = betas.log() - betas.log().mean()
        slope = (x * gaps.log()).sum() / (x * x).sum()
        assert abs(slope + 1) < 0.02
        assert abs(gaps[-1] * betas[-1] / (variance / 2) - 1) < 0.01
        best = returns.argmax()
        gap = returns[best].item() - value(1e-3)
        assert 0 <= gap <= -1e-3 * p[best].log().item() + 1e-12
        dial = [value(b) for b in (1e-3, 0.05, 0.1, 0.5, 1.0, 5.0, 1e3)]
        assert all(a > b for a, b in itertools.pairwise(dial))
        assert mean < dial[-1] and dial[0] <= returns[best]


@pytest.mark.parametrize("beta", BETAS)
def test_eq_07_jacobian_is_the_visitation_of_the_best_policy(beta):
    """B2: autograd's ∂Q/∂r is P_π*(visit), which is `soft.jacobian`; its determinant is 1.

    The oracle's backup, and the products of probabilities, run over prefixes. `eq-jacobian`
    """
    complete = oracle.responses(3, 3, EOS)
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed)
        edges = list(as_dict(tree, reward))
        place, ref = {e: i for i, e in enumerate(edges)}, as_dict(tree, log_ref)
        states = {s for s, _ in edges}

        def q_of(r, place=place, edges=edges, ref=ref, states=states):
            q, v = {}, {}
            for s, a in sorted(edges, key=lambda e: -len(e[0])):
                q[s, a] = r[place[s, a]] + beta * ref[s, a]
                if (*s, a) in states:
                    if (*s, a) not in v:
                        row = torch.stack([q[(*s, a), b] for b in range(3)])
                        v[*s, a] = beta * (row / beta).logsumexp(0)
                    q[s, a] = q[s, a] + v[*s, a]
            return torch.stack([q[e] for e in edges])

        slopes = torch.autograd.functional.jacobian(q_of, flat(reward), vectorize=True)
        best = soft.soft_backup(tree, reward, log_ref, beta)
        assert (q_of(flat(reward)) - flat(best.q)).abs().max() < 1e-10
        got = soft.jacobian(tree, best.logp)
        assert (got - slopes).abs().max() < 1e-8
        assert abs(torch.linalg.det(slopes).item() - 1) < 1e-8
        assert abs(torch.linalg.det(got).item() - 1) < 1e-8
        logp = as_dict(tree, best.logp)
        for s, a in edges:
            for y in complete:
                if y[: len(s) + 1] == (*s, a):
                    ahead = 0.0
                    for below, b in oracle.steps(y, len(s) + 1):
                        ahead += logp[below, b]
                        found = got[place[s, a], place[below, b]].item()
                        assert abs(found - math.exp(ahead)) < 1e-8


def test_claim_a_loop_has_no_value_or_too_many():
    """B3: one state that leads to itself: V = V + β log Σ π_ref exp(r/β) is solvable only at 0.

    `eq-loop`
    """
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        r, logits = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        ref = logits.log_softmax(-1)
        for beta in BETAS:
            drift = beta * oracle.log_sum_exp((ref + r / beta).tolist())
            normalised = r - drift
            for v in (-3.0, 0.0, 7.0):
                moved = soft.soft_value_prior(r + v, ref, beta).item() - v
                assert abs(moved - drift) < 1e-10
                still = soft.soft_value_prior(normalised + v, ref, beta).item() - v
                assert abs(still) < 1e-10
    with pytest.raises(ValueError, match="loop, 'x' → 'a' → 'x'"):
        Tree.from_graph({"x": ["a", None], "a": ["x", None]}, ["x"])


@pytest.mark.parametrize("beta", BETAS)
def test_claim_policy_evaluation_is_the_mean_over_responses(beta):
    """V^π and Q^π of any policy, and d_π, by enumeration. `eq-policy-evaluation`"""
    for seed in range(10):
        tree, reward, log_ref = problem(seed)
        policy = random_policy(tree, seed + 40)
        r, p = as_dict(tree, soft.kl_reward(policy, reward, log_ref, beta)), as_dict(tree, policy)
        ref, plain = as_dict(tree, log_ref), as_dict(tree, reward)
        for e, x in r.items():
            assert abs(x - (plain[e] - beta * (p[e] - ref[e]))) < 1e-12
        value, q = soft.evaluate(tree, policy, soft.kl_reward(policy, reward, log_ref, beta))
        q, mass = as_dict(tree, q), dict(prefixes_with(tree, soft.reach(tree, policy)))
        for prefix, v in prefixes_with(tree, value):
            n = len(prefix)
            ahead = [y for y in COMPLETE if y[:n] == prefix]
            mean = math.fsum(math.exp(oracle.total(p, y, n)) * oracle.total(r, y, n) for y in ahead)
            assert abs(v - mean) < 1e-10
            assert abs(mass[prefix] - math.exp(oracle.total(p, prefix))) < 1e-12
            assert abs(v - sum(math.exp(p[prefix, a]) * q[prefix, a] for a in range(4))) < 1e-10


def test_claim_two_prompts_are_two_problems():
    """Values of one prompt do not see the other's rewards."""
    tree, reward, log_ref = problem(3, n_prompts=2)
    ends = soft.soft_backup(tree, reward, log_ref, 0.5).value[0]
    changed = tuple(x.clone() for x in reward)
    changed[0][1] += 5.0
    again = soft.soft_backup(tree, changed, log_ref, 0.5).value[0]
    assert again[0] == ends[0] and again[1] - ends[1] == pytest.approx(5.0)


def test_claim_layered_graph_equals_the_tree_it_folds():
    """Merging states with equal futures changes no value; an absent action is one less branch."""
    merged = Tree((torch.tensor([[0, 0, ABSENT]]), torch.tensor([[TERMINAL, TERMINAL, TERMINAL]])))
    unmerged = Tree((torch.tensor([[0, 1]]), torch.full((2, 3), TERMINAL)))
    deep = torch.tensor([[0.3, -1.0, 0.2]], dtype=torch.float64)
    deep_ref = deep.flip(-1).log_softmax(-1)
    top = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    top_ref = top.log_softmax(-1)
    pad = torch.tensor([[0.0]], dtype=torch.float64)
    a = soft.soft_backup(
        merged,
        (torch.cat([top, pad], 1), deep),
        (torch.cat([top_ref, pad - math.inf], 1), deep_ref),
        0.7,
    )
    twice = (deep.repeat(2, 1), deep_ref.repeat(2, 1))
    b = soft.soft_backup(unmerged, (top, twice[0]), (top_ref, twice[1]), 0.7)
    assert a.value[0].item() == pytest.approx(b.value[0].item(), abs=1e-14)
    assert a.logp[0][0, 2] == -math.inf
    with pytest.raises(ValueError, match="merge"):
        merged.path_sums((top, deep))


def faulty(**changes):
    tree, reward, log_ref = problem(0)
    given = {"tree": tree, "reward": reward, "log_ref": log_ref, "beta": 0.5} | changes
    return pytest.raises(ValueError), given


@pytest.mark.parametrize("beta", [0, -1.0, math.inf, math.nan, "0.1"])
def test_claim_beta_must_be_positive_and_finite(beta):
    raises, given = faulty(beta=beta)
    with raises as caught:
        soft.soft_backup(**given)
    assert "beta must be a positive, finite number" in str(caught.value)


def test_claim_bad_fields_are_named():
    _, reward, log_ref = problem(0)
    never = torch.tensor([[-math.inf, 0, 0, 0]], dtype=torch.float64)
    cases = {
        "reward must have one": {"reward": reward[:-1]},
        "reward must be float64": {"reward": tuple(x.float() for x in reward)},
        "reward of action 0 in state 0 of level 1 is": {
            "reward": (reward[0], reward[1] / 0, *reward[2:])
        },
        "log_ref of action 0 in state 0 of level 0 is -inf: the reference never writes it": {
            "log_ref": (never, *log_ref[1:])
        },
        "in state 0 of level 0 the probabilities sum to 1 -": {
            "log_ref": tuple(2 * x for x in log_ref)
        },
    }
    for sentence, change in cases.items():
        raises, given = faulty(**change)
        with raises as caught:
            soft.soft_backup_prior(**given)
        assert sentence in str(caught.value)
