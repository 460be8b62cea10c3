"""The thought apart from the answer, also while the text is still being written.

A long-thinking checkpoint opens its reply with ◁think▷, closes the thought with ◁/think▷ and goes on with the answer.
Both markers are plain text: which tokens they are made of depends on what follows, so the split is on text, never on
token ids.
"""

from __future__ import annotations

OPEN_THOUGHT = "◁think▷"
CLOSE_THOUGHT = "◁/think▷"


class ThoughtSplitter:
    """Splits a reply into thought and answer while it is being written, wherever the pieces are cut.

    An opening marker counts at the very start (blanks may come before it), and the first closing marker ends the
    thought; all that follows is answer, markers included. A thought that is never closed leaves the answer empty.
    Without an opening marker text is answer, until a closing marker shows that all of it was thought: `thought` and
    `answer` hold the split of everything said so far and take that into account, whereas pieces already handed out
    cannot be taken back.
    """

    def __init__(self) -> None:
        self.thought = ""
        self.answer = ""
        self._held = ""  # may yet turn out to be a marker, or the blanks before one
        self._state = "start"  # -> "thought" or "open" (an answer, unless a closing marker comes) -> "answer"

    def feed(self, text: str) -> list[tuple[str, str]]:
        """More of the reply -> the ("thought" or "answer", text) that is certain by now; texts are never empty."""
        text, self._held = self._held + text, ""
        pieces: list[tuple[str, str]] = []
        if self._state == "start":
            body = text.lstrip()
            if len(body) < len(OPEN_THOUGHT) and OPEN_THOUGHT.startswith(body):
                self._held = text
                return pieces
            opened = body.startswith(OPEN_THOUGHT)
            self._state, text = ("thought", body[len(OPEN_THOUGHT) :]) if opened else ("open", text)
        if self._state in ("thought", "open"):
            before, closing, after = text.partition(CLOSE_THOUGHT)
            if not closing:
                keep = len(before) - _tail_that_begins(before, CLOSE_THOUGHT)
                before, self._held = before[:keep], before[keep:]
            self._say("thought" if self._state == "thought" else "answer", before, pieces)
            if not closing:
                return pieces
            if self._state == "open":
                self.thought, self.answer = self.answer, ""
            self._state, text = "answer", after
        self._say("answer", text, pieces)
        return pieces

    def finish(self) -> list[tuple[str, str]]:
        """What was held back, now that nothing follows: part of a marker is text like any other."""
        pieces: list[tuple[str, str]] = []
        self._say("thought" if self._state == "thought" else "answer", self._held, pieces)
        self._held = ""
        return pieces

    def _say(self, kind: str, text: str, pieces: list[tuple[str, str]]) -> None:
        if not text:
            return
        pieces.append((kind, text))
        if kind == "thought":
            self.thought += text
        else:
            self.answer += text


def split_thought(text: str) -> tuple[str, str]:
    """A whole reply -> (thought, answer), both stripped, always a pair; the rules are those of `ThoughtSplitter`."""
    splitter = ThoughtSplitter()
    splitter.feed(text)
    splitter.finish()
    return splitter.thought.strip(), splitter.answer.strip()


def _tail_that_begins(text: str, marker: str) -> int:
    """How many characters at the end of `text` are the beginning of `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)
