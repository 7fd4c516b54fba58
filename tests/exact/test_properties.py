"""Properties for all trees: shapes, permuted actions, extreme β, one-token trees (hypothesis)."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlearn.exact import shaping, soft
from qlearn.exact.tree import TERMINAL, Tree

from .worlds import by_oracle, flat, furthest, random_field

# No deadline and no database: the machine is shared and the runs should be alike everywhere.
every = settings(deadline=None, database=None, derandomize=True, max_examples=60)
trees = st.builds(
    lambda a, h, p, eos: Tree.full(a, h, eos=eos if eos is None else eos % a, n_prompts=p),
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.none() | st.integers(0, 3),
)  # fmt: skip
prices = st.floats(1e-3, 1e3)
seeds = st.integers(0, 10_000)


def problem(tree, seed, scale=1.0):
    log_ref = tuple(x.log_softmax(-1) for x in random_field(tree, seed + 1))
    return random_field(tree, seed, scale), log_ref


@every
@given(trees, prices, seeds, st.floats(1e-3, 1e3))
def test_claim_no_price_overflows(tree, beta, seed, scale):
    """β from 1e-3 to 1e3 and rewards up to thousands: finite, between mean and maximum."""
    reward, log_ref = problem(tree, seed, scale)
    inside = soft.soft_backup(tree, reward, log_ref, beta)
    prior = soft.soft_backup_prior(tree, reward, log_ref, beta)
    assert [tuple(x.shape) for x in inside.q] == [tuple(x.shape) for x in reward] == tree.shapes
    assert [len(v) for v in inside.value] == [n for n, _ in tree.shapes]
    size = 1 + max(x.abs().max().item() for x in reward) * tree.horizon
    for q, q_tilde, v, w, p in zip(
        inside.q, prior.q_tilde, inside.value, prior.value, inside.logp, strict=True
    ):
        assert q.isfinite().all() and q_tilde.isfinite().all() and p.isfinite().all()
        assert (v - w).abs().max() < 1e-12 * (size + beta * 20)
        assert (p.logsumexp(-1)).abs().max() < 1e-9 * (1 + size / beta)
        assert (q_tilde.amax(-1) - v).min() > -1e-9 * (size + beta)
    mean = soft.expected_return(tree, log_ref, reward)
    assert (inside.value[0] - mean).min() > -1e-9 * (size + beta)


@every
@given(trees, prices, seeds)
def test_claim_renaming_actions_renames_everything(tree, beta, seed):
    """Permuting the actions of every state permutes Q and π, and leaves V."""
    reward, log_ref = problem(tree, seed)
    n_actions = tree.shapes[0][1]
    order = torch.randperm(n_actions, generator=torch.Generator().manual_seed(seed))
    renamed = Tree(tuple(c[:, order] for c in tree.child))
    one = soft.soft_backup(tree, reward, log_ref, beta)
    two = soft.soft_backup(
        renamed, tuple(x[:, order] for x in reward), tuple(x[:, order] for x in log_ref), beta
    )
    for a, b, v, w in zip(one.q, two.q, one.value, two.value, strict=True):
        assert (a[:, order] - b).abs().max() < 1e-9 * (1 + beta)
        assert (v - w).abs().max() < 1e-9 * (1 + beta)


@every
@given(st.integers(1, 5), prices, seeds)
def test_claim_a_tree_of_one_token_is_a_single_choice(n_actions, beta, seed):
    """Depth 1: V = β log Σ π_ref exp(r/β), and the reward is Q̃."""
    tree = Tree.full(n_actions, 1)
    (reward,), (log_ref,) = problem(tree, seed)
    best = soft.soft_backup_prior(tree, (reward,), (log_ref,), beta)
    assert torch.equal(best.q_tilde[0], reward) and (tree.child[0] == TERMINAL).all()
    top = reward.max().item()
    rows = zip(log_ref[0].tolist(), reward[0].tolist(), strict=True)
    terms = [math.exp(p + (r - top) / beta) for p, r in rows]
    assert abs(best.value[0].item() - (top + beta * math.log(math.fsum(terms)))) < 1e-9 * (1 + beta)


@every
@given(trees, st.floats(0.05, 20.0), seeds)
def test_claim_round_trips_close_on_every_tree(tree, beta, seed):
    """B1, C3 and Definition 1 on trees of any shape, the way there checked by the oracle."""
    reward, log_ref = problem(tree, seed)
    value, q_tilde, _ = by_oracle(tree, reward, log_ref, beta)
    best = soft.soft_backup(tree, reward, log_ref, beta)
    q = tuple(x + beta * ref for x, ref in zip(q_tilde, log_ref, strict=True))
    assert furthest(best.q, q) < 1e-9 * (1 + beta)
    assert furthest(best.value, value) < 1e-9 * (1 + beta)
    back = soft.reward_from_q(tree, q, log_ref, beta)
    assert (flat(back) - flat(reward)).abs().max() < 1e-9 * (1 + beta)
    learned = shaping.canonical_reward(tree, reward, log_ref, beta)
    found = shaping.find_potential(tree, reward, learned)
    assert furthest(found, value) < 1e-9 * (1 + beta)


@every
@given(trees, seeds)
def test_claim_paths_are_counted_and_summed_once(tree, seed):
    """Leaves, path sums, prompts and one-hot paths agree in number and order."""
    reward, _ = problem(tree, seed)
    leaves = tree.leaves()
    assert tree.n_edges == tree.n_states + len(leaves) - len(tree.child[0])
    assert tree.prompt_of().tolist() == [y[0] for y in leaves]
    assert (shaping.paths(tree) @ flat(reward) - tree.path_sums(reward)).abs().max() < 1e-9
    sparse = tree.only_at_end(tree.path_sums(reward))
    assert torch.equal(tree.at_ends(sparse), tree.path_sums(reward))
