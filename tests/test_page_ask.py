"""Asking on the page: several pictures in order, turns of a conversation, and a notebook cell."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

import base64
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from PIL import Image

from demos.desk import MOST_PICTURES, Desk, Desks, uploaded
from demos.page import Page, truth
from demos.session import Session
from demos.shelf import EVERYBODY, Shelf
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT
from page import (  # noqa: F401, the fixtures among them
    PATIENCE,
    SCENE,
    address,
    ask,
    clear,
    part,
    saved,
    session,
    toast,
    upload,
    visit,
)
from tiny import picture, talking_model, tiny_chat
from workbench.runs import Run
from workbench.study.families import FAMILIES
from workbench.viewer import payload


def tiny_session() -> Session:
    return Session(talking_model(), tiny_chat(), "tiny")


@pytest.fixture
def made():
    """What the page's events call, with a tiny model."""
    page = Page(tiny_session())
    yield page
    page.close()


def desk(count: int) -> Desk:
    return Desk.of([tiny_session().picture(picture(28, 28, seed)) for seed in range(count)])


def shades(one: Desk) -> list[int]:
    return [shown.image.getpixel((0, 0))[0] for shown in one.pictures]  # type: ignore[index]


# ---- the desk


def test_moving_a_picture_changes_places_with_its_neighbour_and_stops_at_the_ends():
    one = desk(3)
    a, b, c = one.ids
    assert one.move(a, 1).ids == (b, a, c) and shades(one.move(a, 1)) == [shades(one)[n] for n in (1, 0, 2)]
    assert one.move(a, -1) is one and one.move(c, 1) is one and one.move("unknown", 1) is one and one.move(b, 2) is one
    assert one.remove(b).ids == (a, c) and shades(one.remove(b)) == [shades(one)[n] for n in (0, 2)]


def test_too_many_pictures_are_refused_in_a_sentence():
    full = desk(1).add(desk(1).pictures * (MOST_PICTURES - 1))
    assert len(full.pictures) == MOST_PICTURES
    with pytest.raises(ValueError, match=f"up to {MOST_PICTURES} pictures"):
        full.add(desk(1).pictures)


def test_pictures_are_in_the_first_message_only_and_a_second_question_follows():
    first = desk(2).asking("how many?")
    assert [piece["type"] for piece in first[0]["content"]] == ["image", "image", "text"]
    told = desk(2).answered(first, f"{OPEN_THOUGHT} one{CLOSE_THOUGHT} 1")
    second = told.asking("which colour?")
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert [piece["type"] for piece in second[2]["content"]] == ["text"]
    assert told.told() == [{"question": "how many?", "answer": "1"}]


def test_the_same_question_again_takes_the_place_of_its_turn():
    one = desk(1)
    told = one.answered(one.asking("how many?"), "1")
    assert told.asking("how many?") == one.asking("how many?")
    assert len(told.asking("how  many?")) == 3


def test_changing_the_pictures_ends_the_conversation():
    one = desk(2)
    told = one.answered(one.asking("how many?"), "1")
    for changed in (told.move(told.ids[0], 1), told.remove(told.ids[0]), told.add(desk(1).pictures)):
        assert changed.turns == ()


def test_visitors_have_desks_of_their_own_and_leave_nothing():
    desks = Desks()
    one = desk(1)
    desks.change("anna", lambda _: one)
    assert desks.get("anna") is one and desks.get("ben").pictures == ()
    desks.clear("anna")
    assert desks.get("anna").pictures == ()


def test_only_uploaded_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    inside, outside = tmp_path / "uploads" / "a" / "p.png", tmp_path / "secret.png"
    inside.parent.mkdir(parents=True)
    for file in (inside, outside):
        file.write_bytes(saved(SCENE, "PNG"))
    assert uploaded(str(inside)) == inside.resolve()
    for path in (outside, inside.parent / ".." / ".." / "secret.png", "/etc/hostname", inside.parent, None):
        with pytest.raises(ValueError, match="uploaded"):
            uploaded(path)


def test_the_shelf_keeps_what_is_used_and_shows_each_visitor_their_own():
    shelf = Shelf()
    runs = [SimpleNamespace(n=n) for n in range(10)]
    example = shelf.put(EVERYBODY, runs[0])  # type: ignore[arg-type]
    ids = [shelf.put("anna", run) for run in runs[1:9]]  # type: ignore[arg-type]
    shelf.get("anna", ids[0])
    shelf.put("anna", runs[9])  # type: ignore[arg-type]
    assert ids[0] in shelf.own("anna") and ids[1] not in shelf.own("anna")
    assert list(shelf.own("ben")) == [example]
    shelf.clear("anna")
    assert list(shelf.own("anna")) == [example]


# ---- answering


def asked(page: Page, question: str, visitor: str = "anna") -> list:
    request = SimpleNamespace(session_hash=visitor)
    with torch.inference_mode():
        return list(page.ask(question, 0.0, -1, 6, 0, request))  # type: ignore[arg-type]


def test_a_second_question_is_asked_with_the_first_turn_before_it(made):
    made.desks.change("anna", lambda _: desk(1))
    asked(made, "How many red circles?")
    shown = asked(made, "count the circles")[-1]
    assert [turn["question"] for turn in shown[4]] == ["How many red circles?", "count the circles"]
    runs = list(made.shelf.own("anna").values())
    assert [len(run.messages) for run in runs] == [1, 3]
    assert runs[1].messages[1]["role"] == "assistant" and len(runs[1].pictures) == 1
    assert made.desks.get("ben").turns == ()


def test_the_payload_says_where_the_present_turn_begins(made):
    made.desks.change("anna", lambda _: desk(1))
    first, second = asked(made, "How many red circles?")[-1][0], asked(made, "count the circles")[-1][0]
    assert first["earlier"] == 0
    run = list(made.shelf.own("anna").values())[1]
    assert run.texts[second["earlier"]] == "<|im_user|>"
    assert "".join(run.texts[second["earlier"] : run.prompt_length]).count("count the circles") == 1
    assert "How many" not in "".join(run.texts[second["earlier"] :])
    assert payload(run)["earlier"] == second["earlier"]


def test_a_stopped_turn_is_part_of_the_conversation_unless_the_pictures_were_changed(made):
    made.desks.change("anna", lambda _: desk(1))
    request = SimpleNamespace(session_hash="anna")
    with torch.inference_mode():
        for _ in made.ask("count the circles", 0.0, -1, 50, 0, request):  # type: ignore[arg-type]
            made.desks.change("anna", lambda one: one.add(desk(1).pictures) if len(one.pictures) == 1 else one)
            made.stop(request)  # type: ignore[arg-type]
    assert len(made.shelf.own("anna")) == 1
    assert made.desks.get("anna").turns == () and len(made.desks.get("anna").pictures) == 2


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_drawn_with_all_its_pictures_and_its_truth_is_known(family, made):
    request = SimpleNamespace(session_hash="anna")
    tray, *_, question = made.draw(family, 3, "any, up to 8 things", request)  # type: ignore[arg-type]
    one = made.desks.get("anna")
    assert len(tray["pictures"]) == len(one.pictures) >= (2 if family in ("compare", "frames") else 1)
    known = truth(one.drawn, one.pictures, question, "no such answer")
    assert known is not None and known["family"] == family and not known["right"]
    assert truth(one.drawn, one.pictures, question, known["answer"])["right"]  # type: ignore[index]
    assert truth(one.drawn, one.pictures[:-1], question, known["answer"]) is None
    assert truth(one.drawn, one.pictures, question + " why?", known["answer"]) is None


def test_several_files_at_once_keep_the_good_ones_and_name_the_first_bad_one(tmp_path, monkeypatch, made):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    files = []
    for name, data in (("a.png", saved(SCENE, "PNG")), ("b.png", b"no picture"), ("c.png", saved(SCENE, "PNG"))):
        (tmp_path / name).write_bytes(data)
        files.append({"path": str(tmp_path / name), "name": name})
    event = SimpleNamespace(_data={"what": "add", "files": files, "failed": ["d.png"]})
    arranging = made.arrange(event, SimpleNamespace(session_hash="anna"))  # type: ignore[arg-type]
    tray, *_ = next(arranging)
    assert len(tray["pictures"]) == 2
    with pytest.raises(gr.Error, match=r"d\.png could not be uploaded.*2 files"):
        next(arranging)
    assert len(made.desks.get("anna").pictures) == 2


# ---- in the browser


@pytest.mark.browser
def test_pictures_are_added_moved_removed_and_asked_about_in_their_order(visit):
    clear(visit)
    sizes = {"red": (56, 28), "blue": (28, 84)}
    files = [(f"{name}.png", saved(Image.new("RGB", size, name), "PNG")) for name, size in sizes.items()]
    upload(visit, *files)
    assert visit.locator("#picture li").count() == 2
    visit.get_by_label("Move picture 1 to the right").click()
    visit.wait_for_function("document.querySelector('#picture li img').naturalHeight > 40")
    ask(visit, "list everything.")
    assert part(visit, "size").inner_text().startswith("28 × 84")
    part(visit, "pictures").get_by_role("button").nth(1).click()
    assert part(visit, "size").inner_text().startswith("56 × 28")
    visit.get_by_label("Remove picture 1").click()
    visit.wait_for_function("document.querySelectorAll('#picture li').length === 1")
    # a pasted picture comes to the others
    visit.evaluate(
        """data => {
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
        const file = new File([bytes], 'pasted.png', { type: 'image/png' });
        const files = new DataTransfer(); files.items.add(file);
        document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: files, bubbles: true })); }""",
        base64.b64encode(files[0][1]).decode(),
    )
    visit.wait_for_function("document.querySelectorAll('#picture li').length === 2")


@pytest.mark.browser
def test_a_bad_file_among_good_ones_is_told_and_nothing_is_lost(visit):
    upload(visit, ("letter.png", b"this is a letter " * 30), ("scene.png", saved(SCENE, "PNG")))
    assert "not a picture" in toast(visit)
    assert visit.locator("#picture li").count() == 2
    assert visit.locator("#question textarea").input_value()


@pytest.mark.browser
def test_a_follow_up_continues_and_a_new_conversation_begins_anew(visit):
    question = visit.locator("#question textarea").input_value()
    ask(visit)
    assert visit.locator("#turns li").count() == 1
    ask(visit, "list everything.")
    assert visit.locator("#turns li").count() == 2
    earlier = part(visit, "strip").locator(".earlier")
    assert question.replace(" ", "") in earlier.inner_text().replace(" ", "").replace("\n", "")
    assert "list everything." in part(visit, "strip").locator(".question").inner_text()
    assert question not in part(visit, "strip").locator(".question").inner_text()
    assert part(visit, "strip").locator(".answer .sel").count() == 1  # a word of this turn, not of the earlier one
    visit.locator("#again").click()
    visit.wait_for_function("document.querySelectorAll('#turns li').length === 0")
    ask(visit, "list everything.")
    assert visit.locator("#turns li").count() == 1
    assert part(visit, "strip").locator(".earlier").is_hidden()


@pytest.mark.browser
def test_a_run_shows_itself_in_a_notebook_and_its_text_stays_where_frames_are_taken_out(browser, session, tmp_path):
    *_, run = session.answer("test", Desk.of([session.picture(SCENE)]).asking("list everything."), max_new_tokens=40)
    assert isinstance(run, Run)
    cell = run._repr_html_()
    assert len(cell) < 300_000
    text = cell[: cell.index("<iframe")]
    assert run.model_name in text and "list everything." in text and "1 picture" in text
    assert 2 <= len(repr(run).split("\n")) <= 3
    file = tmp_path / "cell.html"
    file.write_text(f"<!doctype html><body>{cell}", encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(file.as_uri())
    shown = page.frame_locator("iframe")
    shown.locator("[data-showing=run]").wait_for()
    written = "".join(shown.locator(".answer .tok:not(.template)").all_text_contents())
    assert written.replace(" ", "") == run.answer.replace(" ", "")
    assert run.model_name in shown.locator("[data-part=foot]").inner_text()
    context.close()
