"""Each statistic against a known answer, and under its null: the level is what it says."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, norm, t

from qlearn.findings import stats


def test_claim_auroc_counts_ordered_pairs():
    """Against the double loop, with ties; 1, 0 and ½ where they must be."""
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    wins = [
        (s > t) + (s == t) / 2 for s in score[positive] for t in score[~positive]
    ]  # fmt: skip
    assert stats.auroc(score, positive) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert stats.auroc(positive.astype(float), positive) == 1
    assert stats.auroc(-positive.astype(float), positive) == 0
    assert stats.auroc(np.zeros(60), positive) == 0.5
    with pytest.raises(ValueError, match="needs both classes"):
        stats.auroc(score, np.zeros(60, dtype=bool))


def test_reference_mcnemar_is_the_exact_binomial():
    """8 prompts won by the first alone, 2 by the second alone: 2 · P(Bin(10, ½) ≤ 2) = 0.109."""
    first = [True] * 8 + [False] * 2 + [True] * 5 + [False] * 3
    second = [False] * 8 + [True] * 2 + [True] * 5 + [False] * 3
    assert stats.mcnemar(first, second) == pytest.approx(2 * binom.cdf(2, 10, 0.5))


def test_claim_mcnemar_keeps_its_level_under_the_null():
    rng = np.random.default_rng(1)
    p = [stats.mcnemar(*(rng.random((2, 120)) < 0.4)) for _ in range(400)]
    assert 0.01 < np.mean(np.array(p) < 0.05) <= 0.07  # exact, so a little below 0.05


def test_reference_holm_by_hand():
    """p = 0.01, 0.04, 0.03: 3 · 0.01, 2 · 0.03, and never less than the one before."""
    found = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06)}


def test_claim_holm_bounds_the_chance_of_any_false_alarm():
    rng = np.random.default_rng(2)
    alarms = [min(stats.holm(dict(enumerate(rng.random(8)))).values()) < 0.05 for _ in range(1000)]
    assert 0.03 < np.mean(alarms) < 0.07


def test_reference_hodges_lehmann_of_a_small_table():
    """1, 2, 4: Walsh averages 1, 1.5, 2, 2.5, 3, 4, so the median is 2.25."""
    found = stats.hodges_lehmann([1, 2, 4])
    assert found.estimate == 2.25 and (found.low, found.high) == (1, 4)
    assert found.level == pytest.approx(1 - 2 / 8)


def test_reference_hodges_lehmann_interval_is_the_test_turned_round():
    """Shifts inside are kept by Wilcoxon's exact test, shifts outside rejected."""
    x = np.random.default_rng(3).normal(0.4, 1, 12)
    low, high, level = stats.hodges_lehmann(x)[1:]
    assert 0.94 < level < 1
    step = 1e-6
    for inside, outside in ((low + step, low - step), (high - step, high + step)):
        assert stats.signed_rank(x - inside) > 1 - level - 1e-9
        assert stats.signed_rank(x - outside) <= 1 - level + 1e-9


def test_claim_five_seeds_cannot_give_95_percent():
    """The exact level of the widest interval, by going through all sign patterns."""
    found = stats.hodges_lehmann([0.1, 0.2, 0.3, 0.4, 0.5])
    assert found.level == pytest.approx(1 - 2 / 2**5)
    assert (found.low, found.high) == (0.1, 0.5)
    patterns = itertools.product((0, 1), repeat=5)
    extreme = sum(sum(r * s for r, s in zip(range(1, 6), signs, strict=True)) in (0, 15)
                  for signs in patterns)  # fmt: skip
    assert found.level == pytest.approx(1 - extreme / 2**5)


def test_claim_hodges_lehmann_covers_at_its_level():
    rng = np.random.default_rng(4)
    found = [stats.hodges_lehmann(rng.normal(0, 1, 10)) for _ in range(1000)]
    covered = np.mean([x.low <= 0 <= x.high for x in found])
    assert abs(covered - found[0].level) < 0.02


def test_claim_paired_bootstrap_covers_and_pairs():
    """Nominal coverage under the null; a common part of both sides, however large, drops out."""
    rng = np.random.default_rng(5)
    covered = []
    for k in range(120):
        common = 100 * rng.normal(size=60)
        first, second = common + rng.normal(size=60), common + rng.normal(size=60)
        found = stats.paired_bootstrap(first, second, seed=k)
        assert found.high - found.low < 2
        covered.append(found.low <= 0 <= found.high)
    assert 0.88 <= np.mean(covered) <= 1
    same = stats.paired_bootstrap([1.0, 2.0], [0.0, 1.0])
    assert (same.estimate, same.low, same.high) == (1, 1, 1)


def test_reference_paired_bootstrap_is_close_to_the_normal_interval():
    x = np.random.default_rng(6).normal(0.3, 1, 400)
    found = stats.paired_bootstrap(x, np.zeros(400))
    half = norm.ppf(0.975) * x.std() / math.sqrt(400)
    assert found.estimate == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - half, abs=0.012)
    assert found.high == pytest.approx(x.mean() + half, abs=0.012)


def test_claim_clusters_widen_the_interval_and_keep_coverage():
    """20 tokens a post with a shared effect: rows alone would be far too sure."""
    rng = np.random.default_rng(7)
    posts = np.repeat(np.arange(40), 20)
    covered, naive = [], []
    for k in range(60):
        x = np.repeat(rng.normal(size=40), 20) + rng.normal(size=800)
        by_post = stats.cluster_bootstrap(np.mean, [x], posts, seed=k, resamples=300)
        covered.append(by_post.low <= 0 <= by_post.high)
        if k % 3 == 0:  # 800 clusters of one row take eight times as long
            by_row = stats.cluster_bootstrap(np.mean, [x], np.arange(800), seed=k, resamples=300)
            naive.append(by_row.low <= 0 <= by_row.high)
    assert np.mean(covered) > 0.85 and np.mean(naive) < 0.6


def test_claim_equivalence_needs_a_small_difference_and_enough_data():
    rng = np.random.default_rng(8)
    base = rng.normal(size=200)
    close, far = base + rng.normal(0, 0.1, 200), base + 0.2 + rng.normal(0, 0.1, 200)
    assert stats.equivalent(base, close, 0.05)[0]
    assert not stats.equivalent(base, far, 0.05)[0]
    assert not stats.equivalent(base[:3], close[:3], 0.05)[0]
    at_margin = [
        stats.equivalent(rng.normal(0.05, 0.1, 80), np.zeros(80), 0.05)[0] for _ in range(400)
    ]
    assert (
        np.mean(at_margin) < 0.08
    )  # a true difference at the margin is let through 5 times in 100


def test_bug_equal_changes_outside_the_margin_are_not_equivalent():
    """All seeds change alike: there is no spread, and p is 1 outside the margin, not 0."""
    first = np.array([0.5, 0.25, 0.75, 1.0])
    assert stats.equivalent(first, first - 0.25, 0.05) == (False, 1.0)
    assert stats.equivalent(first, first + 0.25, 0.05) == (False, 1.0)
    assert stats.equivalent(first, first - 0.25, 0.5) == (True, 0.0)
    assert stats.equivalent(first, first - 0.25, 0.25) == (False, 0.5)
    assert stats.equivalent(first, first, 0.05) == (True, 0.0)
    nearly = stats.equivalent(first + np.array([1e-9, 0, -1e-9, 0]), first - 0.25, 0.05)
    assert not nearly[0] and nearly[1] > 0.999  # the limit that the rule continues


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 10])
def test_claim_no_signed_rank_test_goes_below_the_least_p(n):
    """Reached where all signs agree, and by no other pattern of signs."""
    ranks = np.arange(1.0, n + 1)
    assert stats.least_p(n) == pytest.approx(stats.signed_rank(ranks))
    others = [stats.signed_rank(ranks * signs) for signs in itertools.product((1, -1), repeat=n)
              if abs(sum(signs)) < n]  # fmt: skip
    assert all(p > stats.least_p(n) + 1e-12 for p in others)
    assert (stats.least_p(5), stats.least_p(6) < 0.05) == (0.0625, True)


def test_reference_share_is_wilsons_interval():
    """15 of 50, by the textbook's formula."""
    p, n, z = 0.3, 50, norm.ppf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = stats.share(15, 50)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
    assert stats.share(0, 20).low == 0 < stats.share(0, 20).high < 0.2


@pytest.mark.parametrize("mean", [0.0, 0.004, 0.3, 0.5, 0.96, 1.0])
@pytest.mark.parametrize("error", [0.0, 1e-12, 0.002, 0.05, 0.3])
def test_claim_a_share_over_runs_stays_in_its_range(mean, error):
    found = stats.share_over_runs(mean, error, 5)
    assert 0 <= found.low <= mean <= found.high <= 1
    other = stats.share_over_runs(1 - mean, error, 5)  # wins and losses are one thing
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-12)


def test_claim_a_share_over_runs_is_students_interval_in_the_middle():
    low, high = t.interval(0.95, 4, 0.6, 0.001)
    assert stats.share_over_runs(0.6, 0.001, 5)[1:3] == pytest.approx((low, high), abs=1e-4)
    # all runs alike: five draws of one kind, Wilson's with Student's quantile
    quantile = t.ppf(0.975, 4)
    assert stats.share_over_runs(1.0, 0.0, 5).low == pytest.approx(1 / (1 + quantile**2 / 5))


def test_claim_a_share_over_runs_covers_near_its_end():
    """Five runs of 40 draws at 97 %, each run a little different: Student's leaves [0, 1]."""
    rng = np.random.default_rng(9)
    covered, outside, runs = [], 0, 2000
    for _ in range(runs):
        true = rng.beta(97, 3, size=5)
        shares = rng.binomial(40, true) / 40
        mean, error = shares.mean(), shares.std(ddof=1) / math.sqrt(5)
        found = stats.share_over_runs(mean, error, 5)
        covered.append(found.low <= 0.97 <= found.high)
        outside += mean + t.ppf(0.975, 4) * error > 1
    assert np.mean(covered) > 0.93 and outside > runs / 10


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: stats.paired_bootstrap([1.0], [2.0]), "at least 2 long"),
        (lambda: stats.mcnemar([True, False], [True]), "equal length"),
        (lambda: stats.hodges_lehmann([1.0]), "2 to 50 differences"),
        (lambda: stats.cluster_bootstrap(np.mean, [[1.0, 2.0]], [0, 0]), "at least two"),
        (lambda: stats.cluster_bootstrap(np.mean, [[1.0, 2.0]], [0]), "one row each"),
        (lambda: stats.equivalent([1, 2], [1, 2], 0), "must be positive"),
        (lambda: stats.least_p(0), "at least one pair"),
        (lambda: stats.share(3, 2), "0 ≤ count ≤ n and n ≥ 1, not 3 of 2"),
        (lambda: stats.share(-1, 2), "not -1 of 2"),
        (lambda: stats.share(0, 0), "not 0 of 0"),
        (lambda: stats.share_over_runs(0.5, 0.1, 1), "at least 2 runs"),
        (lambda: stats.share_over_runs(1.5, 0.1, 5), "a mean in"),
    ],
)
def test_claim_bad_input_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_bug_differences_that_end_at_zero_are_not_alike():
    """0, −1 and −2: the largest is 0, and the mean is −1, with a spread."""
    first, second = [0.0, 0.0, 0.0], [0.0, 1.0, 2.0]
    found = stats.paired_bootstrap(first, second)
    assert found.estimate == -1 and found.low < -1 < found.high
    # t = (−1 + 1.5)/(1/√3): by Student's law with two degrees of freedom
    verdict, p = stats.equivalent(first, second, 1.5)
    assert not verdict and p == pytest.approx(t.sf(0.5 * math.sqrt(3), 2))


@pytest.mark.filterwarnings("error")
def test_claim_differences_whose_squares_vanish_are_alike():
    """1e-200 and 2e-200 differ, and their variance is 0 in float64: no division by it."""
    found = stats.paired_bootstrap([1e-200, 2e-200], [0.0, 0.0])
    assert all(0 < x < 3e-200 for x in found[:3])
    assert stats.equivalent([1e-200, 2e-200], [0.0, 0.0], 0.5) == (True, 0.0)


def test_claim_clusters_are_drawn_as_often_as_is_asked():
    """Seven draws and the sample itself; the ends are the quantiles of the seven."""
    x, calls = np.array([1.0, 2.0, 4.0, 8.0]), []

    def total(rows):
        calls.append(rows.sum())
        return calls[-1]

    found = stats.cluster_bootstrap(total, [x], [0, 0, 1, 1], resamples=7, level=0.5)
    assert len(calls) == 8 and calls[-1] == found.estimate == 15
    assert set(calls[:7]) <= {6.0, 15.0, 24.0}  # {0, 0}, {0, 1}, {1, 1}: whole clusters
    assert (found.low, found.high) == tuple(np.quantile(calls[:7], [0.25, 0.75]))
    one = stats.cluster_bootstrap(np.sum, [x], [0, 0, 1, 1], resamples=1)
    assert one.low == one.high
