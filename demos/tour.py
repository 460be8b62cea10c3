"""The tour on the page: a walkthrough of eight steps, filled with the visitor's own picture and question when it is opened."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from .page import Page, toast
from .tour_figures import svg
from .tour_steps import STEPS, Live, Step, walk

MATHS = [{"left": "$$", "right": "$$", "display": True}, {"left": "$", "right": "$", "display": False}]


def shown(step: Step, live: Live, weights: str) -> tuple[str, str, str]:
    """Markdown before the figure, the figure as HTML, Markdown after it."""
    text = f"{step.text.format(**live.facts)}\n\n{step.shapes(live)}"
    figure, said = step.draw(live)
    caption = f'<p class="caption">{html.escape(said)} <span>Weights: {html.escape(weights)}</span></p>'
    code = f"$${step.equation.format(**live.facts)}$$\n\n```python\n{step.source()}\n```"
    return text, f"{svg(figure, said)}{caption}", code


class Tour:
    """The column with the tour, over the pictures and the question that a visitor has before them."""

    def __init__(self, page: Page):
        self.page = page

    def build(self) -> None:
        """To be called where the column belongs, hidden at first."""
        with gr.Column(visible=False, elem_id="tour", min_width=0) as self.column:
            with gr.Row(elem_id="tour-top"):
                self.about = gr.Markdown(elem_id="tour-about")
                close = gr.Button("Back to the run", size="sm", min_width=0, elem_id="tour-close")
            self.pages: list[Any] = []
            last = len(STEPS)
            with gr.Walkthrough(selected=1, elem_id="tour-steps") as self.steps:
                for number, step in enumerate(STEPS, 1):
                    with gr.Step(step.name, id=number):
                        self.pages += [
                            gr.Markdown(latex_delimiters=MATHS, elem_classes="tour-text"),
                            gr.HTML(apply_default_css=False, elem_classes="tour-figure"),
                            gr.Markdown(latex_delimiters=MATHS, elem_classes="tour-code"),
                        ]
                        with gr.Row(elem_classes="tour-turn"):
                            for by, label in ((-1, "Back"), (1, "Next")):
                                if 1 <= number + by <= last:
                                    to = STEPS[number + by - 1].name
                                    turn = gr.Button(f"{label}: {to}", size="sm", min_width=0)
                                    turn.click(_going(number + by), None, self.steps, queue=False, api_visibility="private")
        close.click(lambda: gr.Column(visible=False), None, self.column, queue=False, api_visibility="private")

    def opened_by(self, button: gr.Button, question: gr.Textbox) -> None:
        outputs = [self.column, self.steps, self.about, *self.pages]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 8}
        button.click(self.open, question, outputs, **quiet)

    def open(self, question: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Streams (column, steps, about, three values a step). What is missing is taken from the page's example."""
        visitor, session = str(request.session_hash), self.page.session
        pictures = self.page.desks.get(visitor).pictures
        example, asked = self.page.example

        def work(_should_stop: Callable[[], bool]) -> Iterator[Live]:
            picture = (pictures or example.pictures)[0]
            yield walk(session.model, session.chat, picture, question.strip() or asked)

        opened, unknown = (gr.Column(visible=True), gr.Walkthrough(selected=1)), [gr.skip()] * len(self.pages)
        yield *opened, "Reading the picture and the question…", *unknown
        try:
            for live in session.serve(visitor, work):
                if live is None:
                    yield *opened, "Waiting while somebody else is being answered…", *unknown
                else:
                    whose = "Your picture" if pictures else "An example"
                    said = f"{whose} and “{_plain(live.question)}”, on their way through the model."
                    pages = [part for step in STEPS for part in shown(step, live, session.model_name)]
                    yield *opened, said, *pages
        except Exception as error:
            yield gr.Column(visible=False), *[gr.skip()] * (2 + len(unknown))
            raise toast(error) from error


def _going(to: int) -> Callable[[], Any]:
    return lambda: gr.Walkthrough(selected=to)


def _plain(text: str) -> str:
    """As Markdown that shows the text itself."""
    short = " ".join(text.split())
    short = short if len(short) <= 80 else f"{short[:78]}…"
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]()#+-.!|<>~$&" else letter for letter in short)
