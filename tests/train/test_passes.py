"""Passes of like length: every row once, within the budget, no fewer and no smaller than needed."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlearn.errors import InputError
from qlearn.lm.logprobs import collate, completion_logps
from qlearn.train.masters import Masters
from qlearn.train.passes import passes


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(60, 400))
def test_claim_passes_hold_every_row_once_within_the_budget(lengths, budget):
    split = passes(lengths, budget)
    assert sorted(i for part in split for i in part) == list(range(len(lengths)))
    sizes = [max(lengths[i] for i in part) * len(part) for part in split]
    assert max(sizes) <= budget
    for longer, shorter in itertools.pairwise(split):
        assert min(lengths[i] for i in longer) >= max(lengths[i] for i in shorter)


def test_claim_passes_are_of_like_size():
    """64 equal rows under a budget of 40: two passes of 32, not 40 and 24."""
    assert [len(part) for part in passes([10] * 64, 400)] == [32, 32]


def test_claim_a_row_over_the_budget_is_named():
    with pytest.raises(InputError, match="Row 1 of the update has 9 tokens, more than the budget"):
        passes([3, 9], 8)


def test_claim_masters_learn_what_bfloat16_would_lose(model):
    """Steps of 1e-6 on weights near 0.1: the masters move as float32 training moves them."""
    rows = [([5, 6, 7], [8, 9, 0]), ([4], [10, 0])]
    low = copy.deepcopy(model)
    masters = Masters(low)
    first = [m.detach().clone() for m in masters.parameters]
    optimiser = torch.optim.SGD(masters.parameters, lr=1e-6)
    for _ in range(3):
        completion_logps(low, collate(rows))[0].sum().backward()
        assert all(p.grad is None for p in low.parameters())
        optimiser.step()
        optimiser.zero_grad()
        masters.publish()
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    moved = torch.cat([(m - f).flatten() for m, f in zip(masters.parameters, first, strict=True)])

    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    for _ in range(3):
        completion_logps(model, collate(rows))[0].sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_claim_masters_add_up_the_gradients_of_several_passes(model):
    rows = [([5, 6, 7], [8, 9, 0]), ([4], [10, 0])]
    masters = Masters(model)
    for row in rows:
        completion_logps(model, collate([row]))[0].sum().backward()
    apart = [m.grad.clone() for m in masters.parameters]
    for m in masters.parameters:
        m.grad = None
    completion_logps(model, collate(rows))[0].sum().backward()
    for one, two in zip(apart, masters.parameters, strict=True):
        assert torch.allclose(one, two.grad, atol=0.05 * two.grad.abs().max().item() + 1e-6)
