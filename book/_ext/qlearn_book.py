"""What this book adds to Jupyter Book: fresh outputs, local MathJax, quoted numbers."""

import hashlib
import os
import re
import shutil
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from equations import EquationIndex
from ledger import ClaimsLedger, VerdictRole
from sphinx.errors import ConfigError
from sphinx.util.docutils import SphinxRole

ROOT = Path(__file__).resolve().parents[2]
SALTING_PACKAGES = ("numpy", "torch", "transformers", "matplotlib")
BAR = re.compile(r"(`[^`]*`)|\|")
MATHJAX_PACKAGE = "sphinx-mathjax-offline"


def tree_hash(paths, *facts: str) -> str:
    digest = hashlib.sha256("\n".join(facts).encode())
    for path in sorted(paths):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def library_hash() -> str:
    """Changes whenever a chapter's outputs could: library source, results, numeric packages."""
    kinds = ("**/*.py", "results/*.json", "recipes/*.yaml")
    sources = [path for kind in kinds for path in (ROOT / "qlearn").glob(kind)]
    return tree_hash(sources, *(f"{name}=={version(name)}" for name in SALTING_PACKAGES))


def assets_hash() -> str:
    folders = ("assets", "_templates")
    files = [path for folder in folders for path in ROOT.glob(f"book/{folder}/**/*")]
    return tree_hash(path for path in files if path.is_file())


def make_importable() -> None:
    """Lets Sphinx and the kernels it starts import a qlearn that nobody has installed."""
    sys.path.insert(0, str(ROOT))
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
    # By default idle threads spin for so long that two kernels on two cores are 30 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ["TQDM_DISABLE"] = "1"  # a page has no use for progress bars; Colab shows them
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # nor for tqdm's missing widgets


def configure(app, config) -> None:
    # jupyter-cache keys on cells alone, so the path itself must change with the library.
    config.nb_execution_cache_path = str(
        Path(app.outdir).parent / f".jupyter_cache-{library_hash()}"
    )
    # Where no page changed, Sphinx writes no style sheet either, unless a setting did.
    config.qlearn_assets = assets_hash()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.html_theme_options.update(
        repository_url=project["urls"]["Repository"],
        use_repository_button=True,
        use_edit_page_button=True,
        use_issues_button=True,
        navbar_persistent=[],  # the sidebar has a search box; the theme would put a second on top
    )


def copy_mathjax(app) -> None:
    """Puts one script and its fonts (1.6 of the package's 24 MB) into the built site."""
    if app.builder.format != "html":
        return
    package = find_spec(MATHJAX_PACKAGE)
    if package is None:
        raise ConfigError(f'{MATHJAX_PACKAGE} is missing: pip install -e ".[book]"')
    source = Path(package.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    script = Path(app.config.mathjax_path).name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source / script, target / script)
    fonts = Path("output/chtml/fonts/woff-v2")
    shutil.copytree(source / fonts, target / fonts, dirs_exist_ok=True)


class ResultRole(SphinxRole):
    """{result}`NAME:dotted.key:FORMAT` prints a measured number from qlearn/results."""

    def run(self):
        from qlearn.results import quote

        try:
            return [nodes.Text(quote(self.text))], []
        except ValueError as error:
            message = self.inliner.reporter.error(str(error), line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]


def plain_docstring(app, what, name, obj, options, lines) -> None:
    """Our docstrings are plain text: indented formulas keep their layout, π(a|s) its bar."""
    shown, literal = [], False
    for line in lines if not lines[0].startswith("Alias for field number") else []:
        indented = line.startswith(" ") and not (shown and shown[-1].lstrip().startswith("- "))
        if indented and not literal:
            shown += ["", ".. code-block:: text", ""]
        elif line and literal and not indented:
            shown.append("")
        literal = indented or (literal and not line)
        shown.append(line if literal else BAR.sub(lambda found: found[1] or r"\|", line))
    lines[:] = shown


def setup(app) -> dict:
    make_importable()
    app.add_config_value("qlearn_assets", "", "html")
    app.add_role("result", ResultRole())
    app.add_role("verdict", VerdictRole())
    app.add_directive("equation-index", EquationIndex)
    app.add_directive("claims-ledger", ClaimsLedger)
    app.connect("config-inited", configure)
    app.connect("builder-inited", copy_mathjax)
    app.connect("autodoc-process-docstring", plain_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
