"""Completions behind one shared prompt against the plain way: a row for each completion."""

import random

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlearn import losses
from qlearn.lm import shared_prompt
from qlearn.lm.logprobs import collate, completion_logps, head_logits, target_logps
from qlearn.lm.shared_prompt import (
    collate_shared,
    largest_difference,
    shared_logps,
    takes_shared_prompts,
    visible,
)

WORDS = 97
SHAPE = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
OBEDIENT = {
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                   bos_token_id=0, eos_token_id=0)
    ),
}  # fmt: skip
FLOAT32_NORMS = {"llama", "qwen2"}  # their RMSNorm computes in float32 whatever the model's dtype
OTHERS = {
    "sliding window": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=16)
    ),
    "ALiBi": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4)
    ),
}


def build(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.fixture
def rows():
    """Unlike prompts and lengths, one-token prompts and answers among them."""
    draw = random.Random(1)

    def ids(n):
        return [draw.randrange(WORDS) for _ in range(n)]

    return [(ids(p), (ids(c), ids(r))) for p, c, r in [(9, 4, 7), (1, 1, 5), (20, 6, 1), (3, 2, 2)]]


def pair_losses(logp):
    """DPO losses from log π (2, B, T), against a reference of other numbers: (B,)."""
    chosen, rejected = logp.sum(-1)
    return losses.dpo(chosen, rejected, chosen.detach() + 0.3, rejected.detach() - 0.2, 0.5).loss


def plain(model, rows):
    """log π (2, B, T) by the readable path: every completion behind a copy of its prompt."""
    batch = collate([(x, ys[k]) for k in (0, 1) for x, ys in rows])
    return completion_logps(model, batch)[0].view(2, len(rows), -1)


@pytest.mark.parametrize("name", OBEDIENT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_claim_shared_prompts_change_no_number_and_no_gradient(name, dtype, tolerance, rows):
    """Each token's log π, the loss, and each parameter's gradient, relative to its norm."""
    model = build(OBEDIENT[name]).to(dtype)
    expected = plain(model, rows)
    pair_losses(expected).mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    logp, mask = shared_logps(model, collate_shared(rows))
    assert logp.dtype == dtype and not logp[mask == 0].any()
    assert torch.allclose(logp, expected, rtol=0, atol=tolerance)
    assert torch.allclose(pair_losses(logp), pair_losses(expected), rtol=0, atol=tolerance)
    pair_losses(logp).mean().backward()
    largest = max(g.norm() for g in gradients)
    if name in FLOAT32_NORMS:
        tolerance = max(tolerance, 1e-6)
    for p, g in zip(model.parameters(), gradients, strict=True):
        # a gradient of exactly 0 (a key's bias) is rounding in both
        assert (p.grad - g).norm() <= tolerance * max(g.norm(), 1e-3 * largest)


def test_bug_a_branch_that_sees_the_other_is_noticed(rows, monkeypatch):
    """The negative control: a plain causal mask lets the rejected answer read the chosen one."""
    model = build(OBEDIENT["gpt_neox"]).double()
    assert largest_difference(model, rows) < 1e-10
    causal = lambda branch: visible(torch.zeros_like(branch))  # noqa: E731
    monkeypatch.setattr(shared_prompt, "visible", causal)
    assert largest_difference(model, rows) > 1e-3
    assert not takes_shared_prompts(model)[0]


def test_bug_positions_that_run_on_are_noticed(rows):
    """The second answer would stand further from the prompt than it does."""
    model = build(OBEDIENT["gpt2"]).double()
    batch = collate_shared(rows)
    running = batch._replace(position_ids=torch.arange(batch.input_ids.shape[1]).expand(4, -1))
    logp, expected = shared_logps(model, running)[0], plain(model, rows)
    assert torch.allclose(logp[0], expected[0], atol=1e-10)
    assert not torch.allclose(logp[1], expected[1], atol=1e-3)


@pytest.mark.parametrize("name", OBEDIENT)
def test_claim_common_architectures_take_shared_prompts(name):
    takes, difference = takes_shared_prompts(build(OBEDIENT[name]))
    assert takes and difference < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_claim_architectures_that_the_mask_does_not_reach_are_told(name):
    """A sliding window or ALiBi counts the tokens of the row, not those that a token may see."""
    takes, difference = takes_shared_prompts(build(OTHERS[name]))
    assert not takes and difference > 1e-3


def test_claim_a_model_that_ignores_the_mask_does_not_take_them(rows):
    model = build(OBEDIENT["gpt_neox"])
    forward = model.base_model.forward
    model.base_model.forward = lambda **inputs: forward(**inputs | {"attention_mask": None})
    takes, difference = takes_shared_prompts(model)
    assert not takes and difference > 1e-3


def test_claim_bfloat16_bodies_are_close(rows):
    """Under autocast the mask has the scores' dtype; the head stays float32."""
    model = build(OBEDIENT["gpt_neox"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = shared_logps(model, collate_shared(rows))[0]
    assert logp.dtype == torch.float32
    assert torch.allclose(logp, plain(model, rows), atol=0.1)


@pytest.mark.parametrize("rows", [[], [([], ([1], [2]))], [([1], ([1], []))],
                                  [([1], ([1], [2])), ([], ([1], [2]))],
                                  [([1], ([1], [2])), ([1], ([1], []))],
                                  [([1], ([1], [2])), ([1], ([1],))]])  # fmt: skip
def test_claim_rows_without_tokens_or_of_unlike_number_are_refused(rows):
    with pytest.raises(ValueError, match=r"Each row needs|the same number of completions"):
        collate_shared(rows)


def test_claim_one_prompt_may_have_any_number_of_completions(rows):
    model = build(OBEDIENT["llama"]).double()
    many = [(x, (*ys, ys[0])) for x, ys in rows]
    logp = shared_logps(model, collate_shared(many))[0]
    assert torch.allclose(logp[2], logp[0], atol=1e-10) and len(logp) == 3


def test_claim_target_logps_are_log_softmax_with_its_gradient():
    logits = torch.randn(6, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6)
    weight = torch.linspace(-1, 2, 6, dtype=torch.float64)
    one, two = (logits.clone().requires_grad_() for _ in range(2))
    ours = target_logps(one * 1, targets)
    theirs = (two * 1).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-12)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert torch.allclose(one.grad, two.grad, atol=1e-12)


def test_bug_a_second_backward_through_overwritten_logits_is_refused():
    """It would read probabilities where logits stood."""
    logits = torch.randn(2, 5, requires_grad=True) * 1
    logp = target_logps(logits, torch.tensor([0, 1])).sum()
    logp.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.backward()


def test_claim_the_head_keeps_double_precision_and_raises_half():
    model = build(OBEDIENT["llama"])
    assert head_logits(model, torch.zeros(1, 32, dtype=torch.bfloat16)).dtype == torch.float32
    assert head_logits(model, torch.zeros(1, 32, dtype=torch.float64)).dtype == torch.float64


def test_claim_a_shared_pass_keeps_no_cache(rows):
    model, outputs = build(OBEDIENT["llama"]), []
    model.base_model.register_forward_hook(lambda *args: outputs.append(args[-1]))
    shared_logps(model, collate_shared(rows))
    assert outputs[0].past_key_values is None


@pytest.mark.parametrize(("difference", "takes"), [(0.0, True), (1e-4, True), (1.1e-4, False)])
def test_claim_a_ten_thousandth_of_a_nat_is_tolerated(difference, takes, monkeypatch):
    monkeypatch.setattr(shared_prompt, "largest_difference", lambda model, rows: difference)
    assert takes_shared_prompts(build(OBEDIENT["llama"])) == (takes, difference)
