"""The thought panel: what its acts answer, and that the page shows Python's numbers and keeps branches side by side."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from demos.acts import think
from demos.acts.act import Asked
from demos.page import EXAMPLES, scene_of, truth
from kimi_vl_ref import reply
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT
from page import address, close, file, open_table, opening, part, percent, rows_of, session, slow, visit  # noqa: F401
from tiny import picture, question, saying, talking_model, tiny_chat
from workbench.analyses.budget import thought_budget
from workbench.analyses.cues import segments
from workbench.analyses.thought import image_reliance
from workbench.runs import Run, record
from workbench.study.families import make
from workbench.tape import attach
from workbench.thoughts import continue_from, cut_thought, edit_thought, messages_of
from workbench.viewer import payload, steps

MODEL, CHAT = talking_model(), tiny_chat()
THOUGHT = "count the circles, two are red; so two. Done."
DRAWN = (*EXAMPLES[0], "full")


@pytest.fixture(scope="module")
def told() -> Run:
    with attach(MODEL, edit=saying(f"{OPEN_THOUGHT}\n{THOUGHT}{CLOSE_THOUGHT}two")):
        *_, run = record(MODEL, CHAT, question("How many?", picture(56, 56)), model_name="tiny", max_new_tokens=100)
    assert isinstance(run, Run) and run.thought == THOUGHT
    return run


def asked(run: Run, kept: list[Run] | None = None, **args: Any) -> Asked:
    def keep(new: Run) -> str:
        if kept is not None:
            kept.append(new)
        return "kept"

    def right(answer: str) -> dict[str, Any]:
        return {"family": "count", "answer": "two", "right": answer == "two"}

    here: Any = SimpleNamespace(model=MODEL, chat=CHAT, model_name="tiny")
    return Asked(here, run, args, lambda: False, keep, right)


def saying_in_turn(*texts: str) -> dict[str, Any]:
    """An edit of the logits that makes the model write these replies, one after the other."""
    end = CHAT.tokenizer.special["<|im_end|>"]
    ids = iter([id for text in texts for id in [*CHAT.tokenizer.encode(text), end]])

    def only(logits: Tensor, site: str) -> Tensor:
        logits[:] = -30.0
        logits[:, next(ids)] = 30.0
        return logits

    return {"logits": only}


# ---- the acts


def test_a_step_of_prose_begins_at_its_first_clause(told):
    assert [one.text for one in segments(told)] == ["count the circles, two are red; so two.", "Done."]
    assert [think.sentence_of(told, step) for step in (0, 1, 2)] == [0, 3, 4]


def test_a_changed_step_is_marked_and_stands_beside_the_same_place_unedited(told):
    kept: list[Run] = []
    with attach(MODEL, edit=saying_in_turn(f" Yes.{CLOSE_THOUGHT}three", f" Well.{CLOSE_THOUGHT}two")):
        *grown, last = think.edit(asked(told, kept, step=1, how="change", text=" There are three. "))
    pieces = last["branch"]["pieces"]
    by_how = {how: "".join(text for text, _, made in pieces if made == how) for how in ("kept", "changed", "new")}
    assert by_how == {"kept": THOUGHT.removesuffix("Done."), "changed": "There are three.", "new": " Yes."}
    assert "".join(text for text, _, _ in pieces) == kept[0].thought and len(kept) == 1
    assert (last["branch"]["answer"], last["branch"]["same"], last["branch"]["right"]) == ("three", False, False)
    control = last["control"]
    assert (control["answer"], control["same"], control["right"]) == ("two", True, True)
    assert "".join(text for text, _, how in control["pieces"] if how == "kept") == THOUGHT
    assert last["payload"]["id"] == "kept" and last["payload"]["truth"]["right"] is False
    assert kept[0].settings["begin"]["now"] == "There are three." and grown[0]["control"] is None


def test_a_step_is_put_between_left_out_or_made_the_last(told):
    after = f"{CLOSE_THOUGHT}four"
    cases = {
        "insert": ("kept", THOUGHT.removesuffix("Done."), "Wait."),
        "drop": ("dropped", "count the circles, two are red; so two. ", ""),
        "stop": ("kept", "count the circles, two are red; so two.", ""),
    }
    for how, (made, text, put) in cases.items():
        step = 1 if how == "insert" else 0
        replies = (after, after) if how == "insert" else ("four", after if how == "stop" else "two")
        with attach(MODEL, edit=saying_in_turn(*replies)):
            *_, last = think.edit(asked(told, step=step, how=how, text=put))
        pieces = last["branch"]["pieces"]
        assert "".join(t for t, _, one in pieces if one == made) == text, how
        assert "".join(t for t, _, one in pieces if one == "changed") == put, how
        assert last["branch"]["answer"] == "four" and last["payload"]["answer"] == "four", how
    whole = think.pieces("so two. Done.", think.Begun(cut_thought(told, 4), dropped="gone", at=13))
    assert [how for *_, how in whole] == ["kept", "kept", "dropped"]  # also behind the last step


@pytest.mark.parametrize(
    "args, words",
    [
        ({"step": 2, "how": "change", "text": "x"}, "from 0 to 1"),
        ({"step": 0, "how": "turn", "text": "x"}, "choose one of"),
        ({"step": 0, "how": "change", "text": "  "}, "empty"),
        ({"step": 0, "how": "insert", "text": 7}, "empty"),
        ({"step": 0, "how": "change", "text": "x" * 2001}, "at most 2000"),
        ({"step": 0, "how": "change", "text": f"so 2{CLOSE_THOUGHT}9"}, "ends a thought"),
    ],
)
def test_what_cannot_be_done_with_a_step_is_said(told, args, words):
    with pytest.raises(ValueError, match=words):
        list(think.edit(asked(told, **args)))


def test_a_run_of_other_weights_is_not_gone_on_from(told):
    told.versions["weights"], own = "0" * 12, told.versions["weights"]
    try:
        for act in (think.edit, think.budgets):
            with pytest.raises(ValueError, match="other weights"):
                list(act(asked(told, step=0, how="drop")))
    finally:
        told.versions["weights"] = own


def study(session, run: Run, stop: Any = lambda: False, **args: Any) -> Asked:
    return Asked(session, run, args, stop, lambda new: "", lambda said: truth(DRAWN, run.pictures, run.question, said))


def test_each_limit_has_the_answer_of_the_model_under_it_and_stop_keeps_what_is_there(session, opening):
    *_, last = think.budgets(study(session, opening))
    rows, length = last["rows"], len(opening.positions("thought"))
    assert [row["budget"] for row in rows] == [b for b in (0, 4, 8, 16, 32, 64) if b < length] + [None]
    check = scene_of(DRAWN)[1].check
    for row in rows:
        expected = reply(session.model, session.chat, messages_of(opening), thought_budget=row["budget"], max_new_tokens=128)
        assert (row["thought"], row["answer"]) == (expected.thought, expected.answer)
        assert row["right"] == check(expected.answer) and row["tokens"] == (length if row["budget"] is None else row["budget"])
    *_, stopped = think.budgets(study(session, opening, stop=lambda: True))
    assert stopped["rows"] == []


def test_the_curve_on_held_out_scenes_is_that_of_the_analysis(session, opening, monkeypatch):
    monkeypatch.setattr(think, "SCENES", 4)
    monkeypatch.setattr(think, "CHUNK", 2)
    *_, last = think.held_out(study(session, opening))
    pairs = [make("count", seed) for seed in range(4)]
    expected = thought_budget(session.model, session.chat, pairs, think.BUDGETS, model_name="study")
    for name, values in (("accuracy", "accuracy"), ("low", "accuracy_low"), ("high", "accuracy_high"), ("within", "within")):
        np.testing.assert_allclose(last[name], expected[values][0], atol=1e-4, err_msg=name)
    assert last["n"] == 4 and last["chance"] == pytest.approx(expected.chance["accuracy"][0, 0], abs=1e-4)
    with pytest.raises(ValueError, match="drawn scene"):
        list(think.held_out(Asked(session, opening, {}, lambda: False, lambda new: "")))


# ---- the payload


def test_the_payload_names_the_kind_of_every_step(told):
    shown = payload(told)
    texts = ["".join(shown["words"]["text"][a : b + 1]).strip() for a, b, _ in shown["segments"]]
    assert list(zip(texts, (kind for *_, kind in shown["segments"]), strict=True)) == [
        (one.text, one.cue.kind) for one in segments(told)
    ]
    assert steps("red circle left, so 1") == [["red circle left,", "look"], [" so 1", "conclude"]]


# ---- the page


def think_tab(page) -> None:
    page.get_by_role("tab", name="Think").click()


def done(page) -> None:
    """Waits until the panel is idle again."""
    root = "document.querySelector('#viewer .viewer').shadowRoot"
    page.wait_for_function(f"{root}.querySelector('[data-part=think-stop]').hidden")


@pytest.mark.browser
def test_the_strip_shows_entropy_kind_and_attention_of_every_word(visit, opening):
    think_tab(visit)
    rows, positions = open_table(visit, "think-table"), opening.positions("thought")
    kinds = {t: one.cue.kind for one in segments(opening) for t in range(one.start, one.stop)}
    image = opening.role_names.index("image 0")
    seen = opening.role_mass.astype(np.float32).mean((0, 1))[positions - 1 - opening.first_row, image]
    assert len(rows) == len(positions)
    for (_, kind, entropy, on_picture, chance), t, expected in zip(rows, positions, seen, strict=True):
        assert kind == kinds[t] and float(entropy) == pytest.approx(opening.entropies[t], abs=0.0051)
        assert close(on_picture, expected) and close(chance, len(opening.positions("image")) / t)
    result = image_reliance([opening], bins=3)
    said = part(visit, "think-thirds").inner_text().split(": ")[1].split("), ")
    for third, mean, chance in zip(said, result["mean"], result.chance["mean"], strict=True):
        assert close(third.split("(")[0], mean) and close(third.split("(")[1], chance)


@pytest.mark.browser
def test_the_words_of_the_conversation_are_coloured_by_kind_with_a_legend(visit, opening):
    marked = part(visit, "strip").locator(".tok[data-kind]").evaluate_all("all => all.map(e => e.dataset.kind)")
    assert marked == [one.cue.kind for one in segments(opening) for _ in range(one.start, one.stop)]
    legend = part(visit, "strip").locator(".kinds .swatch").all_text_contents()
    assert sorted(legend) == sorted(set(marked))


@pytest.mark.browser
def test_a_thought_is_coloured_while_it_is_written(visit, slow, opening):
    visit.locator("#ask-button").click()
    visit.locator(".thought .caret .kind").nth(1).wait_for()
    written = visit.locator(".thought .caret .kind")
    assert written.first.get_attribute("data-kind") == segments(opening)[0].cue.kind
    assert written.first.inner_text().strip(" ,") == segments(opening)[0].text.rstrip(",")
    assert visit.locator(".thought .swatch").count() >= 1
    visit.locator("#stop-button").click()
    visit.wait_for_selector("[data-showing=run]")


@pytest.mark.browser
def test_a_changed_step_becomes_a_branch_that_can_be_shown_and_removed(visit, session, opening):
    think_tab(visit)
    part(visit, "think-steps").locator("button").first.click()
    text = "so 9"
    assert part(visit, "think-text").input_value() == segments(opening)[0].text.rstrip(",")
    part(visit, "think-text").fill(text)
    part(visit, "think-go").click()
    done(visit)
    options = {"max_new_tokens": 128, "seed": opening.seed}
    *_, branch = continue_from(session.model, session.chat, opening, edit_thought(opening, 0, text), **options)
    *_, control = continue_from(session.model, session.chat, opening, cut_thought(opening, 1), **options)
    assert isinstance(branch, Run) and isinstance(control, Run)
    cards = visit.locator(".branch")
    assert cards.count() == 2
    assert cards.nth(1).locator(".path").inner_text().strip() == branch.thought
    assert cards.nth(1).locator(".changed").all_text_contents() == [text]
    assert cards.nth(1).locator(".said").first.inner_text().split(" ✓")[0].split(" ✗")[0] == branch.answer
    assert cards.nth(1).locator(".against .said").inner_text().split(" ✓")[0].split(" ✗")[0] == control.answer
    cards.nth(1).get_by_role("button", name="Show").click()
    visit.locator(".branch.shown", has_text="step 1 changed").wait_for()
    shown = part(visit, "strip").locator(".answer .tok:not(.template)").all_text_contents()
    assert "".join(shown).replace(" ", "") == branch.answer.replace(" ", "")
    assert open_table(visit, "think-table")[0][2] == "given"  # the model did not choose the first word
    cards.nth(0).get_by_role("button", name="Show").click()
    visit.locator(".branch.shown", has_text="Original").wait_for()
    cards.nth(1).get_by_role("button", name="Remove").click()
    assert cards.count() == 1


@pytest.mark.browser
def test_limits_are_listed_with_their_answers_and_the_curve_stops_when_told(visit, session, opening):
    think_tab(visit)
    part(visit, "think-budgets").click()
    done(visit)
    *_, last = think.budgets(study(session, opening))
    for (limit, used, answer, right), row in zip(rows_of(part(visit, "think-rows")), last["rows"], strict=True):
        assert limit == ("no limit" if row["budget"] is None else str(row["budget"]))
        assert (int(used), answer) == (row["tokens"], row["answer"] or "none") and ("right" in right) == row["right"]
    part(visit, "think-held").click()
    part(visit, "think-curve").wait_for()
    part(visit, "think-stop").click()
    done(visit)
    n = int(part(visit, "think-curve-note").inner_text().split(" ")[0])
    assert n in (5, 10, 15) and part(visit, "think-held").is_enabled()
    assert all(percent(cell) <= 1 for _, cell, *_ in open_table(visit, "think-curve-table"))


@pytest.mark.browser
def test_the_single_file_has_the_strip_and_its_steps_without_a_model(file, opening):
    page = file(opening)
    think_tab(page)
    assert len(open_table(page, "think-table")) == len(opening.positions("thought"))
    last = part(page, "think-steps").locator("button").last
    last.click()
    assert page.locator(".strip .sel").count() == segments(opening)[-1].stop - segments(opening)[-1].start
    assert last.get_attribute("aria-pressed") == "true"
    for name in ("think-go", "think-budgets", "think-held", "think-text"):
        assert not part(page, name).is_visible()
    assert page.locator("[data-panel=think] .offline").is_visible()
