"""MyST text as blocks, and the numbers that the site gives them."""

import re
from collections import Counter
from dataclasses import dataclass, field

NAMED_ADMONITIONS = ("note", "tip", "hint", "important", "warning", "caution", "seealso")
CONTAINERS = (*NAMED_ADMONITIONS, "admonition", "dropdown", "exercise", "solution", "table")

BLOCK = re.compile(
    r"""^(?P<fence>`{3,}|:{3,}|~{3,})(?P<head>[^\n]*)\n(?P<body>(?:[^\n]*\n)*?)(?P=fence)[ ]*$
      | ^\$\$(?P<math>.+?)\$\$[ ]*(?:\((?P<label>[^()\s]+)\))?[ ]*$
      | ^\((?P<target>[^()\s]+)\)=[ ]*\n+(?=\#+[ ]+(?P<heading>[^\n]+)|)
      | ^%[^\n]*$""",
    re.M | re.S | re.X,
)
DIRECTIVE = re.compile(r"\{(?P<name>[\w:-]+)\}\s*(?P<argument>.*?)\s*$")
OPTION = re.compile(r":([\w-]+):[ ]*([^\n]*)\n")


@dataclass(frozen=True)
class Block:
    """A piece of MyST: prose (no name), "verbatim" code, a "target", "math" or a directive."""

    name: str
    body: str
    argument: str = ""
    options: dict = field(default_factory=dict)

    @property
    def label(self):
        return self.options.get("label") or self.options.get("name")


@dataclass(frozen=True)
class Page:
    stem: str
    chapter: int | None  # its number on the site, where it has one
    cells: list
    is_notebook: bool


def parse(text):
    """The blocks of MyST text, in order."""
    end = 0
    for match in BLOCK.finditer(text):
        yield Block("", text[end : match.start()])
        end = match.end()
        if match["fence"]:
            yield _fenced(match)
        elif match["math"]:
            yield Block("math", match["math"].strip(), options={"label": match["label"]})
        elif match["target"]:
            yield Block("target", match["heading"] or "", argument=match["target"])
    yield Block("", text[end:])


def _fenced(match):
    directive = DIRECTIVE.match(match["head"].strip())
    if not directive:
        return Block("verbatim", match[0])
    body, options = match["body"], {}
    while option := OPTION.match(body):
        options[option[1]] = option[2].strip()
        body = body[option.end() :]
    return Block(directive["name"], body.strip("\n"), directive["argument"], options)


def walk(text):
    """Blocks in the order in which Sphinx numbers them: a container before what it holds."""
    for block in parse(text):
        yield block
        if block.name in CONTAINERS or block.name.startswith("prf:"):
            yield from walk(block.body)


def counted_as(block):
    """The word before the block's number on the site; None where it has no number."""
    if block.name == "math" and block.label:
        return "Equation"
    if block.name.startswith("prf:") and block.name != "prf:proof":
        return None if "nonumber" in block.options else block.name[4:].capitalize()
    if block.name in ("exercise", "exercise-start"):
        return None if "nonumber" in block.options else "Exercise"
    if block.name == "figure" and block.body:
        return "Fig."
    if block.name in ("literalinclude", "code-block") and "caption" in block.options:
        return "Listing"
    return "Table" if block.name == "table" and block.argument else None


def figure_of(cell):
    """The figure that a code cell's `mystnb` metadata asks for, as a figure block."""
    figure = cell.metadata.get("mystnb", {}).get("figure", {})
    return Block("figure", figure.get("caption", "").strip(), options={"name": figure.get("name")})


def collect(pages):
    """Numbers and titles of every label in the book."""
    numbers, titles = {}, {}
    for page in pages:
        count = Counter()
        for cell in page.cells:
            code = cell.cell_type == "code"
            for block in [figure_of(cell)] if code else walk(cell.source):
                kind = counted_as(block)
                count[kind] += 1
                number = f"{page.chapter}.{count[kind]}" if page.chapter else str(count[kind])
                if block.name == "target":
                    titles[block.argument] = block.body
                elif kind and block.label:
                    shown = f"({number})" if kind == "Equation" else f"{kind} {number}"
                    numbers[block.label] = shown
                    titles[block.label] = block.body if kind == "Fig." else shown
    return numbers, titles
