"""Sampling through transformers: left padding, seeds, dead rows of the table."""

import torch

from qlearn.lm.decode import sample
from qlearn.lm.models import SHAPES, config_of, load_model
from qlearn.lm.worlds import SlotWorld

PROMPTS = [post.prompt for post in SlotWorld().posts(6, "decode")] + ["POST:"]


def test_claim_padding_on_the_left_changes_no_greedy_token(model, tokenizer):
    """Trap 6: a batch of unequal prompts decodes as each prompt alone, by plain argmax."""
    texts = sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=0, greedy=True)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt).input_ids
        start = len(ids)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 0:
                break
        assert text.split() == tokenizer.decode(ids[start:], skip_special_tokens=True).split()


def test_claim_same_seed_same_text(model, tokenizer):
    """And sampling leaves the global random state alone."""
    before = torch.get_rng_state()
    one, two, three = (
        sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=s) for s in (1, 1, 2)
    )
    assert one == two != three and torch.equal(before, torch.get_rng_state())


def test_claim_rows_beyond_the_tokenizer_are_never_drawn(tokenizer, tmp_path):
    """Pythia's tables have rows that no token names; an untrained model would draw them."""
    from transformers import GPTNeoXForCausalLM

    config = config_of(SHAPES["tiny"], tokenizer)
    config.vocab_size = 4 * len(tokenizer)
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), tokenizer)
    texts = sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=0)
    words = set(SlotWorld.vocabulary())
    assert all(len(text.split()) >= 4 for text in texts)
    assert tokenizer.unk_token_id not in tokenizer(" ".join(texts)).input_ids and words
