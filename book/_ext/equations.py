"""The equation index: where each numbered statement of the book is derived, computed and tested.

Labels (`eq-…`, `thm-…`, `lem-…`, `def-…`) are found where they are used: on the displays of the
chapters, and in the docstrings of the library and of the tests. Only what cannot be found, the
kind of a statement and its number in the paper, is written down, in book/equations.yml.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
DISPLAY = re.compile(r"^\$\$ \((eq-[\w-]+)\)$", re.M)
STATEMENT = re.compile(r"^:{3,}\{prf:\w+\}[^\n]*\n:label: ((?:thm|lem|def)-[\w-]+)$", re.M)
NAMED = re.compile(r"`((?:eq|thm|lem|def)-[\w-]+)`")
KINDS = {
    # kind: its badge, told apart by words, by colour, and in grey by filling and outline
    "definition": "{bdg-secondary-line}`definition`",
    "identity": "{bdg-primary}`exact identity`",
    "theorem": "{bdg-primary-line}`theorem under assumptions`",
    "tendency": "{bdg-warning}`empirical tendency`",
}


class Statement(NamedTuple):
    """One row of the index."""

    label: str
    kind: str
    paper: str
    chapter: str
    functions: list[str]
    tests: list[str]


def in_chapters() -> dict[str, str]:
    """{label: stem of the chapter that displays it}, in the order of the book."""
    found = {}
    for page in sorted(BOOK.glob("[0-9][0-9]-*.md")):
        text = page.read_text(encoding="utf-8")
        hits = [*DISPLAY.finditer(text), *STATEMENT.finditer(text)]
        for hit in sorted(hits, key=lambda hit: hit.start()):
            found[hit[1]] = page.stem
    return found


def named_in(folder: str) -> dict[str, list[str]]:
    """{label: names of the functions or tests whose docstrings name it} below a folder."""
    found = {}
    for name, docstring in documented(folder):
        for label in dict.fromkeys(NAMED.findall(docstring)):
            found.setdefault(label, []).append(name)
    return found


def first_lines(folder: str) -> dict[str, str]:
    """{name: the first line of its docstring, without labels} of all functions below a folder."""
    return {
        name: re.sub(rf"[:,]? ?{NAMED.pattern}", "", docstring.partition("\n")[0])
        for name, docstring in documented(folder)
    }


def documented(folder: str):
    """(name, docstring) of every function, class and method below a folder."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").as_posix()
        for name, docstring in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{module}::{name}", docstring


def docstrings(scope, prefix: str = ""):
    """(qualified name, docstring) of every function, class and method."""
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name, ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                yield from docstrings(node, f"{prefix}{node.name}.")


def kinds() -> dict[str, list[str]]:
    """{label: [kind, number in the paper]} as written in book/equations.yml."""
    return yaml.safe_load((BOOK / "equations.yml").read_text(encoding="utf-8"))


def index() -> list[Statement]:
    """Every numbered statement of the book, in its order."""
    written, functions, tests = kinds(), named_in("qlearn"), named_in("tests")
    return [
        Statement(
            label, *written.get(label, ["", ""]), chapter,
            functions.get(label, []), tests.get(label, []),
        )
        for label, chapter in in_chapters().items()
    ]  # fmt: skip


class EquationIndex(SphinxDirective):
    """{equation-index}: the table, generated when the page is built."""

    def run(self):
        self.env.note_reread()  # what changes the table lies outside this page
        lines = ["| Statement | Kind | Paper | Function | Test |", "|---|---|---|---|---|"]
        for row in index():
            role = "eq" if row.label.startswith("eq-") else "prf:ref"
            functions = ", ".join(_function(name) for name in row.functions)
            tests = ", ".join(f"`{name.rpartition('::')[2]}`" for name in row.tests)
            cells = [
                f"{{{role}}}`{row.label}`", KINDS[row.kind], row.paper, functions, tests,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cell or '·' for cell in cells)} |")
        container = nodes.container(classes=["equation-index"])
        self.state.nested_parse(StringList(lines, source="equation-index"), 0, container)
        return [container]


def _function(name: str) -> str:
    module, _, function = name.partition("::")
    return f"{{py:obj}}`~{module.replace('/', '.')}.{function}`"
