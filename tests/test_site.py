"""The built site: complete, reachable, readable offline, and numbered like the notebooks."""

import functools
import os
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote, urldefrag

import export_notebooks
import pytest
from bs4 import BeautifulSoup
from docutils.nodes import make_id

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if not {"_static", "_sources"} & set(path.relative_to(SITE).parts)
)
BUILT_FROM_TEXT = [page for page in PAGES if (ROOT / "book" / page).with_suffix(".md").is_file()]
LEFTOVER = re.compile(r":::|\{[a-z][\w:-]*\}`|^\([\w:-]+\)=|\$\$", re.M)

if not PAGES and not os.environ.get("CI"):
    pytest.skip("there is no site to look at: run `make book`", allow_module_level=True)


@functools.cache
def soup(page):
    return BeautifulSoup((SITE / page).read_text(encoding="utf-8"), "html.parser")


def every_page(test):
    return pytest.mark.parametrize("page", PAGES)(test)


def every_text(test):
    return pytest.mark.parametrize("page", BUILT_FROM_TEXT)(test)


def test_every_source_has_its_page():
    assert sorted(f"{path.stem}.html" for path in (ROOT / "book").glob("*.md")) == BUILT_FROM_TEXT


@every_text
def test_page_has_a_language_a_title_and_one_first_heading(page):
    assert soup(page).html["lang"] == "en"
    assert soup(page).title.get_text(strip=True)
    assert len(soup(page).find_all("h1")) == 1


@every_text
def test_images_say_what_they_show(page):
    alts = [image.get("alt", "") for image in soup(page).select("article img")]
    assert [alt for alt in alts if not alt.strip() or alt.startswith("_images/")] == []


@every_page
def test_page_loads_nothing_from_elsewhere(page):
    loads = [
        tag.get("src") or tag.get("href") or tag.get("data")
        for tag in soup(page).select("script[src], img[src], iframe, source, object, link[href]")
        if tag.get("rel") not in (["canonical"], ["license"])
    ]
    assert [address for address in loads if re.match(r"(https?:)?//", address or "//")] == []


@every_page
def test_links_inside_the_site_resolve(page):
    broken = []
    for anchor in soup(page).find_all("a", href=True):
        address, fragment = urldefrag(unquote(anchor["href"]))
        if re.match(r"[a-z]+:", address):
            continue
        target = (SITE / page).parent / address if address else SITE / page
        if not target.is_file() or (fragment and not has_id(target, fragment)):
            broken.append(anchor["href"])
    assert broken == []


def has_id(target, fragment):
    return bool(soup(target.resolve().relative_to(SITE).as_posix()).find(id=fragment))


@pytest.mark.parametrize("page", [page for page in BUILT_FROM_TEXT if page[0].isdigit()])
def test_chapter_opens_in_colab_from_a_committed_notebook(page):
    links = [a["href"] for a in soup(page).find_all("a", href=re.compile("^https://colab"))]
    paths = {link.partition("/blob/")[2].partition("/")[2] for link in links}
    assert paths == {f"book/{Path(page).stem}.ipynb"}
    committed = subprocess.run(
        ["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert committed.stdout.split() == sorted(paths)


@every_text
def test_page_shows_no_leftover_myst(page):
    article = BeautifulSoup(str(soup(page).article), "html.parser")
    for tag in article.select("pre, code, .math, script"):
        tag.decompose()
    assert LEFTOVER.findall(article.get_text()) == []
    assert article.select(".problematic, .system-message") == []


def test_mathjax_is_part_of_the_site():
    with_math = [page for page in PAGES if soup(page).select(".math")]
    assert with_math
    for page in with_math:
        scripts = [tag["src"].partition("?")[0] for tag in soup(page).select("script[src]")]
        found = [source for source in scripts if "mathjax" in source]
        assert len(found) == 1 and (SITE / page).parent.joinpath(found[0]).is_file()
    assert list(SITE.glob("_static/mathjax/output/chtml/fonts/woff-v2/*.woff"))


def test_notebooks_number_everything_as_the_site_does():
    numbers = export_notebooks.read_book().numbers
    assert {label: number_on_site(label) for label in numbers} == numbers


def number_on_site(label):
    for page in BUILT_FROM_TEXT:
        equation = soup(page).select_one(f"[id='equation-{make_id(label)}'] .eqno")
        if equation:
            return equation.find(string=True)
        tag = soup(page).find(id=label) or soup(page).find(id=make_id(label))
        if tag:
            return tag.select_one(".caption-number").get_text(strip=True)
    return None


@every_text
def test_footer_names_both_licences(page):
    footer = soup(page).select_one("footer.bd-footer-content, .bd-footer-content").get_text()
    assert "CC BY 4.0" in footer and "MIT" in footer


def test_bug_every_title_names_its_page_once():
    """The landing page's read "X — X"."""
    titles = {page: soup(page).title.get_text() for page in BUILT_FROM_TEXT}
    assert len(set(titles.values())) == len(titles)
    for page, title in titles.items():
        parts = [part.strip() for part in title.split("—")]
        heading = soup(page).h1.find(string=lambda text: text.strip() not in ("", "#"))
        assert len(set(parts)) == len(parts) and heading.strip().rstrip(".") in title, title
    assert "—" not in titles["intro.html"]


@every_text
def test_bug_every_caption_begins_where_it_was_written(page):
    """One began in the middle of the text for those who cannot see the figure."""
    source = (ROOT / "book" / page).with_suffix(".md").read_text(encoding="utf-8")
    for figure in re.finditer(r"^:::\{figure\}[^\n]*\n(.*?)^:::$", source, re.M | re.S):
        options, _, caption = figure[1].partition("\n\n")
        name = re.search(r"^:name: (.+)$", options, re.M)[1]
        alt = re.search(r"^:alt: (.+)$", options, re.M)[1]
        shown = soup(page).find(id=name)
        words = " ".join(re.split(r"[{`$*\[]", caption)[0].split())
        assert words and shown.img["alt"] == alt
        text = " ".join(shown.select_one(".caption-text").get_text().split())
        assert text.startswith(words.strip())


@every_text
def test_bug_no_page_shows_a_path_of_the_machine_that_built_it(page):
    text = soup(page).article.get_text()
    paths = re.findall(r"(?:/tmp/|/var/folders/|\btmp[a-z0-9_]{8}\b)\S*", text)
    assert paths == [] and str(ROOT) not in text and os.path.expanduser("~/") not in text


@every_text
def test_bug_no_output_says_nan(page):
    outputs = [output.get_text() for output in soup(page).select(".cell_output")]
    assert [text for text in outputs if re.search(r"\bnan\b", text, re.I)] == []


@every_text
def test_bug_an_output_tells_ties_from_defeats(page):
    outputs = [output.get_text() for output in soup(page).select(".cell_output")]
    assert [text for text in outputs if "accuracy 0.000" in text] == []


def test_bug_the_rocket_stands_where_the_landing_page_says():
    """ "at the top of its own page; this page, without code, has none": the chapters have one."""
    assert "rocket" in soup("intro.html").article.get_text()
    for page in BUILT_FROM_TEXT:
        assert bool(soup(page).select(".header-article .fa-rocket")) == page[0].isdigit(), page
