"""What do beams buy? Decoders against each other on the slot world: chapter 12 (F3, N5, N6, N9).

Each model decodes the same held-out posts with every decoder; each line is judged by its true
reward, and against the line of a writer for the same post. SFT with the same beams is the control
for DPO, greedy the control for beams, and length the control for both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlearn.exact.search import best_objective
from qlearn.exact.soft import expected_return, implicit_reward
from qlearn.findings import runs
from qlearn.findings.contrasts import WIDTHS, contrasts, over_optimisation
from qlearn.findings.slot_world import summarise
from qlearn.lm.cursor import Policy, response_logps
from qlearn.lm.decode import Decoded, Decoding, decode
from qlearn.lm.logprobs import Row
from qlearn.lm.models import load_model, load_tokenizer
from qlearn.lm.search import Forecast
from qlearn.lm.worlds import UNREADABLE, Post, World, as_text

DPO_BETAS = {"dpo_low": 0.1, "dpo": 0.5, "dpo_high": 2.0}
DECODERS = {
    "sample": Decoding(),
    "top50": Decoding(top_k=50),  # what `generate` does where nothing is said
    "cold": Decoding(temperature=0.25),
    "greedy": Decoding(decoder="greedy"),
    **{f"beam{n}": Decoding(decoder="beam", beams=n) for n in WIDTHS},
    **{f"beam{n}_mean": Decoding(decoder="beam", beams=n, length_penalty=1.0) for n in WIDTHS},
}  # fmt: skip
# Eq. 12 with the world's exact V in place of a trained policy; the reference writes.
GUIDED = {
    "guided1": Decoding(decoder="guided", beams=1, beta=DPO_BETAS["dpo"]),
    "guided5": Decoding(decoder="guided", beams=5, beta=DPO_BETAS["dpo"]),
}

# (seed, the reference's folder): trains a policy or finds it trained; its folder
Trainer = Callable[[int, str], str]


def dpo_policy(seed: int, reference: str, beta: float) -> str:
    """DPO as in the recipe tiny-dpo, at another β; the pairs are the same for every β."""
    return runs.dpo_run(seed, reference, beta=beta)


# Every policy of the grid beside the reference: how it is trained, and its β.
POLICIES: dict[str, tuple[Trainer, float]] = {
    name: (partial(dpo_policy, beta=beta), beta) for name, beta in DPO_BETAS.items()
}


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


def judge(world: World, post: Post, found: Decoded, tokenizer) -> tuple[float, bool]:
    """(true reward, whether writers could have written it) of a decoded line."""
    words = tokenizer.convert_ids_to_tokens(found.tokens)
    return world.reward(post, words), world.parse(post, words) is not None


def cell(
    world: World, posts: Sequence[Post], rivals: Sequence[float], found: Sequence[Decoded],
    policy: Policy, reference: Policy, tokenizer, beta: float, how: Decoding,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What one decoder gave on each post, (N,) each: rivals are the rewards of the writers' lines.

    reward and win (1, ½, 0) by the true judge; length in tokens; logp = Σ log π and ref_logp in
    nats; implicit = Σ β log π/π_ref; unreadable and unended are 0 or 1. objective is what the line
    adds to J: reward − β log(q/π_ref), where q = π for plain samples and 1 for the one line that a
    decoder without chance always gives.
    """
    rows = [(d.prompt, d.tokens) for d in found]
    logp, ref_logp = (response_logps(m, rows, len(tokenizer)) for m in (policy, reference))
    judged = [judge(world, post, d, tokenizer) for post, d in zip(posts, found, strict=True)]
    reward = np.array([r for r, _ in judged])
    columns = {
        "reward": reward,
        "win": (np.sign(np.round(reward - np.array(rivals), 9)) + 1) / 2,
        "length": np.array([len(d.tokens) for d in found], dtype=float),
        "logp": logp.double().numpy(),
        "ref_logp": ref_logp.double().numpy(),
        "implicit": implicit_reward(logp, ref_logp, beta).double().numpy(),
        "unreadable": np.array([not readable for _, readable in judged], dtype=float),
        "unended": np.array([not d.ended for d in found], dtype=float),
    }
    if how.decoder != "sample":
        columns["objective"] = reward + beta * columns["ref_logp"]
    elif how.temperature == 1 and how.top_k is None:
        columns["objective"] = reward - columns["implicit"]
    return columns


def run_seed(
    seed: int, policies: Mapping[str, tuple[Trainer, float]] = POLICIES, n_posts: int = 256
) -> tuple[dict, list[dict]]:
    """({model: {decoder: `cell`}}, the lines of the first two posts) of the models of one seed."""
    world, folder = World(), runs.sft_run(seed)
    models = {"sft": (folder, DPO_BETAS["dpo"])}
    models |= {name: (trainer(seed, folder), beta) for name, (trainer, beta) in policies.items()}
    tokenizer = load_tokenizer(folder)
    reference = load_model(folder, tokenizer)
    posts, rng = world.posts(n_posts, f"held out {seed}"), Random(f"rivals {seed}")
    lines = [world.write(post, rng) for post in posts]
    rivals = [world.reward(post, line) for post, line in zip(posts, lines, strict=True)]
    forecast = exact_forecast(world, posts, tokenizer, DPO_BETAS["dpo"])
    cells: dict = {name: {} for name in models}
    samples = [
        {"post": posts[i].prompt, "writer": f"{rivals[i]:+.1f} {as_text(lines[i]).strip()}"}
        | {name: {} for name in models}
        for i in range(min(2, n_posts))
    ]
    for name, (path, beta) in models.items():
        policy = load_model(path, tokenizer)
        for decoder, how in (DECODERS | (GUIDED if name == "sft" else {})).items():
            found = decode(
                policy, tokenizer, [post.prompt for post in posts],
                replace(how, max_new_tokens=world.longest + 4), seed=seed, forecast=forecast,
            )  # fmt: skip
            columns = cell(world, posts, rivals, found, policy, reference, tokenizer, beta, how)
            cells[name][decoder] = columns
            for sample, d, reward in zip(samples, found, columns["reward"], strict=False):
                sample[name][decoder] = f"{reward:+.1f} {d.text.strip()}"
    return cells, samples


def exact_truth(world: World, beta: float) -> dict[str, float]:
    """F3 in the world itself: what sampling from π* is worth, and what its best single line is."""
    tree, _ = world.graph
    reward = world.field(lambda edge: edge.reward, 0.0)
    solved = world.solve(beta)
    return {
        "beta": beta,
        "value": solved.value[0].item(),
        "objective_of_mode": best_objective(tree, reward, world.log_ref, beta)[0].item(),
        "sampled_reward": expected_return(tree, solved.logp, reward)[0].item(),
    }


def run(seeds: Sequence[int], policies: Mapping[str, tuple[Trainer, float]] = POLICIES) -> dict:
    """The results file `tiny_search`. `policies` may hold further ones: {name: (trainer, β)}."""
    found = runs.each_seed(partial(run_seed, policies=policies), seeds)
    per_seed, samples = [cells for cells, _ in found], found[0][1]
    n = len(per_seed[0]["sft"]["greedy"]["reward"])
    which = np.repeat(np.array(seeds), n)
    pooled = {
        name: {
            decoder: {k: np.concatenate([c[name][decoder][k] for c in per_seed]) for k in columns}
            for decoder, columns in model.items()
        }
        for name, model in per_seed[0].items()
    }
    means = [
        {name: {d: {k: float(x.mean()) for k, x in c.items()} for d, c in model.items()}
         for name, model in cells.items()}
        for cells in per_seed
    ]  # fmt: skip
    betas = {name: beta for name, (_, beta) in policies.items()}
    return {
        "seeds": list(seeds),
        "posts_per_seed": n,
        "betas": betas,
        "exact": {name: exact_truth(World(), beta) for name, beta in betas.items()},
        "mean": summarise(means),
        "contrasts": contrasts(pooled, which),
        "over_optimisation": over_optimisation(pooled, which),
        "samples": samples,
    }
