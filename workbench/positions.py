"""Which tokens `tokens=` means, and which of them one forward call holds.

A position counts from the start of its row over the whole sequence: prefill, its chunks and every decode step alike. Padding
has no position. Letters: B rows, T columns of one call, N tokens picked from it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from kimi_vl_ref.cache import LatentCache

from .sites import SiteError

FAR = 1 << 62  # where a slice without an end stops
Choice = slice | Sequence[int]
Tokens = Choice | Sequence[Choice]


class Positions:
    """The positions asked for: one choice for all rows, or a list with a choice for each row.

    A choice is a slice or a list of positions; it counts from the start, since nobody knows where a run will end. Raises
    SiteError for a negative position, or for no position at all.
    """

    def __init__(self, tokens: Tokens):
        self.asked = tokens
        single = isinstance(tokens, slice) or all(hasattr(one, "__index__") for one in tokens)
        choices: Sequence[Choice] = [tokens] if single else tokens  # type: ignore[list-item, assignment]
        self.rows = [_counted(choice) for choice in choices]
        self.shared = single
        if not any(self.rows):
            raise SiteError(f"tokens={tokens!r} names no position; leave tokens= out to read every token")

    def columns(self, row: int, start: int, count: int) -> list[int]:
        """Columns of a call that holds positions start to start + count - 1 of a row, as far as they were asked for."""
        choice = self.rows[0 if self.shared else row]
        if isinstance(choice, list):
            return [at - start for at in choice[bisect_left(choice, start) : bisect_left(choice, start + count)]]
        steps = max(0, -(-(start - choice.start) // choice.step))
        first = choice.start + steps * choice.step
        return [at - start for at in range(first, min(choice.stop, start + count), choice.step)]

    def count(self, length: int, batch: int) -> int:
        """How many tokens of `batch` rows, each `length` long, were asked for."""
        return sum(len(self.columns(row, 0, length)) for row in range(batch))

    def check(self, batch: int) -> None:
        """Raises SiteError unless there is a choice for each row."""
        if not self.shared and len(self.rows) != batch:
            raise SiteError(f"tokens= has a choice for each of {len(self.rows)} rows, this call has {batch}; give one a row")


def _counted(choice: Choice) -> range | list[int]:
    """A slice as a range, a list in ascending order and without repetitions."""
    if isinstance(choice, slice):
        start, stop, step = (None if part is None else index(part) for part in (choice.start, choice.stop, choice.step))
        ends = (start or 0, FAR if stop is None else stop, 1 if step is None else step)
        least, chosen = min(*ends[:2], ends[2] - 1), range(*ends) if ends[2] else range(0)
    else:
        chosen = sorted({index(position) for position in choice})
        least = min(chosen, default=0)
    if least < 0:
        raise SiteError(
            f"tokens={choice!r} counts from the end, which is not known before a run is over; "
            "count positions from the start of the sequence, or use rows= for the rows of each call"
        )
    return chosen


class Placed:
    """Where the tokens of one decoder call stand, and which of them were asked for."""

    def __init__(self, asked: Positions, starts: list[int], real: list[int], width: int, device: torch.device):
        asked.check(len(starts))
        self.width, self.batch = width, len(starts)
        picked = [
            (row, column, start + column)
            for row, (start, count) in enumerate(zip(starts, real, strict=True))
            for column in asked.columns(row, start, count)
        ]
        self.index = torch.tensor(picked, dtype=torch.long).reshape(-1, 3)[:, [0, 2]]  # (N, 2) row, position
        self.at = tuple(torch.tensor([one[part] for one in picked], device=device, dtype=torch.long) for part in (0, 1))
        # the last real token of each row: where scores of shape (B, vocabulary) belong
        ends = [(row, start + count - 1) for row, (start, count) in enumerate(zip(starts, real, strict=True))]
        ends = [(row, end) for row, end in ends if end >= 0 and asked.columns(row, end, 1)]
        self.ends = torch.tensor(ends, dtype=torch.long).reshape(-1, 2)

    def pick(self, value: Tensor, site: str) -> tuple[Tensor, Tensor]:
        """The tokens asked for of a (B, T, ...) value, as (N, ...), and their (N, 2) rows and positions.

        Scores of shape (B, vocabulary) are those after the last token of each row.
        """
        if site == "logits" and value.ndim == 2 and len(value) == self.batch:
            return value[self.ends[:, 0].to(value.device)], self.ends
        if value.shape[:2] != (self.batch, self.width):
            raise SiteError(
                f"{site} was {tuple(value.shape)} in a call of {self.batch} rows and {self.width} tokens, so that positions "
                "are not known; use rows= or keep= there"
            )
        if not len(self.index):  # most steps of a long run
            return value[:0, 0], self.index
        rows, columns = self.at
        return value[rows, columns], self.index


def in_decoder(x: Tensor, lengths: Tensor | None = None, cache: LatentCache | None = None) -> tuple[list[int], list[int], int]:
    """What `decoder` was given -> the first position of each row, how many columns of it are real, and T."""
    batch, width = x.shape[:2]
    starts = [0] * batch if cache is None else cache.lengths.tolist()
    return starts, [width] * batch if lengths is None else lengths.tolist(), width
