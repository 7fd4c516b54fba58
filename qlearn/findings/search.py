"""`qlearn search`: responses of your own model to your own prompts, by any decoder, as JSONL.

Where no model guides a search, `exact_forecast` tells the truth of an embedded world (Eq. 12).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlearn.errors import InputError
from qlearn.findings.proxy import tilted
from qlearn.lm.cursor import Policy, parts, response_logps
from qlearn.lm.data import read_rows
from qlearn.lm.decode import Decoding, decode
from qlearn.lm.logprobs import Row
from qlearn.lm.models import check_same_vocabulary, load_model
from qlearn.lm.search import Forecast, implied_forecast
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import UNREADABLE, WORLDS, Post, World
from qlearn.options import option, required
from qlearn.train.engine import choose_device


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Decoding):
    """Settings of `qlearn search`: those of `Decoding`, and these."""

    policy: str = required("the model that writes: a directory or hub id")
    data: str = required(
        "a .jsonl or .parquet file (or hub id) with a prompt column, or an embedded world "
        f"({', '.join(WORLDS)})"
    )
    output: str = option("answers.jsonl", "where the responses go; an older file is replaced")
    max_prompts: int = option(16, "how many prompts are answered")
    seed: int = option(0, "of sampling, and of an embedded world's posts")
    reference: str | None = option(None, "adds log_ratio, log π/π_ref of this model, to each line")
    guide: str | None = option(
        None,
        "guided, mcts: a preference-trained model whose logits tell reward and value, the policy "
        "being its reference; default in an embedded world: the exact truth",
    )
    tuned: str | None = option(None, "proxy tuning: a small tuned model; needs untuned")
    untuned: str | None = option(None, "proxy tuning: the model that it was tuned from")
    alpha: float = option(1.0, "proxy tuning: the exponent of tuned over untuned")
    tokenizer: str | None = option(None, "default: the policy's own")
    device: str = option("auto", "where to compute: auto, cpu, cuda or mps")

    def __post_init__(self):
        super().__post_init__()
        if self.max_prompts < 1:
            raise InputError(f"max_prompts must be at least 1, not {self.max_prompts}.")
        if (self.tuned is None) != (self.untuned is None):
            raise InputError("Pass both --tuned and --untuned, or neither.")


def run(config: SearchConfig) -> None:
    """Writes one JSON object a prompt, with their means on the screen.

    Keys: prompt, text, length (tokens), ended, score (see `Decoded`), logp (Σ log π in nats);
    log_ratio with a reference; reward in an embedded world.
    """
    tokenizer = load_tokenizer(config.tokenizer or config.policy)
    policy = load_policy(config, tokenizer)
    prompts, posts = load_prompts(config)
    forecast = load_forecast(config, policy, posts, tokenizer)
    found = decode(policy, tokenizer, prompts, config, seed=config.seed, forecast=forecast)
    rows, n = [(d.prompt, d.tokens) for d in found], len(tokenizer)
    columns = {
        "prompt": prompts,
        "text": [d.text for d in found],
        "length": [len(d.tokens) for d in found],
        "ended": [d.ended for d in found],
        "score": [d.score for d in found],
        "logp": response_logps(policy, rows, n).tolist(),
    }
    if config.reference:
        reference = _load(config.reference, config, tokenizer, like=policy)
        ref_logp = response_logps(reference, rows, n).tolist()
        columns["log_ratio"] = [p - r for p, r in zip(columns["logp"], ref_logp, strict=True)]
    if posts:
        columns["reward"] = [
            World(config.data).reward(post, tokenizer.convert_ids_to_tokens(d.tokens))
            for post, d in zip(posts, found, strict=True)
        ]
    write(config.output, columns)
    means = ((name, fmean(x)) for name, x in columns.items() if name not in ("prompt", "text"))
    print(f"{len(found)} responses by {config.decoder}, means: "
          + ", ".join(f"{name} {mean:.3f}" for name, mean in means))  # fmt: skip
    print(f"written to {config.output}")


def load_prompts(config: SearchConfig) -> tuple[list[str], list[Post]]:
    """The prompts, and their posts where they are an embedded world's."""
    if config.data in WORLDS:
        posts = World(config.data).posts(config.max_prompts, f"search {config.seed}")
        return [post.prompt for post in posts], posts
    rows = read_rows(config.data, ("prompt",))[: config.max_prompts]
    for number, row in rows:
        if not (isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"]):
            raise InputError(f"{config.data}, row {number}: the prompt is missing or not text.")
    return [row["prompt"] for _, row in rows], []


def load_policy(config: SearchConfig, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """The model that writes, tilted by a small pair where one is given."""
    policy = _load(config.policy, config, tokenizer)
    if config.tuned is None:
        return policy
    tuned = _load(config.tuned, config, tokenizer, like=policy)
    same = config.untuned == config.policy
    untuned = policy if same else _load(config.untuned, config, tokenizer, like=policy)
    return tilted(policy, tuned, untuned, config.alpha)


def load_forecast(
    config: SearchConfig, policy: Policy, posts: list[Post], tokenizer: PreTrainedTokenizerBase
) -> Forecast | None:
    """What guided search and tree search believe, or None for decoders that believe nothing."""
    if config.decoder not in ("guided", "mcts"):
        if config.guide:
            raise InputError(f"The decoder {config.decoder} does not read --guide.")
        return None
    if config.guide:
        if config.tuned:
            raise InputError("A guide needs one model as its reference; leave out --tuned.")
        guide = _load(config.guide, config, tokenizer, like=policy)
        return implied_forecast(
            guide, policy, config.beta, tokenizer.eos_token_id, len(tokenizer), config.batch_size
        )
    if not posts:
        raise InputError(f"The decoder {config.decoder} needs --guide outside an embedded world.")
    return exact_forecast(World(config.data), posts, tokenizer, config.beta)


def exact_forecast(
    world: World, posts: Sequence[Post], tokenizer: PreTrainedTokenizerBase, beta: float
) -> Forecast:
    """W of a text in an embedded world: what it has earned, and the writers' exact V* from there.

    A text that the grammar cannot write earns `UNREADABLE` and expects nothing more.
    """
    _, levels = world.graph
    value = world.solve(beta).value
    post_of = {
        tuple(ids): post
        for ids, post in zip(tokenizer([p.prompt for p in posts]).input_ids, posts, strict=True)
    }
    seen: dict[tuple, tuple] = {}  # text: (earned, state); the state is None where it is over

    def read(prompt: tuple, response: tuple) -> tuple:
        if not response:
            return 0.0, world.start
        key = (prompt, response)
        if key not in seen:
            earned, state = read(prompt, response[:-1])
            if state is not None:
                word = tokenizer.convert_ids_to_tokens(response[-1])
                edges = (e for e in world.edges(*state) if e.word.spell(post_of[prompt]) == word)
                edge = next(edges, None)
                earned += UNREADABLE if edge is None else edge.reward
                over = edge is None or edge.node is None
                state = None if over else (edge.node, edge.memory)
            seen[key] = earned, state
        return seen[key]

    def forecast(rows: Sequence[Row]) -> Tensor:
        worth = []
        for prompt, response in rows:
            earned, state = read(tuple(prompt), tuple(response))
            ahead = 0.0 if state is None else value[len(response)][levels[len(response)][state]]
            worth.append(earned + float(ahead))
        return torch.tensor(worth)

    return forecast


def write(path: str, columns: dict[str, list]) -> None:
    """One JSON object a row. Raises InputError where the file cannot be written."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            for values in zip(*columns.values(), strict=True):
                print(json.dumps(dict(zip(columns, values, strict=True))), file=file)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}.") from error


def _load(name: str, config: SearchConfig, tokenizer, like: Policy | None = None):
    model = load_model(name, tokenizer).to(choose_device(config.device))
    if like is not None:
        check_same_vocabulary(parts(like)[0][0], model)
    return model
