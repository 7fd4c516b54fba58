"""Plants one fault at a time in the exact floor and the losses, and runs their tests on it.

    python tools/mutate.py [--only qlearn/exact/soft.py] [--workers 2]

Faults: a plus for a minus and the reverse, a product for a quotient, a lost minus sign, a lost
term (so also a missing π_ref, and an index off by one). A fault that no test notices is a survivor:
it is printed, and the command exits with 1. Text of error messages is left alone, and so are
annotations, defaults and docstrings.
"""

import argparse
import ast
import copy
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import hypothesis  # noqa: F401  what every test needs is loaded once, before the workers fork
import pytest
import scipy.stats  # noqa: F401
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = [*sorted(ROOT.glob("qlearn/exact/[a-z]*.py")), ROOT / "qlearn" / "losses.py"]
COPIED = ("qlearn", "tests", "pyproject.toml", "tools", "book/errata.md")
TESTS = ("tests/exact/test_*.py", "tests/test_losses.py", "tests/test_errata.py")
WORKPLACE = ROOT  # each worker has its own


class Fault(NamedTuple):
    """One planted fault: where it is, what it does, and the source with it."""

    file: Path
    line: int
    name: str
    what: str
    source: str


class Sites(ast.NodeVisitor):
    """Collects (function, node, [(description, change)]) of everything that can be broken."""

    def __init__(self):
        self.scope, self.found = [], []

    def visit_FunctionDef(self, node):
        self.scope.append(node.name)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        for statement in body:
            self.visit(statement)
        self.scope.pop()

    def visit_ClassDef(self, node):
        self.scope.append(node.name)
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                self.visit(statement)
        self.scope.pop()

    def visit_Raise(self, node):
        """Messages are prose."""

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_JoinedStr(self, node):
        """So are f-strings."""

    def visit_BinOp(self, node):
        swaps = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
        other = swaps.get(type(node.op))
        if other:
            self.add(node, f"{ast.unparse(node)} with {other.__name__.lower()}", "op", other())
        if isinstance(node.op, ast.Add | ast.Sub):
            self.add(node, f"{ast.unparse(node)} without its right side", "lose")
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.add(node, f"{ast.unparse(node)} without its sign", "unsign")
        self.generic_visit(node)

    def add(self, node, what, kind, value=None):
        if self.scope:
            self.found.append((".".join(self.scope), node, what, kind, value))


def faults_of(file: Path) -> list[Fault]:
    """Every fault that can be planted in one file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    sites = Sites()
    sites.visit(tree)
    faults = []
    for number, (name, node, what, kind, value) in enumerate(sites.found):
        broken = copy.deepcopy(tree)
        again = Sites()
        again.visit(broken)
        _, twin, *_ = again.found[number]
        replacement = {
            "op": lambda twin=twin, value=value: ast.BinOp(twin.left, value, twin.right),
            "lose": lambda twin=twin: twin.left,
            "unsign": lambda twin=twin: twin.operand,
        }[kind]()
        broken = Replace(twin, replacement).visit(broken)
        source = ast.unparse(ast.fix_missing_locations(broken))
        faults.append(Fault(file, node.lineno, f"{file.stem}.{name}", what, source))
    return faults


class Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else super().visit(node)


def survives(fault: Fault) -> bool:
    """Whether all tests pass on this worker's copy of the repository, with the fault in it."""
    target = WORKPLACE / fault.file.relative_to(ROOT)
    original = target.read_text(encoding="utf-8")
    target.write_text(fault.source, encoding="utf-8")
    try:
        child = os.fork()  # torch is loaded already, qlearn is not
        if child == 0:
            _run_tests(likeliest_first(fault))
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == 0
    finally:
        target.write_text(original, encoding="utf-8")


def _run_tests(files: list[str]) -> None:
    signal.alarm(300)  # kills this process: a loop that never ends is noticed, too
    code = 1
    try:
        os.chdir(WORKPLACE)
        sys.path.insert(0, str(WORKPLACE))
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:nbval", *files])
    finally:
        os._exit(code)


def set_up_worker(folder: str) -> None:
    """A copy of what the tests need, for this process alone."""
    global WORKPLACE
    torch.set_num_threads(1)
    os.environ["QLEARN_SEEDS"] = "12"
    WORKPLACE = Path(folder) / str(os.getpid())
    for name in COPIED:
        source, target = ROOT / name, WORKPLACE / name
        if source.is_dir():
            # the root conftest of the tests loads transformers, which nothing here needs
            skip = shutil.ignore_patterns("__pycache__", "conftest.py")
            shutil.copytree(source, target, ignore=skip)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def likeliest_first(fault: Fault) -> list[str]:
    """All test files, those that name the broken function before the others."""
    files = [path for x in TESTS for path in sorted(WORKPLACE.glob(x))]
    function = fault.name.rpartition(".")[2].strip("_")

    def rank(path):
        named = function in path.read_text(encoding="utf-8")
        return (not named, path.name != f"test_{fault.file.stem}.py")

    return [str(path) for path in sorted(files, key=rank)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="files to break; default: all")
    parser.add_argument("--workers", type=int, default=2, help="how many run at once")
    options = parser.parse_args()
    files = [ROOT / x for x in options.only] or FILES
    faults = [fault for file in files for fault in faults_of(file)]
    none = faults[0]._replace(source=faults[0].file.read_text(encoding="utf-8"))
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("fork").Pool(options.workers, set_up_worker, (folder,)) as pool,
    ):
        if not pool.apply(survives, (none,)):
            print("The tests fail without any fault; run them first.")
            return 2
        survivors = 0
        for number, (fault, alive) in enumerate(
            zip(faults, pool.imap(survives, faults), strict=True), start=1
        ):
            survivors += alive
            if alive:
                print(f"survivor: {fault.name}, line {fault.line}: {fault.what}", flush=True)
            elif number % 20 == 0:
                print(f"{number} of {len(faults)}", flush=True)
    print(f"{len(faults)} faults planted, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
