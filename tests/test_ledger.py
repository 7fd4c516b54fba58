"""The claims ledger, the chapters and the results files say the same."""

import json
import re
import sys
from pathlib import Path

import pytest

from qlearn.results import __main__ as results_main

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
sys.path[:0] = [str(BOOK / "_ext"), str(ROOT / "tools")]

import ledger  # noqa: E402
import write_ledger  # noqa: E402

PAGES = sorted(BOOK.glob("[0-9][0-9]-*.md"))
ROLE = re.compile(r"\{verdict\}`([^`]+)`")


def test_the_ledger_is_what_claims_and_results_say():
    assert ledger.FILE.read_text(encoding="utf-8") == write_ledger.text(), (
        "qlearn/results/claims.json is stale: python tools/write_ledger.py"
    )


def test_every_measured_claim_is_settled_in_its_chapter():
    named = {(page.stem, name) for page in PAGES for name in ROLE.findall(page.read_text("utf-8"))}
    assert named == {(entry["chapter"], name) for name, entry in ledger.written().items()}


def test_every_chapter_with_claims_has_its_section():
    text = (BOOK / "claims.md").read_text(encoding="utf-8")
    section = r"^## \{doc\}`([^`]+) <([^`]+)>`\n\n```\{claims-ledger\} \2\n```$"
    chapters = sorted({entry["chapter"] for entry in ledger.written().values()})
    assert re.findall(section, text, re.M) == [
        (re.search(r"^# (.+)$", (BOOK / f"{name}.md").read_text(encoding="utf-8"), re.M)[1], name)
        for name in chapters
    ]


@pytest.mark.parametrize("name, entry", ledger.written().items())
def test_an_entry_says_whose_claim_it_is_and_why_it_is_not_tested(name, entry):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert {"claim", "chapter", "source"} <= set(entry) <= ledger.KEYS
    assert entry["source"] in ledger.VERDICTS and entry["claim"].endswith(".")
    assert entry["source"] == "course" or entry["paper"]
    assert entry.get("checks") or entry.get("note"), "without checks a note must say why"


def test_every_results_file_has_its_command():
    files = {path.stem: path for path in ledger.FILE.parent.glob("*.json")} | {}
    del files[ledger.FILE.stem]
    assert set(files) == set(results_main.MEASUREMENTS)
    for name, path in files.items():
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["command"] == f"python -m qlearn.results {name}"
        assert found["seeds"] == list(results_main.MEASUREMENTS[name][1])


@pytest.fixture
def planted(tmp_path, monkeypatch):
    numbers = {
        "seeds": [0, 1, 2], "command": "python -m qlearn.results sample", "law": 0.42, "far": 3.0,
        "x": {"mean": 0.5, "low": 0.4, "high": 0.6, "seeds_low": 0.1, "seeds_high": 0.9},
        "bare": {"mean": 0.5},
    }  # fmt: skip
    (tmp_path / "sample.json").write_text(json.dumps(numbers))
    monkeypatch.setattr("qlearn.results.files", lambda package: tmp_path)


@pytest.mark.parametrize("check, met", {
    "sample:x above 0.39": True, "sample:x above 0.4": False, "sample:x above 0.45": False,
    "sample:x (seeds) above 0.39": False, "sample:x (seeds) above 0.05": True,
    "sample:x below 0.61": True, "sample:x below 0.55": False,
    "sample:x within 0.3 and 0.7": True, "sample:x within 0.3 and 0.55": False,
    "sample:x within 0.45 and 0.7": False, "sample:x (seeds) within 0.3 and 0.7": False,
    "sample:x near 0.55": True, "sample:x near 0": False,
    "sample:x near sample:law": True, "sample:x near sample:far": False,
    "sample:far above sample:x": True, "sample:x above sample:law": False,
    "sample:law above 0.4": True, "sample:law below -1": False,
    "sample:far above sample:bare": True,
}.items())  # fmt: skip
def test_checks_are_decided_by_the_whole_interval(planted, check, met):
    assert ledger.measure(check).met is met


@pytest.mark.parametrize("check, reason", {
    "sample:x over 0.3": "is not `FILE:path above X`",
    "sample:nothing above 0": "has no key 'nothing'",
    "nowhere:x above 0": "no results file nowhere.json",
    "sample:bare above 0": "has no low and high",
    "sample:law (seeds) above 0": "without an interval over seeds",
    "sample:command above 0": "is no number and no interval",
    "sample:law above sample:command": "is no number and no interval",
}.items())  # fmt: skip
def test_checks_that_cannot_be_decided_say_why(planted, check, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        ledger.measure(check)


def test_verdicts_follow_from_checks():
    assert ledger.verdict("paper", [True, True]) == "reproduced"
    assert ledger.verdict("course", [True]) == "holds"
    assert ledger.verdict("paper", [True, False]) == ledger.verdict("course", [0, 1]) == "partly"
    assert ledger.verdict("paper", [False]) == "not reproduced"
    assert ledger.verdict("course", [False, False]) == "does not hold"
    assert ledger.verdict("paper", []) == ledger.verdict("course", []) == ledger.UNTESTED


def test_a_changed_result_changes_the_ledger(planted, monkeypatch, tmp_path):
    """Were a file to change alone, `test_the_ledger_is_what_claims_and_results_say` would fail."""
    entry = {"claim": "C.", "chapter": "c", "source": "course", "checks": ["sample:law above 0.4"]}
    monkeypatch.setattr(ledger, "written", lambda: {"c": entry})
    assert ledger.tendencies()["c"].verdict == "holds"
    before = ledger.tendencies()["c"]
    numbers = json.loads((tmp_path / "sample.json").read_text()) | {"law": 0.39}
    (tmp_path / "sample.json").write_text(json.dumps(numbers))
    after = ledger.tendencies()["c"]
    assert (before.measured, after.measured) == (
        [0.42],
        [0.39],
    ) and after.verdict == "does not hold"
    assert after.seeds == [3] and after.command == ["python -m qlearn.results sample"]


def test_an_unknown_measurement_is_refused_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results", "tiny_dop"])
    with pytest.raises(SystemExit):
        results_main.main()
    assert "no measurement 'tiny_dop'; choose from tiny_dpo, " in capsys.readouterr().err
