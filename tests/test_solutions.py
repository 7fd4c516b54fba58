"""Every exercise: its solution passes its checker, nonsense does not, and no number is missing."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import qlearn
import qlearn.solutions

BOOK = Path(__file__).resolve().parents[1] / "book"
CHAPTERS = [m.name for m in pkgutil.iter_modules(qlearn.solutions.__path__)]
EXERCISES = [
    (name, int(attribute.removeprefix("check_")))
    for name in CHAPTERS
    for attribute in dir(importlib.import_module(f"qlearn.solutions.{name}"))
    if attribute.startswith("check_")
]


@pytest.mark.parametrize(("chapter", "number"), EXERCISES)
def test_claim_solution_passes_and_nonsense_fails(chapter, number, capsys):
    module = importlib.import_module(f"qlearn.solutions.{chapter}")
    exercise = f"{chapter.removeprefix('ch')}.{number}"
    qlearn.check(exercise, getattr(module, f"solution_{number}"))
    assert capsys.readouterr().out == f"{exercise}: correct.\n"
    for wrong in (lambda *args, **kwargs: 0.123, -12345.678, "no idea"):
        with pytest.raises(AssertionError) as hint:
            qlearn.check(exercise, wrong)
        assert str(hint.value).strip()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_bug_of_the_chapter_is_caught(chapter):
    """Each chapter plants a bug (`bug_k`) that the checker of exercise k must catch."""
    module = importlib.import_module(f"qlearn.solutions.{chapter}")
    bugs = [name for name in dir(module) if re.fullmatch(r"bug_\d", name)]
    assert bugs
    for name in bugs:
        with pytest.raises(AssertionError):
            getattr(module, name.replace("bug", "check"))(getattr(module, name))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_claim_the_book_asks_every_exercise(chapter):
    (page,) = BOOK.glob(f"{chapter.removeprefix('ch')}-*.md")
    asked = set(re.findall(r'check\("(\d\d\.\d)"', page.read_text(encoding="utf-8")))
    here = {f"{chapter.removeprefix('ch')}.{n}" for c, n in EXERCISES if c == chapter}
    assert asked == here


def test_claim_unknown_exercises_are_named():
    with pytest.raises(ValueError, match=r"There is no exercise '99\.1'"):
        qlearn.check("99.1", 0)


def test_claim_a_blank_is_not_an_error(capsys):
    qlearn.check(f"{CHAPTERS[0].removeprefix('ch')}.1", None)
    assert "no answer yet" in capsys.readouterr().out
