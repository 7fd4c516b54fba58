"""Which claims of the ledger were stated before their results: read from the whole git history.

A claim is its sentence and its checks, margins included (`ledger.digest`). It was stated *before*
where a commit that holds this very digest comes before the first commit that holds any version of
each results file that its checks read, whatever was measured again later. Everything else is
*after*: also where both came in one commit, and where a word, a threshold or a margin has changed.

The table names no commit of the claims, so it stays right when a branch is rebased or merged.
"""

import shutil
import subprocess
from pathlib import Path

import yaml
from ledger import AFTER, BEFORE, NO_RESULTS, digest

CLAIMS, RESULTS = "book/claims.yml", "qlearn/results"
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def why_no_history(root: Path) -> str:
    """Why the history cannot be read here, in words; "" where it can."""
    if shutil.which("git") is None:
        return "there is no git"
    if git(root, "rev-parse", "--show-toplevel", fails=True) != str(root.resolve()):
        return f"{root} is not the root of a git repository"
    if git(root, "rev-parse", "--is-shallow-repository") != "false":
        return "the clone is shallow: git fetch --unshallow"
    return ""


def table(root: Path, claims: dict[str, dict]) -> dict:
    """{results: {file: date of its first commit}, claims: {id: {digest, stated}}}."""
    files = sorted({file for entry in claims.values() for file in files_of(entry)})
    first = {file: first_commit(root, f"{RESULTS}/{file}.json") for file in files}
    said = history(root)
    rows = {}
    for name, entry in claims.items():
        commits = said.get(digest(entry), [])
        rows[name] = {"digest": digest(entry), "stated": label(root, entry, commits, first)}
    dates = {file: git(root, "log", "-1", "--format=%aI", x) for file, x in first.items() if x}
    return {"results": dates, "claims": rows}


def label(root: Path, entry: dict, said: list[str], first: dict[str, str]) -> str:
    """before, after, or without results; `said` are the commits that hold the digest."""
    files = files_of(entry)
    if entry.get("awaits") or not files:
        return NO_RESULTS
    if all(any(precedes(root, one, first[file]) for one in said) for file in files):
        return BEFORE
    return AFTER


def files_of(entry: dict) -> list[str]:
    """The results files that a claim's checks name."""
    words = [word for check in entry.get("checks", ()) for word in check.split()]
    return sorted({word.partition(":")[0] for word in words if ":" in word})


def history(root: Path) -> dict[str, list[str]]:
    """{digest: the commits that changed the claims and hold it, oldest first}."""
    found: dict[str, list[str]] = {}
    order = ("rev-list", "--full-history", "--topo-order", "--reverse", "HEAD", "--", CLAIMS)
    for commit in git(root, *order).split():
        text = git(root, "show", f"{commit}:{CLAIMS}", fails=True)
        for entry in (yaml.load(text, Loader) or {}).values():
            found.setdefault(digest(entry), []).append(commit)
    return found


def first_commit(root: Path, path: str) -> str:
    """The first commit that holds a file, also under a name that it had before; "" if none does.

    A renamed file is found by its old name. A copy is not: fresh seeds may look much like the old.
    """
    order = ("log", "--full-history", "--topo-order", "--diff-filter=A", "--format=%H")
    added = git(root, *order, "--", path).split()
    if not added:
        return ""
    moved = git(root, "show", "-M", "--diff-filter=R", "--name-status", "--format=", added[-1])
    for line in moved.splitlines():
        _, old, new = line.split("\t")
        if new == path:
            return first_commit(root, old)
    return added[-1]


def precedes(root: Path, one: str, other: str) -> bool:
    """Whether a commit is a true ancestor of another; of results that stand in none, each is."""
    if not other:
        return True
    if one == other:
        return False
    command = ["git", "-C", str(root), "merge-base", "--is-ancestor", one, other]
    return subprocess.run(command, capture_output=True).returncode == 0


def git(root: Path, *arguments: str, fails: bool = False) -> str:
    """What git prints; "" where it may fail and does."""
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=not fails)
    return "" if done.returncode else done.stdout.strip()
