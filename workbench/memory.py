"""Memory that ran out, however it is said: Python, torch on a CPU and torch on a GPU each have their own way."""

from __future__ import annotations

SAID = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def ran_out(error: BaseException) -> bool:
    """Whether an error, or the one it came from, says that memory ran out. Imports no torch."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    told = isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in SAID)
    return known or told or (error.__cause__ is not None and ran_out(error.__cause__))
