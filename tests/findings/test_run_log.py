"""The log of a run: found where it lies, and any odd one refused in one sentence."""

import json

import pytest

from qlearn.errors import InputError
from qlearn.findings import run_log

LINE = {"step": 1, "rewards/chosen": 0.25}


def test_claim_the_file_and_its_directory_are_one_log(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps(LINE) + "\r\n\r\n", encoding="utf-8-sig")  # a mark, CRLF, a gap
    assert run_log.read_metrics(str(log)) == run_log.read_metrics(str(tmp_path)) == [LINE]


def test_claim_the_checkpoint_with_the_most_steps_speaks(tmp_path):
    """By its global_step, not by the order of names; a step that is no number counts as none."""
    for folder, step in {"checkpoint-500": 500, "checkpoint-1000": 1000, "odd": "9999"}.items():
        (tmp_path / folder).mkdir()
        state = {"global_step": step, "log_history": [LINE | {"step": step}]}
        (tmp_path / folder / "trainer_state.json").write_text(json.dumps(state))
    assert run_log.read_metrics(str(tmp_path)) == [LINE | {"step": 1000}]


def test_claim_our_log_goes_before_trls(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    assert run_log.read_metrics(str(tmp_path)) == [LINE]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metrics.jsonl", b'{"a": 1}\n[1]\n', "line 2: not an object of logged numbers"),
        ("metrics.jsonl", b'{"a": ', "cannot be read as JSON"),
        ("metrics.jsonl", b"\xff\xfe{\x00", "not UTF-8"),
        ("metrics.jsonl", b"\x1f\x8b\x08\x00", "not UTF-8"),  # gzip
        ("trainer_state.json", b"", "cannot be read as JSON"),
        ("trainer_state.json", b"[]", "holds a list"),
        ("trainer_state.json", b"null", "holds null"),
        ("trainer_state.json", b"{}", "has no log_history"),
        ("trainer_state.json", b'{"log_history": [1]}', "has no log_history"),
        ("trainer_state.json", b'{"log_history": [{}, 1]}', "has no log_history"),
        ("trainer_state.json", b"[" * 100_000, "cannot be read as JSON"),
        ("trainer_state.json", b'{"log_history": ' + b"9" * 5000 + b"}", "cannot be read"),
    ],
)
def test_bug_an_odd_log_is_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        run_log.read_metrics(str(tmp_path))


def test_claim_no_log_is_said(tmp_path):
    with pytest.raises(InputError, match=r"holds neither metrics\.jsonl nor trainer_state\.json"):
        run_log.read_metrics(str(tmp_path))
    with pytest.raises(InputError, match="There is no file or directory"):
        run_log.read_metrics(str(tmp_path / "none"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.1", [1], {}, True, 10**400])
def test_bug_what_is_no_number_is_not_finite(value):
    assert not run_log.is_finite(value)
    assert run_log.is_finite(0) and run_log.is_finite(-0.5)
