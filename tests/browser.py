"""A Chromium for the tests that drive a page: on PATH, or fetched by Playwright, or installed by apt as root.

`python tests/browser.py` makes sure there is one and prints its path; without one it says so and exits with
1, so that CI fails and does not skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> Path | None:
    """The browser to drive: one on PATH, else the one that Playwright keeps, else None."""
    on_path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if on_path:
        return Path(on_path)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        kept = Path(playwright.chromium.executable_path)
    return kept if kept.exists() else None


def install_chromium() -> None:
    """Tries Playwright's own download, then Debian's package where we may install one. Raises nothing."""
    attempts = [[[sys.executable, "-m", "playwright", "install", "chromium"]]]
    if os.name == "posix" and os.geteuid() == 0 and shutil.which("apt-get"):
        attempts.append(
            [["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]]
        )
    for commands in attempts:
        done = all(_run(command) for command in commands)
        if done and find_chromium():
            return


def _run(command: list[str]) -> bool:
    print("browser:", *command, file=sys.stderr)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(command, env=environment, stdout=sys.stderr, timeout=900).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"browser: {error}", file=sys.stderr)
        return False


def chromium() -> Path:
    """The browser, installed if need be. Raises RuntimeError with the remedy when none can be had."""
    if not (found := find_chromium()):
        install_chromium()
        found = find_chromium()
    if not found:
        raise RuntimeError(
            "no Chromium on PATH and none could be installed; install chromium or google-chrome, "
            "or run `playwright install --with-deps chromium`"
        )
    return found


if __name__ == "__main__":
    try:
        print(f"browser: {chromium()}")
    except RuntimeError as error:
        sys.exit(str(error))
