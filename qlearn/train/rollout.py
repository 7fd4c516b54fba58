"""A policy's own responses, their log-probabilities and their scores: what RL learns from.

Responses are drawn at temperature 1 from the whole distribution, because J is an expectation over
exactly that. Policy and reference are then read by one code path (`completion_logps`) on one
table, so equal weights give equal numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlearn.lm.cursor import Cursor
from qlearn.lm.data import Example, as_pairs
from qlearn.lm.decode import Decoding, draw
from qlearn.lm.encoding import encode_prompts
from qlearn.lm.grammar import EOS, split_words
from qlearn.lm.logprobs import Row, collate, completion_logps
from qlearn.lm.worlds import Post, World
from qlearn.train import engine
from qlearn.train.engine import TrainingConfig
from qlearn.train.reward import scores

Judge = Callable[[Sequence[Row]], Tensor]  # rows (prompt ids, response ids) to scores (B,)


class Rollout(NamedTuple):
    """Responses with all that stays fixed while a policy learns from them.

    examples: B prompts, each with its one response. logp, ref_logp, mask: (B, T), in nats, of the
    policy that wrote them and of the reference. score, ended: (B,).
    """

    examples: list[Example]
    logp: Tensor
    ref_logp: Tensor
    mask: Tensor
    score: Tensor
    ended: Tensor

    def price(self, beta: float) -> Tensor:
        """What each token pays for leaving the reference: −β log π/π_ref, (B, T)."""
        return -beta * (self.logp - self.ref_logp)

    def rewards(self, beta: float) -> Tensor:
        """The token rewards of Eq. 3: the price at every token, and the score at the last, (B, T).

        The last is found from lengths. It is the end of text, or where a response was cut.
        """
        last = self.mask.sum(dim=1, keepdim=True) - 1
        return self.price(beta).scatter_add(1, last, self.score[:, None])

    def returns(self, beta: float) -> Tensor:
        """R − β Σ log π/π_ref of each response: (B,). Their mean estimates J."""
        return self.score + self.price(beta).sum(dim=1)

    def metrics(self, beta: float) -> dict[str, float]:
        """The names of TRL's former PPO trainer. KL and entropy are estimates from the samples."""
        columns = {
            "objective/kl": (self.logp - self.ref_logp).sum(dim=1),
            "objective/entropy": -self.logp.sum(dim=1),
            "objective/non_score_reward": self.price(beta).sum(dim=1),
            "objective/rlhf_reward": self.returns(beta),
            "objective/scores": self.score,
        }
        means = torch.stack([x.mean() for x in columns.values()]).tolist()
        return dict(zip(columns, means, strict=True)) | {
            "val/num_eos_tokens": int(self.ended.sum()),
            "policy/entropy_avg": -(self.logp.sum() / self.mask.sum()).item(),
        }


def rollout(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    judge: Judge,
    *,
    max_new_tokens: int,
    missing_eos_penalty: float,
    batch_size: int,
    generator: torch.Generator,
) -> Rollout:
    """One response by `policy` to each prompt, scored by `judge`.

    A response that has not ended after max_new_tokens is cut, and its score is lowered by
    missing_eos_penalty. Nothing follows it: its last token is as terminal as an end of text.
    """
    eos = tokenizer.eos_token_id
    how = Decoding(max_new_tokens=max_new_tokens)
    noise = torch.rand(len(prompts), max_new_tokens, generator=generator)
    cursor = Cursor(policy, [example.prompt for example in prompts], len(tokenizer))
    examples = [
        replace(example, completions=(ids,))
        for example, (ids, _) in zip(prompts, draw(cursor, noise, how, eos), strict=True)
    ]
    rows = as_pairs(examples)
    logp, ref_logp, mask = [], [], []
    with torch.no_grad():
        for part in shares(rows, batch_size):
            batch = collate(part, policy.device)
            logp.append(completion_logps(policy, batch)[0])
            ref, ones = completion_logps(reference, batch)
            ref_logp.append(ref)
            mask.append(ones)
    ended = torch.tensor([ids[-1] == eos for _, ids in rows], device=policy.device)
    score = judge(rows).to(policy.device) - missing_eos_penalty * ~ended
    return Rollout(examples, stack(logp), stack(ref_logp), stack(mask), score, ended)


def shares(items: Sequence, size: int) -> Iterator[Sequence]:
    """The items in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def stack(tables: Sequence[Tensor]) -> Tensor:
    """Tables (b, t) of unequal widths one below the other, 0 where a table has no column."""
    width = max(x.shape[1] for x in tables)
    return torch.cat([F.pad(x, (0, width - x.shape[1])) for x in tables])


def world_judge(world: World, posts: Sequence[Post], tokenizer: PreTrainedTokenizerBase) -> Judge:
    """The true reward of an embedded world, for responses to `posts`.

    A line that has not ended is not complete, whatever it says.
    """
    prompts = encode_prompts(tokenizer, [post.prompt for post in posts])
    post_of = {tuple(ids): post for ids, post in zip(prompts, posts, strict=True)}

    def judge(rows: Sequence[Row]) -> Tensor:
        found = []
        for prompt, ids in rows:
            ended = ids[-1] == tokenizer.eos_token_id
            words = split_words(tokenizer.decode(ids[:-1] if ended else ids))
            found.append(world.reward(post_of[tuple(prompt)], words + [EOS] * ended))
        return torch.tensor(found)

    return judge


def model_judge(reward_model: PreTrainedModel, batch_size: int) -> Judge:
    """A reward model's number at each response's last token."""
    return lambda rows: scores(reward_model, rows, batch_size)


class Task(NamedTuple):
    """What a run works on: the policy it changes, what it is compared with, what scores it."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    judge: Judge
    config: TrainingConfig  # a PPOConfig


def precision(task: Task):
    """The context in which the run's models compute."""
    device = task.policy.device
    return engine.precision(device, engine.choose_dtype(task.config.dtype, device))


def respond(task: Task, prompts: Sequence[Example], generator: torch.Generator) -> Rollout:
    """num_generations responses to each prompt; those to one prompt stand together."""
    config = task.config
    with precision(task):
        return rollout(
            task.policy, task.reference, task.tokenizer,
            [prompt for prompt in prompts for _ in range(config.num_generations)], task.judge,
            max_new_tokens=config.max_new_tokens, missing_eos_penalty=config.missing_eos_penalty,
            batch_size=config.per_device_train_batch_size, generator=generator,
        )  # fmt: skip


def evaluate(task: Task, prompts: Sequence[Example], seed: int = 0) -> dict:
    """One fresh response to each prompt: TRL's objective metrics, J with its 95 % interval."""
    task = task._replace(config=replace(task.config, algorithm="ppo", num_generations=1))
    generator = torch.Generator().manual_seed(seed)
    found = [respond(task, part, generator) for part in shares(prompts, 256)]
    returns = torch.cat([seen.returns(task.config.beta) for seen in found])
    n, half = len(returns), 1.96 * returns.std().item() / len(returns) ** 0.5
    means = [(seen.metrics(task.config.beta), len(seen.examples)) for seen in found]
    keys = [key for key in means[0][0] if key.startswith("objective/")]
    result = {f"eval_{key}": sum(m[key] * k for m, k in means) / n for key in keys}
    center = result["eval_objective/rlhf_reward"]
    return result | {
        "eval_objective/rlhf_reward_95": [center - half, center + half],
        "eval_missing_eos": sum(int((~seen.ended).sum()) for seen in found) / n,
        "eval_rows": n,
    }
