"""What rounding may do to log-probabilities that are the same number."""

import pytest
import torch

from qlearn.train.step_0 import explained_by_rounding


@pytest.mark.parametrize("nats", [1e-6, 1.0, 100.0])
@pytest.mark.parametrize("n", [1, 40, 1000])
def test_claim_float32_rounding_is_explained_and_a_drift_is_not(nats, n):
    """n log-probabilities, each the difference of a logit near 50 and its logsumexp, in float32.

    A response that is nearly certain (1e-6 nats a token) keeps the noise of that difference, which
    no share of |log π| covers.
    """
    exact = -nats * torch.rand(20, n, generator=torch.Generator().manual_seed(n)).double()
    read = (50 + exact).float().double() - 50
    bound = explained_by_rounding(exact.sum(dim=1), exact.numel(), torch.float32)
    assert 0 < (read - exact).sum(dim=1).abs().sum().item() <= bound
    if nats >= 1:
        assert 0.001 * exact.sum(dim=1).abs().sum().item() > bound


def test_claim_the_bound_is_a_share_and_a_floor():
    """Of 16 tokens with 32 nats in two responses: 32 · 2⁻¹³ and 16 · 2⁻¹⁶."""
    bound = explained_by_rounding(torch.tensor([-31.0, -1.0]), 16, torch.bfloat16)
    assert bound == pytest.approx(2**-8 + 2**-12, rel=1e-6)
