"""Checks of the claims ledger: a sentence about numbers in results files, and what it decides.

A check is `FILE:path [BY] RELATION [unless ...]`. What stands at the path is one number or an
interval; with `*` for a key, as in `tiny_rlhf:per_seed.*.ppo.J`, it is one number a run.

  above X              the interval lies above X
  below X              it lies below X
  equals X margin M    it lies inside X ± M (equivalence: two one-sided tests, TOST)
  within A and B       it lies between A and B

BY says which evidence: `(seeds)` the interval over seeds where there are two, `(holm)` the test
that was stated before, with Holm's adjustment, `(of N)` that the number is a share of N draws.
Holm's p-value is about a difference of 0: nothing holds unless it rejects, and where X is 0
nothing is contradicted either.

X is a number or a path. Against a path the difference decides: that of each run where both have
`*` (Hodges and Lehmann's interval, Wilcoxon's signed-rank test), else the widest interval that the
two allow: it covers the difference however they depend on each other.

Three verdicts. A check *holds* where the whole interval lies as it says. It *is contradicted* where
the whole interval lies on the other side: `above 0.02` where all that the data allow is less,
`equals` where all of it is outside the margin. Anything else *cannot be decided here*, and the
reason is one of these:

  power     the interval lies on both sides, or the test stated before does not reject
  seeds     so few runs could not reject, whatever they show: a signed-rank test of n pairs gives no
            p below 2^(1 − n), and five seeds none below 0.0625
  interval  there is a number without an interval
  ceiling   `unless PATH reaches X`: the world left no room
  control   `unless CHECK`: what should fail the same check passes it as well
"""

import math
import re
from typing import NamedTuple

from scipy.stats import t

HOLDS, CONTRADICTED, UNDECIDED = "holds", "is contradicted", "cannot be decided here"
LEVEL = 0.05  # of every decision, two-sided; of each of the two one-sided tests of equivalence
NUMBER = r"-?\d+(?:\.\d+)?"
X = rf"{NUMBER}|\w+:\S+"
CHECK = re.compile(
    rf"(?P<path>\w+:\S+)(?: \((?P<by>seeds|holm|of \d+)\))? "
    rf"(?:(?P<side>above|below) (?P<x>{X})"
    rf"|equals (?P<same>{X}) margin (?P<band>{NUMBER})"
    rf"|within (?P<least>{NUMBER}) and (?P<most>{NUMBER}))"
    rf"(?: unless (?P<unless>.+))?"
)
CEILING = re.compile(rf"(?P<path>\w+:\S+) reaches (?P<x>{NUMBER})")
CENTRES = ("mean", "estimate", "effect")
# numbers without a sampling error: by enumeration, or the worst of all that were tried
EXACT = re.compile(r"\w+:(exact|law|slot_world)\.\S+|proxy_map:\S+\.most")
SHARE_TABLES = ("auroc", "first", "above_original", "classified")
SHARES = ("win", "unreadable", "sampled_unreadable", "alone", "after")
NOT_SHARES = ("contrasts", "verifier")  # differences of shares


class Evidence(NamedTuple):
    """A number with its interval and the level of it; no ends where there is no interval.

    unit: what was drawn again, "posts", "seeds" or "pairs" of runs, or "" of an exact number.
    p: of the test stated before, or of the signed-rank test; least_p: the least it could have been.
    note: how far the runs agree.
    """

    value: float
    low: float | None = None
    high: float | None = None
    level: float = 1 - LEVEL
    unit: str = ""
    p: float | None = None
    least_p: float | None = None
    note: str = ""


class Decision(NamedTuple):
    """A check, what it rests on, its verdict, and the reason where it cannot be decided."""

    check: str
    evidence: Evidence
    verdict: str
    reason: str  # "", or one of power, seeds, interval, ceiling, control


def decide(check: str) -> Decision:
    """Reads the numbers that a check is about and decides it.

    Raises: ValueError for a check that cannot be read, or a path to nothing.
    """
    hit = CHECK.fullmatch(check)
    if hit is None:
        raise ValueError(f"The check {check!r} is not `FILE:path above X` or one of its sisters.")
    x = hit["x"] or hit["same"]
    if x is not None and ":" in x:
        evidence, x = difference(hit["path"], x, hit["by"] or ""), 0.0
    else:
        evidence = level_at(hit["path"], hit["by"] or "")
        x = None if x is None else float(x)
    if hit["by"] == "holm" and (not hit["side"] or (x < 0 if hit["side"] == "above" else x > 0)):
        raise ValueError(f"{check!r}: Holm's test shows a difference from 0 and nothing else.")
    verdict, reason = judge(evidence, bounds(hit, x))
    if hit["unless"] and (stop := stopped_by(hit["unless"])):
        verdict, reason = UNDECIDED, stop
    return Decision(check, evidence, verdict, reason)


def bounds(hit: re.Match, x: float | None) -> tuple[float, float]:
    """The open interval in which the evidence must lie."""
    if hit["side"] == "above":
        return x, math.inf
    if hit["side"] == "below":
        return -math.inf, x
    if hit["band"]:
        return x - float(hit["band"]), x + float(hit["band"])
    return float(hit["least"]), float(hit["most"])


def judge(evidence: Evidence, sought: tuple[float, float]) -> tuple[str, str]:
    """(verdict, reason) for an interval that is sought between two ends.

    To lie between two numbers takes two one-sided tests, each at LEVEL: an interval of level
    1 − 2 LEVEL. To lie on one side of a number takes a two-sided test at LEVEL.
    """
    low, high = sought
    if evidence.low is None:
        return UNDECIDED, "interval"
    inside = evidence.low > low and evidence.high < high
    outside = evidence.high < low or evidence.low > high
    a_band = math.isfinite(low) and math.isfinite(high)
    needed, tails = (1 - 2 * LEVEL, 2) if inside and a_band else (1 - LEVEL, 1)
    if evidence.level < needed - 1e-9 or (evidence.least_p or 0.0) / tails >= LEVEL:
        return UNDECIDED, "seeds"
    rejects = evidence.p is None or evidence.p < LEVEL  # the test's hypothesis is a value of 0
    if inside and (rejects or a_band):
        return HOLDS, ""
    at_zero = 0.0 in (low, high)  # a value on the other side is then one that is not 0
    if outside and (rejects or not at_zero):
        return CONTRADICTED, ""
    return UNDECIDED, "power"


def stopped_by(unless: str) -> str:
    """Why a check decides nothing whatever its numbers: "ceiling", "control", or "" if it may."""
    hit = CEILING.fullmatch(unless)
    if hit:
        return "ceiling" if number(hit["path"]) >= float(hit["x"]) - 1e-9 else ""
    return "control" if decide(unless).verdict == HOLDS else ""


# --- evidence ----------------------------------------------------------------------------------


def level_at(path: str, by: str = "") -> Evidence:
    """What stands at a path, with its interval."""
    from qlearn.findings import stats

    value = number(path)
    found = lookup(path)
    if by.startswith("of "):
        n = int(by.removeprefix("of "))
        if isinstance(found, dict) or abs(value * n - round(value * n)) > 0.05:
            raise ValueError(f"{path} is no share of {n} draws.")
        drawn = stats.share(round(value * n), n)
        return Evidence(value, drawn.low, drawn.high, unit="posts")
    if not isinstance(found, dict):
        if by:
            raise ValueError(f"{path} is a number, without an interval over seeds or posts.")
        return Evidence(value, value, value) if EXACT.match(path) else Evidence(value)
    two = "seeds_low" in found  # an interval over seeds, and perhaps one over posts
    over_seeds = by == "seeds" or (two and "low" not in found) or ("least" in found and not two)
    prefix = "seeds_" if over_seeds and two else ""
    low, high = found.get(f"{prefix}low"), found.get(f"{prefix}high")
    if low is None or high is None:
        raise ValueError(f"{path} has no {prefix}low and {prefix}high.")
    if "p_value" in found and "level" in found:  # a signed-rank test of paired runs
        return Evidence(value, low, high, found["level"], "pairs", found["p_value"],
                        stats.least_p(runs_of(path)))  # fmt: skip
    if over_seeds and is_share(path):
        n = runs_of(path)
        error = (high - low) / 2 / float(t.ppf(1 - LEVEL / 2, n - 1))
        low, high = stats.share_over_runs(value, error, n)[1:3]
    # the study gives the change of N4 its 90 % interval, which is TOST at 5 %
    level = 1 - 2 * LEVEL if path.endswith(".change") else found.get("level", 1 - LEVEL)
    p = number(f"{path.rpartition('.')[0]}.p_holm") if by == "holm" else None
    return Evidence(value, low, high, level, "seeds" if over_seeds else "posts", p)


def difference(first: str, second: str, by: str = "") -> Evidence:
    """What stands at one path less what stands at another."""
    from qlearn.findings import stats

    if "*" in first and "*" in second:
        return paired(first, second)
    a, b = level_at(first, by), level_at(second)
    value = a.value - b.value
    if a.low is None or b.low is None:
        return Evidence(value)
    low, high = a.low - b.high, a.high - b.low
    if {a.unit, b.unit} == {"seeds"}:  # two trainings; their runs are not in the file
        n = min(runs_of(first), runs_of(second))
        return Evidence(value, low, high, unit="seeds", least_p=stats.least_p(n),
                        note=apart(first, second))  # fmt: skip
    return Evidence(value, low, high, min(a.level, b.level), a.unit or b.unit)


def paired(first: str, second: str) -> Evidence:
    """The differences of the runs that both paths have, by Wilcoxon's signed-rank test."""
    from qlearn.findings import stats

    one, other = runs(first), runs(second)
    both = [key for key in one if key in other]
    if len(both) < 2:
        raise ValueError(f"{first} and {second} have {len(both)} runs in common, not 2 or more.")
    d = [one[key] - other[key] for key in both]
    found = stats.hodges_lehmann(d)
    p = stats.signed_rank(d) if any(d) else 1.0
    agree = max(sum(x > 0 for x in d), sum(x < 0 for x in d))
    return Evidence(found.estimate, found.low, found.high, found.level, "pairs", p,
                    stats.least_p(len(d)), f"{agree} of {len(d)} runs agree in sign")  # fmt: skip


def runs(path: str) -> dict[str, float]:
    """{key: number} for a path with `*` in place of one key."""
    start, _, rest = path.partition(".*.")
    table = lookup(start)
    keys = map(str, range(len(table))) if isinstance(table, list) else table
    return {key: number(f"{start}.{key}.{rest}") for key in keys}


def apart(first: str, second: str) -> str:
    """Whether all runs of one arm lie above all runs of the other, by their extremes."""
    a, b = lookup(first), lookup(second)
    if a["least"] > b["most"] or a["most"] < b["least"]:
        return "every run of the one lies above every run of the other"
    return ""


def runs_of(path: str) -> int:
    """How many runs a results file rests on."""
    return len(lookup(f"{path.partition(':')[0]}:seeds"))


def is_share(path: str) -> bool:
    """Whether a mean over runs is one of shares, or of AUROCs, which are shares of pairs."""
    keys = path.partition(":")[2].split(".")
    return keys[0] in SHARE_TABLES or (keys[0] not in NOT_SHARES and keys[-1] in SHARES)


def lookup(path: str):
    """What a results file holds at `FILE:dotted.key`."""
    from qlearn.results import lookup

    return lookup(path)


def number(path: str) -> float:
    """The number at a path, or the centre of the interval there."""
    found = lookup(path)
    if isinstance(found, dict):
        found = next((found[key] for key in CENTRES if key in found), None)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{path} is no number and no interval.")
    return found
