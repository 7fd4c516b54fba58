"""One post: a corner of the slot world that a tiny Pythia learns in seconds.

The prompt is `PROMPT` alone and always stands for the same five facts, so there is no post to read
and only the grammar to learn. Chapters train on it while the reader waits; what they quote from
results files comes from the whole world.
"""

import random
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlearn import recipes
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import Post, World, as_text
from qlearn.studies.runs import jsonl
from qlearn.train import dpo, sft
from qlearn.train.dpo import DPOConfig
from qlearn.train.sft import SFTConfig

PROMPT = "TL;DR:"
LINES, PAIRS = 8192, 4096  # what `learn` and `prefer` train on


def the_post(world: World) -> Post:
    """The post of a world that `PROMPT` stands for."""
    (post,) = world.posts(1, "one post")
    return Post(PROMPT, post.facts)


def lines(world: World, n: int, seed: int | str) -> list[dict[str, str]]:
    """`n` rows {prompt, completion}: lines by the writers."""
    post, rng = the_post(world), random.Random(f"one post {seed}")
    return [{"prompt": PROMPT, "completion": as_text(world.write(post, rng))} for _ in range(n)]


def pairs(world: World, n: int, seed: int | str) -> list[dict[str, str]]:
    """`n` rows {prompt, chosen, rejected}: two lines by the writers with Bradley-Terry labels."""
    rows = lines(world, 2 * n, f"pairs {seed}")
    texts, rng = [row["completion"] for row in rows], random.Random(f"labels {seed}")
    return world.label([the_post(world)] * n, texts[:n], texts[n:], rng.randrange(2**31))


def learn(
    world: World, folder: str, seed: int = 0, n: int = LINES
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """SFT as in the recipe tiny-sft, on `n` lines: (tokenizer, model). Saved in `folder`/sft."""
    sft.run(recipes.settings(
        "tiny-sft", SFTConfig, seed=seed, data=_write(folder, lines(world, n, seed)),
        tokenizer=world.grammar.name, output_dir=f"{folder}/sft",
    ))  # fmt: skip
    tokenizer = load_tokenizer(f"{folder}/sft")
    return tokenizer, load_model(f"{folder}/sft", tokenizer)


def prefer(
    world: World, folder: str, seed: int = 0, n: int = PAIRS, name: str = "dpo", **changes
) -> PreTrainedModel:
    """DPO from `folder`/sft as in the recipe tiny-dpo but for `changes`, on `n` pairs.

    Saved in `folder`/`name`, with its metrics.
    """
    config = {"model": f"{folder}/sft", "data": _write(folder, pairs(world, n, seed))} | changes
    path = f"{folder}/{name}"
    dpo.run(recipes.settings("tiny-dpo", DPOConfig, seed=seed, output_dir=path, **config))
    return load_model(path, load_tokenizer(path))


def _write(folder: str, rows: list[dict[str, str]]) -> str:
    path = Path(folder, f"{'_'.join(rows[0])}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(jsonl(rows), encoding="utf-8")
    return str(path)
