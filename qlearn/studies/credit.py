"""Who gets the credit? The measurements of chapter 11 (N3, N4; E1 to E6 with language models).

Stated before any run. A score ranks the words of a corrupted line; its AUROC is the chance that
the edited word ranks above another word of such lines. For errors (habit, slip, never written):

  N3  H0: −β log π/π_ref ranks no better than surprisal −log π_ref, and than the one-step map.
      Sought: an AUROC of at least 0.90, at least 0.25 above each of the two.
  N4  H0: a first error in the line changes the AUROC of a second one by 0.05 or more (TOST).
  E4  H0: where the end of a line pays for a fact, credit is correlated with the reward of a word at
      least as well as with its exact advantage.

Two edits do no harm (free, paraphrase): there the exact advantage itself is the yardstick. No
setting was chosen on these measurements: the recipes are those of chapters 09 and 10, and the
second world, `run_second`, was measured once; later both worlds were measured again, because the
reward model got a higher learning rate. Every other number stayed as it was.
"""

import random
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlearn import recipes
from qlearn.findings import stats
from qlearn.findings.credit import Credit, agreement, one_step_map, token_credit
from qlearn.lm.logprobs import Row
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.lm.worlds import UNREADABLE, Post, World
from qlearn.studies import heat_maps, one_post, runs
from qlearn.studies.corruptions import KINDS, WRONG, Corruption, Stitch, corruptions, stitches
from qlearn.studies.heat_maps import as_rows
from qlearn.studies.localisation import (
    Words,
    auroc_table,
    first_place,
    interval,
    mean_over_seeds,
    wins,
)
from qlearn.studies.slot_world import held_out, summarise
from qlearn.train import reward
from qlearn.train.dpo import DPOConfig

POSTS = 250  # each gives one corruption of every kind that its line has a place for
SIZES = (512, 1024, 2048, 4096)  # pairs, beside the recipe's own number
GROUPS = {"wrong": WRONG, "written": ("habit", "slip")} | {kind: (kind,) for kind in KINDS}
MARGIN = 0.05  # of N4
LONG = {"num_train_epochs": 6, "learning_rate": 0.001}  # of `verbs`, on twice the pairs


class Models(NamedTuple):
    """What is compared at one seed: all from one SFT model, the reference, with DPO's β."""

    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel
    policies: dict[str, PreTrainedModel]  # by DPO: of the world, then of each of its variants
    shuffled: PreTrainedModel  # DPO on labels by a fair coin
    reward: PreTrainedModel
    beta: float

    def credit(self, policy: PreTrainedModel, rows: Sequence[Row]) -> list[Credit]:
        return token_credit(policy, self.reference, rows, self.beta)


def load(seed: int, world: str) -> Models:
    """The models of a seed, trained where they are not yet there."""
    sft = runs.sft_run(seed, world)
    tokenizer = load_tokenizer(sft)
    folders = {name: runs.dpo_run(seed, sft, name) for name in World(world).grammar.variants}
    shuffled = runs.dpo_run(seed, sft, world, shuffle_labels=True)
    return Models(
        tokenizer,
        load_model(sft, tokenizer),
        {name: load_model(folder, tokenizer) for name, folder in folders.items()},
        load_model(shuffled, tokenizer),
        reward.load_reward_model(runs.reward_run(seed, sft, world), tokenizer),
        runs.settings(shuffled)["beta"],
    )


def scores(models: Models, world: str, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """How suspect each word of all rows is, one row after another, by every score: (N,) each."""
    credits = models.credit(models.policies[world], rows)
    blind = models.credit(models.shuffled, rows)
    found = {
        "dpo": [-credit.advantage for credit in credits],
        "ref_surprisal": [credit.surprisal for credit in credits],
        "policy_surprisal": [-credit.logp for credit in credits],
        "one_step": one_step_map(models.reference, rows),
        "shuffled": [-credit.advantage for credit in blind],
        "reward_model": [-x.diff() for x in reward.prefix_scores(models.reward, rows)],
    }
    return {name: torch.cat(x).double().numpy() for name, x in found.items()}


def exact_suspicion(world: World, lines: Sequence[Corruption], beta: float) -> np.ndarray:
    """−(exact soft advantage) of each word of all lines: (N,), the ceiling of every score.

    Writers never write a `never` word. Its advantage is the limit in which they write it with
    vanishing probability, `UNREADABLE` − V*(s), after which no word can change anything.
    """
    found = []
    for line in lines:
        truth = world.explain(line.post, list(line.words), beta)
        if truth is not None:
            found += [-word["advantage"] for word in truth]
            continue
        truth = world.explain(line.post, list(line.original), beta)
        found += [-word["advantage"] for word in truth[: line.at]]
        found += [truth[line.at]["value"] - UNREADABLE]
        found += [0.0] * (len(line.words) - line.at - 1)
    return np.array(found)


def words_of(lines: Sequence[Corruption], left_out: Sequence[int] | None = None) -> Words:
    """All words of the lines; word number `left_out` of a line takes no part."""
    columns = zip(*(
        (i == line.at, i != gap, n, line.cluster, line.kinds[line.at])
        for n, (line, gap) in enumerate(zip(lines, left_out or [None] * len(lines), strict=True))
        for i in range(len(line.words))
    ), strict=True)  # fmt: skip
    return Words(*map(np.array, columns))


def run_seed(seed: int, world: str) -> dict:
    """Every score of every word of a world's corrupted lines, and the other numbers of a seed."""
    models, here = load(seed, world), World(world)
    edited, pairs = corruptions(here, POSTS, "study"), stitches(here, POSTS, "study")
    lines = {
        "edited": [(c.post, c.words) for c in edited],
        "original": [(c.post, c.original) for c in edited],
        "alone": [(s.alone.post, s.alone.words) for s in pairs],
        "after": [(s.after.post, s.after.words) for s in pairs],
    }
    found = {
        "scores": {
            name: scores(models, world, as_rows(models.tokenizer, x)) for name, x in lines.items()
        },
        "follows": {
            name: heat_maps.follows(
                World(name), partial(models.credit, policy), models.tokenizer, models.beta, seed
            )
            for name, policy in models.policies.items()
        },
        "showcase": {
            name: line_credit(models, policy, *heat_maps.showcase(World(name)))
            for name, policy in models.policies.items()
        },
    }
    if world == "slots":
        found["pairs"] = pairs_curve(seed, models, edited)
        post, *summaries = heat_maps.negotiation()
        policy = models.policies[world]
        found["negotiation"] = [line_credit(models, policy, post, x) for x in summaries]
        found["verbs"] = verbs(seed, models.beta)
    return found


def line_credit(models: Models, policy: PreTrainedModel, post: Post, words: Sequence[str]) -> list:
    """The credit of each word of one line."""
    (credit,) = models.credit(policy, as_rows(models.tokenizer, [(post, words)]))
    return credit.advantage.tolist()


def pairs_curve(seed: int, models: Models, edited: Sequence[Corruption], n: int = 500) -> dict:
    """{number of pairs: agreement with the exact advantage, AUROC on wrong words}.

    One pass over the pairs, as in the recipe, so fewer pairs are also fewer updates; warm-up keeps
    its share of them.
    """
    world, sft = World(), runs.sft_run(seed)
    _, rows, truths = held_out(world, models.tokenizer, models.beta, n, seed)
    words, lines = words_of(edited), as_rows(models.tokenizer, [(c.post, c.words) for c in edited])
    own = recipes.settings("tiny-dpo", DPOConfig, model="", output_dir="")
    policies = {own.world_rows: models.policies["slots"]}
    for size in SIZES:
        warmup = round(own.warmup_steps * size / own.world_rows)
        folder = runs.dpo_run(seed, sft, world_rows=size, warmup_steps=warmup)
        policies[size] = load_model(folder, models.tokenizer)
    found = {}
    for size, policy in sorted(policies.items()):
        suspicion = -torch.cat([c.advantage for c in models.credit(policy, lines)]).numpy()
        found[str(size)] = agreement(models.credit(policy, rows), truths) | {
            "auroc_wrong": wins(suspicion[None], words, WRONG).auroc()
        }
    return found


def verbs(seed: int, beta: float, n: int = 500) -> dict:
    """Is XOR a matter of training? Mean credit of verbs on one post, after a short and a long one.

    {training: {verb_charged, verb_paid}}, and both exactly. Asked after the recipe had failed to
    find the XOR variant's verbs. Four passes found them on seed 0, two did not; `LONG` has six.
    """
    world = World("xor")
    post, rng = one_post.the_post(world), random.Random(f"verbs {seed}")
    lines = [world.write(post, rng) for _ in range(n)]
    places = [heat_maps.places(world, world.parse(post, line)) for line in lines]
    rows = runs.rows_file(one_post.lines(world, one_post.LINES, seed))
    start = runs.sft_run(seed, data=rows, tokenizer=world.grammar.name)
    tokenizer = load_tokenizer(start)
    reference, table = load_model(start, tokenizer), as_rows(tokenizer, [(post, x) for x in lines])

    def means(by_line) -> dict[str, float]:
        words = [x for pair in zip(places, by_line, strict=True) for x in zip(*pair, strict=True)]
        return {
            verb: fmean(credit for place, credit in words if place == verb)
            for verb in ("verb_charged", "verb_paid")
        }

    truths = [world.explain(post, line, beta) for line in lines]
    found = {"exact": means([[word["advantage"] for word in truth] for truth in truths])}
    for name, pairs, changes in (("short", 1, {}), ("long", 2, LONG)):
        rows = runs.rows_file(one_post.pairs(world, pairs * one_post.PAIRS, seed))
        policy = load_model(runs.dpo_run(seed, start, data=rows, **changes), tokenizer)
        credits = token_credit(policy, reference, table, beta)
        found[name] = means([credit.advantage.tolist() for credit in credits])
    return found


# --- the results files -------------------------------------------------------------------------


def run(seeds: Sequence[int]) -> dict:
    """The results file `tiny_credit`: the slot world and its variants."""
    return study(seeds, "slots")


def run_second(seeds: Sequence[int]) -> dict:
    """The results file `tiny_credit_second`: the same code once on the world of trips."""
    return study(seeds, "trips")


def study(seeds: Sequence[int], world: str) -> dict:
    """All measurements in one world; see the module for what was stated before."""
    here = World(world)
    edited, pairs = corruptions(here, POSTS, "study"), stitches(here, POSTS, "study")
    per_seed = runs.each_seed(partial(run_seed, world=world), seeds)
    beta = recipes.settings("tiny-dpo", DPOConfig, model="", output_dir="").beta

    def stacked(part, lines=None):
        """{score: (seeds, words)}, the exact one among them where `lines` are given."""
        table = {
            name: np.stack([found["scores"][part][name] for found in per_seed])
            for name in per_seed[0]["scores"][part]
        }
        if lines:
            table["exact"] = np.stack([exact_suspicion(here, lines, beta)] * len(per_seed))
        return table

    scored = stacked("edited", edited)
    result = {
        "seeds": list(seeds),
        "posts": POSTS,
        "corruptions": {kind: sum(c.kinds[c.at] == kind for c in edited) for kind in KINDS},
        **auroc_table(scored, words_of(edited), GROUPS, "dpo"),
        **per_line(scored, stacked("original"), edited),
        "edit_credit": edit_credit(scored, edited),
        "stitching": stitching(stacked("alone", [s.alone for s in pairs]),
                               stacked("after", [s.after for s in pairs]), pairs),
        "follows": summarise([found["follows"] for found in per_seed]),
        "showcase": {
            name: shown(World(name), *heat_maps.showcase(World(name)), beta,
                        [found["showcase"][name] for found in per_seed])
            for name in here.grammar.variants
        },
    }  # fmt: skip
    if world == "slots":
        post, *summaries = heat_maps.negotiation()
        result["pairs"] = summarise([found["pairs"] for found in per_seed])
        result["verbs"] = summarise([found["verbs"] for found in per_seed])
        result["negotiation"] = {
            name: shown(here, post, words, beta, [x["negotiation"][i] for x in per_seed])
            for i, (name, words) in enumerate(zip(("good", "corrupted"), summaries, strict=True))
        }
    return result


def per_line(scored: dict, originals: dict, edited: Sequence[Corruption]) -> dict:
    """By group of edits and score, means over seeds with their interval, of three shares:

    first: of lines whose edited word scores highest; above_original: of edits that score above
    the word they replaced; classified: of edits that raise the sum over the line. Ties count half.
    """
    words = words_of(edited)
    kind, starts = words.kind[words.edited], np.flatnonzero(np.diff(words.line, prepend=-1))
    found: dict = {"first": {}, "above_original": {}, "classified": {}}
    for group, kinds in GROUPS.items():
        here = np.isin(kind, kinds)
        found["first"][group] = {
            name: mean_over_seeds([first_place(row, words, kinds) for row in table])
            for name, table in scored.items()
        }
        for share, pick in (
            ("above_original", lambda table: table[:, words.edited]),
            ("classified", lambda table: np.add.reduceat(table, starts, axis=1)),
        ):
            found[share][group] = {
                # a line has as many words as its original, so the same places hold both
                name: mean_over_seeds(
                    (np.sign(pick(scored[name]) - pick(table))[:, here] / 2 + 0.5).mean(axis=1)
                )
                for name, table in originals.items()
            }
    return found


def edit_credit(scored: dict, edited: Sequence[Corruption]) -> dict:
    """Mean credit of the edited words of each kind: found (over seeds too) and exact."""
    kind, rows = words_of(edited), {}
    for name in KINDS:
        here = kind.edited & kind.of((name,))
        found = mean_over_seeds((-scored["dpo"][:, here]).mean(axis=1))
        rows[name] = {"found": found, "exact": float(-scored["exact"][0, here].mean())}
    return rows


def stitching(alone: dict, after: dict, pairs: Sequence[Stitch]) -> dict:
    """N4: the AUROC of a second error alone and after a first one, among the line's right words.

    By score: alone, after, and their difference with its 90 % interval over posts (inside ± MARGIN:
    equivalent at 5 %); p_value of TOST over seeds; the mean score of the second error in both.
    """
    first = [min(i for i, edited in enumerate(s.after.edited) if edited) for s in pairs]
    words = words_of([s.alone for s in pairs], first)
    found = {"lines": len(pairs), "margin": MARGIN}
    everyone = list(set(words.kind))
    for name in alone:
        tables = [wins(x[name], words, everyone) for x in (alone, after)]
        single = np.array([[wins(row[None], words, everyone).auroc() for row in x[name]]
                           for x in (alone, after)])  # fmt: skip
        change = interval(
            lambda drawn, a=tables[0], b=tables[1]: b.auroc(drawn) - a.auroc(drawn),
            len(tables[0].edited), level=0.90,
        )  # fmt: skip
        found[name] = {
            "alone": mean_over_seeds(single[0]),
            "after": mean_over_seeds(single[1]),
            "change": change,
            "p_value": stats.equivalent(single[1], single[0], MARGIN)[1],
            "score_alone": float(alone[name][:, words.edited].mean()),
            "score_after": float(after[name][:, words.edited].mean()),
        }  # fmt: skip
    return found


def shown(world: World, post: Post, words: Sequence[str], beta: float, found: list) -> dict:
    """One line for a figure: its words, and by word the credit (mean over seeds) and the truth."""
    truth = world.explain(post, list(words), beta) or []
    return {
        "post": post.prompt,
        "words": list(words),
        "found": np.mean(found, axis=0).tolist(),
        "exact": [word["advantage"] for word in truth],
        "reward": [word["reward"] for word in truth],
        "surprisal": [-word["logp_ref"] for word in truth],
    }
