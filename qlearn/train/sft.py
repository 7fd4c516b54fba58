"""Supervised fine-tuning: the model learns to write the completions it is shown.

The loss is the mean over completion tokens, end of text included, of −log π(y_t | s_t); prompts
are not learned. Equations of the book: `eq-sft`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlearn import losses
from qlearn.lm.data import SFT_COLUMNS, Example, as_pairs
from qlearn.lm.logprobs import collate, completion_logps, sum_logps
from qlearn.lm.models import load_model, note_if_surprised
from qlearn.lm.tokenizers import default_tokenizer, load_tokenizer
from qlearn.train import engine
from qlearn.train.engine import Log, TrainingConfig, Updates, option


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Settings of `qlearn sft`."""

    per_device_train_batch_size: int = option(32, "rows in one forward pass")
    learning_rate: float = option(2e-5, "AdamW's learning rate after warm-up")


def train(
    model: PreTrainedModel, examples: Sequence[Example], config: SFTConfig, path: str | None = None
) -> list[dict]:
    """Trains `model` in place on the examples' first completions; returns the logged metrics."""
    dtype = engine.choose_dtype(config.dtype, model.device)
    n_steps, n_tokens = engine.n_updates(len(examples), config), 0
    with Log("sft", n_steps, config.logging_steps, path, unit="rows") as log:
        updates = Updates(model, config, n_steps, log)
        for parts in engine.plan(len(examples), config):
            batches = [collate(as_pairs([examples[i] for i in p]), model.device) for p in parts]
            completion_tokens = sum(batch.completion_lengths.sum() for batch in batches)
            loss = torch.zeros((), device=model.device)
            for batch in batches:
                with engine.precision(model.device, dtype):
                    logp, mask = completion_logps(model, batch)
                # The mean is over the tokens of the whole update, however it is split.
                share = mask.sum() / completion_tokens
                part = losses.nll(logp, mask) * share
                part.backward()
                loss += part.detach()
            rows = [examples[i].row for part in parts for i in part]
            n_tokens += sum(len(examples[i].prompt) for part in parts for i in part)
            n_tokens += int(completion_tokens)
            log.update(updates.step(loss, rows), len(rows), num_tokens=n_tokens)
    return log.history


def evaluate(model: PreTrainedModel, examples: Sequence[Example], batch_size: int = 32) -> dict:
    """Mean −log π over completion tokens and over responses: eval_loss, eval_nll_per_response."""
    sums = sum_logps(model, as_pairs(examples), batch_size)
    tokens = sum(len(example.completions[0]) for example in examples)
    return {
        "eval_loss": -sums.sum().item() / tokens,
        "eval_nll_per_response": -sums.mean().item(),
        "eval_rows": len(examples),
    }


def run(config: SFTConfig) -> dict:
    """`qlearn sft`: reads, trains, evaluates before and after, saves; returns the summary."""
    device = engine.choose_device(config.device)
    engine.open_output(config)
    tokenizer = load_tokenizer(config.tokenizer or default_tokenizer(config.model, config.data))
    model = load_model(config.model, tokenizer, config.seed).to(device)
    train_set, eval_set = engine.load_examples(
        config, SFT_COLUMNS, tokenizer, engine.context_length(model, config),
        draw=lambda world: world.sft_rows(config.world_rows, f"sft {config.seed}"),
    )  # fmt: skip
    if config.tokenizer:
        note_if_surprised(model, as_pairs(eval_set), config.model)
    before = evaluate(model, eval_set, config.per_device_train_batch_size)
    print(f"before: loss {before['eval_loss']:.4f} a token on {len(eval_set)} held-out rows")
    train(model, train_set, config, path=f"{config.output_dir}/metrics.jsonl")
    after = evaluate(model, eval_set, config.per_device_train_batch_size)
    print(f"after:  loss {after['eval_loss']:.4f} a token")
    summary = {"before": before, "after": after}
    engine.save(model, tokenizer, config.output_dir, summary)
    return summary
