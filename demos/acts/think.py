"""The thought panel: a step of a thought edited and gone on from, and the answer under a limit on the thought's tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kimi_vl_ref import stream_reply
from kimi_vl_ref.chat import reply_roles
from kimi_vl_ref.thought import CLOSE_THOUGHT
from workbench.analyses.asked import constant_accuracy, plain, shares_with_interval
from workbench.analyses.budget import thought_budget
from workbench.analyses.cues import segments, thought_positions
from workbench.runs import Run
from workbench.study.families import make
from workbench.thoughts import (
    ThoughtEdit,
    continue_from,
    cut_thought,
    edit_thought,
    insert_thought,
    messages_of,
    sentences,
)
from workbench.viewer import payload, steps

from .act import Act, Asked, in_force, same_weights, sampling

HOW = ("change", "insert", "drop", "stop")
LONGEST_TEXT = 2000  # characters of a new step
FRAME = 0.05  # seconds between two updates of a text that is being written
SCENES, CHUNK = 20, 5  # held-out scenes, and how many are answered between two looks at Stop
BUDGETS = (0, 4, 8, 16, 32)

# ---- a step edited


@dataclass(frozen=True)
class Begun:
    """How a branch's thought begins, and what is to be marked in it."""

    edit: ThoughtEdit
    put: str = ""  # new text, at the end of the edit's
    dropped: str = ""  # text that was left out, before character `at` of the edit's
    at: int = 0


def edit(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: step (counted from 0; for "insert" also one past the last), how (one of HOW) and text (change, insert).

    The model goes on twice: after the edit, then from the same place unedited, which is the control. Yields {"branch",
    "control"}, each {"pieces", "answer", "finished", "same", "right"}, growing; at the end with the branch's "payload", the
    edit as a "line" and "without": changes that were in force in the run, but are not in its branches. A control that was
    not begun is None.

    change   the step is replaced; the model thinks on from there. Control: the step as it was.
    insert   a step is put before it; the model thinks on from there. Control: nothing put there.
    drop     the step is left out, the others stay, and the model answers. Control: all steps stay.
    stop     the thought ends after the step, and the model answers. Control: it thinks on.
    """
    run, (begun, control) = asked.run, _edits(asked)
    same_weights(asked.session.model, run)
    known: dict[str, Any] = {"line": str(begun.edit), "without": in_force(run), "branch": None, "control": None}
    new: Run | None = None
    for new, known["branch"] in _written(asked, begun):  # noqa: B007, the last one is the Run
        yield dict(known)
    assert new is not None
    if not asked.should_stop():
        for _, known["control"] in _written(asked, control):
            yield dict(known)
    yield known | {"payload": payload(new, id=asked.keep(new), truth=asked.truth(new.answer))}


def _edits(asked: Asked) -> tuple[Begun, Begun]:
    """The edit and its control. Raises ValueError for a step, a way or a text that will not do."""
    run, how = asked.run, asked.one_of("how", HOW)
    found = segments(run)
    if not found:
        raise ValueError("this run has no thought to edit; ask what the model thinks about, such as how many there are")
    step = asked.whole("step", 0, len(found) - (how != "insert"))
    here, after = sentence_of(run, step), sentence_of(run, step + 1)
    if how == "stop":
        return Begun(cut_thought(run, after, close=True)), Begun(cut_thought(run, after))
    if how == "drop":
        return _left_out(run, here, after), Begun(cut_thought(run, len(sentences(run.thought)), close=True))
    text = _text(asked)
    if how == "change":
        return Begun(edit_thought(run, here, text), put=text), Begun(cut_thought(run, after))
    return Begun(insert_thought(run, here, text), put=text), Begun(cut_thought(run, here))


def _text(asked: Asked) -> str:
    text = asked.args.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the new step is empty; write what the model should have thought")
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"the new step has {len(text)} characters; write at most {LONGEST_TEXT}")
    if CLOSE_THOUGHT in text:
        raise ValueError(f"the new step holds {CLOSE_THOUGHT}, which ends a thought; choose to stop after a step instead")
    return text.strip()


def _left_out(run: Run, first: int, after: int) -> Begun:
    """The thought without its sentences first to after - 1, closed."""
    spans, thought = sentences(run.thought), run.thought
    start, stop = spans[first][0], spans[after][0] if after < len(spans) else len(thought)
    kept = thought[:start] if after < len(spans) else thought[:start].rstrip().rstrip(",;")
    dropped = thought[start:stop]
    line = f"leave {dropped.strip()!r} out of the thought, keep the rest"
    edit = ThoughtEdit(kept + thought[stop:], True, line, {"edit": "leave out", "sentence": first, "was": dropped})
    return Begun(edit, dropped=dropped, at=len(kept))


def sentence_of(run: Run, step: int) -> int:
    """Which sentence of `thoughts.sentences` begins a step of `cues.segments`: a step of prose may hold several clauses."""
    found = segments(run)
    if step >= len(found):
        return len(sentences(run.thought))
    before = "".join(run.texts[t] for t in thought_positions(run) if t < found[step].start)
    return len(sentences(before))


def _written(asked: Asked, begun: Begun) -> Iterator[tuple[Run | None, dict[str, Any]]]:
    """(None or, at last, the Run, what is shown of it) while the model goes on, sampling as the asked run did."""
    session, run, shown = asked.session, asked.run, 0.0
    options = {"should_stop": asked.should_stop, **sampling(run)}
    for item in continue_from(session.model, session.chat, run, begun.edit, **options):
        done = item if isinstance(item, Run) else None
        if done is None and time.monotonic() - shown < FRAME:
            continue
        shown = time.monotonic()
        told: dict[str, Any] = {"pieces": pieces(item.thought.lstrip(), begun), "answer": item.answer, "finished": True}
        if done is not None:
            same = plain(done.answer) == plain(run.answer)
            told |= {"finished": done.finished, "same": same, "right": _right(asked, done.answer)}
        yield done, told


def pieces(thought: str, begun: Begun) -> list[list[str]]:
    """[text, kind of its sentence, "kept", "changed", "dropped" or "new"], in order: how a thought came to be."""
    forced = len(begun.edit.text)
    changed = forced - len(begun.put)
    lost = [begun.dropped, "other", "dropped"]
    found: list[list[str]] = []
    start = 0
    for text, kind in steps(thought):
        inner = sorted({cut - start for cut in (changed, forced, begun.at) if 0 < cut - start < len(text)})
        bounds = [0, *inner, len(text)]
        for a, b in zip(bounds, bounds[1:], strict=False):
            if begun.dropped and start + a == begun.at:
                found.append(lost)
            how = "kept" if start + a < changed else "changed" if start + a < forced else "new"
            found.append([text[a:b], kind, how])
        start += len(text)
    return [*found, lost] if begun.dropped and lost not in found else found


def _right(asked: Asked, answer: str) -> bool | None:
    """Whether an answer to the run's question is right; None where nobody knows."""
    known = asked.truth(answer)
    return None if known is None else known["right"]


# ---- the answer under a budget


def budgets(asked: Asked) -> Iterator[dict[str, Any]]:
    """The same question again, with the thought closed after 0, 4, 8, 16, ... tokens, as far as it is longer.

    Yields {"rows", "note"}, rows {"budget" (None: no limit), "tokens", "thought", "answer", "same", "right"} in the order of
    budgets; "same" as with no limit, which is asked first. Stopped, the rows so far are the last ones yielded.
    """
    same_weights(asked.session.model, asked.run)
    rows: list[dict[str, Any]] = []
    for budget in _doubling():
        if rows and budget is not None and budget >= rows[-1]["tokens"]:
            break
        yield {"rows": rows, "note": f"asking with {'no limit' if budget is None else f'at most {budget} tokens'}"}
        row = _under(asked, budget)
        if row is None:
            break
        row["same"] = not rows or plain(row["answer"]) == plain(rows[-1]["answer"])
        rows = [*rows[:-1], row, rows[-1]] if rows else [row]
    yield {"rows": rows}


def _doubling() -> Iterator[int | None]:
    yield from (None, 0)
    budget = 4
    while True:
        yield budget
        budget *= 2


def _under(asked: Asked, budget: int | None) -> dict[str, Any] | None:
    """One row of `budgets`; None if it was stopped."""
    session, run = asked.session, asked.run
    options: dict[str, Any] = sampling(run) | {"thought_budget": budget}
    item = None
    for item in stream_reply(session.model, session.chat, messages_of(run), **options):  # noqa: B007
        if asked.should_stop():
            return None
    assert item is not None
    tokens = reply_roles(session.chat.tokenizer, item.token_ids).count("thought")
    known = {"thought": item.thought, "answer": item.answer, "right": _right(asked, item.answer)}
    return {"budget": budget, "tokens": tokens, **known}


def held_out(asked: Asked) -> Iterator[dict[str, Any]]:
    """The curve of `thought_budget` on SCENES held-out scenes of the family of the asked run's scene, greedy.

    Yields, a CHUNK of scenes at a time, {"family", "n", "of", "budgets", "accuracy", "low", "high", "within" (share of
    thoughts that fit the budget), "chance"}. Raises ValueError for a run that is not about a drawn scene.
    """
    drawn = asked.truth(asked.run.answer)
    if drawn is None:
        raise ValueError("held-out scenes are of a drawn scene's family; draw a scene and ask its own question")
    session, family = asked.session, drawn["family"]
    hits, within = np.zeros(len(BUDGETS) + 1), np.zeros(len(BUDGETS))
    questions = []
    for start in range(0, SCENES, CHUNK):
        if asked.should_stop():
            break
        pairs = [make(family, seed) for seed in range(start, start + CHUNK)]
        result = thought_budget(session.model, session.chat, pairs, BUDGETS, model_name=session.model_name)
        questions += [question for _, question in pairs]
        hits += CHUNK * result["accuracy"][0]
        within += CHUNK * result["within"][0]
        n = len(questions)
        accuracy, low, high = shares_with_interval(hits.round().astype(int), np.full(len(hits), n))
        found = {"accuracy": accuracy, "low": low, "high": high, "within": within / n}
        yield {
            "family": family,
            "n": n,
            "of": SCENES,
            "budgets": list(BUDGETS),
            "chance": round(float(constant_accuracy(questions)), 4),
            **{name: values.round(4).tolist() for name, values in found.items()},
        }


ACTS: dict[str, Act] = {"think_edit": edit, "think_budgets": budgets, "think_held_out": held_out}
