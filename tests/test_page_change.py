"""The Change panel in a real browser: a list of changes made by clicking, and three answers whose numbers are Python's."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from demos.acts import change_again
from demos.acts.act import Asked
from demos.acts.change import change
from page import (  # noqa: F401, the fixtures among them
    PATIENCE,
    address,
    expert_at,
    file,
    opening,
    outside,
    part,
    percent,
    rows_of,
    session,
    visit,
)
from workbench.runs import Run

pytestmark = pytest.mark.browser


def panel(page):
    page.get_by_role("tab", name="Change").click()
    return page.locator("#panel-change")


def kind(page, name: str) -> None:
    part(page, "change-kinds").get_by_role("button", name=name, exact=True).click()


def chips(page) -> list[str]:
    return [text.removesuffix("×") for text in part(page, "change-list").locator("button").all_text_contents()]


def answer_again(page, columns: int = 3) -> None:
    part(page, "change-go").click()
    finished(page)
    assert part(page, "change-answers").locator(".column").count() == columns


def finished(page) -> None:
    page.wait_for_selector("[data-part=change-stop]:disabled")


def foot_says(page, changed: bool) -> None:
    """Waits until the foot says, or does not say, that the run shown was answered under changes."""
    page.wait_for_function(
        """changed => document.querySelector('#viewer .viewer').shadowRoot
            .querySelector('[data-part=foot]').textContent.includes('under changes') === changed""",
        arg=changed,
    )


def pythons(session, run: Run, *changes: dict) -> dict:
    """What the act says of the same list, asked without a browser."""
    *_, told = change(Asked(session, run, {"changes": list(changes), "seed": 0}, lambda: False, lambda _: "1"))
    return told


def check(page, told: dict) -> None:
    """What is shown is what Python says."""
    for one in told["columns"]:
        column = page.locator(f"[data-column={one['name']}]")
        assert column.locator(".said").inner_text().split() == "".join(word for word, _ in one["answer"]).split()
        marked = [word.strip() for part in ("answer", "thought") for word, differs in one[part] if differs]
        assert column.locator("mark").all_text_contents() == marked
        assert all(line in column.locator(".lines").inner_text() for line in one["lines"])
    assert part(page, "change-verdict").inner_text() == told["verdict"]
    likely, reply, moved, looked = rows_of(part(page, "change-numbers").locator("table"))
    for at, one in enumerate(told["columns"], 1):
        assert percent(likely[at]) == pytest.approx(np.exp(one["answer_logprob"]), abs=0.006)
        assert float(reply[at].replace("−", "-")) == pytest.approx(one["reply"], abs=0.0051)
        assert percent(moved[at]) == pytest.approx(one["moved"], abs=0.006)
        assert percent(looked[at]) == pytest.approx(one["picture"], abs=0.006)


def test_an_expert_clicked_in_the_grid_is_switched_off_beside_a_control(visit, session, opening):
    panel(visit)
    layer, expert = 1, int(np.bincount(opening.chosen[1].ravel().astype(int)).argmax())
    visit.mouse.click(*expert_at(visit, opening, layer, expert))
    assert part(visit, "change-layer").input_value() == str(opening.moe_layers[layer])
    assert part(visit, "change-expert").input_value() == str(expert)
    assert part(visit, "change-go").is_disabled()
    part(visit, "change-how").select_option("renormalise")
    part(visit, "change-add").click()
    part(visit, "change-add").click()
    assert "already" in part(visit, "change-note").inner_text() and len(chips(visit)) == 1
    answer_again(visit)
    spec = {"kind": "expert", "layer": opening.moe_layers[layer], "expert": expert, "how": "renormalise"}
    told = pythons(session, opening, spec)
    check(visit, told)
    assert "choices" in visit.locator("[data-column=changed] .lines").inner_text()
    # any of the three can be put into the viewer, and the answers stay
    visit.locator("[data-column=changed] button").click()
    foot_says(visit, True)
    assert f"ablate expert {expert} of layer" in part(visit, "foot").inner_text()
    assert visit.locator("[data-column]").count() == 3 and len(chips(visit)) == 1
    part(visit, "change-another").click()  # of the run that was changed, not of the one that is shown
    finished(visit)
    assert visit.locator("[data-column=control] .lines").inner_text() != ""
    visit.locator("[data-column=before] button").click()
    foot_says(visit, False)
    # a chip goes at a click, and the answers are said to be of the old list
    part(visit, "change-list").locator("button").press("Enter")
    assert chips(visit) == [] and part(visit, "change-stale").is_visible() and part(visit, "change-another").is_disabled()


def test_a_rectangle_drawn_on_the_picture_is_blank_to_the_model(visit, session, opening):
    panel(visit)
    kind(visit, "region")
    part(visit, "change-add").click()
    assert "Draw a rectangle" in part(visit, "change-note").inner_text()
    before = part(visit, "picture").evaluate("canvas => canvas.toDataURL()")
    box, grid = part(visit, "picture").bounding_box(), opening.pictures[0].grid
    scale = box["width"] / grid.padded[0]
    corners = [(5, 8), (45, 40)]  # pixels of the picture, which is not resized
    (x0, y0), (x1, y1) = [(box["x"] + x * scale, box["y"] + y * scale) for x, y in corners]
    visit.mouse.move(x0, y0)
    visit.mouse.down()
    visit.mouse.move(x1, y1, steps=3)
    visit.mouse.up()
    shown = [int(part(visit, f"change-corner-{i}").input_value()) for i in range(4)]
    assert np.abs(np.array(shown) - [5, 8, 45, 40]).max() <= 1
    assert part(visit, "picture").evaluate("canvas => canvas.toDataURL()") != before
    part(visit, "change-corner-3").fill("41")  # corners can be typed, too
    shown[3] = 41
    part(visit, "change-add").click()
    answer_again(visit)
    check(visit, pythons(session, opening, {"kind": "region", "picture": 0, "box": shown}))
    visit.get_by_role("tab", name="Lens").click()  # the mouse is given back with the tab
    visit.mouse.move(x0, y0)
    assert "token 0" in part(visit, "readout").inner_text()


def test_a_patch_a_head_and_a_block_compose(visit, session, opening):
    panel(visit)
    kind(visit, "patch")
    part(visit, "change-add").click()
    assert "Choose a patch first" in part(visit, "change-note").inner_text()
    part(visit, "picture").focus()
    visit.keyboard.press("ArrowRight")
    visit.keyboard.press("ArrowRight")
    part(visit, "change-add").click()
    kind(visit, "head")
    part(visit, "change-layer").select_option("2")
    part(visit, "change-head").select_option("1")
    assert part(visit, "layer").input_value() == "2" and part(visit, "head").input_value() == "1"  # one selection
    part(visit, "change-add").click()
    kind(visit, "bias")
    part(visit, "change-by").fill("-0.25")
    part(visit, "change-add").click()
    kind(visit, "attention")
    part(visit, "change-add").click()
    assert [text.split()[0] for text in chips(visit)] == ["patch", "head", "bias", "everything"]
    answer_again(visit)
    layer, expert = opening.moe_layers[0], 0
    told = pythons(
        session,
        opening,
        {"kind": "token", "token": 1, "how": "mean"},
        {"kind": "head", "layer": 2, "head": 1, "how": "zero"},
        {"kind": "bias", "layer": layer, "expert": expert, "by": -0.25},
        {"kind": "block", "from": "everything", "to": "picture"},
    )
    assert told["columns"][1]["picture"] == 0.0
    check(visit, told)


def test_several_controls_are_counted_stop_stops_and_errors_are_sentences(visit, session, opening, monkeypatch):
    panel(visit)
    kind(visit, "attention")
    part(visit, "change-from").select_option("question")
    part(visit, "change-to").select_option("thought")
    part(visit, "change-add").click()
    part(visit, "change-go").click()
    finished(visit)
    sentence = "Only the answer comes after the thought; block from the answer to the thought."
    assert part(visit, "change-note").inner_text() == sentence
    part(visit, "change-list").locator("button").click()
    kind(visit, "layer")
    part(visit, "change-part").select_option("attn")
    part(visit, "change-add").click()
    answer_again(visit)
    part(visit, "change-more").click()
    finished(visit)
    controls = rows_of(part(visit, "change-controls").locator("table"))
    changed = sum(answer.strip() != opening.answer for _, answer, _ in controls)
    assert len(controls) == 5
    assert f"The answer changed in {changed} of 5 random controls." in part(visit, "change-controls").inner_text()
    record = change_again.record

    def slowly(*arguments, **settings):
        for item in record(*arguments, **settings):
            time.sleep(0.3)
            yield item

    monkeypatch.setattr(change_again, "record", slowly)
    part(visit, "change-more").click()
    visit.wait_for_timeout(500)
    part(visit, "change-stop").click()
    finished(visit)
    assert "Stopped" in part(visit, "change-note").inner_text()


def test_the_single_file_says_that_changes_need_the_model(file, opening):
    page = file(replace(opening, edits=["blank everything"]))
    panel(page)
    assert page.locator("#panel-change .offline").is_visible()
    assert not part(page, "change-go").is_visible() and not part(page, "change-kinds").is_visible()
    assert "blank everything" in part(page, "foot").inner_text()


# Between the words of each answer's heading and its button
GAPS = """() => [...document.querySelector('#viewer .viewer').shadowRoot.querySelectorAll('.column h4')].map((heading) => {
  const words = document.createRange();
  words.selectNodeContents(heading.firstChild);
  return heading.querySelector('button').getBoundingClientRect().left - words.getBoundingClientRect().right;
})"""


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_of_the_panel_sticks_out(browser, address, width):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("[data-showing=run]")
    panel(page)
    part(page, "change-add").click()
    answer_again(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert outside(page) == []
    assert len(gaps := page.evaluate(GAPS)) == 3 and min(gaps) > 5.9, gaps  # pixels are fractions
    context.close()
