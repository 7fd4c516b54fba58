"""Writes book/NN-slug.ipynb, for Colab and Jupyter, from book/NN-slug.md.

One way and deterministic: the same sources give the same bytes. Numbers of equations, figures and
theorems are those of the site (tests/test_site.py compares them); MyST that a notebook cannot show
becomes plain Markdown, and what this file does not know is an error, never residue.

    python tools/export_notebooks.py           write what changed
    python tools/export_notebooks.py --check   exit 1 and name what is stale
"""

import argparse
import ast
import hashlib
import re
import sys
import tomllib
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

import jupytext
import nbformat
import yaml
from myst_blocks import CONTAINERS, Page, collect, counted_as, figure_of, parse
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
# an uninstalled qlearn fills the {result} role, the book's own extension the {verdict} role
sys.path[:0] = [str(ROOT), str(BOOK / "_ext")]

from ledger import settle, written  # noqa: E402

from qlearn.results import quote  # noqa: E402

FOLDED_TAGS = {"hide-input", "hide-cell"}
BOOTSTRAP = """\
try:
    import qlearn
except ModuleNotFoundError:
    %pip install --quiet --no-deps "qlearn @ git+{url}"
    import qlearn"""

ROLE = re.compile(r"\{(?P<role>[\w:-]+)\}`(?P<text>[^`]+)`")
TITLED = re.compile(r"(?P<title>.+?)\s*<(?P<target>[^<>]+)>", re.S)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


class ExportError(Exception):
    """A source that the exporter cannot turn into a notebook, said in one sentence."""


@dataclass(frozen=True)
class Book:
    """All that a page may refer to: its sisters, what is numbered or cited, where it lives."""

    pages: dict
    numbers: dict  # label -> "(1.2)", "Fig. 1.2", "Theorem 1.2"
    titles: dict  # label -> what {ref} prints: a section's title, a figure's caption
    bibliography: dict
    repository: str
    colab: str
    branch: str


def lookup(table, label, what):
    if label not in table:
        raise ExportError(f"{what} {label!r} is not defined anywhere in the book.")
    return table[label]


def citation(role, keys, book):
    """Author and year, linked to the paper: (Ziebart, 2010) or, for cite:t, Ziebart (2010)."""
    linked = []
    for key in map(str.strip, keys.split(",")):
        entry = lookup(book.bibliography, key, "The citation key")
        names = [" ".join(person.last_names) for person in entry.persons["author"]]
        who = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
        year = entry.fields["year"]
        text = f"{who} ({year})" if role == "cite:t" else f"{who}, {year}"
        url = paper_url(entry.fields)
        linked.append(f"[{text}]({url})" if url else text)
    return "; ".join(linked) if role == "cite:t" else f"({'; '.join(linked)})"


def paper_url(fields):
    if "eprint" in fields:
        return f"https://arxiv.org/abs/{fields['eprint']}"
    return f"https://doi.org/{fields['doi']}" if "doi" in fields else fields.get("url")


def page_link(stem, book):
    if lookup(book.pages, stem, "The page").is_notebook:
        return colab_link(stem, book)
    return f"{book.repository}/blob/{book.branch}/book/{stem}.md"


def colab_link(stem, book):
    path = book.repository.removeprefix("https://github.com/")
    return f"{book.colab}/github/{path}/blob/{book.branch}/book/{stem}.ipynb"


def page_title(page):
    return re.search(r"^# (.+)$", page.cells[0].source, re.M)[1]


def role(match, book):
    """Markdown for one MyST role."""
    name, text = match["role"], match["text"]
    titled = TITLED.fullmatch(text)
    title, target = (titled["title"], titled["target"]) if titled else (None, text)
    if name == "eq":
        return lookup(book.numbers, target, "The equation")
    if name in ("numref", "prf:ref"):
        number = lookup(book.numbers, target, "The label")
        bare = number.split()[-1]
        return title.replace("%s", bare).replace("{number}", bare) if title else number
    if name == "ref":
        return title or inline(lookup(book.titles, target, "The label"), book)
    if name == "doc":
        page = lookup(book.pages, target, "The page")
        return f"[{title or page_title(page)}]({page_link(target, book)})"
    if name.split(":")[0] == "cite":
        return citation(name, text, book)
    if name.startswith("py:"):
        shown = title or (text[1:].rpartition(".")[2] if text.startswith("~") else text)
        return f"`{shown}()`" if name in ("py:func", "py:meth") and not title else f"`{shown}`"
    if name == "result":
        return quote(text)
    if name == "verdict":
        return f"**{settle(text, lookup(written(), text, 'The claim')).verdict}**"
    raise ExportError(f"The exporter does not know the role {{{name}}}.")


def link(match, book):
    """Sphinx resolves links beside the page; a notebook in Colab needs full addresses."""
    text, target = match["text"], match["target"]
    if match["image"]:
        return image(target, text, book)
    if target.startswith("#"):
        raise ExportError(f"The link to {target!r} must be a {{ref}}, {{eq}} or {{numref}} role.")
    stem, suffix, _ = target.partition(".md")
    if not suffix or "://" in target:
        return match[0]
    return f"[{text or page_title(book.pages[stem])}]({page_link(stem, book)})"


def image(path, alt, book):
    if not alt:
        raise ExportError(f"The image {path!r} has no alt text.")
    return f"![{alt}]({book.repository}/raw/{book.branch}/book/{path})"


def inline(text, book):
    text = ROLE.sub(lambda match: role(match, book), text)
    return LINK.sub(lambda match: link(match, book), text)


def nested(text, book):
    return "".join(render(block, book) for block in parse(text)).strip()


def details(summary, text):
    return f"<details>\n<summary>{escape(summary)}</summary>\n\n{text}\n\n</details>"


def blockquote(title, text):
    return "\n".join(f"> {line}".rstrip() for line in f"**{title}**\n\n{text}".split("\n"))


def equation(block, book):
    body = block.body
    if r"\\" in body and not body.startswith(r"\begin"):
        body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
    tag = f" \\tag{{{book.numbers[block.label].strip('()')}}}" if block.label else ""
    return f"$$\n{body}{tag}\n$$"


def captioned(block, caption, book):
    """`**Fig. 1.2.** caption`; the caption alone where nothing numbers the block."""
    number = book.numbers.get(block.label)
    if counted_as(block) and not number:
        raise ExportError(f"The numbered {block.name} {caption!r} needs a :name: or :label:.")
    return f"**{number}.** {inline(caption, book)}" if number else inline(caption, book)


def listing(block):
    """The source of one function or class, as Sphinx's literalinclude :pyobject: shows it."""
    file = (BOOK / block.argument).resolve()
    if "pyobject" not in block.options:
        raise ExportError(f"The literalinclude of {block.argument} names no :pyobject:.")
    source = file.read_text(encoding="utf-8")
    node = ast.parse(source)
    for name in block.options["pyobject"].split("."):
        found = [child for child in node.body if getattr(child, "name", None) == name]
        if not found:
            raise ExportError(f"There is no {block.options['pyobject']} in {block.argument}.")
        node = found[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = source.splitlines()[first - 1 : node.end_lineno]
    path = file.relative_to(ROOT).as_posix()
    return f"From `{path}`:\n\n```python\n" + "\n".join(lines) + "\n```"


def statement(block, book):
    """A theorem, a proof or an exercise: a bold heading with its number, then its text."""
    kind = (block.name.removeprefix("prf:").removesuffix("-start")).capitalize()
    number = book.numbers.get(block.label, kind)
    if counted_as(block) and not block.label:
        raise ExportError(f"The {kind.lower()} {block.argument!r} needs a :label:.")
    title = f" ({inline(block.argument, book)})" if block.argument else ""
    end = " ∎" if kind == "Proof" else ""
    return f"**{number}{title}.**\n\n{nested(block.body, book)}{end}"


def render(block, book):
    """Markdown for one block."""
    name = block.name
    if not name:
        return inline(block.body, book)
    if name == "verbatim":
        return block.body
    if name in ("target", "exercise-end"):
        return ""
    if name == "math":
        return equation(block, book)
    if name.startswith("prf:") or name in ("exercise", "exercise-start"):
        return statement(block, book)
    if name == "solution":
        return details(solution_title(block, book), nested(block.body, book))
    if name in CONTAINERS and name != "table":
        return admonition(block, book)
    return illustration(block, book)


def admonition(block, book):
    title = block.argument or {"seealso": "See also"}.get(block.name, block.name.capitalize())
    text = nested(block.body, book)
    if block.name == "dropdown" or "dropdown" in block.options.get("class", "").split():
        return details(title, text)
    return blockquote(inline(title, book), text)


def illustration(block, book):
    """Figures, images, tables and listings, each with its numbered caption."""
    caption = block.options.get("caption", "")
    if block.name in ("figure", "image"):
        shown, caption = image(block.argument, block.options.get("alt"), book), block.body
    elif block.name == "table":
        shown, caption = nested(block.body, book), block.argument
    elif block.name == "literalinclude":
        shown = listing(block)
    elif block.name == "code-block":
        shown = f"```{block.argument}\n{block.body}\n```"
    else:
        raise ExportError(f"The exporter does not know the directive {{{block.name}}}.")
    return f"{shown}\n\n{captioned(block, caption, book)}" if caption else shown


def solution_title(block, book):
    return f"Solution to {lookup(book.numbers, block.argument, 'The exercise')}"


def markdown(source, solving, book):
    """A cell's Markdown, and the title of the solution still open at its end ("" for none)."""
    pieces = []
    for block in parse(source):
        if block.name == "solution-start":
            solving = solution_title(block, book)
        elif block.name == "solution-end":
            solving = ""
        else:
            pieces.append((solving, render(block, book)))
    groups = []
    for title, group in groupby(pieces, key=lambda piece: piece[0]):
        text = re.sub(r"\n{3,}", "\n\n", "".join(piece for _, piece in group)).strip()
        groups.append(details(title, text) if title and text else text)
    return "\n\n".join(filter(None, groups)), solving


def code(cell, solving):
    """A code cell; folded (in Colab and in JupyterLab) in solutions and where the site folds."""
    tags = cell.metadata.get("tags", [])
    metadata = {"tags": tags} if tags else {}
    if not solving and not FOLDED_TAGS & set(tags):
        return new_code_cell(cell.source, metadata=metadata)
    metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}
    return new_code_cell(f"#@title {solving or 'Code'}\n{cell.source}", metadata=metadata)


def cells_of(page, book):
    yield new_markdown_cell(
        f"[Open in Colab]({colab_link(page.stem, book)}) · generated from `book/{page.stem}.md` "
        "by `tools/export_notebooks.py`"
    )
    yield new_code_cell(BOOTSTRAP.format(url=book.repository))
    solving = ""
    for cell in page.cells:
        if cell.cell_type == "code":
            yield code(cell, solving)
            figure = figure_of(cell)
            if figure.body:
                yield new_markdown_cell(captioned(figure, figure.body, book))
        else:
            text, solving = markdown(cell.source, solving, book)
            if cell is page.cells[0] and page.chapter:
                text = text.replace("# ", f"# {page.chapter}. ", 1)
            if text:
                yield new_markdown_cell(text)


def notebook(page, book):
    """The notebook's text: nbformat 4.5, no outputs, ids that depend on the source alone."""
    cells = list(cells_of(page, book))
    for index, cell in enumerate(cells):
        name = f"{page.stem}/{index}/{cell.source}"
        cell["id"] = hashlib.sha1(name.encode()).hexdigest()[:12]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    result = new_notebook(cells=cells, metadata=metadata)
    result.nbformat_minor = 5
    nbformat.validate(result)
    return nbformat.writes(result) + "\n"


def read_pages():
    """Every page of the table of contents, chapters numbered as the site numbers them."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    pages, chapter = [read_page(toc["root"], None)], 0
    for part in toc["parts"]:
        for entry in part["chapters"]:
            chapter += bool(part.get("numbered"))
            pages.append(read_page(entry["file"], chapter if part.get("numbered") else None))
    return pages


def read_page(stem, chapter):
    file = BOOK / f"{stem}.md"
    if not file.is_file():
        raise ExportError(f"_toc.yml lists {stem}, but book/{stem}.md does not exist.")
    source = jupytext.reads(file.read_text(encoding="utf-8"), fmt="md:myst")
    return Page(stem, chapter, source.cells, "kernelspec" in source.metadata)


def read_book():
    pages = read_pages()
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return Book(
        {page.stem: page for page in pages},
        *collect(pages),
        bibliography=parse_file(BOOK / "references.bib").entries,
        repository=project["urls"]["Repository"],
        colab=config["launch_buttons"]["colab_url"],
        branch=config["repository"]["branch"],
    )


def export():
    """What book/ should hold: {path of the notebook: its text}."""
    book, notebooks = read_book(), {}
    for page in book.pages.values():
        if page.is_notebook:
            try:
                notebooks[BOOK / f"{page.stem}.ipynb"] = notebook(page, book)
            except (ExportError, ValueError) as error:
                raise ExportError(f"book/{page.stem}.md: {error}") from error
    return notebooks


def stale(notebooks):
    """Notebooks that differ from their source, and those that have none."""
    old = {path: path.read_text(encoding="utf-8") for path in BOOK.glob("*.ipynb")}
    return sorted(path for path in {*notebooks, *old} if notebooks.get(path) != old.get(path))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args(arguments).check
    try:
        notebooks = export()
    except ExportError as error:
        sys.exit(str(error))
    outdated = stale(notebooks)
    if check and outdated:
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in outdated)
        sys.exit(f"Stale, run `python tools/export_notebooks.py`: {names}")
    for path in outdated:
        if path in notebooks:
            path.write_text(notebooks[path], encoding="utf-8")


if __name__ == "__main__":
    main()
