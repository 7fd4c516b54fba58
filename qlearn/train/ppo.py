"""Reinforcement learning from a reward: token-level PPO, and the bandit beside it, RLOO.

Both raise J = E_π[ R − β log π/π_ref ] (Eqs 2 and 3) on the policy's own responses. They differ in
what an action is:

  ppo    A token. Each pays −β log π/π_ref where it is written, and the last is paid the score. A
         value head and GAE turn these into an advantage a token.
  rloo   A response. Its return R − β Σ log π/π_ref, less the mean of the other responses to the
         same prompt, weighs the gradient of its log π: REINFORCE, without a value head.

Both clip the ratio π/π_old of their actions, so that responses can be learned from more than once.
Equations of the book: `eq-objective`, `eq-ppo`.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlearn import losses
from qlearn.errors import InputError
from qlearn.lm.data import Example, as_pairs
from qlearn.lm.logprobs import (
    Batch,
    as_table,
    collate,
    completion_logps,
    completion_states,
    logps_of_states,
)
from qlearn.lm.models import check_same_vocabulary, load_model
from qlearn.lm.tokenizers import default_tokenizer, load_tokenizer
from qlearn.lm.worlds import WORLDS, World
from qlearn.train import engine
from qlearn.train.engine import TrainingConfig, Updates, option
from qlearn.train.reward import load_reward_model
from qlearn.train.rollout import (
    Rollout,
    Task,
    evaluate,
    model_judge,
    precision,
    respond,
    shares,
    stack,
    world_judge,
)
from qlearn.train.steps import (
    check_step_0,
    learn,
    mini_batches,
    n_updates,
    open_log,
    report,
    surrogate,
)

PROMPT_COLUMNS = ("prompt",)


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainingConfig):
    """Settings of `qlearn ppo`.

    A step takes per_device_train_batch_size × gradient_accumulation_steps prompts, draws
    num_generations responses to each, and goes num_ppo_epochs times through them with
    num_mini_batches updates each time. Warm-up and schedule count updates.
    """

    algorithm: Literal["ppo", "rloo"] = option(
        "ppo", "an action is a token (ppo), a response (rloo)"
    )
    reward: str = option(
        "world", "the score: world (an embedded world's true reward) or a folder of qlearn reward"
    )
    reference: str | None = option(None, "the frozen reference; default: the model before training")
    beta: float = option(0.1, "the weight of the KL penalty, in units of reward")
    max_new_tokens: int = option(64, "a response that has not ended by then is cut")
    missing_eos_penalty: float = option(1.0, "what a cut response loses of its score")
    num_generations: int = option(4, "responses drawn to each prompt")
    num_ppo_epochs: int = option(1, "passes over the responses of a step")
    num_mini_batches: int = option(4, "updates in a pass")
    cliprange: float = option(0.2, "how far π/π_old may move from 1 before it is left alone")
    lam: float = option(0.95, "ppo: GAE's λ; γ is 1")
    whiten_advantages: bool = option(True, "ppo: give advantages mean 0 and variance 1")
    vf_coef: float = option(0.1, "ppo: the weight of the value loss")
    cliprange_value: float = option(0.2, "ppo: how far a value may move from its old one")

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta", "cliprange", "cliprange_value"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be positive and finite, not {value}.")
        for name in ("max_new_tokens", "num_generations", "num_ppo_epochs", "num_mini_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("missing_eos_penalty", "vf_coef"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be finite and not negative, not {value}.")
        if not 0 <= self.lam <= 1:
            raise InputError(f"lam must lie in [0, 1], not {self.lam}.")
        if self.algorithm == "rloo" and self.num_generations < 2:
            raise InputError("rloo compares responses to one prompt; set num_generations to 2 up.")
        if self.reward == "world" and self.data not in WORLDS:
            raise InputError(
                f"The true reward is known in the embedded worlds only ({', '.join(WORLDS)}), not "
                f"for {self.data}; pass --reward with a folder that qlearn reward has written."
            )
        if self.reward == "world" and self.eval_data:
            raise InputError(
                "With --reward world the held-out posts are drawn; leave out --eval-data."
            )


# --- the two loops -----------------------------------------------------------------------------


def train_ppo(task: Task, prompts: Sequence[Example], path: str | None = None) -> list[dict]:
    """Token-level PPO: trains task.policy in place; returns the logged metrics.

    Raises: RunStopped as `check_step_0`, or after three updates that are not finite.
    """
    config, head = task.config, value_head(task.policy)
    generator = torch.Generator().manual_seed(config.seed)
    with open_log(config, len(prompts), path) as log:
        updates = Updates(nn.ModuleList([task.policy, head]), config, n_updates(log, config), log)
        for parts in engine.plan(len(prompts), config):
            seen = respond(task, [prompts[i] for part in parts for i in part], generator)
            value = values(task, head, seen)
            advantage, target = losses.gae(
                seen.rewards(config.beta), value, seen.mask, gamma=1.0, lam=config.lam
            )
            if config.whiten_advantages:
                advantage = losses.whiten(advantage, seen.mask)
            terms = partial(token_terms, task, head, seen, value, advantage, target)
            if log.step == 0:
                check_step_0(task, seen, terms)
            done = [
                learn(task, updates, seen, seen.mask, ids, terms)
                for ids in mini_batches(len(seen.examples), config, generator)
            ]
            report(log, done, seen, config)
    return log.history


def train_rloo(task: Task, prompts: Sequence[Example], path: str | None = None) -> list[dict]:
    """REINFORCE on whole responses with a leave-one-out baseline; otherwise as `train_ppo`."""
    config = task.config
    generator = torch.Generator().manual_seed(config.seed)
    with open_log(config, len(prompts), path) as log:
        updates = Updates(task.policy, config, n_updates(log, config), log)
        for parts in engine.plan(len(prompts), config):
            seen = respond(task, [prompts[i] for part in parts for i in part], generator)
            returns = seen.returns(config.beta).view(-1, config.num_generations)
            advantage = losses.leave_one_out(returns).view(-1, 1)
            terms = partial(response_terms, task, seen, advantage)
            if log.step == 0:
                check_step_0(task, seen, terms)
            done = [
                learn(task, updates, seen, torch.ones_like(advantage), ids, terms)
                for ids in mini_batches(len(seen.examples), config, generator)
            ]
            report(log, done, seen, config)
    return log.history


# --- their pieces ------------------------------------------------------------------------------


def value_head(policy: PreTrainedModel) -> nn.Linear:
    """One number a state, read from the policy's own body; 0 at the start."""
    head = nn.Linear(policy.get_output_embeddings().weight.shape[1], 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head.to(policy.device)


def read(policy: PreTrainedModel, head: nn.Linear, batch: Batch) -> tuple[Tensor, Tensor]:
    """log π of every response token and V of the state it is chosen in, from one pass: (B, T)."""
    states = completion_states(policy, batch)
    logp, mask = logps_of_states(policy, batch, states)
    with torch.autocast(states.device.type, enabled=False):
        return logp, as_table(head(states.float())[:, 0], mask.bool())


def values(task: Task, head: nn.Linear, seen: Rollout) -> Tensor:
    """V of every state in which a token of the responses was chosen, without gradients: (B, T)."""
    found = []
    with torch.no_grad(), precision(task):
        for part in shares(as_pairs(seen.examples), task.config.per_device_train_batch_size):
            found.append(read(task.policy, head, collate(part, task.policy.device))[1])
    return stack(found)


def token_terms(
    task: Task, head: nn.Linear, seen: Rollout, value: Tensor, advantage: Tensor, target: Tensor,
    batch: Batch, ids: list[int],
) -> dict[str, Tensor]:  # fmt: skip
    """PPO's loss and metrics of every token of the responses `ids`, which `batch` holds: (b, t)."""
    config = task.config
    logp, new_value = read(task.policy, head, batch)
    old_logp, value, advantage, target = (
        x[ids, : logp.shape[1]] for x in (seen.logp, value, advantage, target)
    )
    terms = surrogate(logp, old_logp, advantage, config.cliprange)
    value_loss = losses.value_clip(new_value, value, target, config.cliprange_value)
    return terms | {
        "loss": terms["loss/policy_avg"] + config.vf_coef * value_loss,
        "loss/value_avg": value_loss,
        "val/clipfrac_avg": (value_loss > (new_value - target) ** 2 / 2).float(),
    }


def response_terms(
    task: Task, seen: Rollout, advantage: Tensor, batch: Batch, ids: list[int]
) -> dict[str, Tensor]:
    """RLOO's loss and metrics of the responses `ids`, each of them one action: (b, 1)."""
    logp = completion_logps(task.policy, batch)[0].sum(dim=1, keepdim=True)
    old_logp = seen.logp[ids].sum(dim=1, keepdim=True)
    terms = surrogate(logp, old_logp, advantage[ids], task.config.cliprange)
    return terms | {"loss": terms["loss/policy_avg"]}


# --- the command -------------------------------------------------------------------------------


def run(config: PPOConfig) -> dict:
    """`qlearn ppo`: reads, trains, evaluates before and after, saves; returns the summary."""
    device = engine.choose_device(config.device)
    engine.open_output(config)
    tokenizer = load_tokenizer(config.tokenizer or default_tokenizer(config.model, config.data))
    policy = load_model(config.model, tokenizer, config.seed).to(device)
    if config.reference:
        reference = load_model(config.reference, tokenizer, config.seed).to(device)
        check_same_vocabulary(policy, reference)
    else:
        reference = copy.deepcopy(policy)
    judge, prompts, held_out = load_problem(config, tokenizer, device, room(policy, config))
    task = Task(policy, reference, tokenizer, judge, config)
    before = evaluate(task, held_out)
    print(f"before: {_sentence(before)}")
    train = {"ppo": train_ppo, "rloo": train_rloo}[config.algorithm]
    started = time.process_time()
    history = train(task, prompts, f"{config.output_dir}/metrics.jsonl")
    seconds = time.process_time() - started
    after = evaluate(task, held_out)
    print(f"after:  {_sentence(after)}")
    summary = {"before": before, "after": after, "first_logged": history[0]}
    summary["cpu_seconds"] = seconds  # of all threads together
    engine.save(policy, tokenizer, config.output_dir, summary)
    return summary


def load_problem(config: PPOConfig, tokenizer, device, max_length: int):
    """(judge, training prompts, held-out prompts)."""
    posts = []
    if config.data in WORLDS:
        posts = World(config.data).posts(config.world_rows, f"ppo {config.seed}")
    prompts, held_out = engine.load_examples(
        config, PROMPT_COLUMNS, tokenizer, max_length,
        draw=lambda world: [{"prompt": post.prompt} for post in posts],
    )  # fmt: skip
    if config.reward == "world":
        judge = world_judge(World(config.data), posts, tokenizer)
    else:
        model = load_reward_model(config.reward, tokenizer).to(device)
        judge = model_judge(model, config.per_device_train_batch_size)
    return judge, prompts, held_out


def room(policy: PreTrainedModel, config: PPOConfig) -> int:
    """The length that a row of data may have so that its response still fits in the context."""
    length = engine.context_length(policy, config) - config.max_new_tokens
    if length < 1:
        raise InputError(
            f"max_new_tokens is {config.max_new_tokens}, which leaves no room for a prompt in "
            f"{engine.context_length(policy, config)} tokens; lower it."
        )
    return length + 1  # a prompt must be shorter than this


def _sentence(metrics: dict) -> str:
    low, high = metrics["eval_objective/rlhf_reward_95"]
    return (
        f"J {metrics['eval_objective/rlhf_reward']:.3f} [{low:.3f}, {high:.3f}] = score "
        f"{metrics['eval_objective/scores']:.3f} - beta x KL {metrics['eval_objective/kl']:.3f} on "
        f"{metrics['eval_rows']} held-out prompts"
    )
