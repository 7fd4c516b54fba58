"""`qlearn search` as a newcomer meets it: every decoder, a file or a world, wrong input."""

import json

import pytest

from qlearn import cli
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer

DECODERS = {
    "sample": ["--temperature", "0.7", "--top-k", "20"],
    "greedy": [],
    "beam": ["--beams", "3", "--length-penalty", "1"],
    "guided": ["--beams", "2", "--candidates", "4", "--beta", "0.5"],
    "mcts": ["--simulations", "2", "--candidates", "3", "--beta", "0.5"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, save_models):
    return save_models(tmp_path_factory.mktemp("models"), policy=1, reference=2)


@pytest.fixture
def search(models, tmp_path, capsys):
    def run(*argv):
        base = ["search", "--policy", models / "policy", "--output", tmp_path / "a.jsonl"]
        try:
            code = cli.main([str(x) for x in [*base, "--max-new-tokens", "5", *argv]])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        if code:
            return code, err
        text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
        return out, [json.loads(line) for line in text.splitlines()]

    return run


@pytest.mark.parametrize("decoder", DECODERS)
def test_claim_every_decoder_answers_an_embedded_world(search, models, decoder):
    out, rows = search(
        "--data", "slots", "--max-prompts", "2", "--decoder", decoder, *DECODERS[decoder],
        "--reference", models / "reference",
    )  # fmt: skip
    assert len(rows) == 2 and f"2 responses by {decoder}" in out
    for row in rows:
        assert row["prompt"].startswith("SUBREDDIT") and row["logp"] < 0 and row["length"] <= 5
        assert {"text", "ended", "score", "log_ratio", "reward"} < set(row)
    if decoder in ("sample", "greedy"):
        assert abs(rows[0]["score"] - rows[0]["logp"]) < 1e-4


def test_claim_prompts_of_a_file_are_answered_in_order(search, write_jsonl):
    prompts = ["POST:", "TITLE: Is this a fair offer?", "POST: I am a nurse."]
    path = write_jsonl("p.jsonl", [{"prompt": p} for p in prompts])
    _, rows = search("--data", path, "--decoder", "greedy")
    assert [row["prompt"] for row in rows] == prompts
    assert set(rows[0]) == {"prompt", "text", "length", "ended", "score", "logp"}
    _, one = search("--data", path, "--decoder", "greedy", "--max-prompts", "1")
    assert [row["text"] for row in one] == [rows[0]["text"]]


def test_claim_a_guide_tells_the_value_where_no_truth_is_known(search, models, write_jsonl):
    """With all tokens as candidates it is a beam on the guide itself (Eq. 13)."""
    path = write_jsonl("p.jsonl", [{"prompt": "POST:"}])
    _, guided = search("--data", path, "--decoder", "guided", "--guide", models / "reference",
                       "--candidates", "224", "--beta", "0.5")  # fmt: skip
    _, likely = search("--data", path, "--decoder", "greedy", "--policy", models / "reference")
    assert guided[0]["text"] == likely[0]["text"]


def test_claim_a_small_pair_tilts_the_policy(search, models, write_jsonl):
    """On the untuned model itself with α = 1 it is the tuned one."""
    path = write_jsonl("p.jsonl", [{"prompt": "POST: I am a nurse."}])
    pair = ["--tuned", models / "reference", "--untuned", models / "policy"]
    _, dera = search("--data", path, "--decoder", "greedy", *pair)
    _, tuned = search("--data", path, "--decoder", "greedy", "--policy", models / "reference")
    assert dera[0]["text"] == tuned[0]["text"]
    assert abs(dera[0]["logp"] - tuned[0]["logp"]) < 1e-4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--decoder", "bean"], "invalid choice: 'bean'"),
        (["--beams", "3"], "beams is set to 3, but the decoder sample does not read it"),
        (["--decoder", "beam", "--beams", "999"], "beams is 999, more than the vocabulary's 224"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, not 0"),
        (["--max-prompts", "0"], "max_prompts must be at least 1"),
        (["--tuned", "x"], "Pass both --tuned and --untuned"),
        (["--guide", "x"], "The decoder sample does not read --guide"),
        (["--output", "/nowhere/a.jsonl"], "Cannot write /nowhere/a.jsonl"),
    ],
)
def test_claim_wrong_input_is_one_sentence(search, flags, sentence):
    code, err = search("--data", "slots", "--max-prompts", "1", *flags)
    assert code == 2 and sentence in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "role"),
    [
        (["--reference", "TRIPS"], "reference"),
        (["--decoder", "guided", "--guide", "TRIPS", "--beta", "0.1"], "guide"),
        (["--tuned", "TRIPS", "--untuned", "TRIPS"], "tuned model"),
    ],
)
def test_claim_a_model_with_another_tokenizer_is_named(search, tmp_path, flags, role):
    trips = load_tokenizer("trips")
    load_model("tiny", trips).save_pretrained(tmp_path / "trips")
    trips.save_pretrained(tmp_path / "trips")
    given = [str(tmp_path / "trips") if flag == "TRIPS" else flag for flag in flags]
    code, err = search("--data", "slots", "--max-prompts", "1", *given)
    assert code == 2 and f"tokenizer and the {role}'s are not the same: token" in err


def test_claim_a_padded_table_is_lawful(search, tokenizer, tmp_path):
    load_model("random:pythia-14m", tokenizer).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    out, _ = search("--data", "slots", "--max-prompts", "1", "--reference", tmp_path / "wide")
    assert "the policy has 224 rows for tokens and the reference 50304" in out


def test_claim_files_without_usable_prompts_are_named(search, write_jsonl):
    code, err = search("--data", write_jsonl("in.jsonl", [{"prompt": "POST:"}, {"prompt": 3}]))
    assert code == 2 and "in.jsonl, row 2: prompt is a number, not text; mend" in err
    path = write_jsonl("b.jsonl", [{"prompt": "POST:"}])
    code, err = search("--data", path, "--decoder", "guided")
    assert code == 2 and "needs --guide outside an embedded world" in err
