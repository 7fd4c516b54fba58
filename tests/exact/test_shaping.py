"""Equivalence, Theorem 1 and what preferences determine. Ids and tolerances: paper.md §3.1."""

import itertools
import math

import pytest
import torch

from qlearn.exact import preferences, shaping, soft
from qlearn.exact.tree import Tree

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
    random_states,
    small_problem,
)  # fmt: skip

COMPLETE = oracle.responses(N_ACTIONS, HORIZON, EOS)
BY_LEAF = {y: i for i, y in enumerate(Tree.full(N_ACTIONS, HORIZON, eos=EOS).leaves())}
ORDER = [BY_LEAF[y] for y in COMPLETE]


@pytest.mark.parametrize("beta", BETAS)
def test_eq_11_implicit_reward_keeps_every_preference(beta):
    """C1: Bradley-Terry of all pairs of responses, r against β log π*/π_ref (Theorem 1).

    `thm-one`, `eq-telescope`, `eq-return-from-policy`, `eq-bradley-terry`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        learned = as_dict(tree, shaping.canonical_reward(tree, reward, log_ref, beta))
        true = torch.tensor([oracle.total(r, y) for y in COMPLETE], dtype=torch.float64)
        implied = torch.tensor([oracle.total(learned, y) for y in COMPLETE], dtype=torch.float64)
        one, two = (1 / (1 + (x[None, :] - x[:, None]).exp()) for x in (true, implied))
        assert (one - two).abs().max() < 1e-10
        value = oracle.soft_value((0,), COMPLETE, r, ref, beta)
        assert (implied - (true - value)).abs().max() < 1e-10
        scores = tree.path_sums(soft.implicit_rewards(
            soft.soft_backup(tree, reward, log_ref, beta).logp, log_ref, beta
        ))[ORDER]  # fmt: skip
        fitted = preferences.bradley_terry_logp(scores[:, None], scores[None, :]).exp()
        assert (fitted - one).abs().max() < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_eq_11_implicit_reward_keeps_every_ranking(beta):
    """C2: Plackett-Luce probabilities of all rankings of three and of four responses.

    `thm-one`, `eq-plackett-luce`
    """
    complete = oracle.responses(3, 2, 0)
    orders = [torch.tensor(list(itertools.permutations(range(7), k))) for k in (3, 4)]
    for seed in SEEDS:
        tree, reward, log_ref = small_problem(seed, horizon=2)
        r = as_dict(tree, reward)
        weights = [math.exp(oracle.total(r, y)) for y in complete]
        weight = torch.tensor(weights, dtype=torch.float64)
        leaves = tree.leaves()
        implied = tree.path_sums(shaping.canonical_reward(tree, reward, log_ref, beta))
        implied = implied[[leaves.index(y) for y in complete]]
        for order in orders:
            drawn = weight[order]
            left = drawn.flip(1).cumsum(1).flip(1)
            expected = (drawn / left).prod(1)
            got = preferences.plackett_luce_logp(implied[order]).exp()
            assert (got - expected).abs().max() < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_claim_representative_is_normalised_and_its_own_q(beta):
    """C3: Σ_a π_ref exp(r̂/β) = 1, V = 0 and Q̃ = r̂ in every state, and 𝒜∘𝒜 = 𝒜.

    `eq-canonical`, `eq-idempotent`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        r, ref = as_dict(tree, reward), as_dict(tree, log_ref)
        learned = shaping.canonical_reward(tree, reward, log_ref, beta)
        table = as_dict(tree, learned)
        expected = oracle.advantages(COMPLETE, r, ref, beta)
        assert all(abs(table[e] - x) < 1e-10 for e, x in expected.items())
        for state in {s for s, _ in table}:
            terms = [ref[state, a] + table[state, a] / beta for a in range(N_ACTIONS)]
            assert abs(oracle.log_sum_exp(terms)) < 1e-10 / beta
        again = as_dict(tree, shaping.canonical_reward(tree, learned, log_ref, beta))
        assert all(abs(again[e] - x) < 1e-10 for e, x in table.items())
        best = soft.soft_backup_prior(tree, learned, log_ref, beta)
        assert all(v.abs().max() < 1e-10 for v in best.value)
        assert (flat(best.q_tilde) - flat(learned)).abs().max() < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_claim_shaping_moves_values_by_the_potential(beta):
    """C3: V_r' = V_r − Φ and Q̃_r' = Q̃_r − Φ, so π*, Ã and preferences stay.

    V_r, Q̃_r and π* are the oracle's: without π_ref the two backups would still agree.
    `eq-class-value`, `eq-shaping`, `def-equivalent`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        potential = random_states(tree, seed)
        shaped = shaping.shape_reward(tree, reward, potential)
        r, phi = as_dict(tree, reward), dict(_states(tree, potential))
        for (s, a), x in as_dict(tree, shaped).items():
            assert abs(x - (r[s, a] + phi.get((*s, a), 0.0) - phi[s])) < 1e-12
        value, q_tilde, logp = by_oracle(tree, reward, log_ref, beta)
        moved = soft.soft_backup_prior(tree, shaped, log_ref, beta)
        for t, phi_t in enumerate(potential):
            assert (moved.value[t] - (value[t] - phi_t)).abs().max() < 1e-10
            assert (moved.q_tilde[t] - (q_tilde[t] - phi_t[:, None])).abs().max() < 1e-10
            assert (moved.logp[t].exp() - logp[t].exp()).abs().max() < 1e-10
        found = shaping.find_potential(tree, reward, shaped)
        assert furthest(found, potential) < 1e-10


@pytest.mark.parametrize("n_prompts", [1, 2])
def test_claim_preferences_fix_returns_and_nothing_else(n_prompts):
    """C4: rank L − n_prompts, nullity n, and behind every null vector a potential.

    `eq-rank`, `thm-rank`, `thm-invisible`, `eq-shaping`
    """
    for seed in SEEDS:
        tree, reward, _ = small_problem(seed, n_prompts=n_prompts)
        complete = [y for p in range(n_prompts) for y in oracle.responses(3, 3, 0, p)]
        edges = list(as_dict(tree, reward))
        column = {edge: i for i, edge in enumerate(edges)}
        rows = []
        for p in range(n_prompts):
            mine = [y for y in complete if y[0] == p]
            for y in mine[1:]:
                row = [0.0] * len(edges)
                for step in oracle.steps(y):
                    row[column[step]] += 1
                for step in oracle.steps(mine[0]):
                    row[column[step]] -= 1
                rows.append(row)
        by_hand = torch.tensor(rows, dtype=torch.float64)
        seen = shaping.difference_matrix(tree)
        n_states, n_leaves = len({s for s, _ in edges}), len(complete)
        for matrix in (by_hand, seen, torch.cat([by_hand, seen])):
            assert torch.linalg.matrix_rank(matrix) == n_leaves - n_prompts
        basis = shaping.invisible_rewards(tree)
        assert len(edges) - (n_leaves - n_prompts) == n_states == len(basis)
        assert torch.linalg.matrix_rank(basis) == n_states
        assert not (by_hand @ basis.T).any()
        # The rows of `seen` are a response less its prompt's first, in the order of `leaves`.
        leaves = tree.leaves()
        first = {p: next(y for y in leaves if y[0] == p) for p in range(n_prompts)}
        r = as_dict(tree, reward)
        differences = [
            oracle.total(r, y) - oracle.total(r, first[y[0]]) for y in leaves if y != first[y[0]]
        ]
        assert (seen @ flat(reward)).tolist() == pytest.approx(differences, abs=1e-12)
        states = [s for level in tree.prefixes() for s in level]
        for state, row in zip(states, basis.tolist(), strict=True):
            for (s, a), x in zip(edges, row, strict=True):
                assert x == ((*s, a) == state) - (s == state)
        # Null vectors that know nothing of potentials: the SVD's, mixed at random.
        null = torch.linalg.svd(by_hand).Vh[n_leaves - n_prompts :]
        generator = torch.Generator().manual_seed(seed)
        vector = torch.randn(len(null), generator=generator, dtype=torch.float64) @ null
        residual = basis.T @ torch.linalg.lstsq(basis.T, vector[:, None]).solution - vector[:, None]
        assert residual.abs().max() < 1e-10
        changed = tuple(x + y for x, y in zip(reward, tree.split(vector), strict=True))
        potential = shaping.find_potential(tree, reward, changed)
        again = shaping.shape_reward(tree, reward, potential)
        assert (flat(again) - flat(changed)).abs().max() < 1e-10


def test_claim_two_rewards_that_differ_in_one_return_are_told_apart():
    tree, reward, _ = problem(0)
    other = tuple(x.clone() for x in reward)
    other[3][5, 2] += 0.1
    with pytest.raises(ValueError, match=r"not equivalent: in state 5 of level 3 .* 0\.1 apart"):
        shaping.find_potential(tree, reward, other)


def test_claim_absent_actions_ask_for_no_potential():
    graph = {"x": ["a", "b", None], "a": [None], "b": [None, None]}
    tree, _ = Tree.from_graph(graph, ["x"])
    reward = tuple(torch.zeros(shape, dtype=torch.float64) for shape in tree.shapes)
    potential = random_states(tree, 3)
    found = shaping.find_potential(tree, reward, shaping.shape_reward(tree, reward, potential))
    assert furthest(found, potential) < 1e-12


def test_bug_rewards_that_differ_are_told_apart_beside_absent_actions():
    """State x has three actions and b two: a change of one return at b is seen, ABSENT or not."""
    graph = {"x": ["a", "b", None], "a": [None], "b": [None, None]}
    tree, _ = Tree.from_graph(graph, ["x"])
    reward = tuple(torch.zeros(shape, dtype=torch.float64) for shape in tree.shapes)
    for level, action, states in ((1, 1, "state 1 of level 1"), (0, 2, "state 0 of level 0")):
        other = tuple(x.clone() for x in reward)
        other[level][level, action] = 0.5
        with pytest.raises(ValueError, match=f"in {states} the actions ask .* 0.5 apart"):
            shaping.find_potential(tree, reward, other)


def test_claim_the_tolerance_grows_with_the_largest_reward():
    """Rounding of rewards of 10¹² is 10⁻⁴: they are equivalent though other levels hold zeros."""
    tree = Tree.full(2, 2)
    reward = tuple(torch.zeros(shape, dtype=torch.float64) for shape in tree.shapes)
    large = (torch.tensor([[1e12, 1e12 + 1e-4]], dtype=torch.float64), reward[1])
    found = shaping.find_potential(tree, reward, large)
    assert found[0].item() == pytest.approx(-1e12) and not found[1].any()
    small = (torch.tensor([[1.0, 1.0 + 1e-4]], dtype=torch.float64), reward[1])
    with pytest.raises(ValueError, match="not equivalent"):
        shaping.find_potential(tree, reward, small)


@pytest.mark.parametrize("beta", BETAS)
def test_eq_10_log_ratio_is_the_soft_advantage(beta):
    """E1: β log π*/π_ref = r + V*(s') − V*(s) on every edge, V by enumeration.

    `eq-advantage`, `eq-implicit-reward`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        expected = oracle.advantages(COMPLETE, *_dicts(tree, reward, log_ref), beta)
        best = soft.soft_backup(tree, reward, log_ref, beta)
        got = as_dict(tree, soft.implicit_rewards(best.logp, log_ref, beta))
        assert all(abs(got[e] - x) < 1e-10 for e, x in expected.items())


@pytest.mark.parametrize("beta", BETAS)
def test_claim_dense_and_sparse_rewards_give_one_heat_map(beta):
    """E2: the same returns, paid along the way, at the end or anyhow, have one implicit reward.

    `eq-advantage`, `eq-sparse-reward`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        r = as_dict(tree, reward)
        returns = torch.tensor([oracle.total(r, y) for y in tree.leaves()], dtype=torch.float64)
        sparse = tree.only_at_end(returns)
        paid = as_dict(tree, sparse)
        for y in COMPLETE:
            *before, last = oracle.steps(y)
            assert not any(paid[e] for e in before) and abs(paid[last] - oracle.total(r, y)) < 1e-12
        anyhow = shaping.shape_reward(tree, sparse, random_states(tree, seed + 1))
        maps = [
            flat(shaping.canonical_reward(tree, x, log_ref, beta)) for x in (reward, sparse, anyhow)
        ]
        assert all((maps[0] - x).abs().max() < 1e-10 for x in maps[1:])


@pytest.mark.parametrize("beta", BETAS)
def test_claim_heat_map_is_the_reward_only_in_the_additive_world(beta):
    """E3: r̂ = ρ_t − β log E e^{ρ_t/β} where rewards go by position, the reference knows no prefix.

    All responses have one length.

    `eq-additive-credit`
    """
    tree = Tree.full(3, 3, eos=None)
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        rho, logits = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
        reward = tuple(rho[t].repeat(n, 1) for t, (n, _) in enumerate(tree.shapes))
        log_ref = tuple(
            logits[t].log_softmax(-1).repeat(n, 1) for t, (n, _) in enumerate(tree.shapes)
        )
        learned = shaping.canonical_reward(tree, reward, log_ref, beta)
        for t in range(3):
            p = [math.exp(x) for x in logits[t].log_softmax(-1).tolist()]
            terms = [math.log(q) + x / beta for q, x in zip(p, rho[t].tolist(), strict=True)]
            expected = rho[t] - beta * oracle.log_sum_exp(terms)
            assert (learned[t] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_claim_delayed_blame_stands_on_the_culprit(beta):
    """E4: a first token decides a penalty paid at EOS: r̂ is 0 on every later token.

    `eq-culprit`
    """
    for seed in SEEDS:
        tree, _, log_ref = problem(seed)
        returns = torch.tensor([-1.0 if y[1] == 2 else 0.0 for y in tree.leaves()]).double()
        learned = shaping.canonical_reward(tree, tree.only_at_end(returns), log_ref, beta)
        assert all(x.abs().max() < 1e-10 for x in learned[1:])
        p = log_ref[0][0, 2].exp().item()
        value = beta * math.log(1 - p + p * math.exp(-1 / beta))
        assert abs(learned[0][0, 2].item() - (-1 - value)) < 1e-10
        assert learned[0][0, 2] < 0 < learned[0][0, 1]


def test_claim_credit_depends_on_the_reference():
    """E5: one reward, two references, two maps; XOR's credit lands on the second token."""
    tree = Tree.full(2, 2, eos=None)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    xor = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    fair = tuple(torch.full(s, math.log(0.5), dtype=torch.float64) for s in tree.shapes)
    learned = shaping.canonical_reward(tree, (zero, xor), fair, 0.5)
    assert learned[0].abs().max() < 1e-12
    assert (learned[1] * (2 * xor - 1) > 0.25).all()
    leaning = (fair[0], torch.tensor([[0.9, 0.1], [0.9, 0.1]], dtype=torch.float64).log())
    other = shaping.canonical_reward(tree, (zero, xor), leaning, 0.5)
    assert other[0].abs().max() > 0.3
    assert (flat(other) - flat(learned)).abs().max() > 0.3


@pytest.mark.parametrize("beta", BETAS)
def test_claim_cumulative_log_ratio_is_a_forecast(beta):
    """E6: Σ_{i<t} β log π/π_ref = β log E_ref[exp(R̂/β) | s_t], and E_ref[π/π_ref] = 1.

    `eq-martingale`
    """
    for seed in SEEDS:
        tree, reward, log_ref = problem(seed)
        logp = soft.soft_backup(tree, reward, log_ref, beta).logp
        learned = soft.implicit_rewards(logp, log_ref, beta)
        table, ref = as_dict(tree, learned), as_dict(tree, log_ref)
        so_far = as_dict(tree, tree.prefix_sums(learned))
        ahead = {}
        for y in COMPLETE:
            for n in range(1, len(y)):
                whole = oracle.total(table, y) / beta
                ahead.setdefault(y[:n], []).append(oracle.total(ref, y, n) + whole)
        for (s, a), x in so_far.items():
            if (*s, a) in ahead:
                assert abs(x - beta * oracle.log_sum_exp(ahead[*s, a])) < 1e-10
        for p, q in zip(logp, log_ref, strict=True):
            assert ((q.exp() * (p - q).exp()).sum(-1) - 1).abs().max() < 1e-10


def test_claim_end_potentials_are_refused_where_preferences_must_stay():
    tree, reward, _ = small_problem(0)
    potential = tuple(torch.zeros(n, dtype=torch.float64) for n, _ in tree.shapes)
    ends = tuple(torch.zeros(s, dtype=torch.float64) for s in tree.shapes)
    ends[1][1, 0] = 0.5
    with pytest.raises(
        ValueError, match=r"end_potential is 0\.5 after action 0 in state 1 of level 1"
    ):
        shaping.shape_reward(tree, reward, potential, ends)
    with pytest.raises(ValueError, match="one number a state"):
        shaping.shape_reward(tree, reward, potential[:-1])


def _states(tree, field):
    for prefixes, x in zip(tree.prefixes(), field, strict=True):
        yield from zip(prefixes, x.tolist(), strict=True)


def _dicts(tree, *fields):
    return (as_dict(tree, x) for x in fields)
