"""The tree against the list of responses that the oracle filters from all token strings."""

import pytest
import torch

from qlearn.exact.tree import TERMINAL, Tree

from . import oracle
from .worlds import as_dict, problem, random_field, random_states


@pytest.mark.parametrize(("n_actions", "horizon", "eos"), [(4, 4, 0), (3, 5, 2), (2, 1, 1)])
def test_claim_leaves_are_all_responses(n_actions, horizon, eos):
    """Every string that ends in EOS or at the horizon is a leaf once, and nothing else is.

    `def-token-mdp`
    """
    tree = Tree.full(n_actions, horizon, eos=eos, n_prompts=2)
    expected = [y for p in range(2) for y in oracle.responses(n_actions, horizon, eos, p)]
    assert sorted(tree.leaves()) == sorted(expected)
    assert tree.n_edges == tree.n_states * n_actions


def test_claim_edges_are_states_plus_leaves_minus_one():
    """One edge leads to each state but the prompt and to each leaf."""
    tree = Tree.full(4, 4)
    assert tree.n_edges == tree.n_states + len(tree.leaves()) - 1


def test_eq_01_path_sums_are_returns():
    """Σ_t r(s_t, a_t) of each response, in the order of `leaves`, against plain addition.

    `eq-chain-rule`
    """
    tree, reward, _ = problem(5, n_prompts=2)
    r = as_dict(tree, reward)
    sums = tree.path_sums(reward).tolist()
    for y, x in zip(tree.leaves(), sums, strict=True):
        assert x == pytest.approx(oracle.total(r, y), abs=1e-12)


def test_claim_one_token_vocabulary_of_eos_stops_at_once():
    assert Tree.full(1, 5).horizon == 1


def test_claim_split_inverts_concatenation():
    tree, reward, _ = problem(1)
    flat = torch.cat([x.flatten() for x in reward])
    assert all(torch.equal(a, b) for a, b in zip(tree.split(flat), reward, strict=True))


@pytest.mark.parametrize(
    ("child", "sentence"),
    [
        (([[0, TERMINAL]],), "Action 0 in state 0 of level 0 leads to row 0, but level 1 has 0"),
        (([[-3]],), "leads to row -3"),
        (([[-1, -1], [-2, -2]],), "State 1 of level 0 has no action"),
        ((), "at least one prompt and one level"),
    ],
)
def test_claim_broken_tables_are_refused(child, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tree(tuple(torch.tensor(table) for table in child))


@pytest.mark.parametrize("bad", [dict(n_actions=0, horizon=1), dict(n_actions=2, horizon=0)])
def test_claim_empty_trees_are_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        Tree.full(**bad)
    with pytest.raises(ValueError, match="eos must be one of"):
        Tree.full(3, 2, eos=3)


def test_claim_push_is_the_adjoint_of_next_value():
    """Σ_e mass(e) V(s') = Σ_s' push(s') V(s') on every level; from the last nothing goes on."""
    tree, _, _ = problem(2, n_prompts=2)
    mass, value = random_field(tree, 3), (*random_states(tree, 4), None)
    for t in range(tree.horizon):
        pushed, ahead = tree.push(t, mass[t]), tree.next_value(t, value[t + 1])
        arrived = 0.0 if value[t + 1] is None else (pushed * value[t + 1]).sum()
        assert abs((mass[t] * ahead).sum() - arrived) < 1e-12
    assert pushed.shape == (0,)
