"""Own parts of the page's left column: the pictures of the question, the turns so far, the ready scenes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from .desk import address

TRAY_JS = (Path(__file__).parent / "tray.js").read_text(encoding="utf-8")


class Tray(gr.HTML):
    """The pictures in their order; its value is `Desk.tray()`. `arrange` carries what the visitor did to them.

    Not Gradio's gallery: that one opens and converts files before our own checks, and cannot be put in order.
    """

    def __init__(self, **settings: Any):
        template = (
            '<div class="tray"><ol hidden></ol><button type="button" class="place" aria-label="Add pictures">'
            '<span class="hint">Your pictures: drop, paste or click</span></button>'
            '<input type="file" accept="image/*" multiple hidden aria-label="Picture files"></div>'
        )
        super().__init__(html_template=template, js_on_load=TRAY_JS, apply_default_css=False, **settings)

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}


class Turns(gr.HTML):
    """The questions asked so far about these pictures, and what was answered; its value is `Desk.told()`."""

    def __init__(self, **settings: Any):
        draw = """
        const list = element.querySelector("ol");
        const show = () => {
          list.replaceChildren(...(props.value || []).map(({ question, answer }) => {
            const [item, short, said] = ["li", "span", "b"].map((tag) => document.createElement(tag));
            short.append(question, " ", said);
            item.append(short);
            said.textContent = answer || "(no answer)";
            return item;
          }));
          list.hidden = !list.children.length;
          list.scrollTop = list.scrollHeight;
        };
        watch("value", show);
        show();"""
        template = '<ol class="turns" aria-label="Turns of this conversation" hidden></ol>'
        super().__init__(html_template=template, js_on_load=draw, apply_default_css=False, **settings)

    def api_info(self) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "object"}}


class Scenes(gr.HTML):
    """Ready scenes as a row of buttons; `select` carries the index of the one that was chosen."""

    def __init__(self, scenes: Sequence[tuple[str, str, Image.Image]], **settings: Any):
        """scenes: (name, question, picture) each."""
        buttons = []
        for i, (name, question, image) in enumerate(scenes):
            label = html.escape(f"{name}: {question}", quote=True)
            buttons.append(
                f'<button type="button" data-scene="{i}" title="{label}" aria-label="{label}">'
                f'<img src="{address(image)}" alt=""><span>{html.escape(name)}</span></button>'
            )
        chosen = "const b = e.target.closest('button'); if (b) trigger('select', { index: +b.dataset.scene });"
        settings |= {"js_on_load": f"element.addEventListener('click', (e) => {{ {chosen} }});"}
        super().__init__(f'<div class="scenes">{"".join(buttons)}</div>', apply_default_css=False, **settings)
