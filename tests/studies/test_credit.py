"""The credit study's parts against what must come out, with no model trained."""

import numpy as np
import pytest

from qlearn.lm.worlds import UNREADABLE, World
from qlearn.studies import credit
from qlearn.studies.corruptions import WRONG, corruptions, stitches
from qlearn.studies.localisation import first_place, wins

BETA = 0.5


@pytest.fixture(scope="module", params=["slots", "trips"])
def study(request):
    world = World(request.param)
    edited, pairs = corruptions(world, 30, "test"), stitches(world, 30, "test")
    return world, edited, pairs


def test_eq_10_the_exact_advantage_finds_every_error(study):
    """The ceiling is 1: no right word of a corrupted line is as bad as the wrong one."""
    world, edited, _ = study
    exact = credit.exact_suspicion(world, edited, BETA)
    words = credit.words_of(edited)
    assert wins(exact[None], words, WRONG).auroc() > (0.999 if world.variant == "slots" else 0.97)
    assert first_place(exact, words, WRONG) > (0.999 if world.variant == "slots" else 0.9)
    assert first_place(exact, words, ("paraphrase",)) == 0


def test_claim_a_word_that_nobody_writes_loses_all_that_was_to_come(study):
    world, edited, _ = study
    line = next(c for c in edited if c.kinds[c.at] == "never")
    value = world.explain(line.post, list(line.original), BETA)[line.at]["value"]
    exact = credit.exact_suspicion(world, [line], BETA)
    assert exact[line.at] == pytest.approx(value - UNREADABLE) and exact[line.at] > 0
    assert (exact[line.at + 1 :] == 0).all()


def test_claim_words_of_marks_the_edit_and_leaves_out_the_first_error(study):
    _, edited, pairs = study
    words = credit.words_of(edited)
    assert words.kept.all() and words.edited.sum() == len(edited)
    assert (words.kind[words.edited] == [c.kinds[c.at] for c in edited]).all()
    first = [s.after.edited.index(True) for s in pairs]
    words = credit.words_of([s.alone for s in pairs], first)
    assert (~words.kept).sum() == len(pairs) == words.edited.sum()
    assert not (words.edited & ~words.kept).any()


def test_claim_shares_of_lines_by_construction(study):
    """A score that is 1 on edits and 0 elsewhere is perfect; one that is constant, a coin."""
    _, edited, _ = study
    words = credit.words_of(edited)
    n = len(words.edited)
    scored = {"oracle": np.tile(words.edited.astype(float), (2, 1)), "flat": np.ones((2, n))}
    originals = {"oracle": np.zeros((2, n)), "flat": np.ones((2, n))}
    found = credit.per_line(scored, originals, edited)
    for share in ("first", "above_original", "classified"):
        assert found[share]["wrong"]["oracle"]["estimate"] == 1
    for share in ("above_original", "classified"):
        assert found[share]["habit"]["flat"]["estimate"] == 0.5
    lengths = [len(c.words) for c in edited if c.kinds[c.at] == "habit"]
    assert found["first"]["habit"]["flat"]["estimate"] == pytest.approx(
        np.mean(1 / np.array(lengths))
    )


def test_claim_stitching_sees_a_second_error_that_hides(study):
    """N4: a score blind to the second error after a first one loses its AUROC; a steady one not."""
    _, _, pairs = study
    words = credit.words_of([s.alone for s in pairs])
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, len(words.edited)))
    steady = noise + 5 * words.edited
    alone = {"steady": steady, "hides": steady}
    after = {"steady": steady + rng.normal(0, 1e-3, noise.shape), "hides": noise}
    found = credit.stitching(alone, after, pairs)
    assert found["steady"]["p_value"] < 0.05 < found["hides"]["p_value"]
    assert abs(found["steady"]["change"]["estimate"]) < 0.01
    assert found["hides"]["change"]["high"] < -0.3


def test_claim_scores_are_one_number_a_word(tokenizer, model, other):
    """Untrained models: every score has a number for every word, and no policy no credit."""
    from qlearn.train.reward import with_head

    models = credit.Models(
        tokenizer, model, {"slots": other}, model, with_head(model, tokenizer), BETA
    )
    edited = corruptions(World(), 6, "test")
    rows = credit.as_rows(tokenizer, [(c.post, c.words) for c in edited])
    found = credit.scores(models, "slots", rows)
    n = sum(len(c.words) for c in edited)
    assert {len(x) for x in found.values()} == {n}
    assert (found["shuffled"] == 0).all() and found["dpo"].std() > 0.01
    assert found["dpo"] == pytest.approx(
        BETA * (found["policy_surprisal"] - found["ref_surprisal"]), abs=1e-4
    )
    assert (found["reward_model"] == 0).all()  # a new head says 0 everywhere
