"""Who may look where: blocks between groups of positions, in chosen layers and heads of the decoder, and between patches of a
picture in MoonViT.

The looks themselves are taken away by `workbench.blocks`, which keeps every row that loses nothing bit for bit; here they
become a Change, which may name positions up to an end that is not written yet. Letters: B rows, T queries, S keys, H heads,
P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kimi_vl_ref import KimiVL

from ..blocks import BlockedCore, blocked, blocked_patches
from ..positions import FAR
from .change import Change, EditError, Now, Plan, Where, indices, inside, layer_of, listed


class Block:
    """One change on one layer: these queries do not see these keys, in these heads."""

    def __init__(self, plan: Plan, queries: Where, keys: Where, heads: list[int] | None):
        self.plan, self.queries, self.keys, self.heads = plan, queries, keys, heads

    def pairs(self, end: int) -> list[tuple[range | list[int], range | list[int]]]:
        """(queries, keys) below `end`, where an open choice stops for now."""
        cut = [range(row.start, end, row.step) if isinstance(row, range) and row.stop == FAR else row
               for row in (self.queries.row, self.keys.row)]  # fmt: skip
        return [(cut[0], cut[1])]

    def count(self, now: Now, heads: int) -> None:
        """Queries that lose a key, and looks taken away: a query, a key and a head."""
        keys = self.keys.row
        if isinstance(keys, range):
            before = (now.positions.clamp(max=keys.stop - 1) - keys.start).div(keys.step, rounding_mode="floor") + 1
        else:
            before = torch.searchsorted(torch.tensor(keys, device=now.positions.device), now.positions.contiguous(), right=True)
        named = (self.queries.rank(now.positions) >= 0) & now.real
        lost = torch.where(named, before.clamp(min=0), 0)  # (B, T) keys of the block that the query would see
        self.plan.count(queries=(lost > 0).sum(), looks=lost.sum() * (heads if self.heads is None else len(self.heads)))


class Blocked(nn.Module):
    """Stands in for a decoder core, with the blocks of several changes."""

    def __init__(self, here: Callable[[], Now], blocks: Sequence[Block], outer: Blocked | None = None):
        super().__init__()
        self.here, self.changes, self.end = here, blocks, 0
        # a row that loses a key is computed anew, so it has to know what it has lost already
        self.all: list[Block] = [*(() if outer is None else outer.all), *blocks]

    def around(self, core: nn.Module) -> Blocked:
        self.replaced = [core]  # in a list: not a part of this module, whose parts would be sites
        return self

    def forward(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, *more: Tensor) -> Tensor:
        now = self.here()
        for block in self.changes:
            block.count(now, q_nope.shape[2])
        return self.up_to(latent.shape[1])(q_nope, q_rope, latent, *more)

    def up_to(self, keys: int) -> BlockedCore:
        """The blocks over at least this many keys; made anew as the text grows, each time for twice as much of it."""
        if keys > self.end:
            self.end = max(64, 2 * keys)
            (core,) = self.replaced
            for block in self.all:
                core = blocked(core, block.pairs(self.end), block.heads)
            self.wrapped = [core]
        found = self.wrapped[0]
        assert isinstance(found, BlockedCore)
        return found


def block_attention(queries: Any, keys: Any, layers: Any = None, heads: Any = None) -> Change:
    """Positions `queries` do not see positions `keys`, in all decoder layers and heads or in those named (attention
    knockout, arXiv 2304.14767): the scores become -inf before the softmax, so the other keys share what is left.

    Both are lists, ranges or slices; slice(40, None) stands for all that is written from position 40 on. A query that
    would be left with no key at all is refused with ValueError: let it see itself. Positions of a role: `Run.positions`.
    Counts: queries that lost a key and looks (a query, a key, a head), over all layers.

        applied(model, [block_attention(run.positions("answer"), run.positions("image"), layers=[2, 3])])
    """
    asked, hidden = Where(queries), Where(keys)
    assert asked.row and hidden.row, "both raise for what a block cannot take"
    layers = None if layers is None else indices(layers, "layer")
    heads = None if heads is None else indices(heads, "head")

    def prepare(model: KimiVL) -> Plan:
        plan = Plan()
        inside(heads or (), model.config.text.num_attention_heads, "head")
        for layer in range(len(model.decoder.layers)) if layers is None else layers:
            layer_of(model, layer)
            plan.blocks[layer] = Block(plan, asked, hidden, heads)
        return plan

    line = f"block attention{str(asked).replace(' at', ' from')} to{str(hidden).removeprefix(' at')} ({_where(layers, heads)})"
    settings = {"queries": asked.json, "keys": hidden.json, "layers": layers, "heads": heads}
    return Change("block_attention", settings, line, prepare)


class PatchBlock:
    """One change on one layer of MoonViT: these patches of a picture do not see those, in these heads."""

    def __init__(self, plan: Plan, queries: list[int], keys: list[int], heads: list[int] | None, picture: int):
        self.plan, self.queries, self.keys, self.heads, self.picture = plan, queries, keys, heads, picture

    def count(self, heads: int) -> None:
        looks = len(self.queries) * len(self.keys) * (heads if self.heads is None else len(self.heads))
        self.plan.count(patches=len(self.queries), looks=looks)


class BlockedPatches(nn.Module):
    """Stands in for a MoonViT core, with the blocks of several changes."""

    def __init__(self, blocks: Sequence[PatchBlock], outer: BlockedPatches | None = None):
        super().__init__()
        self.changes = blocks
        self.all: list[PatchBlock] = [*(() if outer is None else outer.all), *blocks]  # as in `Blocked`

    def around(self, core: nn.Module) -> BlockedPatches:
        for block in self.all:
            core = blocked_patches(core, [(block.queries, block.keys)], block.heads, block.picture)
        self.wrapped = [core]  # in a list: not a part of this module, whose parts would be sites
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Any) -> Tensor:
        heads = self.wrapped[0](q, k, v, packing)
        for block in self.changes:
            block.count(q.shape[1])
        return heads


def block_patches(queries: Any, keys: Any, layers: Any = None, heads: Any = None, *, picture: int = 0) -> Change:
    """Patches `queries` of one picture of a call do not see its patches `keys`, in all layers and heads of MoonViT or in
    those named; as `block_attention`. Patches count from 0 inside the picture, row by row (`PatchGrid.patch_at`).

    A patch that would see nothing, and one that the picture does not have, are refused with ValueError when the picture is
    seen. Counts: patches that lost a key and looks, over all layers.

        applied(model, [block_patches(range(4, 8), [0], layers=[2], heads=[1])])
    """
    asked, hidden = indices(queries, "patch"), indices(keys, "patch")
    layers = None if layers is None else indices(layers, "layer")
    heads = None if heads is None else indices(heads, "head")
    if isinstance(picture, bool) or not isinstance(picture, int) or picture < 0:
        raise EditError(f"picture {picture!r} is not the number of a picture; count them from 0")

    def prepare(model: KimiVL) -> Plan:
        plan = Plan()
        inside(heads or (), model.config.vision.num_attention_heads, "head")
        inside(layers or (), len(model.vision.layers), "vision layer")
        for layer in range(len(model.vision.layers)) if layers is None else layers:
            plan.patch_blocks[layer] = PatchBlock(plan, asked, hidden, heads, picture)
        return plan

    seen = f"{listed(asked, 'patch')} of picture {picture} from seeing {listed(hidden, 'patch')}"
    line = f"block {seen} (MoonViT, {_where(layers, heads)})"
    settings = {"queries": asked, "keys": hidden, "layers": layers, "heads": heads, "picture": picture}
    return Change("block_patches", settings, line, prepare)


def _where(layers: list[int] | None, heads: list[int] | None) -> str:
    return f"{'all layers' if layers is None else listed(layers, 'layer')}, {listed(heads, 'head') if heads else 'all heads'}"
