"""How near do token PPO and RLOO come to the exact optimum? The measurement of chapter 10.

On the slot world at β = 0.5, with the true reward, both start from the model of tiny-sft, which is
π_ref too, and raise J = E_π[ R − β log π/π_ref ]. J starts at E_ref R and cannot pass
V = β log E_ref exp(R/β). There are two such ceilings:

  writers   V* of the world's writers, exact (`World.solve`)
  model     V of the SFT model, which is not quite the writers: one line in twelve leaves the
            grammar. This is the true ceiling, for the KL is to the model. It is estimated twice:
            from the model's own lines, and from the trained policy's as β log E_π exp(G/β),
            G = R − β log π/π_ref, which varies less because G is constant at the optimum.

The main number, `fraction`, is the share of the distance from J(π_ref) to the *writers'* V* that is
closed, so the SFT model's faults count against it; `fraction_of_model` is that to the model's own.

What was tried, on seed 0 alone, before the five seeds (J of 1.31 would be the writers' V*, 1.25 the
model's): with λ = 0.95, a learning rate of 0.001 and 256 responses a step, 100 to 150 steps of PPO
gave 1.15 to 1.18, whatever the epochs (1, 2), mini-batches (2, 4) and responses a prompt (1, 4);
RLOO with the same settings 1.20. With λ = 1 and a learning rate of 0.002, as in the recipe, PPO
gave 1.20 too, also with eight mini-batches and without whitening.

The five seeds were measured twice. First with 8,192 prompts, 31,000 episodes (`run_first`): one run
of PPO fell back half-way, and the lower bound of `fraction` was 0.83 where 0.90 was sought. Both
recipes were then lengthened by half, which the three minutes allow, and all was measured again. The
reward model's learning rate was raised too: with 0.001 two reward models guessed 0.49 and 0.59 of
held-out votes right, with 0.004 one guessed 0.60, with three passes or four times the pairs 0.62.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from qlearn import recipes
from qlearn.lm.data import encode
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import World
from qlearn.studies import runs
from qlearn.studies.slot_world import summarise
from qlearn.train.ppo import PROMPT_COLUMNS, PPOConfig
from qlearn.train.rollout import Rollout, Task, respond, world_judge

CURVES = {"J": "objective/rlhf_reward", "score": "objective/scores", "kl": "objective/kl"}
RECIPES = {"ppo": "tiny-ppo", "rloo": "tiny-rloo"}
N_POSTS, BATCH = 4096, 256
EXTRA_SEEDS = 2  # of the two side questions, which take as long as the main one
FIRST_ROWS = 8192  # prompts of the first measurement


def responses(policy: str, reference: str, n: int, seed: int) -> list[Rollout]:
    """`n` responses of the policy in a folder, to posts of no training run, with the true score."""
    config = recipes.settings("tiny-ppo", PPOConfig, model=policy, output_dir="", num_generations=1)
    tokenizer, world = load_tokenizer(reference), World(config.data)
    posts = world.posts(n, f"rlhf held out {seed}")
    rows = [(i, {"prompt": post.prompt}) for i, post in enumerate(posts, start=1)]
    prompts, _ = encode(rows, PROMPT_COLUMNS, tokenizer, max_length=10**6)
    task = Task(
        load_model(policy, tokenizer), load_model(reference, tokenizer), tokenizer,
        world_judge(world, posts, tokenizer), config,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return [respond(task, prompts[i : i + BATCH], generator) for i in range(0, n, BATCH)]


def soft_mean(returns: Tensor, beta: float) -> dict[str, float]:
    """β log mean exp(G/β) of sampled returns, with its standard error by the delta method.

    `eq-any-policy` in the book.
    """
    weight = ((returns - returns.max()) / beta).double().exp()
    error = beta * weight.std() / weight.mean() / len(weight) ** 0.5
    value = returns.max() + beta * weight.mean().log()
    return {"value": value.item(), "error": error.item()}


def objective(seen: Sequence[Rollout], beta: float) -> dict:
    """J with its standard error, its two parts, and the ceiling that the returns imply."""
    returns = torch.cat([part.returns(beta) for part in seen])
    return {
        "J": returns.mean().item(),
        "error": returns.std().item() / len(returns) ** 0.5,
        "spread": returns.std().item(),
        "score": torch.cat([part.score for part in seen]).mean().item(),
        "kl": torch.cat([(p.logp - p.ref_logp).sum(1) for p in seen]).mean().item(),
        "missing_eos": torch.cat([~part.ended for part in seen]).float().mean().item(),
        "ceiling": soft_mean(returns, beta),
    }


def run_seed(seed: int, n_posts: int = N_POSTS, **changes) -> dict:
    """π_ref, PPO and RLOO at one seed: J of each, how much of the way it is, and what it cost.

    The recipes are trained as they stand but for `changes`.
    """
    reference, beta = runs.sft_run(seed), settings().beta
    # twice the lines: exp(R/β) varies a lot under the reference
    found = {"reference": objective(responses(reference, reference, 2 * n_posts, seed), beta)}
    start, model = found["reference"]["J"], found["reference"]["ceiling"]["value"]
    best = World().solve(beta).value[0].item()
    for name, recipe in RECIPES.items():
        folder = runs.ppo_run(seed, reference, recipe=recipe, **changes)
        found[name] = objective(responses(folder, reference, n_posts, seed), beta)
        logged = runs.history(folder)
        found[name] |= {
            "fraction": (found[name]["J"] - start) / (best - start),
            "fraction_of_model": (found[name]["J"] - start) / (model - start),
            "episodes": logged[-1]["episode"],
            "episodes_to_80": episodes_to(logged, start + 0.8 * (best - start)),
            "cpu_seconds": runs.summary(folder)["cpu_seconds"],
            "history": logged,
        }
    return found


def episodes_to(logged: Sequence[dict], level: float) -> float:
    """Episodes until the logged J first reaches `level`; infinite where it never does."""
    reached = (line["episode"] for line in logged if line[CURVES["J"]] >= level)
    return float(next(reached, np.inf))


def learned_reward(seed: int, n_posts: int = N_POSTS) -> dict:
    """PPO on a reward model of 5,530 labelled pairs: the *true* J of what it makes."""
    reference, beta = runs.sft_run(seed), settings().beta
    judge = runs.reward_run(seed, reference)
    # the world's own charge for a line without an end is not known to a learned reward
    folder = runs.ppo_run(seed, reference, reward=judge, missing_eos_penalty=1.0)
    after = runs.summary(folder)
    return {
        "accuracy": runs.summary(judge)["after"]["eval_accuracy"],
        "true": objective(responses(folder, reference, n_posts, seed), beta),
        "learned_score_before": after["before"]["eval_objective/scores"],
        "learned_score_after": after["after"]["eval_objective/scores"],
    }


def short_sight(seed: int, n_posts: int = N_POSTS) -> dict:
    """PPO with TRL's λ = 0.95 in place of 1."""
    reference = runs.sft_run(seed)
    folder = runs.ppo_run(seed, reference, lam=0.95)
    return objective(responses(folder, reference, n_posts, seed), settings().beta)


def run(seeds: Sequence[int]) -> dict:
    """The results file `tiny_rlhf`: the race, and two side questions on fewer seeds."""
    some = list(seeds)[:EXTRA_SEEDS]
    return race(seeds) | {
        "learned_reward": dict(
            zip(map(str, some), runs.each_seed(learned_reward, some), strict=True)
        ),
        "lam_95": dict(zip(map(str, some), runs.each_seed(short_sight, some), strict=True)),
    }


def run_first(seeds: Sequence[int]) -> dict:
    """The results file `tiny_rlhf_first`: the race as it was first run, over fewer episodes."""
    return race(seeds, world_rows=FIRST_ROWS)


def race(seeds: Sequence[int], **changes) -> dict:
    """Means with 95 % t-intervals over seeds, and the curves."""
    per_seed = runs.each_seed(partial(run_seed, **changes), seeds)
    histories = {name: [found[name].pop("history") for found in per_seed] for name in RECIPES}
    return {
        "seeds": list(seeds),
        "exact": {"beta": settings().beta, "value": World().solve(settings().beta).value[0].item()},
        "mean": summarise(per_seed),
        "per_seed": per_seed,
        "curves": {name: curve(logged) for name, logged in histories.items()},
    }


def curve(histories: Sequence[list[dict]], most: int = 40) -> dict:
    """Episodes; J, score and KL as mean, least and most over seeds; at `most` points or less."""
    lines = list(zip(*histories, strict=True))
    lines = lines[::-1][:: -(-len(lines) // most)][::-1]  # with the last
    found: dict = {"episode": [line[0]["episode"] for line in lines]}
    for name, key in CURVES.items():
        x = np.array([[one[key] for one in line] for line in lines])
        found[name] = {"mean": x.mean(1).tolist(), "least": x.min(1).tolist(),
                       "most": x.max(1).tolist()}  # fmt: skip
    return found


def settings() -> PPOConfig:
    """The recipe tiny-ppo."""
    return recipes.settings("tiny-ppo", PPOConfig, model="", output_dir="")
