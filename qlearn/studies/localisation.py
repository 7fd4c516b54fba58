"""Does a score find the edited word of a line? Tables with intervals over posts and over seeds.

Scores are high where a word is suspect. The same lines are scored with the models of every seed,
so a table has two intervals: over posts, with the models given (cluster bootstrap), and over seeds
(Student). AUROC is the chance that an edited word scores above another word of such lines.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from qlearn.findings.stats import cluster_bootstrap
from qlearn.studies.slot_world import summarise


class Words(NamedTuple):
    """All words of many lines, one after another: each (N,).

    edited: whether the word was put there; kept: whether it takes part at all; line and cluster:
    the number of its line and of its post; kind: the kind of its line's edit.
    """

    edited: np.ndarray
    kept: np.ndarray
    line: np.ndarray
    cluster: np.ndarray
    kind: np.ndarray

    def of(self, kinds: Sequence[str]) -> np.ndarray:
        """Which words stand in a line of one of these kinds, and take part."""
        return np.isin(self.kind, kinds) & self.kept


class Wins(NamedTuple):
    """How often edited words of one cluster score above other words of another one.

    pairs[c, d], (K, K): Σ [s_i > s_j] + ½ [s_i = s_j] over edited i of c and others j of d;
    edited and others, (K,): their numbers. The sum of pairs over Σ edited · Σ others is the AUROC,
    and stays so when clusters are drawn again.
    """

    pairs: np.ndarray
    edited: np.ndarray
    others: np.ndarray

    def auroc(self, drawn: np.ndarray | None = None) -> float:
        """The AUROC of the clusters `drawn`, with repetition; of all of them where it is None."""
        n = len(self.edited)
        weight = np.ones(n) if drawn is None else np.bincount(drawn, minlength=n)
        pairs = (weight @ self.edited) * (weight @ self.others)
        return float(weight @ self.pairs @ weight / pairs)


def wins(scores: np.ndarray, words: Words, kinds: Sequence[str]) -> Wins:
    """The table of wins of scores (S, N), a row a seed: the mean over seeds."""
    here = words.of(kinds)
    clusters, number = np.unique(words.cluster[here], return_inverse=True)
    edited, member = words.edited[here], np.eye(len(clusters), dtype=np.float32)[number]
    above = sum(
        (s[edited][:, None] > s[~edited]).astype(np.float32)
        + (s[edited][:, None] == s[~edited]).astype(np.float32) / 2
        for s in scores[:, here]
    ) / len(scores)  # fmt: skip
    pairs = member[edited].T @ above @ member[~edited]
    return Wins(pairs.astype(float), member[edited].sum(0), member[~edited].sum(0))


def auroc_table(
    scores: dict[str, np.ndarray], words: Words, kinds: dict[str, Sequence[str]], main: str
) -> dict:
    """{kind: {score: interval}} of AUROCs and {kind: {score: interval}} of the gains of `main`.

    `kinds` names groups of kinds. Every interval has estimate, low and high over posts, and
    seeds_low, seeds_high, least, most over seeds.
    """
    found: dict = {"auroc": {}, "gain": {}}
    for group, members in kinds.items():
        tables = {name: wins(s, words, members) for name, s in scores.items()}
        single = {
            name: [wins(row[None], words, members).auroc() for row in s]
            for name, s in scores.items()
        }
        found["auroc"][group] = {
            name: interval(table.auroc, len(table.edited)) | over_seeds(single[name])
            for name, table in tables.items()
        }
        best = tables[main]
        found["gain"][group] = {
            name: interval(
                lambda drawn, a=best, b=table: a.auroc(drawn) - b.auroc(drawn), len(best.edited)
            )
            | over_seeds([a - b for a, b in zip(single[main], single[name], strict=True)])
            for name, table in tables.items()
            if name != main
        }
    return found


def first_place(score: np.ndarray, words: Words, kinds: Sequence[str]) -> float:
    """The share of lines whose edited word has the highest score of its line (ties share it)."""
    here = words.of(kinds)
    starts = np.flatnonzero(np.diff(words.line[here], prepend=-1))
    lengths = np.diff(starts, append=here.sum())
    top = score[here] == np.repeat(np.maximum.reduceat(score[here], starts), lengths)
    hits = (top & words.edited[here]).astype(int)
    found = np.add.reduceat(hits, starts) / np.add.reduceat(top.astype(int), starts)
    return float(found.mean())


def interval(statistic, n_clusters: int, level: float = 0.95) -> dict[str, float]:
    """estimate, low, high of statistic(numbers of the drawn clusters), by drawing clusters."""
    everyone = np.arange(n_clusters)
    found = cluster_bootstrap(statistic, [everyone], everyone, resamples=1000, level=level)
    return {"estimate": found.estimate, "low": found.low, "high": found.high}


def mean_over_seeds(values: Sequence[float]) -> dict[str, float]:
    """estimate and `over_seeds`."""
    return {"estimate": fmean(values)} | over_seeds(values)


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Student's 95 % interval over seeds, and the extremes."""
    x = summarise([{"x": float(value)} for value in values])["x"]
    return {"seeds_low": x["low"], "seeds_high": x["high"],
            "least": x["least"], "most": x["most"]}  # fmt: skip
