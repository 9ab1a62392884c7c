"""Headless Chromium on one page of ours at a time, and what the page complains about.

python tests/browser/chromium.py PAGE.html ... -o DIR     screenshots of any pages, at both widths, light and dark
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, Route, sync_playwright

__all__ = ["SCHEMES", "WIDTHS", "Scheme", "Visit", "find_chromium", "launched", "visit"]

Scheme = Literal["light", "dark"]
WIDTHS = {1280: 900, 390: 844}
"""A desk's and a phone's: width to height, in CSS pixels."""
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
_DRAWN = "() => [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))"


def find_chromium() -> str | None:
    """The system's Chromium: SPINFOLD_CHROMIUM, or the first on the path."""
    named = os.environ.get("SPINFOLD_CHROMIUM")
    return named or next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass
class Visit:
    """A page that was opened, and what went wrong since: errors on its console, and requests it must not make."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def turn(self, scheme: Scheme) -> None:
        """Show the page in light or dark, as if the system had changed, and wait until its figures are drawn anew."""
        self.page.emulate_media(color_scheme=scheme)
        self.page.wait_for_function(
            "() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 100, true)))"
        )


def launched(playwright: Playwright, *options: str) -> Browser:
    """A browser of the system's; as root it has to do without its sandbox."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    return playwright.chromium.launch(executable_path=find_chromium(), args=[*sandbox, *_QUIET, *options])


@contextmanager
def visit(browser: Browser, place: Path | str, width: int = 1280, root: str = "") -> Iterator[Visit]:
    """Open a file or an address in light colours, wait until its figures are drawn, and close it again.

    It may ask for what lies below `root`, or else in its own folder.
    """
    address = place if isinstance(place, str) else place.resolve().as_uri()
    root = root or address.rpartition("/")[0]
    with browser.new_context(viewport={"width": width, "height": WIDTHS[width]}, color_scheme="light") as context:
        seen = Visit(context.new_page())

        def on_console(message: ConsoleMessage) -> None:
            if message.type == "error":
                seen.complaints.append(message.text)

        def on_request(route: Route) -> None:
            if route.request.url.startswith((root, "data:", "blob:")):
                return route.continue_()
            seen.complaints.append(f"asked for {route.request.url}")
            return route.abort()

        context.route("**/*", on_request)
        seen.page.on("console", on_console)
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.on("dialog", lambda dialog: (seen.complaints.append("opened a dialog"), dialog.dismiss()))
        seen.page.goto(address)
        seen.page.wait_for_function(_DRAWN)
        yield seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/browser"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, launched(playwright) as browser:
        for path in given.pages:
            for width in WIDTHS:
                with visit(browser, path, width) as seen:
                    for scheme in SCHEMES:
                        seen.turn(scheme)
                        picture = given.output / f"{path.resolve().parent.name}-{path.stem}-{width}-{scheme}.png"
                        seen.page.screenshot(path=picture, full_page=True)
                        print(picture)
                    print(*seen.complaints, sep="\n")


if __name__ == "__main__":
    main()
