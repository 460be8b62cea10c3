"""A value in a sentence: what stood in a file, short enough to read."""

from __future__ import annotations

from typing import Any

LONGEST = 80  # characters


def shown(value: Any, most: int = LONGEST) -> str:
    """The value as Python writes it, in one line, its end left out where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a whole number of thousands of digits
        text = f"a {type(value).__name__} too large to show"
    return short(text, most)


def cause(error: BaseException) -> str:
    """Why something failed, short: what the system says of it where it does, else the error's own words."""
    return short(getattr(error, "strerror", None) or error)


def short(text: object, most: int = LONGEST) -> str:
    """A text in one line, its end left out where it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
