"""The change panel's acts, without a browser: each kind of change does what it says; its control is another of its size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from demos.acts.act import Asked
from demos.acts.change import another_control, change, marked, more_controls, touched, verdict
from demos.acts.change_again import Base, moved, on_picture
from demos.acts.change_kinds import Block, Experts, Heads, Region, Tokens, TopK, blanked, control, merged
from demos.acts.change_places import NoControl, Text
from demos.acts.change_read import changes_of
from demos.session import Session
from hand_made import hand_made
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT
from tiny import picture, question, saying, talking_model, tiny_chat
from workbench.analyses.trials import read, run_trial, token_logprobs
from workbench.edits import ablate_experts, applied
from workbench.runs import Run, record
from workbench.tape import attach

MODEL = talking_model()
CHAT = tiny_chat()
SESSION = Session(MODEL, CHAT, "tiny")


def ended(items) -> Any:
    *_, last = items
    return last


def asked_of(pictures=2, **options) -> Run:
    images = [picture(84, 56, seed) for seed in range(pictures)]
    settings = {"model_name": "tiny", "max_new_tokens": 6} | options
    return ended(record(MODEL, CHAT, question("How many red circles?", *images), **settings))


@pytest.fixture(scope="module")
def run() -> Run:
    return asked_of()


def asking(run: Run, *changes: dict, kept: list | None = None, **more) -> Asked:
    keep = [] if kept is None else kept
    args = {"changes": list(changes), "seed": 1, **more}
    return Asked(SESSION, run, args, lambda: False, lambda new: keep.append(new) or str(len(keep)))


EXPERT = {"kind": "expert", "layer": 1, "expert": 6, "how": "contribution"}
KINDS = {
    "expert": EXPERT,
    "dropped": EXPERT | {"how": "renormalise"},
    "around": EXPERT | {"how": "route around"},
    "head": {"kind": "head", "layer": 1, "head": 2, "how": "zero"},
    "mean head": {"kind": "head", "layer": 1, "head": 2, "how": "mean"},
    "layer": {"kind": "layer", "layer": 2, "part": "attn"},
    "token": {"kind": "token", "token": 3, "how": "mean"},
    "picture": {"kind": "picture", "picture": 1, "how": "zero"},
    "region": {"kind": "region", "picture": 0, "box": [10, 10, 40, 30]},
    "bias": {"kind": "bias", "layer": 2, "expert": 4, "by": 0.7},
    "top-k": {"kind": "top-k", "k": 2},
    "block": {"kind": "block", "from": "reply", "to": "question"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_three_columns_and_its_control_is_another_of_its_size(run, kind):
    kept: list[Run] = []
    told = ended(change(asking(run, KINDS[kind], kept=kept)))
    before, changed, other = told["columns"]
    assert [one["name"] for one in told["columns"]] == ["before", "changed", "control"]
    assert before["moved"] == 0 and told["no_control"] == ""
    assert before["answer_logprob"] is None or before["answer_logprob"] <= 0
    assert changed["lines"] != other["lines"] and len(changed["lines"]) == len(other["lines"]) == 1
    assert kept[0].edits and kept[1].edits and kept[0].edits != kept[1].edits
    assert [changed["id"], other["id"]] == ["1", "2"] and changed["payload"]["kind"] == "run"
    assert changed["reply"] != before["reply"]  # the change reached the model
    counts = [one.settings.get("changes", [{}])[0].get("touched", {}) for one in kept]
    if kind in ("token", "picture", "head", "mean head", "layer", "block"):
        assert "nothing" not in changed["touched"][0]
        size = {"token": "visual_tokens", "picture": "visual_tokens", "head": "heads", "mean head": "heads"}.get(kind)
        assert size is None or counts[0][size] == counts[1][size] > 0
    assert told["verdict"] == verdict(run.answer, kept[0].answer, kept[1].answer)


def test_probability_of_the_old_reply_is_that_of_the_edited_model(run):
    changed = ended(change(asking(run, EXPERT)))["columns"][1]
    trial = run_trial(CHAT, run, score="reply")
    with torch.no_grad(), applied(MODEL, [ablate_experts(1, [6])], idle="report"):
        expected = token_logprobs(MODEL, trial, read(MODEL, trial))[0].sum()
    assert changed["reply"] == pytest.approx(float(expected), abs=1e-4)


def test_unchanged_the_replay_is_as_likely_as_the_run_said(run):
    base = Base(MODEL, CHAT, run)
    assert base.before.reply == pytest.approx(float(np.nansum(run.logprobs)), abs=1e-3)
    wrote = np.arange(run.prompt_length, len(run.token_ids)) - 1
    assert (np.sort(base.before.chosen, -1) == np.sort(run.chosen[:, wrote], -1)).all()


def test_blocking_everything_from_the_pictures_removes_all_attention_on_them(run):
    kept: list[Run] = []
    told = ended(change(asking(run, {"kind": "block", "from": "everything", "to": "picture"}, kept=kept)))
    assert told["columns"][0]["picture"] > 0.01
    assert told["columns"][1]["picture"] == 0.0
    assert (kept[0].picture_attention == 0).all()
    one = ended(change(asking(run, {"kind": "block", "from": "reply", "to": "picture 1"}, kept=kept)))
    assert one["columns"][1]["picture"] > 0.01
    rows = slice(run.prompt_length - 1 - run.first_row, None)
    assert (kept[2].picture_attention[:, :, rows, run.tokens_of_picture(1)] == 0).all()
    assert (kept[2].picture_attention[:, :, rows, run.tokens_of_picture(0)] > 0).any()


def thinking(thought: str = "two red circles", answer: str = "2") -> Run:
    with attach(MODEL, edit=saying(f"{OPEN_THOUGHT}{thought}{CLOSE_THOUGHT}{answer}")):
        return asked_of(1, max_new_tokens=40)


def test_a_block_of_the_answer_leaves_the_thought_looking():
    run = thinking()
    base = Base(MODEL, CHAT, run)
    text = base.text(run)
    assert [run.roles[at] for at in text.queries("thought", [1])[1:]].count("answer") == 0
    assert text.answer is not None and run.roles[text.answer] == "answer"
    kinds = changes_of(asking(run, {"kind": "block", "from": "answer", "to": "picture"}))
    answering = base.answered(kinds, lambda: False, "")
    with attach(MODEL, edit=_twice(run)):
        new = _returned(answering)
    answer = int(new.positions("answer")[0])
    rows = new.picture_attention.astype(np.float32).sum((0, 1, 3))
    assert (rows[answer - 1 - new.first_row :] == 0).all()
    assert (rows[: answer - 1 - new.first_row] > 0).all()
    assert new.thought == run.thought


def test_a_block_of_the_thought_leaves_the_answer_looking():
    run = thinking()
    kinds = changes_of(asking(run, {"kind": "block", "from": "thought", "to": "picture"}))
    with attach(MODEL, edit=_twice(run)):
        new = _returned(Base(MODEL, CHAT, run).answered(kinds, lambda: False, ""))
    answer = int(new.positions("answer")[0])
    rows = new.picture_attention.astype(np.float32).sum((0, 1, 3))[new.prompt_length - 1 - new.first_row :]
    blocked = answer - new.prompt_length
    assert (rows[:blocked] == 0).all() and (rows[blocked:] > 0).all()


def _twice(run: Run) -> dict[str, Any]:
    """Writes the run's reply and then, with the thought given, its answer."""
    written = [int(id) for id in run.token_ids[run.prompt_length :]]
    answers = run.positions("answer")
    ids = iter([*written, *[int(id) for id in run.token_ids[int(answers[0]) :]]])

    def only(logits, site):
        logits[:] = -30.0
        logits[:, next(ids)] = 30.0
        return logits

    return {"logits": only}


def _returned(generator) -> Run:
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def test_a_blank_region_has_the_mean_colour_and_nothing_else_changes(run):
    kept: list[Run] = []
    told = ended(change(asking(run, KINDS["region"], kept=kept)))
    was, now = (np.asarray(one.pictures[0].image, int) for one in (run, kept[0]))
    assert (now[10:30, 10:40] == was.mean((0, 1)).round()).all()
    differs = (was != now).any(-1)
    assert differs[10:30, 10:40].any() and differs.sum() == differs[10:30, 10:40].sum()
    assert (np.asarray(kept[0].pictures[1].image) == np.asarray(run.pictures[1].image)).all()
    assert kept[0].edits == told["columns"][1]["lines"] == ["picture 1 blank from x 10 to 40, y 10 to 30"]
    other = np.argwhere((np.asarray(kept[1].pictures[0].image, int) != was).any(-1))
    height, width = other.max(0) - other.min(0) + 1
    assert width <= 30 and height <= 20 and not (differs & (np.asarray(kept[1].pictures[0].image, int) != was).any(-1)).any()


def test_a_region_of_a_picture_kept_smaller_is_scaled_with_it(run):
    grid = replace(run.pictures[0].grid, original=(168, 112))
    smaller = replace(run, pictures=[replace(run.pictures[0], grid=grid), run.pictures[1]])
    image = np.asarray(blanked(smaller, [Region(0, (20, 20, 80, 60))])[0], int)
    changed = np.argwhere((image != np.asarray(run.pictures[0].image, int)).any(-1))
    assert changed.min(0).tolist() == [10, 10] and changed.max(0).tolist() == [29, 39]


def test_controls_are_drawn_from_what_was_not_chosen(run):
    kinds = changes_of(asking(run, *({**EXPERT, "expert": e} for e in (0, 1, 2)), {**EXPERT, "layer": 2, "expert": 5}))
    assert kinds == [Experts(1, (0, 1, 2), "contribution"), Experts(2, (5,), "contribution")]
    for seed in range(20):
        first, second = control(kinds, run, seed)
        assert first.layer == 1 and len(first.experts) == 3 and not set(first.experts) & {0, 1, 2}
        assert second.layer == 2 and len(second.experts) == 1 and 5 not in second.experts
    assert control(kinds, run, 3) == control(kinds, run, 3) and control(kinds, run, 3) != control(kinds, run, 4)
    token = Tokens(tuple(range(1, run.picture_attention.shape[3])), "mean")
    with pytest.raises(NoControl, match="left to draw from"):
        control([token], run, 0)
    for seed in range(20):
        (box,) = (one.box for one in control([Region(0, (0, 0, 30, 40))], run, seed))
        assert box[2] - box[0] == 30 and box[3] - box[1] == 40 and box[0] >= 30 and box[2] <= 84 and box[3] <= 56
    with pytest.raises(NoControl, match="no other rectangle"):
        control([Region(0, (0, 0, 50, 40))], run, 0)


def test_a_change_without_a_twin_says_that_there_is_no_control():
    run = asked_of(1)
    told = ended(change(asking(run, {"kind": "picture", "picture": 0, "how": "mean"})))
    assert len(told["columns"]) == 2 and "not 6 other picture tokens" in told["no_control"]
    assert told["verdict"].endswith("there is no random control to compare with.")
    more = ended(more_controls(asking(run, {"kind": "picture", "picture": 0, "how": "mean"})))
    assert "There is no control" in more["no_control"]


def test_the_control_of_fewer_experts_draws_from_the_tokens_own(run):
    kept: list[Run] = []
    ended(change(asking(run, {"kind": "top-k", "k": 1}, kept=kept)))
    changed, other = kept
    assert changed.chosen.shape[2] == other.chosen.shape[2] == 1
    prompt = slice(0, run.prompt_length)
    best = run.chosen[0, prompt, :1]  # the first layer that routes sees the same in all three
    assert (changed.chosen[0, prompt] == best).all() and (other.chosen[0, prompt] != best).any()
    assert (other.chosen[0, prompt] == run.chosen[0, prompt]).any(-1).all()
    assert TopK(1, 3).line() != TopK(1).line()


def test_changes_compose_and_repeats_count_once(run):
    kept: list[Run] = []
    token = KINDS["token"]
    ended(change(asking(run, *KINDS.values(), token, kept=kept)))
    assert len(kept[0].edits) == 12
    assert merged([Tokens((1, 2), "mean"), Tokens((2, 3), "mean"), Tokens((4,), "zero")]) == [
        Tokens((1, 2, 3), "mean"),
        Tokens((4,), "zero"),
    ]


def test_more_controls_count_how_often_the_answer_changed(run):
    told = list(more_controls(asking(run, EXPERT, count=3)))
    rows = told[-1]["rows"]
    assert [row["seed"] for row in rows] == [1, 2, 3] and len({tuple(row["lines"]) for row in rows}) > 1
    changed = sum(row["answer"] != run.answer for row in rows)
    assert told[-1]["sentence"] == f"The answer changed in {changed} of 3 random controls."
    assert "1 of 3 done." in [one.get("note") for one in told]
    single = ended(another_control(asking(run, EXPERT, seed=2, answer=run.answer)))
    assert single["columns"][0]["said"] == rows[1]["answer"] and single["columns"][0]["lines"] == rows[1]["lines"]
    assert single["columns"][0]["reply"] == rows[1]["reply"]


def test_stop_ends_it_and_keeps_nothing(run):
    kept: list[Run] = []
    stopped = replace(asking(run, EXPERT, kept=kept), should_stop=lambda: True)
    assert "Stopped" in ended(change(stopped))["stopped"] and not kept
    assert "Stopped" in ended(more_controls(stopped))["stopped"]
    assert "Stopped" in ended(another_control(stopped))["stopped"] and not kept


def test_a_run_that_began_with_given_words_begins_with_them_again():
    from workbench.thoughts import continue_from

    run = ended(continue_from(MODEL, CHAT, asked_of(1), "count", max_new_tokens=4))
    new = _returned(Base(MODEL, CHAT, run).answered([Experts(1, (4,), "contribution")], lambda: False, ""))
    begun = run.settings["begin"]["tokens"]
    assert begun and (new.token_ids[: run.prompt_length + begun] == run.token_ids[: run.prompt_length + begun]).all()


REFUSED = {
    "nothing": ([], "list of changes is empty"),
    "no list": ("all", "list of changes is empty"),
    "too many": ([EXPERT] * 65, "65 changes"),
    "no change": ([7], "7 is no change"),
    "unknown": ([{"kind": "magic"}], "kind is 'magic'"),
    "dense layer": ([EXPERT | {"layer": 0}], "layer 0 has no experts"),
    "no such layer": ([EXPERT | {"layer": 9}], "from 0 to 2"),
    "no such expert": ([EXPERT | {"expert": 11}], "from 0 to 10"),
    "half an expert": ([EXPERT | {"expert": 1.5}], "whole number"),
    "no such head": ([KINDS["head"] | {"head": 5}], "from 0 to 4"),
    "no such token": ([KINDS["token"] | {"token": 12}], "from 0 to 11"),
    "no such picture": ([KINDS["picture"] | {"picture": 2}], "from 0 to 1"),
    "empty region": ([KINDS["region"] | {"box": [90, 0, 99, 9]}], "covers no pixel"),
    "no region": ([KINDS["region"] | {"box": None}], "draw a rectangle"),
    "odd region": ([KINDS["region"] | {"box": [0, 0, "a", 3]}], "side is 'a'"),
    "no shift": ([KINDS["bias"] | {"by": 0}], "changes nothing"),
    "wild shift": ([KINDS["bias"] | {"by": 1e9}], "from -5 to 5"),
    "same k": ([{"kind": "top-k", "k": 4}], "chooses already"),
    "two ks": ([{"kind": "top-k", "k": 2}, {"kind": "top-k", "k": 3}], "two different numbers"),
    "itself": ([{"kind": "block", "from": "question", "to": "question"}], "looking at itself"),
    "ahead": ([{"kind": "block", "from": "picture 0", "to": "question"}], "no word looks ahead"),
    "no thought": ([{"kind": "block", "from": "answer", "to": "thought"}], "no thought"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_sentence(run, case):
    changes, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as refused:
        ended(change(replace(asking(run), args={"changes": changes, "seed": 1})))
    assert "\n" not in str(refused.value) and ". " not in str(refused.value)


def test_runs_of_other_weights_or_under_changes_are_refused(run):
    with pytest.raises(ValueError, match="other weights"):
        ended(change(asking(replace(run, versions={"weights": "0"}), EXPERT)))
    kept: list[Run] = []
    ended(change(asking(run, EXPERT, kept=kept)))
    with pytest.raises(ValueError, match="under changes already"):
        ended(change(asking(kept[0], EXPERT)))


def test_share_of_choices_that_moved():
    before = np.array([[[0, 1], [2, 3]]])
    assert moved(before, before[..., ::-1]) == 0
    assert moved(before, np.array([[[0, 5], [2, 3]]])) == 0.25
    assert moved(before, np.array([[[0, 1, 7, 8], [2, 3, 7, 8]]])) == 0.5
    assert moved(before, np.array([[[1], [2]]])) == 0.5


def test_attention_on_the_picture_is_the_mean_over_written_words(run):
    rows = run.positions("thought", "answer") - 1 - run.first_row
    pictures = [at for at, name in enumerate(run.role_names) if name.startswith("image")]
    expected = run.role_mass[:, :, rows][..., pictures].astype(float).sum(-1).mean()
    assert on_picture(run) == pytest.approx(expected, rel=1e-6)
    assert on_picture(hand_made([[0, 1]], 4)) is None


def test_words_that_differ_are_marked():
    before, after = marked("so 3 red circles", "so 2 red circles and")
    assert before == [["so", False], [" 3", True], [" red", False], [" circles", False]]
    assert after == [["so", False], [" 2", True], [" red", False], [" circles", False], [" and", True]]
    assert marked("", "a") == ([], [["a", True]])


def test_the_verdict_says_what_happened_and_no_more():
    assert verdict("3", "2", "3") == "The answer changed from “3” to “2”; the random control left it at “3”."
    assert verdict("3", "3", "3") == "The answer stayed “3”; the random control left it there too."
    assert verdict("3", "3", "4") == "The answer stayed “3”; the random control changed it to “4”."
    assert verdict("3", "2", "2") == "The answer changed from “3” to “2”; the random control changed it to the same."
    assert verdict("3", "", None) == "The answer changed from “3” to nothing; there is no random control to compare with."


def test_counts_are_said_in_words(run):
    names = ["ablate_experts", "set_top_k", "pin_routing", "ablate_heads"]
    counts = [{"tokens": 3, "slots": 1200}, {"tokens": 7}, {"tokens": 9}, {"tokens": 0}]
    changes = [{"settings": {"name": name}, "touched": one} for name, one in zip(names, counts, strict=True)]
    kinds = [Region(0, (1, 2, 4, 6)), Experts(1, (0,), "contribution"), TopK(1, 5)]
    kinds += [Block("reply", "question"), Heads(0, (1,), "zero")]
    said = touched(replace(run, settings={"changes": changes}), kinds)
    assert said[:3] == ["12 pixels", "3 tokens, 1,200 choices", "7 tokens"]
    assert [text.startswith("nothing") for text in said[3:]] == [True, True]


def test_text_of_several_pictures_is_told_apart():
    roles = ["special", "image 0", "image 0", "image 1", "user", "special", "thought", "answer"]
    text = Text(roles, 6, 7)
    assert text.keys("picture") == [1, 2, 3] and text.keys("picture 1") == [3] and text.keys("question") == [4]
    assert text.keys("thought") == [6] and text.queries("thought", [1]) == [5] and text.queries("answer", [1]) == slice(6, None)
    assert text.queries("everything", [1, 2, 3]) == slice(4, None) and text.queries("reply", [1]) == slice(5, None)
