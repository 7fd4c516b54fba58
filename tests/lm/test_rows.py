"""Reading rows: what is cut, odd or hostile is read or named, and never ends in a traceback."""

import json
import os
import socket
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from qlearn import cli
from qlearn.errors import InputError
from qlearn.lm.data import PREFERENCE_COLUMNS, SFT_COLUMNS, encode
from qlearn.lm.rows import LONGEST_INTEGER, read_rows
from tests import families

GOOD = {"prompt": "Is it late?", "chosen": " Yes!", "rejected": " No!"}
TALK = {
    "prompt": [{"role": "user", "content": "Late?"}],
    "chosen": [{"role": "assistant", "content": "Yes!"}],
    "rejected": [{"role": "assistant", "content": "No!"}],
}


def line(**changes):
    return json.dumps(GOOD | changes)


def raw(**changes):
    """A good row whose changed columns are JSON as it stands."""
    row = {key: json.dumps(value) for key, value in GOOD.items()} | changes
    return "{" + ", ".join(f'"{key}": {value}' for key, value in row.items()) + "}"


QUARANTINED = {
    "half an emoji": (raw(chosen='" a\\ud83d"'), "chosen has half a character (a lone surrogate)"),
    "half an emoji, second half": (raw(prompt='"\\ude00 a"'), "prompt has half a character"),
    "a huge number": (raw(prompt="1" * 5000), "prompt is a number, not text"),
    "a huge negative number": (raw(rejected="-" + "1" * 9999), "rejected is a number, not text"),
    "NaN": (raw(prompt="NaN"), "prompt is a number, not text"),
    "a truth": (raw(prompt="true"), "prompt is true or false, not text"),
    "nested": (raw(x="[" * 100_000 + "]" * 100_000), "the row is nested too deeply"),
    "nested objects": (raw(prompt='{"a":' * 9000 + "1" + "}" * 9000), "nested too deeply"),
    "a key twice": (raw()[:-1] + ', "chosen": " Maybe."}', "the row names chosen twice"),
    "no object": ("[1, 2]", "the row is a list, not an object"),
    "null": ("null", "the row is null, not an object"),
    "no messages": (line(prompt=[1]), "prompt is a list, but not one of messages"),
    "no role": (line(prompt=[{"content": "x"}]), "prompt is a list, but not one of messages"),
    "a picture": (line(**TALK | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}),
                  "prompt has a message whose content is a list, not text"),
    "half a text": (line(prompt=TALK["prompt"]), "prompt is messages, chosen is text"),
    "no turn": (line(**TALK | {"chosen": []}), "chosen is empty"),
    "an empty turn": (line(**TALK | {"chosen": [{"role": "assistant", "content": " "}]}),
                      "chosen is empty"),
    "a surrogate in a turn": (line(**TALK | {"chosen": [{"role": "a", "content": "\ud83d"}]}),
                              "chosen has half a character"),
}  # fmt: skip
READ = {
    "a huge number elsewhere": raw(id="1" * 5000),
    "NaN elsewhere": raw(score="NaN"),
    "nested elsewhere": raw(x="[" * 50 + "]" * 50),
    "a whole emoji in halves": raw(chosen='" \\ud83d\\ude00"'),
    "a NUL": line(prompt="a\x00b"),
    "line separators of Unicode": line(prompt="a\u2028b\u0085c"),
    "a huge line": line(note="x" * 2_000_000),
    "spaces around": f"  {line()}\t",
}


@pytest.mark.parametrize("name", QUARANTINED)
def test_bug_an_odd_row_goes_into_quarantine_with_its_number(name, write_jsonl, capsys):
    """From the command line too: the other rows are read, and nobody meets a traceback."""
    text, reason = QUARANTINED[name]
    path = write_jsonl("rows.jsonl", [line(), text, line(prompt="And now?")])
    rows = read_rows(path, PREFERENCE_COLUMNS)
    examples, faults = encode(rows, PREFERENCE_COLUMNS, families.qwen(), 64)
    assert [example.row for example in examples] == [1, 3]
    assert [fault.row for fault in faults] == [2] and reason in faults[0].reason
    assert len(faults[0].preview) <= 120
    assert cli.main(["data", "check", path, "--max-quarantine", "0.5"]) == 0
    out = capsys.readouterr().out
    assert f"1 x {faults[0].reason} (row 2)" in out and "usable rows: 2" in out


@pytest.mark.parametrize("name", READ)
def test_bug_an_odd_row_that_is_whole_is_read(name, write_jsonl, capsys):
    path = write_jsonl("rows.jsonl", [READ[name], line(prompt="And now?")])
    rows = read_rows(path, PREFERENCE_COLUMNS)
    examples, faults = encode(rows, PREFERENCE_COLUMNS, families.qwen(), 64)
    assert [example.row for example in examples] == [1, 2] and not faults


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.JSONL", "rows.Jsonl"])
def test_bug_files_of_other_systems_are_read(end, mark, name, tmp_path):
    """A byte-order mark, line ends of Windows and of the old Mac, a name in capitals."""
    path = tmp_path / name
    path.write_bytes(mark + end.join([line(), line(prompt="b")]).encode())
    assert [row["prompt"] for _, row in read_rows(str(path), PREFERENCE_COLUMNS)] == [
        GOOD["prompt"],
        "b",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe" + line().encode("utf-16-le"), "is not UTF-8 text"),
        (b"\x00" * 64, "line 1: not valid JSON"),
        (line().encode() + b"\n" + line().encode()[:20], "line 2: not valid JSON"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n", "is empty"),
        (
            raw(x="[" * 99_999 + "]" * 99_999).encode(),
            "the first is row 1: the row is nested too deeply",
        ),
    ],
)
def test_claim_a_file_that_cannot_be_read_gets_one_sentence(content, sentence, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert cli.main(["data", "check", str(path)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_claim_parquet_columns_of_any_type_are_read(tmp_path):
    """Messages are lists of structs; a column that is not needed may hold anything."""
    texts = {key: [value] * 3 for key, value in GOOD.items()}
    odd = {"raw": [b"\xff"] * 3, "deep": [[[1]], None, []]}
    odd["when"] = pyarrow.array([2**62] * 3, pyarrow.timestamp("ms"))  # no date of Python's
    path = parquet(tmp_path / "ROWS.PARQUET", **texts, **odd)
    rows = read_rows(path, PREFERENCE_COLUMNS)
    assert rows[2] == (3, GOOD | {"raw": None, "deep": None, "when": None})
    more = {"tools": "[]", "chat_template_kwargs": {"mood": "torn"}}
    talk = parquet(
        tmp_path / "talk.parquet", **{key: [value] for key, value in (TALK | more).items()}
    )
    assert read_rows(talk, PREFERENCE_COLUMNS) == [(1, TALK | more)]
    examples, faults = encode(
        read_rows(talk, PREFERENCE_COLUMNS), PREFERENCE_COLUMNS, families.qwen(), 64
    )
    assert len(examples) == 1 and not faults


def test_claim_odd_values_of_parquet_go_into_quarantine(tmp_path):
    broken = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    other = {"chosen": [" Yes!"] * 3, "rejected": [" No!"] * 3}
    rows = read_rows(parquet(tmp_path / "a.parquet", prompt=broken, **other), PREFERENCE_COLUMNS)
    examples, faults = encode(rows, PREFERENCE_COLUMNS, families.qwen(), 64)
    assert [e.row for e in examples] == [1, 3] and [fault.row for fault in faults] == [2]
    assert "the row cannot be read" in faults[0].reason
    rows = read_rows(
        parquet(tmp_path / "b.parquet", prompt=[b"a", None, b"c"], **other), PREFERENCE_COLUMNS
    )
    _, faults = encode(rows, PREFERENCE_COLUMNS, families.qwen(), 64)
    assert faults[0].reason == "prompt is binary data, not text"
    assert faults[1].reason == "prompt is missing or None"


def test_claim_parquet_files_without_rows_or_columns_are_named(tmp_path):
    empty = parquet(tmp_path / "a.parquet", prompt=pyarrow.array([], pyarrow.string()))
    with pytest.raises(InputError, match="is empty: it holds no row"):
        read_rows(empty, SFT_COLUMNS)
    twice = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(InputError, match="is not a readable parquet file"):
        read_rows(str(tmp_path / "b.parquet"), SFT_COLUMNS)
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="is not a readable parquet file"):
        read_rows(str(tmp_path / "c.parquet"), SFT_COLUMNS)


def test_claim_implicit_prompts_and_whole_conversations_are_asked_for(write_jsonl, capsys):
    """Neither is guessed, and the sentence says what to write."""
    turn = TALK["prompt"]
    cases = [
        ({"chosen": turn + TALK["chosen"], "rejected": turn + TALK["rejected"]},
         "its prompts are implicit, the beginning that chosen and rejected share"),
        ({"chosen": "Late? Yes!", "rejected": "Late? No!"}, "its prompts are implicit"),
        ({"messages": turn + TALK["chosen"]}, "into a column prompt and the last, as a list"),
    ]  # fmt: skip
    for row, sentence in cases:
        path = write_jsonl("rows.jsonl", [row])
        assert cli.main(["data", "check", path]) == 2
        err = capsys.readouterr().err
        assert sentence in err and "Rename" not in err


def test_claim_messages_need_a_chat_template(write_jsonl, tmp_path, capsys):
    path = write_jsonl("rows.jsonl", [TALK])
    for family in ("gpt2", "qwen"):
        families.FAMILIES[family]().save_pretrained(tmp_path / family)
    assert cli.main(["data", "check", path]) == 0
    assert cli.main(["data", "check", path, "--tokenizer", str(tmp_path / "qwen")]) == 0
    assert "usable rows: 1" in capsys.readouterr().out
    assert cli.main(["data", "check", path, "--tokenizer", str(tmp_path / "gpt2")]) == 2
    err = capsys.readouterr().err
    assert "The rows are messages, but the tokenizer has no chat template" in err


def test_claim_what_a_template_refuses_goes_into_quarantine():
    """Gemma's template has no system turn, and says so."""
    tokenizer = families.qwen()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + families.CHAT
    )
    system = TALK | {"prompt": [{"role": "system", "content": "Be kind."}, *TALK["prompt"]]}
    examples, faults = encode([(1, system), (2, TALK)], PREFERENCE_COLUMNS, tokenizer, 64)
    assert [example.row for example in examples] == [2]
    assert faults[0].reason == "the chat template refuses its messages: no system turn"


def test_claim_data_check_needs_no_tokenizer(write_jsonl, tmp_path, capsys):
    """Structure without, lengths with one; a policy's own context is the limit."""
    path = write_jsonl("rows.jsonl", [GOOD, GOOD, GOOD | {"prompt": "late " * 300}])
    assert cli.main(["data", "check", path]) == 0
    out = capsys.readouterr().out
    assert "usable rows: 3" in out and "duplicates: 1" in out and "tokens: least" not in out
    folder = families.save(tmp_path / "policy", families.llama())
    assert cli.main(["data", "check", path, "--policy", folder, "--max-quarantine", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "prompt     tokens: least" in out and "longer than the context of 256 (row 3)" in out
    assert cli.main(["data", "check", path, "--max-length", "9"]) == 2


ASK = """
import sys, time
from qlearn import cli
import qlearn.lm.check, datasets
start = time.perf_counter()
code = cli.main(sys.argv[1:])
print(code, time.perf_counter() - start)
"""


@pytest.fixture
def silent_port():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("what", ["tokenizer", "data", "silent"])
def test_bug_a_hub_out_of_reach_is_said_within_five_seconds(
    what, write_jsonl, tmp_path, silent_port
):
    """No port of this machine listens at 9. It took 47 s for a tokenizer, 23 s for data."""
    path = write_jsonl("rows.jsonl", [GOOD])
    argv = ["nobody/nothing"] if what == "data" else [path, "--tokenizer", "nobody/nothing"]
    address = f"http://127.0.0.1:{silent_port if what == 'silent' else 9}"
    away = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ASK, "data", "check", *argv],
        env=os.environ | away, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    code, seconds = done.stdout.split()[-2:]
    assert code == "2" and float(seconds) < 5, done.stderr
    assert f"the hub at {address} cannot be reached" in done.stderr


def test_claim_messages_are_trained_on_and_inspected(write_jsonl, tmp_path, capsys):
    """SFT, DPO and the inspector, each from messages through the template of a Qwen-like model."""
    start = families.save(tmp_path / "start", families.qwen())
    answers = [{"role": "assistant", "content": "Not at all!"}]
    pairs = write_jsonl("pairs.jsonl", [TALK, TALK | {"chosen": answers}] * 4)
    turns = write_jsonl(
        "turns.jsonl", [{"prompt": TALK["prompt"], "completion": TALK["chosen"]}] * 8
    )
    few = ["--max-steps", "1", "--eval-fraction", "0.25"]
    sft, dpo = str(tmp_path / "sft"), str(tmp_path / "dpo")
    for argv in (
        ["sft", "--model", start, "--data", turns, "--output-dir", sft, *few],
        ["dpo", "--model", sft, "--data", pairs, "--output-dir", dpo, *few],
        ["inspect", "--policy", dpo, "--reference", sft, "--data", pairs, "--row", "2",
         "--html", str(tmp_path / "page.html")],
    ):  # fmt: skip
        assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "' all'" in out and "<|im_end|>" in out


def test_claim_integers_are_read_up_to_the_length_that_python_reads(write_jsonl):
    """A longer one is never used, so that infinity stands for it."""
    digits = "1" * LONGEST_INTEGER
    path = write_jsonl("rows.jsonl", [raw(id=digits), raw(id=digits + "1")])
    longest, longer = (row["id"] for _, row in read_rows(path, PREFERENCE_COLUMNS))
    assert longest == (10**LONGEST_INTEGER - 1) // 9 and longer == float("inf")
