"""The command line and what surrounds it: terminals, pipes, side files, and where output goes."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlearn import cli
from tests import families

EMOJI = " No! 😀 日本 β."
PAIR = {"prompt": "Question: is it late?", "chosen": EMOJI, "rejected": " Not at all."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models of one GPT-2-like tokenizer, two of a Llama-like one, and a file of one pair."""
    root = tmp_path_factory.mktemp("models")
    for name, family in (("gpt2", families.gpt2), ("llama", families.llama)):
        for seed, role in enumerate(("reference", "policy")):
            families.save(root / f"{name}-{role}", family(), seed=seed)
    (root / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    return root


def inspect(folder, family="gpt2", policy=None):
    """The arguments of `qlearn inspect` that name the models of a family."""
    return ["inspect", "--policy", str(policy or folder / f"{family}-policy"),
            "--reference", str(folder / f"{family}-reference")]  # fmt: skip


def of_pair(folder, page, *more, **models):
    data = ["--data", str(folder / "pairs.jsonl"), "--html", str(page)]
    return [*inspect(folder, **models), *data, *map(str, more)]


def failure(capsys, argv) -> str:
    """The sentence of a command that ends with exit code 2: one line, and no traceback."""
    assert cli.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"qlearn {argv[0]}") and err.count("\n") == 1, err
    return err


# --- terminals and pipes -----------------------------------------------------------------------


def on_terminal(monkeypatch, encoding, argv) -> str:
    """What a terminal of that encoding shows of a command that succeeds."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        assert cli.main(argv) == 0
    screen.flush()
    return screen.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_bug_a_terminal_without_the_letters_gets_replacements(
    encoding, folder, tmp_path, monkeypatch
):
    """Greek is spelled, the rest is a question mark; the page does not depend on the terminal."""
    pages = [tmp_path / "utf8.html", tmp_path / "other.html"]
    whole = on_terminal(monkeypatch, "utf-8", of_pair(folder, pages[0], "--beta", "0.1"))
    shown = on_terminal(monkeypatch, encoding, of_pair(folder, pages[1], "--beta", "0.1"))
    for text in ("(β = 0.1)", "log π_ref", "'😀' (4 tokens)", "'日' (3 tokens)"):
        assert text in whole
    for text in ("(beta = 0.1)", "log pi_ref", "'?' (4 tokens)", "'beta' (2 tokens)"):
        assert text in shown
    assert pages[0].read_bytes() == pages[1].read_bytes()


@pytest.mark.parametrize("command", ["ppo", "search", "diagnose", "inspect", "data check"])
def test_bug_help_prints_on_cp1252(command, monkeypatch):
    argv = [*command.split(), "--help"]
    whole = on_terminal(monkeypatch, "utf-8", argv)
    for letter, name in cli.SPELLED.items():
        whole = whole.replace(letter, letter if letter in "±×·" else name)  # cp1252 has these
    assert on_terminal(monkeypatch, "cp1252", argv) == whole


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bug_tokens_show_as_text_not_as_bytes_or_marks(family, folder, tmp_path, capsys):
    """No Ġ of byte-level tables, no ▁ of SentencePiece, no half of a character."""
    page = tmp_path / "page.html"
    argv = [*inspect(folder, family), "--prompt", "Is it late?", "--response", " No! Not 😀 he."]
    assert cli.main([*argv, "--html", str(page)]) == 0
    screen, page = capsys.readouterr().out, page.read_text(encoding="utf-8")
    assert "' No" in screen and not set("Ġ▁�") & set(screen + page)


def test_bug_a_closed_pipe_loses_no_page(folder, tmp_path):
    """`qlearn inspect ... | head`: the page is there, the end is quiet."""
    argv = [sys.executable, "-m", "qlearn.cli", *of_pair(folder, tmp_path / "page.html")]
    run = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    err = run.stderr.read().decode()
    assert run.wait() == 0 and "Error" not in err and "Traceback" not in err
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_bug_a_full_disk_is_said():
    """Output that is lost against the reader's wish is no success, not even that of --help."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "qlearn.cli", "diagnose", "--help"]
        run = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2 and run.stderr.startswith("qlearn: the output is not complete: ")


# --- side files --------------------------------------------------------------------------------

RECIPES = {
    "not UTF-8": ("beta: 0.1 # caf\xe9\n".encode("latin-1"), "{path} is not UTF-8 text"),
    "UTF-16": ("beta: 0.1\n".encode("utf-16"), "{path} is not UTF-8 text"),
    "empty": (b"", "{path} must hold `key: value` lines"),
    "a comment": (b"# beta: 0.1\n", "{path} must hold `key: value` lines"),
    "a list": (b"- beta: 0.1\n", "{path} must hold `key: value` lines"),
    "a key twice": (b"beta: 0.1\nbeta: 0.2\n", "{path} sets beta twice"),
    "a key in two spellings": (b"max-steps: 1\nmax_steps: 2\n", "{path} sets max_steps twice"),
    "a seed of 20 digits": (b"seed: 12345678901234567890\n", "seed must lie in [0, 1e+18), not 1"),
    "a word": (b"learning_rate: fast\n", "invalid float value: 'fast' (flags and {path} together)"),
    "NaN": (b"beta: .nan\n", "beta must be positive and finite, not nan"),
    "a program": (b"beta: !!python/object/apply:os.getcwd []\n", "line 1: not valid YAML"),
}


@pytest.mark.parametrize("what", RECIPES)
def test_bug_a_recipe_that_cannot_be_meant_is_one_sentence(what, tmp_path, capsys):
    content, sentence = RECIPES[what]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    argv = ["dpo", "--config", path, "--model", "tiny", "--data", "slots", "--output-dir", "o"]
    assert sentence.format(path=path) in failure(capsys, argv)


def test_bug_an_empty_recipe_name_is_not_no_recipe(capsys):
    assert "There is no recipe ''" in failure(capsys, ["sft", "--config", "", "--model", "tiny"])


def test_bug_a_recipes_value_may_begin_with_a_dash(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("policy: p\nreference: r\nprompt: -a\nresponse: --b\n")
    _, config = cli.load("inspect")
    read = cli.parse("inspect", config, ["--config", str(recipe)])
    assert (read.prompt, read.response) == ("-a", "--b")


ODD_RUN_FILES = (
    b"", b"words\n", b"- 1\n", b"beta: 0.1 # \xe9\n", b"beta: [\n", b"beta: 0.1\nbeta: 0.2\n",
    b"beta: 1" + b"0" * 49, b"beta: .inf\n", b"beta: true\n", b"beta: null\n",
)  # fmt: skip


@pytest.mark.parametrize("content", ODD_RUN_FILES)
def test_bug_an_odd_qlearn_yaml_tells_no_beta(content, folder, tmp_path, capsys):
    """Credit then is a log-ratio in nats, and the file that is odd is named."""
    policy = families.save(tmp_path / "policy", families.gpt2(), seed=1)
    (tmp_path / "policy" / "qlearn.yaml").write_bytes(content)
    assert cli.main(of_pair(folder, tmp_path / "page.html", policy=policy)) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"note: {policy}/qlearn.yaml") and "log_ratio" in out
    assert "advantage" not in out and "(in nats)" in out


# --- where output goes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--html", "{tmp}/nodir/x.html"],
            "no directory {tmp}/nodir; pass another --html",
        ),
        (["--html", "{tmp}"], "Cannot write {tmp}: it is a directory; pass another --html"),
        (["--html", ""], "--html is empty"),
        (["--html", "{tmp}/a", "--json", ""], "--json is empty"),
        (
            ["--html", "{tmp}/a", "--json", "{tmp}/nodir/x"],
            "no directory {tmp}/nodir; pass",
        ),
        (["--html", "{tmp}/a", "--json", "{tmp}/./a"], "another flag names the same file"),
        (["--html", "{data}"], "Cannot write {data}: another flag names the same file"),
    ],
)
def test_bug_an_output_is_refused_before_anything_is_read(
    flags, sentence, folder, tmp_path, capsys
):
    """The policy is not there either, and nobody has asked for it yet."""
    names = {"tmp": str(tmp_path), "data": str(folder / "pairs.jsonl")}
    argv = [*inspect(folder, policy="nowhere"), "--data", folder / "pairs.jsonl",
            *(flag.format(**names) for flag in flags)]  # fmt: skip
    assert sentence.format(**names) in failure(capsys, argv)


def test_bug_search_never_writes_over_its_prompts(folder, capsys):
    data = folder / "pairs.jsonl"
    argv = ["search", "--policy", folder / "gpt2-policy", "--data", data, "--output", data]
    assert "another flag names the same file" in failure(capsys, argv)
    assert json.loads(data.read_text(encoding="utf-8")) == PAIR


@pytest.mark.parametrize("read", ["model", "reference", "data"])
def test_bug_a_run_never_deletes_what_it_reads(read, tmp_path, capsys, write_jsonl):
    """--overwrite removes an old run first, which would be the model to train."""
    own = tmp_path / "own"
    model = families.save(own if read == "model" else tmp_path / "model", families.gpt2())
    flags = {"model": model, "data": write_jsonl("pairs.jsonl", [PAIR] * 20)}
    if read == "reference":
        flags["reference"] = families.save(own, families.gpt2())
    if read == "data":
        own.mkdir()
        flags["data"] = own / "quarantine.jsonl"
        flags["data"].write_text("")
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    named = [text for name, value in flags.items() for text in (f"--{name}", value)]
    err = failure(capsys, ["dpo", *named, "--output-dir", f"{own}/.", "--overwrite"])
    assert f"is the {read} that this run reads" in err
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_bug_a_name_that_no_file_can_hold_is_refused_before_training(tmp_path, capsys):
    argv = ["sft", "--model", "tiny", "--data", "slots", "--output-dir", f"{tmp_path}/a\udcff"]
    assert "--output-dir is not valid text" in failure(capsys, argv)
    assert not list(tmp_path.iterdir())


# --- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--device", "gpu"], "invalid choice: 'gpu'"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--row", "1.5"], "invalid int value: '1.5'"),
        (["--row", "0"], "row must be at least 1, not 0"),
        (["--row", "9" * 20], f"has no row {'9' * 20}; it has rows 1 to 1"),
        (["--max-length", "9" * 20], "but the model's context is 256 tokens"),
        (["--beta", "1e38"], "beta must lie in (1e-20, 1e+20), not 1e+38"),
        (["--beta", "1e-320"], "beta must lie in (1e-20, 1e+20), not 1e-320"),
        (["--response", "x"], "Pass either --prompt and --response, or --data"),
        (["--bata", "1"], "unrecognized arguments: --bata 1; qlearn inspect --help lists"),
    ],
)
def test_bug_a_flag_that_cannot_be_meant_is_one_sentence(flags, sentence, folder, tmp_path, capsys):
    """Not the twenty lines of argparse's usage; and no flag is dropped without a word."""
    assert sentence in failure(capsys, of_pair(folder, tmp_path / "page.html", *flags))


def test_bug_a_row_without_a_file_is_not_dropped(folder, capsys):
    argv = [*inspect(folder), "--prompt", "a", "--response", "b", "--row", "2"]
    assert "Pass either" in failure(capsys, argv)


# --- numbers in full ---------------------------------------------------------------------------


def test_reference_json_holds_the_numbers_of_transformers(folder, tmp_path, capsys):
    """--json -: nothing but JSON on the screen, with every digit of log π and β log π/π_ref."""
    flags = ("--json", "-", "--beta", "0.25", "--device", "cpu", "--dtype", "float32")
    assert cli.main(of_pair(folder, tmp_path / "page.html", *flags)) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["column"], numbers["dtype"], numbers["device"]) == (
        "advantage", "float32", "cpu",
    )  # fmt: skip
    chosen = numbers["responses"][0]
    assert chosen["text"] == EMOJI + "<|endoftext|>"
    ids = torch.tensor([numbers["prompt_ids"] + chosen["ids"]])
    n, logps = len(chosen["ids"]), []
    for role in ("policy", "reference"):
        model = AutoModelForCausalLM.from_pretrained(folder / f"gpt2-{role}")
        with torch.no_grad():
            logp = model(ids).logits.log_softmax(-1)[0, :-1]  # (T - 1, vocabulary)
        logps.append(logp.gather(1, ids[0, 1:, None])[-n:, 0])
    policy, reference = logps
    for name, values in (("logp", policy), ("ref_logp", reference), ("surprisal", -reference),
                         ("advantage", 0.25 * (policy - reference)),
                         ("value", 0.25 * (policy - reference).cumsum(0))):  # fmt: skip
        torch.testing.assert_close(torch.tensor(chosen[name]), values, atol=1e-5, rtol=1e-5)
    total = 0.25 * (policy - reference).sum().item()
    assert chosen["sums"]["advantage"] == pytest.approx(total, abs=1e-4)


def test_claim_bfloat16_is_said_with_its_noise(folder, tmp_path, capsys):
    flags = ("--json", str(tmp_path / "n.json"), "--dtype", "bfloat16")
    assert cli.main(of_pair(folder, tmp_path / "page.html", *flags)) == 0
    numbers = json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))
    assert numbers["dtype"] == "bfloat16" and numbers["noise"]
    assert numbers["responses"][0]["sums"]["error"] > 0
