"""Editing a thought: cut it, replace a sentence, insert one, and let the model go on from there.

    run = Run.load("one.run")
    *_, other = continue_from(model, chat, run, edit_thought(run, 1, "a red circle on the right"))
    other.answer, other.edits, other.settings["begin"]

What stands before the edit keeps the tokens that the model wrote; only the new text is encoded. The forced part is in the
new Run with role "thought", and with nan as log-probability, since the model did not choose it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_vl_ref import Chat, KimiVL, Reply
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT

from .runs import Begin, Run, RunError, record

# A sentence ends with . ! or ? before a blank, with a line, or with the comma or semicolon that parts a list of findings.
_ENDS = re.compile(r"(?<=[.!?])\s+|\s*\n\s*|(?<=[,;])\s+")


def sentences(thought: str) -> list[tuple[int, int]]:
    """Where the sentences of a thought start and end, as characters; blanks between them and a closing comma or
    semicolon belong to none.

        sentences("one on the left, one on top; so 2. Yes.")     # 4: "one on the left" (0, 15), ..., "so 2.", "Yes."
    """
    found, start = [], 0
    for gap in [*_ENDS.finditer(thought), None]:
        end = len(thought) if gap is None else gap.start()
        words = thought[start:end]
        bare = words.strip().rstrip(",;").rstrip()
        if bare:
            first = start + len(words) - len(words.lstrip())
            found.append((first, first + len(bare)))
        start = end if gap is None else gap.end()
    return found


@dataclass(frozen=True)
class ThoughtEdit:
    """How a thought begins after an edit. `str(edit)` is a line for people, `settings` what JSON keeps."""

    text: str  # the thought so far, without markers
    closed: bool  # whether the thought ends here, so that the answer comes next
    line: str = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.line


def cut_thought(run: Run, upto: int, *, close: bool = False) -> ThoughtEdit:
    """The first `upto` sentences of the run's thought; close: the answer comes right after (truncation, arXiv 2307.13702).

    upto=0 leaves an empty thought. Raises RunError for a run without a thought or with fewer sentences.

        *_, other = continue_from(model, chat, run, cut_thought(run, 2, close=True))
    """
    spans = _spans(run, upto, "cut after", last=len(sentences(run.thought)))
    end = spans[upto - 1][1] if upto else 0
    line = f"cut the thought after {upto} of {len(spans)} sentences{', and close it' if close else ''}"
    return ThoughtEdit(run.thought[:end], close, line, {"edit": "cut", "sentences": upto, "of": len(spans), "closed": close})


def edit_thought(run: Run, sentence: int, replacement: str, *, rest: bool = False) -> ThoughtEdit:
    """The thought with one sentence, counted from 0, replaced; what follows it is written anew, or with rest=True kept
    and the thought closed. Raises RunError for a run without a thought, or a sentence that it does not have.

        *_, other = continue_from(model, chat, run, edit_thought(run, 0, "blue star centre", rest=True))
    """
    start, end = _spans(run, sentence, "replace")[sentence]
    after = run.thought[end:] if rest else ""
    settings = {"edit": "replace", "sentence": sentence, "was": run.thought[start:end], "now": replacement, "rest": rest}
    line = f"replace sentence {sentence} of the thought by {replacement!r}{', keep the rest' if rest else ''}"
    return ThoughtEdit(run.thought[:start] + replacement + after, rest, line, settings)


def insert_thought(run: Run, before: int, text: str, *, rest: bool = False) -> ThoughtEdit:
    """The thought with a sentence put before one of its own (before = their number: at the end); `rest` as for
    `edit_thought`. The text brings its own full stop or comma. Raises RunError as there.

        *_, other = continue_from(model, chat, run, insert_thought(run, 1, "blue star centre,"))
    """
    spans = _spans(run, before, "insert before", last=len(sentences(run.thought)))
    at = spans[before][0] if before < len(spans) else len(run.thought)
    lead = " " if run.thought[:at] and not run.thought[:at][-1].isspace() else ""
    after = (" " if text and not text[-1].isspace() else "") + run.thought[at:] if rest and run.thought[at:] else ""
    settings = {"edit": "insert", "before": before, "text": text, "rest": rest}
    line = f"insert {text!r} before sentence {before} of the thought{', keep the rest' if rest else ''}"
    return ThoughtEdit(run.thought[:at] + lead + text + after, rest, line, settings)


def continue_from(
    model: KimiVL,
    chat: Chat,
    source: Run | list[dict[str, Any]],
    thought: ThoughtEdit | str,
    *,
    model_name: str | None = None,
    close: bool = False,
    **options: Any,
) -> Iterator[Reply | Run]:
    """Answers again with the thought begun as given; yields the growing Reply and, last, the Run, as `record` does.

    source   a run, asked again with its own pictures, or messages.
    thought  an edit of this module, or the text of a thought, without markers; close: the thought ends there.
    options  as for `record`: temperature, seed, thought_budget (the forced part counts), changes, ...; the run's own
             sampling settings are not taken over. max_new_tokens counts what comes after the forced part.

    Greedy and unedited, the continuation is the run's own. Raises RunError for messages without a model_name.

        *_, other = continue_from(model, chat, run, " red circle top left, so", max_new_tokens=40)
    """
    edit = thought if isinstance(thought, ThoughtEdit) else ThoughtEdit(thought, close, "", {"edit": "text"})
    messages = messages_of(source) if isinstance(source, Run) else source
    if model_name is None:
        if not isinstance(source, Run):
            raise RunError("the weights have no name; give model_name, which every figure will show")
        model_name = source.model_name
    ids = forced_ids(chat, source if isinstance(source, Run) else None, edit)
    line = f"begin the reply with {len(ids)} tokens{f': {edit}' if edit.line else ' of a given thought'}"
    begin = Begin(ids, line, {"thought": edit.text, "closed": edit.closed, **edit.settings})
    return record(model, chat, messages, model_name=model_name, begin=begin, **options)


def forced_ids(chat: Chat, run: Run | None, edit: ThoughtEdit) -> list[int]:
    """Tokens of the opening marker, the thought so far and, if it is closed, the closing marker: the run's own tokens as
    far as they say the same, then the rest encoded.
    """
    own: list[int] = [] if run is None else [int(id) for id in run.token_ids[run.prompt_length :]]
    said, lead = chat.tokenizer.decode(own), OPEN_THOUGHT
    if run is not None and run.thought and said.lstrip().startswith(OPEN_THOUGHT):
        lead = said[: said.index(run.thought, said.index(OPEN_THOUGHT) + len(OPEN_THOUGHT))]
    text = lead + edit.text + (CLOSE_THOUGHT if edit.closed else "")
    kept = next((n for n in range(len(own), 0, -1) if text.startswith(chat.tokenizer.decode(own[:n]))), 0)
    return own[:kept] + chat.tokenizer.encode(text[len(chat.tokenizer.decode(own[:kept])) :])


def messages_of(run: Run) -> list[dict[str, Any]]:
    """The conversation of a run as `record` takes it, pictures in their places."""
    asked: list[dict[str, Any]] = []
    for message in run.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{**p, "image": run.pictures[p["image"]].image} if p["type"] == "image" else p for p in content]
        asked.append({**message, "content": content})
    return asked


def _spans(run: Run, number: int, what: str, last: int | None = None) -> Sequence[tuple[int, int]]:
    if not run.thought:
        raise RunError("this run has no thought to edit; record one whose answer was thought about")
    spans = sentences(run.thought)
    most = len(spans) - 1 if last is None else last
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
        raise RunError(f"sentence {number!r} cannot be used to {what}; this thought has {len(spans)}, so give 0 to {most}")
    return spans
