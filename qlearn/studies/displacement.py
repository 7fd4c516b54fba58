"""Where probability goes during DPO: the measurements of chapter 14 (N7, N8; H1 to H4 with models).

Stated before any run. All arms of a seed learn from the same pairs, two lines each by the slot
world's writers with Bradley-Terry labels, as the recipe tiny-dpo says. They differ in the model
that they start from, which is also the reference; see `ARMS`.

  N7  The paper: with SFT chosen and rejected both end below 0, chosen above rejected; without SFT
      chosen stays above 0. H0: the chosen answers' implicit reward ends alike in both (paired by
      seed, Hodges-Lehmann).
  N8  H0: (chosen + rejected)/2 ends at E_ref R − V*(β), which is exact for the writers. The sign
      law also says: it falls as β does, and chosen ends below 0 for β ≤ 1 and above 0 for β ≥ 2.
  Displacement is called benign where neither the NLL of wholly correct lines nor the share of
  unreadable samples rises, catastrophic where either does.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlearn import recipes
from qlearn.exact.likelihood import sign_law
from qlearn.exact.soft import soft_value_prior
from qlearn.findings.credit import token_credit
from qlearn.findings.stats import hodges_lehmann, signed_rank
from qlearn.lm.decode import sample
from qlearn.lm.logprobs import sum_logps
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import Post, World, as_text, as_words
from qlearn.studies import one_post, runs
from qlearn.studies.corruptions import correct_line
from qlearn.studies.heat_maps import as_rows
from qlearn.studies.slot_world import mean_log_ratio, summarise
from qlearn.train.dpo import DPOConfig
from qlearn.train.sft import SFTConfig

WORLD = World()
PAIRS = 3072  # of every arm
HELD_OUT = 500  # posts that the models are measured on
ARMS = {
    "sft": "the model of tiny-sft, which has learned the writers' lines",
    "chosen": "that model after one more pass, over the chosen lines: the paper's π_ref = p_w",
    "posts": "no SFT: a model that has learned to write posts and has never seen a line",
    "pushed": "the model of tiny-sft, pushed: six passes over a sixth of the pairs at ten times "
    "the learning rate",
}
BETAS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
SWEEP_PAIRS, SWEEP_LINES = 16384, 16384
SWEEP_SIZES = (2048, 4096, 8192)  # fewer pairs, at the recipe's β
SHARES = ("correct", "habit", "slip", "unreadable")
ENDS = ("chosen", "rejected")
KINDS_OF_WORDS = ("right", "habit", "slip", "free", "choice", "fixed")
CURVES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def return_law(world: World) -> tuple[Tensor, Tensor]:
    """The distinct returns of a world's lines and log π_ref of each, exact: (L,) twice.

    They are the same for every post, and all that `sign_law` needs.
    """
    law: dict[float, float] = defaultdict(float)
    reached = {world.start: {0.0: 1.0}}
    for level in world.graph[1]:
        below: dict = defaultdict(lambda: defaultdict(float))
        for state in level:
            for edge in world.edges(*state):
                into = law if edge.node is None else below[edge.node, edge.memory]
                for earned, p in reached[state].items():
                    into[round(earned + edge.reward, 9)] += p * edge.prob
        reached = below
    returns, p = zip(*sorted(law.items()), strict=True)
    return torch.tensor(returns, dtype=torch.float64), torch.tensor(p, dtype=torch.float64).log()


def law_at(beta: float, returns: Tensor, log_ref: Tensor) -> dict[str, float]:
    """The sign law as numbers: chosen, rejected, and their mean, which is E_ref R − V*(β)."""
    means = sign_law(returns, log_ref, beta)
    return {
        "chosen": means.chosen.item(),
        "rejected": means.rejected.item(),
        "mean": means.reference.item(),
    }


def writers_pairs(posts: Sequence[Post], seed: int | str) -> list[dict[str, str]]:
    """A row {prompt, chosen, rejected} a post: two lines by the writers, labelled."""
    rng = random.Random(f"pairs by writers {seed}")
    first, second = ([as_text(WORLD.write(post, rng)) for post in posts] for _ in range(2))
    return WORLD.label(list(posts), first, second, rng.randrange(2**31))


# --- with and without SFT (N7) -----------------------------------------------------------------


def train_arm(arm: str, seed: int) -> tuple[str, str]:
    """(folder of the start, folder of the policy) of an arm."""
    rows = writers_pairs(WORLD.posts(PAIRS, f"arms {seed}"), seed)
    before = runs.sft_run(seed)
    changes = {"data": runs.rows_file(rows), "warmup_steps": 10, "logging_steps": 4}
    if arm == "chosen":
        lines = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        rate = recipes.read("tiny-sft", SFTConfig)["learning_rate"] / 4
        before = runs.sft_run(seed, data=runs.rows_file(lines), model=before, learning_rate=rate)
    elif arm == "posts":
        texts = [post.prompt.rsplit("\n\n", 1)[0] for post in WORLD.posts(5000, f"texts {seed}")]
        halves = [text.split(" ", 1) for text in texts]
        lines = [{"prompt": first, "completion": f" {rest}"} for first, rest in halves]
        before = runs.sft_run(seed, data=runs.rows_file(lines), tokenizer="slots")
    elif arm == "pushed":
        rate = recipes.read("tiny-dpo", DPOConfig)["learning_rate"]
        changes |= {"data": runs.rows_file(rows[: PAIRS // 6]), "num_train_epochs": 6,
                    "learning_rate": 10 * rate}  # fmt: skip
    return before, runs.dpo_run(seed, before, **changes)


def measure_arm(arm: str, seed: int) -> tuple[dict, dict]:
    """({numbers of an arm at one seed}, {samples: before and after, curve: logged metrics})."""
    folders = train_arm(arm, seed)
    tokenizer = load_tokenizer(folders[0])
    reference, policy = (load_model(folder, tokenizer) for folder in folders)
    posts = WORLD.posts(HELD_OUT, f"held out {seed}")
    rng = random.Random(f"correct {seed}")
    paths = [(post, correct_line(WORLD, post, rng)) for post in posts]
    correct = [(post, [edge.word.spell(post) for edge in path]) for post, path in paths]
    numbers, samples = {}, {}
    for name, model in (("before", reference), ("after", policy)):
        lines = sample(
            model, tokenizer, [post.prompt for post in posts],
            max_new_tokens=WORLD.longest + 4, seed=seed,
        )  # fmt: skip
        nll = -sum_logps(model, as_rows(tokenizer, correct), 64).mean().item()
        numbers[name] = shares(posts, lines) | {"nll_correct": nll}
        samples[name] = [line.strip() for line in lines[:4]]
    pairs, beta = writers_pairs(posts, f"held out {seed}"), runs.settings(folders[1])["beta"]
    for which in ENDS:
        lines = [(post, as_words(row[which])) for post, row in zip(posts, pairs, strict=True)]
        numbers[f"{which}_by_kind"] = change_by_kind(policy, reference, tokenizer, lines)
    end = {which: beta * sum(numbers[f"{which}_by_kind"].values()) for which in ENDS}
    numbers["end"] = end | {"margin": end["chosen"] - end["rejected"]}
    if arm == "sft":
        numbers["own_lines"] = mean_log_ratio(WORLD, policy, reference, tokenizer, HELD_OUT, seed)
    return numbers, {"samples": samples, "curve": runs.history(folders[1])}


def shares(posts: Sequence[Post], lines: Sequence[str]) -> dict[str, float]:
    """The shares of lines that are correct, err by habit alone, have a slip, are unreadable."""
    kinds = Counter()
    for post, line in zip(posts, lines, strict=True):
        path = WORLD.parse(post, as_words(line))
        made = {edge.kind for edge in path or ()}
        kinds["unreadable" if path is None else "slip" if "slip" in made
              else "habit" if "habit" in made else "correct"] += 1  # fmt: skip
    return {kind: kinds[kind] / len(lines) for kind in SHARES}


def change_by_kind(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[tuple[Post, Sequence[str]]],
) -> dict[str, float]:
    """Mean log π/π_ref of a line in nats, split by the kind of its words: the parts add up."""
    total: dict[str, float] = dict.fromkeys(KINDS_OF_WORDS, 0.0)
    credits = token_credit(policy, reference, as_rows(tokenizer, lines), beta=1.0)
    for credit, (post, words) in zip(credits, lines, strict=True):
        for edge, ratio in zip(WORLD.parse(post, words), credit.advantage.tolist(), strict=True):
            total[edge.kind] += ratio / len(lines)
    return total


# --- the sign law (N8) -------------------------------------------------------------------------


def sweep(seed: int) -> dict:
    """Implicit rewards on held-out pairs at every β, and at the recipe's β with fewer pairs.

    One post only, so that a long training is short. The learning rate is the recipe's times 0.5/β,
    0.5 being its β: then a step moves implied rewards, β log π, alike at every β. own_law is the
    law for the reference network's own returns.
    """
    rows = one_post.lines(WORLD, SWEEP_LINES, seed)
    reference = runs.sft_run(seed, data=runs.rows_file(rows), tokenizer="slots")
    pairs = one_post.pairs(WORLD, SWEEP_PAIRS, seed)
    held_out = one_post.pairs(WORLD, 2048, f"held out {seed}")
    recipe = recipes.settings("tiny-dpo", DPOConfig, model="", output_dir="")
    own = own_returns(reference, seed)

    def point(beta: float, n: int) -> dict[str, float]:
        folder = runs.dpo_run(
            seed, reference, data=runs.rows_file(pairs[:n]), eval_data=runs.rows_file(held_out),
            beta=beta, learning_rate=recipe.learning_rate * recipe.beta / beta,
        )  # fmt: skip
        after = runs.summary(folder)["after"]
        chosen, rejected = (after[f"eval_rewards/{which}"] for which in ENDS)
        value = soft_value_prior(own, torch.full_like(own, 1 / len(own)).log(), beta).item()
        return {
            "chosen": chosen,
            "rejected": rejected,
            "mean": (chosen + rejected) / 2,
            "margin": chosen - rejected,
            "own_law": expected(*return_law(WORLD)) - value,
        }

    return {
        "betas": {beta_key(beta): point(beta, SWEEP_PAIRS) for beta in BETAS},
        "pairs": {str(n): point(recipe.beta, n) for n in (*SWEEP_SIZES, SWEEP_PAIRS)},
    }


def own_returns(reference: str, seed: int, n: int = 4000) -> Tensor:
    """True rewards of `n` lines by the network itself."""
    tokenizer, post = load_tokenizer(reference), one_post.the_post(WORLD)
    lines = sample(
        load_model(reference, tokenizer), tokenizer, [post.prompt] * n,
        max_new_tokens=WORLD.longest + 4, seed=seed,
    )  # fmt: skip
    return torch.tensor([WORLD.reward(post, as_words(x)) for x in lines], dtype=torch.float64)


def expected(returns: Tensor, log_ref: Tensor) -> float:
    """E_ref R."""
    return (log_ref.exp() * returns).sum().item()


# --- the results file --------------------------------------------------------------------------


def run_seed(seed: int) -> dict:
    arms = {arm: measure_arm(arm, seed) for arm in ARMS}
    return {
        "arms": {arm: numbers for arm, (numbers, _) in arms.items()},
        "told": {arm: told for arm, (_, told) in arms.items()},
        "sweep": sweep(seed),
    }


def run(seeds: Sequence[int]) -> dict:
    """The results file `tiny_likelihood`: every arm, the sweep over β, and the exact law."""
    per_seed = runs.each_seed(run_seed, seeds)
    law = return_law(WORLD)
    beta = recipes.settings("tiny-dpo", DPOConfig, model="", output_dir="").beta
    ends = {
        arm: [found["arms"][arm]["end"] for found in per_seed] for arm in ARMS
    }  # fmt: skip
    return {
        "seeds": list(seeds),
        "beta": beta,
        "arms": summarise([found["arms"] for found in per_seed]),
        "with_less_without_sft": {
            key: paired([a[key] - b[key] for a, b in zip(ends["sft"], ends["posts"], strict=True)])
            for key in ends["sft"][0]
        },
        "law": {beta_key(b): law_at(b, *law) for b in sorted({beta, *BETAS})},
        "sweep": summarise([found["sweep"] for found in per_seed]),
        "writers_return": expected(*law),
        "curves": {arm: curve([found["told"][arm]["curve"] for found in per_seed]) for arm in ARMS},
        "samples": {arm: told["samples"] for arm, told in per_seed[0]["told"].items()},
    }


def curve(histories: Sequence[list[dict]]) -> dict:
    """Logged metrics of several seeds: step, and {mean, least, most} over seeds at each step."""
    found: dict = {"step": [line["step"] for line in histories[0]]}
    for key in CURVES:
        x = np.array([[line[key] for line in history] for history in histories])
        found[key] = {"mean": x.mean(0).tolist(), "least": x.min(0).tolist(),
                      "most": x.max(0).tolist()}  # fmt: skip
    return found


def beta_key(beta: float) -> str:
    """A key without a dot, which `quote` would take for a step down."""
    return f"beta_{beta:g}".replace(".", "_")


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Hodges-Lehmann over seeds with its interval, its true level, and the signed-rank p-value."""
    return hodges_lehmann(differences)._asdict() | {"p_value": signed_rank(differences)}
