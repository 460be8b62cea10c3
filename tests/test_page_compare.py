"""Compare and keep: two runs side by side with Python's numbers, and what goes to disk and comes back."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

from demos.acts import ACTS, Asked
from demos.acts import keep as keeping
from demos.session import Session
from page import SCENE, address, ask, file, part, percent, rows_of, saved, select, session, visit  # noqa: F401
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.selection import run_difference
from workbench.runs import Run, record
from workbench.viewer import payload, standalone


def recorded(text: str = "count the circles", seed: int = 0, **settings: Any) -> Run:
    options = {"max_new_tokens": 4, "model_name": "tiny", **settings}
    with torch.inference_mode():
        *_, run = record(talking_model(), tiny_chat(), question(text, picture(56, 56, seed)), **options)
    assert isinstance(run, Run)
    return run


def asking(act: str, run: Run, /, *, other: Session | None = None, stop: bool = False, **args: Any) -> list[dict[str, Any]]:
    """What an act yields, with a shelf of its own."""
    shelf = {"1": run}

    def keep(new: Run) -> str:
        shelf[str(len(shelf) + 1)] = new
        return str(len(shelf))

    here = Session(talking_model(), tiny_chat(), "tiny", other)
    view = lambda id: payload(shelf[id], id=id)  # noqa: E731
    with torch.inference_mode():
        return list(ACTS[act](Asked(here, run, args, lambda: stop, keep, shelf=lambda: shelf, view=view)))


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


# ---- acts


def test_a_kept_run_comes_back_the_same_and_a_damaged_one_is_one_sentence_without_our_folders(uploads):
    run = recorded()
    *_, told = asking("run_file", run)
    data = base64.b64decode(told["data"])
    assert told["name"] == "kimi-vl-count-the-circles.run"
    for name, content in (("good.run", data), ("cut.run", data[:-200]), ("not.run", b"letters")):
        (uploads / name).write_bytes(content)
    *_, opened = asking("open_run", run, path=str(uploads / "good.run"), name="good.run")
    again = opened["payload"]
    assert again["id"] == "2" and {**again, "id": ""} == payload(run)
    for name in ("cut.run", "not.run"):
        with pytest.raises(ValueError, match=name) as error:
            asking("open_run", run, path=str(uploads / name), name=name)
        assert str(uploads) not in str(error.value)
    with pytest.raises(ValueError, match="uploaded"):
        asking("open_run", run, path="/etc/hostname", name="hostname")


def test_the_list_of_runs_names_question_answer_weights_and_edits():
    run = recorded()
    *_, told = asking("runs", run)
    assert told["against"] == ""
    assert told["runs"] == [
        {"id": "1", "question": run.question, "answer": run.answer, "weights": "tiny", "edits": [], "pictures": 1,
         "tokens": len(run.token_ids)}
    ]  # fmt: skip


def test_figures_and_numbers_are_those_of_the_command_line_and_what_is_refused_is_told(monkeypatch):
    monkeypatch.setattr(keeping, "FIGURES", ("expert-load", "thought-classes"))
    run = recorded()
    *notes, told = asking("figures", run)
    assert [one["note"] for one in notes] == ["1 of 2: expert-load", "2 of 2: thought-classes"]
    file = zipfile.ZipFile(io.BytesIO(base64.b64decode(told["data"])))
    names = file.namelist()
    assert {"README.txt", "expert-load/expert-load.png", "expert-load/expert-load.svg", "expert-load/about.json"} <= set(names)
    assert json.loads(file.read("expert-load/about.json"))["about"]["weights"] == "tiny"
    assert not run.thought and told["left"] and told["left"][0].startswith("thought-classes: ")
    assert told["left"][0] in file.read("README.txt").decode()
    assert asking("figures", run, stop=True)[-1] == {"note": "Stopped; nothing was kept."}


def test_the_viewer_file_opens_on_the_run_it_was_made_of():
    run = recorded()
    *_, told = asking("viewer_file", run, id="1")
    page = base64.b64decode(told["data"]).decode()
    found = re.search(r'<script type="application/json" id="run">(.*?)</script>', page, re.S)
    assert found and json.loads(found[1])["question"] == run.question


def test_another_picture_is_asked_the_same_with_the_same_settings(uploads):
    run = recorded(temperature=0.7, seed=3)
    (uploads / "p.png").write_bytes(saved(picture(84, 28, 9), "PNG"))
    *_, told = asking("ask_other", run, path=str(uploads / "p.png"))
    new = told["payload"]
    assert new["question"] == run.question and new["pictures"][0]["original"] == [84, 28]
    assert {**new["settings"], "heads": 0} == {"seed": run.seed, **run.settings, "heads": 0}


def test_other_weights_are_asked_the_same_and_without_any_it_is_a_sentence():
    run = recorded()
    *_, told = asking("ask_against", run, other=Session(talking_model(), tiny_chat(), "the others"))
    assert told["payload"]["model"]["name"].startswith("the others") and told["payload"]["question"] == run.question
    with pytest.raises(ValueError, match="--against"):
        asking("ask_against", run)


def test_stopping_keeps_what_was_written(uploads):
    run = recorded(max_new_tokens=40)
    (uploads / "p.png").write_bytes(saved(picture(56, 56, 4), "PNG"))
    *_, told = asking("ask_other", run, path=str(uploads / "p.png"), stop=True)
    assert len(told["payload"]["words"]["at"]) < len(payload(run)["words"]["at"]) and not told["payload"]["finished"]


def test_work_without_the_model_does_not_wait_and_stops_no_answer():
    here = Session(talking_model(), tiny_chat(), "tiny")
    answering = here.serve("anna", lambda should_stop: iter([should_stop]))
    should_stop = next(answering)
    assert list(here.beside("anna", lambda stop: iter([stop()]))) == [False]
    assert not should_stop()  # type: ignore[operator]
    here.stop("anna")
    assert should_stop()  # type: ignore[operator]
    answering.close()  # type: ignore[attr-defined]


# ---- in the browser


@pytest.fixture(scope="module")
def pair(session):
    """Two runs about one picture, in Python."""
    runs = []
    for text in ("count the orange things.", "count the red things."):
        *_, run = session.answer("test", question(text, SCENE), max_new_tokens=120)
        assert isinstance(run, Run)
        runs.append(run)
    return runs


def agreement_shown(page, run: Run, other: Run) -> None:
    """The table of agreement against `run_difference`."""
    result = run_difference(run, other)
    shown = rows_of(part(page, "compare-same"))
    assert len(shown) == len(run.moe_layers)
    role = result["role"]
    groups = {"all": role != "", "question": role == "user", "picture": np.char.startswith(role, "image")}
    heads = part(page, "compare-same").locator("thead th").all_text_contents()
    for name, mask in groups.items():
        column = next(at for at, head in enumerate(heads) if head.startswith(f"{name} ("))
        assert heads[column] == f"{name} ({mask.sum()})"
        for line, same in zip(shown, result["same"][:, mask].mean(-1), strict=True):
            assert percent(line[column]) == pytest.approx(same, abs=0.0051)
    assert percent(part(page, "compare-chance").inner_text()) == pytest.approx(result.chance["same"], abs=0.0051)


@pytest.mark.browser
def test_two_single_files_are_compared_from_disk_with_pythons_numbers(file, pair, tmp_path):
    run, other = pair
    page = file(run)
    (tmp_path / "two.html").write_text(standalone(other), encoding="utf-8")
    page.get_by_role("tab", name="Compare").click()
    part(page, "compare-file").set_input_files(tmp_path / "two.html")
    page.wait_for_selector("[data-part=compare-both]:not([hidden])")
    agreement_shown(page, run, other)
    facts = {name: values for name, *values in rows_of(part(page, "compare-facts"))}
    assert facts["answer"] == [run.answer, other.answer] and facts["question"] == [run.question, other.question]
    for shown, one in zip(facts["sure of the answer"], pair, strict=True):
        assert percent(shown) == pytest.approx(np.exp(one.logprobs[one.positions("answer")].sum()), abs=0.0051)
    assert "the question" in part(page, "compare-differs").inner_text()
    unlike = page.locator("[data-part=compare-a-told] .unlike").all_text_contents()
    assert "orange" in "".join(unlike) and "count" not in "".join(unlike)
    # the first word of the thought: linked by its place in the thought, whose experts the table lists
    at = run.positions("thought")[0]
    select(page, run, int(at))
    there = int(other.positions("thought")[0])
    assert other.texts[there].strip() in part(page, "compare-b-word").inner_text()
    part(page, "compare-share-table").locator("summary").click()
    part(page, "compare-share-table").locator("tbody tr").first.wait_for()
    listed = rows_of(part(page, "compare-share-table"))
    chosen = {(int(layer), int(expert)) for layer, expert, _, share, _ in listed if share != "0%"}
    expected = {(layer, int(e)) for at, layer in enumerate(other.moe_layers) for e in other.chosen[at, there - 1]}
    assert chosen == expected
    # a file that holds no run is one sentence
    (tmp_path / "three.html").write_text("<p>nothing</p>")
    part(page, "compare-file").set_input_files(tmp_path / "three.html")
    part(page, "compare-note").get_by_text("holds no run").wait_for()


@pytest.mark.browser
def test_a_run_is_kept_damaged_opened_and_compared_on_the_page(visit, pair, tmp_path):
    ask(visit, pair[1].question)
    visit.get_by_role("tab", name="Keep").click()
    with visit.expect_download() as download:
        part(visit, "keep-run").click()
    file = tmp_path / "kept.run"
    download.value.save_as(file)
    kept = Run.load(file)
    assert kept.answer == pair[1].answer and kept.question == pair[1].question
    bad = tmp_path / "bad.run"
    bad.write_bytes(file.read_bytes()[:-300])
    part(visit, "keep-file").set_input_files(bad)
    part(visit, "keep-opened").get_by_text("bad.run").wait_for()
    assert "/tmp" not in part(visit, "keep-opened").inner_text()
    pair[0].save(file)
    part(visit, "keep-file").set_input_files(file)
    visit.locator("[data-part=strip] .question").get_by_text("orange").wait_for()
    visit.get_by_role("tab", name="Compare").click()
    choose = part(visit, "compare-run")
    choose.locator("option").nth(2).wait_for(state="attached")
    label = next(text for text in choose.locator("option").all_text_contents() if pair[1].question in text)
    choose.select_option(label=label)
    visit.wait_for_selector("[data-part=compare-both]:not([hidden])")
    agreement_shown(visit, pair[0], kept)
