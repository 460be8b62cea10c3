"""What the tests of the page share: the served page, the single file, and what is clicked and read on them."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import pytest
from PIL import Image

from demos.app import launch
from demos.desk import Desk
from demos.page import EXAMPLES, scene_of
from demos.session import Session
from workbench.runs import Run
from workbench.viewer import standalone

PATIENCE = 120_000  # milliseconds; the whole suite may be running beside
SCENE = scene_of((*EXAMPLES[0], "full"))[0].image


@contextmanager
def served(session: Session) -> Iterator[str]:
    """The address of the page over a loaded model, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = launch(session, port=port, prevent_thread_lock=True, quiet=True)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        app.close()


@pytest.fixture(scope="module")
def session():
    return Session.load("study")


@pytest.fixture(scope="module")
def address(session):
    with served(session) as found:
        yield found


@pytest.fixture(scope="module")
def opening(session) -> Run:
    """The run that the page opens on, recorded once more by Python."""
    scene, question = scene_of((*EXAMPLES[0], "full"))
    *_, run = session.answer("test", Desk.of([session.picture(scene.image)]).asking(question.text))
    assert isinstance(run, Run)
    return run


@pytest.fixture
def visit(page, address):
    """The page, opened and showing its example; console errors and requests to other machines fail the test."""
    page.set_default_timeout(PATIENCE)
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else complaints.append(r.url))
    page.goto(address)
    page.wait_for_selector("[data-showing=run]")
    yield page
    assert not complaints, complaints


@pytest.fixture
def slow(session, monkeypatch):
    """Half a second a word, so that there is time to press Stop."""
    answer = session.answer

    def slowly(*arguments, **settings):
        answering = answer(*arguments, **settings)
        try:
            for item in answering:
                yield item
                time.sleep(0.5)
        finally:
            answering.close()

    monkeypatch.setattr(session, "answer", slowly)


@pytest.fixture
def file(page, tmp_path):
    """Opens a run as a single file, without Python or a network; console errors fail the test."""
    page.set_default_timeout(PATIENCE)
    page.context.set_offline(True)
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)

    def opened(run: Run):
        (tmp_path / "run.html").write_text(standalone(run), encoding="utf-8")
        page.goto((tmp_path / "run.html").as_uri())
        page.wait_for_selector("[data-showing=run]")
        return page

    yield opened
    assert not complaints, complaints


def part(page, name: str):
    return page.locator(f"[data-part={name}]")


def ask(page, question: str | None = None) -> None:
    """Presses Ask and waits for the run."""
    if question is not None:
        page.locator("#question textarea").fill(question)
    page.evaluate("document.querySelector('#viewer .viewer').dataset.showing = 'before'")
    page.locator("#ask-button").click()
    page.wait_for_selector("[data-showing=run]")


def percent(text: str) -> float:
    found = re.search(r"(<?)([\d.]+)%", text)
    assert found, text
    return 0.0 if found[1] else float(found[2]) / 100


def close(shown: str, expected: float) -> bool:
    """Shown with whole percents from 10% on and tenths below, and stored in 256 steps: two units of the last place."""
    return abs(percent(shown) - expected) <= (0.011 if expected >= 0.09 else 0.0021)


def rows_of(table) -> list[list[str]]:
    return table.locator("tbody tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.textContent))")


def open_table(page, name: str) -> list[list[str]]:
    table = part(page, name)
    if table.get_attribute("open") is None:
        table.locator("summary").click()
    table.locator("tbody tr").first.wait_for()
    return rows_of(table)


def word(page, run: Run, position: int):
    words = [at for at, role in enumerate(run.roles) if not role.startswith("image")]
    return page.locator(f"#word-{words.index(position)}")


def select(page, run: Run, position: int, **how) -> None:
    word(page, run, position).click(**how)


def saved(image: Image.Image, form: str, **how) -> bytes:
    file = BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def clear(page) -> None:
    """Takes all pictures away."""
    away = page.locator("#picture [aria-label^='Remove']")
    while count := away.count():
        away.first.click()
        page.wait_for_function("n => document.querySelectorAll('#picture li').length < n", arg=count)


def upload(page, *files: tuple[str, bytes]) -> None:
    """Chooses files, (name, bytes) each, and waits until they are there or refused."""
    box = page.locator("#picture input[type=file]")
    box.set_input_files([{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files])
    page.wait_for_selector("#picture .tray:not(.busy)")


def toast(page) -> str:
    found = page.locator(".toast-body.error")
    found.last.wait_for()
    text = found.last.inner_text()
    while found.count():
        found.first.locator("button").click()
        page.wait_for_timeout(300)
    return text


def outside(page) -> list[str]:
    """What sticks out of its card, in the viewer and in the column beside it."""
    return page.evaluate(
        """() => {
            const hosts = [...document.querySelectorAll('#viewer, #viewer .viewer')], out = [];
            const root = hosts.map((host) => host.shadowRoot).find(Boolean);
            for (const e of [...root.querySelectorAll('.kv *'), ...document.querySelectorAll('#ask *')]) {
                const box = e.getBoundingClientRect(), card = e.closest('section, #ask')?.getBoundingClientRect();
                if (!box.width || !card) continue;
                if (box.right > card.right + 1 || box.left < card.left - 1) out.push(e.outerHTML.slice(0, 120));
            }
            return out;
        }"""
    )


def expert_at(page, run: Run, layer: int, expert: int) -> tuple[float, float]:
    """Where the grid of experts has this one, on the screen; `layer` counts those that route."""
    canvas = part(page, "experts")
    canvas.scroll_into_view_if_needed()
    box, left, top = canvas.bounding_box(), 26, 18
    wide, tall = (box["width"] - left) / run.n_experts, (box["height"] - top) / len(run.moe_layers)
    return box["x"] + left + (expert + 0.5) * wide, box["y"] + top + (layer + 0.5) * tall
