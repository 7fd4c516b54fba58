"""Statistics of the findings: intervals that respect pairs and clusters, tests, equivalence.

Resampling and the exact tests are scipy's. What is ours is what it lacks: resampling whole
clusters, Holm's correction, the Hodges-Lehmann interval with the level that so few seeds really
give, and the interval of a share that was measured in several runs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap, rankdata, t, ttest_rel, wilcoxon

from qlearn.exact.check import check_count, check_number

RESAMPLES = 2000
LARGEST = 1e150  # squares of larger numbers overflow


class Interval(NamedTuple):
    """An estimate with the ends of its interval and the level at which they hold."""

    estimate: float
    low: float
    high: float
    level: float


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """P(score of a positive > score of a negative), ties counted half: in [0, 1].

    The Mann-Whitney statistic over n_pos · n_neg. `positive` is bool (N,), `score` (N,).

    Raises: ValueError without a positive or without a negative, for rows of unequal length, or
    scores that are NaN.
    """
    score, positive = np.asarray(score, dtype=float), np.asarray(positive, dtype=bool)
    if score.shape != positive.shape or score.ndim != 1 or np.isnan(score).any():
        raise ValueError("An AUROC needs one score a row, none of them NaN, and one label a row.")
    n_pos = int(positive.sum())
    n_neg = len(positive) - n_pos
    if not n_pos or not n_neg:
        raise ValueError(f"An AUROC needs both classes; there are {n_pos} and {n_neg}.")
    ranks = rankdata(score)
    return float((ranks[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of first − second with a BCa interval; pairs are resampled together.

    Raises: ValueError for unequal lengths, fewer than two pairs, numbers that are not finite, or a
    level outside (0, 1).
    """
    check_number("level", level, above=0, below=1)
    difference = np.subtract(*_pairs(first, second))
    if np.ptp(difference) == 0 or difference.var() == 0:  # BCa divides by the spread
        return Interval(*(float(difference[0]),) * 3, level)
    found = bootstrap(
        (difference,), np.mean, confidence_level=level, n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(difference.mean()), float(found.low), float(found.high), level)


def cluster_bootstrap(
    statistic: Callable[..., float],
    arrays: Sequence[np.ndarray],
    clusters: Sequence,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """A statistic of `arrays` with a percentile interval from resampling whole clusters of rows.

    Tokens of one post are not independent; posts are. `arrays` and `clusters` share their first
    axis. A difference of two statistics on the same rows is one statistic, hence paired.

    Raises: ValueError for unequal lengths, fewer than two clusters, a level outside (0, 1), or no
    resamples.
    """
    check_number("level", level, above=0, below=1)
    check_count("resamples", resamples)
    arrays = [np.asarray(x) for x in arrays]
    if len({len(x) for x in [*arrays, clusters]}) != 1:
        raise ValueError("The arrays and the clusters must have one row each for the same rows.")
    _, number = np.unique(np.asarray(clusters), return_inverse=True)
    rows = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
    if len(rows) < 2:
        raise ValueError("Resampling clusters needs at least two of them.")
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        chosen = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        draws.append(statistic(*(x[chosen] for x in arrays)))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(*arrays)), float(low), float(high), level)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The exact two-sided p-value that two decoders win equally often on the same prompts.

    Only prompts on which exactly one of them wins count.

    Raises: ValueError for unequal lengths or fewer than two pairs.
    """
    a, b = (x.astype(bool) for x in _pairs(first, second))
    alone, all_alone = int((a & ~b).sum()), int((a != b).sum())
    return float(binomtest(alone, all_alone).pvalue) if all_alone else 1.0


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Each p-value adjusted for all of them (Holm, 1979): compare with the level as it stands.

    The k-th smallest of n becomes (n − k + 1) p, but not less than the one before nor more than 1.

    Raises: ValueError for a p-value outside [0, 1].
    """
    for name, p in p_values.items():
        check_number(f"The p-value of {name}", p, least=0, most=1)
    order = sorted(p_values, key=p_values.get)
    factors = range(len(order), 0, -1)
    raised = [min(1.0, n * p_values[name]) for n, name in zip(factors, order, strict=True)]
    adjusted = dict(zip(order, np.maximum.accumulate(raised).tolist(), strict=True))
    return {name: adjusted[name] for name in p_values}


def hodges_lehmann(differences: Sequence[float], level: float = 0.95) -> Interval:
    """The median of all pairwise means of paired differences, with the signed-rank interval.

    The interval is the set of shifts that Wilcoxon's exact test does not reject. With n pairs its
    level cannot exceed 1 − 2^(1−n); where `level` is more than that the widest interval comes
    back, with the level it has: five seeds give 0.9375.

    Raises: ValueError for fewer than two differences or more than 50, where the exact test ends,
    for differences that are not finite, or a level outside (0, 1).
    """
    check_number("level", level, above=0, below=1)
    x = _finite_row(differences)
    n = len(x)
    if not 2 <= n <= 50:
        raise ValueError(f"The exact interval needs 2 to 50 differences, not {n}.")
    i, j = np.triu_indices(n)
    walsh = np.sort((x[i] + x[j]) / 2)
    # counts[w]: how many of the 2^n sign patterns give the rank sum w, at most len(walsh)
    counts = np.zeros(len(walsh) + 1)
    counts[0] = 1
    for rank in range(1, n + 1):
        counts[rank:] = counts[rank:] + counts[:-rank]
    below = np.cumsum(counts) / 2.0**n
    k = int(np.searchsorted(below, (1 - level) / 2, side="right"))  # P(W ≤ k − 1) ≤ α/2
    kept = float(1 - 2 * (below[k - 1] if k else below[0]))
    k = max(k - 1, 0)
    return Interval(float(np.median(walsh)), float(walsh[k]), float(walsh[-1 - k]), kept)


def signed_rank(differences: Sequence[float]) -> float:
    """The exact two-sided p-value of Wilcoxon's signed-rank test that the median is 0.

    1 where no difference is other than 0.

    Raises: ValueError without a difference, or for differences that are not finite.
    """
    x = _finite_row(differences)
    if not len(x):
        raise ValueError("The signed-rank test needs at least one difference.")
    return float(wilcoxon(x).pvalue) if x.any() else 1.0


def least_p(n: int) -> float:
    """The least two-sided p-value that a signed-rank test of n pairs can give: 2^(1 − n).

    It comes out where all n differences have one sign. Five seeds give 0.0625, six 0.03125.

    >>> least_p(5)
    0.0625

    Raises: ValueError without a pair.
    """
    if n < 1:
        raise ValueError(f"A signed-rank test needs at least one pair, not {n}.")
    return 2.0 ** (1 - n)


def share(count: int, n: int, level: float = 0.95) -> Interval:
    """A share, `count` of n independent draws, with Wilson's interval: inside [0, 1] (0 to 1).

    Raises: ValueError unless 0 ≤ count ≤ n and n ≥ 1.
    """
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"A share needs 0 ≤ count ≤ n and n ≥ 1, not {count} of {n}.")
    ends = binomtest(count, n).proportion_ci(level, method="wilson")
    return Interval(count / n, float(ends.low), float(ends.high), level)


def share_over_runs(mean: float, error: float, runs: int, level: float = 0.95) -> Interval:
    """The mean over runs of a share, with Wilson's interval at its effective number of draws.

    Student's interval, mean ± t · error, can leave [0, 1]. Wilson's cannot: it keeps the shares p
    with |mean − p| ≤ t √(p (1 − p)/n), where n = mean (1 − mean)/error² is the number of draws
    that would scatter as the runs do, and t is Student's quantile at runs − 1 degrees of freedom
    (as Korn and Graubard, 1998, do for clustered surveys). Where the runs scatter little it is
    Student's interval again. Where all of them agree, `error` is 0 and their scatter says nothing:
    each run then counts as one draw, which is the widest reading.

    `error` is the standard error of the mean over runs.

    Raises: ValueError for fewer than two runs, a mean outside [0, 1], or a negative error.
    """
    if runs < 2 or not (0 <= mean <= 1 and 0 <= error < np.inf):
        raise ValueError(
            f"A share over runs needs at least 2 runs, a mean in [0, 1] and an error that is not "
            f"negative, not {runs}, {mean} and {error}."
        )
    spread = mean * (1 - mean)
    # 1/n, at most 1: a share has no fewer than one draw
    per_draw = min(error * (error / spread), 1.0) if error and spread else 1 / runs
    z2 = float(t.ppf((1 + level) / 2, runs - 1)) ** 2
    shrunk = 1 + z2 * per_draw
    centre = (mean + z2 * per_draw / 2) / shrunk
    half = (z2 * per_draw * (spread + z2 * per_draw / 4)) ** 0.5 / shrunk
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(mean, 0.0 if mean == 0 else low, 1.0 if mean == 1 else high, level)


def equivalent(
    first: Sequence[float], second: Sequence[float], margin: float, level: float = 0.05
) -> tuple[bool, float]:
    """Whether the mean of first − second lies within ± margin, by two one-sided t-tests (TOST).

    Returns the verdict at `level` and the larger of the two p-values. Where all differences are
    alike there is no spread to test against: p is 0 inside the margin, 1 outside, ½ on its edge,
    the limits of the t-test.

    Raises: ValueError for a margin that is not positive, unequal lengths, fewer than two pairs, or
    numbers that are not finite.
    """
    if not 0 < margin < np.inf:
        raise ValueError(f"The margin must be positive, not {margin}.")
    check_number("level", level, above=0, below=1)
    a, b = _pairs(first, second)
    difference = np.subtract(a, b, dtype=float)
    if np.ptp(difference) == 0 or difference.var() == 0:  # the t-test would divide by no spread
        p = float(np.sign(abs(difference[0]) - margin) + 1) / 2
        return p < level, p
    below = ttest_rel(a, b - margin, alternative="greater").pvalue  # is first − second > −margin?
    above = ttest_rel(a, b + margin, alternative="less").pvalue  # is it < margin?
    p = float(max(below, above))
    return p < level, p


def _pairs(first: Sequence, second: Sequence) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(
            f"Pairs need two rows of equal length, at least 2 long, not {a.shape} and {b.shape}."
        )
    if a.dtype.kind not in "biuf" or b.dtype.kind not in "biuf":
        raise ValueError("Pairs must be of numbers.")
    if not all((np.abs(x.astype(float)) < LARGEST).all() for x in (a, b)):
        raise ValueError(
            f"Pairs must be of finite numbers below {LARGEST:g}; leave out the others."
        )
    return (a.astype(int) if a.dtype == bool else a), (b.astype(int) if b.dtype == bool else b)


def _finite_row(numbers: Sequence[float]) -> np.ndarray:
    x = np.asarray(numbers, dtype=float)
    if x.ndim != 1 or not (np.abs(x) < LARGEST).all():
        raise ValueError(f"The differences must be one row of finite numbers below {LARGEST:g}.")
    return x
