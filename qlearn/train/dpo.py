"""Direct preference optimisation: the policy becomes the soft Q-function of the preferences.

Each pair is one logistic regression on the difference of implied returns,
−log σ(β Σ_t log π/π_ref (chosen) − β Σ_t log π/π_ref (rejected)): Eqs 4 and 9 of the paper,
`eq-dpo-loss` in the book. The reference is frozen, so its two sums a pair are computed once.
"""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlearn import losses
from qlearn.errors import InputError, RunStopped
from qlearn.lm.data import PREFERENCE_COLUMNS, Example, as_pairs
from qlearn.lm.logprobs import collate, completion_logps, sum_logps
from qlearn.lm.models import explain_table_sizes, load_model, note_if_surprised
from qlearn.lm.tokenizers import default_tokenizer, load_tokenizer, own_tokenizer
from qlearn.lm.worlds import draw_pairs
from qlearn.train import engine
from qlearn.train.engine import Log, TrainingConfig, Updates, option
from qlearn.train.step_0 import explained_by_rounding, same_weights


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainingConfig):
    """Settings of `qlearn dpo`."""

    beta: float = option(0.1, "the weight of the KL penalty, in units of reward")
    reference: str | None = option(None, "the frozen reference; default: the model before training")
    shuffle_labels: bool = option(
        False, "a control: swap chosen and rejected by a fair coin, so nothing true can be learned"
    )
    learning_rate: float = option(1e-6, "AdamW's learning rate after warm-up")

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise InputError(f"beta must be positive and finite, not {self.beta}.")


def reference_sums(reference: PreTrainedModel, pairs: Sequence[Example], config) -> Tensor:
    """log π_ref of both completions of each pair: (len(pairs), 2), chosen first, on the CPU."""
    dtype = engine.choose_dtype(config.dtype, reference.device)
    with engine.precision(reference.device, dtype):
        size = 2 * config.per_device_train_batch_size
        return torch.stack([sum_logps(reference, as_pairs(pairs, k), size) for k in (0, 1)], dim=1)


def pair_loss(
    model: PreTrainedModel, pairs: Sequence[Example], ref_sums: Tensor, beta: float
) -> tuple[losses.DPO, Tensor, Tensor]:
    """The DPO loss of each pair, and log π of chosen and rejected, each (B,)."""
    batch = collate(as_pairs(pairs, 0) + as_pairs(pairs, 1), model.device)
    chosen, rejected = completion_logps(model, batch)[0].sum(dim=1).chunk(2)
    ref_chosen, ref_rejected = ref_sums.to(model.device).unbind(dim=1)
    return losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta), chosen, rejected


def train(
    model: PreTrainedModel,
    pairs: Sequence[Example],
    ref_sums: Tensor,
    config: DPOConfig,
    path: str | None = None,
    starts_at_reference: bool = False,
) -> list[dict]:
    """Trains `model` in place on pairs whose reference sums are known; returns the logged metrics.

    Raises: RunStopped where the model is said to start at the reference and the first loss is not
    ln 2 (dropout, another dtype, stale reference sums), or after three steps that are not finite.
    """
    dtype = engine.choose_dtype(config.dtype, model.device)
    n_steps, n_tokens = engine.n_updates(len(pairs), config), 0
    with Log("dpo", n_steps, config.logging_steps, path, unit="pairs") as log:
        updates = Updates(model, config, n_steps, log)
        for parts in engine.plan(len(pairs), config):
            rows = [pairs[i].row for part in parts for i in part]
            loss, seen = torch.zeros((), device=model.device), []
            for part in parts:
                with engine.precision(model.device, dtype):
                    batch = [pairs[i] for i in part]
                    out, chosen, rejected = pair_loss(model, batch, ref_sums[part], config.beta)
                if starts_at_reference and log.step == 0:
                    n = sum(len(ids) for pair in batch for ids in pair.completions)
                    bound = config.beta * explained_by_rounding(ref_sums[part], n, dtype)
                    check_step_0(out, bound)
                # The mean is over the pairs of the whole update, however it is split.
                mean = out.loss.sum() / len(rows)
                mean.backward()
                loss += mean.detach()
                seen.append((out, chosen.detach(), rejected.detach()))
            done = updates.step(loss, rows)
            n_tokens += sum(_tokens(pairs[i]) for part in parts for i in part)
            log.update(done and done | pair_metrics(seen), len(rows), num_tokens=n_tokens)
    return log.history


def check_step_0(out: losses.DPO, bound: float) -> None:
    """Where policy and reference are the same weights, every reward is 0, and so the loss is ln 2.

    bound: the sum of |reward| over the batch that rounding explains.

    Raises: RunStopped where that sum is larger, or no number.
    """
    total = (out.chosen_reward.abs() + out.rejected_reward.abs()).sum().item()
    if not total <= bound:
        raise RunStopped(
            f"Stopped at step 0: policy and reference are the same weights, yet the loss is "
            f"{out.loss.mean().item():.6f}, not ln 2, and the rewards add up to {total:.2g} where "
            f"rounding explains {bound:.1g}; the two log-probabilities are not computed alike "
            "(dropout, dtype or stale reference sums)."
        )


def pair_metrics(seen: list) -> dict[str, float]:
    """TRL's names for what a batch of pairs shows. A tie is not a win: at step 0 accuracy is 0."""
    outs, chosen, rejected = zip(*seen, strict=True)
    good = torch.cat([out.chosen_reward for out in outs])
    bad = torch.cat([out.rejected_reward for out in outs])
    columns = {
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/margins": good - bad,
        "rewards/accuracies": (good > bad).float(),
        "rewards/ties": (good == bad).float(),
        "logps/chosen": torch.cat(chosen),
        "logps/rejected": torch.cat(rejected),
    }
    # one transfer from the device for all
    means = torch.stack([x.mean() for x in columns.values()]).tolist()
    return dict(zip(columns, means, strict=True))


def evaluate(
    model: PreTrainedModel, pairs: Sequence[Example], ref_sums: Tensor, config: DPOConfig
) -> dict:
    """Loss, TRL's reward metrics and the accuracy's 95 % Wilson interval on held-out pairs."""
    sums = reference_sums(model, pairs, config)
    out = losses.dpo(sums[:, 0], sums[:, 1], ref_sums[:, 0], ref_sums[:, 1], config.beta)
    metrics = pair_metrics([(out, sums[:, 0], sums[:, 1])])
    wins = round(metrics["rewards/accuracies"] * len(pairs))
    result = {f"eval_{key}": value for key, value in metrics.items()}
    return result | {
        "eval_loss": out.loss.mean().item(),
        "eval_rewards/accuracies_95": engine.wilson(wins, len(pairs)),
        "eval_pairs": len(pairs),
    }


def run(config: DPOConfig) -> dict:
    """`qlearn dpo`: reads, trains, evaluates before and after, saves; returns the summary."""
    device = engine.choose_device(config.device)
    engine.open_output(config)
    tokenizer = load_tokenizer(config.tokenizer or default_tokenizer(config.model, config.data))
    model = load_model(config.model, tokenizer, config.seed).to(device)
    if config.reference:
        own = own_tokenizer(config.reference, tokenizer, "reference", bool(config.tokenizer))
        reference = load_model(config.reference, own, config.seed).to(device)
        explain_table_sizes(model, reference, "reference")
    else:
        reference = copy.deepcopy(model)
    max_length = engine.context_length(model, config)
    pairs, held_out = load_pairs(config, reference, tokenizer, max_length)
    if config.tokenizer:
        note_if_surprised(model, as_pairs(held_out), config.model)
    ref_sums = reference_sums(reference, pairs, config)
    ref_held_out = reference_sums(reference, held_out, config)
    before = evaluate(model, held_out, ref_held_out, config)
    print(f"before: {_sentence(before)}")
    history = train(
        model, pairs, ref_sums, config, f"{config.output_dir}/metrics.jsonl",
        starts_at_reference=same_weights(model, reference),
    )  # fmt: skip
    after = evaluate(model, held_out, ref_held_out, config)
    print(f"after:  {_sentence(after)}")
    summary = {"before": before, "after": after, "first_logged": history[0]}
    engine.save(model, tokenizer, config.output_dir, summary)
    return summary


def load_pairs(config: DPOConfig, reference, tokenizer, max_length: int):
    """(training pairs, held-out pairs). In the embedded world the reference writes both lines."""
    seed = f"dpo {config.seed}"
    return engine.load_examples(
        config, PREFERENCE_COLUMNS, tokenizer, max_length,
        draw=lambda world: draw_pairs(world, reference, tokenizer, config.world_rows, seed),
        prepare=lambda rows: shuffled(rows, config.seed) if config.shuffle_labels else rows,
    )  # fmt: skip


def shuffled(rows: Sequence[tuple[int, dict]], seed: int) -> list[tuple[int, dict]]:
    """The same rows with chosen and rejected swapped by a fair coin."""
    rng = random.Random(f"shuffled {seed}")
    swap = {"chosen": "rejected", "rejected": "chosen"}
    swapped = []
    for number, row in rows:
        if rng.random() < 0.5 and isinstance(row, dict):  # the others go into quarantine
            row = {swap.get(key, key): value for key, value in row.items()}
        swapped.append((number, row))
    return swapped


def _tokens(pair: Example) -> int:
    return sum(len(pair.prompt) + len(ids) for ids in pair.completions)


def _sentence(metrics: dict) -> str:
    same = metrics["eval_rewards/chosen"] == metrics["eval_rewards/rejected"] == 0
    compared = engine.compared(
        "reward accuracy", metrics["eval_rewards/accuracies"],
        metrics["eval_rewards/accuracies_95"], metrics["eval_rewards/margins"],
        metrics["eval_rewards/ties"], metrics["eval_pairs"],
        "policy equals reference" if same else "",
    )  # fmt: skip
    return f"loss {metrics['eval_loss']:.4f} (ln 2 = {math.log(2):.4f}), {compared}"
