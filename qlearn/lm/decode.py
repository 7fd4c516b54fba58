"""Drawing responses from a language model, through transformers' own `generate`."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


class OnlyRealTokens(LogitsProcessor):
    """Gives no probability to table rows beyond the tokenizer (Pythia has 27 such rows)."""

    def __init__(self, n_tokens: int):
        self.n_tokens = n_tokens

    def __call__(self, input_ids, scores):
        scores[:, self.n_tokens :] = -torch.inf
        return scores


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    greedy: bool = False,
    batch_size: int = 512,
) -> list[str]:
    """One response a prompt: sampled from the whole distribution (no top-k), or the greedy one.

    A response that has not ended after `max_new_tokens` is returned as it stands. Text comes back
    without the end-of-text token and, where it has words, with one leading space.
    """
    texts = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            texts += _generate(
                model, tokenizer, prompts[start : start + batch_size], max_new_tokens,
                dict(do_sample=False) if greedy
                else dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0),
            )  # fmt: skip
    return texts


def _generate(model, tokenizer, prompts, max_new_tokens, how) -> list[str]:
    # Padding stands on the left only here, so that every row's next token is the last column.
    inputs = tokenizer(
        list(prompts), return_tensors="pt", padding=True, padding_side="left",
        return_token_type_ids=False,
    ).to(model.device)  # fmt: skip
    with torch.no_grad():
        out = model.generate(
            **inputs, **how, max_new_tokens=max_new_tokens, use_cache=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            logits_processor=[OnlyRealTokens(len(tokenizer))],
        )  # fmt: skip
    answers = out[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [" " + text.strip() if text.strip() else "" for text in texts]
