"""Per-token log-probabilities against the plain way: all logits of one unpadded row at a time."""

import pytest
import torch

from qlearn.lm import logprobs
from qlearn.lm.logprobs import collate, completion_logps, sum_logps
from qlearn.lm.models import load_model

ROWS = [
    ([5, 6, 7], [8, 9, 0]),
    ([4], [10, 0, 11, 12, 1, 0]),  # end of text and padding ids inside a completion are real tokens
    ([9, 8, 7, 6, 5, 4, 3], [2]),
]


def plain_logps(model, prompt, completion):
    """log-softmax of every position of model(ids).logits, shifted by one."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0].double()
    logp = logits.log_softmax(-1)
    first = len(prompt) - 1
    return torch.stack([logp[first + j, token] for j, token in enumerate(completion)])


def test_claim_batch_equals_rows_one_by_one(model):
    """Traps 2, 6, 7: padding, its ids and the missing mask change no log-probability."""
    logp, mask = completion_logps(model, collate(ROWS))
    assert mask.tolist() == [[1] * 3 + [0] * 3, [1] * 6, [1] + [0] * 5]
    assert not logp[mask == 0].any()
    for row, (prompt, completion) in zip(logp, ROWS, strict=True):
        expected = plain_logps(model, prompt, completion).float()
        assert torch.allclose(row[: len(completion)], expected, atol=1e-5)


def test_claim_what_stands_beyond_a_row_is_never_read(model):
    """Trap 2: other ids in the padding give the same numbers, bit for bit."""
    batch = collate(ROWS)
    noisy = batch.input_ids.clone()
    for row, n in zip(noisy, batch.prompt_lengths + batch.completion_lengths, strict=True):
        row[n:] = 3
    same = completion_logps(model, batch._replace(input_ids=noisy))[0]
    assert torch.equal(same, completion_logps(model, batch)[0])


def test_claim_gradient_equals_the_plain_way(model):
    """Selecting positions before the head changes no gradient."""
    completion_logps(model, collate(ROWS))[0].sum().backward()
    compact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(plain_logps(model, *row).sum() for row in ROWS).backward()
    for p, q in zip(compact, model.parameters(), strict=True):
        assert torch.allclose(p, q.grad, atol=1e-4 * q.grad.abs().max().item() + 1e-7)


def test_claim_only_completion_positions_meet_the_head(model):
    """The head sees N completion rows, not B × S positions."""
    seen = []
    linear = torch.nn.functional.linear

    def spy(x, weight, bias=None):
        if weight.shape[0] == model.config.vocab_size:
            seen.append(x.shape[0])
        return linear(x, weight, bias)

    torch.nn.functional.linear = spy
    try:
        completion_logps(model, collate(ROWS))
    finally:
        torch.nn.functional.linear = linear
    assert seen == [3 + 6 + 1]


def test_claim_no_cache_in_training(model):
    """Trap 23: the forward pass builds no key-value cache."""
    outputs = []
    model.base_model.register_forward_hook(lambda *args: outputs.append(args[-1]))
    completion_logps(model, collate(ROWS))
    assert outputs[0].past_key_values is None


def test_claim_log_probabilities_stay_float32_under_autocast(model):
    """Trap 12: with a bfloat16 body the head and everything after it is float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, _ = completion_logps(model, collate(ROWS))
    assert logp.dtype == torch.float32
    # bfloat16 has 8 bits: after rounding, hardly any value would survive a round trip
    assert (logp[logp != 0] != logp[logp != 0].bfloat16().float()).float().mean() > 0.8
    assert torch.allclose(logp, completion_logps(model, collate(ROWS))[0], atol=0.1)


def test_claim_extreme_logits_stay_finite(model):
    """Trap 14: a token of probability e^-1000 has a log-probability, not -inf."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    logp, mask = completion_logps(model, collate(ROWS))
    assert logp.isfinite().all() and logp[mask == 1].min() < -500


def test_claim_sums_come_back_in_order(model):
    """Sorting by length for speed does not reorder the answers."""
    rows = ROWS * 3
    sums = sum_logps(model, rows, batch_size=2)
    for total, (prompt, completion) in zip(sums, rows, strict=True):
        assert total.item() == pytest.approx(
            plain_logps(model, prompt, completion).sum().item(), abs=1e-4
        )
    assert not sums.requires_grad


def test_claim_empty_sides_are_refused():
    for rows in ([], [([], [1])], [([1], [])], [([1], [1]), ([], [1])], [([1], [1]), ([1], [])]):
        with pytest.raises(ValueError, match="Each row needs at least one prompt token and one"):
            collate(rows)


def test_claim_models_with_other_bodies_work(tokenizer, tmp_path):
    """Any causal LM with a linear head: a Llama gives the same numbers as its own forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    llama = load_model(str(tmp_path), tokenizer)
    logp, _ = completion_logps(llama, collate(ROWS))
    assert torch.allclose(logp[1], plain_logps(llama, *ROWS[1]).float(), atol=1e-5)


def test_claim_rows_are_scored_in_order_of_length(model, monkeypatch):
    """Prompt and completion together: no batch pads more than the next one is long."""
    rows = [([1] * p, [2] * c) for p, c in ((1, 9), (7, 1), (2, 2), (5, 1), (9, 3), (3, 8))]
    batches = []

    def spy(part, device):
        batches.append(part)
        return collate(part, device)

    monkeypatch.setattr(logprobs, "collate", spy)
    sum_logps(model, rows, batch_size=2)
    assert [[(len(p), len(c)) for p, c in part] for part in batches] == [
        [(2, 2), (5, 1)], [(7, 1), (1, 9)], [(3, 8), (9, 3)],
    ]  # fmt: skip


def test_claim_the_heads_bias_counts(model):
    """Phi and GPT-J have one; it is in transformers' own logits, and here."""
    head = model.get_output_embeddings()
    draws = torch.Generator().manual_seed(0)
    head.bias = torch.nn.Parameter(torch.randn(head.weight.shape[0], generator=draws))
    logp, _ = completion_logps(model, collate(ROWS))
    for row, (prompt, completion) in zip(logp, ROWS, strict=True):
        expected = plain_logps(model, prompt, completion).float()
        assert torch.allclose(row[: len(completion)], expected, atol=1e-5)
