"""Models, tokenizers and logs that once gave wrong numbers or a traceback, from the command line.

Each ends with exit code 0 and the right numbers, or with exit code 2 and one sentence.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlearn import cli
from qlearn.lm.decode import text_after
from tests import families

PAIR = {"prompt": "Question: is it late?", "chosen": " Yes, it is late!", "rejected": " No! No."}
FEW = ("--max-steps", "1", "--per-device-train-batch-size", "4", "--eval-fraction", "0.2")


def succeed(capsys, *argv) -> str:
    """What a command prints that ends well."""
    assert cli.main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fail(capsys, *argv) -> str:
    """The sentence of a command that refuses its input."""
    assert cli.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"qlearn {argv[0]}") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family, seed): a tiny Llama with such a tokenizer, made once."""
    root = tmp_path_factory.mktemp("models")

    def get(family="gpt2", seed=0):
        folder = root / f"{family}-{seed}"
        return folder if folder.exists() else families.save(
            folder, families.FAMILIES[family](), seed=seed
        )  # fmt: skip

    return get


@pytest.fixture
def pairs(write_jsonl):
    return write_jsonl(
        "pairs.jsonl", [PAIR | {"prompt": f"Question {i}: is it late?"} for i in range(10)]
    )


def numbers_of(capsys, tmp_path, policy, reference, *flags) -> dict:
    """What `qlearn inspect --json -` says."""
    page = ("--html", tmp_path / "page.html", "--json", "-")
    return json.loads(
        succeed(capsys, "inspect", "--policy", policy, "--reference", reference, *page, *flags)
    )


# --- no ordinary token is made special ---------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_bug_rows_with_the_token_of_id_0_are_usable(family, models, pairs, capsys, tmp_path):
    """Where a tokenizer has no padding token none is made up of "!", nor saved with the run."""
    model = models(family)
    out = succeed(capsys, "data", "check", pairs, "--tokenizer", model)
    assert "usable rows: 10" in out and "quarantined rows: 0" in out
    for command in ("dpo", "reward"):
        run = tmp_path / command
        out = succeed(capsys, command, "--model", model, "--data", pairs, "--output-dir", run, *FEW)
        assert "8 rows, 0 in quarantine" in out
        assert AutoTokenizer.from_pretrained(run).pad_token is None
        assert not (run / "quarantine.jsonl").exists()


def test_bug_generated_text_keeps_its_exclamation_marks(models, pairs, capsys, tmp_path):
    """A head of zeros finds all tokens equally likely, and greedy takes the first: "!"."""
    model = AutoModelForCausalLM.from_pretrained(models())
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    families.gpt2().save_pretrained(tmp_path / "model")
    answers = tmp_path / "answers.jsonl"
    succeed(capsys, "search", "--policy", tmp_path / "model", "--data", pairs, "--output", answers,
            "--decoder", "greedy", "--max-new-tokens", "5")  # fmt: skip
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["!" * 5] * 10


@pytest.mark.parametrize("family", ["gpt2", "qwen", "llama3", "llama", "gemma"])
@pytest.mark.parametrize("response", [" No! Not late.", "!", " Be torn.  Is it? ", ""])
def test_bug_a_generated_text_keeps_its_spaces(family, response):
    """Stripped and given a space of its own, once; a decoder alone drops the first space."""
    tokenizer = families.FAMILIES[family]()
    prompt = tokenizer("Is it late?").input_ids
    whole = tokenizer("Is it late?" + response).input_ids
    assert whole[: len(prompt)] == prompt
    tokens = [*whole[len(prompt) :], tokenizer.eos_token_id]
    assert text_after(tokenizer, prompt, tokens) == response


# --- checkpoints -------------------------------------------------------------------------------


def without_head(weights):
    return {key: weight for key, weight in weights.items() if key != "lm_head.weight"}


CHECKPOINTS = {
    "a reward model": (
        lambda w: without_head(w) | {"score.weight": torch.zeros(1, 64)},
        "lacks lm_head.weight, which would be random (it has score.weight instead)",
    ),
    "no head": (without_head, "lacks lm_head.weight, which would be random"),
    "a value-head wrapper": (
        lambda w: {f"pretrained_model.{k}": x for k, x in w.items()}
        | {"v_head.summary.weight": torch.zeros(1, 64)},
        "its weights stand under the prefix 'pretrained_model'",
    ),
    "another prefix": (
        lambda w: {f"policy.{k}": x for k, x in w.items()},
        "its weights stand under the prefix 'policy'",
    ),
    "a table of another size": (
        lambda w: w | {"lm_head.weight": w["lm_head.weight"][:50].clone()},
        "lm_head.weight has the sizes (50, 64)",
    ),
    "NaN": (
        lambda w: w | {"model.norm.weight": w["model.norm.weight"] * torch.nan},
        "its weight model.norm.weight holds NaN or infinity",
    ),
    "infinity at one token": (
        lambda w: w | {"lm_head.weight": w["lm_head.weight"].index_fill(
            0, torch.tensor([7]), torch.inf)},
        "its weight lm_head.weight holds NaN or infinity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_bug_weights_that_are_not_there_or_spoilt_are_refused(
    what, models, pairs, capsys, tmp_path
):
    """By every command, in every role; exit 0 with the numbers of random weights, once."""
    change, sentence = CHECKPOINTS[what]
    bad = shutil.copytree(models(), tmp_path / "bad")
    weights = bad / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    good, data = models(), ("--data", pairs)
    html = ("--html", tmp_path / "page.html")
    for argv in (
        ("inspect", "--policy", bad, "--reference", good, *data, *html),
        ("inspect", "--policy", good, "--reference", bad, *data, *html),
        ("dpo", "--model", good, "--reference", bad, *data, "--output-dir", tmp_path / "a"),
        ("reward", "--model", bad, *data, "--output-dir", tmp_path / "b"),
        ("search", "--policy", bad, *data, "--output", tmp_path / "answers.jsonl"),
        ("search", "--policy", good, *data, "--output", tmp_path / "answers.jsonl",
         "--decoder", "guided", "--beta", "0.1", "--guide", bad),
    ):  # fmt: skip
        assert sentence in fail(capsys, *argv), argv
    assert not (tmp_path / "page.html").exists() and not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("model.safetensors", b"", "model.safetensors is empty"),
        ("model.safetensors", b"\x10" * 400, "is torn: its 400 bytes are not what its header says"),
        ("model.safetensors", b"version https://git-lfs", "is a pointer of git-lfs"),
        ("config.json", b"", "config.json is torn or empty: it is not JSON"),
        ("config.json", b"[1]", "config.json is damaged: it holds no JSON object"),
        ("tokenizer.json", b'{"x', "tokenizer.json is torn or empty: it is not JSON"),
    ],
)
def test_bug_a_damaged_file_is_named(file, content, sentence, models, pairs, capsys, tmp_path):
    bad = shutil.copytree(models(), tmp_path / "bad")
    (bad / file).write_bytes(content)
    err = fail(capsys, "inspect", "--policy", bad, "--reference", models(), "--data", pairs,
               "--html", tmp_path / "page.html")  # fmt: skip
    assert sentence in err and str(bad) in err


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("tiny", "The model tiny has no tokenizer of its own; pass --tokenizer"),
        ("{model}/model.safetensors", "is a file; pass the directory in which the tokenizer is"),
        ("{tmp}", "holds no tokenizer, and no file in it names the model"),
        ("no/such", "Could not read the tokenizer 'no/such' as a directory or from the hub"),
    ],
)
def test_bug_what_is_no_directory_of_a_model_is_said(
    policy, sentence, models, pairs, capsys, tmp_path
):
    name = policy.format(model=models(), tmp=tmp_path)
    err = fail(capsys, "search", "--policy", name, "--data", pairs,
               "--output", tmp_path / "answers.jsonl")  # fmt: skip
    assert sentence in err


# --- how a text begins, and whose tokens it is made of -----------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "llama3"])
def test_bug_a_prompt_begins_as_its_tokenizer_begins_a_text(family, models, capsys, tmp_path):
    """Once, typed or not; log π is that of transformers on the tokenizer's own ids."""
    tokenizer = families.FAMILIES[family]()
    policy, reference = models(family, 1), models(family, 0)
    texts = "Is it late?", f"{tokenizer.bos_token}Is it late?"
    plain, typed = (
        numbers_of(capsys, tmp_path, policy, reference, "--prompt", text, "--response", " No, late")
        for text in texts
    )
    assert plain["prompt_ids"] == tokenizer(texts[0]).input_ids == typed["prompt_ids"]
    assert plain["prompt_ids"][0] == tokenizer.bos_token_id
    chosen = plain["responses"][0]
    assert chosen == typed["responses"][0]
    ids = torch.tensor([plain["prompt_ids"] + chosen["ids"]])
    with torch.no_grad():
        logp = AutoModelForCausalLM.from_pretrained(policy)(ids).logits[0, :-1].log_softmax(-1)
    expected = logp.gather(1, ids[0, 1:, None])[-len(chosen["ids"]) :, 0]
    torch.testing.assert_close(torch.tensor(chosen["logp"]), expected, atol=1e-5, rtol=1e-5)


def test_bug_a_typed_begin_token_is_counted_and_a_second_one_refused(models, capsys, write_jsonl):
    rows = [PAIR, PAIR | {"prompt": "<s>Late?"}, PAIR | {"prompt": "<s><s>Late?"}]
    path = write_jsonl("rows.jsonl", rows)
    out = succeed(
        capsys, "data", "check", path, "--tokenizer", models("llama"), "--max-quarantine", "0.5"
    )
    assert "begin tokens typed (each counts once): 1 (row 2)" in out
    assert "1 x prompt contains the special token <s> as text (row 3)" in out


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A model whose tokenizer has as many tokens as gpt2's, two of them exchanged."""
    tokenizer = families.gpt2()
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = inner["model"]["vocab"]
    one, two = (next(t for t, i in vocabulary.items() if i == n) for n in (300, 301))
    vocabulary[one], vocabulary[two] = 301, 300
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)),
        eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token,
    )  # fmt: skip
    return families.save(tmp_path_factory.mktemp("stranger"), other, seed=1)


def test_bug_two_tokenizers_of_one_size_are_two_tokenizers(
    stranger, models, pairs, write_jsonl, capsys, tmp_path
):
    good, data, out = models(), ("--data", pairs), ("--output", tmp_path / "answers.jsonl")
    search = ("search", "--policy", good, *data, *out)
    judge = ("--reward", tmp_path / "judge")
    texts = write_jsonl("sft.jsonl", [{"prompt": PAIR["prompt"], "completion": " No."}] * 10)
    ppo = ("ppo", "--model", good, "--data", texts, *FEW)
    succeed(capsys, "reward", "--model", stranger, *data, "--output-dir", judge[1], *FEW)
    for role, argv in (
        ("reference", ("inspect", "--policy", good, "--reference", stranger, *data,
                       "--html", tmp_path / "page.html")),
        ("reference", ("dpo", "--model", good, "--reference", stranger, *data,
                       "--output-dir", tmp_path / "a")),
        ("guide", (*search, "--guide", stranger, "--decoder", "guided", "--beta", "0.1")),
        ("reference", (*search, "--reference", stranger)),
        ("tuned model", (*search, "--tuned", stranger, "--untuned", models(seed=1))),
        ("reference", (*ppo, "--reference", stranger, *judge, "--output-dir", tmp_path / "b")),
        ("reward model", (*ppo, *judge, "--output-dir", tmp_path / "c")),
    ):  # fmt: skip
        err = fail(capsys, *argv)
        assert f"policy's tokenizer and the {role}'s are not the same: token 300 is" in err


# --- the objective that a run records ----------------------------------------------------------


class DPOConfig:
    """As TRL's: an object whose settings are its attributes."""

    def __init__(self, **settings):
        plain = {"beta": 0.3, "loss_type": ["sigmoid"], "label_smoothing": 0.0}
        self.__dict__.update(plain | settings)


@pytest.mark.parametrize(
    ("settings", "column"),
    [({}, "advantage"), ({"loss_type": ["ipo"]}, "log_ratio"),
     ({"label_smoothing": 0.1}, "log_ratio"), (None, "log_ratio")],
)  # fmt: skip
def test_bug_beta_and_loss_are_read_from_trls_own_file(
    settings, column, models, pairs, capsys, tmp_path
):
    """By inspect, search and diagnose alike; a truncated file (None) is an unknown objective."""
    policy = shutil.copytree(models(seed=1), tmp_path / "policy")
    torch.save(DPOConfig(**(settings or {})), policy / "training_args.bin")
    if settings is None:
        content = (policy / "training_args.bin").read_bytes()
        (policy / "training_args.bin").write_bytes(content[:200])
    log = [{"step": i, "rewards/chosen": 0.1 * i, "rewards/rejected": -0.1 * i} for i in range(9)]
    (policy / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    numbers = numbers_of(capsys, tmp_path, policy, models(), "--data", pairs)
    response = numbers["responses"][0]
    guided = ("search", "--policy", models(), "--guide", policy, "--decoder", "guided", "--data",
              pairs, "--output", tmp_path / "a.jsonl", "--max-new-tokens", "2")  # fmt: skip
    assert numbers["column"] == column and column in response
    if column == "log_ratio":
        assert "advantage" not in response and "value" not in response
        assert "training_args.bin" in fail(capsys, *guided)
        assert "training_args.bin" in fail(capsys, "diagnose", policy)
        return
    assert numbers["beta"] == 0.3
    difference = torch.tensor(response["logp"]) - torch.tensor(response["ref_logp"])
    torch.testing.assert_close(
        torch.tensor(response[column]), 0.3 * difference, atol=1e-5, rtol=1e-5
    )
    succeed(capsys, *guided)
    assert "beta                   0.3" in succeed(capsys, "diagnose", policy)


# --- logs --------------------------------------------------------------------------------------


def state_of(chosen) -> str:
    log = [{"step": i, "rewards/chosen": x, "rewards/rejected": -0.1 * i}
           for i, x in enumerate(chosen)]  # fmt: skip
    return json.dumps({"global_step": len(log), "log_history": log})


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), "0.4", None, [1], {}, True, 10**400])
def test_bug_what_is_no_number_in_a_log_is_left_out_and_said(odd, capsys, tmp_path):
    """Four finite lines of twelve are diagnosed; the file itself says the same as its directory."""
    path = tmp_path / "trainer_state.json"
    path.write_text(state_of([0.0, 0.1, 0.2, 0.3] + [odd] * 8))
    out = succeed(capsys, "diagnose", tmp_path, "--beta", "0.1")
    assert "8 of the log's 12 lines are left out, the first at step 4: its rewards/chosen is" in out
    for line in ("chosen                 0.25", "rejected               -0.25", "margin "):
        assert line in out
    assert succeed(capsys, "diagnose", path, "--beta", "0.1") == out
    path.write_text(state_of([odd] * 9))
    err = fail(capsys, "diagnose", tmp_path, "--beta", "0.1")
    assert "needs 3 lines" in err and "9 of the log's 9 lines are left out" in err


@pytest.mark.parametrize("content", ["[1, 2]", "3", "{", "", '{"log_history": {}}'])
def test_bug_a_log_that_is_none_is_one_sentence(content, capsys, tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(content)
    for run in (tmp_path, path):
        assert str(path) in fail(capsys, "diagnose", run, "--beta", "0.1")
    assert "empty name" in fail(capsys, "diagnose", "", "--beta", "0.1")


# --- rows --------------------------------------------------------------------------------------

NEST = "[" * 3000 + "]" * 3000
ODD_ROWS = {
    "half an emoji": (json.dumps(PAIR | {"chosen": " a\ud83d"}), "chosen has half a character"),
    "5,000 digits": (
        json.dumps(PAIR).replace('"Question: is it late?"', "1" * 5000),
        "prompt is a number, not text",
    ),
    "nested": (
        json.dumps(PAIR | {"x": 0}).replace(": 0}", f": {NEST}}}"),
        "the row is nested too deeply",
    ),
    "no object": ("[1]", "the row is a list, not an object"),
    "no letter": (json.dumps(PAIR | {"prompt": " "}), "prompt is empty"),
}


@pytest.mark.parametrize("what", ODD_ROWS)
def test_bug_an_odd_row_is_in_quarantine_with_its_number(
    what, models, write_jsonl, capsys, tmp_path
):
    """data check and training name it alike and use the others; inspect and search refuse it."""
    row, reason = ODD_ROWS[what]
    path = write_jsonl("rows.jsonl", [PAIR, row, *[PAIR | {"chosen": f" {i}"} for i in range(8)]])
    argv = ("data", "check", path, "--tokenizer", models(), "--max-quarantine", "0.5")
    out = succeed(capsys, *argv)
    assert "usable rows: 9" in out and f"1 x {reason}" in out and "(row 2)" in out
    run = tmp_path / "run"
    succeed(capsys, "dpo", "--model", models(), "--data", path, "--output-dir", run, *FEW,
            "--max-quarantine", "0.9")  # fmt: skip
    (fault,) = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert fault["row"] == 2 and fault["reason"].startswith(reason)
    err = fail(capsys, "inspect", "--policy", models(), "--reference", models(), "--data", path,
               "--row", "2", "--html", tmp_path / "page.html")  # fmt: skip
    assert reason in err
    if "chosen" not in reason:  # of which a search asks nothing
        err = fail(capsys, "search", "--policy", models(), "--data", path,
                   "--output", tmp_path / "a.jsonl")  # fmt: skip
        assert f"rows.jsonl, row 2: {reason}" in err


def message(role, content):
    return {"role": role, "content": content}


def test_bug_messages_are_read_through_the_template(models, write_jsonl, capsys, tmp_path):
    prompt = [message("user", "Is it late?")]
    answers = {key: [message("assistant", PAIR[key])] for key in ("chosen", "rejected")}
    explicit = write_jsonl("chat.jsonl", [{"prompt": prompt} | answers] * 10)
    implicit = write_jsonl("implicit.jsonl", [{k: prompt + v for k, v in answers.items()}])
    model, tokenizer = models("qwen"), families.qwen()
    assert "usable rows: 10" in succeed(capsys, "data", "check", explicit)
    assert "usable rows: 10" in succeed(capsys, "data", "check", explicit, "--policy", model)
    numbers = numbers_of(capsys, tmp_path, models("qwen", 1), model, "--data", explicit)
    templated = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(numbers["prompt_ids"]) == templated
    dpo = ("dpo", "--model", model, "--output-dir", tmp_path / "run", *FEW)
    assert "8 rows, 0 in quarantine" in succeed(capsys, *dpo, "--data", explicit)
    search = ("search", "--policy", model, "--output", tmp_path / "a.jsonl")
    assert "is a list of messages" in fail(capsys, *search, "--data", explicit)
    for argv in (("data", "check"), (*dpo, "--overwrite", "--data")):
        assert "its prompts are implicit" in fail(capsys, *argv, implicit)
    assert "has no chat template" in fail(capsys, "data", "check", explicit, "--policy", models())


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_bug_a_model_that_training_has_spoilt_is_not_saved(
    command, models, write_jsonl, capsys, tmp_path
):
    """NaN in the last steps, too few to end the run: exit code 1, not 0 beside a broken model."""
    rows = write_jsonl("rows.jsonl", [PAIR | {"completion": f" No! {i}"} for i in range(20)])
    flags = ("--max-steps", "3", "--warmup-steps", "0", "--learning-rate", "1e30")
    argv = (command, "--model", models(), "--data", rows, "--output-dir", tmp_path / "run", *flags)
    assert cli.main([str(a) for a in argv]) == 1
    err = capsys.readouterr().err
    assert "Stopped: " in err and "lower --learning-rate" in err
    assert not (tmp_path / "run" / "model.safetensors").exists()
