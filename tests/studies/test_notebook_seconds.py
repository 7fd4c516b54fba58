"""The run times that headers quote: notebooks are executed, one by one, and nothing beside them."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from qlearn.results import __main__ as results_main
from qlearn.studies import notebook_seconds


@pytest.fixture
def write_notebook(tmp_path):
    def write(name, code):
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(new_notebook(cells=[new_code_cell(code)]), path)
        return path

    return write


def test_claim_each_notebook_is_executed_in_its_folder_and_timed(tmp_path, write_notebook):
    """The longer one takes at least as long as it sleeps, and longer than the other."""
    note = "import qlearn, pathlib, time; pathlib.Path('{0}').touch(); time.sleep({1})"
    notebooks = [write_notebook("01-a", note.format("a", 0)),
                 write_notebook("02-b", note.format("b", 2))]  # fmt: skip
    found = notebook_seconds.run([0], notebooks)
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()
    assert list(found["seconds"]) == ["01-a", "02-b"] and found["seconds"]["02-b"] >= 2
    assert found["seeds"] == [0] and found["cores"] >= 1
    assert found["load_before"] >= 0 and found["load_while"] >= 0


def test_claim_the_shortest_repetition_counts(monkeypatch, tmp_path):
    times = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(notebook_seconds, "execute", lambda path: next(times))
    assert notebook_seconds.run(range(3), [tmp_path / "x.ipynb"])["seconds"] == {"x": 2.0}


def test_claim_without_a_book_there_is_a_sentence():
    with pytest.raises(ValueError, match="in a checkout of the course"):
        notebook_seconds.run([0], [])


@pytest.mark.parametrize("asked", [[], ["notebook_seconds", "proxy_map"], ["notebook_seconds"]])
def test_claim_times_are_measured_when_all_else_is_done(asked, monkeypatch):
    measured = []
    monkeypatch.setattr(results_main, "measure", measured.append)
    monkeypatch.setattr(sys, "argv", ["results", *asked])
    results_main.main()
    assert sorted(measured) == sorted(asked or results_main.MEASUREMENTS)
    assert measured[-1] == "notebook_seconds"


@pytest.mark.parametrize("inherited", [None, "elsewhere"])
def test_claim_seconds_are_from_the_kernels_start_to_its_end(
    inherited, monkeypatch, write_notebook
):
    """A clock that shows 100 s before and 107.5 s after; the kernel imports from this checkout."""
    path, given = write_notebook("01-a", "pass"), {}

    class Client:
        def __init__(self, notebook, **settings):
            given.update(settings, cells=notebook.cells)

        def execute(self, env):
            given["env"] = env

    clock = iter([100.0, 107.5])
    monkeypatch.setattr("nbclient.NotebookClient", Client)
    monkeypatch.setattr(notebook_seconds, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if inherited:
        monkeypatch.setenv("PYTHONPATH", inherited)
    monkeypatch.setenv("OTHER", "kept")
    assert notebook_seconds.execute(path) == 7.5
    root = str(notebook_seconds.ROOT)
    wanted = [root, inherited] if inherited else [root]
    assert given["env"]["PYTHONPATH"].split(os.pathsep) == wanted
    assert given["env"]["OTHER"] == "kept"
    assert given["resources"] == {"metadata": {"path": path.parent}}
    assert [cell.source for cell in given["cells"]] == ["pass"]


def test_claim_the_books_notebooks_are_timed_in_the_order_of_its_chapters(monkeypatch, tmp_path):
    """Loads of 1 before and 2 and 6 while they ran: their mean is 4. Other files are no chapter."""
    for name in ("01-a.ipynb", "02-b.ipynb", "notes.ipynb", "03-c.md"):
        (tmp_path / name).touch()
    loads = iter([1.0, 2.0, 6.0])
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *given: sorted(glob(*given), reverse=True))
    monkeypatch.setattr(notebook_seconds, "BOOK", tmp_path)
    monkeypatch.setattr(notebook_seconds, "execute", lambda path: 1.0)
    monkeypatch.setattr(notebook_seconds.os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    found = notebook_seconds.run([0])
    assert list(found["seconds"]) == ["01-a", "02-b"]
    assert (found["load_before"], found["load_while"]) == (1.0, 4.0)
