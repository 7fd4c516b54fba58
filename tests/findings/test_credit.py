"""Token credit and Eq. 16 against the plain way."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from qlearn.findings.credit import Credit, agreement, one_step_map, token_credit
from qlearn.findings.likelihood import log_ratio_and_kl
from qlearn.lm.models import load_model
from qlearn.studies.slot_world import summarise
from qlearn.train.step_0 import same_weights

ROWS = [([5, 6, 7], [8, 9, 0]), ([4], [10, 11, 12, 0]), ([3, 2], [1])]


def plain(model, prompt, completion):
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return logits[len(prompt) - 1 : -1]


def test_eq_10_credit_is_the_scaled_log_ratio(model, other):
    """β (log π − log π_ref) token by token, its running sum, and the reference's surprisal."""
    credits = token_credit(model, other, ROWS, beta=0.3, batch_size=2)
    for credit, (prompt, completion) in zip(credits, ROWS, strict=True):
        ids = torch.tensor(completion)[:, None]
        p, ref = (plain(m, prompt, completion).gather(1, ids)[:, 0] for m in (model, other))
        assert torch.allclose(credit.advantage, 0.3 * (p - ref), atol=1e-5)
        assert torch.allclose(credit.surprisal, -ref, atol=1e-5)
        assert credit.value[-1].item() == pytest.approx(credit.advantage.sum().item(), abs=1e-5)


def test_claim_surprisal_under_the_policy_is_surprisal_less_credit(model, other):
    """−log π = −log π_ref − r̂/β, its two sides from two models' own forward passes.

    `eq-surprisal`
    """
    beta = 0.3
    credits = token_credit(model, other, ROWS, beta)
    for credit, (prompt, completion) in zip(credits, ROWS, strict=True):
        ids = torch.tensor(completion)[:, None]
        surprisal = -plain(model, prompt, completion).gather(1, ids)[:, 0]
        assert torch.allclose(credit.surprisal - credit.advantage / beta, surprisal, atol=1e-4)
        assert (credit.advantage / beta).abs().max() > 1e-3  # the two models differ


def test_eq_16_both_estimates_per_row(model, other):
    """log π/π_ref of the response, and minus the sum of KL over its states."""
    ratio, kl = log_ratio_and_kl(model, other, ROWS)
    for i, (prompt, completion) in enumerate(ROWS):
        p, ref = plain(model, prompt, completion), plain(other, prompt, completion)
        ids = torch.tensor(completion)[:, None]
        assert ratio[i].item() == pytest.approx((p - ref).gather(1, ids).sum().item(), abs=1e-4)
        expected = -sum(
            (row_r.exp() * (row_r - row_p)).sum().item()
            for row_p, row_r in zip(p, ref, strict=True)
        )
        assert kl[i].item() == pytest.approx(expected, abs=1e-4)
        assert kl[i] <= 0


def test_eq_16_mean_log_ratio_is_minus_the_kl(tokenizer):
    """N1: on 4,000 own samples of one token each the two means agree within 3 standard errors."""
    reference, policy = (load_model("tiny", tokenizer, seed=s) for s in (11, 12))
    prompt = [5, 6, 7]
    p = plain(reference, prompt, [0])[0].exp().detach()
    draws = torch.multinomial(p, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    ratio, kl = log_ratio_and_kl(policy, reference, [(prompt, [int(a)]) for a in draws])
    error = ratio.std() / len(ratio) ** 0.5
    assert kl.std() < 1e-4  # one state: nothing left to vary
    assert abs((ratio - kl).mean()) < 3 * error and abs(kl.mean()) > 3 * error


def test_claim_agreement_is_1_for_the_truth_and_0_for_noise():
    generator = torch.Generator().manual_seed(0)
    kinds = ["right", "habit", "free", "fixed"]
    truths = [
        [{"kind": kinds[i % 4], "advantage": x} for i, x in enumerate(row)]
        for row in torch.randn(200, 8, generator=generator).tolist()
    ]

    def credit(values):
        a = torch.tensor(values)
        return Credit(a, a, a, a, a)

    true = agreement([credit([t["advantage"] for t in row]) for row in truths], truths)
    assert true["spearman_facts"] == pytest.approx(1) and true["pearson_all"] == pytest.approx(1)
    assert true["facts"] == 800 and true["tokens"] == 1600 and true["spearman_ceiling"] > 0.99
    noise = torch.randn(200, 8, generator=generator).tolist()
    false = agreement([credit(row) for row in noise], truths)
    assert abs(false["spearman_facts"]) < 0.12 and abs(false["pearson_all"]) < 0.1


def test_claim_the_ceiling_is_what_a_normal_error_of_two_hundredths_leaves():
    """For normal advantages of deviation d the error leaves a correlation ρ = d/√(d² + 0.02²).

    The rank correlation of normal numbers is 6/π arcsin(ρ/2). In the small, the ranks by hand,
    with the one error that every ceiling is measured with.
    """
    d = 0.02
    exact = d * torch.randn(20_000, generator=torch.Generator().manual_seed(3))
    x = Credit(exact, exact, exact, exact, exact)
    truth = [{"kind": "slip", "advantage": a} for a in exact.tolist()]
    rho = d / math.hypot(d, 0.02)
    ceiling = agreement([x], [truth])["spearman_ceiling"]
    assert ceiling == pytest.approx(6 / math.pi * math.asin(rho / 2), abs=0.01)

    kinds, advantages = ["right", "fixed", "slip", "habit"], [0.01, 5.0, 0.0, 0.02]
    error = 0.02 * np.random.default_rng(0).standard_normal(4)  # of all tokens, facts or not
    ranks = rankdata((np.array(advantages) + error)[[0, 2, 3]])
    small = torch.tensor(advantages)
    found = agreement([Credit(*[small] * 5)], [
        [{"kind": k, "advantage": a} for k, a in zip(kinds, advantages, strict=True)]
    ])  # fmt: skip
    assert found["spearman_ceiling"] == pytest.approx(np.corrcoef(ranks, [2, 1, 3])[0, 1])
    assert found["spearman_facts"] == pytest.approx(1) and found["facts"] == 3


def test_claim_intervals_are_students_over_seeds():
    """Against a textbook case: 5 values, t(0.975, 4) = 2.776."""
    found = summarise([{"a": {"b": x}, "note": "text"} for x in (1.0, 2.0, 3.0, 4.0, 5.0)])
    half = 2.7764 * (2.5**0.5) / 5**0.5
    assert found["a"]["b"]["mean"] == 3
    assert found["a"]["b"]["low"] == pytest.approx(3 - half, abs=1e-3)
    assert found["a"]["b"]["high"] == pytest.approx(3 + half, abs=1e-3)
    assert (found["a"]["b"]["least"], found["a"]["b"]["most"]) == (1, 5)


def test_claim_saved_models_measure_alike(model, other, tokenizer, tmp_path):
    """Credit of a saved and loaded policy is bit-equal: nothing depends on what is in memory."""
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), tokenizer)
    assert same_weights(model, again)
    one, two = (token_credit(m, other, ROWS, 0.5)[0].advantage for m in (model, again))
    assert torch.equal(one, two)


def test_claim_one_step_map_is_the_first_step_of_dpo(model):
    """D4: ‖e_a − π_ref‖² written out, and the change of log π(a) under a step on its own logits.

    For a row of logits l, log π(a) − log π_ref(a) after l ← l + η (e_a − π_ref) is η ‖e_a − π_ref‖²
    to first order.
    """
    maps = one_step_map(model, ROWS, batch_size=2)
    step = 1e-3
    for found, (prompt, completion) in zip(maps, ROWS, strict=True):
        logp = plain(model, prompt, completion).detach().double()
        push = torch.eye(logp.shape[1], dtype=torch.float64)[completion] - logp.exp()
        assert torch.allclose(found.double(), (push**2).sum(-1), atol=1e-5)
        after = (logp + step * push).log_softmax(-1)
        moved = (after - logp)[torch.arange(len(completion)), completion]
        assert torch.allclose(moved / step, found.double(), rtol=2e-2, atol=1e-4)
