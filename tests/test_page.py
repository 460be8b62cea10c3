"""The page in a real browser, with the study model: what a visitor does, and that what is shown equals Python's numbers."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demos.page import EXAMPLES, scene_of
from page import (  # noqa: F401, the fixtures among them
    PATIENCE,
    SCENE,
    address,
    ask,
    clear,
    close,
    open_table,
    opening,
    outside,
    part,
    rows_of,
    saved,
    select,
    session,
    slow,
    toast,
    upload,
    visit,
)
from workbench.runs import Run
from workbench.study.evaluate import ask as ask_about
from workbench.viewer import standalone

pytestmark = pytest.mark.browser
# ---- what a visitor finds ------------------------------------------------------------------------------------------


def test_the_page_opens_on_a_finished_example(visit, session, opening):
    assert part(visit, "strip").locator(".answer .sel, .thought .sel").count() == 1
    shown = part(visit, "strip").locator(".answer .tok:not(.template)").all_text_contents()
    assert "".join(shown).replace(" ", "") == opening.answer.replace(" ", "")
    assert len(rows_of(part(visit, "expert-table"))) >= 2
    assert session.model_name in visit.locator("#top").inner_text() and "CPU" in visit.locator("#top").inner_text()
    assert session.model_name in part(visit, "foot").inner_text()
    assert visit.locator("#question textarea").input_value() == opening.question


def test_the_examples_come_out_right(session):
    drawn = [scene_of((*example, "full")) for example in EXAMPLES]
    replies = ask_about(session.model, session.chat, drawn)
    wrong = [(q.text, answer, q.answer) for (_, q), (_, answer) in zip(drawn, replies, strict=True) if not q.check(answer)]
    assert not wrong


def test_a_drawn_scene_is_asked_about_and_checked(visit):
    question = visit.locator("#question textarea")
    before = question.input_value()
    visit.locator("#draw input").click()
    visit.get_by_role("option", name="where").click()
    visit.wait_for_function("b => document.querySelector('#question textarea').value !== b", arg=before)
    visit.locator("#fresh").click()
    visit.wait_for_timeout(1500)
    ask(visit)
    assert question.input_value() in part(visit, "strip").inner_text().replace("\n", " ")
    assert visit.locator(".answer .tok:not(.template)").count() >= 1
    assert re.search("right|wrong", visit.locator(".verdict").inner_text())
    # another question on the same picture: nobody knows its answer
    ask(visit, "list everything.")
    assert visit.locator(".verdict").count() == 0


def test_an_example_is_asked_at_one_click(visit):
    visit.evaluate("document.querySelector('#viewer .viewer').dataset.showing = 'before'")
    visit.get_by_role("button", name="where:").click()
    visit.wait_for_selector("[data-showing=run]")
    _, question = scene_of((*EXAMPLES[2], "full"))
    assert visit.locator("#question textarea").input_value() == question.text
    assert visit.locator(".verdict").count() == 1
    with visit.expect_download() as download:
        visit.locator("#keep").click()
    assert "<!doctype html>" in Path(download.value.path()).read_text(encoding="utf-8")


# ---- numbers -------------------------------------------------------------------------------------------------------


def check_numbers(page, run: Run, rows: list[int], layer: int | None = None, head: int | None = None) -> None:
    """Every number on the page that speaks of these positions, against the recorded arrays."""
    at = np.array(rows) - run.first_row
    chosen = (slice(None) if layer is None else [layer], slice(None) if head is None else [head])
    heat = run.picture_attention.astype(np.float32)[chosen[0]][:, chosen[1]][:, :, at].mean((0, 1, 2))
    mass = run.role_mass.astype(np.float32)[chosen[0]][:, chosen[1]][:, :, at].mean((0, 1, 2))
    shown = [cell for row in open_table(page, "heat-table") for cell in row[1:]]
    assert len(shown) == len(heat)
    assert all(close(cell, value) for cell, value in zip(shown, heat, strict=True))
    assert close(part(page, "parts-legend").locator("[data-group=picture]").inner_text(), mass[run.role_names.index("image 0")])
    assert close(part(page, "parts-legend").locator("[data-group=question]").inner_text(), mass[run.role_names.index("user")])
    layer = int(part(page, "table-layer").input_value())
    for name, score, bias, total, weight in rows_of(part(page, "expert-table")):
        e = int(name.split(" ")[0])
        picked = (run.chosen[layer][rows] == e).any(-1)
        mean = run.scores[layer][rows, e].astype(np.float32).mean()
        assert float(score) == pytest.approx(mean, abs=0.006)
        assert float(bias.replace("−", "-")) == pytest.approx(run.bias[layer, e], abs=0.006)
        assert float(total.replace("−", "-")) == pytest.approx(mean + run.bias[layer, e], abs=0.006)
        assert (weight == "none") == (not picked.any())
        if picked.any():
            weights = np.where(run.chosen[layer][rows] == e, run.weights[layer][rows], 0).astype(np.float32).sum(-1).mean()
            assert float(weight) == pytest.approx(weights, abs=0.006)


def test_choosing_a_word_changes_picture_and_experts_and_the_numbers_are_pythons(visit, opening):
    thought = opening.positions("thought")
    pictures = []
    for position in (int(thought[1]), int(opening.positions("answer")[-1])):
        select(visit, opening, position)
        check_numbers(visit, opening, [position - 1])  # writing a word happened one row before it
        pictures.append(part(visit, "picture").evaluate("canvas => canvas.toDataURL()"))
    assert pictures[0] != pictures[1]
    question = int(opening.positions("user")[0])
    select(visit, opening, question)
    check_numbers(visit, opening, [question])  # a word of the question is read, not written
    assert "reading" in part(visit, "heat-caption").inner_text()


def test_one_layer_one_head_a_span_and_the_moment_after(visit, opening):
    first, last = (int(p) for p in opening.positions("thought")[[0, 3]])
    select(visit, opening, first)
    select(visit, opening, last, modifiers=["Shift"])
    check_numbers(visit, opening, list(range(first - 1, last)))
    part(visit, "layer").select_option("2")
    part(visit, "head").select_option("1")
    check_numbers(visit, opening, list(range(first - 1, last)), 2, 1)
    visit.get_by_role("button", name="after reading it").click()
    check_numbers(visit, opening, list(range(first, last + 1)), 2, 1)
    # the experts of the layer that was picked
    assert part(visit, "table-layer").input_value() == str(opening.moe_layers.index(2))
    assert len(open_table(visit, "head-table")) == opening.picture_attention.shape[0]
    assert len(open_table(visit, "track-table")) >= len(opening.positions("thought", "answer"))
    shares = open_table(visit, "share-table")
    assert len(shares) == opening.n_experts
    rows = np.arange(first, last + 1)
    for e, line in enumerate(shares):
        for layer, cell in enumerate(line[1:]):
            assert close(cell, (opening.chosen[layer][rows] == e).any(-1).mean())


def test_pointing_at_a_patch_names_its_token_and_share(visit, opening):
    position = int(opening.positions("thought")[1])
    select(visit, opening, position)
    grid = opening.pictures[0].grid
    token = grid.token_count - grid.token_grid[1] - 2  # last row but one
    box = part(visit, "picture").bounding_box()
    row, column = divmod(token, grid.token_grid[1])
    side = box["width"] / grid.token_grid[1]
    visit.mouse.move(box["x"] + (column + 0.5) * side, box["y"] + (row + 0.5) * side)
    said = part(visit, "readout").inner_text()
    assert f"token {token}" in said and f"Row {row + 1}, column {column + 1}" in said
    assert close(said, float(opening.heat(position - 1).reshape(-1)[token]))


def test_arrow_keys_move_and_extend_the_selection(visit, opening):
    words = [at for at, role in enumerate(opening.roles) if not role.startswith("image")]
    position = int(opening.positions("thought")[1])
    open_table(visit, "heat-table")  # now, as it takes the focus
    select(visit, opening, position)
    visit.keyboard.press("ArrowRight")
    check_numbers(visit, opening, [position])
    visit.keyboard.press("Shift+ArrowRight")
    check_numbers(visit, opening, [position, position + 1])
    visit.keyboard.press("Home")
    assert part(visit, "strip").get_attribute("aria-activedescendant") == f"word-{words.index(opening.first_row)}"
    part(visit, "picture").focus()
    visit.keyboard.press("ArrowRight")
    visit.keyboard.press("ArrowDown")
    assert f"token {opening.pictures[0].grid.token_grid[1]} " not in part(visit, "readout").inner_text()
    assert "Row 2, column 1" in part(visit, "readout").inner_text()


# ---- stop, other visitors ------------------------------------------------------------------------------------------


def test_stop_keeps_what_was_written(visit, slow):
    visit.locator("#question textarea").fill("list everything.")
    visit.locator("#ask-button").click()
    visit.wait_for_function(
        "document.querySelector('#viewer .viewer').shadowRoot.querySelector('.caret')?.textContent.length > 5"
    )
    pressed = time.monotonic()
    visit.locator("#stop-button").click()
    visit.wait_for_selector("[data-showing=run]")
    assert time.monotonic() - pressed < 10
    assert "Cut off" in part(visit, "note").inner_text()
    assert visit.locator(".answer .tok:not(.template)").count() >= 1
    assert visit.locator("#ask-button").is_enabled()


def test_visitors_wait_for_each_other_and_one_who_leaves_holds_nothing(visit, slow, browser, address, session):
    other = browser.new_context().new_page()
    other.set_default_timeout(PATIENCE)
    other.goto(address)
    other.wait_for_selector("[data-showing=run]")
    other.locator("#question textarea").fill("describe the picture.")
    other.locator("#ask-button").click()
    other.wait_for_selector(".caret")
    visit.locator("#ask-button").click()
    visit.wait_for_function(
        "document.querySelector('#viewer .viewer').shadowRoot.querySelector('[data-part=note]').textContent.includes('Waiting')"
    )
    other.context.close()  # in the middle of the answer
    visit.wait_for_selector("[data-showing=run]")
    assert visit.locator(".answer .tok:not(.template)").count() >= 1
    assert not session._line


# ---- bad input -----------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a few kB that says it is 10,000 x 10,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = zlib.compress(b"\0" * (10_000 * (1 + 10_000 // 8)), 9)
    head = struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


REFUSED = {
    "not an image": (b"this is a letter, not a picture " * 20, "not a picture"),
    "truncated": (saved(SCENE, "PNG")[:-400], "cut off"),
    "20,000 px wide": (saved(Image.new("RGB", (20_000, 20)), "PNG"), "20000"),
    "100 megapixels": (bomb(), "pixels"),
    "empty": (b"", "0 bytes"),
}


def test_bad_pictures_are_refused_in_a_sentence_and_the_page_lives(visit):
    for name, (data, words) in REFUSED.items():
        upload(visit, ("picture.png", data))
        said = toast(visit)
        assert words in said and "/tmp" not in said and "Traceback" not in said, (name, said)
    assert visit.locator("#picture li").count() == 1  # what was there is still there
    clear(visit)
    upload(visit, ("scene.png", saved(SCENE, "PNG")))
    ask(visit, "how many orange things are there?")
    assert visit.locator(".answer .tok:not(.template)").count() >= 1


def test_unusual_pictures_are_read(visit):
    small = SCENE.resize((84, 56))
    turned = Image.Exif()
    turned[274] = 6  # shown upright after a quarter turn
    files = {
        "cmyk.jpg": saved(small.convert("CMYK"), "JPEG"),
        "palette.png": saved(small.quantize(8), "PNG", transparency=0),
        "animated.gif": saved(small, "GIF", save_all=True, append_images=[small.transpose(Image.Transpose.ROTATE_180)]),
        "turned.jpg": saved(small, "JPEG", exif=turned),
        "dot.png": saved(Image.new("RGB", (1, 1)), "PNG"),
    }
    sizes = {}
    for name, data in files.items():
        clear(visit)
        upload(visit, (name, data))
        ask(visit, "list everything.")
        sizes[name] = part(visit, "size").inner_text()
    assert sizes["turned.jpg"].startswith("56 × 84") and sizes["dot.png"].startswith("1 × 1")
    assert all(sizes[name].startswith("84 × 56") for name in ("cmyk.jpg", "palette.png", "animated.gif"))


def test_bad_questions_are_refused_and_a_good_one_follows(visit):
    for question, words in (("   ", "empty"), ("very " * 5000, "context")):
        visit.locator("#question textarea").fill(question)
        visit.locator("#ask-button").click()
        assert words in toast(visit)
        visit.wait_for_selector("[data-showing=run]")  # the last run is back
    ask(visit, "list everything.")


def test_html_in_a_question_stays_text(visit):
    question = '<img src=x onerror="window.hit=1"><b>how many</b> ${1+1} {{value}} <|im_end|>?'
    ask(visit, question)
    shown = "".join(part(visit, "strip").locator(".question > div").all_text_contents())
    assert question in shown
    assert visit.evaluate("window.hit") is None
    assert part(visit, "strip").locator("img, b").count() == 0


# ---- the single file, looks ----------------------------------------------------------------------------------------


def test_the_single_file_works_from_disk_without_a_network(browser, opening, tmp_path):
    file = tmp_path / "run.html"
    file.write_text(standalone(opening), encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: asked.append(m.text) if m.type == "error" else None)
    page.goto(file.as_uri())
    page.wait_for_selector("[data-showing=run]")
    position = int(opening.positions("thought")[1])
    select(page, opening, position)
    check_numbers(page, opening, [position - 1])
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_at_any_width(browser, address, scheme, width):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("[data-showing=run]")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert outside(page) == []
    assert page.evaluate("document.querySelector('#viewer .viewer').shadowRoot.querySelector('.kv').dataset.theme") == scheme
    context.close()
