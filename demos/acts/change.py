"""The change panel: the question asked again under a visitor's list of changes, beside a random control of the same size."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from workbench.analyses.asked import plain
from workbench.runs import Run
from workbench.viewer import payload

from .act import Act, Asked
from .change_again import Base, Replay, moved, on_picture
from .change_kinds import Kind, Region, control
from .change_places import NoControl
from .change_read import changes_of

LARGEST_SEED = 2**31 - 1
MOST_CONTROLS = 20
WORDS = {"slots": "choices", "queries": "rows of attention", "visual_tokens": "picture tokens"}  # counts of `Applied.report`
STOPPED = {"stopped": "Stopped before all was answered."}


def change(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: changes (see `change_read`), seed of the control. Yields {"note"} while it works, and at last

    columns   before, changed, control: {"name", "id", "answer" and "thought" as [[word, differs], ...], "lines",
              "touched", "reply" and "answer_logprob" (log-probability of the original reply and of its answer now, nats),
              "moved" (share of expert choices that are others), "picture" (share of attention), "payload"}
    verdict   one sentence; no_control: why there is none, or "".
    """
    base, kinds = Base(asked.session.model, asked.session.chat, asked.run), changes_of(asked)
    seed = asked.whole("seed", 0, LARGEST_SEED)
    yield {"note": "Reading the reply once more…"}
    columns = [_before(base)]
    run = yield from base.answered(kinds, asked.should_stop, "Answering under the change:")
    if asked.should_stop():
        yield STOPPED
        return
    columns.append(_column(asked, base, "changed", run, kinds, base.replayed(kinds)))
    marked = differing(asked.run, run)
    columns[0] |= {"answer": marked["answer"][0], "thought": marked["thought"][0]}
    told = yield from _control(asked, base, kinds, seed)
    if asked.should_stop():
        yield STOPPED
        return
    columns += told["columns"]
    other = told["columns"][0]["said"] if told["columns"] else None
    yield told | {"columns": columns, "verdict": verdict(asked.run.answer, run.answer, other)}


def another_control(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: changes, seed, and answer: what the changed run said. Yields as `change` does, with the control's column only."""
    base, kinds = Base(asked.session.model, asked.session.chat, asked.run), changes_of(asked)
    answer = str(asked.args.get("answer", ""))
    told = yield from _control(asked, base, kinds, asked.whole("seed", 0, LARGEST_SEED))
    if asked.should_stop():
        yield STOPPED
        return
    other = told["columns"][0]["said"] if told["columns"] else None
    yield told | {"verdict": verdict(asked.run.answer, answer, other)}


def more_controls(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: changes, seed (of the first), count. Yields {"note", "rows": [{"seed", "answer", "changed", "reply",
    "lines"}, ...], "sentence"}, growing; what was done before Stop stays. None of these runs is kept.
    """
    base, kinds = Base(asked.session.model, asked.session.chat, asked.run), changes_of(asked)
    first, count = asked.whole("seed", 0, LARGEST_SEED - MOST_CONTROLS), asked.whole("count", 1, MOST_CONTROLS, 5)
    rows: list[dict[str, Any]] = []
    told: dict[str, Any] = {"rows": rows, "sentence": ""}
    for number in range(count):
        note = f"Control {number + 1} of {count}:"
        try:
            twins = control(kinds, asked.run, first + number)
            for step in (answering := _Answering(base.answered(twins, asked.should_stop, note))):
                yield told | step
            replay = base.replayed(twins)
        except NoControl as error:
            yield {"no_control": f"There is no control: {error}."}
            return
        if asked.should_stop():
            yield told | STOPPED
            return
        run = answering.run
        differs = plain(run.answer) != plain(asked.run.answer)
        row = {"seed": first + number, "answer": run.answer, "changed": differs, "reply": replay.reply}
        rows.append(row | {"lines": [one.line() for one in twins]})
        told["sentence"] = f"The answer changed in {sum(one['changed'] for one in rows)} of {len(rows)} random controls."
        yield told | {"note": f"{number + 1} of {count} done."}
    yield told


class _Answering:
    """A generator whose returned run stays at hand."""

    def __init__(self, generator: Any):
        self.generator = generator

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.run: Run = yield from self.generator


def _control(asked: Asked, base: Base, kinds: Sequence[Kind], seed: int) -> Any:
    """Yields notes, returns {"columns": [the control's] or [], "no_control": why not}."""
    try:
        twins = control(kinds, asked.run, seed)
        run = yield from base.answered(twins, asked.should_stop, "Answering under the random control:")
        if asked.should_stop():
            return {}
        return {"columns": [_column(asked, base, "control", run, twins, base.replayed(twins), seed=seed)], "no_control": ""}
    except NoControl as error:
        return {"columns": [], "no_control": f"There is no control: {error}."}


def _before(base: Base) -> dict[str, Any]:
    run = base.run
    numbers = _numbers(base, run, base.before)
    return {"name": "before", "lines": ["nothing changed"], "touched": [""], "said": run.answer, **numbers}


def _column(
    asked: Asked, base: Base, name: str, run: Run, kinds: Sequence[Kind], replay: Replay, **more: Any
) -> dict[str, Any]:
    marked = differing(asked.run, run)
    blank = any(isinstance(one, Region) for one in kinds)  # the scene's truth is no longer that of the picture
    id = asked.keep(run)
    return {
        "name": name,
        "id": id,
        "said": run.answer,
        "answer": marked["answer"][1],
        "thought": marked["thought"][1],
        "lines": [one.line() for one in kinds],
        "touched": touched(run, kinds),
        "payload": payload(run, id=id, truth=None if blank else asked.truth(run.answer)),
        **_numbers(base, run, replay),
        **more,
    }


def _numbers(base: Base, run: Run, replay: Replay) -> dict[str, Any]:
    return {
        "reply": replay.reply,
        "answer_logprob": replay.answer,
        "moved": moved(base.before.chosen, replay.chosen),
        "picture": on_picture(run),
    }


def touched(run: Run, kinds: Sequence[Kind]) -> list[str]:
    """What each change touched while the reply was written, in words, beside `kind.line()`."""
    reports, found = list(run.settings.get("changes", ())), []
    for one in kinds:
        if isinstance(one, Region):
            x0, y0, x1, y1 = one.box
            found.append(f"{(x1 - x0) * (y1 - y0):,} pixels")
            continue
        mine = [reports.pop(0) for name in one.makes() if reports and reports[0]["settings"]["name"] == name]
        touched = mine[0]["touched"] if mine else {}
        counts = [f"{count:,} {WORDS.get(name, name)}" for name, count in touched.items() if count]
        found.append(", ".join(counts) or "nothing: it did not come up in this reply")
    return found


def differing(before: Run, after: Run) -> dict[str, tuple[list[list[Any]], list[list[Any]]]]:
    """Thought and answer of both runs word by word, [[word with the blank before it, whether it differs], ...]."""
    return {part: marked(getattr(before, part), getattr(after, part)) for part in ("thought", "answer")}


def marked(before: str, after: str) -> tuple[list[list[Any]], list[list[Any]]]:
    """Two texts word by word with what is in one only marked.

    marked("2 red", "3 red")     # [["2", True], [" red", False]], [["3", True], [" red", False]]
    """
    words = [re.findall(r"\s*\S+", text) for text in (before, after)]
    bare = [[word.strip() for word in one] for one in words]
    same: list[set[int]] = [set(), set()]
    for a, b, length in difflib.SequenceMatcher(None, *bare, autojunk=False).get_matching_blocks():
        same[0].update(range(a, a + length))
        same[1].update(range(b, b + length))
    first, second = ([[word, at not in kept] for at, word in enumerate(one)] for one, kept in zip(words, same, strict=True))
    return first, second


def verdict(before: str, changed: str, other: str | None) -> str:
    """One sentence of what happened to the answer, and no more than that.

    verdict("3", "2", "3")     # "The answer changed from “3” to “2”; the random control left it at “3”."
    """
    was, now = plain(before), plain(changed)
    text = f"The answer {'stayed' if was == now else 'changed from'} {_said(before)}"
    text += "" if was == now else f" to {_said(changed)}"
    if other is None:
        return f"{text}; there is no random control to compare with."
    if plain(other) == was:
        return f"{text}; the random control left it {'there too' if was == now else f'at {_said(before)}'}."
    return f"{text}; the random control changed it to {'the same' if plain(other) == now else _said(other)}."


def _said(answer: str) -> str:
    text = " ".join(answer.split())
    return f"“{text if len(text) <= 40 else text[:38] + '…'}”" if text else "nothing"


ACTS: dict[str, Act] = {"change": change, "another control": another_control, "more controls": more_controls}
