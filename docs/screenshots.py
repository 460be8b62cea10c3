"""Pictures of every panel of the page, light and dark, and of the page at phone width: `make screenshots`.

Writes PANEL-light.png, PANEL-dark.png and phone-*.png into the folder that is given, or beside this file. A panel that
needs the model is asked once first, so that it shows something.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

from demos.session import Session
from tests.browser import chromium
from tests.page import ask, served

if TYPE_CHECKING:
    from playwright.sync_api import Page

SECOND = "count the red things."  # asked before anything is compared
PATIENCE = 180_000  # milliseconds
HERE = Path(__file__).parent


def fill(page: Page, name: str) -> None:
    """Makes an open panel show something, where it waits to be asked."""
    if name == "change":
        page.get_by_role("button", name="Add to the list").click()
    if name == "compare":
        ask(page, SECOND)
        page.locator("button[data-tab=compare]").click()
        choose = page.locator("[data-part=compare-run]")
        choose.locator("option").nth(1).wait_for(state="attached")
        choose.select_option(index=1)
        page.wait_for_selector("[data-part=compare-both]:not([hidden])")
    elif (go := page.locator(f"[data-panel={name}] button.go:visible:enabled")).count():
        go.first.click()
        page.wait_for_timeout(1000)
        page.wait_for_function(
            """name => ![...document.querySelector('#viewer .viewer').shadowRoot
                .querySelectorAll(`[data-panel=${name}] button.go`)].some((button) => button.disabled)""",
            arg=name,
        )
    page.wait_for_timeout(500)


def shoot(address: str, out: Path) -> list[Path]:
    """All pictures of the page at this address."""
    written = []
    arguments = ["--no-sandbox"] if sys.platform == "linux" else []
    program = chromium()  # before the block below: looking for it may open one of its own
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        for scheme in ("light", "dark"):
            for place, width in (("", 1280), ("phone-", 390)):
                context = browser.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=scheme, device_scale_factor=1.5
                )
                page = context.new_page()
                page.set_default_timeout(PATIENCE)
                page.goto(address)
                page.wait_for_selector("[data-showing=run]")
                for name in page.locator("[data-tab]:is(button)").evaluate_all("tabs => tabs.map((tab) => tab.dataset.tab)"):
                    page.locator(f"button[data-tab={name}]").click()
                    if not place:
                        fill(page, name)
                    page.wait_for_timeout(300)
                    file = out / f"{place}{name}-{scheme}.png"
                    page.screenshot(path=file, full_page=True)
                    written.append(file)
                    print(file, flush=True)
                context.close()
        browser.close()
    return written


def main(out: Path) -> None:
    """Serves the page with the study model on a free port and takes the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    with served(Session.load("study")) as address:
        shoot(address, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
