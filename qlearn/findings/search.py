"""`qlearn search`: responses of your own model to your own prompts, by any decoder, as JSONL.

Where no model guides a search, `exact_forecast` tells the truth of an embedded world (Eq. 12).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlearn.errors import InputError
from qlearn.findings.objective import objective_of
from qlearn.findings.proxy import tilted
from qlearn.lm.cursor import Policy, parts, response_logps
from qlearn.lm.data import fault_of
from qlearn.lm.decode import SETTINGS, Decoding, decode
from qlearn.lm.encoding import encode_prompts
from qlearn.lm.logprobs import Row
from qlearn.lm.models import explain_table_sizes, load_model
from qlearn.lm.rows import read_rows
from qlearn.lm.search import Forecast, implied_forecast
from qlearn.lm.tokenizers import load_tokenizer, own_tokenizer
from qlearn.lm.worlds import UNREADABLE, WORLDS, Post, World
from qlearn.options import (
    BETAS,
    LARGEST_SEED,
    check_output,
    check_ranges,
    option,
    required,
    write_text,
)
from qlearn.train.engine import choose_device

WORLD_BETA = 0.1  # where an embedded world's truth guides and no β is given


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Decoding):
    """Settings of `qlearn search`: those of `Decoding`, and these."""

    policy: str = required("the model that writes: a directory or hub id")
    data: str = required(
        "a .jsonl or .parquet file (or hub id) with a prompt column, or an embedded world "
        f"({', '.join(WORLDS)})"
    )
    output: str = option("answers.jsonl", "where the responses go; an older file is replaced")
    max_prompts: int = option(16, "how many prompts are answered", at_least=1)
    seed: int = option(
        0, "of sampling, and of an embedded world's posts", at_least=0, below=LARGEST_SEED
    )
    beta: float | None = option(
        None,
        "guided, mcts: the price of a nat of distance from the policy; default: the guide's own, "
        f"as its qlearn.yaml or training_args.bin says, and {WORLD_BETA} for a world's truth",
        **BETAS,
    )
    reference: str | None = option(None, "adds log_ratio, log π/π_ref of this model, to each line")
    guide: str | None = option(
        None,
        "guided, mcts: a preference-trained model whose logits tell reward and value, the policy "
        "being its reference; default in an embedded world: the exact truth",
    )
    tuned: str | None = option(None, "proxy tuning: a small tuned model; needs untuned")
    untuned: str | None = option(None, "proxy tuning: the model that it was tuned from")
    alpha: float = option(
        1.0, "proxy tuning: the exponent of tuned over untuned", above=-1e6, below=1e6
    )
    tokenizer: str | None = option(None, "default: the policy's own")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute")

    def __post_init__(self):
        check_ranges(self)
        super().__post_init__()
        check_output("--output", self.output, self.data)
        if (self.tuned is None) != (self.untuned is None):
            raise InputError("Pass both --tuned and --untuned, or neither.")


def run(config: SearchConfig) -> None:
    """Writes one JSON object a prompt, with their means on the screen.

    Keys: prompt, text, length (tokens), ended, score (see `Decoded`), logp (Σ log π in nats);
    log_ratio with a reference; reward in an embedded world.
    """
    if config.beta is None:
        config = replace(config, beta=beta_of(config))
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
        reference = _load(config.reference, config, tokenizer, "reference", like=policy)
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


def beta_of(config: SearchConfig) -> float | None:
    """β where the user gave none: the guide's, as its own file records it, or a world's.

    None for a decoder that reads no β. Raises: InputError for a guide that does not tell its β, or
    whose loss makes its log-ratios no soft advantage.
    """
    if "beta" not in SETTINGS[config.decoder]:
        return None
    if config.guide is None:
        return WORLD_BETA
    objective = objective_of(config.guide)
    if not objective.is_advantage:
        raise InputError(
            f"How far the guide's log-ratios are to be trusted depends on its beta and its loss: "
            f"{objective.problem}; pass --beta to search with beta log π/π_ref as the reward."
        )
    return objective.beta


def load_prompts(config: SearchConfig) -> tuple[list[str], list[Post]]:
    """The prompts, and their posts where they are an embedded world's."""
    if config.data in WORLDS:
        posts = World(config.data).posts(config.max_prompts, f"search {config.seed}")
        return [post.prompt for post in posts], posts
    rows = read_rows(config.data, ("prompt",))[: config.max_prompts]
    for number, row in rows:
        reason = fault_of(row, ("prompt",))
        if reason is None and isinstance(row["prompt"], list):
            reason = "prompt is a list of messages, and search continues texts only"
        if reason:
            raise InputError(
                f"{config.data}, row {number}: {reason}; mend the row or leave it out."
            )
    return [row["prompt"] for _, row in rows], []


def load_policy(config: SearchConfig, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """The model that writes, tilted by a small pair where one is given."""
    policy = _load(config.policy, config, tokenizer, "policy")
    if config.tuned is None:
        return policy
    tuned = _load(config.tuned, config, tokenizer, "tuned model", like=policy)
    same, untuned = config.untuned == config.policy, policy
    if not same:
        untuned = _load(config.untuned, config, tokenizer, "untuned model", like=policy)
    return tilted(policy, tuned, untuned, config.alpha)


def load_forecast(
    config: SearchConfig, policy: Policy, posts: list[Post], tokenizer: PreTrainedTokenizerBase
) -> Forecast | None:
    """What guided search and tree search believe, or None for decoders that believe nothing."""
    if config.decoder not in ("guided", "mcts"):
        if config.guide:
            raise InputError(f"The decoder {config.decoder} does not read --guide; leave it out.")
        return None
    if config.guide:
        if config.tuned:
            raise InputError("A guide needs one model as its reference; leave out --tuned.")
        guide = _load(config.guide, config, tokenizer, "guide", like=policy)
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
        for ids, post in zip(
            encode_prompts(tokenizer, [p.prompt for p in posts]), posts, strict=True
        )
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
    rows = zip(*columns.values(), strict=True)
    lines = [json.dumps(dict(zip(columns, values, strict=True))) for values in rows]
    write_text("--output", path, "".join(f"{line}\n" for line in lines))


def _load(name: str, config: SearchConfig, tokenizer, role: str, like: Policy | None = None):
    """The model called `name`; one beside the policy `like` must have the policy's tokenizer."""
    if like is not None:
        own_tokenizer(name, tokenizer, role, given=bool(config.tokenizer))
    model = load_model(name, tokenizer).to(choose_device(config.device))
    if like is not None:
        explain_table_sizes(parts(like)[0][0], model, role)
    return model
