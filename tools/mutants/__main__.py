"""The command: which faults are planted, what is printed, and the table that is kept."""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict

import yaml

from tools.mutants.faults import ROOT, Fault, counts, faults_of, modules

HERE = ROOT / "tools" / "mutants"
TABLE, EXCLUDED = HERE / "table.csv", HERE / "excluded.yml"
ENDS = ("killed", "survived", "excluded")
COLUMNS = ("module", "operator", "planted", *ENDS)


def excluded() -> dict[str, str]:
    """{name of a fault: why it changes nothing}."""
    return yaml.safe_load(EXCLUDED.read_text(encoding="utf-8")) or {}


def table() -> dict[tuple[str, str], dict]:
    """The record: {(module, operator): {planted, killed, survived, excluded, commit}}."""
    with TABLE.open(encoding="utf-8") as file:
        return {(row["module"], row["operator"]): row for row in csv.DictReader(file)}


def write_table(ends: dict[tuple[str, str], Counter], whole: set[str]) -> None:
    """Writes the counts as they are now, and how the faults of the modules in `whole` ended.

    Other modules keep how theirs ended, with the commit at which they ran.
    """
    old = table() if TABLE.exists() else {}
    everything = [fault for module in modules() for fault in faults_of(module)]
    commit = _git("rev-parse", "--short", "HEAD").strip() or "unknown"
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "commit"], lineterminator="\n")
        writer.writeheader()
        for (module, operator), planted in sorted(counts(everything).items()):
            row = {"module": module, "operator": operator, "planted": planted}
            if module in whole:
                row |= {end: ends[module, operator][end] for end in ENDS} | {"commit": commit}
            else:
                before = old.get((module, operator), {})
                row |= {k: before.get(k, "") for k in (*ENDS, "commit")}
            writer.writerow(row)


def changed() -> list[str]:
    """Modules that differ from where this branch left main, or are not committed yet."""
    base = _git("merge-base", "HEAD", "main").strip() or "HEAD"
    head = _git("rev-parse", "HEAD").strip()
    base = "HEAD~1" if base == head else base  # on main: what the last commit changed
    names = (
        _git("diff", "--name-only", base).split()
        + _git("ls-files", "--others", "--exclude-standard").split()
    )
    return sorted(set(names) & set(modules()))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout


def interleaved(faults: list[Fault]) -> list[Fault]:
    """One fault of each function after the other, so that a stop leaves no function out."""
    turns = defaultdict(list)
    for fault in faults:
        turns[fault.module, fault.function].append(fault)
    longest = max(map(len, turns.values()), default=0)
    return [group[k] for k in range(longest) for group in turns.values() if k < len(group)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", help="files to break; default: those that changed")
    parser.add_argument("--all", action="store_true", help="break every module")
    parser.add_argument("--count", action="store_true", help="write the counts, run nothing")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--workers", type=int, default=2, help="how many run at once")
    options = parser.parse_args()
    if options.count:
        write_table({}, set())
        return 0
    chosen = modules() if options.all else options.modules or changed()
    faults = interleaved([fault for module in chosen for fault in faults_of(module)])
    print(f"{len(faults)} faults in {len(chosen)} modules", flush=True)
    if not faults:
        return 0
    left = run(faults, options)
    return 1 if left else 0


def run(faults: list[Fault], options) -> int:
    """Plants the faults, prints those that live, keeps the table; how many live."""
    from tools.mutants import runs

    start, proofs = time.monotonic(), excluded()
    ends, done = defaultdict(Counter), Counter()
    runs.preload()
    wanted = [fault for fault in faults if fault.name not in proofs]
    for fault in faults:
        if fault.name in proofs:
            ends[fault.module, fault.operator]["excluded"] += 1
            done[fault.module] += 1
    with tempfile.TemporaryDirectory() as folder, runs.pool_of(options.workers, folder) as pool:
        tests = runs.map_tests(pool)
        print(f"the map has {len(tests)} tests, after {time.monotonic() - start:.0f} s", flush=True)
        jobs = ((fault, *runs.rounds(fault, tests)) for fault in wanted)
        log = (runs.FOLDER / "log.jsonl").open("a", encoding="utf-8")
        results = zip(wanted, pool.imap(runs.outcome, jobs), strict=True)
        for number, (fault, (end, seconds)) in enumerate(results, start=1):
            lives = end != "killed"
            ends[fault.module, fault.operator]["survived" if lives else "killed"] += 1
            done[fault.module] += 1
            line = fault._asdict() | {"end": end, "seconds": round(seconds, 2)}
            print(json.dumps(line), file=log, flush=True)
            if lives:
                where = f"{fault.module}:{fault.line}"
                print(
                    f"{end}: {where} {fault.function}: {fault.operator}: {fault.what}", flush=True
                )
            elif number % 50 == 0:
                print(f"{number} of {len(wanted)}, {time.monotonic() - start:.0f} s", flush=True)
            if time.monotonic() - start > 60 * options.minutes:
                print(f"stopped: {len(wanted) - number} faults were not planted", flush=True)
                pool.terminate()
                break
    whole = {m for m, n in done.items() if n == len(faults_of(m))}
    write_table(ends, whole)
    total = sum((Counter(x) for x in ends.values()), Counter())
    print(", ".join(f"{total[end]} {end}" for end in ENDS), f"{time.monotonic() - start:.0f} s")
    return total["survived"]


if __name__ == "__main__":
    sys.exit(main())
