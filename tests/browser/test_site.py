"""The documentation's site in a real browser: every page opens, asks nobody else for anything, and search finds things.

Needs what tests/browser/test_pages.py needs, and site/ (`make docs`); skipped without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: run make test-browser")

from chromium import find_chromium, launched, visit
from playwright.sync_api import expect, sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[2]
SITE, PICTURES = ROOT / "site", ROOT / "out/browser"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if path.name != "404.html")

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium, or the like"),
    pytest.mark.skipif(not PAGES, reason="there is no site: run make docs"),
]


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served, on this machine alone."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(SITE))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, launched(playwright) as browser:
        yield browser


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_site_opens_without_a_complaint(browser: Browser, address: str, page: str) -> None:
    with visit(browser, f"{address}/{page}", 390, root=address) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
        broken = "[...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)"
        assert seen.page.evaluate(broken) == []
        name = page.removesuffix(".html").replace("/", "-")
        seen.page.screenshot(path=PICTURES / f"site-{name}-390.png")
        seen.page.set_viewport_size({"width": 1280, "height": 900})
        seen.turn("dark")
        seen.page.screenshot(path=PICTURES / f"site-{name}-1280-dark.png")
        assert seen.complaints == []


def test_search_finds_a_method(browser: Browser, address: str) -> None:
    with visit(browser, f"{address}/index.html", root=address) as seen:
        seen.page.get_by_role("textbox", name="Search").fill("kurtosis")
        # Results of what had been typed until then come first, and are replaced.
        seen.page.locator(".md-search-result__item a[href*='h=kurtosis']").first.click()
        expect(seen.page.locator("article")).to_contain_text(re.compile("kurt", re.IGNORECASE))  # once it is loaded
        assert seen.complaints == []
