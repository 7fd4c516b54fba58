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
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILES = [*sorted(ROOT.glob("qlearn/exact/[a-z]*.py")), ROOT / "qlearn" / "losses.py"]
COPIED = ("qlearn", "tests", "conftest.py", "pyproject.toml", "tools")
TESTS = ("tests/exact", "tests/test_losses.py", "tests/test_errata.py")


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


def survives(fault: Fault, workplace: Path) -> bool:
    """Whether all tests pass on a copy of the repository that holds the fault."""
    target = workplace / fault.file.relative_to(ROOT)
    original = target.read_text(encoding="utf-8")
    target.write_text(fault.source, encoding="utf-8")
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
        *likeliest_first(fault, workplace),
    ]  # fmt: skip
    environment = {**os.environ, "QLEARN_SEEDS": "12", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(workplace)}  # fmt: skip
    try:
        run = subprocess.run(
            command, cwd=workplace, env=environment, capture_output=True, timeout=300
        )
        return run.returncode == 0
    except subprocess.TimeoutExpired:
        return False  # a loop that never ends is noticed, too
    finally:
        target.write_text(original, encoding="utf-8")


def likeliest_first(fault: Fault, workplace: Path) -> list[str]:
    """All test files, those that name the broken function before the others."""
    files = [f for x in TESTS for f in ([x] if x.endswith(".py") else _test_files(workplace / x))]
    function = fault.name.rpartition(".")[2].strip("_")
    texts = {f: (workplace / f).read_text(encoding="utf-8") for f in files}
    same = f"test_{fault.file.stem}.py"
    return sorted(files, key=lambda f: (-(function in texts[f]), not f.endswith(same)))


def _test_files(folder: Path) -> list[str]:
    return [f"tests/exact/{path.name}" for path in sorted(folder.glob("test_*.py"))]


def copy_repository(to: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, to / name)
    (to / "book").mkdir()
    shutil.copy2(ROOT / "book" / "errata.md", to / "book")
    return to


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="files to break; default: all")
    parser.add_argument("--workers", type=int, default=2, help="how many run at once")
    options = parser.parse_args()
    files = [ROOT / x for x in options.only] or FILES
    faults = [fault for file in files for fault in faults_of(file)]
    with tempfile.TemporaryDirectory() as folder:
        places = Queue()
        for k in range(options.workers):
            place = Path(folder) / str(k)
            place.mkdir()
            places.put(copy_repository(place))

        def run(fault):
            place = places.get()
            try:
                return survives(fault, place)
            finally:
                places.put(place)

        if not run(faults[0]._replace(source=faults[0].file.read_text(encoding="utf-8"))):
            print("The tests fail without any fault; run them first.")
            return 2
        survivors = []
        with ThreadPoolExecutor(options.workers) as pool:
            for number, (fault, alive) in enumerate(
                zip(faults, pool.map(run, faults), strict=True), start=1
            ):
                if alive:
                    survivors.append(fault)
                    print(f"survivor: {fault.name}, line {fault.line}: {fault.what}", flush=True)
                elif number % 20 == 0:
                    print(f"{number} of {len(faults)}", flush=True)
    print(f"{len(faults)} faults planted, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
