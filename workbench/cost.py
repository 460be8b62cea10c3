"""What reading will keep, in bytes, before anything has run.

    print(cost(model, ["decoder.layers.*"], prompt=1_100, new=500, tokens=slice(1_090, None)))

Letters: B rows, T tokens of the whole sequence, P patches and M visual tokens of all pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kimi_vl_ref.model import KimiVL

from .positions import Positions, Tokens
from .sites import Site, SiteError, match, sites, sizes


@dataclass(frozen=True)
class RunSize:
    """How much will run: tokens of the prompt (of each row), tokens written after it, patches of all pictures, rows."""

    prompt: int
    new: int = 0
    patches: int = 0
    batch: int = 1


@dataclass(frozen=True)
class Cost:
    """Bytes that reading keeps at most. `unknown` are sites whose values a `keep` or `@in` makes: counted as they run."""

    sites: Mapping[str, int]
    unknown: Sequence[str] = ()

    @property
    def total(self) -> int:
        return sum(self.sites.values())

    def __str__(self) -> str:
        largest = sorted(self.sites, key=lambda name: -self.sites[name])[:3]
        named = ", ".join(f"{name} {human(self.sites[name])}" for name in largest)
        more = " ..." if len(self.sites) > 3 else ""
        counted = f", and {len(self.unknown)} that are counted as they run" if self.unknown else ""
        return f"{len(self.sites)} sites keep at most {human(self.total)} ({named}{more}){counted}"


def cost(
    model: nn.Module,
    read: Iterable[str] | Mapping[str, Any],
    *,
    prompt: int,
    new: int = 0,
    patches: int = 0,
    batch: int = 1,
    tokens: Tokens | None = None,
    rows: slice | Sequence[int] | None = None,
) -> Cost:
    """Bytes by site that `attach(model, read, tokens=tokens, rows=rows)` keeps of one run of this size, at most.

    read, tokens, rows as in `attach`; the sizes as in RunSize. Values are taken in the model's dtype, scores and weights of
    experts in at least float32, chosen experts as 8 bytes. Raises SiteError for an unknown name or another model than KimiVL.
    """
    if not isinstance(model, KimiVL):
        raise SiteError(f"the sizes of {type(model).__name__} are not known in advance; attach(limit=...) counts as it runs")
    size, found = RunSize(prompt, new, patches, batch), sites(model)
    positions = None if tokens is None else Positions(tokens)
    known: dict[str, int] = {}
    unknown: dict[str, None] = {}
    globs = {read: None} if isinstance(read, str) else read if isinstance(read, Mapping) else dict.fromkeys(read)
    for glob, keep in globs.items():
        base = glob.removesuffix("@in")
        for name in match(base, found):
            if keep is not None or base != glob:
                unknown[name if base == glob else glob.replace(base, name)] = None
            else:
                width = prod(part for part in sizes(model.config, found[name]) if isinstance(part, int))
                known[name] = _count(model, found[name], size, positions, rows) * width * _itemsize(model, name)
    return Cost(known, list(unknown))


def _count(model: KimiVL, site: Site, size: RunSize, positions: Positions | None, rows: slice | Sequence[int] | None) -> int:
    """Tokens, patches or visual tokens that are kept of a site."""
    down, across = model.config.vision.merge_kernel_size
    if site.axes[0] in "PM":
        calls = [size.patches if site.axes[0] == "P" else size.patches // (down * across)]
    elif site.name == "logits" and size.new:
        calls = [1] * size.new  # while generating, only the last token is scored
    else:
        calls = [size.prompt] + [1] * size.new
    if rows is not None:
        calls = [len(range(count)[rows]) if isinstance(rows, slice) else len(rows) for count in calls]
    if site.axes[0] in "PM":
        return sum(calls)
    if positions is not None:
        return min(positions.count(size.prompt + size.new, size.batch), size.batch * sum(calls))
    return size.batch * sum(calls)


def _itemsize(model: KimiVL, name: str) -> int:
    dtype = model.logits.weight.dtype
    if name.endswith(".router.chosen"):
        dtype = torch.int64
    elif ".router." in name:
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype.itemsize


class Spent:
    """Bytes kept so far. Memory that several values share counts once, that of the weights not at all."""

    def __init__(self, weights: Iterable[Tensor]):
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self.total = 0

    def add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            memory = value.untyped_storage()
            if memory.data_ptr() not in self.seen:
                self.seen.add(memory.data_ptr())
                self.total += memory.nbytes()
        elif isinstance(value, Mapping):
            self.add(list(value.values()))
        elif isinstance(value, list | tuple):
            for part in value:
                self.add(part)
        else:
            self.total += getattr(value, "nbytes", 0)  # numpy arrays


def refuse(asked: str, limit: int) -> SiteError:
    """The sentence for more bytes than the limit."""
    return SiteError(f"{asked}, and limit= allows {human(limit)}; choose fewer tokens= or sites, keep= a part, or allow more")


def human(count: int) -> str:
    """Bytes for a person, in powers of a thousand."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
