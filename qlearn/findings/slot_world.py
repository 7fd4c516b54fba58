"""Does DPO's log-ratio recover the exact soft advantage? The measurement of chapter 09 (N2).

In the slot-summary world the writers' π_ref and the true reward give the exact advantage of every
token, so a trained policy can be compared with the truth, on responses it has never seen.
"""

import random
import sys

from qlearn import recipes
from qlearn.findings.credit import agreement, token_credit
from qlearn.lm.data import SFT_COLUMNS, as_pairs, encode
from qlearn.lm.logprobs import Row
from qlearn.lm.models import load_model, load_tokenizer
from qlearn.lm.worlds import Post, SlotWorld, as_text
from qlearn.train import dpo, sft
from qlearn.train.dpo import DPOConfig
from qlearn.train.sft import SFTConfig


def held_out(
    world: SlotWorld, tokenizer, beta: float, n: int, seed: int
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


def measure(world: SlotWorld, policy, reference, tokenizer, beta: float, n: int, seed: int) -> dict:
    """`agreement` on held-out responses, and KL(writers ‖ reference) a response in nats."""
    _, rows, truths = held_out(world, tokenizer, beta, n, seed)
    credits = token_credit(policy, reference, rows, beta)
    gaps = [
        sum(token["logp_ref"] for token in truth) - credit.ref_logp.sum().item()
        for truth, credit in zip(truths, credits, strict=True)
    ]
    return agreement(credits, truths) | {"kl_writers_to_reference": sum(gaps) / len(gaps)}


def run_seed(seed: int, folder: str, n: int = 1000) -> dict:
    """SFT, DPO and the label-shuffled control at one seed, as the recipes say, and `measure`."""
    world = SlotWorld()
    first = recipes.settings("tiny-sft", SFTConfig, output_dir=f"{folder}/sft", seed=seed)
    trained = {"sft": sft.run(first)}
    tokenizer = load_tokenizer(first.output_dir)
    reference = load_model(first.output_dir, tokenizer)
    for name, shuffle in (("dpo", False), ("shuffled", True)):
        second = recipes.settings(
            "tiny-dpo", DPOConfig, model=first.output_dir, output_dir=f"{folder}/{name}",
            seed=seed, shuffle_labels=shuffle,
        )  # fmt: skip
        summary = dpo.run(second)
        policy = load_model(second.output_dir, tokenizer)
        found = measure(world, policy, reference, tokenizer, second.beta, n, seed)
        trained[name] = {"after": summary["after"], **found}
    return trained
