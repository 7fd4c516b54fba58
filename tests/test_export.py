"""The exporter turns every construct that chapters may use into Markdown a notebook can show."""

import export_notebooks as exporter
import jupytext
import pytest
from myst_blocks import Page, collect
from pybtex.database import parse_string

BIBLIOGRAPHY = """
@misc{luce, author = {Luce, R. Duncan}, title = {T}, year = {1959}}
@misc{many, author = {A, B and C, D and E, F}, title = {T}, year = {2024}, eprint = {2404.12358}}
"""
CHAPTER = """\
---
kernelspec: {name: python3, display_name: Python 3}
---

# Trees

"""


def book_of(*sources):
    """A book whose chapters hold these sources, at an address of its own."""
    read = [jupytext.reads(CHAPTER + source, fmt="md:myst").cells for source in sources]
    pages = [Page(f"page{i}", i, cells, True) for i, cells in enumerate(read, start=1)]
    entries = parse_string(BIBLIOGRAPHY, "bibtex").entries
    return exporter.Book(
        {page.stem: page for page in pages},
        *collect(pages),
        bibliography=entries,
        repository="https://github.com/o/r",
        colab="https://colab",
        branch="main",
    )


def cells_of(source, *others):
    book = book_of(source, *others)
    return [cell for cell in exporter.cells_of(book.pages["page1"], book)][2:]


def markdown_of(source, *others):
    return "\n\n".join(c.source for c in cells_of(source, *others) if c.cell_type == "markdown")


@pytest.mark.parametrize(
    ("myst", "plain"),
    [
        ("$$\na = b\n$$ (eq-a)\n\nBy {eq}`eq-a`.", "$$\na = b \\tag{1.1}\n$$\n\nBy (1.1)."),
        ("$$ a = b $$ (eq-a)", "$$\na = b \\tag{1.1}\n$$"),
        ("```{math}\n:label: eq-a\na = b\n```", "$$\na = b \\tag{1.1}\n$$"),
        (
            "$$\na &= b \\\\\nc &= d\n$$",
            "$$\n\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}\n$$",
        ),
        ("(here)=\n## A *place*\n\nSee {ref}`here`.", "## A *place*\n\nSee A *place*."),
        ("See {ref}`there <here>`.\n\n(here)=\n## Place", "See there.\n\n## Place"),
        ("{cite}`luce,many`", "(Luce, 1959; [A et al., 2024](https://arxiv.org/abs/2404.12358))"),
        ("{cite:t}`luce` knew", "Luce (1959) knew"),
        ("{py:func}`~qlearn.losses.dpo` {py:mod}`qlearn.losses`", "`dpo()` `qlearn.losses`"),
        ("{doc}`page1`", "[Trees](https://colab/github/o/r/blob/main/book/page1.ipynb)"),
        ("[us](page1.md)", "[us](https://colab/github/o/r/blob/main/book/page1.ipynb)"),
        ("[out](https://x.org/a.md)", "[out](https://x.org/a.md)"),
        (":::{note}\nMind $x$.\n:::", "> **Note**\n>\n> Mind $x$."),
        (":::{admonition} Not *so*\nNo.\n:::", "> **Not *so***\n>\n> No."),
        (
            ":::{dropdown} Quiz\nTwo.\n:::",
            "<details>\n<summary>Quiz</summary>\n\nTwo.\n\n</details>",
        ),
        (
            ":::{prf:theorem} Main\n:label: thm\nTrue.\n:::\n\n{prf:ref}`thm`",
            "**Theorem 1.1 (Main).**\n\nTrue.\n\nTheorem 1.1",
        ),
        (":::{prf:proof}\nClear.\n:::", "**Proof.**\n\nClear. ∎"),
        (
            ":::{exercise} Find the bug\n:label: ex\nDo.\n:::\n\n{ref}`ex`",
            "**Exercise 1.1 (Find the bug).**\n\nDo.\n\nExercise 1.1",
        ),
        (
            "```{figure} assets/a.svg\n:name: fig\n:alt: A tree\n\nGrown.\n```\n\n{numref}`fig`",
            "![A tree](https://github.com/o/r/raw/main/book/assets/a.svg)\n\n"
            "**Fig. 1.1.** Grown.\n\nFig. 1.1",
        ),
        ("```{table} Rows\n:name: tbl\n\n| a |\n|---|\n```", "| a |\n|---|\n\n**Table 1.1.** Rows"),
        ("```python\n{eq}`kept`\n```", "```python\n{eq}`kept`\n```"),
        ("% hidden\n\nShown.", "Shown."),
    ],
)
def test_myst_becomes_plain_markdown(myst, plain):
    assert markdown_of(myst) == f"# 1. Trees\n\n{plain}"


def test_numbers_count_per_chapter_and_reach_other_chapters():
    first = ":::{prf:lemma}\n:label: l1\nA.\n\n$$ x $$ (eq-x)\n:::\n\n$$ y $$ (eq-y)\n"
    second = "$$ z $$ (eq-z)\n\n:::{prf:lemma}\n:label: l2\nB.\n:::\n"
    numbers = book_of(first, second).numbers
    assert numbers == {
        "l1": "Lemma 1.1",
        "eq-x": "(1.1)",
        "eq-y": "(1.2)",
        "eq-z": "(2.1)",
        "l2": "Lemma 2.1",
    }
    assert "By (2.1)." in markdown_of(first + "\nBy {eq}`eq-z`.", second)


def test_listing_is_the_source_of_the_object():
    shown = markdown_of("```{literalinclude} ../qlearn/losses.py\n:pyobject: nll\n```")
    assert shown.startswith("# 1. Trees\n\nFrom `qlearn/losses.py`:\n\n```python\ndef nll(")


def test_solution_is_folded_in_prose_and_in_code():
    cells = cells_of(
        ":::{exercise}\n:label: ex\nDo.\n:::\n\n```{solution-start} ex\n:class: dropdown\n```\n\n"
        "Because.\n\n```{code-cell}\nassert True\n```\n\n```{solution-end}\n```\n\nOpen.\n\n"
        "```{code-cell}\nx = 1\n```\n"
    )
    prose, inside, after, outside = cells
    assert prose.source.endswith(
        "<details>\n<summary>Solution to Exercise 1.1</summary>\n\nBecause.\n\n</details>"
    )
    assert inside.source == "#@title Solution to Exercise 1.1\nassert True"
    assert inside.metadata == {"cellView": "form", "jupyter": {"source_hidden": True}}
    assert after.source == "Open."
    assert outside.source == "x = 1" and outside.metadata == {}


def test_figure_of_a_code_cell_keeps_its_caption_and_number():
    source = (
        "```{code-cell}\n---\nmystnb:\n  image: {alt: A line}\n"
        "  figure: {name: fig, caption: A line.}\n---\nplt.show()\n```\n\nSee {numref}`fig`.\n"
    )
    assert [cell.source for cell in cells_of(source)][1:] == [
        "plt.show()",
        "**Fig. 1.1.** A line.",
        "See Fig. 1.1.",
    ]


@pytest.mark.parametrize(
    ("myst", "reason"),
    [
        ("{eq}`nowhere`", "'nowhere' is not defined"),
        ("{cite}`nobody`", "'nobody' is not defined"),
        ("{abbr}`x`", "does not know the role {abbr}"),
        (":::{glossary}\nx\n:::", "does not know the directive {glossary}"),
        ("```{image} a.png\n```", "'a.png' has no alt text"),
        ("[x](#y)", "must be a {ref}"),
        (":::{prf:lemma}\nx\n:::", "needs a :label:"),
        ("```{literalinclude} ../qlearn/losses.py\n:pyobject: no\n```", "There is no no in"),
        ("```{literalinclude} ../qlearn/losses.py\n```", "names no :pyobject:"),
    ],
)
def test_what_a_notebook_cannot_show_is_an_error(myst, reason):
    with pytest.raises(exporter.ExportError, match=reason):
        markdown_of(myst)


def test_check_fails_and_names_the_stale_notebook(monkeypatch):
    notebooks = exporter.export()
    path = next(iter(notebooks))
    monkeypatch.setattr(exporter, "export", lambda: notebooks | {path: "changed"})
    with pytest.raises(SystemExit, match=path.name):
        exporter.main(["--check"])
