"""What half precision does to a log-ratio: the noise is measured against float32, and is real."""

import copy
import io
import math

import pytest
import torch
from safetensors.torch import save_file

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


def test_claim_weights_fit_where_they_just_fit(tmp_path, monkeypatch):
    """Five numbers in two files and two directories: 4 · 5 · 1.2 = 24 bytes."""
    for name, n in (("one", 2), ("two", 3)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.zeros(n)}, tmp_path / name / "model.safetensors")
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for free, fits in ((24, True), (23, False)):
        monkeypatch.setattr(precision, "free_memory", lambda device, free=free: free)
        assert precision.enough_memory_for_float32(folders, torch.device("cpu")) is fits


def test_claim_free_memory_is_what_the_machine_says_in_bytes(monkeypatch):
    """1024 bytes to a kB of /proc/meminfo, what CUDA calls free, or None."""
    text = "MemTotal: 900 kB\nMemFree: 5 kB\nMemAvailable: 7 kB\nHugePages_Total: 0\n"

    def opened(answer):
        def fake(path, **_):
            assert path == "/proc/meminfo"
            if isinstance(answer, OSError):
                raise answer
            return io.StringIO(answer)

        monkeypatch.setattr(precision, "open", fake, raising=False)
        return precision.free_memory(torch.device("cpu"))

    assert opened(text) == 7 * 1024
    for odd in (OSError(), "MemTotal: 900 kB\n", "MemAvailable: many kB\n"):
        assert opened(odd) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    assert precision.free_memory(torch.device("cuda")) == 5


def test_claim_biased_errors_add_up_as_the_tokens_do(monkeypatch):
    """Errors of + 0.1 in a row of 4 and of 2 tokens: sums 0.4 and 0.2, not 0.1 √T.

    Σ²/T is 0.04 and 0.02, their mean 0.03; at the mean length of 3 a sum is √(0.03 · 3) off.
    """
    rows = [([1], [1, 1, 1, 1]), ([2], [1, 1])]
    exact = [torch.zeros(4).double(), torch.zeros(2).double()]
    monkeypatch.setattr(
        precision, "_logps",
        lambda model, rows, dtype: [
            x + (0.1 if (model, dtype) == ("policy", torch.bfloat16) else 0.0) for x in exact
        ],
    )  # fmt: skip
    noise = log_ratio_noise("policy", "reference", rows, torch.bfloat16, at_least=1)
    assert (noise.n_tokens, noise.length) == (6, 3)
    assert (noise.std, noise.p95) == pytest.approx((0.1, 0.1))
    assert noise.sum_std == pytest.approx(math.sqrt(0.03 * 3))


@pytest.mark.parametrize("n", [4, 5])
def test_claim_every_row_is_read_once_in_batches(model, monkeypatch, n):
    """Batches of two, the last full or not: each row's log π is that of the row alone."""
    monkeypatch.setattr(precision, "BATCH", 2)
    rows = [([5, 6], list(range(20, 22 + i))) for i in range(n)]
    read = precision._logps(model, rows, torch.float32)
    assert len(read) == n
    for row, logp in zip(rows, read, strict=True):
        with torch.no_grad():
            alone, _ = completion_logps(model, collate([row]))
        assert logp.dtype == torch.float64
        assert logp.tolist() == pytest.approx(alone[0].tolist(), abs=1e-5)
