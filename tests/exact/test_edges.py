"""The exact floor at its edges: one state, one action, ABSENT ones, huge and tiny numbers.

Every public function ends in a right value, checked against plain Python over the list of paths,
or in a ValueError of one sentence.
"""

import math
import random
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlearn.exact import (
    chance,
    check,
    leftovers,
    likelihood,
    preferences,
    search,
    shaping,
    soft,
    training,
)
from qlearn.exact.chance import ChanceTree, with_chance
from qlearn.exact.optimise import minimise
from qlearn.exact.tree import ABSENT, TERMINAL, Tree, lift, present

from ..edges import TESTED, check_refused, close, edge, few, public_names

NAN, INF = math.nan, math.inf
SCALES = (1e-300, 1e-3, 1.0, 1e3, 1e150)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def ragged(seed, n_actions, horizon, n_prompts):
    """A tree whose states have any non-empty subset of the actions, by the dice of `seed`."""
    dice, child, n = random.Random(seed), [], n_prompts
    for t in range(horizon):
        table, below = [], 0
        for _ in range(n):
            row = [dice.choice([ABSENT, TERMINAL, 0]) for _ in range(n_actions)]
            if all(a == ABSENT for a in row):
                row[dice.randrange(n_actions)] = dice.choice([TERMINAL, 0])
            for a, x in enumerate(row):
                if x == 0:
                    row[a] = TERMINAL if t + 1 == horizon else below
                    below += t + 1 < horizon
            table.append(row)
        child.append(torch.tensor(table))
        n = below
        if not n:
            break
    return Tree(tuple(child))


trees = st.builds(
    ragged, st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)
)
seeds = st.integers(0, 10_000)


def fields(tree, seed, scale=1.0, rubbish=0.0):
    """A reward (`rubbish` at ABSENT actions) and two policies (−∞ there)."""
    generator = torch.Generator().manual_seed(seed)
    reward, ref, own = [], [], []
    for t, shape in enumerate(tree.shapes):
        r, *logits = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        absent = tree.absent(t)
        absent = torch.zeros(shape, dtype=torch.bool) if absent is None else absent
        reward.append((scale * r.clamp(-1, 1)).masked_fill(absent, rubbish))
        ref.append(logits[0].masked_fill(absent, -INF).log_softmax(-1))
        own.append(logits[1].masked_fill(absent, -INF).log_softmax(-1))
    return tuple(reward), tuple(ref), tuple(own)


def paths(tree, t=0, s=None):
    """Every response as [(t, s, a), ...], by recursion over the tables."""
    found = []
    for row in range(len(tree.child[0])) if s is None else [s]:
        for a, after in enumerate(tree.child[t][row].tolist()):
            if after == TERMINAL:
                found.append([(t, row, a)])
            elif after >= 0:
                found += [[(t, row, a), *rest] for rest in paths(tree, t + 1, after)]
    return found


def total(path, field):
    return math.fsum(field[t][s, a].item() for t, s, a in path)


def soft_mean(returns, log_ref, beta):
    """β log Σ p exp(R/β), the largest return taken out."""
    top = max(returns)
    pairs = zip(returns, log_ref, strict=True)
    return top + beta * math.log(math.fsum(math.exp(p + (r - top) / beta) for r, p in pairs))


def of_prompt(tree, p):
    return [path for path in paths(tree) if path[0][1] == p]


def test_claim_every_public_function_has_an_edge_test():
    """A new public function of the exact floor needs an edge test of its own, below."""
    assert public_names("qlearn.exact") - TESTED == set()


# --- soft backups ------------------------------------------------------------------------------


@edge(soft.soft_backup, soft.soft_backup_prior, soft.objective, soft.regret, soft.expected_return,
      soft.evaluate, present, check.check_problem, check.check_reward)  # fmt: skip
@few
@given(trees, seeds, st.sampled_from(SCALES), st.sampled_from([1e-3, 1.0, 1e3]),
       st.sampled_from([0.0, NAN, INF, 1e308]))  # fmt: skip
def test_claim_values_are_right_at_every_size(tree, seed, scale, beta, rubbish):
    """V*, J, E and regret against the list of paths; what stands at ABSENT is never read."""
    reward, log_ref, logp = fields(tree, seed, scale, rubbish)
    size = scale * tree.horizon + 40 * beta
    inside = soft.soft_backup(tree, reward, log_ref, beta)
    prior = soft.soft_backup_prior(tree, reward, log_ref, beta)
    value, q = soft.evaluate(tree, logp, reward)
    J = soft.objective(tree, logp, reward, log_ref, beta)
    regret = soft.regret(tree, logp, reward, log_ref, beta)
    for p in range(len(tree.child[0])):
        mine = of_prompt(tree, p)
        returns, ref, own = ([total(y, f) for y in mine] for f in (reward, log_ref, logp))
        expected = soft_mean(returns, ref, beta)
        assert close(inside.value[0][p].item(), expected, size)
        assert close(prior.value[0][p].item(), expected, size)
        mean = math.fsum(math.exp(x) * r for x, r in zip(own, returns, strict=True))
        price = math.fsum(math.exp(x) * (x - y) for x, y in zip(own, ref, strict=True))
        assert close(soft.expected_return(tree, logp, reward)[p].item(), mean, size)
        assert close(value[0][p].item(), mean, size) and close(
            J[p].item(), mean - beta * price, size
        )
        assert close(regret[p].item(), expected - mean + beta * price, size)
    clean = present(tree, reward)
    for t, shape in enumerate(tree.shapes):
        absent = tree.child[t] == ABSENT
        assert (inside.logp[t][absent] == -INF).all() and (inside.q[t][absent] == -INF).all()
        assert not prior.q_tilde[t].isnan().any() and not q[t].isnan().any()
        assert not clean[t][absent].any() and torch.equal(clean[t][~absent], reward[t][~absent])
        assert tuple(inside.logp[t].shape) == shape
        assert (inside.logp[t].exp().sum(-1) - 1).abs().max() < 1e-12


@edge(soft.soft_value, soft.soft_value_prior, check.check_beta)
def test_claim_soft_values_are_limits_where_exp_overflows():
    """Q/β beyond float64, −∞ and +∞, one action: the limit; no action or a bad β: a sentence."""
    for beta in (1e-300, 1e-3, 1.0, np.float32(0.5), torch.tensor(0.25)):
        b = float(beta)
        assert soft.soft_value(double(1e308, -1e308), beta).item() == 1e308
        assert soft.soft_value_prior(double(1e308, -1e308), double(-1.0, -0.5), beta).item() == (
            1e308 if b <= 1 else pytest.fail()
        )
        assert soft.soft_value(double(3.0), beta).item() == 3.0
        assert soft.soft_value(double(-INF, 2.0), beta).item() == 2.0
        assert soft.soft_value(double(-INF, -INF), beta).item() == -INF
        assert soft.soft_value(double(INF, 2.0), beta).item() == INF
        for never in (NAN, INF, 1e308):  # not written, so not counted
            got = soft.soft_value_prior(double(never, 2.0), double(-INF, 0.0), beta).item()
            assert got == 2.0
    q, slope = double(1.0, 2.0, 3.0).requires_grad_(), None
    (slope,) = torch.autograd.grad(soft.soft_value(q, 0.5), q)
    assert torch.allclose(slope, (q.detach() / 0.5).softmax(0))
    for bad in (0, -1, NAN, INF, "1", None, torch.zeros(1), (1.0,)):
        check_refused(lambda bad=bad: soft.soft_value(double(1.0), bad), "beta must be")
    check_refused(lambda: soft.soft_value(double(), 1.0), "at least one number")
    check_refused(lambda: soft.soft_value(torch.tensor(1.0), 1.0), "at least one number")


def test_bug_rewards_near_the_end_of_float64():
    """1e308 twice in one level is lawful; twice on one path overflows, and the sentence says so."""
    tree = Tree.full(2, 1)
    big, ref = (double([1e308, 1e308])[0:1],), (double([0.5, 0.5]).log(),)
    best = soft.soft_backup_prior(tree, big, ref, 1.0)
    assert best.value[0].item() == 1e308 and torch.equal(best.logp[0], ref[0])
    assert soft.regret(tree, ref, big, ref, 1.0).item() == 0
    deep = Tree.full(2, 2, eos=None)
    reward = tuple(torch.full(s, 1e308, dtype=torch.float64) for s in deep.shapes)
    log_ref = tuple(torch.zeros(s, dtype=torch.float64).log_softmax(-1) for s in deep.shapes)
    for backup in (soft.soft_backup, soft.soft_backup_prior):
        check_refused(lambda b=backup: b(deep, reward, log_ref, 1.0), "level 0 overflow float64")


@edge(soft.implicit_reward, soft.implicit_rewards, soft.kl_reward, soft.reward_from_q,
      shaping.canonical_reward, soft.sequence_kl, soft.beta_at, check.check_alike)  # fmt: skip
@few
@given(trees, seeds, st.sampled_from([0.05, 1.0, 20.0]), st.sampled_from([0.0, NAN, -7.0]))
def test_claim_the_representative_is_the_implicit_reward_everywhere(tree, seed, beta, rubbish):
    """ABSENT actions included, where both are 0; r from Q is 0 there too, and charges nothing."""
    reward, log_ref, logp = fields(tree, seed, 1.0, rubbish)
    best = soft.soft_backup(tree, reward, log_ref, beta)
    mine = soft.implicit_rewards(best.logp, log_ref, beta)
    canonical = shaping.canonical_reward(tree, reward, log_ref, beta)
    back = soft.reward_from_q(tree, best.q, log_ref, beta)
    charged = soft.kl_reward(logp, back, log_ref, beta)
    price = tuple(torch.full((n,), beta, dtype=torch.float64) for n, _ in tree.shapes)
    by_state = soft.implicit_rewards(best.logp, log_ref, price)
    for t in range(tree.horizon):
        absent, tolerance = tree.child[t] == ABSENT, 1e-11 * (1 + beta)
        assert (mine[t] - canonical[t]).abs().max() < tolerance * 10
        assert torch.equal(mine[t], by_state[t]) and soft.beta_at(price, t).shape[1] == 1
        for x in (mine, canonical, back, charged):
            assert not x[t][absent].any() and x[t].isfinite().all()
        assert (back[t] - reward[t])[~absent].abs().max() < tolerance * 10
    assert soft.sequence_kl(tree, logp, logp).abs().max() == 0
    far = soft.sequence_kl(tree, logp, log_ref)
    for p in range(len(tree.child[0])):
        pairs = [(total(y, logp), total(y, log_ref)) for y in of_prompt(tree, p)]
        expected = math.fsum(math.exp(x) * (x - y) for x, y in pairs)
        assert close(far[p].item(), expected, 1.0)


def test_claim_log_ratios_of_zero_probabilities_are_limits():
    """0/0 is no token, so 0; p/0 is +∞, 0/p −∞; the elementwise ratio has no 0/0."""
    logp, ref = (double([-INF, 0.0, -INF]),), (double([-INF, -INF, 0.0]),)
    assert soft.implicit_rewards(logp, ref, 0.5)[0].tolist() == [[0.0, INF, -INF]]
    assert math.isnan(soft.implicit_reward(double(-INF), double(-INF), 1.0).item())
    tree = Tree.full(2, 1)
    sure, other = (double([0.0, -INF]),), (double([-INF, 0.0]),)
    assert soft.sequence_kl(tree, sure, other).item() == INF
    check_refused(lambda: soft.implicit_reward(double(1.0), double([1.0]), 1.0), "one shape")
    check_refused(lambda: soft.implicit_reward(torch.tensor([1]), double(1.0), 1.0), "floats")
    check_refused(lambda: soft.implicit_rewards(logp, (double([0.0]),), 1.0), "log_ref must")
    check_refused(lambda: soft.kl_reward(logp, logp, (), 1.0), "log_ref must have one")


@edge(soft.reach, soft.jacobian, check.check_policy)
@few
@given(trees, seeds)
def test_claim_visits_are_counted_along_the_paths(tree, seed):
    """d_π and ∂Q*/∂r: the probability of the paths through a state, or from edge to edge."""
    _, _, logp = fields(tree, seed)
    visits = soft.reach(tree, logp)
    matrix = soft.jacobian(tree, logp)
    column = [(t, s, a) for t, (n, width) in enumerate(tree.shapes) for s in range(n)
              for a in range(width)]  # fmt: skip
    number = {e: i for i, e in enumerate(column)}
    expected = [torch.zeros(n, dtype=torch.float64) for n, _ in tree.shapes]
    follows = torch.zeros(len(column), len(column), dtype=torch.float64)
    for y in paths(tree):
        p = math.exp(total(y, logp))
        for t, s, _ in y:
            expected[t][s] += p
        for i, e in enumerate(y):
            for later in y[i:]:
                follows[number[e], number[later]] += math.exp(total(y[i + 1 :], logp))
    assert all(torch.allclose(x, y) for x, y in zip(visits, expected, strict=True))
    here = [number[e] for e in {e for y in paths(tree) for e in y}]
    assert torch.allclose(matrix[here][:, here], follows[here][:, here])
    assert matrix.isfinite().all() and (matrix.diagonal() == 1).all()


def policies_refused(call):
    """`call(tree, logp)` refuses what is no policy, in one sentence each."""
    tree = Tree((torch.tensor([[TERMINAL, TERMINAL, ABSENT]]),))
    half = double([0.5, 0.5, 0.0]).log()
    call(tree, (half,))
    for bad, words in (
        (half + 0.1, "probabilities sum to 1"),
        (half.clone().fill_(NAN), "must be -inf|probabilities sum|not a finite|never writes"),
        (torch.tensor([[-1.0, -1.0, 0.0]]).double(), "must be -inf for action 2"),
        (half.float(), "must be float64"),
        (half[:, :2], "must have one"),
        (half[0], "must have one"),
    ):
        check_refused(lambda bad=bad: call(tree, (bad,)), words)
    check_refused(lambda: call(tree, ()), "must have one")
    check_refused(lambda: call(tree, ([[-1.0, -1.0]],)), "must be a tuple with one tensor a level")


ZERO = (torch.zeros(1, 3, dtype=torch.float64),)
SURE = (double([0.5, 0.5, 0.0]).log(),)


@pytest.mark.parametrize("call", [
    lambda tree, p: soft.evaluate(tree, p, ZERO),
    lambda tree, p: soft.expected_return(tree, p, ZERO),
    soft.reach,
    soft.jacobian,
    lambda tree, p: soft.objective(tree, p, ZERO, SURE, 1.0),
    lambda tree, p: soft.regret(tree, p, ZERO, SURE, 1.0),
    lambda tree, p: soft.sequence_kl(tree, p, SURE),
    lambda tree, p: soft.sequence_kl(tree, SURE, p),
    lambda tree, p: soft.soft_backup(tree, ZERO, p, 1.0),
    lambda tree, p: soft.soft_backup_prior(tree, ZERO, p, 1.0),
    lambda tree, p: soft.reward_from_q(tree, ZERO, p, 1.0),
    lambda tree, p: shaping.canonical_reward(tree, ZERO, p, 1.0),
    lambda tree, p: search.likelihood_scores(tree, p, 1.0),
    lambda tree, p: search.beam(tree, p, 1),
    lambda tree, p: search.guided_scores(tree, ZERO, p, 1.0),
    lambda tree, p: search.best_objective(tree, ZERO, p, 1.0),
    lambda tree, p: search.induced_policy(tree, ZERO, p, 1.0, (double(0.0),)),
    lambda tree, p: training.policy_gradient(tree, p, ZERO, SURE, 1.0),
    lambda tree, p: next(training.gradient_ascent(tree, ZERO, p, 1.0, 0.1)),
    lambda tree, p: next(training.natural_gradient_ascent(tree, ZERO, p, 1.0, 0.1)),
    lambda tree, p: next(training.ppo(tree, ZERO, p, 1.0, 0.1)),
    lambda tree, p: next(training.ppo(tree, ZERO, SURE, 1.0, 0.1, start=p)),
    lambda tree, p: training.dpo_loss(tree, SURE, double(0.0, 0.0), p, 1.0),
])  # fmt: skip
def test_claim_what_is_no_policy_is_refused(call):
    policies_refused(call)


@edge(check.check_fields, check.check_states, check.check_number, check.check_count,
      check.check_below, check.check_mass, check.check_tensors)  # fmt: skip
def test_claim_checks_name_what_is_wrong():
    tree = Tree.full(2, 2)
    check_refused(lambda: check.check_fields([(1, 2)], reward=3), "reward must be a tuple")
    check_refused(lambda: check.check_states(tree, value=(double(0.0),)), "number a state")
    for x in (NAN, INF, 0, "1", None, 1j):
        check_refused(
            lambda x=x: check.check_number("lr", x, above=0), r"lr must lie in \(0, inf\)"
        )
    for x in (1e-300, 1, np.float32(1), np.int64(3), Fraction(1, 2), True):
        check.check_number("lr", x, above=0, most=5)
    for n in (0, 1.0, "1", NAN, None):
        check_refused(lambda n=n: check.check_count("n", n), "n must be a whole number, at least 1")
    check.check_count("n", np.int64(1))
    check_refused(lambda: check.check_below(tree, 0, double(0.0, 1.0)), "must have shape")
    check_refused(lambda: check.check_mass(tree, 0, double(0.0, 1.0)), "must have shape")
    one, two = double(1.0, 2.0), double([1.0], [2.0])
    check_refused(lambda: check.check_tensors(a=one, b=two), "a and b must have one shape")
    check_refused(lambda: check.check_tensors(broadcast=True, a=one, b=two), "one shape")
    check.check_tensors(broadcast=True, a=two, b=two.T)
    check_refused(lambda: check.check_tensors(a=[1.0]), "a must be a tensor of floats, not list")
    check_refused(lambda: check.check_tensors([1], a=one), "mask must be a tensor")


# --- trees -------------------------------------------------------------------------------------


@edge(Tree, Tree.unfold, Tree.shapes, Tree.horizon, Tree.n_states, Tree.n_edges, Tree.absent,
      Tree.split, Tree.prefixes, Tree.leaves, Tree.prefix_sums, Tree.path_sums, Tree.at_ends,
      Tree.prompt_of, Tree.only_at_end, Tree.next_value, Tree.push, lift)  # fmt: skip
@few
@given(trees, seeds)
def test_claim_paths_of_any_tree_are_those_of_the_tables(tree, seed):
    """Leaves, sums, ends, prompts, counts, mass and values against the recursion over tables."""
    (reward, _, _), mine = fields(tree, seed), paths(tree)
    leaves = [(y[0][1], *(a for _, _, a in y)) for y in mine]
    assert sorted(tree.leaves()) == sorted(leaves)
    order = [mine[leaves.index(y)] for y in tree.leaves()]
    sums = tree.path_sums(reward).tolist()
    assert all(close(x, total(y, reward)) for x, y in zip(sums, order, strict=True))
    ends = [reward[t][s, a].item() for *_, (t, s, a) in order]
    assert tree.at_ends(reward).tolist() == ends
    assert tree.prompt_of().tolist() == [y[0][1] for y in order]
    assert torch.equal(tree.at_ends(tree.only_at_end(double(*sums))), double(*sums))
    assert tree.n_edges == sum(int((c != ABSENT).sum()) for c in tree.child)
    assert tree.n_states == len({e[:2] for y in mine for e in y}) == sum(map(len, tree.prefixes()))
    flat = torch.cat([x.flatten() for x in reward])
    assert all(torch.equal(x, y) for x, y in zip(tree.split(flat), reward, strict=True))
    same, rows = tree.unfold()
    assert same.leaves() == tree.leaves() and same.shapes == tree.shapes
    assert all(torch.equal(x, y) for x, y in zip(lift(reward, rows), reward, strict=True))
    assert (tree.absent(0) is None) == bool((tree.child[0] != ABSENT).all())
    mass = torch.ones_like(reward[-1])
    assert tree.push(tree.horizon - 1, mass).shape == (0,)
    assert not tree.next_value(tree.horizon - 1, None).any()
    assert not tree.next_value(tree.horizon - 1, double()).any()
    for bad in (flat[:-1], flat[None], None):
        check_refused(lambda bad=bad: tree.split(bad), "one vector of")
    for bad in (double(*sums, 0.0), double(sums), None):
        check_refused(lambda bad=bad: tree.only_at_end(bad), "one vector of")
    check_refused(lambda: tree.path_sums(reward[:-1]), "must have one")
    check_refused(lambda: tree.at_ends((*reward, reward[0])), "must have one")
    check_refused(lambda: tree.prefix_sums(tuple(x.float() for x in reward)), "float64")
    check_refused(lambda: tree.push(0, double(1.0)[0]), "must have shape")
    check_refused(lambda: tree.next_value(0, double([1.0])), "must have shape")


def test_bug_unfolding_leaves_out_what_no_path_reaches():
    """A level that nothing reaches is no level of the tree of paths; nor can it be empty."""
    graph = Tree((torch.tensor([[TERMINAL, ABSENT]]), torch.tensor([[0, TERMINAL]]),
                  torch.tensor([[TERMINAL, TERMINAL]])))  # fmt: skip
    tree, rows = graph.unfold()
    assert tree.shapes == [(1, 2)] and tree.leaves() == [(0, 0)]
    field = tuple(torch.ones(s, dtype=torch.float64) for s in graph.shapes)
    assert tree.path_sums(lift(field, rows)).tolist() == [1.0]
    check_refused(lambda: lift((), rows), "has 0 levels, the unfolded tree 1")
    unreached = Tree((torch.tensor([[0, TERMINAL]]), torch.tensor([[TERMINAL] * 2] * 2)))
    assert unreached.unfold()[0].shapes == [(1, 2), (1, 2)]
    check_refused(lambda: unreached.leaves(), "Paths merge")
    check_refused(lambda: Tree((torch.tensor([[TERMINAL]]), torch.zeros(0, 1).long())), "no state")
    check_refused(lambda: Tree((torch.zeros(1, 0).long(),)), "has no action")
    check_refused(lambda: Tree(([[TERMINAL]],)), "must be an int64 table")
    check_refused(lambda: Tree((torch.tensor([[-1.0]]),)), "must be an int64 table")


@edge(Tree.full, Tree.layered, Tree.from_graph)
def test_claim_trees_of_any_size_are_right_or_refused():
    assert Tree.full(np.int64(1), 3, eos=None).leaves() == [(0, 0, 0, 0)]
    assert Tree.full(1, 10**9).shapes == [(1, 1)]  # the only word is the end
    for bad in ((0, 1), (1, 0), (2.5, 1), (2, NAN), ("2", 1)):
        check_refused(lambda bad=bad: Tree.full(*bad), "whole and at least 1")
    for eos in (-1, 2, 0.5):
        check_refused(lambda eos=eos: Tree.full(2, 2, eos=eos), "eos must be one of the 2 actions")
    for bad in ((50_000, 12), (2, 10**9, None), (1, 10**10, None)):
        check_refused(lambda bad=bad: Tree.full(*bad), "too many to enumerate")
    assert Tree.layered(np.array([1])).shapes == [(1, 1)]
    for bad in ((), (0,), (2, -1), (1.5,)):
        check_refused(lambda bad=bad: Tree.layered(bad), "at least one level")
    check_refused(lambda: Tree.from_graph({}, []), "at least one prompt")
    check_refused(lambda: Tree.from_graph({"x": []}, ["x"]), "has no action")
    check_refused(lambda: Tree.from_graph({"x": ["x"]}, ["x"]), "'x' → 'x'")
    tree, states = Tree.from_graph({"x": [None]}, ["x", "x"])
    assert tree.shapes == [(1, 1)] and states == (["x"],)


@edge(ChanceTree, with_chance, ChanceTree.shapes, ChanceTree.horizon, ChanceTree.absent,
      ChanceTree.next_value, ChanceTree.push, ChanceTree.realised, ChanceTree.spread,
      ChanceTree.lift, ChanceTree.log_prob, leftovers.chance_leftover)  # fmt: skip
@few
@given(trees, seeds, st.sampled_from([0.0, 0.3, np.float32(0.5)]))
def test_claim_chance_that_changes_nothing_changes_nothing(tree, seed, p_other):
    """The other row is the same row: all values stay; leftovers are 0; the last level pushes 0."""
    reward, log_ref, logp = fields(tree, seed)
    alike = with_chance(tree, tree.child, p_other)
    assert alike.shapes == tree.shapes and alike.horizon == tree.horizon
    one = soft.soft_backup(tree, reward, log_ref, 0.5)
    two = soft.soft_backup(alike, reward, log_ref, 0.5)
    for t in range(tree.horizon):
        assert torch.allclose(one.value[t], two.value[t])
        assert (alike.absent(t) is None) == (tree.absent(t) is None)
        mass = logp[t].exp()
        assert torch.allclose(alike.push(t, mass), tree.push(t, mass))
    assert all(torch.allclose(x, y) for x, y in zip(soft.reach(alike, logp), soft.reach(tree, logp),
                                                   strict=True))  # fmt: skip
    assert leftovers.chance_leftover(alike, two.value).abs().max() < 1e-12
    law = alike.realised.path_sums(tuple(
        x + y for x, y in zip(alike.spread(logp), alike.log_prob(), strict=True)))  # fmt: skip
    assert abs(law.exp().sum().item() - len(tree.child[0])) < 1e-9
    assert [len(x) for x in alike.lift(two.value)] == [n for n, _ in alike.realised.shapes]
    check_refused(lambda: alike.spread(reward[:-1]), "must have one")
    check_refused(lambda: leftovers.chance_leftover(alike, ()), "number a state")


def test_claim_chances_that_are_none_are_refused():
    child = (torch.tensor([[[TERMINAL, TERMINAL]]]),)
    for p in ([0.5, 0.6], [NAN, 1.0], [-0.5, 1.5], [INF, 0.0]):
        check_refused(lambda p=p: ChanceTree(child, (double([p]),)), "outcomes of an action must")
    check_refused(lambda: ChanceTree(child, (torch.tensor([[[0.5, 0.5]]]),)), "float64")
    check_refused(lambda: ChanceTree((torch.tensor([[TERMINAL]]),), (double([1.0]),)), "table")
    mixed = (*child, torch.tensor([[TERMINAL]])), (double([[0.5, 0.5]]), double([1.0]))
    check_refused(lambda: ChanceTree(*mixed), r"one \(states, actions, outcomes\) table each")
    tree = Tree.full(2, 2)
    for p in (1, -0.1, NAN, "0"):
        check_refused(lambda p=p: with_chance(tree, tree.child, p), r"p_other must lie in \[0, 1\)")
    check_refused(lambda: with_chance(tree, tree.child[:1], 0.5), "other must have one")
    chance.ChanceTree((torch.tensor([[[TERMINAL]]]),), (torch.ones(1, 1, 1).double(),))


@pytest.mark.parametrize("worst", [INF, -INF])
def test_claim_an_outcome_without_a_chance_has_no_say(worst):
    """0 · ∞ counts 0: the state that is never reached may have any value."""
    child = torch.tensor([[[0, 1]]]), torch.tensor([[[TERMINAL, ABSENT]]] * 2)
    tree = ChanceTree(child, (double([[1.0, 0.0]]), double(*[[[1.0, 0.0]]] * 2)))
    assert tree.next_value(0, double(3.0, worst)).tolist() == [[3.0]]
    sure = ChanceTree(child, (double([[0.5, 0.5]]), double(*[[[1.0, 0.0]]] * 2)))
    assert sure.next_value(0, double(3.0, worst)).tolist() == [[worst]]
    assert sure.next_value(0, double(3.0, 5.0)).tolist() == [[4.0]]


# --- shaping, leftovers, search ----------------------------------------------------------------


@edge(shaping.shape_reward, shaping.find_potential, shaping.difference_matrix, shaping.paths,
      shaping.invisible_rewards, leftovers.prompt_leftover, leftovers.discount_leftover,
      leftovers.discounted, leftovers.truncation_leftover)  # fmt: skip
@few
@given(trees, seeds, st.sampled_from([1e-300, 1.0, 1e6, 1e150]))
def test_claim_shaping_moves_no_difference(tree, seed, scale):
    """Returns move by −Φ(prompt), ABSENT stays, the potential comes back, judges see nothing."""
    reward, _, _ = fields(tree, seed, scale)
    generator = torch.Generator().manual_seed(seed + 1)
    potential = tuple(
        scale * torch.randn(n, generator=generator, dtype=torch.float64) for n, _ in tree.shapes
    )
    shaped = shaping.shape_reward(tree, reward, potential)
    found = shaping.find_potential(tree, reward, shaped)
    for t in range(tree.horizon):
        absent = tree.child[t] == ABSENT
        assert torch.equal(shaped[t][absent], reward[t][absent])
        assert (found[t] - potential[t]).abs().max() <= 1e-12 * scale
    start = potential[0][tree.prompt_of()]
    moved = tree.path_sums(shaped) - tree.path_sums(reward) + start
    assert moved.abs().max() <= 1e-13 * scale
    table = shaping.paths(tree)
    flat = torch.cat([x.flatten() for x in reward])
    assert torch.allclose(table @ flat, tree.path_sums(reward), atol=1e-12 * scale)
    seen, hidden = shaping.difference_matrix(tree), shaping.invisible_rewards(tree)
    assert seen.shape == (len(tree.leaves()) - len(tree.child[0]), len(flat))
    assert not (seen @ hidden.T).any()
    assert int(torch.linalg.matrix_rank(hidden)) == tree.n_states
    apart = leftovers.prompt_leftover(tree, potential)
    assert torch.equal(apart, start[None, :] - start[:, None])
    assert not leftovers.discount_leftover(tree, potential, 1).any()
    assert all(torch.equal(x, y) for x, y in zip(leftovers.discounted(reward, 1.0), reward,
                                                 strict=True))  # fmt: skip
    for depth in (0, tree.horizon, 0.5, NAN):
        check_refused(lambda d=depth: leftovers.truncation_leftover(tree, potential, d))
    if tree.horizon > 1:
        cut = leftovers.truncation_leftover(tree, potential, 1)
        assert torch.equal(cut, tree.next_value(0, potential[1]))


def test_claim_bad_potentials_and_discounts_are_refused():
    tree = Tree.full(2, 2)
    zero = tuple(torch.zeros(s, dtype=torch.float64) for s in tree.shapes)
    none = tuple(torch.zeros(n, dtype=torch.float64) for n, _ in tree.shapes)
    for bad in (NAN, INF):
        worse = (zero[0] + bad, zero[1])
        check_refused(lambda w=worse: shaping.shape_reward(tree, w, none), "not a finite number")
        check_refused(lambda w=worse: shaping.find_potential(tree, zero, w), "not a finite number")
        wrong = (none[0] + bad, none[1])
        check_refused(lambda w=wrong: shaping.shape_reward(tree, zero, w), "not a finite number")
        ends = (zero[0] + bad, zero[1])
        check_refused(lambda e=ends: shaping.shape_reward(tree, zero, none, e), "end_potential is")
    check_refused(lambda: shaping.shape_reward(tree, zero, none[:1]), "number a state")
    check_refused(lambda: shaping.shape_reward(tree, zero, none, zero[:1]), "end_potential must")
    check_refused(lambda: shaping.find_potential(tree, zero, zero, tol=-1), "tol must lie in")
    far = tuple(x + 1e308 for x in zero), tuple(x - 1e308 for x in zero)
    check_refused(lambda: shaping.find_potential(tree, *far), "too far apart for float64")
    big = tuple(x + 1e10 for x in zero)
    off = (big[0] + double([0.0, 1.0]), big[1])
    check_refused(lambda: shaping.find_potential(tree, big, off), "not equivalent.* 1 apart")
    for gamma in (0, 1.1, NAN, None):
        check_refused(lambda g=gamma: leftovers.discounted(zero, g), "gamma must lie in")
        check_refused(lambda g=gamma: leftovers.discount_leftover(tree, none, g), "gamma must")
        check_refused(lambda g=gamma: soft.evaluate(
            tree, tuple(x.log_softmax(-1) for x in zero), zero, g), "gamma must")  # fmt: skip
    merged = Tree.layered((2, 2), n_prompts=2)
    for call in (shaping.paths, shaping.difference_matrix):
        check_refused(lambda call=call: call(merged), "Paths merge")


@edge(search.guided_scores, search.likelihood_scores, search.best_prefix, search.beam,
      search.best_objective, search.induced_policy)  # fmt: skip
@few
@given(trees, seeds, st.sampled_from([1e-3, 1.0, 1e3]))
def test_claim_searches_find_the_best_path(tree, seed, beta):
    """Beams, prefixes and maxima against the list of paths, ABSENT actions never taken."""
    reward, log_ref, logp = fields(tree, seed)
    mine = of_prompt(tree, 0)
    best = max(mine, key=lambda y: total(y, logp))
    response, score = search.beam(tree, logp, 10**6)
    assert response == (0, *(a for _, _, a in best)) and close(score, total(best, logp))
    greedy = search.beam(tree, logp, 1)[0]
    assert greedy in [(0, *(a for _, _, a in y)) for y in mine]
    scores = search.likelihood_scores(tree, logp, beta)
    assert search.best_prefix(tree, scores) == response
    pays = [total(y, reward) + beta * total(y, log_ref) for y in mine]
    got = search.best_objective(tree, reward, log_ref, beta)[0].item()
    assert close(got, max(pays), 1 + 20 * beta)
    price = tuple(torch.full((n,), beta, dtype=torch.float64) for n, _ in tree.shapes)
    assert close(search.best_objective(tree, reward, log_ref, price)[0].item(), got)
    guided = search.guided_scores(tree, reward, log_ref, beta)
    optimum = soft.soft_backup(tree, reward, log_ref, beta)
    own = search.likelihood_scores(tree, optimum.logp, beta)
    start = optimum.value[0][0]
    for t, c in enumerate(tree.child):
        rows = torch.tensor([p[0] == 0 for p in tree.prefixes()[t]])[:, None] & (c != ABSENT)
        gap = (guided[t] - own[t] - start)[rows].abs()
        assert not len(gap) or gap.max() < 1e-10 * (1 + 20 * beta)
    again, value = search.induced_policy(tree, reward, log_ref, beta, optimum.value)
    assert all(torch.allclose(x, y) for x, y in zip(value, optimum.value, strict=True))
    assert all(torch.allclose(x.exp(), y.exp()) for x, y in zip(again, optimum.logp, strict=True))


def test_claim_bad_searches_are_refused():
    tree = Tree.full(2, 2)
    zero = tuple(torch.zeros(s, dtype=torch.float64) for s in tree.shapes)
    logp = tuple(x.log_softmax(-1) for x in zero)
    for width in (0, -1, 1.5, NAN, None):
        check_refused(lambda w=width: search.beam(tree, logp, w), "at least one prefix")
    for penalty in (NAN, INF, 1e9, "1"):
        check_refused(lambda p=penalty: search.beam(tree, logp, 1, p), "length_penalty must lie")
    for depth in (0, 1.5):
        check_refused(lambda d=depth: search.best_prefix(tree, zero, d), "depth must be a whole")
    one_nan = (zero[0], double([0.0, NAN]))
    check_refused(lambda: search.best_prefix(tree, one_nan), "one of a prefix that can be written")
    assert search.best_prefix(tree, zero, 99) == search.best_prefix(tree, zero)
    check_refused(lambda: search.best_prefix(tree, (zero[0] + NAN, zero[1])), "is NaN")
    check_refused(lambda: search.best_prefix(tree, zero[:1]), "scores must have one")
    check_refused(lambda: search.guided_scores(tree, zero, logp, 1.0, ()), "number a state")
    check_refused(lambda: search.guided_scores(tree, zero, logp, (double(1.0),)), "beta must be")
    check_refused(lambda: search.likelihood_scores(tree, logp, NAN), "beta must be")
    check_refused(lambda: search.induced_policy(tree, zero, logp, 1.0, ()), "number a state")


@edge(search.tilt)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_claim_tilts_keep_zero_probabilities(dtype):
    """What the base never writes stays so; 0/0 is not lent; α = 0 is the base; else a sentence."""

    def logs(*p):
        return torch.tensor(p, dtype=dtype).log()

    base, tuned, untuned = logs(0.5, 0.5, 0.0), logs(0.2, 0.4, 0.4), logs(0.4, 0.0, 0.6)
    got = search.tilt(base, tuned, untuned, 1.0).exp()
    assert got.tolist() == pytest.approx([1 / 3, 2 / 3, 0], abs=1e-6)  # ½ · ½ beside ½ · 1
    assert torch.equal(search.tilt(base, logs(0.0, 0.0, 1.0), untuned, 0), base)
    assert search.tilt(logs(1.0), logs(1.0), logs(1.0), 7.0).tolist() == [0.0]
    check_refused(
        lambda: search.tilt(logs(1.0, 0.0), logs(0.0, 1.0), logs(0.5, 0.5), 1.0), "no token"
    )
    two = torch.stack([logs(0.5, 0.5), logs(1.0, 0.0)])  # the second row alone has no token left
    check_refused(
        lambda: search.tilt(two, logs(0.0, 1.0).expand(2, 2), logs(0.5, 0.5).expand(2, 2), 1.0),
        "no token",
    )
    # α < 0 divides by what the tuned model never writes: ∞, but not where the base is 0
    got = search.tilt(base, logs(0.4, 0.6, 0.0), logs(0.2, 0.6, 0.2), -1.0).exp()
    assert got.tolist() == pytest.approx([1 / 3, 2 / 3, 0], abs=1e-6)  # ½ · ½ beside ½ · 1
    for alpha in (NAN, INF, None):
        check_refused(lambda a=alpha: search.tilt(base, tuned, untuned, a), "alpha must lie in")
    check_refused(lambda: search.tilt(base, tuned[None], untuned, 1.0), "must have one shape")


# --- preferences, training, likelihood ---------------------------------------------------------

scores = st.lists(st.floats(-1e3, 1e3) | st.sampled_from([1e308, -1e308, 1e-300, 0.0]), max_size=5)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -700 else x


@edge(preferences.bradley_terry_logp, preferences.plackett_luce_logp, preferences.population_loss,
      preferences.sample_preferences)  # fmt: skip
@few
@given(scores)
def test_claim_preferences_are_right_at_any_size(row):
    """Bradley-Terry, rankings and the double sum; a prompt with one answer, or none, has loss 0."""
    x, n = double(*row), len(row)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    for i, j in pairs:
        got = preferences.bradley_terry_logp(x[i], x[j]).item()
        assert close(got, log_sigmoid(row[i] - row[j]), 1e-300, rel=1e-9)
    ranking = 0.0
    for k in range(n):
        top = max(row[k:])
        ranking += row[k] - top - math.log(math.fsum(math.exp(r - top) for r in row[k:]))
    assert close(preferences.plackett_luce_logp(x).item(), ranking, 1.0, rel=1e-9)
    other = x.flip(0)
    loss = preferences.population_loss(x, other).item()
    expected = 0.0
    for i, j in pairs:
        p = math.exp(log_sigmoid(row[n - 1 - i] - row[n - 1 - j]))
        expected -= p * log_sigmoid(row[i] - row[j]) if p else 0.0
    assert close(loss, expected / max(len(pairs) / 2, 1), 1.0, rel=1e-9)
    if n < 2:
        assert loss == 0
    wins = preferences.sample_preferences(x, other, torch.Generator().manual_seed(0))
    assert wins.dtype == torch.bool and wins.shape == x.shape
    sure = [i for i in range(n) if abs(row[i] - row[n - 1 - i]) > 100]
    assert all(wins[i].item() == (row[i] > row[n - 1 - i]) for i in sure)


def test_claim_bad_scores_are_refused():
    x, dice = double(1.0, 2.0), torch.Generator()
    for bad in (double(NAN, 0.0), double(INF, 0.0)):
        check_refused(lambda b=bad: preferences.population_loss(b, x), "score must be finite")
        check_refused(lambda b=bad: preferences.population_loss(x, b), "true_score must be finite")
        check_refused(lambda b=bad: preferences.plackett_luce_logp(b), "scores must be finite")
        check_refused(lambda b=bad: preferences.sample_preferences(x, b, dice), "b must be finite")
    for f in (preferences.bradley_terry_logp, preferences.population_loss,
              lambda a, b: preferences.sample_preferences(a, b, dice)):  # fmt: skip
        check_refused(lambda f=f: f(x, x[:, None]), "must have one shape")
        check_refused(lambda f=f: f(torch.tensor([1, 2]), x), "of floats")
        check_refused(lambda f=f: f([1.0, 2.0], x), "of floats, not list")
    check_refused(lambda: preferences.plackett_luce_logp(x[0]), "one number")
    assert preferences.bradley_terry_logp(x[:, None], x[None, :]).shape == (2, 2)


@edge(preferences.count_wins, preferences.fit_returns)
def test_claim_votes_of_any_type_and_number():
    tree = Tree.full(2, 1, n_prompts=2)
    for kind in (torch.tensor, np.array, list):
        wins = preferences.count_wins(tree, kind([0, 0, 3]), kind([1, 1, 2]))
        assert wins.tolist() == [[0, 2, 0, 0], [0] * 4, [0] * 4, [0, 0, 1, 0]]
        assert not preferences.count_wins(tree, kind([]), kind([])).any()
    for bad in ([True, False], [0.0, 1.0]):
        check_refused(lambda b=bad: preferences.count_wins(tree, b, [1, 1]), "numbers of responses")
    check_refused(lambda: preferences.count_wins(tree, [0, 0], [1]), "two rows of one length")
    check_refused(lambda: preferences.count_wins(tree, [4], [1]), r"winners\[0\] is 4")
    check_refused(lambda: preferences.count_wins(tree, [0], [2]), "different prompts, 0 and 1")
    for size in (1e-300, 1e-12, 1, 1e300):  # only shares matter
        fit = preferences.fit_returns(double([0.0, 3.0], [1.0, 0.0]) * size)
        assert (fit[0] - fit[1]).item() == pytest.approx(math.log(3), abs=1e-7)
    for kind in (np.array, list, torch.tensor):
        fit = preferences.fit_returns(kind([[5, 3], [1, 0]]))
        assert (fit[0] - fit[1]).item() == pytest.approx(math.log(3), abs=1e-7)
    assert preferences.fit_returns(double([0.0])).tolist() == [0.0]
    for bad in ([[0, -1], [1, 0]], [[0, NAN], [1, 0]], [[0, INF], [1, 0]]):
        check_refused(
            lambda b=bad: preferences.fit_returns(double(*b)), "finite numbers that are not"
        )
    for shape in ((0, 0), (2,), (2, 3)):
        check_refused(lambda s=shape: preferences.fit_returns(torch.zeros(s)), "a square table")
    check_refused(lambda: preferences.fit_returns(torch.zeros(2, 2)), "No chain of victories")
    check_refused(lambda: preferences.fit_returns(double([0.0, 1e300], [1.0, 0.0])), "too uneven")


@edge(training.dpo_loss, training.train_dpo)
@few
@given(trees, seeds)
def test_bug_prompts_with_one_answer_say_nothing(tree, seed):
    """0/0 once: now such prompts add 0, and training finds π* at the others, ABSENT or not."""
    reward, log_ref, logp = fields(tree, seed)
    returns, prompt = tree.path_sums(reward), tree.prompt_of()
    expected, implied = 0.0, tree.path_sums(tuple(
        p.masked_fill(p == -INF, 0.0) - q.masked_fill(q == -INF, 0.0)
        for p, q in zip(logp, log_ref, strict=True)))  # fmt: skip
    for p in range(len(tree.child[0])):
        group = prompt == p
        expected += preferences.population_loss(implied[group] / 2, returns[group]).item()
    assert close(training.dpo_loss(tree, logp, returns, log_ref, 0.5).item(), expected)
    if seed % 8:
        return
    found = training.train_dpo(tree, returns, log_ref, 0.5, start=logp)
    best = soft.soft_backup(tree, reward, log_ref, 0.5).logp
    assert soft.sequence_kl(tree, best, found).max() < 1e-8


def test_claim_bad_returns_are_refused():
    tree = Tree.full(2, 1)
    logp = (double([0.5, 0.5]).log(),)
    for bad, words in (
        (double(1.0), "one number a response"),
        (double([1.0, 2.0]), "one number a response"),
        (double(NAN, 0.0), "finite"),
        (torch.tensor([1, 2]), "floats"),
        ([0.0, 1.0], "floats"),
    ):
        check_refused(lambda b=bad: training.dpo_loss(tree, logp, b, logp, 1.0), words)
        check_refused(lambda b=bad: training.train_dpo(tree, b, logp, 1.0), words)
    for beta in (0, NAN, None):
        check_refused(
            lambda b=beta: training.train_dpo(tree, double(0.0, 1.0), logp, b), "beta must"
        )


@edge(training.policy_gradient, training.gradient_ascent, training.natural_gradient_ascent,
      training.ppo)  # fmt: skip
@few
@given(trees, seeds)
def test_bug_ascents_climb_on_trees_with_absent_actions(tree, seed):
    """No NaN: J never falls by a small step, ABSENT stays −∞, and nature's step of 1/β solves."""
    reward, log_ref, logp = fields(tree, seed, rubbish=NAN)
    start = soft.objective(tree, logp, reward, log_ref, 0.5).sum()
    gradient = training.policy_gradient(tree, logp, reward, log_ref, 0.5)
    logits = [torch.where(p == -INF, 0.0, p).requires_grad_() for p in logp]
    gone = [p == -INF for p in logp]
    policy = tuple(
        x.masked_fill(g, -INF).log_softmax(-1) for x, g in zip(logits, gone, strict=True)
    )
    law, ref = (tree.path_sums(tuple(x.masked_fill(g, 0.0) for x, g in zip(f, gone, strict=True)))
                for f in (policy, log_ref))  # fmt: skip
    J = (law.exp() * (tree.path_sums(present(tree, reward)) - 0.5 * (law - ref))).sum()
    slopes = torch.autograd.grad(J, logits)
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(gradient, slopes, strict=True))
    for ascent in (
        training.gradient_ascent(tree, reward, log_ref, 0.5, 0.01, start=logp),
        training.natural_gradient_ascent(tree, reward, log_ref, 0.5, 0.01, start=logp),
        training.ppo(tree, reward, log_ref, 0.5, 0.01, start=logp),
    ):
        policy = next(islice(ascent, 2, None))
        assert all((p[g] == -INF).all() and (p.exp().sum(-1) - 1).abs().max() < 1e-12
                   for p, g in zip(policy, gone, strict=True))  # fmt: skip
        assert soft.objective(tree, policy, reward, log_ref, 0.5).sum() >= start - 1e-12
    leap = training.natural_gradient_ascent(tree, reward, log_ref, 0.5, 2.0, start=logp)
    solved = next(islice(leap, tree.horizon, None))
    assert soft.regret(tree, solved, reward, log_ref, 0.5).abs().max() < 1e-10


def test_bug_ppo_is_not_nan_where_actions_are_absent():
    """Six steps of PPO from a uniform reference at one fork of three, one of them ABSENT."""
    tree = Tree((torch.tensor([[TERMINAL, ABSENT, TERMINAL]]),))
    log_ref = (double([0.5, 0.0, 0.5]).log(),)
    reward = (double([1.0, 0.0, -1.0]),)
    small = Tree((torch.tensor([[TERMINAL, TERMINAL]]),))
    there = [0, 2]
    for one, two in islice(zip(
        training.ppo(tree, reward, log_ref, 0.5, 0.1),
        training.ppo(small, (reward[0][:, there],), (log_ref[0][:, there],), 0.5, 0.1),
        strict=False), 6):  # fmt: skip
        assert torch.allclose(one[0][:, there], two[0]) and one[0][0, 1] == -INF
    assert one[0][0, 0] > -0.5


def test_claim_a_value_that_is_no_number_is_named_by_its_level():
    """One state of two: a NaN reward, or rewards of +∞ and −∞ that meet; one of them alone is ∞."""
    tree, half = Tree.full(2, 2, eos=None), double(0.5, 0.5).log()
    logp = (half[None], half.expand(2, 2))
    for bad in ([NAN, 0.0], [INF, -INF]):
        reward = (double([0.0, 0.0]), double([1.0, 2.0], bad))
        check_refused(lambda r=reward: soft.evaluate(tree, logp, r), "state of level 1 is not a n")
    value, _ = soft.evaluate(tree, logp, (double([0.0, 0.0]), double([1.0, 2.0], [INF, 0.0])))
    assert value[1].tolist() == [1.5, INF]


def test_claim_what_a_policy_never_writes_moves_no_gradient():
    """log π = −∞ where the reference writes: p (G − J) over the others alone, by hand, and 0."""
    tree, log_ref = Tree.full(3, 1), (double([0.25, 0.25, 0.5]).log(),)
    logp, reward = (double([0.5, 0.5, 0.0]).log(),), (double([1.0, -1.0, 7.0]),)
    (found,) = training.policy_gradient(tree, logp, reward, log_ref, 0.5)
    assert found[0].tolist() == pytest.approx([0.5, -0.5, 0.0])  # both ratios are 2 and cancel


def test_claim_a_reference_that_never_writes_an_answer_has_no_dpo_loss():
    tree, logp = Tree.full(2, 1), (double([0.5, 0.5]).log(),)
    sure = (double([0.0, -INF]),)
    check_refused(
        lambda: training.dpo_loss(tree, logp, double(0.0, 1.0), sure, 1.0), "reference never writes"
    )


def test_claim_a_step_too_large_for_one_state_is_refused():
    """The first state alone overflows; the steps of the second are as small as ever."""
    tree = Tree.full(2, 1, n_prompts=2)
    logp = (double([0.5, 0.5], [0.5, 0.5]).log(),)
    reward = (double([1e300, -1e300], [0.0, 0.0]),)
    ascent = training.natural_gradient_ascent(tree, reward, logp, 1.0, 1e300)
    check_refused(lambda: list(islice(ascent, 2)), "step on level 0 is too large")


@pytest.mark.parametrize("ascent", [
    training.gradient_ascent, training.natural_gradient_ascent, training.ppo])  # fmt: skip
def test_claim_bad_ascents_are_refused(ascent):
    tree, logp = Tree.full(2, 1), (double([0.5, 0.5]).log(),)
    reward = (double([1e300, -1e300]),)
    for lr in (0, -1, NAN, INF, None):
        check_refused(lambda lr=lr: next(ascent(tree, reward, logp, 1.0, lr)), "lr must lie in")
    sure = (double([0.0, -INF]),)
    check_refused(lambda: next(ascent(tree, reward, logp, 1.0, 0.1, start=sure)), "policy never")
    check_refused(lambda: list(islice(ascent(tree, reward, logp, 1.0, 1e300), 5)), "smaller lr")


def test_claim_bad_clips_and_epochs_are_refused():
    tree, logp = Tree.full(2, 1), (double([0.5, 0.5]).log(),)
    for clip in (0, NAN, None):
        check_refused(lambda c=clip: next(training.ppo(tree, logp, logp, 1.0, 1.0, c)), "clip must")
    for epochs in (0, 1.5):
        check_refused(
            lambda e=epochs: next(training.ppo(tree, logp, logp, 1.0, 1.0, epochs=e)), "epochs must"
        )


@edge(training.bandit_gradient, likelihood.sign_law)
@few
@given(st.integers(1, 5), seeds, st.booleans(), st.sampled_from([1e-3, 1.0, 1e3]))
def test_claim_one_prompt_laws_hold_at_the_edge(n, seed, with_zero, beta):
    """A response of probability 0 counts nothing; one response alone has gradient and margin 0."""
    generator = torch.Generator().manual_seed(seed)
    returns, one, two = torch.randn(3, n, generator=generator, dtype=torch.float64)
    logp, log_ref = one.log_softmax(0), two.log_softmax(0)
    law = likelihood.sign_law(returns, log_ref, beta)
    slope = training.bandit_gradient(logp, returns, log_ref, beta)
    if with_zero:  # a response more, that nobody writes
        more = [torch.cat([x, double(-INF)]) for x in (logp, log_ref)]
        far = torch.cat([returns, double(1e3)])
        again = likelihood.sign_law(far, more[1], beta)
        assert all(close(x.item(), y.item(), 1 + beta) for x, y in zip(law, again, strict=True))
        assert torch.allclose(training.bandit_gradient(more[0], far, more[1], beta)[:-1], slope)
    p, pairs = log_ref.exp().tolist(), [(i, j) for i in range(n) for j in range(n)]
    value = soft_mean(returns.tolist(), log_ref.tolist(), beta)
    R = returns.tolist()
    chosen = math.fsum(
        2 * p[i] * p[j] * math.exp(log_sigmoid(R[i] - R[j])) * R[i] for i, j in pairs
    )
    assert close(law.chosen.item(), chosen - value, 1 + beta)
    mean = math.fsum(x * r for x, r in zip(p, R, strict=True))
    assert close(law.reference.item(), mean - value, 1 + beta)
    assert close(law.chosen.item() + law.rejected.item(), 2 * law.reference.item(), 1 + beta)
    assert abs(slope.sum().item()) < 1e-12 * (1 + beta)
    if n == 1:
        assert slope.item() == 0 and law.chosen.item() == law.rejected.item()


def test_claim_bad_prompts_are_refused():
    R, ref = double(0.0, 1.0), double(0.5, 0.5).log()
    for bad, words in ((R[:1], "one shape"), (double(NAN, 0.0), "finite"), (R.float(), ""),
                       (torch.tensor([0, 1]), "floats")):  # fmt: skip
        if words:
            check_refused(lambda b=bad: likelihood.sign_law(b, ref, 1.0), words)
    check_refused(lambda: likelihood.sign_law(R, ref + 1, 1.0), "sum to 1")
    check_refused(lambda: likelihood.sign_law(R[0], ref[0], 1.0), "one row")
    check_refused(lambda: likelihood.sign_law(R, ref, 0), "beta must")
    check_refused(lambda: likelihood.sign_law(double(1e308, -1e308), ref, 1.0), "too far apart")
    check_refused(lambda: training.bandit_gradient(ref, R, ref[:, None], 1.0), "one shape")
    check_refused(lambda: training.bandit_gradient(ref, R, ref, -1.0), "beta must")


@edge(minimise)
@few
@given(st.lists(st.floats(-1e3, 1e3), max_size=4), st.sampled_from([1e-3, 1.0, 1e6]))
def test_claim_minimise_finds_any_parabola(target, scale):
    """From 0, in any number of variables, none included."""
    target = double(*target)
    found = minimise(lambda x: scale * ((x - target) ** 2).sum(), torch.zeros_like(target))
    assert found.shape == target.shape and not ((found - target).abs() > 1e-6).any()


def test_claim_minimise_refuses_what_is_no_problem():
    zero = double(0.0, 0.0)
    for bad in (0.0, torch.zeros(2).long(), zero[None], double(NAN)):
        check_refused(lambda b=bad: minimise(lambda x: x.sum(), b), "start must be")
    check_refused(lambda: minimise(lambda x: x**2, zero), "The loss must be one number")
    check_refused(lambda: minimise(lambda x: x.log().sum(), zero), "stops being finite")
    check_refused(lambda: minimise(lambda x: x.sum(), zero, max_iter=0), "max_iter must be")


def test_claim_a_start_that_carries_a_gradient_is_only_a_place():
    """The minimum is a plain number, whatever the start was made from."""
    for numbers in ([], [2.0, -1.0]):
        start = double(*numbers).requires_grad_() * 1.0
        found = minimise(lambda x: ((x - 3.0) ** 2).sum(), start)
        assert not found.requires_grad and found.tolist() == pytest.approx([3.0] * len(numbers))
        assert found is not start
