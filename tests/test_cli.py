"""The command line as a newcomer meets it: help, recipes, inspect, data check, wrong input."""

import json

import pytest
import yaml

from qlearn import cli, recipes
from qlearn.errors import InputError
from qlearn.lm.models import load_model
from qlearn.lm.tokenizers import load_tokenizer
from qlearn.train.dpo import DPOConfig
from qlearn.train.sft import SFTConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory, save_models):
    """Two saved tiny models: a reference, and a policy that brings a qlearn.yaml."""
    folder = save_models(tmp_path_factory.mktemp("models"), reference=1, policy=2)
    (folder / "policy" / "qlearn.yaml").write_text("beta: 0.25\n")
    return folder


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_claim_the_overview_names_every_command(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == 0 and all(f"qlearn {command}" in out for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_claim_help_explains_every_flag(capsys, command):
    """Flags are the fields of the configuration, each with a sentence."""
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    _, config = cli.load(command)
    for name, field in config.__dataclass_fields__.items():
        assert f"--{name}" in out and field.metadata["help"]


def test_claim_unknown_commands_and_flags_are_refused(capsys):
    code, _, err = run(capsys, "dop")
    assert code == 2 and "Did you mean qlearn dpo?" in err
    code, _, err = run(capsys, "dpo", "--bata", "1", "--model", "m", "--data", "d",
                       "--output-dir", "o")  # fmt: skip
    assert code == 2 and "--bata" in err
    code, _, err = run(capsys, "sft", "--model", "tiny")
    assert code == 2 and "required" in err


def test_claim_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: tiny\ndata: slots\nlearning_rate: 5e-7\nmax-steps: 3\nbeta: 0.2\n")
    argv = ["--config", str(recipe), "--output-dir", "o", "--beta", "0.7", "--overwrite"]
    config = cli.parse("dpo", DPOConfig, argv)
    assert (config.beta, config.learning_rate, config.max_steps) == (0.7, 5e-7, 3)
    assert config.overwrite is True


def test_claim_built_in_recipes_are_valid_and_resolve_to_themselves(tmp_path):
    """Each recipe makes a configuration, and the qlearn.yaml of a run is a recipe again."""
    from qlearn.train import engine

    for name in recipes.names():
        command = name.split("-")[-1].replace("rloo", "ppo")
        _, config = cli.load(command)
        given = {"output_dir": str(tmp_path / name)}
        given |= {} if "model" in recipes.read(name, config) else {"model": "tiny"}
        settings = recipes.settings(name, config, **given)
        engine.open_output(settings)
        again = cli.parse(command, config, ["--config", str(tmp_path / name / "qlearn.yaml")])
        assert again == settings


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; the nearest valid key is 'learning_rate'"),
        ("a: [", "not valid YAML"),
        ("just words", "must hold `key: value` lines"),
    ],
)
def test_claim_bad_recipes_are_named(tmp_path, capsys, text, sentence):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    code, _, err = run(capsys, "sft", "--config", recipe)
    assert code == 2 and sentence in err and str(recipe) in err
    with pytest.raises(InputError, match="There is no recipe"):
        recipes.read("nothing", SFTConfig)


def test_claim_faults_are_one_sentence_and_a_non_zero_exit(tmp_path, capsys, write_jsonl):
    """No traceback: each names the file or setting and what to do."""
    bad = write_jsonl("bad.jsonl", ['{"prompt": '])
    base = ["dpo", "--model", "tiny", "--tokenizer", "slots", "--output-dir", tmp_path / "o"]
    cases = {
        "line 1: not valid JSON": ["--data", bad],
        "beta must be positive": ["--data", bad, "--beta", "0"],
        "There is no file": ["--data", "none.jsonl"],
        "There is no shape": ["--data", bad, "--model", "random:pythia"],
        "already holds a run": ["--data", bad],
    }
    for sentence, flags in cases.items():
        fresh = [] if "already" in sentence else ["--overwrite"]
        code, _, err = run(capsys, *base, *flags, *fresh)
        assert code == 2 and sentence in err and err.count("\n") == 1, (sentence, err)


def test_claim_inspect_prints_and_draws_every_token(trained, capsys, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = run(
        capsys, "inspect", "--policy", trained / "policy", "--reference", trained / "reference",
        "--prompt", "POST: I am a junior nurse. TL;DR:", "--response", " Torn: novice nurse.",
        "--html", page,
    )  # fmt: skip
    assert code == 0 and "β = 0.25" in out
    for token in ("' Torn'", "' novice'", "'<|endoftext|>'", "log π_ref", "surprisal"):
        assert token in out
    html = page.read_text(encoding="utf-8")
    assert html.count("<tr>") == 1 + 6 and "&lt;|endoftext|&gt;" in html


def test_claim_inspect_reads_a_row_of_a_file(trained, capsys, tmp_path, write_jsonl):
    """Chosen and rejected of one numbered pair, side by side."""
    rows = [{"prompt": "POST:", "chosen": " Torn.", "rejected": f" {w}."} for w in ("Happy", "Sad")]
    base = ["inspect", "--policy", trained / "policy", "--reference", trained / "reference",
            "--html", tmp_path / "p.html", "--data", write_jsonl("pairs.jsonl", rows)]  # fmt: skip
    code, out, _ = run(capsys, *base, "--row", "1")
    assert code == 0 and "chosen" in out and "' Happy'" in out
    code, _, err = run(capsys, *base, "--row", "9")
    assert code == 2 and "has no row 9; it has rows 1 to 2" in err
    code, _, err = run(capsys, *base, "--prompt", "a", "--response", "b")
    assert code == 2 and "Pass either" in err


def test_claim_inspect_without_beta_prints_log_ratios_in_nats(trained, capsys, tmp_path):
    """A policy that records no run: no β is made up, and nothing is called an advantage."""
    code, out, _ = run(
        capsys, "inspect", "--policy", trained / "reference", "--reference", trained / "policy",
        "--prompt", "POST:", "--response", " Torn.", "--html", tmp_path / "p.html",
    )  # fmt: skip
    assert code == 0 and "has neither qlearn.yaml nor training_args.bin" in out
    assert "log_ratio" in out and "in nats" in out and "advantage" not in out


def test_claim_inspect_refuses_a_reference_with_another_tokenizer(trained, capsys, tmp_path):
    """Tables of one size say nothing: the words differ."""
    trips = load_tokenizer("trips")
    load_model("tiny", trips).save_pretrained(tmp_path / "trips")
    trips.save_pretrained(tmp_path / "trips")
    code, _, err = run(
        capsys, "inspect", "--policy", trained / "policy", "--reference", tmp_path / "trips",
        "--prompt", "POST:", "--response", " Torn.", "--html", tmp_path / "p.html",
    )  # fmt: skip
    assert code == 2 and "policy's tokenizer and the reference's are not the same" in err


def test_claim_data_check_reports_everything(capsys, write_jsonl, tokenizer, tmp_path):
    good = {"prompt": "POST:", "chosen": " Torn.", "rejected": " Happy: a nurse."}
    rows = [good] * 98 + [good | {"prompt": "TITLE:", "chosen": None}, good | {"prompt": "TL"}]
    path = write_jsonl("pairs.jsonl", rows)
    code, out, _ = run(capsys, "data", "check", path, "--tokenizer", "slots")
    assert code == 0
    for sentence in ("100 rows", "usable rows: 99", "boundary merges: 0", "duplicates: 97",
                     "quarantined rows: 1", "1 x chosen is missing or None (row 99)"):  # fmt: skip
        assert sentence in out, out
    code, _, err = run(
        capsys, "data", "check", path, "--tokenizer", "slots", "--max-quarantine", "0"
    )
    assert code == 2 and "max-quarantine" in err
    rows = write_jsonl("sft.jsonl", [{"prompt": "POST:", "completion": " Torn."}])
    code, out, _ = run(capsys, "data", "check", rows, "--tokenizer", "slots")
    assert code == 0 and "completion tokens: least 3, median 3, most 3" in " ".join(out.split())


def test_claim_sft_and_dpo_run_from_the_command_line(capsys, tmp_path):
    """The overview's two commands, at 2 steps each, on the embedded world."""
    few = ["--max-steps", "2", "--world-rows", "60", "--eval-fraction", "0.2"]
    code, out, _ = run(capsys, "sft", "--config", "tiny-sft", "--output-dir", tmp_path / "a", *few)
    assert code == 0 and "before: loss" in out and "after:  loss" in out
    code, out, _ = run(
        capsys, "dpo", "--config", "tiny-dpo", "--model", tmp_path / "a",
        "--output-dir", tmp_path / "b", *few, "--max-quarantine", "0.5",
    )  # fmt: skip
    assert code == 0 and "reward accuracy" in out
    assert yaml.safe_load((tmp_path / "b" / "qlearn.yaml").read_text())["beta"] == 0.5
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["before"]
