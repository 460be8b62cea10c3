"""The first page: give a picture and a question, watch the answer being written, and see where the model looked.

This file is layout and wiring; what happens is in page.py, the model in session.py, the linked view in workbench/viewer.
"""

from __future__ import annotations

import base64
import html
import os
import random
import threading
from io import BytesIO
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported: the page talks to nobody

import gradio as gr

from workbench.study.families import FAMILIES
from workbench.viewer import source

from .look import CSS, theme
from .page import EXAMPLES, LARGEST_SEED, SIZES, Page, draw, scene_of
from .session import Session

SINGLE = [name for name, family in FAMILIES.items() if family.pictures == "one"]
UPLOAD_LIMIT = "32mb"
# An emptied number box of Gradio shows 0, which would be a budget; so the budget is a list.
BUDGETS = [("no limit", -1), ("none, answer at once", 0)] + [(f"{n} tokens", n) for n in (4, 8, 16, 32, 64, 128, 256, 512)]


class Upload(gr.Image):
    """A picture box that hands over the file as it came: Gradio would open and convert it before our own checks."""

    is_template = True  # for Gradio: drawn by the same front end as its parent

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path


class Viewer(gr.HTML):
    """The linked viewer; its value is a payload of `workbench.viewer`."""

    def __init__(self, **settings: Any):
        start = "\nconst act = (asked) => trigger('apply', asked);"
        start += "\nconst viewer = kimiViewer(element.querySelector('.viewer'), { act });"
        start += "\nwatch('value', () => viewer.show(props.value));\nviewer.show(props.value);"
        settings |= {"html_template": '<div class="viewer"></div>', "js_on_load": source("viewer.js") + start}
        super().__init__(apply_default_css=False, **settings)

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}


class Scenes(gr.HTML):
    """The ready scenes as a row of buttons; `select` carries the index of the one that was chosen."""

    def __init__(self, **settings: Any):
        buttons = []
        for i, (family, seed) in enumerate(EXAMPLES):
            scene, question = scene_of((family, seed, "full"))
            file = BytesIO()
            scene.image.save(file, "PNG")
            picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            label = html.escape(f"{family}: {question.text}", quote=True)
            buttons.append(
                f'<button type="button" data-scene="{i}" title="{label}" aria-label="{label}">'
                f'<img src="{picture}" alt=""><span>{html.escape(family)}</span></button>'
            )
        chosen = "const b = e.target.closest('button'); if (b) trigger('select', { index: +b.dataset.scene });"
        settings |= {"js_on_load": f"element.addEventListener('click', (e) => {{ {chosen} }});"}
        super().__init__(f'<div class="scenes">{"".join(buttons)}</div>', apply_default_css=False, **settings)


def header(session: Session) -> str:
    facts = html.escape(f"{session.model_name} · {session.device} · {session.dtype}")
    title = "<h1>Kimi-VL Workbench</h1><p>Ask about a picture, then look inside.</p>"
    return f'<header>{title}<p class="weights">{facts}</p></header>'


def build(session: Session, page: Page | None = None) -> gr.Blocks:
    """The page over a loaded model. Show it with `launch` below, which brings the theme and the limits."""
    page = page or Page(session)
    with gr.Blocks(title="Kimi-VL Workbench", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)) as app:
        gr.HTML(header(session), elem_id="top", apply_default_css=False)
        drawn = gr.State(None)
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="ask", min_width=0):
                gr.HTML("<h2>Ask</h2>", apply_default_css=False)
                scenes = Scenes(elem_id="scenes")
                picture = Upload(
                    type="filepath",
                    image_mode=None,
                    format="png",
                    sources=["upload", "clipboard"],
                    height=150,
                    buttons=[],
                    show_label=False,
                    label="Picture",
                    placeholder="Your picture: drop, paste or click",
                    elem_id="picture",
                )
                with gr.Row(elem_id="draw"):
                    family = gr.Dropdown(
                        SINGLE, value="count", label="Or a fresh scene to", filterable=False, min_width=0
                    )
                    fresh = gr.Button("Draw", min_width=0, elem_id="fresh")
                question = gr.Textbox(
                    label="Question", lines=2, max_lines=6, placeholder="how many red circles are there?", elem_id="question"
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask-button")
                    stop = gr.Button("Stop", interactive=False, min_width=60, elem_id="stop-button")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    size = gr.Dropdown(list(SIZES), value=next(iter(SIZES)), label="Drawn scene", filterable=False)
                    scene_seed = gr.Number(0, label="Scene seed", precision=0, minimum=0, maximum=LARGEST_SEED)
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature", buttons=[])
                    budget = gr.Dropdown(BUDGETS, value=-1, label="Thought budget", filterable=False)
                    longest = gr.Slider(16, 2048, 256, step=16, label="Longest reply, tokens", buttons=[])
                    seed = gr.Number(0, label="Sampling seed", precision=0, minimum=0, maximum=LARGEST_SEED)
                keep = gr.DownloadButton("Keep this run (one HTML file)", interactive=False, size="sm", elem_id="keep")
            with gr.Column(elem_id="see", min_width=0):
                viewer = Viewer(elem_id="viewer")

        def example(event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
            page.stop(request)
            family, seed = EXAMPLES[int(event.index)]  # type: ignore[attr-defined]
            return family, seed, next(iter(SIZES)), *draw(family, seed, next(iter(SIZES)))

        def draw_fresh(family: str, size: str) -> tuple[Any, ...]:
            seed = random.randrange(100_000)
            return seed, *draw(family, seed, size)

        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        scene = [picture, question, drawn]
        asked = {
            "fn": page.ask,
            "inputs": [picture, question, drawn, temperature, budget, longest, seed],
            "outputs": [viewer, ask, stop, keep],
            "concurrency_limit": 8,  # the session serves one at a time and tells the others that they wait
            "concurrency_id": "ask",
        }
        gr.on([ask.click, question.submit], **asked, **hidden)
        chosen = scenes.select(example, None, [family, scene_seed, size, *scene], **hidden)
        chosen.success(**asked, **hidden)
        fresh.click(draw_fresh, [family, size], [scene_seed, *scene], **hidden)
        for changed in (family.input, size.input, scene_seed.submit):
            gr.on([changed], draw, [family, scene_seed, size], scene, **hidden)
        picture.upload(page.check, picture, None, **hidden).failure(lambda: None, None, picture, **hidden)
        viewer.apply(page.act, None, viewer, concurrency_limit=8, trigger_mode="multiple", **hidden)
        stop.click(page.stop, None, None, queue=False, **hidden)
        app.load(page.opening, None, [viewer, keep, *scene], **hidden)
        app.unload(page.stop)
    return app


def launch(session: Session, host: str = "127.0.0.1", port: int | None = 7860, **more: Any) -> gr.Blocks:
    """Serves the page; returns at once with prevent_thread_lock=True. No share link, nothing served but Gradio's cache."""
    page = Page(session)
    threading.Thread(target=page.prepare, daemon=True).start()
    app = build(session, page).queue(max_size=64)
    look: dict[str, Any] = {"theme": theme(), "css": CSS, "footer_links": []}
    app.launch(server_name=host, server_port=port, share=False, max_file_size=UPLOAD_LIMIT, **look, **more)
    return app


def main(model: str = "study", host: str = "127.0.0.1", port: int = 7860) -> None:
    """Loads the model and serves the page until it is interrupted. Raises ValueError for a folder that is no checkpoint."""
    launch(Session.load(model), host, port)
