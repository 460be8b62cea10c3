"""Attention with some looks forbidden: chosen queries do not see chosen keys, in all heads or in some.

`blocked` and `blocked_patches` wrap the core of a layer of the decoder and of MoonViT. The wrapped core still does all the
work; only the rows that lose a key are computed again (rows.py), so no T x T mask is ever made and every other number
keeps its bits. Positions are those of the whole conversation, so prefill, chunked prefill and cached decoding agree.

    pairs = [(answer_positions, picture_positions)]
    with attach(model, swap={"decoder.layers.2.attn.core": lambda core: blocked(core, pairs, heads=[3])}) as tape:
        reply(model, chat, messages)

The scores are set to -inf before the softmax (attention knockout: Geva et al., 2304.14767). A query that would see nothing
is refused. Note that `attn.core@in` is what the core was given, before any block: `BlockedCore.rows` gives the
probabilities with the blocks, `decoder_rows` those without. Letters as in attention.py and vision.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count as from_zero
from typing import Any

import torch
from torch import Tensor, nn

from .rows import Rows, decoder_rows, vision_rows

SCRATCH = 1 << 24  # numbers of one (B, H, rows, S) block of rows that are computed again

Positions = Iterable[int]  # a list, a range, a numpy array, ...
Pairs = Sequence[tuple[Positions, Positions]]  # (queries, keys)


@dataclass(frozen=True)
class Block:
    """These queries do not see these keys, in these heads (None: all); `picture` says whose patches, in MoonViT."""

    queries: frozenset[int]
    keys: frozenset[int]
    heads: frozenset[int] | None = None
    picture: int = 0


def blocked(core: nn.Module, pairs: Pairs, heads: Sequence[int] | None = None) -> BlockedCore:
    """A decoder core in which, for every (queries, keys) of `pairs`, those positions do not see those positions.

    Positions count from the start of each row of the batch. A core that is blocked already gets the new blocks besides.
    Raises ValueError for a negative position, and for a query that would see no key at all: a query sees itself unless
    that is blocked too.

        attach(model, swap={"decoder.layers.2.attn.core": lambda core: blocked(core, [([40, 41], range(4, 10))])})
    """
    before = core.blocks if isinstance(core, BlockedCore) else ()
    inner = core.core if isinstance(core, BlockedCore) else core
    return BlockedCore(inner, (*before, *_blocks(pairs, heads)))


def blocked_patches(
    core: nn.Module, pairs: Pairs, heads: Sequence[int] | None = None, picture: int = 0
) -> BlockedPackedCore:
    """The same in MoonViT: patches of one picture of the call, counted from 0 inside it, row by row.

        attach(model, swap={"vision.layers.0.attn.core": lambda core: blocked_patches(core, [([7], [0, 1])], heads=[2])})
    """
    before = core.blocks if isinstance(core, BlockedPackedCore) else ()
    inner = core.core if isinstance(core, BlockedPackedCore) else core
    return BlockedPackedCore(inner, (*before, *_blocks(pairs, heads, picture)))


class BlockedCore(nn.Module):
    """Stands in for a decoder core; made by `blocked`."""

    def __init__(self, core: nn.Module, blocks: tuple[Block, ...]):
        super().__init__()
        self.core, self.blocks = core, blocks
        self._touched: Tensor | int = 0  # stays on its device: asking for it now would make every call wait
        _refuse_blind(blocks, _queries(blocks), None, "position {}")
        self._queries = [_tensor(block.queries) for block in blocks]
        self._keys = [_tensor(block.keys) for block in blocks]

    def forward(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, visible: Tensor | None
    ) -> Tensor:
        inputs = (q_nope, q_rope, latent, k_rope, up, visible)
        heads = self.core(*inputs)
        batch, _, count, n = q_nope.shape
        _refuse_heads(self.blocks, count)
        positions = query_positions(inputs)
        concerned = torch.zeros_like(positions, dtype=torch.bool)
        for queries in self._queries:
            concerned |= torch.isin(positions, queries.to(positions.device))
        columns = concerned.any(0).nonzero().flatten()
        for part in columns.split(max(1, SCRATCH // (batch * count * latent.shape[1]))):
            hidden = self.hidden(inputs, part)
            probs = decoder_rows(inputs, part, hidden)
            read = torch.einsum("bhtr,hvr->bthv", probs @ latent[:, None].to(probs.dtype), up[:, n:].to(probs.dtype))
            hit = hidden.any(-1).transpose(1, 2)[..., None]  # (B, rows, H, 1)
            heads = heads.index_copy(1, part, torch.where(hit, read.to(heads.dtype), heads[:, part]))
            self._touched = self._touched + hidden.sum()
        return heads

    @property
    def touched(self) -> int:
        """How many looks were taken away so far: one a query, key and head that would have met."""
        return int(self._touched)

    def hidden(self, inputs: tuple[Any, ...], rows: Rows = slice(None)) -> Tensor:
        """Keys that these columns of a call would see and may not: (B, H, len(rows), S) bool."""
        q_nope, _, latent, _, _, _ = inputs
        positions = query_positions(inputs)[:, rows]  # (B, rows)
        slots = torch.arange(latent.shape[1], device=positions.device)  # a row's token t lies in slot t
        hidden = torch.zeros(*positions.shape, q_nope.shape[2], len(slots), dtype=torch.bool, device=slots.device)
        for block, queries, keys in zip(self.blocks, self._queries, self._keys, strict=True):
            looks = torch.isin(positions, queries.to(slots.device))[..., None] & torch.isin(slots, keys.to(slots.device))
            heads = slice(None) if block.heads is None else sorted(block.heads)
            hidden[:, :, heads] |= (looks & (slots <= positions[..., None]))[:, :, None]
        return hidden.transpose(1, 2)

    def rows(self, inputs: tuple[Any, ...], rows: Rows = slice(None)) -> Tensor:
        """`decoder_rows` with the blocks: what these queries read here, (B, H, len(rows), S)."""
        return decoder_rows(inputs, rows, self.hidden(inputs, rows))


class BlockedPackedCore(nn.Module):
    """Stands in for a MoonViT core; made by `blocked_patches`."""

    def __init__(self, core: nn.Module, blocks: tuple[Block, ...]):
        super().__init__()
        self.core, self.blocks = core, blocks
        self._touched: Tensor | int = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Any) -> Tensor:
        inputs = (q, k, v, packing)
        heads = self.core(*inputs)
        _refuse_heads(self.blocks, q.shape[1])
        for picture in sorted({block.picture for block in self.blocks}):
            patches = sorted(_queries([block for block in self.blocks if block.picture == picture]))
            start, count = sum(packing.counts[:picture]), packing.counts[picture] if picture < len(packing.counts) else 0
            for part in torch.tensor(patches, dtype=torch.long).split(max(1, SCRATCH // (q.shape[1] * max(1, count)))):
                hidden = self.hidden(inputs, picture, part)
                probs = vision_rows(inputs, picture, part, hidden)
                read = torch.einsum("hps,shd->phd", probs, v[start : start + count].to(probs.dtype)).to(heads.dtype)
                rows = start + part.to(heads.device)
                heads = heads.index_copy(0, rows, torch.where(hidden.any(-1).T[..., None], read, heads[rows]))
                self._touched = self._touched + hidden.sum()
        return heads

    @property
    def touched(self) -> int:
        """How many looks were taken away so far: one a query, key and head."""
        return int(self._touched)

    def hidden(self, inputs: tuple[Any, ...], picture: int, patches: Tensor) -> Tensor:
        """Patches that these patches of a picture may not see: (H, len(patches), patches of the picture) bool.

        Raises ValueError for a patch that does not exist or would see nothing.
        """
        q, _, _, packing = inputs
        count = packing.counts[picture] if picture < len(packing.counts) else 0
        blocks = tuple(block for block in self.blocks if block.picture == picture)
        if outside := [at for block in blocks for at in sorted(block.queries | block.keys) if at >= count]:
            raise ValueError(
                f"patch {outside[0]} of picture {picture} is blocked but does not exist: this call saw "
                f"{len(packing.counts)} pictures of {packing.counts} patches; count both from 0"
            )
        hidden = torch.zeros(q.shape[1], len(patches), count, dtype=torch.bool)
        _refuse_blind(blocks, patches.tolist(), count, f"patch {{}} of picture {picture}")
        for at, patch in enumerate(patches.tolist()):
            for block in blocks:
                if patch in block.queries:
                    heads = list(range(q.shape[1])) if block.heads is None else sorted(block.heads)
                    hidden[torch.tensor(heads)[:, None], at, _tensor(block.keys)] = True
        return hidden.to(q.device)


def query_positions(inputs: tuple[Any, ...]) -> Tensor:
    """Where the queries of one call of a decoder core stand in their rows: (B, T), counted from 0.

    A query at position p sees p + 1 keys, so nothing more than the core's own inputs is needed.
    """
    q_nope, _, latent, _, _, visible = inputs
    if visible is None:
        before = latent.shape[1] - q_nope.shape[1]
        return torch.arange(before, latent.shape[1], device=q_nope.device).expand(q_nope.shape[0], -1)
    return visible.sum(-1) - 1


def _blocks(pairs: Pairs, heads: Sequence[int] | None, picture: int = 0) -> list[Block]:
    chosen = None if heads is None else _whole(heads, "head")
    whole = [(_whole(queries, "position"), _whole(keys, "position")) for queries, keys in pairs]
    return [Block(queries, keys, chosen, picture) for queries, keys in whole if queries and keys]


def _whole(numbers: Positions, what: str) -> frozenset[int]:
    found = frozenset(int(number) for number in numbers)
    if found and min(found) < 0:
        raise ValueError(f"{what} {min(found)} cannot be blocked; count from 0, at the start of the conversation")
    return found


def _queries(blocks: Iterable[Block]) -> frozenset[int]:
    return frozenset[int]().union(*(block.queries for block in blocks))


def _tensor(numbers: frozenset[int]) -> Tensor:
    return torch.tensor(sorted(numbers), dtype=torch.long)


def _refuse_heads(blocks: tuple[Block, ...], count: int) -> None:
    for block in blocks:
        if block.heads and max(block.heads) >= count:
            raise ValueError(f"head {max(block.heads)} does not exist; this layer has heads 0 to {count - 1}")


def _refuse_blind(blocks: tuple[Block, ...], queries: Iterable[int], keys: int | None, name: str) -> None:
    """Raises ValueError if one of these queries sees keys 0 to keys - 1 (None: up to itself) and is left with none of them."""
    first: dict[tuple[Block, ...], int] = {}  # many queries lose the same keys
    for query in queries:
        mine = tuple(block for block in blocks if query in block.queries)
        if mine not in first:
            first[mine] = _first_left(mine)
        if first[mine] >= (query + 1 if keys is None else keys):
            raise ValueError(
                f"{name.format(query)} would see nothing, as every key it has is blocked; leave it one, such as itself"
            )


def _first_left(blocks: tuple[Block, ...]) -> int:
    """The first key that a query in all of these blocks still sees, in the head where it comes latest."""
    named = frozenset[int]().union(*(block.heads or () for block in blocks))
    latest = 0
    for head in (None, *named):  # None: a head that no block names
        lost = frozenset[int]().union(*(block.keys for block in blocks if block.heads is None or head in block.heads))
        latest = max(latest, next(key for key in from_zero() if key not in lost))
    return latest
