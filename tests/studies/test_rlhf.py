"""The measurement of RLHF: its estimates against what is known exactly, its curves."""

import math

import pytest
import torch

from qlearn.lm.data import Example
from qlearn.studies import rlhf
from qlearn.train.rollout import Rollout


def sampled(logp, log_ref, score, n, seed=0):
    """`n` one-token responses drawn from exp(logp)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(logp.exp(), n, replacement=True, generator=generator)
    mask = torch.ones(n, 1, dtype=torch.int64)
    examples = [Example(0, [1], ([int(a)],)) for a in y]
    return Rollout(examples, logp[y][:, None], log_ref[y][:, None], mask, score[y], y > 0)


def test_eq_06_both_estimates_of_the_ceiling_agree_with_it():
    """From π_ref's samples and, with less noise, from π's: β log E_ref exp(R/β). `eq-any-policy`"""
    generator = torch.Generator().manual_seed(1)
    score, log_ref, noise = torch.randn(3, 6, generator=generator)
    beta, log_ref = 0.5, log_ref.log_softmax(0)
    exact = (beta * torch.logsumexp(log_ref + score / beta, 0)).item()
    near = (log_ref + score / beta + 0.2 * noise).log_softmax(0)
    found = {}
    for name, logp in (("reference", log_ref), ("policy", near)):
        parts = [sampled(logp, log_ref, score, 2000, seed) for seed in (0, 1)]
        found[name] = rlhf.objective(parts, beta)
        ceiling = found[name]["ceiling"]
        assert abs(ceiling["value"] - exact) < 3 * ceiling["error"]
        exact_j = (logp.exp() * (score - beta * (logp - log_ref))).sum().item()
        assert abs(found[name]["J"] - exact_j) < 3 * found[name]["error"]
        assert found[name]["J"] < exact
        assert found[name]["J"] == pytest.approx(
            found[name]["score"] - beta * found[name]["kl"], abs=1e-5
        )
    assert found["policy"]["ceiling"]["error"] < found["reference"]["ceiling"]["error"] / 2
    assert found["reference"]["kl"] == 0
    share = torch.cat([~part.ended for part in parts]).float().mean().item()
    assert found["policy"]["missing_eos"] == pytest.approx(share)


def test_claim_returns_are_constant_at_the_optimum():
    """Hence the gradient's noise vanishes there: G is V for every response."""
    score, log_ref = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.2, 0.5, 0.3]).log()
    best = (log_ref + score / 0.5).log_softmax(0)
    found = rlhf.objective([sampled(best, log_ref, score, 500)], 0.5)
    assert found["spread"] < 1e-6 and found["J"] == pytest.approx(found["ceiling"]["value"])


def test_claim_curves_are_thinned_and_keep_the_end():
    def line(i, seed):
        return {"episode": i, "objective/rlhf_reward": i + seed, "objective/scores": 0.0,
                "objective/kl": 1.0}  # fmt: skip

    found = rlhf.curve([[line(i, seed) for i in range(1, 91)] for seed in (0, 2)])
    assert found["episode"] == list(range(3, 91, 3))
    assert found["J"]["mean"][-1] == 91 and found["J"]["least"][-1] == 90
    assert found["J"]["most"][0] == 5
    logged = [line(i, 0) for i in (10, 20, 30)]
    assert rlhf.episodes_to(logged, 15.0) == 20 and rlhf.episodes_to(logged, 99.0) == math.inf
