"""What half precision does to a log-ratio: the noise is measured against float32, and is real."""

import copy
import math

import pytest
import torch

from qlearn.findings import precision
from qlearn.findings.precision import log_ratio_noise, lower, with_prompts
from qlearn.lm.logprobs import collate, completion_logps

ROWS = [(list(range(5, 15)), list(range(20, 60))), ([7, 8, 9], list(range(30, 70)))]


def ratios(policy, reference, rows=ROWS):
    """log π − log π_ref of all completion tokens, one after the other."""
    with torch.no_grad():
        parts = [completion_logps(m, collate(rows)) for m in (policy, reference)]
    (logp, mask), (ref_logp, _) = parts
    return (logp - ref_logp)[mask.bool()]


def test_claim_the_noise_is_the_difference_to_float32(model, other):
    """Both models as bfloat16 copies, token by token, against themselves in float32."""
    copies = [lower(copy.deepcopy(m), torch.bfloat16) for m in (model, other)]
    errors = ratios(*copies) - ratios(model, other)
    noise = log_ratio_noise(model, other, ROWS, torch.bfloat16)
    assert noise.n_tokens == len(errors) == 80 and noise.length == 40
    assert noise.std == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-4)
    assert noise.p95 == pytest.approx(errors.abs().quantile(0.95).item(), rel=1e-4)
    assert noise.std > 1e-3, "bfloat16 must be seen to round"
    sums = torch.stack([x.sum() for x in errors.split(40)])
    expected = max(noise.std * math.sqrt(40), sums.square().mean().sqrt().item())
    assert noise.sum_std == pytest.approx(expected, rel=1e-4)
    assert noise.of_sum(160) == pytest.approx(2 * noise.sum_std)


def test_claim_the_models_stay_as_they_were(model, other):
    before = [p.clone() for p in model.parameters()]
    log_ratio_noise(model, other, ROWS, torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_bug_the_same_pass_again_would_show_no_noise(model, other):
    """A second pass in bfloat16 is the first, bit for bit."""
    copies = [lower(copy.deepcopy(m), torch.bfloat16) for m in (model, other)]
    assert torch.equal(ratios(*copies), ratios(*copies))


def test_claim_models_read_in_bfloat16_are_measured_too(model, other):
    """Where memory forbids float32, each in turn is raised to it: the body's rounding counts."""
    copies = [lower(copy.deepcopy(m), torch.bfloat16) for m in (model, other)]
    noise = log_ratio_noise(*copies, ROWS, torch.bfloat16)
    raised = [copy.deepcopy(m).float() for m in copies]
    errors = ratios(*copies) - ratios(*raised)
    assert noise.std == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-4)


def test_claim_short_responses_are_measured_with_their_prompts(model, other):
    rows = [(list(range(5, 45)), [50, 51]), (list(range(5, 45)), [52])]
    assert with_prompts(rows) == [([5], [*range(6, 45), 50, 51]), (list(range(5, 45)), [52])]
    noise = log_ratio_noise(model, other, rows, torch.bfloat16, at_least=30)
    assert noise.n_tokens == 42 and noise.length == 1.5


def test_claim_float32_has_no_noise_to_measure(model, other):
    for rows, dtype in ((ROWS, torch.float32), ([], torch.bfloat16)):
        with pytest.raises(ValueError, match="A noise needs rows"):
            log_ratio_noise(model, other, rows, dtype)


def test_claim_memory_decides_for_float32(model, tokenizer, tmp_path, monkeypatch):
    """4 bytes a weight and a fifth more must be free; what cannot be known is let through."""
    model.save_pretrained(tmp_path)
    n = sum(p.numel() for p in model.parameters())
    for free, fits in ((4 * n * 1.2 + 1, True), (4 * n * 1.2 - 1, False), (None, True)):
        monkeypatch.setattr(precision, "free_memory", lambda device, free=free: free)
        assert precision.enough_memory_for_float32([str(tmp_path)], torch.device("cpu")) is fits
    assert precision.enough_memory_for_float32(["org/name"], torch.device("cpu"))


def test_claim_free_memory_is_a_number_of_bytes_or_unknown():
    free = precision.free_memory(torch.device("cpu"))
    assert free is None or free > 2**20
