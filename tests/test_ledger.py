"""The claims ledger, the chapters and the results files say the same."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlearn.results import __main__ as results_main

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
sys.path[:0] = [str(BOOK / "_ext"), str(ROOT / "tools")]

import checks  # noqa: E402
import claim_history  # noqa: E402
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
    assert entry["source"] in ledger.SOURCES and entry["claim"].endswith(".")
    assert entry["source"] == "course" or entry["paper"]
    assert entry.get("checks") or entry.get("note"), "without checks a note must say why"


def test_every_results_file_has_its_command():
    files = {path.stem: path for path in ledger.FILE.parent.glob("*.json")}
    for name in ("claims", "stated", "rejected_worlds"):  # two generated, one on record
        del files[name]
    assert set(files) == set(results_main.MEASUREMENTS)
    for name, path in files.items():
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["command"] == f"python -m qlearn.results {name}"
        assert found["seeds"] == list(results_main.MEASUREMENTS[name][1])


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """plant(name, numbers) writes a results file that checks then read."""
    monkeypatch.setattr("qlearn.results.files", lambda package: tmp_path)

    def write(name="sample", **numbers):
        made = {"seeds": [0, 1, 2, 3, 4], "command": f"python -m qlearn.results {name}"} | numbers
        (tmp_path / f"{name}.json").write_text(json.dumps(made))

    return write


def over_posts(mean, half, **more):
    return {"mean": mean, "low": mean - half, "high": mean + half} | more


def over_seeds(mean, half):
    return over_posts(mean, half, least=mean - half / 2, most=mean + half / 2)


def arms(first, second):
    return [{"a": {"x": x}, "b": {"x": y}} for x, y in zip(first, second, strict=True)]


def decided(check):
    found = checks.decide(check)
    return found.verdict, found.reason


HOLDS, CONTRADICTED = (checks.HOLDS, ""), (checks.CONTRADICTED, "")
POWER, SEEDS, BARE, CEILING, CONTROL = (
    (checks.UNDECIDED, x) for x in ("power", "seeds", "interval", "ceiling", "control")
)


@pytest.mark.parametrize("check, expected", {
    "sample:x above 0.39": HOLDS, "sample:x above 0.45": POWER, "sample:x above 0.61": CONTRADICTED,
    "sample:x (seeds) above 0.39": POWER, "sample:x (seeds) above 0.05": HOLDS,
    "sample:x below 0.61": HOLDS, "sample:x below 0.55": POWER, "sample:x below 0.1": CONTRADICTED,
    "sample:x within 0.3 and 0.7": HOLDS, "sample:x within 0.3 and 0.55": POWER,
    "sample:x within 0.7 and 0.9": CONTRADICTED, "sample:x (seeds) within 0.3 and 0.7": POWER,
    "sample:x above sample:exact.law": POWER, "sample:x below sample:exact.far": HOLDS,
    "sample:exact.far above sample:x": HOLDS, "sample:exact.law above 0.4": HOLDS,
    "sample:bare above 0": BARE, "sample:x above sample:bare": BARE,
}.items())  # fmt: skip
def test_claim_the_whole_interval_decides(plant, check, expected):
    plant(x=over_posts(0.5, 0.1, seeds_low=0.1, seeds_high=0.9), bare=0.42,
          exact={"law": 0.42, "far": 3.0})  # fmt: skip
    assert decided(check) == expected


@pytest.mark.parametrize("half, margin, expected", [
    (0.02, 0.05, HOLDS),  # narrow, inside the margin
    (0.20, 0.05, POWER),  # contains the number: which proves nothing
    (0.02, 0.01, POWER), (0.001, 0.005, CONTRADICTED),
])  # fmt: skip
def test_claim_equal_needs_a_margin_and_enough_data(plant, half, margin, expected):
    plant(x=over_posts(0.51, half))
    assert decided(f"sample:x equals 0.5 margin {margin}") == expected
    with pytest.raises(ValueError, match="is not `FILE:path above X`"):
        checks.decide("sample:x equals 0.5")


def test_claim_an_effect_that_is_too_small_contradicts(plant):
    plant(x=over_posts(-0.008, 0.004))
    assert decided("sample:x below 0") == HOLDS
    assert decided("sample:x below -0.02") == CONTRADICTED
    assert decided("sample:x below -0.01") == POWER


@pytest.mark.parametrize("n, verdict", [(2, SEEDS), (3, SEEDS), (5, SEEDS), (6, None), (10, None)])
def test_claim_so_few_runs_decide_no_difference(plant, n, verdict):
    """All runs agree, by far: below six pairs no p is below 0.05, whichever way it points."""
    plant(seeds=list(range(n)), per_seed=arms([9.0 + i / 10 for i in range(n)], [1.0] * n),
          mean={"a": over_seeds(9.2, 0.2), "b": over_seeds(1, 0.2)})  # fmt: skip
    paths = ("sample:per_seed.*.a.x", "sample:per_seed.*.b.x"), ("sample:mean.a", "sample:mean.b")
    for a, b in paths:
        assert decided(f"{a} above {b}") == (verdict or HOLDS)
        assert decided(f"{a} below {b}") == (verdict or CONTRADICTED)
        evidence = checks.decide(f"{a} above {b}").evidence
        assert evidence.least_p == 2.0 ** (1 - n)
    assert checks.decide(f"{paths[0][0]} above {paths[0][1]}").evidence.p == evidence.least_p


def test_claim_five_seeds_can_show_equivalence_but_not_its_opposite(plant):
    """Two one-sided tests: each can reach 1/32. Three seeds cannot: 1/8."""
    close = [0.01, -0.01, 0.02, 0.0, 0.01]
    plant(per_seed=arms(close, [0.0] * 5))
    assert decided("sample:per_seed.*.a.x equals sample:per_seed.*.b.x margin 0.05") == HOLDS
    plant(per_seed=arms(close[:3], [0.0] * 3))
    assert decided("sample:per_seed.*.a.x equals sample:per_seed.*.b.x margin 0.05") == SEEDS
    plant(per_seed=arms([1 + x for x in close], [0.0] * 5))
    assert decided("sample:per_seed.*.a.x equals sample:per_seed.*.b.x margin 0.05") == SEEDS


def test_claim_runs_of_one_seed_are_paired(plant):
    """Seeds differ far more than arms do: the two intervals overlap, the differences agree."""
    base = [0.0, 3.0, -2.0, 5.0, 1.0, -4.0, 2.0]
    raised = [x + 0.1 + i / 100 for i, x in enumerate(base)]
    plant(seeds=list(range(7)), per_seed=arms(raised, base),
          mean={"a": over_seeds(0.83, 2.9), "b": over_seeds(0.71, 2.9)})  # fmt: skip
    assert decided("sample:per_seed.*.a.x above sample:per_seed.*.b.x") == HOLDS
    assert decided("sample:mean.a above sample:mean.b") == POWER  # all that the file allows
    plant(some={"0": {"x": 1.0}, "2": {"x": 1.0}}, per_seed=arms(base, base))
    found = checks.paired("sample:some.*.x", "sample:per_seed.*.a.x")
    assert (found.value, found.least_p) == (2.0, 0.5)  # 1 − 0 and 1 + 2: matched by their keys


def test_claim_the_other_sides_error_counts(plant):
    plant(a=over_posts(0.5, 0.1), b=over_posts(0.35, 0.1), c=over_posts(0.25, 0.1))
    assert decided("sample:a above sample:b") == POWER  # 0.35 alone lies below a's interval
    assert decided("sample:a above sample:c") == HOLDS
    assert decided("sample:c above sample:a") == CONTRADICTED


@pytest.mark.parametrize("p, up, down", [(0.3, POWER, POWER), (0.01, HOLDS, CONTRADICTED)])
def test_claim_the_test_stated_before_decides(plant, p, up, down):
    """The interval excludes 0; where Holm's test does not reject, that decides nothing."""
    plant(pair={"win": over_posts(0.03, 0.01), "p_holm": p})
    assert decided("sample:pair.win above 0") == HOLDS
    assert decided("sample:pair.win (holm) above 0") == up
    assert decided("sample:pair.win (holm) below 0") == down
    assert decided("sample:pair.win (holm) above 0.01") == up
    # whatever Holm says of 0, all that the data allow is less than was asked for
    assert decided("sample:pair.win (holm) above 0.05") == CONTRADICTED
    for check in ("above -0.1", "below 0.1", "equals 0 margin 0.1"):
        with pytest.raises(ValueError, match="a difference from 0 and nothing else"):
            checks.decide(f"sample:pair.win (holm) {check}")


def test_claim_a_signed_rank_interval_keeps_its_level(plant):
    plant(pairs=over_posts(-0.6, 0.3, level=0.9375, p_value=0.0625))
    assert decided("sample:pairs below 0") == SEEDS
    plant(seeds=list(range(8)), pairs=over_posts(-0.6, 0.3, level=0.961, p_value=0.0078))
    assert decided("sample:pairs below 0") == HOLDS


def test_claim_shares_have_intervals_in_their_range(plant):
    plant(mean={"win": over_seeds(0.97, 0.05), "reward": over_seeds(0.97, 0.05)}, hits=0.6)
    low, high = checks.decide("sample:mean.win above 0.5").evidence[1:3]
    assert 0.8 < low < 0.92 and 0.97 < high < 1
    assert checks.decide("sample:mean.reward above 0.5").evidence.high == pytest.approx(1.02)
    assert decided("sample:hits (of 20) above 0.5") == POWER
    assert decided("sample:hits (of 200) above 0.5") == HOLDS
    with pytest.raises(ValueError, match="no share of 7 draws"):
        checks.decide("sample:hits (of 7) above 0.5")


def test_claim_a_ceiling_or_a_control_that_passes_decides_nothing(plant):
    plant(x=over_posts(0.9, 0.02), control=over_posts(0.9, 0.03), most=1.0)
    assert decided("sample:x above 0.5 unless sample:most reaches 1") == CEILING
    assert decided("sample:x above 0.5 unless sample:most reaches 1.1") == HOLDS
    assert decided("sample:x above 0.5 unless sample:control above 0.5") == CONTROL
    assert decided("sample:x above 0.5 unless sample:control above 0.89") == HOLDS


@pytest.mark.parametrize("check, reason", {
    "sample:x over 0.3": "is not `FILE:path above X`",
    "sample:x near 0.3": "is not `FILE:path above X`",
    "sample:nothing above 0": "has no key 'nothing'",
    "nowhere:x above 0": "no results file nowhere.json",
    "sample:half above 0": "has no low and high",
    "sample:law (seeds) above 0": "without an interval over seeds",
    "sample:command above 0": "is no number and no interval",
    "sample:x above sample:command": "is no number and no interval",
}.items())  # fmt: skip
def test_checks_that_cannot_be_read_say_why(plant, check, reason):
    plant(x=over_posts(0.5, 0.1), half={"mean": 0.5, "low": None}, law=0.42)
    with pytest.raises(ValueError, match=re.escape(reason)):
        checks.decide(check)


def test_verdicts_follow_from_checks():
    yes, no, open_ = checks.HOLDS, checks.CONTRADICTED, checks.UNDECIDED
    assert ledger.verdict([yes, yes]) == yes
    assert ledger.verdict([yes, no]) == ledger.verdict([no, open_]) == no
    assert ledger.verdict([yes, open_]) == ledger.verdict([]) == open_
    assert len(ledger.BADGES) == 3 and set(ledger.OF_THE_PAPER) == {yes, no, open_}


def test_a_changed_result_changes_the_ledger(plant, monkeypatch):
    """Were a file to change alone, `test_the_ledger_is_what_claims_and_results_say` would fail."""
    entry = {"claim": "C.", "chapter": "c", "source": "paper", "paper": "Fig. 1",
             "checks": ["sample:x above 0.4"]}  # fmt: skip
    monkeypatch.setattr(ledger, "written", lambda: {"c": entry})
    words, printed = [], []
    for mean in (0.42, 0.395, 0.3):
        plant(x=over_posts(mean, 0.01))
        words.append(ledger.tendencies()["c"].verdict)
        printed.append("\n".join(ledger.entry(ledger.tendencies()["c"])))
    assert words == [checks.HOLDS, checks.UNDECIDED, checks.CONTRADICTED]
    assert "*reproduced here*" in printed[0]
    assert "**0.42 [0.41, 0.43] over posts**, *holds*." in printed[0]
    assert "(the interval lies on both sides)" in printed[1]
    assert "*not reproduced here*" in printed[2] and "Stated *after* its results" in printed[2]
    row = ledger.tendencies()["c"]
    assert row.seeds == [5] and row.command == ["python -m qlearn.results sample"]
    plant(per_seed=arms([2000.0] * 5, [1.0] * 5))
    paired = entry | {"checks": ["sample:per_seed.*.a.x above sample:per_seed.*.b.x"]}
    text = "\n".join(ledger.entry(ledger.settle("c", paired)))
    assert "**1,999 over paired runs, p = 0.0625, least p 0.0625**" in text
    assert "5 of 5 runs agree in sign, but no signed-rank p can be below 0.0625" in text
    waiting = ledger.settle("c", entry | {"awaits": True, "checks": ["nowhere:x above 0"]})
    assert (waiting.verdict, waiting.why) == (checks.UNDECIDED, ["not measured"])


def test_claim_no_row_decides_a_difference_by_fewer_than_six_runs():
    """And none stands on a number without an interval, on either side."""
    for row in ledger.tendencies().values():
        assert "interval" not in row.why, row.id
        for check, least, word in zip(row.check, row.least_p, row.decided, strict=True):
            if least is not None and least >= checks.LEVEL:
                assert word == checks.UNDECIDED or " equals " in check, check


def test_claim_a_row_that_awaits_its_results_has_none():
    for name, entry in ledger.written().items():
        files = [ledger.FILE.parent / f"{x}.json" for x in claim_history.files_of(entry)]
        assert not (entry.get("awaits") and all(file.exists() for file in files)), name


# --- before and after ---------------------------------------------------------------------------


def test_claim_a_digest_is_of_words_and_checks_alone():
    one = yaml.safe_load("{claim: A rises., chapter: c, source: course, checks: ['f:x above 0']}")
    other = yaml.safe_load(
        "source: paper\nnote: new\nchecks:\n  - >-\n    f:x\n    above 0\nclaim: |\n  A rises.\n"
    )
    assert ledger.digest(one) == ledger.digest(other) and len(ledger.digest(one)) == 12
    for change in ({"claim": "A falls."}, {"checks": ["f:x above 0.1"]},
                   {"checks": ["f:x equals 0 margin 0.1"]}, {"checks": []}):  # fmt: skip
        assert ledger.digest(one | change) != ledger.digest(one)


class Repository:
    """A git repository with a claims.yml and results files."""

    def __init__(self, root):
        self.root = root
        (root / "book").mkdir(parents=True)
        (root / "qlearn" / "results").mkdir(parents=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments):
        who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(self.root), *who, *arguments], check=True,
                       capture_output=True)  # fmt: skip

    def commit(self, claims=None, **results):
        if claims is not None:
            (self.root / claim_history.CLAIMS).write_text(yaml.safe_dump(claims), "utf-8")
        for name, value in results.items():
            (self.root / claim_history.RESULTS / f"{name}.json").write_text(json.dumps(value))
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "step")

    def labels(self, claims):
        rows = claim_history.table(self.root, claims)["claims"]
        return {name: row["stated"] for name, row in rows.items()}


def asking(check, claim="It rises."):
    return {"claim": claim, "chapter": "c", "source": "course", "checks": [check]}


@pytest.fixture
def repository(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    return Repository(tmp_path / "repo")


def test_claim_before_needs_the_words_in_an_earlier_commit(repository):
    early, late, both = asking("one:x above 0"), asking("two:x above 0"), asking("three:x above 0")
    mixed = early | {"checks": ["one:x above 0", "two:x above 0"]}
    repository.commit({"early": early | {"awaits": True}}, two=1)
    assert repository.labels({"early": early | {"awaits": True}}) == {"early": "without results"}
    repository.commit({"early": early, "late": late, "mixed": mixed}, one=1)
    repository.commit({"early": early, "late": late, "both": both, "mixed": mixed}, three=1)
    claims = {"early": early, "late": late, "both": both, "mixed": mixed}
    expected = {"early": "before", "late": "after", "both": "after", "mixed": "after"}
    assert repository.labels(claims) == expected
    repository.commit(claims, one=2, two=2)  # measured again: nothing changes
    repository.commit({"renamed": early}, one=3)
    assert repository.labels({"renamed": early}) == {"renamed": "before"}


@pytest.mark.parametrize("change", [
    {"claim": "It rises by far."}, {"checks": ["one:x above 0.1"]},
    {"checks": ["one:x equals 0 margin 0.1"]},
])  # fmt: skip
def test_claim_a_changed_word_or_margin_makes_it_after(repository, change):
    early = asking("one:x above 0")
    repository.commit({"early": early | {"awaits": True}})
    repository.commit({"early": early}, one=1)
    assert repository.labels({"early": early}) == {"early": "before"}
    repository.commit({"early": early | change})
    assert repository.labels({"early": early | change}) == {"early": "after"}
    assert repository.labels({"early": early | {"note": "New."}}) == {"early": "before"}


def test_claim_a_parallel_branch_is_not_before(repository):
    """The words were committed earlier by the clock, but the results did not stand on them."""
    early = asking("one:x above 0")
    repository.commit({})
    repository.git("switch", "-q", "-c", "words")
    repository.commit({"early": early})
    repository.git("switch", "-q", "main")
    repository.commit(one=1)
    repository.git("merge", "-q", "--no-ff", "words")
    assert repository.labels({"early": early}) == {"early": "after"}


def test_claim_a_renamed_results_file_keeps_its_first_commit(repository):
    early = asking("new:x above 0")
    numbers = {"numbers": list(range(50))}
    repository.commit({}, old=numbers)
    repository.commit({"early": early})
    repository.git("mv", "qlearn/results/old.json", "qlearn/results/new.json")
    repository.commit()
    assert repository.labels({"early": early}) == {"early": "after"}


def test_claim_a_history_that_is_not_there_is_said(repository, tmp_path):
    repository.commit({})
    repository.commit({"a": asking("one:x above 0")})
    assert claim_history.why_no_history(repository.root) == ""
    assert "not the root" in claim_history.why_no_history(repository.root / "book")
    repository.git("clone", "-q", "--depth", "1", f"file://{repository.root}", str(tmp_path / "s"))
    assert "shallow" in claim_history.why_no_history(tmp_path / "s")


def test_the_table_of_before_and_after_is_what_the_history_says():
    reason = claim_history.why_no_history(ROOT)
    if reason:
        pytest.skip(reason)
    assert ledger.STATED.read_text(encoding="utf-8") == write_ledger.stated_text(), (
        "qlearn/results/stated.json is stale: python tools/write_ledger.py"
    )


def test_every_row_has_its_digest_in_the_table():
    """Holds in a shallow clone too."""
    rows = ledger.stated_table()["claims"]
    assert {name: row["digest"] for name, row in rows.items()} == {
        name: ledger.digest(entry) for name, entry in ledger.written().items()
    }
    assert ledger.stated("nobody", asking("one:x above 0")) == "after"


def test_the_rejected_worlds_are_on_record():
    """They failed the requirement that the world of the course meets."""
    record = json.loads((ledger.FILE.parent / "rejected_worlds.json").read_text("utf-8"))
    assert record["second"]["ref_surprisal"] > record["requirement"]["most"]
    file, _, name = record["requirement"]["test"].partition("::")
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
    needs = ("credit-on-all-errors", "credit-on-written-errors", "credit-beats-policy-surprisal")
    assert all("dropped" in ledger.written()[name]["note"] for name in needs)


def test_an_unknown_measurement_is_refused_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results", "tiny_dop"])
    with pytest.raises(SystemExit):
        results_main.main()
    assert "no measurement 'tiny_dop'; choose from tiny_dpo, " in capsys.readouterr().err
