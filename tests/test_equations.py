"""The equation index is complete: every statement has its entry and its test, every name exists."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import equations  # noqa: E402

INDEX = equations.index()
LISTING = re.compile(r"literalinclude\} \.\./(\S+)\n:pyobject: (\S+)")


def test_statements_are_entered_once_and_nothing_else_is():
    assert set(equations.kinds()) == set(equations.in_chapters())


@pytest.mark.parametrize("row", INDEX, ids=lambda row: row.label)
def test_statement_has_a_kind_and_a_test(row):
    assert row.kind in equations.KINDS
    assert row.tests, f"no test names {row.label} in its docstring"


@pytest.mark.parametrize("folder", ["qlearn", "tests"])
def test_docstrings_name_only_statements_that_exist(folder):
    named = equations.named_in(folder)
    unknown = {
        label: names for label, names in named.items() if label not in equations.in_chapters()
    }
    assert unknown == {}


def test_tests_have_the_names_of_what_they_claim():
    """Each test on the exact floor says what it claims in its name."""
    names = re.compile(r"^def test_(?!eq_\d\d_|claim_|reference_|bug_)\w+", re.M)
    odd = [
        (path.name, hit[0])
        for path in (ROOT / "tests" / "exact").glob("test_*.py")
        for hit in names.finditer(path.read_text(encoding="utf-8"))
    ]
    assert odd == []


def test_each_numbered_equation_of_the_paper_has_a_test_of_its_name():
    """Eqs 1 to 18: at least one test_eq_NN_… each."""
    tested = {
        int(number)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
        for number in re.findall(r"eq_(\d\d)", name)
    }
    assert tested == set(range(1, 19))


def test_oracle_imports_nothing_from_the_library():
    source = (ROOT / "tests" / "exact" / "oracle.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(?:from|import) +qlearn", source, re.M)


def test_every_id_of_the_design_has_its_test():
    """A1 to I2: each id stands first in the docstring of at least one test."""
    counts = {"A": 5, "B": 4, "C": 11, "D": 6, "E": 6, "F": 6, "G": 2, "H": 4, "I": 2}
    wanted = {f"{letter}{k}" for letter, n in counts.items() for k in range(1, n + 1)}
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= set(re.findall(r'"""([A-I]\d{1,2})\b', path.read_text(encoding="utf-8")))
    assert wanted - found == set()


@pytest.mark.parametrize("page", sorted((ROOT / "book").glob("[0-9]*.md")), ids=lambda p: p.stem)
def test_listings_show_code_that_is_there(page):
    for file, name in LISTING.findall(page.read_text(encoding="utf-8")):
        source = (ROOT / file).read_text(encoding="utf-8")
        *_, last = name.split(".")
        assert re.search(rf"^\s*(?:def|class) {last}\b", source, re.M), f"{file} has no {name}"
