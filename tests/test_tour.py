"""The tour: its tensors are the model's, its code is the source's, and a visitor walks through it."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demos import tour_steps
from demos.page import EXAMPLES, scene_of
from demos.tour import _plain, shown
from demos.tour_steps import PIXELS, STEPS, walk
from kimi_vl_ref.images import Picture
from kimi_vl_ref.thought import OPEN_THOUGHT
from page import address, session, visit  # noqa: F401, they are fixtures
from tiny import picture, question, saying, talking_model, tiny_chat
from workbench.sites import sites, sizes
from workbench.tape import attach

ROOT = Path(__file__).parent.parent
NAMES = ["Pixels", "Patches", "2 × 2 merge", "Projector", "Latent attention", "Router", "Experts", "Next word"]


def walked(image: Image.Image, text: str = "How many?"):
    chat = tiny_chat()
    return walk(talking_model(), chat, Picture(image, chat.processor.grid(*image.size)), text)


def test_eight_steps_in_the_order_of_the_model():
    assert [step.name for step in STEPS] == NAMES
    order = list(sites(talking_model()))
    first = [order.index(step.sites[0].format(i=1)) for step in STEPS[1:]]
    assert first == sorted(first)


def test_the_shapes_shown_are_the_models():
    model, live = talking_model(), walked(picture(60, 30))  # 3 x 2 visual tokens
    known = sites(model)
    free = {"P": 24, "M": 6, "T": live.facts["T"], "B": 1, "Q": 1}
    for step in STEPS[1:]:
        for name in map(live.site, step.sites):
            expected = tuple(free.get(str(size), size) for size in sizes(model.config, known[name]))
            assert live.read[name].shape == expected
            letters, numbers = ", ".join(known[name].axes.split()), " × ".join(map(str, expected))
            assert f"`{name}` ({letters}) = **{numbers}**" in step.shapes(live)
    assert live.read[PIXELS].shape == (24, 3, 14, 14)
    assert "**24 × 3 × 14 × 14**" in STEPS[0].shapes(live)


def test_the_code_shown_stands_in_the_model():
    for step in STEPS:
        blocks = step.source().split("\n\n# ")
        assert len(blocks) == len(step.code)
        for block in blocks:
            head, *lines = block.removeprefix("# ").splitlines()
            file, name = head.split(": ")
            assert file.startswith("kimi_vl_ref/")
            source = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
            body = [line.strip() for line in lines]
            assert body[0].startswith(f"def {name.rsplit('.')[-1]}(")
            assert any(source[at : at + len(body)] == body for at in range(len(source)))


def test_the_tour_waits_for_the_first_word_behind_the_mark_of_a_thought():
    chat = tiny_chat()
    with attach(talking_model(), edit=saying(f"{OPEN_THOUGHT}count the circles")):
        begun = tour_steps._begun(talking_model(), chat, question("How many?"))
    assert begun and chat.tokenizer.decode(begun) == OPEN_THOUGHT
    with attach(talking_model(), edit=saying("count the circles")):
        assert tour_steps._begun(talking_model(), chat, question("How many?")) == []


def test_the_next_word_is_the_one_that_the_model_writes(monkeypatch):
    begun = [5, 6]
    monkeypatch.setattr(tour_steps, "_begun", lambda *_: begun)
    chat, image = tiny_chat(), picture(28, 56, 3)
    live = walked(image)
    prompt = chat.prompt(question("How many?", image))
    ids = torch.tensor([[*prompt.input_ids, *begun]])
    with torch.no_grad():
        stream = talking_model()(ids, prompt.pixel_values, prompt.image_grid_hws)
        probs = talking_model().logits(stream[0, -1]).softmax(-1)
    assert live.facts["T"] == ids.shape[1]
    assert live.names[0] == chat.tokenizer.token_text(int(probs.argmax()))
    np.testing.assert_allclose(live["probs"], probs.topk(len(live.names)).values, rtol=1e-4)
    scores = live["decoder.layers.{i}.ffn.router.scores"][0, -1]
    chosen = live["decoder.layers.{i}.ffn.router.chosen"][0, -1].astype(int)
    assert set(chosen) == set(np.argsort(scores + live.bias)[-len(chosen) :])
    np.testing.assert_allclose(live.attention.sum(-1), 1, rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (300, 20), (30, 210)])
def test_every_step_is_drawn_for_a_picture_of_any_size(size):
    live = walked(picture(*size))
    for step in STEPS:
        text, figure, code = shown(step, live, "tiny weights")
        assert "{" not in text  # no number was left out
        assert "<svg" in figure and "currentColor" in figure and "tiny weights" in figure and 'role="img"' in figure
        assert code.startswith("$$") and "```python" in code


def test_a_question_is_shown_as_it_was_typed():
    typed = "*how* <b>many</b> $x$?"
    assert _plain(typed).replace("\\", "") == typed
    assert all(mark in _plain(typed) for mark in (r"\*", r"\<", r"\$"))


@pytest.mark.browser
def test_a_visitor_walks_through_the_tour_and_back(visit, session):
    scene, asked = scene_of((*EXAMPLES[0], "full"))
    live = walk(session.model, session.chat, session.picture(scene.images[0]), asked.text)
    visit.locator("#tour-button").click()
    visit.locator("#tour .drawn:visible svg").wait_for()
    assert not visit.locator("#viewer .viewer").is_visible()
    assert asked.text in visit.locator("#tour-about").inner_text()
    for number, step in enumerate(STEPS):
        text = visit.locator(".tour-text:visible")
        text.get_by_text(live.site(step.sites[0]), exact=True).wait_for()
        shapes = [" × ".join(map(str, live.read[live.site(site)].shape)) for site in step.sites]
        assert text.locator("strong").all_text_contents() == shapes
        assert visit.locator(".tour-code:visible .katex").count()  # the equation is drawn, without a network
        assert step.code[0].__name__ in visit.locator(".tour-code:visible pre").inner_text()
        if number < len(STEPS) - 1:
            visit.get_by_role("button", name=f"Next: {STEPS[number + 1].name}").click()
    assert live.names[0].strip() in visit.locator(".tour-figure:visible .caption").inner_text()
    visit.get_by_role("button", name="Back: Experts").click()
    visit.locator(".tour-text:visible").get_by_text(live.site(STEPS[6].sites[0]), exact=True).wait_for()
    visit.locator("#tour-close").click()
    visit.locator("#viewer .viewer").wait_for()
    assert visit.locator("#tour").count() == 0
