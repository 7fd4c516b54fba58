"""The claims ledger: what the paper and the chapters claim, what was measured, and the verdict.

Identities and theorems come from the equation index, each with the test that checks it. Measured
claims stand in book/claims.yml: a sentence, the paper's figure, and checks on the results files.
Verdicts are computed from the checks and never typed, so prose, ledger and files cannot disagree.

A check is `FILE:path RELATION`, about the number at that path, or about its interval (over posts
where there are two; after the path, `(seeds)` asks for the one over seeds):

  above X           all of it lies above X
  below X           all of it lies below X
  within A and B    all of it lies between
  near X            it contains X

X is a number or `FILE:path`, the number there or the centre of the interval there.
"""

import re
from functools import cache
from typing import NamedTuple

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from equations import BOOK, ROOT, first_lines, index
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective, SphinxRole

FILE = ROOT / "qlearn" / "results" / "claims.json"
X = r"-?\d+(?:\.\d+)?|\w+:\S+"
CHECK = re.compile(
    rf"(?P<path>\w+:\S+)(?P<seeds> \(seeds\))? (?:(?P<relation>above|below|near) (?P<x>{X})"
    rf"|within (?P<least>{X}) and (?P<most>{X}))"
)
CENTRES = ("mean", "estimate", "effect")
VERDICTS = {  # source of a claim: the verdict where all, none, some of its checks are met
    "paper": ("reproduced", "not reproduced", "partly"),
    "course": ("holds", "does not hold", "partly"),
}
UNTESTED = "not tested here"
BADGES = {
    "reproduced": "bdg-success", "holds": "bdg-success", "partly": "bdg-warning",
    "not reproduced": "bdg-danger", "does not hold": "bdg-danger", UNTESTED: "bdg-secondary",
}  # fmt: skip
KEYS = {"claim", "chapter", "source", "paper", "seeds", "checks", "note"}


class Measured(NamedTuple):
    """One check: its text, the number and interval that it is about, and whether it is met."""

    check: str
    value: float
    interval: list[float] | None
    met: bool


class Claim(NamedTuple):
    """One row of the ledger. The fields from check to command are lists, one entry a check."""

    id: str
    kind: str  # identity | theorem | tendency
    claim: str
    chapter: str
    paper: str
    check: list[str]
    measured: list[float]
    interval: list[list[float] | None]
    met: list[bool]
    seeds: list[int]
    command: list[str]
    test: list[str]
    verdict: str
    note: str


@cache
def written() -> dict[str, dict]:
    """{id: entry} of book/claims.yml, read once for all roles of a build."""
    return yaml.safe_load((BOOK / "claims.yml").read_text(encoding="utf-8"))


def found_at(path: str):
    """What a results file holds at `FILE:dotted.key`."""
    from qlearn.results import lookup

    return lookup(path)


def measure(check: str) -> Measured:
    """Reads the numbers that a check is about and decides it.

    Raises: ValueError for a check that cannot be read, or a path to nothing.
    """
    hit = CHECK.fullmatch(check)
    if hit is None:
        raise ValueError(f"The check {check!r} is not `FILE:path above X` or one of its sisters.")
    centre, ends = interval_at(hit["path"], "seeds_" if hit["seeds"] else "")
    low, high = ends or (centre, centre)
    match hit["relation"]:
        case "above":
            met = low > number(hit["x"])
        case "below":
            met = high < number(hit["x"])
        case "near":
            met = low <= number(hit["x"]) <= high
        case _:
            met = low > number(hit["least"]) and high < number(hit["most"])
    return Measured(check, centre, ends, met)


def interval_at(path: str, prefix: str = "") -> tuple[float, list[float] | None]:
    """(centre, [low, high]) of what stands at a path; (the number, None) of a bare number."""
    found, centre = found_at(path), number(path)
    if isinstance(found, dict):
        ends = [found.get(f"{prefix}low"), found.get(f"{prefix}high")]
        if None in ends:
            raise ValueError(f"{path} has no {prefix}low and {prefix}high.")
        return centre, ends
    if prefix:
        raise ValueError(f"{path} is a number, without an interval over seeds.")
    return centre, None


def number(x: str) -> float:
    """A number as written, the one at a path, or the centre of the interval there."""
    if ":" not in x:
        return float(x)
    found = found_at(x)
    if isinstance(found, dict):
        found = next((found[key] for key in CENTRES if key in found), None)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{x} is no number and no interval.")
    return found


def verdict(source: str, met: list[bool]) -> str:
    """The word for a claim whose checks came out so."""
    every, none, some = VERDICTS[source]
    if not met:
        return UNTESTED
    return every if all(met) else some if any(met) else none


def settle(name: str, entry: dict) -> Claim:
    """One measured claim: its checks decided on the results files."""
    try:
        done = [measure(check) for check in entry.get("checks", ())]
    except ValueError as error:
        raise ValueError(f"book/claims.yml, {name}: {error}") from None
    files = [x.check.partition(":")[0] for x in done]
    return Claim(
        id=name, kind="tendency", claim=entry["claim"], chapter=entry["chapter"],
        paper=entry.get("paper", ""), check=[x.check for x in done],
        measured=[x.value for x in done], interval=[x.interval for x in done],
        met=[x.met for x in done],
        seeds=[entry.get("seeds", len(found_at(f"{file}:seeds"))) for file in files],
        command=[found_at(f"{file}:command") for file in files],
        test=["tests/test_ledger.py"] if done else [],
        verdict=verdict(entry["source"], [x.met for x in done]), note=entry.get("note", ""),
    )  # fmt: skip


def tendencies() -> dict[str, Claim]:
    """The measured claims, in the order of book/claims.yml."""
    return {name: settle(name, entry) for name, entry in written().items()}


def ledger() -> list[Claim]:
    """Every claim: what is proved, in the book's order, then what is measured.

    A proved claim is worded as the test that comes first words it.
    """
    says = first_lines("tests")
    proved = [
        Claim(
            id=row.label, kind=row.kind, claim=says[row.tests[0]],
            chapter=row.chapter, paper=row.paper, check=[], measured=[], interval=[], met=[],
            seeds=[], command=[f"python -m pytest {x.replace('::', '.py::')}" for x in row.tests],
            test=row.tests, verdict="holds", note="",
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
            words = [row.verdict for row in tendencies().values()]
            lines = ["| Verdict | Claims |", "|---|---|"]
            lines += [f"| {{{BADGES[x]}}}`{x}` | {words.count(x)} |" for x in BADGES if x in words]
        container = nodes.container(classes=["claims-ledger"])
        self.state.nested_parse(StringList(lines, source="claims-ledger"), 0, container)
        return [container]


def entry(row: Claim) -> list[str]:
    """One claim as Markdown: the sentence, its verdict, the paper's figure, each check."""
    claim, paper, note = (x.replace("*", r"\*") for x in (row.claim, row.paper, row.note))
    lines = [f"(claim-{row.id})=", f"**{claim}** {{{BADGES[row.verdict]}}}`{row.verdict}`", ""]
    if paper:
        lines.append(f"- The paper: {paper.removesuffix('.')}.")
    for check, value, ends, met in zip(row.check, row.measured, row.interval, row.met, strict=True):
        asked = re.sub(r"(\w+:\S+)", r"`\1`", check)
        found = f"{value:.3g}" + (f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else "")
        lines.append(f"- {asked}: **{found}**, {'met' if met else '*not met*'}.")
    for command, seeds in dict(zip(row.command, row.seeds, strict=True)).items():
        lines.append(f"- {f'{seeds} seeds' if seeds else 'Exact'}, `{command}`.")
    if note:
        lines.append(f"- {note}")
    return [*lines, ""]
