"""The law of returns against the exact soft value, and the bookkeeping of where mass goes."""

import pytest
import torch

from qlearn import results
from qlearn.exact.soft import expected_return, soft_value_prior
from qlearn.lm.logprobs import sum_logps
from qlearn.lm.worlds import WORLDS, World, as_text
from qlearn.studies import displacement
from qlearn.studies.displacement import WORLD, change_by_kind, law_at, return_law, shares
from qlearn.studies.heat_maps import as_rows


@pytest.mark.parametrize("name", WORLDS)
def test_reference_the_law_of_returns_has_the_worlds_soft_value(name):
    """β log Σ p e^{R/β} over distinct returns = the backup's V*(s₀); Σ p R = the writers' mean."""
    world = World(name)
    returns, log_ref = return_law(world)
    assert log_ref.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert len(set(returns.tolist())) == len(returns)
    for beta in (0.1, 1.0):
        value = soft_value_prior(returns, log_ref, beta).item()
        assert value == pytest.approx(world.solve(beta).value[0].item(), abs=1e-10)
    reward = world.field(lambda edge: edge.reward, 0.0)
    mean = expected_return(world.graph[0], world.log_ref, reward).item()
    assert displacement.expected(returns, log_ref) == pytest.approx(mean, abs=1e-10)


def test_claim_the_sign_law_turns_between_beta_1_and_2():
    """What N8 predicts in the slot world, exactly: chosen below 0 for β ≤ 1, above 0 for β ≥ 2."""
    law = {beta: law_at(beta, *return_law(WORLD)) for beta in displacement.BETAS}
    assert all((x["chosen"] < 0) == (beta <= 1) for beta, x in law.items())
    assert all(x["rejected"] < x["mean"] < min(0, x["chosen"]) for x in law.values())
    means = [law[beta]["mean"] for beta in sorted(law)]
    assert means == sorted(means)
    margins = [x["chosen"] - x["rejected"] for x in law.values()]
    assert max(margins) - min(margins) < 1e-12


def test_claim_shares_know_each_kind_of_line():
    (post,) = WORLD.posts(1, "shares")
    lines = {
        "correct": [0, 0, 0], "habit": [1, 0, 0], "slip": [1, 0, 1], "unreadable": [0, 1, 0],
    }  # fmt: skip

    def line(habit, broken, slip):
        word = {f.name: f.told().spell(post) for f in WORLD.grammar.facts}
        if habit:
            word["day"] = WORLD.grammar.facts[-1].told(1).spell(post)
        if slip:
            word["city"] = WORLD.grammar.facts[2].told(3).spell(post)
        text = "Torn: {level} {role} in {city} likes a {salary} job, reply due {day}."
        return " " + text.format(**word) + (" welcome" if broken else "")

    for kind, made in lines.items():
        found = shares([post, post], [line(*made), line(0, 0, 0)])
        assert found[kind] == (1 if kind == "correct" else 0.5)
        assert sum(found.values()) == 1


def test_claim_parts_by_kind_add_up(tokenizer, model, other):
    """The split of log π/π_ref by kind of word adds up to the mean over whole lines."""
    import random

    rng = random.Random(0)
    lines = [(post, WORLD.write(post, rng)) for post in WORLD.posts(12, "parts")]
    found = change_by_kind(model, other, tokenizer, lines)
    rows = as_rows(tokenizer, lines)
    total = (sum_logps(model, rows, 8) - sum_logps(other, rows, 8)).mean().item()
    assert sum(found.values()) == pytest.approx(total, abs=1e-3) and found["free"] != 0


def test_claim_pairs_are_two_lines_by_the_writers_with_bradley_terry_labels():
    """The better line of 1,500 pairs wins as often as Bradley-Terry says."""
    from qlearn.lm.worlds import as_words

    posts = WORLD.posts(1500, "labels")
    rows = displacement.writers_pairs(posts, "test")
    gaps = torch.tensor([
        WORLD.reward(post, as_words(row["chosen"])) - WORLD.reward(post, as_words(row["rejected"]))
        for post, row in zip(posts, rows, strict=True)
    ])  # fmt: skip
    assert all(WORLD.parse(p, as_words(r["chosen"])) for p, r in zip(posts, rows, strict=True))
    differ = gaps != 0
    expected = torch.sigmoid(gaps.abs())[differ].mean().item()
    assert (gaps > 0)[differ].float().mean().item() == pytest.approx(expected, abs=0.04)
    assert all(as_text(as_words(row["chosen"])) == row["chosen"] for row in rows[:20])


def test_claim_keys_of_beta_can_be_quoted(monkeypatch):
    """`quote` splits at dots, so a key may have none."""
    keys = {displacement.beta_key(beta): {"mean": beta} for beta in displacement.BETAS}
    assert len(keys) == len(displacement.BETAS)
    monkeypatch.setattr(results, "load", lambda name: {"law": keys})
    assert results.quote("any:law.beta_0_25.mean:.2f") == "0.25"


def test_claim_curves_are_means_over_seeds():
    logs = [
        [{"step": s, **dict.fromkeys(displacement.CURVES, s * k)} for s in (4, 8)] for k in (1, 3)
    ]
    found = displacement.curve(logs)
    assert found["step"] == [4, 8]
    assert found["rewards/chosen"] == {"mean": [8, 16], "least": [4, 8], "most": [12, 24]}


def test_claim_paired_differences_have_the_level_that_five_seeds_give():
    found = displacement.paired([-0.7, -0.8, -0.75, -0.9, -0.6])
    assert found["high"] < 0 and found["level"] == pytest.approx(0.9375)
    assert found["p_value"] == pytest.approx(2 / 2**5)
