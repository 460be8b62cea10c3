"""Safetensors headers, read and doubted without opening the data behind them.

Layout: 8 bytes, the little-endian length of a JSON object; the object, name -> dtype, shape, data_offsets; then the data.
Everything a header claims is compared with the size of the file. Nothing large is read or kept, so that a checkpoint of 33 GB
is judged in about a second.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


class HeaderError(ValueError):
    """A shard whose header cannot be true."""


@dataclass(frozen=True)
class Stored:
    """One tensor as a header tells of it."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    start: int  # bytes behind the header
    nbytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> what is stored, of one shard. Raises HeaderError with the reason, without the file's name."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            raise HeaderError(
                f"starts with a header of {length:,} bytes in a file of {size:,}, so it is no safetensors file; fetch it again"
            )
        if 8 + length > size:
            raise HeaderError(f"is cut off inside its header, at byte {size:,} of {8 + length:,}; fetch it again")
        text = file.read(length)
    try:
        data = json.loads(text, object_pairs_hook=_no_twins)
    except HeaderError:
        raise
    except RecursionError:
        raise HeaderError("has a header that nests too deeply; fetch it again") from None
    except ValueError as error:
        raise HeaderError(f"has a header that is no JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise HeaderError("has a header that is no JSON object; fetch it again")
    stored = {name: _stored(name, entry) for name, entry in data.items() if name != "__metadata__"}
    _one_after_another(stored, size - 8 - length)
    return stored


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise HeaderError(f"names {twice[:100]!r} twice in its header; fetch it again")
    return found


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _stored(name: str, entry: Any) -> Stored:
    if not isinstance(entry, dict):
        raise HeaderError(f"has no description of {name[:100]!r} in its header; fetch it again")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in ITEM_BYTES:
        raise HeaderError(f"stores {name} as {str(dtype)[:40]!r}, a type that is not known; fetch it again")
    if not (isinstance(shape, list) and all(map(_count, shape))):
        raise HeaderError(f"gives {name} a shape that is none, {str(shape)[:60]}; fetch it again")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_count, offsets)) and offsets[0] <= offsets[1]):
        raise HeaderError(f"gives {name} data offsets that are none, {str(offsets)[:60]}; fetch it again")
    needed, given = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        raise HeaderError(
            f"lies about {name}: {dtype} of shape {shape} takes {needed:,} bytes, the header gives it {given:,}; fetch it again"
        )
    return Stored(dtype, tuple(shape), offsets[0], given)


def _one_after_another(stored: dict[str, Stored], room: int) -> None:
    """The format allows no gap and no overlap, and the data end where the file ends."""
    end = 0
    for name, one in sorted(stored.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if one.start != end:
            what = "overlaps the one before it" if one.start < end else f"leaves a gap of {one.start - end:,} bytes before it"
            raise HeaderError(f"lies about where {name} is: it {what}; fetch it again")
        end += one.nbytes
    if end != room:
        what = "is cut off: it" if room < end else "is longer than its header says: it"
        raise HeaderError(f"{what} holds {room:,} bytes of data and its header describes {end:,}; fetch it again")
