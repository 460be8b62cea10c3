"""The first page: give a picture and a question, watch the answer being written, and see where the model looked.

This file is layout and wiring; what happens is in page.py, the model in session.py, the linked view in workbench/viewer.
"""

from __future__ import annotations

import html
import os
import random
import threading
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported: the page talks to nobody

import gradio as gr

from workbench.study.families import FAMILIES
from workbench.viewer import source

from .look import CSS, theme
from .page import EXAMPLES, LARGEST_SEED, SIZES, Page, scene_of
from .session import Session
from .tour import Tour
from .tray import Scenes, Tray, Turns

UPLOAD_LIMIT = "32mb"
# An emptied number box of Gradio shows 0, which would be a budget; so the budget is a list.
BUDGETS = [("no limit", -1), ("none, answer at once", 0)] + [(f"{n} tokens", n) for n in (4, 8, 16, 32, 64, 128, 256, 512)]


class Viewer(gr.HTML):
    """The linked viewer; its value is a payload of `workbench.viewer`."""

    def __init__(self, **settings: Any):
        start = "\nconst act = (asked) => trigger('apply', asked);"
        start += "\nconst viewer = kimiViewer(element.querySelector('.viewer'), { act, upload });"
        start += "\nwatch('value', () => viewer.show(props.value));\nviewer.show(props.value);"
        settings |= {"html_template": '<div class="viewer"></div>', "js_on_load": source("viewer.js") + start}
        super().__init__(apply_default_css=False, **settings)

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}


def header(session: Session) -> str:
    facts = html.escape(f"{session.model_name} · {session.device} · {session.dtype}")
    title = "<h1>Kimi-VL Workbench</h1><p>Ask about a picture, then look inside.</p>"
    return f'<header>{title}<p class="weights">{facts}</p></header>'


def build(session: Session, page: Page | None = None) -> gr.Blocks:
    """The page over a loaded model. Show it with `launch` below, which brings the theme and the limits."""
    page = page or Page(session)
    with gr.Blocks(title="Kimi-VL Workbench", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)) as app:
        gr.HTML(header(session), elem_id="top", apply_default_css=False)
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="ask", min_width=0):
                gr.HTML("<h2>Ask</h2>", apply_default_css=False)
                ready = [(family, scene_of((family, seed, "full"))) for family, seed in EXAMPLES]
                scenes = Scenes([(name, asked.text, scene.image) for name, (scene, asked) in ready], elem_id="scenes")
                tray = Tray(elem_id="picture")
                with gr.Row(elem_id="draw"):
                    family = gr.Dropdown(
                        list(FAMILIES), value="count", label="Or a fresh scene to", filterable=False, min_width=0
                    )
                    fresh = gr.Button("Draw", min_width=0, elem_id="fresh")
                turns = Turns(elem_id="turns")
                question = gr.Textbox(
                    label="Question", lines=2, max_lines=6, placeholder="how many red circles are there?", elem_id="question"
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask-button")
                    stop = gr.Button("Stop", interactive=False, min_width=60, elem_id="stop-button")
                again = gr.Button("New conversation", visible=False, size="sm", elem_id="again")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    size = gr.Dropdown(list(SIZES), value=next(iter(SIZES)), label="Drawn scene", filterable=False)
                    scene_seed = gr.Number(0, label="Scene seed", precision=0, minimum=0, maximum=LARGEST_SEED)
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature", buttons=[])
                    budget = gr.Dropdown(BUDGETS, value=-1, label="Thought budget", filterable=False)
                    longest = gr.Slider(16, 2048, 256, step=16, label="Longest reply, tokens", buttons=[])
                    seed = gr.Number(0, label="Sampling seed", precision=0, minimum=0, maximum=LARGEST_SEED)
                keep = gr.DownloadButton("Keep this run (one HTML file)", interactive=False, size="sm", elem_id="keep")
                walk = gr.Button("Tour: from pixels to the next word", size="sm", elem_id="tour-button")
            with gr.Column(elem_id="see", min_width=0):
                viewer = Viewer(elem_id="viewer")
                tour = Tour(page)
                tour.build()

        def example(event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
            page.stop(request)
            family, seed = EXAMPLES[int(event.index)]  # type: ignore[attr-defined]
            return family, seed, next(iter(SIZES)), *page.draw(family, seed, next(iter(SIZES)), request)

        def draw_fresh(family: str, size: str, request: gr.Request) -> tuple[Any, ...]:
            seed = random.randrange(100_000)
            return seed, *page.draw(family, seed, size, request)

        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        desk = [tray, turns, again]
        asked = {
            "fn": page.ask,
            "inputs": [question, temperature, budget, longest, seed],
            "outputs": [viewer, ask, stop, keep, turns, again],
            "concurrency_limit": 8,  # the session serves one at a time and tells the others that they wait
            "concurrency_id": "ask",
        }
        gr.on([ask.click, question.submit], **asked, **hidden)
        chosen = scenes.select(example, None, [family, scene_seed, size, *desk, question], **hidden)
        chosen.success(**asked, **hidden)
        fresh.click(draw_fresh, [family, size], [scene_seed, *desk, question], **hidden)
        for changed in (family.input, size.input, scene_seed.submit):
            gr.on([changed], page.draw, [family, scene_seed, size], [*desk, question], **hidden)
        tray.arrange(page.arrange, None, desk, trigger_mode="multiple", **hidden)
        again.click(page.again, None, desk, **hidden)
        viewer.apply(page.act, None, viewer, concurrency_limit=8, trigger_mode="multiple", **hidden)
        stop.click(page.stop, None, None, queue=False, **hidden)
        tour.opened_by(walk, question)
        app.load(page.opening, None, [viewer, keep, tray, question], **hidden)
        app.unload(page.leave)
    return app


def launch(session: Session, host: str = "127.0.0.1", port: int | None = 7860, **more: Any) -> gr.Blocks:
    """Serves the page; returns at once with prevent_thread_lock=True. No share link, nothing served but Gradio's cache."""
    page = Page(session)
    threading.Thread(target=page.prepare, daemon=True).start()
    app = build(session, page).queue(max_size=64)
    look: dict[str, Any] = {"theme": theme(), "css": CSS, "footer_links": []}
    app.launch(server_name=host, server_port=port, share=False, max_file_size=UPLOAD_LIMIT, **look, **more)
    return app


def main(model: str = "study", against: str | None = None, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Loads the model (and other weights to compare it with) and serves the page until it is interrupted. Raises ValueError
    for a folder that is no checkpoint.
    """
    launch(Session.load(model, against), host, port)
