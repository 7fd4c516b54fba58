"""Tables of AUROCs: equal to the plain statistic, and to resampling rows of clusters."""

import numpy as np
import pytest

from qlearn.findings import stats
from qlearn.studies.localisation import Words, auroc_table, first_place, interval, over_seeds, wins


@pytest.fixture
def lines():
    """60 lines of 4 to 9 words on 30 posts, one word of each edited; scores of three seeds."""
    rng = np.random.default_rng(0)
    rows = []
    for line in range(60):
        n = int(rng.integers(4, 10))
        at, gap = rng.choice(n, 2, replace=False)
        rows += [(i == at, i != gap, line, line // 2, ("a", "b")[line % 2]) for i in range(n)]
    words = Words(*map(np.array, zip(*rows, strict=True)))
    good = rng.integers(0, 4, (3, len(rows))) + 2.0 * words.edited  # small integers: many ties
    return words, {"good": good, "blind": rng.integers(0, 4, (3, len(rows))).astype(float)}


def plain(scores, words, kinds, rows=slice(None)):
    here = np.flatnonzero(words.of(kinds))[rows]
    return np.mean([stats.auroc(s[here], words.edited[here]) for s in scores])


@pytest.mark.parametrize("kinds", [("a",), ("b",), ("a", "b")])
def test_claim_wins_give_the_mean_auroc_over_seeds(lines, kinds):
    words, scores = lines
    for s in scores.values():
        assert wins(s, words, kinds).auroc() == pytest.approx(plain(s, words, kinds), abs=1e-6)


def test_reference_drawn_clusters_are_drawn_rows(lines):
    """AUROC of clusters drawn with repetition = AUROC of all their rows, written out."""
    words, scores = lines
    table = wins(scores["good"], words, ("a", "b"))
    drawn = np.random.default_rng(1).integers(30, size=30)
    cluster = words.cluster[words.of(("a", "b"))]
    rows = np.concatenate([np.flatnonzero(cluster == c) for c in drawn])
    expected = plain(scores["good"], words, ("a", "b"), rows)
    assert table.auroc(drawn) == pytest.approx(expected, abs=1e-6)
    assert table.auroc(drawn) != pytest.approx(table.auroc(), abs=1e-4)


def test_claim_gains_are_differences_and_know_what_is_paired(lines):
    words, scores = lines
    found = auroc_table(scores | {"same": scores["good"]}, words, {"all": ("a", "b")}, "good")
    auroc, gain = found["auroc"]["all"], found["gain"]["all"]
    blind = gain["blind"]
    assert blind["estimate"] == pytest.approx(
        auroc["good"]["estimate"] - auroc["blind"]["estimate"]
    )
    assert 0 < blind["low"] < blind["estimate"] < blind["high"]
    assert auroc["blind"]["low"] < 0.5 < auroc["blind"]["high"]
    assert gain["same"]["low"] == gain["same"]["high"] == 0
    assert auroc["good"]["least"] < auroc["good"]["estimate"] < auroc["good"]["most"]
    by_seed = {
        name: [plain(row[None], words, ("a", "b")) for row in scores[name]] for name in scores
    }
    for key, x in over_seeds(by_seed["good"]).items():
        assert auroc["good"][key] == pytest.approx(x, abs=1e-6)
    apart = [a - b for a, b in zip(by_seed["good"], by_seed["blind"], strict=True)]
    for key, x in over_seeds(apart).items():
        assert blind[key] == pytest.approx(x, abs=1e-6)


def test_claim_an_interval_is_estimated_from_every_cluster():
    """A statistic that is the sum of the clusters' numbers: 0 + ... + 4, once each."""
    found = interval(lambda drawn: float(drawn.sum()), 5)
    assert found["estimate"] == 10.0 and found["low"] < 10 < found["high"]
    assert interval(lambda drawn: float(len(drawn)), 5) == {
        "estimate": 5.0, "low": 5.0, "high": 5.0}  # fmt: skip


def test_claim_first_place_by_hand(lines):
    """Against the loop over lines; words that take no part cannot win; ties share."""
    words, scores = lines
    for s in scores["good"]:
        shares = []
        for line in range(0, 60, 2):
            here = np.flatnonzero((words.line == line) & words.kept)
            top = here[s[here] == s[here].max()]
            shares.append(words.edited[top].sum() / len(top))
        assert first_place(s, words, ("a",)) == pytest.approx(np.mean(shares))
