"""A Chromium for tests of pages: the system's, or the one that playwright installs.

Needs playwright (make test-browser). Screenshots go to the folder that
GPT_JAX_SCREENSHOTS names, to be looked at.
"""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: make test-browser"
)
expect = playwright.expect
expect.set_options(timeout=20_000)  # of a busy machine
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium():
    """Yields a browser; without one the test is skipped."""
    system = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as started:
        path = system or started.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip("needs Chromium: make test-browser")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def problems(page) -> list[str]:
    """Returns a list to which the page's errors are added as they come."""
    found: list[str] = []
    page.on("console", lambda m: m.type == "error" and found.append(m.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


def shoot(page, name: str, **options) -> None:
    """Keeps a picture of a page, where somebody wants to see it."""
    if folder := os.environ.get("GPT_JAX_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", **options)
