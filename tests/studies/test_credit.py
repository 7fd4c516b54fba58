"""The credit study's parts against what must come out, with no model trained."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qlearn.findings import stats
from qlearn.findings.credit import Credit, agreement, one_step_map
from qlearn.lm.logprobs import collate, completion_logps
from qlearn.lm.models import load_model
from qlearn.lm.worlds import UNREADABLE, World
from qlearn.studies import credit, heat_maps, one_post, runs
from qlearn.studies.corruptions import KINDS, WRONG, corruptions, stitches
from qlearn.studies.localisation import first_place, wins
from qlearn.studies.slot_world import held_out
from qlearn.train.reward import prefix_scores, with_head

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


def said(*advantages):
    """A credit whose advantages are these."""
    return Credit(*[torch.tensor(advantages, dtype=torch.float64)] * 5)


def made_up(policy, rows):
    """A credit for every row that depends on the policy's name and on each token."""
    name = policy if isinstance(policy, str) else policy[0]
    factor = 1 + sum(map(ord, name)) % 17
    return [said(*(math.sin(factor * token) for token in completion)) for _, completion in rows]


def credits_by_hand(policy, reference, rows):
    """(log π, log π_ref) of every word of all rows, one row at a time."""
    found = []
    with torch.no_grad():
        for row in rows:
            batch = collate([row], policy.device)
            found.append([completion_logps(m, batch)[0][0] for m in (policy, reference)])
    return (torch.cat(x).double().numpy() for x in zip(*found, strict=True))


def test_eq_10_every_score_is_high_where_its_model_doubts(tokenizer, model, other):
    """Against log-probabilities row by row; the reward model's is what a word takes off the score.

    Three different policies and a reward model with a random head, so that none can stand for
    another.
    """
    third, scorer = load_model("tiny", tokenizer, 3), load_model("tiny", tokenizer, 4)
    scorer = with_head(scorer, tokenizer)
    with torch.no_grad():
        scorer.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    models = credit.Models(tokenizer, model, {"slots": other}, third, scorer, BETA)
    edited = corruptions(World(), 3, "test")
    rows = credit.as_rows(tokenizer, [(c.post, c.words) for c in edited])
    found = credit.scores(models, "slots", rows)
    logp, ref = credits_by_hand(other, model, rows)
    blind, _ = credits_by_hand(third, model, rows)
    falls = torch.cat([x[:-1] - x[1:] for x in prefix_scores(scorer, rows)]).double().numpy()
    expected = {
        "dpo": BETA * (ref - logp), "ref_surprisal": -ref, "policy_surprisal": -logp,
        "one_step": torch.cat(one_step_map(model, rows)).double().numpy(),
        "shuffled": BETA * (ref - blind), "reward_model": falls,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert x.std() > 1e-3 and found[name] == pytest.approx(x, abs=1e-4), name
    post, words = edited[0].post, edited[0].words
    line = credit.line_credit(models, other, post, words)
    assert line == pytest.approx((BETA * (logp - ref))[: len(words)].tolist(), abs=1e-4)
    assert len(line) == len(words)


@pytest.mark.parametrize("world", ["slots", "trips"])
def test_claim_a_seeds_models_all_start_from_its_sft_model(made, by_name, monkeypatch, world):
    by_name(credit)
    monkeypatch.setattr(credit.reward, "load_reward_model", lambda *given: ("reward", *given))
    models = credit.load(5, world)
    variants = World(world).grammar.variants
    sft, *others = made
    assert all(made[x].seed == 5 for x in made) and made[sft].data == world
    assert all(made[x].model == sft for x in others)
    *policies, shuffled, judge = others
    tokenizer = f"tokenizer of {sft}"
    assert models.tokenizer == tokenizer and models.reference == (sft, tokenizer)
    assert models.policies == {
        name: (folder, tokenizer) for name, folder in zip(variants, policies, strict=True)
    }
    assert [made[x].data for x in others] == [*variants, world, world]
    assert [made[x].shuffle_labels for x in others[:-1]] == [False] * len(variants) + [True]
    assert models.shuffled == (shuffled, tokenizer)
    assert models.reward == ("reward", judge, tokenizer) and "reward" in judge
    assert models.beta == made[shuffled].beta == 0.5


@pytest.mark.parametrize("world", ["slots", "trips"])
def test_claim_a_seed_scores_the_same_lines_edited_and_not(monkeypatch, world):
    """Every collaborator says what it was given; pairs, verbs and the negotiation are of slots."""
    here = World(world)
    variants = here.grammar.variants
    models = SimpleNamespace(
        policies={name: f"policy {name}" for name in variants}, tokenizer="t", beta=0.25,
        credit=lambda policy, rows: ("credit", policy, rows),
    )  # fmt: skip
    monkeypatch.setattr(credit, "POSTS", 3)
    monkeypatch.setattr(credit, "load", lambda *given: {(7, world): models}[given])
    monkeypatch.setattr(credit, "as_rows", lambda tokenizer, lines: (tokenizer, lines))
    monkeypatch.setattr(credit, "scores", lambda *given: given)
    monkeypatch.setattr(credit, "line_credit", lambda *given: given)
    monkeypatch.setattr(credit, "pairs_curve", lambda *given: given)
    monkeypatch.setattr(credit, "verbs", lambda *given: given)
    monkeypatch.setattr(
        credit.heat_maps, "follows", lambda world, asked, *given: (world, asked("rows"), *given)
    )
    found = credit.run_seed(7, world)
    edited, pairs = corruptions(here, 3, "study"), stitches(here, 3, "study")
    lines = {
        "edited": [(c.post, c.words) for c in edited],
        "original": [(c.post, c.original) for c in edited],
        "alone": [(s.alone.post, s.alone.words) for s in pairs],
        "after": [(s.after.post, s.after.words) for s in pairs],
    }
    expected = {
        "scores": {name: (models, world, ("t", x)) for name, x in lines.items()},
        "follows": {
            name: (World(name), ("credit", f"policy {name}", "rows"), "t", 0.25, 7)
            for name in variants
        },
        "showcase": {
            name: (models, f"policy {name}", *heat_maps.showcase(World(name))) for name in variants
        },
    }
    if world == "slots":
        post, *summaries = heat_maps.negotiation()
        expected["pairs"] = (7, models, edited)
        expected["negotiation"] = [(models, "policy slots", post, x) for x in summaries]
        expected["verbs"] = (7, 0.25)
    assert found == expected


def test_claim_fewer_pairs_are_fewer_updates_with_the_same_share_of_warm_up(
    made, by_name, monkeypatch, tokenizer
):
    """20 of 6,144 pairs' updates warm up; agreement and AUROC of each policy's made-up credit."""
    by_name(credit)
    models = SimpleNamespace(
        tokenizer=tokenizer, beta=BETA, policies={"slots": "the recipe's"}, credit=made_up
    )
    world = World()
    edited = corruptions(world, 4, "test")
    found = credit.pairs_curve(3, models, edited, n=6)
    sft, *folders = made
    rates = {512: 2, 1024: 3, 2048: 7, 4096: 13}  # 20/6144 of each, rounded
    assert {made[x].world_rows: made[x].warmup_steps for x in folders} == rates
    assert all((made[x].seed, made[x].model, made[x].data) == (3, sft, "slots") for x in folders)
    assert list(found) == ["512", "1024", "2048", "4096", "6144"]
    _, rows, truths = held_out(world, tokenizer, BETA, 6, 3)
    wrong = [c for c in edited if c.kinds[c.at] in WRONG]
    assert 0 < len(wrong) < len(edited)
    lines = credit.as_rows(tokenizer, [(c.post, c.words) for c in wrong])
    at = np.concatenate([c.edited for c in wrong])
    policies = {made[x].world_rows: (x, tokenizer) for x in folders}
    for size, policy in (policies | {6144: "the recipe's"}).items():
        suspicion = -torch.cat([c.advantage for c in made_up(policy, lines)]).numpy()
        expected = agreement(made_up(policy, rows), truths)
        expected["auroc_wrong"] = stats.auroc(suspicion, at)
        assert found[str(size)] == pytest.approx(expected, abs=1e-6)


def test_claim_verbs_have_means_by_what_they_earn(made, by_name, monkeypatch):
    """The XOR world on one post: the exact means, and those of made-up credit after each training.

    The short training is the recipe on the post's pairs, the long one has twice as many.
    """
    by_name(credit)
    monkeypatch.setattr(one_post, "LINES", 6)
    monkeypatch.setattr(one_post, "PAIRS", 5)
    world, asked = World("xor"), []
    post = one_post.the_post(world)

    def token_credit(policy, reference, rows, beta):
        asked.append((policy, reference, beta))
        return made_up(policy, rows)

    monkeypatch.setattr(credit, "token_credit", token_credit)
    monkeypatch.setattr(
        credit, "as_rows",
        lambda _, lines: [(p, [sum(map(ord, word)) for word in x]) for p, x in lines],
    )  # fmt: skip
    found = credit.verbs(4, 0.25, n=40)
    start, short, long = made
    tokenizer = f"tokenizer of {start}"
    assert asked == [((x, tokenizer), (start, tokenizer), 0.25) for x in (short, long)]
    rows = {x: Path(made[x].data).read_text(encoding="utf-8") for x in made}
    assert rows == {
        start: runs.jsonl(one_post.lines(world, 6, 4)),
        short: runs.jsonl(one_post.pairs(world, 5, 4)),
        long: runs.jsonl(one_post.pairs(world, 10, 4)),
    }
    assert (made[start].tokenizer, made[short].model, made[long].model) == ("slots", start, start)
    assert all(made[x].seed == 4 for x in made)
    assert (made[short].num_train_epochs, made[short].learning_rate) == (1, 0.0004)
    assert (made[long].num_train_epochs, made[long].learning_rate) == (6, 0.001)

    rng, sums = random.Random("verbs 4"), {}
    for _ in range(40):
        line = world.write(post, rng)
        truth = world.explain(post, line, 0.25)
        labels = heat_maps.places(world, world.parse(post, line))
        row = (post, [sum(map(ord, word)) for word in line])
        by_policy = {
            "exact": [word["advantage"] for word in truth],
            "short": made_up((short, tokenizer), [row])[0].advantage.tolist(),
            "long": made_up((long, tokenizer), [row])[0].advantage.tolist(),
        }
        for name, numbers in by_policy.items():
            for label, x in zip(labels, numbers, strict=True):
                sums.setdefault((name, label), []).append(x)
    assert found == {
        name: pytest.approx({
            verb: sum(sums[name, verb]) / len(sums[name, verb])
            for verb in ("verb_charged", "verb_paid")
        })
        for name in ("exact", "short", "long")
    }  # fmt: skip
    assert found["exact"]["verb_charged"] < 0 < found["exact"]["verb_paid"]


def test_claim_shares_of_lines_are_by_seed():
    """Two seeds that score lines otherwise: each share is worked out line by line."""
    edited = corruptions(World(), 12, "test")
    lengths = [len(c.words) for c in edited]
    rng = np.random.default_rng(0)
    scored = {"x": rng.normal(size=(2, sum(lengths)))}
    originals = {"x": rng.normal(size=(2, sum(lengths)))}
    found = credit.per_line(scored, originals, edited)
    ends = np.cumsum(lengths)[:-1]
    for group, kinds in credit.GROUPS.items():
        shares = {"first": [], "above_original": [], "classified": []}
        for row, before in zip(scored["x"], originals["x"], strict=True):
            lines = [
                (c, a, b)
                for c, a, b in zip(edited, np.split(row, ends), np.split(before, ends), strict=True)
                if c.kinds[c.at] in kinds
            ]
            shares["first"].append(np.mean([a.argmax() == c.at for c, a, _ in lines]))
            shares["above_original"].append(np.mean([a[c.at] > b[c.at] for c, a, b in lines]))
            shares["classified"].append(np.mean([a.sum() > b.sum() for _, a, b in lines]))
        for share, x in shares.items():
            cell = found[share][group]["x"]
            assert cell["estimate"] == pytest.approx(np.mean(x))
            assert (cell["least"], cell["most"]) == pytest.approx((min(x), max(x)))


def test_claim_the_edits_credit_is_a_mean_over_edited_words_of_a_kind():
    """Scores are suspicion, so credit is their negative; found has an interval over seeds."""
    edited = corruptions(World(), 6, "test")
    n = sum(len(c.words) for c in edited)
    rng = np.random.default_rng(0)
    scored = {"dpo": rng.normal(size=(2, n)), "exact": np.tile(rng.normal(size=n), (2, 1))}
    found = credit.edit_credit(scored, edited)
    starts = np.cumsum([0, *(len(c.words) for c in edited)])
    for kind in KINDS:
        at = [s + c.at for s, c in zip(starts, edited, strict=False) if c.kinds[c.at] == kind]
        by_seed = [-sum(row[i] for i in at) / len(at) for row in scored["dpo"]]
        assert found[kind]["found"]["estimate"] == pytest.approx(np.mean(by_seed))
        assert found[kind]["found"]["least"] == pytest.approx(min(by_seed))
        exact = -sum(scored["exact"][0, i] for i in at) / len(at)
        assert found[kind]["exact"] == pytest.approx(exact)
    assert list(found) == list(KINDS)


def test_claim_stitching_tells_the_second_errors_mean_score(study):
    """Over seeds and lines, alone and after the first error."""
    _, _, pairs = study
    words = credit.words_of([s.alone for s in pairs])
    rng = np.random.default_rng(0)
    alone, after = rng.normal(size=(2, 3, len(words.edited)))
    found = credit.stitching({"x": alone}, {"x": after}, pairs)
    starts = np.cumsum([0, *(len(s.alone.words) for s in pairs)])[:-1]
    at = [start + s.alone.at for start, s in zip(starts, pairs, strict=True)]
    for name, table in (("score_alone", alone), ("score_after", after)):
        assert found["x"][name] == pytest.approx(sum(table[:, i].sum() for i in at) / (3 * len(at)))
    assert (found["lines"], found["margin"]) == (len(pairs), 0.05)


def test_claim_a_line_is_shown_with_its_truth_and_the_mean_of_the_seeds():
    """Surprisal is −log π_ref, so never negative; a line that nobody writes has no truth."""
    world = World()
    post, good, bad = heat_maps.negotiation()
    found = [[float(i) for i in range(len(good))], [3.0] * len(good)]
    shown = credit.shown(world, post, good, BETA, found)
    truth = world.explain(post, good, BETA)
    assert shown.pop("found") == [(i + 3) / 2 for i in range(len(good))]
    assert shown.pop("surprisal") == [-word["logp_ref"] for word in truth]
    assert shown == {
        "post": post.prompt, "words": good, "exact": [word["advantage"] for word in truth],
        "reward": [word["reward"] for word in truth],
    }  # fmt: skip
    unread = credit.shown(world, post, bad, BETA, found)
    assert unread["words"] == bad
    assert unread["exact"] == unread["reward"] == unread["surprisal"] == []


@pytest.mark.parametrize("world", ["slots", "trips"])
def test_claim_a_study_puts_the_seeds_tables_together(made, monkeypatch, world):
    """Made-up scores of two seeds: which tables each part gets, and that edits have their truth."""
    here = World(world)
    monkeypatch.setattr(credit, "POSTS", 4)
    edited, pairs = corruptions(here, 4, "study"), stitches(here, 4, "study")
    sizes = {
        "edited": sum(len(c.words) for c in edited),
        "original": sum(len(c.words) for c in edited),
        "alone": sum(len(s.alone.words) for s in pairs),
        "after": sum(len(s.after.words) for s in pairs),
    }

    def run_seed(seed, world):
        assert world == here.variant
        rows = {
            part: {"dpo": np.arange(n) * float(seed) + i, "ref_surprisal": np.full(n, -seed)}
            for i, (part, n) in enumerate(sizes.items())
        }
        lines = {name: heat_maps.showcase(World(name))[1] for name in here.grammar.variants}
        return {
            "scores": rows,
            "follows": {"y": float(seed)},
            "showcase": {name: [float(seed)] * len(x) for name, x in lines.items()},
            "pairs": {"512": {"z": 10.0 * seed}},
            "verbs": {"exact": {"v": -float(seed)}},
            "negotiation": [[seed + i + 0.0] * len(heat_maps.negotiation()[1]) for i in (0, 1)],
        }

    kept = {}

    def keep(name):
        return lambda *given: kept.update({name: given}) or {f"of {name}": True}

    monkeypatch.setattr(credit, "run_seed", run_seed)
    for name in ("auroc_table", "per_line", "edit_credit", "stitching"):
        monkeypatch.setattr(credit, name, keep(name))
    found = {"slots": credit.run, "trips": credit.run_second}[world]([1, 3])

    def table(part):
        one, three = (run_seed(seed, world)["scores"][part] for seed in (1, 3))
        return {name: [one[name].tolist(), three[name].tolist()] for name in one}

    def plain(given):
        return {name: x.tolist() for name, x in given.items()}

    scored, words, groups, main = kept["auroc_table"]
    exact = credit.exact_suspicion(here, edited, 0.5).tolist()
    assert plain(scored) == table("edited") | {"exact": [exact, exact]}
    assert (groups, main) == (credit.GROUPS, "dpo")
    for one, other in zip(words, credit.words_of(edited), strict=True):
        assert (one == other).all()
    again, originals, lines = kept["per_line"]
    assert again is scored and plain(originals) == table("original") and lines == edited
    assert kept["edit_credit"][0] is scored and kept["edit_credit"][1] == edited
    for given, part in zip(kept["stitching"], ("alone", "after"), strict=False):
        truth = credit.exact_suspicion(here, [getattr(s, part) for s in pairs], 0.5).tolist()
        assert plain(given) == table(part) | {"exact": [truth, truth]}
    assert kept["stitching"][2] == pairs

    kinds = [c.kinds[c.at] for c in edited]
    assert found["corruptions"] == {kind: kinds.count(kind) for kind in KINDS}
    assert (found["seeds"], found["posts"]) == ([1, 3], 4)
    assert found["of auroc_table"] and found["of per_line"]
    assert found["edit_credit"] == {"of edit_credit": True}
    assert found["stitching"] == {"of stitching": True}
    assert found["follows"]["y"]["mean"] == 2.0
    for name in here.grammar.variants:
        line = heat_maps.showcase(World(name))
        shown = [[2.0] * len(line[1])]
        assert found["showcase"][name] == credit.shown(World(name), *line, 0.5, shown)
    assert found["showcase"].keys() == set(here.grammar.variants)
    assert {"pairs", "verbs", "negotiation"} & found.keys() == (
        {"pairs", "verbs", "negotiation"} if world == "slots" else set()
    )
    if world == "slots":
        assert found["pairs"]["512"]["z"]["mean"] == 20.0
        assert found["verbs"]["exact"]["v"]["mean"] == -2.0
        post, *summaries = heat_maps.negotiation()
        for i, name in enumerate(("good", "corrupted")):
            expected = credit.shown(here, post, summaries[i], 0.5, [[2.0 + i] * len(summaries[i])])
            assert found["negotiation"][name] == expected
