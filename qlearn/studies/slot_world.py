"""Does DPO's log-ratio recover the exact soft advantage? The measurement of chapter 09 (N2).

In an embedded world the writers' π_ref and the true reward give the exact advantage of every
token, so a trained policy can be compared with the truth, on responses it has never seen.
"""

import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import fmean

from scipy.stats import sem, t

from qlearn import recipes
from qlearn.exact.soft import expected_return
from qlearn.findings.credit import Credit, agreement, token_credit
from qlearn.findings.likelihood import log_ratio_and_kl
from qlearn.lm.data import SFT_COLUMNS, as_pairs, encode
from qlearn.lm.decode import sample
from qlearn.lm.logprobs import Row
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import Post, SlotWorld, World, as_text, as_words
from qlearn.studies import runs
from qlearn.train.dpo import DPOConfig


def held_out(
    world: World, tokenizer, beta: float, n: int, seed: int
) -> tuple[list[Post], list[Row], list[list[dict]]]:
    """`n` posts of no training run, a summary of each by the writers, and its exact truth."""
    posts, rng = world.posts(n, f"held out {seed}"), random.Random(f"held out {seed}")
    lines = [world.write(post, rng) for post in posts]
    rows = [
        (i, {"prompt": post.prompt, "completion": as_text(words)})
        for i, (post, words) in enumerate(zip(posts, lines, strict=True), start=1)
    ]
    examples, _ = encode(rows, SFT_COLUMNS, tokenizer, max_length=sys.maxsize)
    truths = [world.explain(post, words, beta) for post, words in zip(posts, lines, strict=True)]
    return posts, as_pairs(examples), truths


def measure(world: World, policy, reference, tokenizer, beta: float, n: int, seed: int) -> dict:
    """`agreement` on held-out responses, by kind of token, and KL(writers ‖ reference) in nats."""
    _, rows, truths = held_out(world, tokenizer, beta, n, seed)
    credits = token_credit(policy, reference, rows, beta)
    gaps = [
        sum(token["logp_ref"] for token in truth) - credit.ref_logp.sum().item()
        for truth, credit in zip(truths, credits, strict=True)
    ]
    return agreement(credits, truths) | {
        "kl_writers_to_reference": sum(gaps) / len(gaps),
        "by_kind": by_kind(credits, truths),
    }


def by_kind(credits: list[Credit], truths: list[list[dict]]) -> dict[str, dict[str, float]]:
    """Mean advantage of each kind of token, as found and as it truly is."""
    found = defaultdict(list)
    for credit, truth in zip(credits, truths, strict=True):
        for advantage, token in zip(credit.advantage.tolist(), truth, strict=True):
            found[token["kind"]].append((advantage, token["advantage"]))
    return {
        kind: {"found": fmean(f for f, _ in x), "exact": fmean(e for _, e in x), "tokens": len(x)}
        for kind, x in sorted(found.items())
    }


def rewards(world: World, model, tokenizer, n: int, seed: int) -> dict[str, float]:
    """Mean true reward of sampled and of greedy lines on `n` held-out posts, and their garbles."""
    posts = world.posts(n, f"held out {seed}")
    result = {}
    for name, greedy in (("sampled", False), ("greedy", True)):
        lines = sample(
            model, tokenizer, [post.prompt for post in posts],
            max_new_tokens=world.longest + 4, seed=seed, greedy=greedy,
        )  # fmt: skip
        words = [as_words(line) for line in lines]
        both = list(zip(posts, words, strict=True))
        result[name] = fmean(world.reward(post, w) for post, w in both)
        result[f"{name}_unreadable"] = fmean(world.parse(post, w) is None for post, w in both)
    return result


def mean_log_ratio(world: World, policy, reference, tokenizer, n: int, seed: int) -> dict:
    """N1: both estimates of Eq. 16 on `n` lines that the reference itself writes."""
    prompts = [post.prompt for post in world.posts(n, f"own lines {seed}")]
    lines = sample(reference, tokenizer, prompts, max_new_tokens=world.longest + 4, seed=seed)
    rows = [
        (i, {"prompt": p, "completion": line})
        for i, (p, line) in enumerate(zip(prompts, lines, strict=True), 1)
    ]
    examples, _ = encode(rows, SFT_COLUMNS, tokenizer, max_length=sys.maxsize)
    ratio, kl = log_ratio_and_kl(policy, reference, as_pairs(examples))
    error = (ratio - kl).std().item() / len(ratio) ** 0.5
    return {
        "mean_log_ratio": ratio.mean().item(),
        "minus_kl": kl.mean().item(),
        "standard_errors_apart": (ratio - kl).mean().item() / error,
    }


def puzzle(world: SlotWorld) -> tuple[Post, list[str]]:
    """The post and the line that open chapter 09: its salary and its day are false."""
    line = " Excited: novice nurse near Delhi fears a 54k contract, verdict wanted Monday!"
    return world.posts(61, "puzzle")[60], as_words(line)


def puzzle_credit(policy, reference, tokenizer, beta: float) -> dict[str, float]:
    """The credit of the puzzle's two false words, and the lowest of all its other words."""
    post, words = puzzle(SlotWorld())
    row = (1, {"prompt": post.prompt, "completion": as_text(words)})
    (example,), _ = encode([row], SFT_COLUMNS, tokenizer, max_length=sys.maxsize)
    (credit,) = token_credit(policy, reference, as_pairs([example]), beta)
    by_word = dict(zip(words, credit.advantage.tolist(), strict=True))
    false = {word: by_word.pop(word) for word in ("54k", "Monday")}
    return false | {"others_lowest": min(by_word.values())}


def run_seed(seed: int, data: str = "slots", n: int = 1000) -> dict:
    """SFT, DPO and the label-shuffled control at one seed, as the recipes say, and `measure`.

    `data` names the world; the recipes are the same for all.
    """
    world, sft = World(data), runs.sft_run(seed, data)
    tokenizer = load_tokenizer(sft)
    reference = load_model(sft, tokenizer)
    found = {"reference_rewards": rewards(world, reference, tokenizer, n, seed)}
    for name, shuffle in (("dpo", False), ("shuffled", True)):
        folder = runs.dpo_run(seed, sft, data, shuffle_labels=shuffle)
        policy, beta = load_model(folder, tokenizer), runs.settings(folder)["beta"]
        found[name] = dict(runs.summary(folder)["after"])
        found[name] |= measure(world, policy, reference, tokenizer, beta, n, seed)
        found[name] |= mean_log_ratio(world, policy, reference, tokenizer, n, seed)
        found[name]["rewards"] = rewards(world, policy, tokenizer, n, seed)
        if data == "slots":
            found[name]["puzzle"] = puzzle_credit(policy, reference, tokenizer, beta)
    return found


def run(seeds: Sequence[int], data: str = "slots") -> dict:
    """The results file `tiny_dpo`: every seed, and means with 95 % t-intervals over seeds."""
    per_seed = runs.each_seed(partial(run_seed, data=data), seeds)
    world, beta = World(data), recipes.settings("tiny-dpo", DPOConfig, model="", output_dir="").beta
    exact = {
        "beta": beta,
        "value": world.solve(beta).value[0].item(),
        "writers_reward": expected_return(
            world.graph[0], world.log_ref, world.field(lambda edge: edge.reward, 0.0)
        ).item(),
        "optimal_reward": expected_return(
            world.graph[0], world.solve(beta).logp, world.field(lambda edge: edge.reward, 0.0)
        ).item(),
    }
    return {"seeds": list(seeds), "exact": exact, "mean": summarise(per_seed), "per_seed": per_seed}


def summarise(per_seed: list[dict]) -> dict:
    """The same nested keys with {mean, low, high, least, most} over seeds in place of numbers."""
    summary = {}
    for key, first in per_seed[0].items():
        values = [found[key] for found in per_seed]
        if isinstance(first, dict):
            summary[key] = summarise(values)
        elif isinstance(first, int | float):
            low, high = t.interval(0.95, len(values) - 1, fmean(values), max(sem(values), 1e-12))
            summary[key] = {"mean": fmean(values), "low": float(low), "high": float(high),
                            "least": min(values), "most": max(values)}  # fmt: skip
    return summary
