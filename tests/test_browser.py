"""The built site in a browser without a network: no errors, typeset equations, phones, search."""

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from .test_site import BUILT_FROM_TEXT, SITE, soup

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = """--no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
PHONE = {"width": 380, "height": 800}

if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser):
    """A phone-sized page that keeps what it complained of and what it asked of other machines."""
    page = browser.new_page(viewport=PHONE)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "console",
        lambda line: page.complaints.append(line.text) if line.type in ("error", "warning") else 0,
    )
    page.route("http*://**", lambda route: refuse(page, route))
    yield page
    page.close()


def refuse(page, route):
    page.complaints.append(f"asked for {route.request.url}")
    route.abort()


@pytest.mark.parametrize("name", BUILT_FROM_TEXT)
def test_page_opens_offline_without_complaint_on_a_phone(tab, name):
    tab.goto((SITE / name).as_uri())
    equations = len(soup(name).select(".math"))
    tab.wait_for_function(f"document.querySelectorAll('mjx-container').length >= {equations}")
    assert tab.complaints == []
    assert tab.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


SMALLEST = 0.65  # of the text's size: a formula on a phone is still read without a lens
DISPLAYS = """() => [...document.querySelectorAll("div.math")].map(display => {
  const formula = display.querySelector("mjx-container");
  return {
    formula: display.id || formula.textContent,
    isFitted: "size" in formula.dataset,
    over: Math.max(formula.scrollWidth - formula.clientWidth,
                   display.getBoundingClientRect().right - innerWidth),
    share: parseFloat(formula.style.fontSize) / formula.dataset.size,
  };
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "name", [name for name in BUILT_FROM_TEXT if soup(name).select("div.math")]
)
def test_bug_no_display_is_cut_off_on_a_phone(tab, name, scheme):
    """The last terms of (8.1) and of others had to be scrolled for, without a sign of it."""
    tab.emulate_media(color_scheme=scheme)
    tab.goto((SITE / name).as_uri())
    open_everything(tab)
    tab.wait_for_function(f"({DISPLAYS})().every(display => display.isFitted)")
    displays = tab.evaluate(DISPLAYS)
    assert [x["formula"] for x in displays if x["over"] > 0] == []
    assert [x["formula"] for x in displays if x["share"] < SMALLEST] == []


def open_everything(tab):
    """Unfolds solutions and quizzes: what is folded away has no width."""
    tab.evaluate("window.MathJax?.startup?.promise")
    tab.evaluate("""() => {
      document.querySelectorAll("details").forEach(x => { x.open = true; });
      document.querySelectorAll(".toggle-hidden").forEach(x => x.classList.remove("toggle-hidden"));
    }""")


def test_displays_keep_their_size_where_there_is_room(tab):
    tab.set_viewport_size({"width": 1200, "height": 800})
    tab.goto((SITE / "08-the-breakage-lab.html").as_uri())
    open_everything(tab)
    tab.wait_for_function(f"({DISPLAYS})().every(display => display.isFitted)")
    assert {x["share"] for x in tab.evaluate(DISPLAYS)} == {1}
    tab.set_viewport_size(PHONE)  # the phone is turned, or the window made smaller
    tab.wait_for_function(f"({DISPLAYS})().some(display => display.share < 1)")
    assert max(x["over"] for x in tab.evaluate(DISPLAYS)) <= 0


def test_bug_the_equation_index_shows_its_tests_on_a_phone(tab):
    """Its last column lay beyond the right edge."""
    tab.goto((SITE / "equation-index.html").as_uri())
    cells = tab.locator(".equation-index tbody td")
    boxes = cells.evaluate_all("""cells => cells.map(cell => {
      const range = document.createRange();
      range.selectNodeContents(cell);
      const {left, right, height} = range.getBoundingClientRect();
      return {left, right, height, name: getComputedStyle(cell, "::before").content};
    })""")
    headings = soup("equation-index.html").select(".equation-index thead th")
    names = [f'"{heading.get_text(strip=True)}"' for heading in headings]
    assert names[-1] == '"Test"' and boxes
    for i, box in enumerate(boxes):
        assert box["height"] > 0 and 0 <= box["left"] < box["right"] <= PHONE["width"]
        assert box["name"] == names[i % len(names)]


@pytest.fixture
def address():
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=SITE)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_search_finds_a_word_of_the_book(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/search.html?q=potential")
    # Results appear one after another.
    page.locator("#search-results li > a", has_text="Notation").wait_for()
    page.close()
