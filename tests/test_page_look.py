"""Looking: what the picture can be painted with, and which words looked at a patch; shown numbers against Python's."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from demos.acts import ACTS, Asked
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
    word,
)
from test_payload import PROCESSOR, made_run
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.eyes import patch_attention, relevancy
from workbench.analyses.localise import relative_attention
from workbench.runs import Run, record
from workbench.viewer.payload import unpack_array


def point(page, run: Run, token: int, *, click: bool = True, patch: int = 0) -> None:
    """Moves to a visual token of the picture shown, into one of its 2 x 2 patches, and clicks."""
    canvas = part(page, "picture")
    canvas.scroll_into_view_if_needed()
    box, (_, columns) = canvas.bounding_box(), run.pictures[0].grid.token_grid
    side = box["width"] / columns
    row, column = divmod(token, columns)
    at = (box["x"] + (column + 0.25 + 0.5 * (patch % 2)) * side, box["y"] + (row + 0.25 + 0.5 * (patch // 2)) * side)
    (page.mouse.click if click else page.mouse.move)(*at)


def cells(page) -> list[str]:
    return [cell for row in open_table(page, "heat-table") for cell in row[1:]]


def choose_map(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    page.wait_for_function(
        "document.querySelector('.viewer').shadowRoot.querySelector('[data-part=map-note]').textContent === ''"
    )


def recorded(session: Session, content: list[dict]) -> Run:
    messages = [{"role": "user", "content": content}]
    *_, run = record(session.model, session.chat, messages, model_name=session.model_name, max_new_tokens=1)
    assert isinstance(run, Run)
    return run


def underlined(page) -> int:
    """How many words carry an underline."""
    return part(page, "strip").locator(".lined:not(.template)").count()


# ---- what needs no model -----------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_a_patch_shows_how_much_each_word_looked_at_it_and_a_click_keeps_it(file):
    run = made_run()
    page, token = file(run), 5
    point(page, run, token, click=False)
    pointed = rows_of_looked(page)
    asked = [at for at, role in enumerate(run.roles) if role in ("user", "thought", "answer")]
    rows = [(at - 1 if at >= run.prompt_length else at) - run.first_row for at in asked]
    expected = run.picture_attention[:, :, rows, token].astype(np.float32).mean((0, 1))
    assert len(pointed) == len(expected) == underlined(page)
    assert all(close(shown, value) for (_, shown), value in zip(pointed, expected, strict=True))
    page.mouse.move(5, 5)
    assert underlined(page) == 0 and part(page, "strip-scale").is_hidden()
    point(page, run, token)
    page.mouse.move(5, 5)
    assert underlined(page) == len(expected)  # kept
    assert f"token {token}" in part(page, "readout").inner_text()
    assert part(page, "strip-top").inner_text() == part(page, "heat-top").inner_text()  # one scale for map and words
    # through one head of one layer
    part(page, "layer").select_option("2")
    part(page, "head").select_option("1")
    through = run.picture_attention[2, 1, rows, token].astype(np.float32)
    assert all(close(shown, value) for (_, shown), value in zip(rows_of_looked(page), through, strict=True))
    point(page, run, token)  # the same again lets it go
    page.mouse.move(5, 5)
    assert underlined(page) == 0


def rows_of_looked(page) -> list[list[str]]:
    """The words and how much each looked at the patch; opened by script, so that the pointer stays where it is."""
    page.evaluate("document.querySelector('#viewer').shadowRoot.querySelector('[data-part=looked-table]').open = true")
    part(page, "looked-table").locator("tbody tr").first.wait_for()
    return rows_of(part(page, "looked-table"))


@pytest.mark.browser
def test_a_token_that_every_word_looks_at_is_marked_as_a_sink_and_a_favourite_of_few_is_not(file):
    run = made_run()
    attention = np.full_like(run.picture_attention, 0.002)
    attention[..., 3] = 0.5  # whichever word
    attention[:, :, : attention.shape[2] // 2, 7] = 0.4  # only the first half of them
    page = file(replace(run, picture_attention=attention))
    assert "1 attention sink" in part(page, "sink-note").inner_text()
    marked = part(page, "picture").evaluate("canvas => canvas.toDataURL()")
    attention[..., 3] = 0.002
    page = file(replace(run, picture_attention=attention))
    assert "No attention sinks" in part(page, "sink-note").inner_text()
    assert marked != part(page, "picture").evaluate("canvas => canvas.toDataURL()")


@pytest.mark.browser
def test_sinks_are_those_of_the_head_looked_through(file):
    run = made_run(seed=3)
    attention = np.full_like(run.picture_attention, 0.001)
    attention[1, 0, :, [2, 9, 11]] = 0.9
    page = file(replace(run, picture_attention=attention))
    part(page, "layer").select_option("1")
    part(page, "head").select_option("1")
    assert "No attention sinks" in part(page, "sink-note").inner_text()
    part(page, "head").select_option("0")
    assert "3 attention sinks" in part(page, "sink-note").inner_text()


@pytest.mark.browser
def test_a_double_click_chooses_the_whole_word_of_several_pieces(file):
    run = made_run()
    start = int(run.positions("thought")[0])
    texts = list(run.texts)
    texts[start : start + 4] = [" be", "tw", "een", ","]
    page = file(replace(run, texts=texts))
    word(page, run, start + 1).dblclick()
    chosen = part(page, "strip").locator(".sel").all_text_contents()
    assert "".join(chosen) == "between"


@pytest.mark.browser
def test_several_pictures_stand_as_thumbnails_with_their_shares(file):
    run = two_pictures()
    page = file(run)
    buttons = part(page, "pictures").locator("button")
    assert buttons.count() == 2 and buttons.locator("img").count() == 2
    position = int(run.positions("answer")[1])
    select(page, run, position)
    row = position - 1 - run.first_row
    for number in (0, 1):
        mass = run.role_mass[:, :, row, run.role_names.index(f"image {number}")].astype(np.float32).mean()
        assert close(buttons.nth(number).inner_text(), mass)
        buttons.nth(number).click()
        assert buttons.nth(number).get_attribute("aria-pressed") == "true"
        expected = run.heat(position - 1, number).reshape(-1)
        assert all(close(shown, value) for shown, value in zip(cells(page), expected, strict=True))


def two_pictures() -> Run:
    run = made_run()
    tokens = run.pictures[0].grid.token_count
    _, _, pictures = PROCESSOR([run.pictures[0].image, Image.new("RGB", (56, 56), "red")])
    second = pictures[1].grid.token_count
    roles = ["image 1" if role == "image 0" and at >= 3 + tokens - second else role for at, role in enumerate(run.roles)]
    _, _, pictures = PROCESSOR([Image.new("RGB", (112, 28 * ((tokens - second) // 4)), "white"), pictures[1].image])
    names = [*run.role_names, "image 1"]
    random = np.random.default_rng(5)
    mass = random.dirichlet(np.full(len(names), 0.5), run.role_mass.shape[:3]).astype(np.float16)
    return replace(run, pictures=pictures, roles=roles, role_names=names, role_mass=mass)


@pytest.mark.browser
def test_from_disk_only_what_needs_no_model_is_offered(file):
    page = file(made_run())
    assert part(page, "maps").locator("button").all_inner_texts() == ["attention", "experts"]


# ---- what is asked of the model ----------------------------------------------------------------------------------------


@pytest.mark.browser
def test_relative_to_a_neutral_question_as_python_computes_it(visit, opening, session):
    content = [{"type": "image", "image": opening.pictures[0].image}, {"type": "text", "text": "describe the picture."}]
    other = recorded(session, content)
    expected = relative_attention(opening, other, row="word")["relative"]
    last = [int(at) for at in opening.positions("user") if any(letter.isalnum() for letter in opening.texts[at])][-1]
    select(visit, opening, last)
    part(visit, "layer").select_option("2")
    choose_map(visit, "÷ neutral")
    shown = [float(cell.split(" ")[0]) for cell in cells(visit)]
    asked = opening.heat(last, layer=2).reshape(-1)  # in 256 steps of its root in the browser, hence the tolerance
    allowed = 0.006 + expected[2].reshape(-1) * (0.01 + 0.006 / np.sqrt(np.maximum(asked, 1e-4)))
    assert (np.abs(np.array(shown) - expected[2].reshape(-1)) <= allowed + 0.5 * (expected[2].reshape(-1) >= 10)).all()
    assert np.std(shown) > 0.05
    assert "describe the picture." in part(visit, "heat-caption").inner_text()
    assert [part(visit, end).inner_text() for end in ("heat-low", "heat-top")] == ["¼ ×", "4 × or more"]


@pytest.mark.browser
def test_relevancy_follows_the_word_and_is_pythons(visit, opening, session):
    select(visit, opening, int(opening.positions("user")[1]))
    choose_map(visit, "relevancy")
    assert "choose a word of the thought or the answer" in part(visit, "heat-caption").inner_text()
    for position in (int(opening.positions("thought")[0]), int(opening.positions("answer")[-1])):
        select(visit, opening, position)
        choose_map(visit, "relevancy")
        part(visit, "heat-scale").locator("visible=true").first.wait_for()
        result = relevancy(session.model, session.chat.processor, opening, position)
        row = result["relevancy"][opening.positions("image")] / result["relevancy"].sum()
        shown = cells(visit)
        assert len(shown) == len(row)
        assert all(close(cell, value) for cell, value in zip(shown, row, strict=True))
        share = dict(zip(result.axes["share"][0][1], result["share"], strict=True))
        legend = part(visit, "parts-legend")
        assert close(legend.locator("[data-group=picture]").inner_text(), share["image"])
        assert close(legend.locator("[data-group=question]").inner_text(), share["user"])


@pytest.mark.browser
def test_where_moonvit_looked_from_a_patch_layer_by_layer(visit, opening, session):
    choose_map(visit, "MoonViT")
    assert "Click a patch" in part(visit, "heat-caption").inner_text()
    grid, token = opening.pictures[0].grid, 6
    point(visit, opening, token, patch=3)
    patch = int(grid.patches_of_token(token)[3])
    choose_map(visit, "MoonViT")
    part(visit, "eye-layer-label").wait_for()
    images = [opening.pictures[0].image]
    found = patch_attention(session.model, session.chat.processor, images, patch, model_name="")["attention"]
    visit.mouse.move(5, 5)
    assert all(close(cell, value) for cell, value in zip(cells(visit), found.mean((0, 1)).ravel(), strict=True))
    part(visit, "eye-layer").select_option("1")
    part(visit, "eye-head").select_option("2")
    assert all(close(cell, value) for cell, value in zip(cells(visit), found[1, 2].ravel(), strict=True))
    most = np.unravel_index(found[1, 2].argmax(), found[1, 2].shape)
    assert f"Most: row {most[0] + 1}, column {most[1] + 1}" in part(visit, "readout").inner_text()
    even = part(visit, "heat-caption").inner_text().split("would be")[1]
    assert percent(even) == pytest.approx(1 / grid.patch_count, abs=6e-4)


# ---- the acts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[Session, Run]:
    session = Session(talking_model(), tiny_chat(), "tiny")
    *_, run = session.answer("test", question("How many?", picture(84, 56)), max_new_tokens=4)
    assert isinstance(run, Run)
    return session, run


def asked(session: Session, run: Run, name: str, **args) -> dict:
    *_, last = ACTS[name](Asked(session, run, args, lambda: False, lambda _run: "1"))
    return last


def test_what_is_owed_adds_up_to_one_and_the_picture_has_its_share(tiny):
    session, run = tiny
    found = asked(session, run, "relevancy", position=run.prompt_length)
    assert sum(found["share"]) == pytest.approx(1, abs=1e-3)
    assert unpack_array(found["picture"]).sum() == pytest.approx(found["share"][found["roles"].index("image")], abs=1e-4)


def test_the_neutral_question_is_asked_about_the_same_picture(tiny):
    session, run = tiny
    content = [{"type": "image", "image": run.pictures[0].image}, {"type": "text", "text": "describe the picture."}]
    other = recorded(session, content)
    found = unpack_array(asked(session, run, "neutral")["prompt"])
    row = other.picture_attention[:, :, other.prompt_length - 1 - other.first_row]
    np.testing.assert_allclose(found[:, :, 0], row, atol=1e-3)


def test_an_eye_sees_one_patch_and_all_of_it(tiny):
    session, run = tiny
    found = asked(session, run, "eye", picture=0, patch=5)
    assert unpack_array(found["attention"]).sum(-1) == pytest.approx(1, abs=0.05)
    assert found["chance"] == pytest.approx(1 / run.pictures[0].grid.patch_count)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("relevancy", {"position": 0}, "position is 0"),
        ("relevancy", {}, "position is None"),
        ("eye", {"picture": 3, "patch": 0}, "picture is 3"),
        ("eye", {"picture": 0, "patch": 10**6}, "patch is 1000000"),
    ],
)
def test_what_does_not_exist_is_refused_in_a_sentence(tiny, name, args, words):
    with pytest.raises(ValueError, match=words):
        asked(*tiny, name, **args)


@pytest.mark.parametrize("name", ["neutral", "relevancy", "eye"])
def test_a_run_made_with_a_change_is_not_explained_by_the_model_without_it(tiny, name):
    session, run = tiny
    changed = replace(run, edits=["head 1 of layer 2 switched off"])
    with pytest.raises(ValueError, match="head 1 of layer 2 switched off"):
        asked(session, changed, name, position=run.prompt_length, picture=0, patch=0)
    begun = replace(run, edits=["the thought begins with 3 tokens"], settings={**run.settings, "begin": {"tokens": 3}})
    asked(session, begun, name, position=run.prompt_length, picture=0, patch=0)  # a thought begun by hand changes no weight
