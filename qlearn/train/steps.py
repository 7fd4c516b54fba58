"""One step of reinforcement learning on a policy's own responses, whatever an action is.

The loops of `qlearn.train.ppo` are made of these: shares of a step, the update, the check before
the first one, the log.
"""

import time
from collections.abc import Callable, Iterator
from statistics import fmean

import torch
from torch import Tensor

from qlearn import losses
from qlearn.errors import RunStopped
from qlearn.lm.data import as_pairs
from qlearn.lm.logprobs import Batch, collate
from qlearn.train import engine
from qlearn.train.engine import Log, TrainingConfig, Updates
from qlearn.train.rollout import Rollout, Task, precision, shares
from qlearn.train.step_0 import explained_by_rounding, same_weights


def open_log(config: TrainingConfig, n_prompts: int, path: str | None) -> Log:
    """One entry a step: responses, and the updates made on them."""
    return Log(
        config.algorithm, engine.n_updates(n_prompts, config), config.logging_steps, path, "rows"
    )


def n_updates(log: Log, config: TrainingConfig) -> int:
    """Updates of the whole run, which the learning rate's schedule counts."""
    return log.n_steps * config.num_ppo_epochs * config.num_mini_batches


def mini_batches(n: int, config: TrainingConfig, generator: torch.Generator) -> Iterator[list[int]]:
    """Which of `n` responses each update uses: all of them in each of num_ppo_epochs passes."""
    for _ in range(config.num_ppo_epochs):
        order = torch.randperm(n, generator=generator)
        yield from (x.tolist() for x in order.tensor_split(config.num_mini_batches) if len(x))


def surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> dict[str, Tensor]:
    """The clipped loss of each action, and what TRL's former PPO trainer logged beside it."""
    loss, ratio = losses.ppo_clip(logp, old_logp, advantage, clip), (logp - old_logp).exp()
    return {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": (logp - old_logp) ** 2 / 2,
        "policy/clipfrac_avg": (loss > -ratio * advantage).float(),
        "val/ratio": ratio,
        "val/ratio_var": (ratio - 1) ** 2,
    }


def learn(
    task: Task, updates: Updates, seen: Rollout, actions: Tensor, ids: list[int],
    terms: Callable[[Batch, list[int]], dict[str, Tensor]],
) -> dict | None:  # fmt: skip
    """One update on the mean loss over the actions of the responses `ids`; what to log of it.

    actions: 1 where the tables of `terms` have an action, (B, T) for tokens, (B, 1) for responses.
    """
    sums, total = {}, actions[ids].sum()
    for part in shares(ids, task.config.per_device_train_batch_size):
        batch = collate(as_pairs([seen.examples[i] for i in part]), task.policy.device)
        with precision(task):
            tables = terms(batch, part)
        # The mean is over the actions of the whole update, however it is split.
        weight = actions[part, : tables["loss"].shape[1]] / total
        means = {key: (x * weight).sum() for key, x in tables.items()}
        means["loss"].backward()
        sums = {key: sums.get(key, 0.0) + x.detach() for key, x in means.items()}
    done = updates.step(sums.pop("loss"), [seen.examples[i].row for i in ids])
    return done and done | {key: x.item() for key, x in sums.items()}


def check_step_0(task: Task, seen: Rollout, terms) -> None:
    """Before the first update π/π_old is 1, and where π_ref has the policy's weights the KL is 0.

    Both are asked of log-ratios of whole responses, up to what rounding explains of their sum.

    Raises: RunStopped where they are not: the log-probabilities are not computed alike.
    """
    device = task.policy.device
    dtype = engine.choose_dtype(task.config.dtype, device)
    # the last responses first: the update's tables are other ones than the rollout's
    ids = list(reversed(range(len(seen.examples))))[: task.config.per_device_train_batch_size]
    with torch.no_grad(), precision(task):
        batch = collate(as_pairs([seen.examples[i] for i in ids]), device)
        log_ratio = terms(batch, ids)["val/ratio"].log().sum(dim=1)  # (b,)
    off = log_ratio.abs().sum().item()
    bound = explained_by_rounding(seen.logp[ids].sum(dim=1), int(seen.mask[ids].sum()), dtype)
    if not off <= bound:
        raise RunStopped(
            f"Stopped at step 0: the policy's log-ratios to itself add up to {off:.2g} over "
            f"{len(ids)} responses where rounding explains {bound:.1g}; its log-probabilities are "
            "not the same twice (dropout or dtype)."
        )
    gap = (seen.logp - seen.ref_logp).sum(dim=1).abs().sum().item()
    bound = explained_by_rounding(seen.logp.sum(dim=1), int(seen.mask.sum()), dtype)
    if not gap <= bound and same_weights(task.policy, task.reference):
        raise RunStopped(
            f"Stopped at step 0: policy and reference are the same weights, yet their log-ratios "
            f"add up to {gap:.2g} over {len(seen.examples)} responses where rounding explains "
            f"{bound:.1g}; the two are not computed alike (dropout or dtype)."
        )


def report(log: Log, done: list[dict | None], seen: Rollout, config: TrainingConfig) -> None:
    """Logs a step: means over its updates (None where all were skipped), and what was earned."""
    made = [metrics for metrics in done if metrics is not None]
    metrics = {key: fmean(x[key] for x in made) for key in made[0]} if made else None
    episode = log.rows + len(seen.examples)
    log.update(
        metrics and metrics | seen.metrics(config.beta) | {"lr": metrics["learning_rate"]},
        len(seen.examples), episode=episode, eps=episode / (time.perf_counter() - log.started),
    )  # fmt: skip
