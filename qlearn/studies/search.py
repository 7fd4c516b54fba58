"""What do beams buy? Decoders against each other on the slot world: chapter 12 (F3, N5, N6, N9).

Each model decodes the same held-out posts with every decoder; each line is judged by its true
reward, and against the line of a writer for the same post. SFT with the same beams is the control
for DPO, greedy the control for beams, and length the control for both. Beside them a policy is a
verifier: its implicit reward chooses among samples of the reference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random

import numpy as np

from qlearn import recipes
from qlearn.exact.search import best_objective
from qlearn.exact.soft import expected_return, implicit_reward
from qlearn.findings.search import exact_forecast
from qlearn.lm.cursor import Policy, response_logps
from qlearn.lm.decode import Decoded, Decoding, decode
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import Post, World, as_text
from qlearn.studies import runs
from qlearn.studies.contrasts import WIDTHS, contrasts, over_optimisation, verifier
from qlearn.studies.slot_world import summarise
from qlearn.train.ppo import PPOConfig

DPO_BETAS = {"dpo_low": 0.1, "dpo": 0.5, "dpo_high": 2.0}
MANY = 512  # texts that go through a model at once; with 128 beams take a quarter longer
DECODERS = {
    "sample": Decoding(),
    "top50": Decoding(top_k=50),  # what `generate` does where nothing is said
    "cold": Decoding(temperature=0.25),
    "greedy": Decoding(decoder="greedy"),
    **{
        f"beam{n}{ending}": Decoding(
            decoder="beam", beams=n, length_penalty=penalty, batch_size=MANY
        )
        for ending, penalty in (("", 0.0), ("_mean", 1.0)) for n in WIDTHS
    },
}  # fmt: skip
# Eq. 12 with the world's exact V in place of a trained policy; the reference writes.
GUIDED = {
    "guided1": Decoding(decoder="guided", beams=1, beta=DPO_BETAS["dpo"]),
    "guided5": Decoding(decoder="guided", beams=5, beta=DPO_BETAS["dpo"]),
}
BEST_OF = (1, 4, 16)  # of so many samples of the reference a policy, as a verifier, takes one

N_SAMPLES = 2  # posts whose lines are printed beside the numbers

# (seed, the reference's folder): trains a policy or finds it trained; its folder
Trainer = Callable[[int, str], str]


def dpo_policy(seed: int, reference: str, beta: float) -> str:
    """DPO as in the recipe tiny-dpo, at another β; the pairs are the same for every β."""
    return runs.dpo_run(seed, reference, beta=beta)


# Every policy of the grid beside the reference: how it is trained, and its β.
POLICIES: dict[str, tuple[Trainer, float]] = {
    name: (partial(dpo_policy, beta=beta), beta) for name, beta in DPO_BETAS.items()
} | {"ppo": (runs.ppo_run, recipes.read("tiny-ppo", PPOConfig)["beta"])}


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


def run_model(
    seed_and_name: tuple[int, str],
    policies: Mapping[str, tuple[Trainer, float]] = POLICIES,
    n_posts: int = 256,
) -> dict[str, tuple[dict[str, np.ndarray], list[str]]]:
    """{decoder: (`cell`, its first lines)} of one seed's model, "sft" or one of `policies`."""
    seed, name = seed_and_name
    world, folder = World(), runs.sft_run(seed)
    tokenizer = load_tokenizer(folder)
    reference = policy = load_model(folder, tokenizer)
    beta = DPO_BETAS["dpo"]
    if name != "sft":
        trainer, beta = policies[name]
        policy = load_model(trainer(seed, folder), tokenizer)
    posts, _, rivals = held_out(world, seed, n_posts)
    forecast = exact_forecast(world, posts, tokenizer, DPO_BETAS["dpo"])
    result = {}
    for decoder, how in (DECODERS | (GUIDED if name == "sft" else {})).items():
        found = decode(
            policy, tokenizer, [post.prompt for post in posts],
            replace(how, max_new_tokens=world.longest + 4), seed=seed, forecast=forecast,
        )  # fmt: skip
        columns = cell(world, posts, rivals, found, policy, reference, tokenizer, beta, how)
        result[decoder] = columns, told(columns, found)
    if name != "sft":  # and the policy as a verifier of the reference's samples
        most = max(BEST_OF)
        many, against = ([x for x in xs for _ in range(most)] for xs in (posts, rivals))
        how = Decoding(max_new_tokens=world.longest + 4)
        found = decode(reference, tokenizer, [post.prompt for post in many], how, seed=seed)
        columns = cell(world, many, against, found, policy, reference, tokenizer, beta, how)
        for n in BEST_OF:
            pick = best_of(n, columns["implicit"].reshape(-1, most))
            best = {k: x[pick] for k, x in columns.items() if k != "objective"}
            result[f"best{n}"] = best, told(best, [found[i] for i in pick])
    return result


def best_of(n: int, scores: np.ndarray) -> np.ndarray:
    """Of each row's first `n` scores (N, M) the place of the highest, counted along all rows."""
    return np.arange(len(scores)) * scores.shape[1] + scores[:, :n].argmax(1)


def told(columns: dict[str, np.ndarray], found: Sequence[Decoded]) -> list[str]:
    """The first lines, each with its true reward before it."""
    rewards = columns["reward"][:N_SAMPLES]
    return [f"{reward:+.1f} {d.text.strip()}" for reward, d in zip(rewards, found, strict=False)]


def held_out(world: World, seed: int, n: int) -> tuple[list[Post], list[str], list[float]]:
    """`n` posts of no training run, with one writer's line for each and its true reward."""
    posts, rng = world.posts(n, f"held out {seed}"), Random(f"rivals {seed}")
    lines = [world.write(post, rng) for post in posts]
    rewards = [world.reward(post, line) for post, line in zip(posts, lines, strict=True)]
    return posts, [as_text(line).strip() for line in lines], rewards


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


def run(
    seeds: Sequence[int],
    policies: Mapping[str, tuple[Trainer, float]] = POLICIES,
    n_posts: int = 256,
) -> dict:
    """The results file `tiny_search`. `policies` may hold further ones: {name: (trainer, β)}."""
    runs.each_seed(runs.sft_run, seeds)
    names = ["sft", *policies]
    tasks = [(seed, name) for seed in seeds for name in names]
    found = runs.each_seed(partial(run_model, policies=policies, n_posts=n_posts), tasks)
    by_task = dict(zip(tasks, found, strict=True))
    cells = {name: _pooled([by_task[seed, name] for seed in seeds]) for name in names}
    which = np.repeat(np.array(seeds), n_posts)
    means = [
        {name: {d: {k: float(x.mean()) for k, x in columns.items()}
                for d, (columns, _) in by_task[seed, name].items()} for name in names}
        for seed in seeds
    ]  # fmt: skip
    posts, lines, rewards = held_out(World(), seeds[0], N_SAMPLES)
    betas = {name: beta for name, (_, beta) in policies.items()}
    return {
        "seeds": list(seeds),
        "posts_per_seed": n_posts,
        "betas": betas,
        "exact": {name: exact_truth(World(), beta) for name, beta in betas.items()},
        "mean": summarise(means),
        "contrasts": contrasts(cells, which),
        "over_optimisation": over_optimisation(cells, which),
        "verifier": verifier(cells, which),
        "samples": [
            {"post": posts[i].prompt, "writer": f"{rewards[i]:+.1f} {lines[i]}"}
            | {name: {d: x[i] for d, (_, x) in by_task[seeds[0], name].items()} for name in names}
            for i in range(N_SAMPLES)
        ],
    }


def _pooled(found: Sequence[dict]) -> dict[str, dict[str, np.ndarray]]:
    """The columns of several seeds end to end, for each decoder."""
    return {
        decoder: {k: np.concatenate([x[decoder][0][k] for x in found]) for k in columns}
        for decoder, (columns, _) in found[0].items()
    }
