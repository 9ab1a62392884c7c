"""Our pages in a real browser: they open without a complaint at a desk and on a phone, and do what a click asks for.

Needs Playwright and the system's Chromium (`make test-browser`); skipped without. Screenshots go to out/browser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: run make test-browser")

from axe_playwright_python.sync_playwright import Axe
from chromium import SCHEMES, WIDTHS, find_chromium, launched, visit
from contracts import tiny_run
from contracts.test_report import AFTER, BEFORE, RUN, poisoned
from playwright.sync_api import sync_playwright

import spinfold
from spinfold.grid import Grid
from spinfold.recipe import Recipe
from spinfold.report import build_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium, or the like")

PICTURES = Path(__file__).parents[2] / "out/browser"
NAMES = ("report", "compare", "inspect", "hostile")
GRID: dict[str, Any] = {
    "entries": ["none", "quarot", "broken=dfrot:fit.objective=kurtosis", "kurtail"],
    "bits": ["W4A4KV4", "W4A16"],
    "rounding": ["rtn", "gptq"],
}
SURFACES = ".plot:has(.gl-container canvas)"
EYE = "plot => Object.values(plot._fullLayout.scene.camera.eye)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each page, of a tiny model, made by the command that makes it; and a report of hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    text = folder / "text.txt"
    text.write_text(tiny_run.TEXT, "utf-8")
    model = tiny_run.tiny_model(folder / "tiny", "llama")
    run = tiny_run.quantize(model, folder / "run", text)
    small = Recipe().with_(calibration__source=str(text))
    spinfold.inspect(str(model), folder / "inspected", small, tokens=128, device="cpu")
    base = tiny_run.recipe(text, compute="fp32")
    spinfold.compare(str(model), folder / "compared", Grid.parse(GRID), recipe=base, max_tokens=64, device="cpu")
    hostile = folder / "hostile.html"
    hostile.write_text(build_report(poisoned(RUN), BEFORE, AFTER), "utf-8")
    return {
        "report": run.path / "report.html",
        "compare": folder / "compared/index.html",
        "inspect": folder / "inspected/index.html",
        "hostile": hostile,
    }


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with launched(playwright) as browser:
        yield browser


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_page_opens_without_a_complaint(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    """Nothing on the console, no request, no dialog, nothing wider than the window, nothing that axe finds."""
    with visit(browser, pages[name], width) as seen:
        for scheme in SCHEMES:
            seen.turn(scheme)
            seen.page.screenshot(path=PICTURES / f"{name}-{width}-{scheme}.png", full_page=True)
            found = Axe().run(seen.page)
            assert not found.response["violations"], found.generate_report()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        assert seen.complaints == []


def test_light_and_dark_follow_the_system(browser: Browser, pages: dict[str, Path]) -> None:
    colors = (
        "getComputedStyle(document.body).color + getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    )
    with visit(browser, pages["report"]) as seen:
        light = seen.page.evaluate(colors)
        seen.turn("dark")
        dark = seen.page.evaluate(colors)
        assert all(a != b for a, b in zip(light.split("rgb")[1:], dark.split("rgb")[1:], strict=True))
        seen.turn("light")
        assert seen.page.evaluate(colors) == light


def test_a_surface_turns_and_its_partner_with_it(browser: Browser, pages: dict[str, Path]) -> None:
    with visit(browser, pages["report"]) as seen:
        surfaces = seen.page.locator(SURFACES)
        assert surfaces.count() >= 2
        pair = surfaces.nth(0), surfaces.nth(1)
        pair[0].scroll_into_view_if_needed()
        before, picture = [one.evaluate(EYE) for one in pair], pair[1].screenshot()
        drag(seen.page, pair[0].bounding_box())
        after = [one.evaluate(EYE) for one in pair]
        assert before[0] == before[1]
        assert after[0] == after[1] != before[0]
        assert pair[1].screenshot() != picture, "the partner is drawn anew"
        seen.turn("dark")
        assert pair[0].evaluate(EYE) == after[0], "a change of colours leaves it as it was turned"
        assert seen.complaints == []


def drag(page: Page, box: Any) -> None:
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 80, y + 20, steps=8)
    page.mouse.up()
    page.wait_for_timeout(300)


def test_the_wheel_scrolls_the_page_and_not_a_figure(browser: Browser, pages: dict[str, Path]) -> None:
    with visit(browser, pages["report"]) as seen:
        surface = seen.page.locator(SURFACES).first
        surface.scroll_into_view_if_needed()
        before, eye = seen.page.evaluate("scrollY"), surface.evaluate(EYE)
        surface.hover()
        seen.page.mouse.wheel(0, 200)
        seen.page.wait_for_function("before => scrollY > before", arg=before)
        assert surface.evaluate(EYE) == eye


def test_a_figure_tells_its_values(browser: Browser, pages: dict[str, Path]) -> None:
    with visit(browser, pages["report"]) as seen:
        point = seen.page.locator(".plot:has(.scatterlayer) .points path").first
        point.scroll_into_view_if_needed()
        point.hover(force=True)
        seen.page.locator(".hovertext").first.wait_for()


def test_the_rounding_error_of_every_layer_and_linear_is_there(browser: Browser, pages: dict[str, Path]) -> None:
    """As colours, of both roundings with one scale; a cell tells its layer, its linear and its error."""
    cells = "plots => plots.map(plot => [plot._fullData[0].y, plot._fullData[0].z, plot._fullData[0].zmin])"
    with visit(browser, pages["report"], width=390) as seen:
        plots = seen.page.locator(".plot:has(.heatmaplayer image)")
        (linears, nearest, low), (*_, other_low) = plots.evaluate_all(cells)
        assert plots.count() == 2 and low == other_low
        assert linears == ["q", "k", "v", "o", "gate", "up", "down"]
        assert all(error < 0 for errors in nearest for error in errors)
        plots.first.scroll_into_view_if_needed()
        plots.first.locator(".nsewdrag").hover()
        told = seen.page.locator(".hovertext").first
        told.wait_for()
        assert re.match(r"\w+, layer \d+: [-−][\d.]+ dB", told.text_content() or "")
        assert seen.complaints == []


def test_without_webgl_surfaces_are_seen_from_above(playwright: Playwright, pages: dict[str, Path]) -> None:
    with launched(playwright, "--disable-3d-apis") as flat, visit(flat, pages["report"]) as seen:
        assert seen.page.locator(SURFACES).count() == 0
        assert seen.page.locator(".plot[data-pair] .heatmaplayer image").count() >= 2
        assert seen.complaints == []


def test_details_open_by_click_and_key_and_all_of_them_for_print(browser: Browser, pages: dict[str, Path]) -> None:
    with visit(browser, pages["report"]) as seen:
        seen.turn("dark")
        summary = seen.page.locator("summary").first
        recipe = seen.page.locator("details pre").first
        assert not recipe.is_visible()
        summary.click()
        assert "method: spinquant" in recipe.inner_text()
        summary.press("Enter")
        assert not recipe.is_visible()
        seen.page.pdf(path=PICTURES / "report.pdf")
        assert seen.page.locator("details:not([open])").count() == 0
        fits = "plot => Math.abs(plot._fullLayout.width - plot.clientWidth) < 1"
        seen.page.wait_for_function(
            f"() => [...document.querySelectorAll('.plot')].every({fits})"
        )  # the screen's again
        assert seen.complaints == []


# ---- the comparison ----------------------------------------------------------------------------------------------


def column(page: Page, heading: str) -> list[str]:
    """The cells of a column, from top to bottom, as far as they are shown."""
    headings = page.locator(".sortable thead th").all_inner_texts()
    index = [text.rstrip(" ↑↓") for text in headings].index(heading) + 1
    return page.locator(f".sortable tbody tr:visible > :nth-child({index})").all_inner_texts()


def is_sorted(texts: list[str], *, down: bool) -> bool:
    """Are the numbers in order, and what was not measured behind them?"""
    measured = [float(text.replace(",", "")) for text in texts if text != "–"]
    return texts[len(measured) :] == ["–"] * (len(texts) - len(measured)) and measured == sorted(measured, reverse=down)


def test_a_heading_sorts_by_click_and_by_key(browser: Browser, pages: dict[str, Path]) -> None:
    with visit(browser, pages["compare"]) as seen:
        heading = seen.page.get_by_role("columnheader", name="perplexity", exact=True)
        start = column(seen.page, "perplexity")
        assert "–" in start
        heading.click()
        assert is_sorted(column(seen.page, "perplexity"), down=False)
        assert heading.get_attribute("aria-sort") == "ascending"
        heading.get_by_role("button").press("Enter")
        assert is_sorted(column(seen.page, "perplexity"), down=True)
        assert sorted(column(seen.page, "perplexity")) == sorted(start), "no row is lost"
        seen.page.get_by_role("columnheader", name="method", exact=True).click()
        assert column(seen.page, "method") == sorted(column(seen.page, "method"), key=str.lower)
        assert heading.get_attribute("aria-sort") is None
        assert seen.complaints == []


def test_the_filter_leaves_the_rows_with_all_its_words(browser: Browser, pages: dict[str, Path]) -> None:
    with visit(browser, pages["compare"]) as seen:
        rows = len(column(seen.page, "bits"))
        seen.page.get_by_role("searchbox").fill("gptq w4a16 ")
        assert set(column(seen.page, "bits")) == {"W4A16KV16"}
        assert set(column(seen.page, "rounding")) == {"gptq"}
        seen.page.get_by_role("searchbox").fill("")
        assert len(column(seen.page, "bits")) == rows


def test_an_entry_opens(browser: Browser, pages: dict[str, Path]) -> None:
    with visit(browser, pages["compare"], width=390) as seen:
        entry = seen.page.locator("details", has_text="broken")
        entry.locator("summary").click()
        assert entry.get_by_text("kurtosis").first.is_visible()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
