"""N0: a real network's logits, made into a tree, obey every identity of the exact floor."""

import math

import pytest
import torch

from qlearn.errors import InputError
from qlearn.exact import soft
from qlearn.lm.tree import language_tree

BETA, TOLERANCE = 0.5, 1e-8


@pytest.fixture
def tree(model, other):
    return language_tree(model, other, [5, 6, 7], top_k=8, horizon=4, eos=0)


def responses(tree):
    """Every response with its (level, state, action) steps, by walking child tables."""

    def below(t, s):
        for a, row in enumerate(tree.child[t][s].tolist()):
            if row < 0:
                yield [(t, s, a)]
            else:
                yield from ([(t, s, a), *rest] for rest in below(t + 1, row))

    return list(below(0, 0))


def total(field, steps):
    return math.fsum(field[t][s, a].item() for t, s, a in steps)


def test_claim_edges_are_the_references_best_tokens(model, other, tree):
    """Each state's edges, checked on full logits of one prefix at a time."""
    prefix = [5, 6, 7]
    s = 0
    for t in range(tree.tree.horizon):
        logits = other(torch.tensor([prefix])).logits[0, -1].double()
        top = logits.topk(8)
        assert tree.token[t][s].tolist() == top.indices.tolist()
        assert torch.allclose(tree.log_ref[t][s], top.values.log_softmax(-1), atol=1e-5)
        own = model(torch.tensor([prefix])).logits[0, -1].double()[top.indices]
        assert torch.allclose(tree.logits[t][s], own, atol=1e-5)
        (goes_on,) = (tree.tree.child[t][s] >= 0).nonzero(as_tuple=True)
        assert (tree.token[t][s][tree.tree.child[t][s] < 0] == 0).all() or t == 3
        if len(goes_on):
            a = int(goes_on[-1])
            prefix, s = [*prefix, int(tree.token[t][s, a])], int(tree.tree.child[t][s, a])


def test_claim_logits_are_the_q_function_of_some_reward(tree):
    """N0 (B1): Q = β · logits gives a reward, whose optimal Q and policy are the network's own.

    `eq-logits-as-q`, `eq-reward-of-logits`
    """
    q = tuple(BETA * x for x in tree.logits)
    reward = soft.reward_from_q(tree.tree, q, tree.log_ref, BETA)
    # The reward by hand: Q − β log π_ref − V(s'), V = β log Σ exp(logits), 0 where a response ends.
    value = [[BETA * math.log(sum(map(math.exp, row))) for row in x.tolist()] for x in tree.logits]
    for t, table in enumerate(tree.tree.child):
        for s, row in enumerate(table.tolist()):
            for a, child in enumerate(row):
                v = value[t + 1][child] if child >= 0 else 0.0
                by_hand = q[t][s, a].item() - BETA * tree.log_ref[t][s, a].item() - v
                assert abs(reward[t][s, a].item() - by_hand) < TOLERANCE
    # The optimum of that reward by enumeration of all responses, not by the backup.
    all_steps = responses(tree.tree)
    exact = [total(tree.log_ref, y) + total(reward, y) / BETA for y in all_steps]
    log_z = math.log(math.fsum(map(math.exp, exact)))
    for x, y in zip(exact, all_steps, strict=True):
        assert abs(total(tree.logp, y) - (x - log_z)) < TOLERANCE
    solved = soft.soft_backup(tree.tree, reward, tree.log_ref, BETA)
    for t in range(tree.tree.horizon):
        assert (solved.q[t] - q[t]).abs().max() < TOLERANCE
        assert (solved.logp[t] - tree.logp[t]).abs().max() < TOLERANCE


def test_claim_value_preferences_martingale_and_search(tree):
    """N0 (A1, C1, E6, F1) on the reward that the logits imply, by enumeration of all responses."""
    q = tuple(BETA * x for x in tree.logits)
    reward = soft.reward_from_q(tree.tree, q, tree.log_ref, BETA)
    all_steps = responses(tree.tree)
    returns = [total(reward, y) for y in all_steps]
    log_ref = [total(tree.log_ref, y) for y in all_steps]
    log_pi = [total(tree.logp, y) for y in all_steps]
    value = BETA * torch.logsumexp(tree.logits[0][0], 0).item()
    # A1: V(s0) = β log E_ref exp(R/β)
    terms = [lr + g / BETA for lr, g in zip(log_ref, returns, strict=True)]
    top = max(terms)
    enumerated = BETA * (top + math.log(math.fsum(math.exp(x - top) for x in terms)))
    assert abs(enumerated - value) < TOLERANCE
    # C1: β log π/π_ref orders and separates responses exactly as the reward does
    implied = [BETA * (p - r) for p, r in zip(log_pi, log_ref, strict=True)]
    gaps = [g - i for g, i in zip(returns, implied, strict=True)]
    assert max(gaps) - min(gaps) < TOLERANCE and abs(gaps[0] - value) < TOLERANCE
    # E6: the running log-ratio is β log E_ref[exp(R̂/β) | s]; at every first token
    for a in range(8):
        inside = [(y, lr, i) for y, lr, i in zip(all_steps, log_ref, implied, strict=True)
                  if y[0][2] == a]  # fmt: skip
        mass = math.fsum(math.exp(lr) for _, lr, _ in inside)
        mean = math.fsum(math.exp(lr + i / BETA) for _, lr, i in inside) / mass
        ratio = BETA * (tree.logp[0][0, a] - tree.log_ref[0][0, a]).item()
        assert abs(ratio - BETA * math.log(mean)) < TOLERANCE
    # F1 at full depth: Σ (r + β log π_ref) = V(s0) + β Σ log π
    for g, lr, p in zip(returns, log_ref, log_pi, strict=True):
        assert abs(g + BETA * lr - (value + BETA * p)) < TOLERANCE


def test_claim_bad_sizes_are_named(model, other):
    for top_k, horizon in ((0, 2), (10_000, 2), (3, 0)):
        with pytest.raises(InputError, match="top_k must lie in"):
            language_tree(model, other, [5], top_k=top_k, horizon=horizon, eos=0)


@pytest.mark.parametrize("top_k", [1, 224])
def test_claim_a_state_may_have_one_token_or_all(model, other, top_k):
    """One is certain; all have the network's own probabilities. No pass keeps a cache."""
    outputs = []
    model.base_model.register_forward_hook(lambda *args: outputs.append(args[-1]))
    tree = language_tree(model, other, [5, 6, 7], top_k=top_k, horizon=1, eos=0)
    ref, own = (m(torch.tensor([[5, 6, 7]])).logits[0, -1].double() for m in (other, model))
    token = ref.argsort(descending=True)[:top_k]
    assert tree.token[0].tolist() == [token.tolist()]
    for found, logits in ((tree.log_ref, ref), (tree.logp, own)):
        assert torch.allclose(found[0][0], logits[token].log_softmax(-1), atol=1e-5)
    assert outputs[0].past_key_values is None
