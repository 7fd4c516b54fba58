"""The losses at their edges: shapes, types, empty batches, huge numbers, zero probabilities.

Elementwise ones against plain Python in extended reals: NaN only where the arithmetic of ∞ has no
answer. Shapes that differ, and settings that mean nothing, end in a ValueError of one sentence.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlearn import losses

from .edges import TESTED, check_refused, close, edge, few, public_names

NAN, INF = math.nan, math.inf
numbers = st.floats(-1e4, 1e4) | st.sampled_from([0.0, 1e308, -1e308, 1e-300, INF, -INF, NAN])
rows = st.lists(numbers, min_size=1, max_size=4)


def double(*x):
    return torch.tensor(x, dtype=torch.float64)


def exp(x):
    return INF if x > 709.7 else math.exp(x)


def neg_log_sigmoid(x):
    return x if math.isnan(x) else math.log1p(math.exp(-x)) if x > -700 else -x


def at_least(x, y):
    """min or max with NaN where one side is NaN, as tensors have it."""
    return NAN if math.isnan(x) or math.isnan(y) else max(x, y)


def test_claim_every_loss_has_an_edge_test():
    assert public_names("qlearn.losses") - TESTED == set()


@edge(losses.bradley_terry, losses.dpo)
@few
@given(numbers, numbers, numbers, numbers, st.sampled_from([1e-3, 1.0, np.float32(0.5)]))
def test_claim_dpo_is_right_in_extended_reals(w, lo, ref_w, ref_l, beta):
    got = losses.dpo(*(double(x) for x in (w, lo, ref_w, ref_l)), beta)
    chosen, rejected = float(beta) * (w - ref_w), float(beta) * (lo - ref_l)
    assert close(got.chosen_reward.item(), chosen) and close(got.rejected_reward.item(), rejected)
    assert close(got.loss.item(), neg_log_sigmoid(chosen - rejected), 1e-290, rel=1e-7)
    alone = losses.bradley_terry(double(w), double(lo)).item()
    assert close(alone, neg_log_sigmoid(w - lo), 1e-290, rel=1e-7)


@edge(losses.ppo_clip, losses.value_clip)
@few
@given(numbers, numbers, numbers, st.sampled_from([1e-3, 0.2, 5.0]))
def test_claim_clipped_losses_are_right_in_extended_reals(x, old, y, clip):
    ratio = exp(x - old) if not math.isnan(x - old) else NAN
    clipped = ratio if math.isnan(ratio) else min(max(ratio, 1 - clip), 1 + clip)
    expected = at_least(-(ratio * y), -(clipped * y))
    assert close(losses.ppo_clip(double(x), double(old), double(y), clip).item(), expected, 1e-290)
    moved = x - old
    near = old + (moved if math.isnan(moved) else min(max(moved, -clip), clip))
    squares = [(z - y) * (z - y) for z in (x, near)]
    expected = at_least(*squares) / 2
    assert close(losses.value_clip(double(x), double(old), double(y), clip).item(), expected, 1e-6)


kinds = st.sampled_from([torch.bool, torch.int64, torch.float32])
lengths_of_rows = st.lists(st.integers(0, 4), max_size=4)


@edge(losses.gae, losses.whiten, losses.nll)
@few
@given(lengths_of_rows, kinds, st.sampled_from([NAN, INF, -INF, 0.0]),
       st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))  # fmt: skip
def test_claim_what_is_masked_is_never_read(lengths, dtype, rubbish, lam, seed):
    """Rubbish in the padding changes nothing: GAE, whitening and NLL by Python of the rest."""
    width = max(lengths, default=3)
    mask = torch.tensor([[t < n for t in range(width)] for n in lengths], dtype=torch.bool)
    mask = mask.reshape(len(lengths), width)
    generator = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    dirty = [x.masked_fill(~mask, rubbish) for x in (reward, value)]
    advantage, target = losses.gae(*dirty, mask.to(dtype), 0.9, lam)
    for b, n in enumerate(lengths):
        values, ahead = [*value[b, :n].tolist(), 0.0], 0.0
        for t in reversed(range(n)):
            ahead = reward[b, t].item() + 0.9 * values[t + 1] - values[t] + 0.9 * lam * ahead
            assert close(advantage[b, t].item(), ahead) and close(
                target[b, t].item(), ahead + values[t]
            )
        assert not advantage[b, n:].any() and not target[b, n:].any()
    kept = reward[mask]
    white = losses.whiten(dirty[0], mask.to(dtype))
    assert not white[~mask].any() and white.shape == mask.shape
    if len(kept) > 1:
        expected = (kept - kept.mean()) / kept.std(unbiased=False)
        assert torch.allclose(white[mask], expected, atol=1e-5)
    else:
        assert not white.any()
    if len(kept):
        assert close(losses.nll(dirty[0], mask.to(dtype)).item(), -kept.mean().item())
    else:
        check_refused(lambda: losses.nll(dirty[0], mask.to(dtype)), "no response token")


def test_bug_equal_numbers_whiten_to_zero():
    """The rounding of their mean was divided by itself: 0.4 instead of 0 in float32."""
    for x in (0.1, 1e30, -7.3):
        same = torch.full((3, 333), x)
        assert not losses.whiten(same, torch.ones(3, 333)).any()
    big = double([1e200, -1e200])
    check_refused(lambda: losses.whiten(big, torch.ones(1, 2)), "too large for a variance")


def test_claim_gae_keeps_the_wider_type():
    reward, value = torch.ones(1, 2), torch.full((1, 2), 1e-12, dtype=torch.float64)
    advantage, _ = losses.gae(reward, value, torch.ones(1, 2), lam=0.0)
    assert advantage.dtype == torch.float64 and advantage[0, 1].item() == 1 - 1e-12


@edge(losses.leave_one_out)
@few
@given(st.integers(0, 3), st.integers(0, 4), st.sampled_from([1e-300, 1.0, 1e150]))
def test_claim_leave_one_out_at_every_size(prompts, k, scale):
    returns = scale * torch.arange(prompts * k, dtype=torch.float64).view(prompts, k) ** 2
    if k < 2:
        check_refused(lambda: losses.leave_one_out(returns), "k at least 2")
        return
    got = losses.leave_one_out(returns).tolist()
    for row, mine in zip(returns.tolist(), got, strict=True):
        for i, x in enumerate(row):
            others = math.fsum(r for j, r in enumerate(row) if j != i) / (k - 1)
            assert close(mine[i], x - others, 10 * scale)


ONES, COLUMN = torch.ones(3), torch.ones(3, 1)
TABLE, MASK = torch.ones(3, 2), torch.ones(3, 2, dtype=torch.int64)
CALLS = {
    losses.bradley_terry: (ONES, ONES),
    losses.dpo: (ONES, ONES, ONES, ONES, 0.1),
    losses.ppo_clip: (ONES, ONES, ONES, 0.2),
    losses.value_clip: (ONES, ONES, ONES, 0.2),
    losses.gae: (TABLE, TABLE, MASK),
    losses.leave_one_out: (TABLE,),
    losses.whiten: (TABLE, MASK),
    losses.nll: (TABLE, MASK),
}


@pytest.mark.parametrize("loss", CALLS, ids=lambda f: f.__name__)
def test_bug_nothing_broadcasts_and_nothing_is_truncated(loss):
    """(B,) beside (B, 1) was (B, B); integers, lists and half a table are refused one by one."""
    good = CALLS[loss]
    loss(*good)
    tensors = [i for i, x in enumerate(good) if isinstance(x, torch.Tensor)]
    for i in tensors:
        x = good[i]
        wrong = [x.tolist(), x[..., None], x[:-1]] if len(tensors) > 1 else [x.tolist(), x[0]]
        if x.is_floating_point():
            wrong.append(x.long())
        for bad in wrong:
            check_refused(lambda bad=bad, i=i: loss(*good[:i], bad, *good[i + 1 :]))
    if len(tensors) < len(good):
        for bad in (0, -1, NAN, INF, None, "0.1"):
            check_refused(lambda bad=bad: loss(*good[:-1], bad), "must")


def test_claim_settings_without_a_meaning_are_refused():
    for bad in (-0.1, 1.1, NAN, None):
        check_refused(
            lambda b=bad: losses.gae(TABLE, TABLE, MASK, b), r"gamma must lie in \[0, 1\]"
        )
        check_refused(
            lambda b=bad: losses.gae(TABLE, TABLE, MASK, 1.0, b), r"lam must lie in \[0, 1\]"
        )
    check_refused(lambda: losses.gae(ONES, ONES, ONES), r"table \(B, T\)")
    for empty in (losses.bradley_terry(ONES[:0], ONES[:0]), losses.ppo_clip(*[ONES[:0]] * 3, 0.2)):
        assert empty.shape == (0,)
