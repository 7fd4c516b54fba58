"""`qlearn search` as a newcomer meets it: every decoder, a file or a world, wrong input."""

import json
import re
from statistics import fmean

import pytest
import torch

from qlearn import cli
from qlearn.errors import InputError
from qlearn.findings import search as search_module
from qlearn.findings.search import SearchConfig, beta_of, load_policy
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


def test_claim_each_line_and_the_means_are_what_the_models_say(search, models, tokenizer):
    """log_ratio is log π − log π_ref of the tokens written, by plain passes; the means on screen.

    Rewards are the world's own, and `ended` counts as 0 or 1.
    """
    out, rows = search(
        "--data", "slots", "--max-prompts", "3", "--seed", "4", "--reference", models / "reference"
    )
    policy, reference = (load_model(str(models / x), tokenizer) for x in ("policy", "reference"))

    def logp(model, prompt, response):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return sum(logits[len(prompt) - 1 + k, a].item() for k, a in enumerate(response))

    for row in rows:
        prompt, response = tokenizer([row["prompt"], row["text"]]).input_ids
        if row["ended"]:
            response = [*response, tokenizer.eos_token_id]
        assert len(response) == row["length"]
        p, ref = (logp(m, prompt, response) for m in (policy, reference))
        assert row["logp"] == pytest.approx(p, abs=1e-3)
        assert row["log_ratio"] == pytest.approx(p - ref, abs=1e-3)
        assert abs(row["log_ratio"]) > 1e-2 and abs(ref) > 1
    shown = dict(re.findall(r"(\w+) (-?\d+\.\d{3})(?=[,\n])", out.split("means: ")[1]))
    names = ["length", "ended", "score", "logp", "log_ratio", "reward"]
    assert list(shown) == names
    for name in names:
        assert float(shown[name]) == pytest.approx(fmean(row[name] for row in rows), abs=6e-4)


def test_claim_beta_is_the_guides_own_or_a_worlds(tmp_path):
    """None where no β is read; 0.1 for an embedded world's truth; a guide's file, or a sentence."""

    def beta(**settings):
        return beta_of(SearchConfig(policy="p", data="slots", **settings))

    assert beta(decoder="sample") is beta(decoder="beam") is beta(decoder="greedy") is None
    assert beta(decoder="guided") == beta(decoder="mcts") == 0.1
    (tmp_path / "qlearn.yaml").write_text("beta: 0.7\n")
    assert beta(decoder="guided", guide=str(tmp_path)) == 0.7
    (tmp_path / "qlearn.yaml").write_text("beta: 0.7\nloss_type: ipo\n")
    with pytest.raises(InputError, match=r"loss_type ipo.*pass --beta to search"):
        beta(decoder="guided", guide=str(tmp_path))


def test_claim_a_guide_without_a_given_beta_searches_at_its_own(search, models, monkeypatch):
    """The β of the guide's file reaches the forecast; one that is given goes before it."""
    used = []
    real = search_module.implied_forecast

    def watched(guide, policy, beta, *rest):
        used.append(beta)
        return real(guide, policy, beta, *rest)

    monkeypatch.setattr(search_module, "implied_forecast", watched)
    (models / "reference" / "qlearn.yaml").write_text("beta: 0.7\n")
    try:
        flags = ["--data", "slots", "--max-prompts", "1", "--decoder", "guided",
                 "--guide", models / "reference"]  # fmt: skip
        search(*flags)
        search(*flags, "--beta", "0.3")
    finally:
        (models / "reference" / "qlearn.yaml").unlink()
    assert used == [0.7, 0.3]


def test_claim_a_pair_tilts_a_third_model_or_the_policy_itself(models, tokenizer, save_models):
    """base + α (tuned − untuned): three models, or two where the untuned one is the policy."""
    save_models(models, third=3)
    base, tuned, third = (load_model(str(models / x), tokenizer)
                          for x in ("policy", "reference", "third"))  # fmt: skip
    ids = torch.tensor([[5, 6, 7]])
    for untuned, model, n in (("third", third, 3), ("policy", base, 2)):
        config = SearchConfig(
            policy=str(models / "policy"), data="slots", tuned=str(models / "reference"),
            untuned=str(models / untuned), alpha=0.5, device="cpu",
        )  # fmt: skip
        mixture = load_policy(config, tokenizer)
        assert len(mixture.models) == n
        with torch.no_grad():
            logs = [m(ids).logits[0, -1].log_softmax(-1) for m in mixture.models]
            b, t, u = (m(ids).logits[0, -1].log_softmax(-1) for m in (base, tuned, model))
        expected = (b + 0.5 * (t - u)).log_softmax(-1)
        assert torch.allclose(mixture.combine(*logs), expected, atol=1e-4)
