"""A browser for tests of pages: Chromium by Playwright, pixels computed without a GPU. Tests skip where either is not
there (`pip install playwright`, and the system's package chromium)."""
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
PATIENCE = 100_000                # ms: WebGL in software on a busy CPU


@contextmanager
def opened(url, width=1000, height=760):
    """A page.   -> page of Playwright, what it asked for beside `data:` and `blob:`, what went wrong in it"""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if not program:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGS)
        page = browser.new_page(viewport=dict(width=width, height=height))
        page.set_default_timeout(PATIENCE)
        asked, wrong = [], []
        page.on("request", lambda r: r.url.startswith(("data:", "blob:")) or asked.append(r.url))
        page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(url)
        yield page, asked, wrong
        browser.close()
