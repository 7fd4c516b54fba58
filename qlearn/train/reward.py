"""A Bradley-Terry reward model: a language model's body with one number in place of its vocabulary.

Its score of a response is that number at the response's last token, the end of text included, and
it is fitted to preferences by −log σ(R_w − R_l): Eq. 1 of the paper, `eq-bradley-terry` in the
book. It is transformers' own sequence-classification model with one label, so a saved one is read
by `AutoModelForSequenceClassification` and gives the same scores.

The head starts at 0, so the loss starts at ln 2 and every score at 0.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlearn import losses
from qlearn.errors import InputError
from qlearn.lm.data import PREFERENCE_COLUMNS, Example, as_pairs
from qlearn.lm.logprobs import Batch, Row, collate
from qlearn.lm.models import load_model, no_dropout, note_if_surprised
from qlearn.lm.pretrained import load_weights
from qlearn.lm.tokenizers import check_same_tokenizer, default_tokenizer, load_tokenizer
from qlearn.lm.worlds import draw_pairs
from qlearn.train import engine
from qlearn.train.engine import Log, TrainingConfig, Updates, option


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Settings of `qlearn reward`. `model` is a language model; its body is where training starts.

    Where the data is an embedded world, that model also writes both lines of each pair.
    """

    learning_rate: float = option(1e-4, "AdamW's learning rate after warm-up")


def with_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Example] = ()
) -> PreTrainedModel:
    """A reward model on a copy of a language model's body, its head 0.

    Its config names a padding id that occurs in none of `pairs`. Raises: InputError for an
    architecture without a sequence classifier in transformers.
    """
    config = copy.deepcopy(model.config)
    config.num_labels, config.get_text_config().pad_token_id = 1, None
    try:
        reward = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise InputError(
            f"transformers has no sequence classifier for {config.model_type} models, so it cannot "
            "become a reward model; use another architecture."
        ) from error
    reward.base_model.load_state_dict(model.base_model.state_dict())
    nn.init.zeros_(reward.score.weight)
    name_padding(reward, padding_id(tokenizer, pairs))
    return no_dropout(reward).to(model.device).eval()


def padding_id(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Example]) -> int:
    """An id that occurs in no row: the padding token's, or the first behind the tokenizer's last.

    transformers reads the score at the last token that is not padding. Were that id an ordinary
    word, or the end of text, a response that ends with it would be scored before its end.
    """
    used = {i for pair in pairs for ids in (pair.prompt, *pair.completions) for i in ids}
    pad = tokenizer.pad_token_id
    usable = pad is not None and pad not in {*used, tokenizer.eos_token_id}
    return pad if usable else len(tokenizer)


def name_padding(model: PreTrainedModel, pad: int) -> None:
    """Writes the padding id into the config; where the table has no such row, adds one of zeros."""
    if pad >= model.get_input_embeddings().weight.shape[0]:
        table = model.resize_token_embeddings(pad + 1, mean_resizing=False)
        nn.init.zeros_(table.weight[pad])
    model.config.get_text_config().pad_token_id = pad


def load_reward_model(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The reward model saved in the directory `name`, float32, without dropout.

    Raises: InputError where there is none, where it is a language model, or where its tokenizer is
    not `tokenizer`: the ids that a policy writes would mean other words to it.
    """
    if not os.path.isfile(os.path.join(name, "config.json")):
        raise InputError(f"There is no reward model in {name}; `qlearn reward` makes one.")
    model = load_weights(AutoModelForSequenceClassification, name, "reward model", torch.float32)
    if model.config.num_labels != 1:
        raise InputError(
            f"The directory {name} holds a classifier of {model.config.num_labels} labels, not a "
            "reward model, which has one; `qlearn reward` makes one."
        )
    check_same_tokenizer(tokenizer, load_tokenizer(name), "reward model")
    return no_dropout(model).eval()


def scores_at(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's number at every position of the batch, prompts included: (B, S), float32."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), model.score.weight.float())[..., 0]


def last_scores(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The score of each response: the number at its last token, found from lengths: (B,)."""
    # By lengths: a search for the last token that is not padding loses the end of text where a
    # tokenizer pads with it.
    last = batch.prompt_lengths + batch.completion_lengths - 1
    return scores_at(model, batch).gather(1, last[:, None])[:, 0]


def scores(model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 64) -> Tensor:
    """The score of each row (prompt ids, completion ids), without gradients: (len(rows),)."""
    with torch.no_grad():
        parts = [
            last_scores(model, collate(rows[start : start + batch_size], model.device)).cpu()
            for start in range(0, len(rows), batch_size)
        ]
    return torch.cat(parts)


def prefix_scores(
    model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 64
) -> list[Tensor]:
    """The model's number after the prompt and after every completion token, of each row: (T + 1,).

    The last is the score. The differences, `x.diff()` (T,), add up to it from the prompt's number:
    a credit for each token that needs no policy. Only the last number was ever trained.
    """
    found = []
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], model.device)
        with torch.no_grad():
            table = scores_at(model, batch).cpu()
        lengths = zip(batch.prompt_lengths.tolist(), batch.completion_lengths.tolist(), strict=True)
        found += [row[p - 1 : p + c] for row, (p, c) in zip(table, lengths, strict=True)]
    return found


def train(
    model: PreTrainedModel, pairs: Sequence[Example], config: RewardConfig, path: str | None = None
) -> list[dict]:
    """Trains the reward model in place on (chosen, rejected) pairs; returns the logged metrics."""
    dtype = engine.choose_dtype(config.dtype, model.device)
    n_steps, n_tokens = engine.n_updates(len(pairs), config), 0
    with Log("reward", n_steps, config.logging_steps, path, unit="pairs") as log:
        updates = Updates(model, config, n_steps, log)
        for parts in engine.plan(len(pairs), config):
            rows = [pairs[i].row for part in parts for i in part]
            loss, seen = torch.zeros((), device=model.device), []
            for part in parts:
                some = [pairs[i] for i in part]
                batch = collate(as_pairs(some, 0) + as_pairs(some, 1), model.device)
                with engine.precision(model.device, dtype):
                    chosen, rejected = last_scores(model, batch).chunk(2)
                # The mean is over the pairs of the whole update, however it is split.
                mean = losses.bradley_terry(chosen, rejected).sum() / len(rows)
                mean.backward()
                loss += mean.detach()
                seen.append((chosen.detach(), rejected.detach()))
                n_tokens += int((batch.prompt_lengths + batch.completion_lengths).sum())
            done = updates.step(loss, rows)
            chosen, rejected = (torch.cat(x) for x in zip(*seen, strict=True))
            log.update(done and done | pair_metrics(chosen, rejected), len(rows),
                       num_tokens=n_tokens)  # fmt: skip
    return log.history


def pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """TRL's names for the scores of a batch of pairs. A tie is not a win."""
    both = torch.cat([chosen, rejected])
    return {
        "accuracy": (chosen > rejected).float().mean().item(),
        "margin": (chosen - rejected).mean().item(),
        "mean_reward": both.mean().item(),
        "min_reward": both.min().item(),
        "max_reward": both.max().item(),
    }


def evaluate(model: PreTrainedModel, pairs: Sequence[Example], batch_size: int = 64) -> dict:
    """Loss, TRL's metrics, the accuracy's 95 % Wilson interval and the share of ties, held out."""
    chosen, rejected = (scores(model, as_pairs(pairs, which), batch_size) for which in (0, 1))
    metrics = pair_metrics(chosen, rejected)
    result = {f"eval_{key}": value for key, value in metrics.items()}
    return result | {
        "eval_loss": losses.bradley_terry(chosen, rejected).mean().item(),
        "eval_accuracy_95": engine.wilson(int((chosen > rejected).sum()), len(pairs)),
        "eval_ties": (chosen == rejected).float().mean().item(),
        "eval_pairs": len(pairs),
    }


def run(config: RewardConfig) -> dict:
    """`qlearn reward`: reads, trains, evaluates before and after, saves; returns the summary."""
    device = engine.choose_device(config.device)
    engine.open_output(config)
    tokenizer = load_tokenizer(config.tokenizer or default_tokenizer(config.model, config.data))
    body = load_model(config.model, tokenizer, config.seed).to(device)
    pairs, held_out = engine.load_examples(
        config, PREFERENCE_COLUMNS, tokenizer, engine.context_length(body, config),
        draw=lambda world: draw_pairs(
            world, body, tokenizer, config.world_rows, f"reward {config.seed}"
        ),
    )  # fmt: skip
    if config.tokenizer:
        note_if_surprised(body, as_pairs(held_out), config.model)
    model = with_head(body, tokenizer, [*pairs, *held_out])
    before = evaluate(model, held_out, config.per_device_train_batch_size)
    print(f"before: {_sentence(before)}")
    history = train(model, pairs, config, f"{config.output_dir}/metrics.jsonl")
    after = evaluate(model, held_out, config.per_device_train_batch_size)
    print(f"after:  {_sentence(after)}")
    summary = {"before": before, "after": after, "first_logged": history[0]}
    engine.save(model, tokenizer, config.output_dir, summary)
    return summary


def _sentence(metrics: dict) -> str:
    same = metrics["eval_min_reward"] == metrics["eval_max_reward"]
    compared = engine.compared(
        "accuracy", metrics["eval_accuracy"], metrics["eval_accuracy_95"], metrics["eval_margin"],
        metrics["eval_ties"], metrics["eval_pairs"], "every score is the same" if same else "",
    )  # fmt: skip
    return f"loss {metrics['eval_loss']:.4f} (ln 2 = 0.6931), {compared}"
