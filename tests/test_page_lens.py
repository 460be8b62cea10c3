"""Lens and credit: the acts against the analyses and against what the recorder wrote down, and the panel in a real browser."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

import math
import re

import numpy as np
import pytest
from PIL import Image

from demos.acts import ACTS, Asked
from demos.acts.lens import word_trial
from demos.session import Session
from page import (  # noqa: F401, the fixtures among them
    address,
    close,
    file,
    open_table,
    opening,
    part,
    percent,
    rows_of,
    select,
    session,
    visit,
)
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.lens import logit_lens
from workbench.analyses.occlusion import deletion, occlusion
from workbench.runs import Run, record


@pytest.fixture(scope="module")
def tiny():
    return Session(talking_model(), tiny_chat(), "tiny")


def recorded(*pictures: Image.Image) -> Run:
    *_, run = record(talking_model(), tiny_chat(), question("How many?", *pictures), model_name="tiny", max_new_tokens=4)
    assert isinstance(run, Run)
    return run


def told(session: Session, name: str, run: Run, should_stop=lambda: False, **args) -> list[dict]:
    return list(ACTS[name](Asked(session, run, args, should_stop, lambda _: "1")))


# ---- acts, on a tiny model


def test_the_last_layer_of_the_lens_says_what_greedy_decoding_wrote(tiny):
    run = recorded(picture(56, 28))
    first, last = run.prompt_length - 1, len(run.token_ids) - 2
    (data,) = told(tiny, "lens", run, first=first, last=last)
    assert [column[0] for column in data["words"][-1]] == run.texts[first + 1 :]
    assert data["rank"][-1] == [0] * len(run.texts[first + 1 :])
    np.testing.assert_allclose(np.log(data["prob"][-1]), run.logprobs[first + 1 :], rtol=1e-2)
    expected = logit_lens(tiny.model, tiny.chat, run, range(first, last + 1))
    assert data["settled"] == expected["settled"].tolist() and data["words"] == expected["words"].tolist()
    with pytest.raises(ValueError, match="last is"):
        told(tiny, "lens", run, first=3, last=2)
    with pytest.raises(ValueError, match="first is"):
        told(tiny, "lens", run, first=-1, last=2)


def test_on_a_grey_picture_every_word_is_the_one_that_comes_without_a_picture(tiny):
    blank, full = recorded(Image.new("RGB", (56, 56), (128, 128, 128))), recorded(picture(56, 56))
    for run, alike in ((blank, True), (full, False)):
        *_, data = told(tiny, "patch_lens", run, picture=0)
        top = np.array(data["words"])[:, :, 0]
        assert top.shape == (len(data["layers"]), 4)
        assert (top == np.array(data["grey"])).all() == alike
    expected = logit_lens(tiny.model, tiny.chat, full, full.positions("image 0").tolist(), top=3)
    assert data["words"] == expected["words"].tolist()
    with pytest.raises(ValueError, match="no picture"):
        told(tiny, "patch_lens", recorded(), picture=0)


def test_credit_is_shared_out_from_the_probability_that_was_recorded(tiny):
    run = recorded(picture(56, 28))
    at = run.prompt_length + 1
    *_, data = told(tiny, "credit", run, first=at, last=at)
    grey, whole = data["ends"]
    assert whole == pytest.approx(float(run.logprobs[at]), abs=1e-3)
    assert np.sum(data["gradients"]) == pytest.approx(whole - grey + data["gap"]["routing pinned"], abs=1e-4)
    trial = word_trial(tiny.chat, run, at, at)
    assert len(trial.ids) == at + 1  # what was written later has no part in it
    expected = occlusion(tiny.model, trial, model_name="tiny")["loss"]
    np.testing.assert_allclose(data["loss"], expected, atol=1e-5)
    curves = data["curves"]
    assert curves["maps"] == ["integrated gradients", "occlusion", "random", "centre"]
    _, probabilities, area = deletion(tiny.model, trial, expected)
    np.testing.assert_allclose(curves["deletion"][1], probabilities, atol=1e-5)
    assert curves["areas"]["deletion"][1] == pytest.approx(area, abs=1e-5)
    # nothing hidden is the picture, all hidden is grey, whatever the order
    for found in curves["deletion"]:
        assert found[0] == pytest.approx(math.exp(whole), rel=1e-2) and found[-1] == pytest.approx(math.exp(grey), rel=1e-2)


def test_several_words_share_their_sum(tiny):
    run = recorded(picture(28, 28))
    first = run.prompt_length
    *_, data = told(tiny, "credit", run, first=first, last=first + 2)
    assert data["word"] == "".join(run.texts[first : first + 3])
    assert data["ends"][1] == pytest.approx(float(run.logprobs[first : first + 3].sum()), abs=1e-3)


def test_credit_refuses_what_was_not_written_and_runs_without_one_picture(tiny):
    run = recorded(picture(28, 28))
    with pytest.raises(ValueError, match="was given, not written"):
        told(tiny, "credit", run, first=2, last=2)
    for others in ((), (picture(28, 28), picture(28, 56))):
        run = recorded(*others)
        with pytest.raises(ValueError, match=f"this run has {len(others)}"):
            told(tiny, "credit", run, first=run.prompt_length, last=run.prompt_length)


def test_a_stop_ends_credit_in_the_middle_of_a_stage_and_keeps_what_was_known(tiny):
    run = recorded(picture(56, 28))
    asked = 0

    def third() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3  # occlusion takes two passes, so that this is among the gradients

    *_, last = told(tiny, "credit", run, third, first=run.prompt_length, last=run.prompt_length)
    assert asked == 4
    assert "Stopped" in last["stopped"] and "loss" in last and "gradients" not in last
    *_, again = told(tiny, "credit", run, first=run.prompt_length, last=run.prompt_length)  # no hook stayed
    assert "curves" in again


# ---- in the browser


def opened(page) -> None:
    page.get_by_role("tab", name="Lens and credit").click()


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(" · 10^", "e"))


@pytest.mark.browser
def test_the_grid_of_layers_and_words_is_the_analysis(visit, session, opening):
    at = int(opening.positions("thought")[2])
    select(visit, opening, at)
    opened(visit)
    assert part(visit, "lens-empty").is_visible()
    part(visit, "lens-go").click()
    grid = part(visit, "lens-grid")
    grid.locator("td").first.wait_for()
    expected = logit_lens(session.model, session.chat, opening, [at - 1])
    column = grid.locator("thead th").evaluate_all("cells => cells.findIndex(c => c.className === 'sel')")
    assert grid.locator("thead th.sel").inner_text() == opening.texts[at - 1].strip()
    rows = rows_of(grid)
    assert [row[column] for row in rows] == [words[0].strip() or "␣" for words in expected["words"][:, 0]]
    assert rows[0][0] == "embedded" and rows[-1][0] == f"layer {len(rows) - 2}"
    # up to the first layer: its five likeliest, and how far the final word still is from the top
    grid.focus()
    for _ in range(len(rows) - 2):
        visit.keyboard.press("ArrowUp")
    said, rank = part(visit, "lens-cell").inner_text(), int(expected["rank"][1, 0])
    assert f"number {rank + 1} with" in said and "After layer 0" in said
    assert close(re.sub(r".*number \d+ with", "", said, count=1), float(expected["prob"][1, 0]))
    top = rows_of(part(visit, "lens-top"))
    assert [row[1].strip("“”") for row in top] == [word.strip() or "␣" for word in expected["words"][1, 0]]
    assert all(close(row[2], p) for row, p in zip(top, expected["probs"][1, 0], strict=True))
    # the one selection moves the marked column, without asking again
    select(visit, opening, at + 1)
    assert grid.locator("thead th.sel").inner_text() == opening.texts[at].strip()


@pytest.mark.browser
def test_words_on_patches_are_the_analysis_in_every_layer(visit, session, opening):
    opened(visit)
    part(visit, "lens-patch-go").click()
    part(visit, "lens-patches").wait_for()
    expected = logit_lens(session.model, session.chat, opening, opening.positions("image 0").tolist(), top=3)
    drawn = []
    for stream in (1, len(expected["words"]) - 1):
        part(visit, "lens-layer").select_option(str(stream))
        shown = [cell for row in open_table(visit, "lens-patch-table") for cell in row[1:]]
        assert shown == [words[0].strip() or "␣" for words in expected["words"][stream]]
        drawn.append(part(visit, "lens-patches").evaluate("canvas => canvas.toDataURL()"))
    assert drawn[0] != drawn[1]
    part(visit, "lens-patches").focus()
    visit.keyboard.press("ArrowRight")
    said = part(visit, "lens-patch-cell").inner_text()
    assert said.startswith("Row 1, column 1") and f"“{expected['words'][-1, 0, 0].strip() or '␣'}”" in said
    assert close(said.split("”", 1)[1], float(expected["probs"][-1, 0, 0]))


@pytest.mark.browser
def test_credit_says_its_numbers_and_stop_leaves_the_panel_usable(visit, session, opening):
    at = int(opening.positions("thought")[1])
    select(visit, opening, at)
    opened(visit)
    part(visit, "credit-go").click()
    part(visit, "credit-stop").click()
    visit.wait_for_selector("[data-part=credit-go]:enabled")
    assert "Stopped" in part(visit, "credit-note").inner_text()
    part(visit, "credit-go").click()
    part(visit, "credit-curves").locator("canvas").first.wait_for()
    *_, data = ACTS["credit"](Asked(session, opening, {"first": at, "last": at}, lambda: False, lambda _: "1"))
    said = part(visit, "credit-said").inner_text()
    assert said.startswith(f"“{opening.texts[at].strip()}”")
    assert close(said, math.exp(data["ends"][1]))
    assert close(said.split("picture, ", 1)[1], math.exp(data["ends"][0]))
    found = re.findall(r"residual (\S+(?: · 10\^\S+)?) with the experts pinned, (\S+(?: · 10\^\S+)?) with", said)[0]
    for text, name in zip(found, ("routing pinned", "routing free"), strict=True):
        assert number(text) == pytest.approx(data["gap"][name], rel=0.06, abs=0.006)
    rows = open_table(visit, "credit-table")
    assert [number(cell) for row in rows for cell in row[1:]] == pytest.approx(
        [v for name in ("loss", "gradients") for row in data[name] for v in row], rel=0.06, abs=0.006
    )
    curves = open_table(visit, "curve-table")
    shown = [[percent(row[1 + m]) for row in curves] for m in range(4)]
    expected = [data["curves"]["deletion"][m] + data["curves"]["insertion"][m] for m in range(4)]
    np.testing.assert_allclose(shown, expected, atol=0.006)
    areas = part(visit, "credit-legend").inner_text()
    assert f"random (control): area {data['curves']['areas']['deletion'][2]:.2f} hidden" in areas


@pytest.mark.browser
def test_from_disk_the_panel_says_that_it_needs_the_model(file, opening):
    page = file(opening)
    opened(page)
    assert page.locator("#panel-lens .offline").is_visible()
    assert not part(page, "lens-go").is_visible() and not part(page, "credit-go").is_visible()
