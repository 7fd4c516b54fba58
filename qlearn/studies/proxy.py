"""A small pair lends its advantages to a larger model of the slot world: chapter 13, measured.

The base has the body of Pythia-14m, nearly ten times the tiny one's parameters, and has learned
from the writers only. Five trainings of it were tried and the fourth is used. The pair is the tiny
SFT model and its DPO policy. The controls are both ends alone; with the tiny SFT model as its own
base (DeRa), policies trained at the other prices.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GPTNeoXForCausalLM

from qlearn import recipes
from qlearn.exact.soft import implicit_reward
from qlearn.findings.proxy import tilted
from qlearn.lm.cursor import Policy, response_logps
from qlearn.lm.decode import Decoding, decode
from qlearn.lm.models import SHAPES, config_of, load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import World
from qlearn.studies import runs
from qlearn.studies.exactness import key
from qlearn.studies.search import judge
from qlearn.studies.slot_world import summarise
from qlearn.train import sft
from qlearn.train.dpo import DPOConfig
from qlearn.train.sft import SFTConfig

# The usual 0.02 starts so small that learning to copy takes twice as long; the tiny shape has 0.1.
BASE = replace(SHAPES["pythia-14m"], vocabulary=None, context=256, init=0.07)
ALPHAS = (0.5, 1.0, 2.0)  # of the pair on the larger base
DERA = {0.25: "dpo_high", 5.0: "dpo_low"}  # α on the tiny base: the policy trained at β/α
N_POSTS = 500


def base_run(seed: int) -> str:
    """The folder of the larger model, taught by the writers: about 100 s of one core."""
    start = Path(runs.FOLDER, f"base-{seed}")
    if not start.exists():
        tokenizer = load_tokenizer("slots")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            GPTNeoXForCausalLM(config_of(BASE, tokenizer)).save_pretrained(start)
        tokenizer.save_pretrained(start)
    return runs.trained(
        sft.run,
        recipes.settings(
            "tiny-sft", SFTConfig, model=str(start), output_dir="", seed=seed, world_rows=12_000,
            learning_rate=0.002, per_device_train_batch_size=16,
        ),
    )  # fmt: skip


def measure(policy: Policy, base: Policy, tokenizer, beta: float, seed: int) -> dict[str, dict]:
    """True reward, share unreadable and length of sampled and of greedy lines on held-out posts.

    Of sampled lines also kl, the mean of log π/π_base (nats), and objective, reward − β kl: J with
    the base as reference.
    """
    world, found = World(), {}
    posts = world.posts(N_POSTS, f"held out {seed}")
    for decoder in ("sample", "greedy"):
        how = Decoding(decoder=decoder, max_new_tokens=world.longest + 4)
        lines = decode(policy, tokenizer, [post.prompt for post in posts], how, seed=seed)
        judged = [judge(world, post, d, tokenizer) for post, d in zip(posts, lines, strict=True)]
        found[decoder] = {
            "reward": sum(reward for reward, _ in judged) / N_POSTS,
            "unreadable": sum(not readable for _, readable in judged) / N_POSTS,
            "length": sum(len(d.tokens) for d in lines) / N_POSTS,
        }
        if decoder == "sample":
            rows = [(d.prompt, d.tokens) for d in lines]
            logp, base_logp = (response_logps(m, rows, len(tokenizer)) for m in (policy, base))
            price = implicit_reward(logp, base_logp, beta).mean().item()
            found[decoder] |= {
                "kl": price / beta,
                "objective": found[decoder]["reward"] - price,
            }
    return found


def run_seed(seed: int) -> dict:
    """`measure` of the base, the pair, the pair on the base at each exponent, and DeRa."""
    beta = recipes.settings("tiny-dpo", DPOConfig, model="", output_dir="").beta
    small = runs.sft_run(seed)
    tokenizer = load_tokenizer(small)
    base, untuned, tuned = (
        load_model(path, tokenizer) for path in (base_run(seed), small, runs.dpo_run(seed, small))
    )
    policies: dict[str, tuple[Policy, Policy]] = {  # and the reference of its J
        "base": (base, base),
        "untuned": (untuned, untuned),
        "tuned": (tuned, untuned),
    }
    for alpha in ALPHAS:
        policies[f"base_alpha_{key(alpha)}"] = tilted(base, tuned, untuned, alpha), base
    for alpha, name in DERA.items():
        policies[f"dera_{key(alpha)}"] = tilted(untuned, tuned, untuned, alpha), untuned
        trained = load_model(runs.dpo_run(seed, small, beta=beta / alpha), tokenizer)
        policies[name] = trained, untuned
    prices = {name: beta / alpha for alpha, x in DERA.items() for name in (x, f"dera_{key(alpha)}")}
    prices |= {f"base_alpha_{key(alpha)}": beta / alpha for alpha in ALPHAS}
    return {
        name: measure(policy, reference, tokenizer, prices.get(name, beta), seed)
        for name, (policy, reference) in policies.items()
    }


def run(seeds: Sequence[int]) -> dict:
    """The results file `tiny_proxy`."""
    per_seed = runs.each_seed(run_seed, seeds)
    return {
        "seeds": list(seeds),
        "posts_per_seed": N_POSTS,
        "value": World().solve(0.5).value[0].item(),
        "mean": summarise(per_seed),
        "per_seed": per_seed,
    }
