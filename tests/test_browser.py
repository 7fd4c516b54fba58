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
