"""One post: what chapters train on while the reader waits."""

import json
from pathlib import Path

import pytest
import torch

from qlearn.findings.credit import agreement, token_credit
from qlearn.lm.models import load_model
from qlearn.lm.worlds import World, as_words
from qlearn.studies import one_post
from qlearn.studies.heat_maps import as_rows

WORLD = World()


def test_claim_lines_and_pairs_are_the_writers():
    post = one_post.the_post(WORLD)
    rows = one_post.lines(WORLD, 50, 0) + one_post.lines(WORLD, 50, 1)
    assert len({row["completion"] for row in rows}) > 90
    assert all(WORLD.parse(post, as_words(row["completion"])) for row in rows)
    pairs = one_post.pairs(WORLD, 400, 0)
    gains = [
        WORLD.reward(post, as_words(row["chosen"])) - WORLD.reward(post, as_words(row["rejected"]))
        for row in pairs
    ]
    assert {row["prompt"] for row in rows + pairs} == {one_post.PROMPT}
    assert sum(gains) / len(gains) > 0.5 and min(gains) < 0  # odds, not certainty
    assert pairs == one_post.pairs(WORLD, 400, 0) != one_post.pairs(WORLD, 400, 1)


def test_claim_a_short_training_learns_the_grammar_and_the_credit(tmp_path):
    tokenizer, reference = one_post.learn(WORLD, str(tmp_path), n=2048)
    policy = one_post.prefer(WORLD, str(tmp_path), n=1024, beta=1.0)
    post = one_post.the_post(WORLD)
    lines = [as_words(row["completion"]) for row in one_post.lines(WORLD, 100, "held out")]
    rows = as_rows(tokenizer, [(post, line) for line in lines])
    found = token_credit(policy, reference, rows, beta=1.0)
    truths = [WORLD.explain(post, line, 1.0) for line in lines]
    assert agreement(found, truths)["pearson_all"] > 0.7
    assert json.loads(Path(tmp_path, "dpo", "summary.json").read_text())["before"]["eval_pairs"]
    again = load_model(f"{tmp_path}/dpo", tokenizer)
    assert torch.equal(again.get_output_embeddings().weight, policy.get_output_embeddings().weight)


@pytest.mark.parametrize("variant", ["trips"])
def test_claim_other_worlds_have_their_post_too(variant):
    world = World(variant)
    (row,) = one_post.lines(world, 1, 0)
    assert world.parse(one_post.the_post(world), as_words(row["completion"]))


def test_claim_a_folder_for_learning_need_not_be_there(tmp_path, monkeypatch):
    """Nothing is trained here: the rows are written, and the recipes get them by path."""
    asked = []
    monkeypatch.setattr(one_post.sft, "run", asked.append)
    monkeypatch.setattr(one_post.dpo, "run", asked.append)
    monkeypatch.setattr(one_post, "load_tokenizer", lambda path: f"tokenizer of {path}")
    monkeypatch.setattr(one_post, "load_model", lambda *given: given)
    folder = f"{tmp_path}/a/b"
    tokenizer, model = one_post.learn(WORLD, folder, seed=3, n=4)
    assert (tokenizer, model) == (f"tokenizer of {folder}/sft", (f"{folder}/sft", tokenizer))
    policy = one_post.prefer(WORLD, folder, seed=3, n=4, name="p", beta=2.0)
    assert policy == (f"{folder}/p", f"tokenizer of {folder}/p")
    sft, dpo = asked
    assert (sft.seed, sft.output_dir, sft.tokenizer) == (3, f"{folder}/sft", "slots")
    assert (dpo.seed, dpo.output_dir, dpo.beta) == (3, f"{folder}/p", 2.0)
    assert dpo.model == f"{folder}/sft" and dpo.learning_rate == 0.0004
    for config, rows in ((sft, one_post.lines(WORLD, 4, 3)), (dpo, one_post.pairs(WORLD, 4, 3))):
        written = Path(config.data).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in written] == rows
