"""The claims ledger: what the paper and the chapters claim, what was measured, and the verdict.

Identities and theorems come from the equation index, each with the test that checks it. Measured
claims stand in book/claims.yml: a sentence, the paper's figure, and checks on the results files.
Verdicts are computed from the checks (`checks` says how) and never typed, so prose, ledger and
files cannot disagree. Whether a claim was stated before or after its results is read from the
history (tools/claim_history.py) and kept in qlearn/results/stated.json.
"""

import hashlib
import json
import re
from functools import cache
from typing import NamedTuple

import yaml
from checks import CONTRADICTED, HOLDS, LEVEL, UNDECIDED, Decision, Evidence, decide, lookup
from docutils import nodes
from docutils.statemachine import StringList
from equations import BOOK, ROOT, first_lines, index
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective, SphinxRole

FILE = ROOT / "qlearn" / "results" / "claims.json"
STATED = FILE.parent / "stated.json"
BADGES = {HOLDS: "bdg-success", CONTRADICTED: "bdg-danger", UNDECIDED: "bdg-secondary"}
OF_THE_PAPER = {
    HOLDS: "reproduced here",
    CONTRADICTED: "not reproduced here",
    UNDECIDED: "neither reproduced nor contradicted here",
}
REASONS = {
    "power": "the interval lies on both sides",
    "seeds": "so few runs cannot decide",
    "interval": "a number without an interval",
    "ceiling": "the world left no room",
    "control": "what should fail passes as well",
    "not tested": "not tested here",
    "not measured": "not measured yet",
}
UNITS = {"posts": " over posts", "seeds": " over seeds", "pairs": " over paired runs", "": ""}
BEFORE, AFTER, NO_RESULTS = "before", "after", "without results"
SOURCES = ("paper", "course")
KEYS = {"claim", "chapter", "source", "paper", "seeds", "checks", "note", "awaits"}


class Claim(NamedTuple):
    """One row of the ledger. The fields from check to command are lists, one entry a check."""

    id: str
    kind: str  # identity | theorem | tendency
    claim: str
    chapter: str
    source: str  # paper | course
    paper: str
    check: list[str]
    measured: list[float]
    interval: list[list[float] | None]
    level: list[float]
    unit: list[str]  # what was drawn again: posts, seeds, pairs of runs, "" of an exact number
    p: list[float | None]
    least_p: list[float | None]
    decided: list[str]
    reason: list[str]
    seeds: list[int]
    command: list[str]
    test: list[str]
    verdict: str
    why: list[str]  # where it cannot be decided: the reasons, each once
    stated: str  # before | after | without results; "" of what is proved
    digest: str
    note: str


@cache
def written() -> dict[str, dict]:
    """{id: entry} of book/claims.yml, read once for all roles of a build."""
    return yaml.safe_load((BOOK / "claims.yml").read_text(encoding="utf-8"))


def digest(entry: dict) -> str:
    """What a claim says and asks: 12 hexadecimal digits of its sentence and its checks.

    Thresholds and margins stand in the checks. How the file is laid out does not matter.
    """
    said = [" ".join(x.split()) for x in (entry["claim"], *entry.get("checks", ()))]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


@cache
def stated_table() -> dict:
    """qlearn/results/stated.json: what the history says of each claim."""
    return json.loads(STATED.read_text(encoding="utf-8"))


def stated(name: str, entry: dict) -> str:
    """Whether these words and checks stood before their results; *after* where nothing shows it."""
    row = stated_table()["claims"].get(name, {})
    return row["stated"] if row.get("digest") == digest(entry) else AFTER


def verdict(decided: list[str]) -> str:
    """The verdict on a claim: it holds where every check does, and falls with any of them."""
    if CONTRADICTED in decided:
        return CONTRADICTED
    return HOLDS if decided and set(decided) == {HOLDS} else UNDECIDED


def settle(name: str, entry: dict) -> Claim:
    """One measured claim: its checks decided on the results files."""
    waits = entry.get("awaits", False)
    try:
        done = [] if waits else [decide(check) for check in entry.get("checks", ())]
    except ValueError as error:
        raise ValueError(f"book/claims.yml, {name}: {error}") from None
    word = verdict([x.verdict for x in done])
    reasons = dict.fromkeys(x.reason for x in done if x.reason)
    if not done:
        reasons = ["not measured" if waits else "not tested"]
    files = [x.check.partition(":")[0] for x in done]
    return Claim(
        id=name, kind="tendency", claim=entry["claim"], chapter=entry["chapter"],
        source=entry["source"], paper=entry.get("paper", ""), check=[x.check for x in done],
        measured=[x.evidence.value for x in done], interval=[ends(x.evidence) for x in done],
        level=[x.evidence.level for x in done], unit=[x.evidence.unit for x in done],
        p=[x.evidence.p for x in done],
        least_p=[x.evidence.least_p for x in done], decided=[x.verdict for x in done],
        reason=[explained(x) for x in done],
        seeds=[entry.get("seeds", len(lookup(f"{file}:seeds"))) for file in files],
        command=[lookup(f"{file}:command") for file in files],
        test=["tests/test_ledger.py"] if done else [], verdict=word,
        why=list(reasons) if word == UNDECIDED else [], stated=stated(name, entry),
        digest=digest(entry), note=entry.get("note", ""),
    )  # fmt: skip


def ends(evidence: Evidence) -> list[float] | None:
    return None if evidence.low is None else [evidence.low, evidence.high]


def explained(decision: Decision) -> str:
    """Why a check cannot be decided, in words; "" of one that is."""
    if not decision.reason:
        return ""
    evidence, text = decision.evidence, REASONS[decision.reason]
    if decision.reason == "seeds":
        agree = f"{evidence.note}, but " if evidence.note else ""
        return f"{agree}no signed-rank p can be below {evidence.least_p:.4g}"
    if decision.reason == "power" and evidence.p is not None and evidence.p >= LEVEL:
        return "the test stated before does not reject"
    return text


def tendencies() -> dict[str, Claim]:
    """The measured claims, in the order of book/claims.yml."""
    return {name: settle(name, entry) for name, entry in written().items()}


def ledger() -> list[Claim]:
    """Every claim: what is proved, in the book's order, then what is measured.

    A proved claim is worded as the test that comes first words it.
    """
    says = first_lines("tests")
    nothing = {x: [] for x in ("check", "measured", "interval", "level", "unit", "p", "least_p",
                               "decided", "reason", "seeds", "why")}  # fmt: skip
    proved = [
        Claim(
            id=row.label, kind=row.kind, claim=says[row.tests[0]], chapter=row.chapter,
            source="paper" if row.paper else "course", paper=row.paper,
            command=[f"python -m pytest {x.replace('::', '.py::')}" for x in row.tests],
            test=row.tests, verdict=HOLDS, stated="", digest="", note="", **nothing,
        )
        for row in index() if row.kind in ("identity", "theorem")
    ]  # fmt: skip
    return [*proved, *tendencies().values()]


# --- on the site -------------------------------------------------------------------------------


class VerdictRole(SphinxRole):
    """{verdict}`ID` prints the verdict on a claim, linked to its place in the ledger."""

    def run(self):
        try:
            word = settle(self.text, written()[self.text]).verdict
        except (KeyError, ValueError) as error:
            message = self.inliner.reporter.error(f"No verdict: {error}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        link = addnodes.pending_xref(
            "", nodes.strong(word, word), refdomain="std", reftype="ref",
            reftarget=f"claim-{self.text}", refexplicit=True, refwarn=True,
        )  # fmt: skip
        link["refdoc"] = self.env.docname
        return [link], []


class ClaimsLedger(SphinxDirective):
    """{claims-ledger} CHAPTER: its measured claims; without a chapter, how many have which verdict.

    Generated when the page is built.
    """

    optional_arguments = 1

    def run(self):
        self.env.note_reread()  # what changes the ledger lies outside this page
        if self.arguments:
            here = [x for x in written().items() if x[1]["chapter"] == self.arguments[0]]
            lines = [line for name, found in here for line in entry(settle(name, found))]
        else:
            lines = overview(list(tendencies().values()))
        container = nodes.container(classes=["claims-ledger"])
        self.state.nested_parse(StringList(lines, source="claims-ledger"), 0, container)
        return [container]


def overview(rows: list[Claim]) -> list[str]:
    """How many claims of the paper and of the course have which verdict, and which reasons."""
    lines = ["| Verdict | Of the paper | Of the course |", "|---|---|---|"]
    for word, badge in BADGES.items():
        counts = [sum(x.verdict == word and x.source == whose for x in rows) for whose in SOURCES]
        lines.append(f"| {{{badge}}}`{word}` | {counts[0]} | {counts[1]} |")
    why = [(reason, sum(reason in x.why for x in rows)) for reason in REASONS]
    told = "; ".join(f"*{name}* ({REASONS[name]}) {n}" for name, n in why if n)
    when = [f"{sum(x.stated == word for x in rows)} {word}" for word in (BEFORE, AFTER)]
    bare = sum(x.stated == NO_RESULTS for x in rows)
    return [
        *lines, "",
        f"What cannot be decided, by reason (a claim may have several): {told}.", "",
        f"Stated {when[0]}, {when[1]} the results; {bare} have none.",
    ]  # fmt: skip


def entry(row: Claim) -> list[str]:
    """One claim as Markdown: the sentence, its verdict, the paper's figure, each check."""
    claim, paper, note = (x.replace("*", r"\*") for x in (row.claim, row.paper, row.note))
    lines = [f"(claim-{row.id})=", f"**{claim}** {{{BADGES[row.verdict]}}}`{row.verdict}`", ""]
    if row.source == "paper":
        lines.append(f"- The paper: {paper.removesuffix('.')}. *{OF_THE_PAPER[row.verdict]}*.")
    elif paper:
        lines.append(f"- The paper: {paper.removesuffix('.')}.")
    for i, check in enumerate(row.check):
        asked = re.sub(r"(\w+:\S+)", r"`\1`", check)
        why = f" ({row.reason[i]})" if row.reason[i] else ""
        lines.append(f"- {asked}: **{measured(row, i)}**, *{row.decided[i]}*{why}.")
    for command, seeds in dict(zip(row.command, row.seeds, strict=True)).items():
        lines.append(f"- {f'{seeds} seeds' if seeds else 'Exact'}, `{command}`.")
    if row.stated != NO_RESULTS:
        lines.append(f"- Stated *{row.stated}* its results (`{row.digest}`).")
    if note:
        lines.append(f"- {note}")
    return [*lines, ""]


def measured(row: Claim, i: int) -> str:
    """What a check rests on: number, interval, unit, and p beside the least that it could be."""
    text, interval = plain(row.measured[i]), row.interval[i]
    if interval and interval[0] != interval[1]:
        text += f" [{plain(interval[0])}, {plain(interval[1])}]"
        if abs(row.level[i] - 1 + LEVEL) > 1e-9:
            text += f" at level {row.level[i]:.4g}"
    text += UNITS[row.unit[i]]
    if row.p[i] is not None:
        text += ", p < 0.0001" if row.p[i] < 1e-4 else f", p = {row.p[i]:.3g}"
    if row.least_p[i] is not None:
        text += f", least p {row.least_p[i]:.3g}"
    return text


def plain(x: float) -> str:
    """Three digits, without an exponent where there are more before the point."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:z.3g}"
