"""Twenty-two architectures against transformers' own numbers; others are refused by trial."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlearn.errors import InputError
from qlearn.lm.cursor import Cursor
from qlearn.lm.logprobs import collate, completion_logps
from qlearn.lm.models import load_model

WORDS = 224  # the world tokenizer's
NEW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
       "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
GROUPED = NEW | {"num_key_value_heads": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CAUSAL = {
    "gpt_neox": NEW, "llama": GROUPED, "mistral": GROUPED, "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8}, "gemma": GROUPED | {"head_dim": 8}, "phi": GROUPED,
    "phi3": GROUPED, "stablelm": GROUPED, "olmo": GROUPED, "olmo2": GROUPED, "starcoder2": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt2": OLD, "gpt_bigcode": OLD, "gptj": OLD | {"rotary_dim": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
                "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
               "alibi": False, "new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "biogpt": NEW,
}  # fmt: skip
BIDIRECTIONAL = {
    "bert": {k: v for k, v in NEW.items() if k != "max_position_embeddings"},
    "electra": {k: v for k, v in NEW.items() if k != "max_position_embeddings"}
    | {"embedding_size": 32},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}
RECURRENT = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16,
               "state_size": 4, "n_groups": 1},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
}  # fmt: skip
BENT = {  # logits capped or scaled after the head
    "gemma2": GROUPED | {"head_dim": 8, "final_logit_softcapping": 0.1}, "cohere": GROUPED,
}  # fmt: skip
# Prompts and responses of unlike lengths; end of text and padding ids among the response's tokens.
ROWS = [([5, 6, 7], [8, 9, 0]), ([4], [10, 0, 11, 12, 1, 0]), ([9, 8, 7, 6, 5, 4, 3], [2])]


def saved(kind: str, settings: dict, folder) -> str:
    """A directory with a tiny random model whose logits spread enough to tell tokens apart."""
    config = AutoConfig.for_model(
        kind, vocab_size=WORDS, bos_token_id=0, eos_token_id=0, pad_token_id=None, **settings
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    model.save_pretrained(folder)
    return str(folder)


def own_logits(model, ids: list[int]) -> torch.Tensor:
    """transformers' logits (T, V) of one row, without a cache, a mask or padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.fixture(params=CAUSAL)
def loaded(request, tokenizer, tmp_path):
    assert len(tokenizer) == WORDS
    return load_model(saved(request.param, CAUSAL[request.param], tmp_path), tokenizer)


def test_reference_transformers_scores_and_writes_the_same(loaded):
    """log π of each token in a padded batch, and greedy text from left-padded prompts."""
    logp, _ = completion_logps(loaded, collate(ROWS))
    for row, (prompt, completion) in zip(logp, ROWS, strict=True):
        expected = own_logits(loaded, prompt + completion).log_softmax(-1)
        at = torch.arange(len(completion)) + len(prompt) - 1
        assert torch.allclose(row[: len(completion)], expected[at, completion], atol=1e-4)

    cursor, written = Cursor(loaded, [prompt for prompt, _ in ROWS], WORDS), []
    for _ in range(6):
        written.append(cursor.logp.argmax(-1))
        cursor.append(written[-1])
    for row, (prompt, _) in zip(torch.stack(written, dim=1).tolist(), ROWS, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(own_logits(loaded, ids)[-1].argmax().item())
        assert row == ids[len(prompt) :]


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_claim_bidirectional_models_are_refused(kind, tokenizer, tmp_path):
    with pytest.raises(InputError, match=rf"\({kind}\) is bidirectional.*causal language model"):
        load_model(saved(kind, BIDIRECTIONAL[kind], tmp_path), tokenizer)


@pytest.mark.parametrize("kind", RECURRENT)
def test_claim_recurrent_models_score_but_do_not_write(kind, tokenizer, tmp_path):
    """Right padding is behind every token, so scoring is exact; a state would read left padding."""
    model = load_model(saved(kind, RECURRENT[kind], tmp_path), tokenizer)
    logp, _ = completion_logps(model, collate(ROWS))
    prompt, completion = ROWS[0]
    expected = own_logits(model, prompt + completion).log_softmax(-1)[[2, 3, 4], completion]
    assert torch.allclose(logp[0, :3], expected, atol=1e-4)
    with pytest.raises(InputError, match=f"{kind} is recurrent"):
        Cursor(model, [[5, 6], [7]], WORDS)


def test_claim_models_without_a_cache_do_not_write(tokenizer, tmp_path):
    model = load_model(saved("openai-gpt", OLD, tmp_path), tokenizer)
    with pytest.raises(InputError, match="openai-gpt keeps no key-value cache"):
        Cursor(model, [[5, 6], [7]], WORDS)


@pytest.mark.parametrize("kind", BENT)
def test_claim_models_that_bend_their_logits_are_refused(kind, tokenizer, tmp_path):
    with pytest.raises(InputError, match="plain linear head"):
        load_model(saved(kind, BENT[kind], tmp_path), tokenizer)


def test_claim_encoder_decoders_are_refused(tokenizer, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"\(t5\) is an encoder-decoder"):
        load_model(str(tmp_path), tokenizer)
