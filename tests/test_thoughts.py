"""An edited thought is what the reply begins with, and the model goes on as if it had written it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kimi_vl_ref import Reply
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT
from tiny import picture, question, saying, talking_model, tiny_chat
from workbench.edits import ablate_heads
from workbench.runs import Run, RunError, record
from workbench.tape import attach
from workbench.thoughts import (
    continue_from,
    cut_thought,
    edit_thought,
    forced_ids,
    insert_thought,
    messages_of,
    sentences,
)

MODEL, CHAT = talking_model(), tiny_chat()
ASKED = question("How many red circles?", picture(100, 60), picture(50, 90, seed=1))
NAME = "tiny model, random weights"
THOUGHT = "count the circles, two are red; so two. Done."


@pytest.fixture(scope="module")
def run() -> Run:
    with attach(MODEL, edit=saying(f"{OPEN_THOUGHT}\n{THOUGHT}{CLOSE_THOUGHT}There are two.")):
        *_, found = record(MODEL, CHAT, ASKED, model_name=NAME, max_new_tokens=100)
    assert isinstance(found, Run) and found.thought == THOUGHT
    return found


def continued(source: Any, thought: Any, **options: Any) -> Run:
    *replies, found = continue_from(MODEL, CHAT, source, thought, **options)
    assert isinstance(found, Run) and all(isinstance(reply, Reply) for reply in replies)
    return found


# --- sentences -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thought, expected",
    [
        ("red circle left, blue square top, so 2", ["red circle left", "blue square top", "so 2"]),
        ("one; two.  Wait! is it 3.5, or\n4?\n\nYes", ["one", "two.", "Wait!", "is it 3.5", "or", "4?", "Yes"]),
        (" 1,000 x,y \n", ["1,000 x,y"]),
        (", ; \n", []),
        ("", []),
    ],
)
def test_sentences_end_with_stops_lines_commas_and_semicolons(thought: str, expected: list[str]) -> None:
    spans = sentences(thought)
    assert [thought[start:end] for start, end in spans] == expected
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


# --- edits ---------------------------------------------------------------------------------------------------------------


def test_a_cut_thought_is_its_first_sentences(run: Run) -> None:
    assert [cut_thought(run, n).text for n in range(5)] == [
        "",
        "count the circles",
        "count the circles, two are red",
        "count the circles, two are red; so two.",
        THOUGHT,
    ]
    closed = cut_thought(run, 1, close=True)
    assert closed.closed and str(closed) == "cut the thought after 1 of 4 sentences, and close it"


def test_a_sentence_is_replaced_or_put_in_between(run: Run) -> None:
    assert edit_thought(run, 1, "three are red").text == "count the circles, three are red"
    assert edit_thought(run, 1, "three are red", rest=True).text == "count the circles, three are red; so two. Done."
    assert insert_thought(run, 1, "wait,").text == "count the circles, wait,"
    assert insert_thought(run, 1, "wait,", rest=True).text == "count the circles, wait, two are red; so two. Done."
    assert insert_thought(run, 0, "first,", rest=True).text == f"first, {THOUGHT}"
    assert insert_thought(run, 4, "Sure.").text == f"{THOUGHT} Sure."
    assert edit_thought(run, 1, "three").settings == {
        "edit": "replace", "sentence": 1, "was": "two are red", "now": "three", "rest": False,
    }  # fmt: skip


def test_what_stands_before_the_edit_keeps_its_tokens(run: Run) -> None:
    own = run.token_ids[run.prompt_length :].tolist()
    whole = forced_ids(CHAT, run, cut_thought(run, 4, close=True))
    assert whole == own[: len(whole)] and CHAT.tokenizer.decode(whole) == f"{OPEN_THOUGHT}\n{THOUGHT}{CLOSE_THOUGHT}"
    edited = forced_ids(CHAT, run, edit_thought(run, 1, "three are red"))
    assert CHAT.tokenizer.decode(edited) == f"{OPEN_THOUGHT}\ncount the circles, three are red"
    kept = len(CHAT.tokenizer.encode(f"{OPEN_THOUGHT}\ncount the circle"))
    assert edited[:kept] == own[:kept]
    # a run that wrote the same text in other tokens, a letter each, keeps them too
    letters = [CHAT.tokenizer.encode(letter) for letter in f"{OPEN_THOUGHT}\n{THOUGHT}"]
    spelled = np.array([*run.token_ids[: run.prompt_length], *(id for ids in letters for id in ids)], np.int32)
    by_letter = Run(**{**vars(run), "token_ids": spelled})
    forced = forced_ids(CHAT, by_letter, cut_thought(by_letter, 1))
    assert forced == spelled[run.prompt_length :][: len(forced)].tolist() and len(forced) > kept


# --- going on ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free() -> Run:
    """What the random model writes by itself, after a thought that it was given."""
    return continued(ASKED, "count the circles", model_name=NAME, max_new_tokens=14)


def test_the_forced_part_is_thought_and_has_no_logprob(free: Run) -> None:
    forced = free.settings["begin"]["tokens"]
    begun, n = range(free.prompt_length, free.prompt_length + forced), free.prompt_length
    assert "".join(free.texts[t] for t in begun if free.roles[t] == "thought") == "count the circles"
    assert {free.roles[t] for t in begun} == {"special", "thought"} and free.roles[:n] == CHAT.prompt(ASKED).roles
    assert np.isnan(free.logprobs[n : n + forced]).all() and not np.isnan(free.logprobs[n + forced :]).any()
    assert len(free.token_ids) == n + forced + 14 and free.thought.startswith("count the circles")
    assert free.edits == [f"begin the reply with {forced} tokens of a given thought"]
    assert free.settings["begin"] == {"tokens": forced, "thought": "count the circles", "closed": False, "edit": "text"}


def test_the_growing_reply_shows_the_forced_thought_from_the_first_token_on() -> None:
    first, *_ = continue_from(MODEL, CHAT, ASKED, "count the circles", model_name=NAME, max_new_tokens=2)
    assert isinstance(first, Reply) and first.thought.startswith("count the circles") and first.answer == ""
    first, *_ = continue_from(MODEL, CHAT, ASKED, "count", close=True, model_name=NAME, max_new_tokens=2)
    assert isinstance(first, Reply) and first.thought == "count"


def test_the_model_goes_on_as_if_the_thought_were_its_own(free: Run) -> None:
    """Each token is the likeliest after all before it, in one pass over the whole text without any recording."""
    prompt = CHAT.prompt(ASKED)
    with torch.no_grad():
        ids = torch.tensor(free.token_ids[None], dtype=torch.long)
        logits = MODEL.logits(MODEL(ids, prompt.pixel_values, prompt.image_grid_hws))[0].log_softmax(-1)
    first = free.prompt_length + free.settings["begin"]["tokens"]
    assert logits[first - 1 : -1].argmax(-1).tolist() == free.token_ids[first:].tolist()
    np.testing.assert_allclose(free.logprobs[first:], logits[first - 1 : -1].max(-1).values, atol=1e-4)


def test_an_unedited_thought_goes_on_as_it_did(free: Run, tmp_path: Path) -> None:
    """Cut in the middle, a greedy reply comes back token for token; also from a file, which has the pictures."""
    n, forced = free.prompt_length, free.settings["begin"]["tokens"]
    own = free.token_ids[n:].tolist()
    said = [CHAT.tokenizer.decode(own[:tokens]) for tokens in range(len(own))]
    middle = next(t for t in range(forced + 3, len(own)) if not said[t].endswith("\ufffd") and said[t].strip() == said[t])
    free.save(tmp_path / "free.run")
    again = continued(
        Run.load(tmp_path / "free.run"), said[middle].removeprefix(OPEN_THOUGHT), max_new_tokens=len(own) - middle
    )
    assert again.token_ids.tolist() == free.token_ids.tolist()
    assert again.settings["begin"]["tokens"] == middle and again.prompt_length == n and again.model_name == NAME
    assert [p.image.tobytes() for p in again.pictures] == [p.image.tobytes() for p in free.pictures]


def test_a_closed_thought_is_followed_by_the_answer(run: Run) -> None:
    found = continued(run, cut_thought(run, 2, close=True), max_new_tokens=5)
    assert found.thought == "count the circles, two are red" and found.answer
    assert set(found.roles[-3:]) <= {"answer", "special"}
    assert "cut the thought after 2 of 4 sentences, and close it" in found.edits[0]


def test_a_changed_sentence_changes_what_is_written(run: Run) -> None:
    one, other = (continued(run, edit_thought(run, 1, text), max_new_tokens=6) for text in ("two", "count"))
    assert one.token_ids[-6:].tolist() != other.token_ids[-6:].tolist()


def test_sampling_budget_and_changes_work_with_a_forced_thought(run: Run) -> None:
    edit = cut_thought(run, 1)
    one, same, other = (
        continued(run, edit, max_new_tokens=8, temperature=1.0, seed=seed).token_ids.tolist() for seed in (3, 3, 4)
    )
    assert one == same != other
    forced = len(forced_ids(CHAT, run, edit))
    closing = CHAT.tokenizer.encode(CLOSE_THOUGHT)
    for budget, free_tokens in ((2, 0), (forced + 1, 0)):  # both are spent, or nearly, by the forced part
        found = continued(run, edit, max_new_tokens=30, thought_budget=budget)
        new = found.token_ids[found.prompt_length + forced :].tolist()
        at = next(i for i in range(len(new)) if new[i : i + len(closing)] == closing)
        assert (at == free_tokens) if budget == 2 else (0 < at <= forced + 1)
        assert found.answer
    changed = continued(run, edit, max_new_tokens=6, changes=[ablate_heads(1, [0, 1])])
    assert changed.edits[0] == "ablate heads 0, 1 of layer 1 (zero)" and len(changed.edits) == 2


def test_the_conversation_of_a_run_can_be_asked_again(run: Run) -> None:
    messages = messages_of(run)
    assert CHAT.prompt(messages).input_ids == run.token_ids[: run.prompt_length].tolist()
    assert run.messages[0]["content"][0] == {"type": "image", "image": 0}  # the run itself stays plain


def test_what_cannot_be_edited_is_said(run: Run) -> None:
    for make, message in (
        (lambda: cut_thought(run, 5), "sentence 5 cannot be used to cut after; this thought has 4, so give 0 to 4"),
        (lambda: edit_thought(run, 4, "x"), "so give 0 to 3"),
        (lambda: edit_thought(run, True, "x"), "sentence True"),
        (lambda: insert_thought(run, -1, "x"), "sentence -1"),
        (lambda: cut_thought(Run(**{**vars(run), "thought": ""}), 0), "no thought to edit"),
        (lambda: continue_from(MODEL, CHAT, ASKED, "x"), "give model_name"),
    ):
        with pytest.raises(RunError, match=message):
            make()
