"""What must agree across the repository: contents, licences, citations, addresses, notebooks."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from pybtex.database import parse_file

from qlearn.results import duration, load, quote

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
PAGES = sorted(BOOK.glob("*.md"))
CHAPTERS = sorted(BOOK.glob("[0-9][0-9]-*.md"))
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
RESIDUE = re.compile(r"^:::|^[`~]{3,}\{|\{[a-z][\w:-]*\}`|^\([\w:-]+\)=|\)=$", re.M)
NOT_IN_THE_REFERENCE = ("qlearn.cli", "qlearn.solutions.")  # documented by --help, by chapters


def sources():
    """Every text file that people write; what is built, installed or exported is not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [path for name in listed if (path := ROOT / name).is_file() and path.suffix != ".ipynb"]


def test_both_tables_of_contents_are_one():
    assert (ROOT / "_toc.yml").read_bytes() == (BOOK / "_toc.yml").read_bytes()


def test_every_page_is_in_the_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    assert sorted([toc["root"], *listed]) == [page.stem for page in PAGES]


@pytest.mark.parametrize("place", ["LICENSE", "README.md", "_config.yml", "book/intro.md"])
def test_text_is_cc_by_and_code_is_mit_in(place):
    text = (ROOT / place).read_text(encoding="utf-8")
    assert "CC BY 4.0" in text and "MIT" in text
    assert set(re.findall(r"\b(?:Apache|GPL|BSD|CC BY-(?:SA|NC|ND))\b", text)) == set()


def test_metadata_names_the_same_licences():
    assert PROJECT["license"] == "MIT"  # the wheel holds code alone
    assert CITATION["license"] == ["MIT", "CC-BY-4.0"]
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert all(f"SPDX-License-Identifier: {name}" in license_text for name in CITATION["license"])


def test_citation_file_is_complete_and_agrees_with_the_package():
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license", "references"} <= set(CITATION)
    assert CITATION["version"] == PROJECT["version"]
    assert [author["name"] for author in CITATION["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]


def test_changelog_has_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(PROJECT['version'])}\]", changelog, re.M)


def test_bibliography_holds_what_is_cited_and_nothing_else():
    cited = {
        key.strip()
        for page in PAGES
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", page.read_text(encoding="utf-8"))
        for key in keys.split(",")
    }
    assert cited == set(parse_file(BOOK / "references.bib").entries)


def test_repository_address_stands_in_pyproject_alone():
    address = PROJECT["urls"]["Repository"].removeprefix("https://").encode()
    holding = [
        path.relative_to(ROOT).as_posix() for path in sources() if address in path.read_bytes()
    ]
    assert holding == ["pyproject.toml"]


def test_reference_lists_every_public_module():
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "qlearn").rglob("*.py")]
    modules = {".".join(path.parts) for path in files if not path.name.startswith("_")}
    listed = re.findall(r"automodule:: (\S+)", (BOOK / "api.md").read_text(encoding="utf-8"))
    assert len(listed) == len(set(listed))
    missing = {name for name in modules - set(listed) if not name.startswith(NOT_IN_THE_REFERENCE)}
    assert missing == set()


def test_notebooks_are_what_their_sources_say():
    """A second process, with other hashes, must write the same bytes."""
    check = subprocess.run(
        [sys.executable, "tools/export_notebooks.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_bare_and_asserts(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert any(re.search(r"^\s*assert ", cell.source, re.M) for cell in code)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_holds_no_myst(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert [RESIDUE.findall(text) for text in prose if RESIDUE.search(text)] == []


def test_nothing_installs_the_unowned_name():
    """Nobody owns `qlearn` on the package index, so an install by name would be anybody's code."""
    install = re.compile(rb"pip install (?:-\S+ )*[\"']?qlearn\b(?! @)")
    installing = [path for path in [*NOTEBOOKS, *sources()] if install.search(path.read_bytes())]
    assert installing == []


OPENING = re.compile(r"^(?P<fence>`{3,}|:{3,}|~{3,})\{(?P<name>[\w:-]+)\}")
OPTION = re.compile(r"^:[\w-]+:")
HAS_A_CAPTION = ("figure", "image", "table", "literalinclude", "code-block")


def options_that_run_over(text):
    """(line number, directive) wherever an option's value goes on after the end of its line.

    What stands below an option is another option, a blank line or the closing fence. Text without
    indentation may follow the options of an admonition or a solution, whose content it then is.
    """
    lines = [*text.split("\n"), ""]
    for number, line in enumerate(lines):
        opening = OPENING.match(line)
        if not opening:
            continue
        end = number + 1
        while OPTION.match(lines[end]):
            end += 1
        below = lines[end]
        follows = end > number + 1 and below.strip() and not below.startswith(opening["fence"])
        if follows and (below[0].isspace() or opening["name"] in HAS_A_CAPTION):
            yield end + 1, opening["name"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_bug_an_option_that_ran_over_its_line_became_the_caption(page):
    assert list(options_that_run_over(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (":::{figure} a.png\n:alt: One\n  two.\n\nCaption.\n:::", [(3, "figure")]),
        (":::{figure} a.png\n:alt: One\ntwo.\n\nCaption.\n:::", [(3, "figure")]),
        ("- a\n\n````{note}\n:class: a\n  b\n````", [(5, "note")]),
        (":::{figure} a.png\n:name: f\n:alt: One two.\n\nCaption.\n:::", []),
        ("```{literalinclude} a.py\n:pyobject: f\n```", []),
        (":::{solution} ex\n:class: dropdown\nIts first sentence.\n:::", []),
        (":::{note}\n  Indented, but no option before it.\n:::", []),
    ],
)
def test_an_option_that_runs_over_is_noticed(text, faults):
    assert list(options_that_run_over(text)) == faults


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda path: path.stem)
def test_bug_run_times_in_headers_are_measured(page):
    """They were typed, and wrong by half. Each header quotes its own chapter's."""
    header = page.read_text(encoding="utf-8").partition("**You will be able to**")[0]
    quoted = f"about {{result}}`notebook_seconds:seconds.{page.stem}:duration` to run"
    assert quoted in header and header.count(" to run") == 1
    assert not re.search(r"\d+ (seconds|minutes?) to run", header)


def test_every_chapter_was_timed():
    assert set(load("notebook_seconds")["seconds"]) == {page.stem for page in CHAPTERS}


@pytest.mark.parametrize("seconds, words", [
    (0.3, "5 seconds"), (6.2, "5 seconds"), (8.9, "10 seconds"), (23.0, "20 seconds"),
    (27, "half a minute"), (50.8, "three quarters of a minute"), (57.8, "a minute"),
    (100, "a minute and a half"), (9000, "an hour"),
])  # fmt: skip
def test_a_duration_is_the_round_time_next_to_it(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "a minute"])
def test_what_is_no_duration_is_refused(seconds):
    with pytest.raises(ValueError, match="a number of seconds above 0"):
        duration(seconds)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("nowhere:a", "no results file nowhere.json"),
        ("sample:b.a:.2f", "no key 'b.a'"),
        ("sample:a.b:.2f", "no key 'a.b'"),
        ("sample:runs:.2f", "not one number"),
    ],
)
def test_quote_says_what_is_missing(reference, reason, sample_results):
    with pytest.raises(ValueError, match=reason):
        quote(reference)


def test_quote_formats_the_value_at_the_key(sample_results):
    assert quote("sample:a:.2f") == "0.87"
    assert quote("sample:runs.1.steps:,d") == "12,000"


@pytest.fixture
def sample_results(tmp_path, monkeypatch):
    (tmp_path / "sample.json").write_text('{"a": 0.8731, "runs": [{}, {"steps": 12000}]}')
    monkeypatch.setattr("qlearn.results.files", lambda package: tmp_path)
