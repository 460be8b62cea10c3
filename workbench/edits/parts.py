"""Changes to what is written into the stream: heads, layers, shared experts, visual tokens, patches, and any site at all.

Letters: B rows, T tokens, P patches, M visual tokens, H heads, v/d channels of a head, D and V streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_vl_ref import KimiVL

from ..positions import FAR
from ..sites import match, sites
from ..tape import Tape
from .change import (
    Change,
    EditError,
    Now,
    Plan,
    Where,
    digest,
    indices,
    inside,
    layer_of,
    listed,
    mask,
    places,
    plural,
    values_of,
)

DRAWS = 1 << 16  # a position's draw depends on the seed, its row and itself, not on how the text was cut into calls


class Filling:
    """What stands in the place of what is taken away: zero, a mean, or one of N samples drawn for each position."""

    def __init__(self, how: str, bank: Tensor | None, seed: int):
        self.how, self.bank = how, bank  # bank (N, ...)
        if bank is not None and how == "resample":
            self.draws = torch.randint(len(bank), (DRAWS,), generator=torch.Generator().manual_seed(seed))

    def new(self, positions: Tensor, like: Tensor) -> Tensor:
        """What to put at positions (B, T) or (P,), in the dtype of `like`: (...) for all alike, or one a position."""
        if self.bank is None:
            return like.new_zeros(())
        bank = self.bank.to(like.device, torch.promote_types(like.dtype, torch.float32))
        if self.how == "mean":
            return bank.mean(0).to(like.dtype)
        rows = torch.arange(len(positions), device=positions.device)[:, None] if positions.ndim > 1 else 0
        return bank[self.draws.to(positions.device)[(positions + 8191 * rows) % DRAWS]].to(like.dtype)


def filling_of(how: str, values: Any, shape: tuple[int, ...], what: str, seed: int) -> Filling:
    return Filling(how, None if how == "zero" else values_of(values, shape, what), seed)


def _check_how(how: str, values: Any, needed: bool = True) -> None:
    if how not in ("zero", "mean", "resample"):
        raise EditError(f'how={how!r} is unknown; use "zero", "mean" or "resample"')
    if how == "zero" and values is not None:
        raise EditError('how="zero" takes no values; use how="mean" or how="resample" with them')
    if needed and how != "zero" and values is None:
        raise EditError(
            f"how={how!r} needs values: a decoding step sees one token, so a mean has to come from a sample read before"
        )


def ablate_heads(
    layer: int,
    heads: Any,
    how: str = "zero",
    values: Any = None,
    tokens: Any = None,
    *,
    seed: int = 0,
    tower: str = "decoder",
) -> Change:
    """What heads of one layer read becomes zero, or `values`, before the output projection.

    values   (len(heads), v) as read at `attn.core`, or (N, len(heads), v) of which "mean" takes the mean and "resample"
             one draw a position.  tokens: positions, all if left out.
    tower    "decoder", or "vision", where positions are patches of the whole pack. Counts: heads and tokens.

        applied(model, [ablate_heads(2, [0, 3])])
    """
    heads, where = indices(heads, "head"), Where(tokens)
    _check_how(how, values)
    if tower not in ("decoder", "vision"):
        raise EditError(f'tower={tower!r} is unknown; use "decoder" or "vision"')

    def prepare(model: KimiVL) -> Plan:
        if tower == "vision":
            inside([layer], len(model.vision.layers), "vision layer")
            count, width = model.config.vision.num_attention_heads, model.config.vision.head_dim
        else:
            layer_of(model, layer)
            count, width = model.config.text.num_attention_heads, model.config.text.v_head_dim
        inside(heads, count, "head")
        filling, plan = filling_of(how, values, (len(heads), width), "heads", seed), Plan()

        def edit(core: Tensor, now: Now | None) -> Tensor:
            named = mask(where, now, core)
            new = filling.new(places(now, core), core)
            core[..., heads, :] = torch.where(named[..., None, None], new, core[..., heads, :])
            plan.count(tokens=named.sum())
            plan.touched["heads"] = (plan.touched["tokens"] > 0) * len(heads)
            return core

        plan.sites[f"{tower}.layers.{layer}.attn.core"] = edit
        return plan

    settings = {"layer": layer, "heads": heads, "how": how, "tokens": where.json, "values": digest(values), "seed": seed}
    line = f"ablate {listed(heads, 'head')} of {'vision ' if tower == 'vision' else ''}layer {layer} ({how}){where}"
    return Change("ablate_heads", {**settings, "tower": tower}, line, prepare)


def ablate_layer(
    layer: int, part: str = "both", *, how: str = "zero", values: Any = None, tokens: Any = None, seed: int = 0
) -> Change:
    """What a decoder layer's attention ("attn"), its FFN with all experts ("ffn"), or each ("both") writes becomes zero,
    or `values` as for `ablate_shared` (one part only). Counts: tokens, once for each part.

        applied(model, [ablate_layer(2, "attn")])
    """
    parts = {"attn": ["attn"], "ffn": ["ffn"], "both": ["attn", "ffn"]}.get(part)
    if parts is None:
        raise EditError(f'part={part!r} is unknown; use "attn", "ffn" or "both"')
    if len(parts) > 1 and values is not None:
        raise EditError("attention and FFN write different things; give values to one part at a time")
    name = "attention and FFN" if part == "both" else {"attn": "attention", "ffn": "FFN"}[part]
    return ablate_written("ablate_layer", layer, parts, f"the {name}", how, values, tokens, seed, {"part": part})


def ablate_written(
    name: str,
    layer: int,
    parts: list[str],
    what: str,
    how: str,
    values: Any,
    tokens: Any,
    seed: int,
    more: dict[str, Any],
    check: Callable[[KimiVL], Any] | None = None,
) -> Change:
    """The change of what parts of a layer, sites of (B, T, D), write."""
    where = Where(tokens)
    _check_how(how, values)

    def prepare(model: KimiVL) -> Plan:
        layer_of(model, layer)
        if check is not None:
            check(model)
        filling, plan = filling_of(how, values, (model.config.text.hidden_size,), what, seed), Plan()

        def edit(written: Tensor, now: Now | None) -> Tensor:
            named = mask(where, now, written)
            plan.count(tokens=named.sum())
            return torch.where(named[..., None], filling.new(places(now, written), written), written)

        plan.sites = {f"decoder.layers.{layer}.{part}": edit for part in parts}
        return plan

    settings = {"layer": layer, "how": how, "tokens": where.json, "values": digest(values), "seed": seed, **more}
    return Change(name, settings, f"ablate {what} of layer {layer} ({how}){where}", prepare)


# ---- the picture's side ------------------------------------------------------------------------------------------------


def ablate_visual_tokens(indices: Any, how: str = "zero", *, values: Any = None, seed: int = 0) -> Change:
    """Visual tokens, counted over all pictures of a call, become zero as they leave the projector; their places stay.

    how   "mean": the mean of `values` (N, D), or without them of all visual tokens of the call. "resample": each
          another one of `values`, or without them of the call's tokens that are not ablated. Counts: tokens.

        applied(model, [ablate_visual_tokens(range(4, 8), "mean")])
    """
    return _ablate_rows("ablate_visual_tokens", "projector", "visual token", indices, how, values, seed)


def ablate_patches(indices: Any, how: str = "zero", *, values: Any = None, seed: int = 0) -> Change:
    """Patches, counted over all pictures of a call, lose what they show before their position is added; `how` and
    `values` (N, V) as for `ablate_visual_tokens`. Counts: patches.

        applied(model, [ablate_patches([0, 1, 8, 9], "resample", seed=3)])
    """
    return _ablate_rows("ablate_patches", "vision.patches", "patch", indices, how, values, seed)


def _ablate_rows(name: str, site: str, what: str, named: Any, how: str, values: Any, seed: int) -> Change:
    rows = indices(named, what)
    _check_how(how, values, needed=False)
    bank = None if values is None else values_of(values, tuple(torch.as_tensor(values).shape[-1:]), f"a {what}")

    def prepare(model: KimiVL) -> Plan:
        plan, generator = Plan(), torch.Generator().manual_seed(seed)

        def edit(tensor: Tensor, now: Now | None) -> Tensor:
            inside(rows, len(tensor), what)
            plan.count(**{plural(what).replace(" ", "_"): len(rows)})
            kept = torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
            kept[rows] = False
            source = tensor if bank is None else bank.to(tensor)
            if how == "zero":
                new = tensor.new_zeros(())
            elif how == "mean":
                new = source.to(torch.promote_types(source.dtype, torch.float32)).mean(0).to(tensor.dtype)
            else:
                if bank is None and bool(kept.any()):
                    source = tensor[kept]
                new = source[torch.randint(len(source), (len(rows),), generator=generator).to(tensor.device)]
            return tensor.index_put((torch.tensor(rows, device=tensor.device),), new)

        plan.sites[site] = edit
        return plan

    settings = {"indices": rows, "how": how, "values": digest(values), "seed": seed}
    return Change(name, settings, f"ablate {listed(rows, what)} ({how})", prepare)


# ---- any site ----------------------------------------------------------------------------------------------------------


def patch(site: str, values: Any, positions: Any) -> Change:
    """Puts activations of another run in their place: values (N, ...) or, one a row, (B, N, ...) at N positions of a site.

    Positions are of the text for sites of the decoder and for `embedded`, which is changed as it enters the decoder; at
    sites of the picture's side they count patches or visual tokens. `values_at` takes values from a tape, `match_by_role`
    says which position of one run stands for which of the other. Counts: tokens.

        there, here = match_by_role(clean.roles, roles)
        applied(model, [patch("decoder.layers.2", values_at(tape, "decoder.layers.2", there), here)])
    """
    where, given = Where(positions), torch.as_tensor(values)
    named = in_order(positions)
    order = torch.tensor(sorted(range(len(named)), key=named.__getitem__))  # as `Where` ranks them
    if len(set(named)) < len(named):
        raise EditError(f"a position of {site} is to be patched twice; name each once")

    def edit(tensor: Tensor, now: Now | None, plan: Plan) -> Tensor:
        at = where.rank(places(now, tensor))
        at = at[None] if now is None else torch.where(now.real, at, -1)  # (B, T); (1, P) on the picture's side
        rest = tensor.shape[1:] if now is None else tensor.shape[2:]
        bank = given if given.ndim == len(rest) + 2 else given[None]
        if bank.shape[1:] != (len(named), *rest) or len(bank) not in (1, len(at)):
            raise EditError(
                f"values of shape {tuple(given.shape)} do not fit {len(named)} positions of {site}, whose entries have the "
                f"shape {tuple(rest)}; give (positions, ...) or one such a row"
            )
        plan.count(tokens=(at >= 0).sum())
        bank = bank[:, order].to(tensor.device, tensor.dtype).expand(len(at), *bank.shape[1:])
        new = bank[torch.arange(len(at), device=at.device)[:, None], at.clamp(min=0)].view_as(tensor)
        return torch.where((at >= 0).view(*tensor.shape[: tensor.ndim - len(rest)], *(1 for _ in rest)), new, tensor)

    settings = {"site": site, "positions": where.json, "values": digest(values)}
    return Change("patch", settings, f"patch {site}{where}", lambda model: _at_site(model, site, edit))


def steer(site: str, direction: Any, scale: float = 1.0, positions: Any = None) -> Change:
    """Adds scale x direction at positions (all if left out) of one site; direction has the shape of one entry, such as
    (D,), and its own length. Positions as for `patch`. Counts: tokens.

        applied(model, [steer("decoder.layers.2", direction, scale=4.0, positions=slice(40, None))])
    """
    where, vector, scale = Where(positions), torch.as_tensor(direction), float(scale)
    if not scale or not vector.is_floating_point() or not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise EditError("the direction or its scale is zero, not finite or not of floats; give a finite direction")

    def edit(tensor: Tensor, now: Now | None, plan: Plan) -> Tensor:
        named = mask(where, now, tensor)
        rest = tensor.shape[named.ndim :]
        if vector.shape != rest:
            raise EditError(f"a direction of shape {tuple(vector.shape)} does not fit {site}, whose entries are {tuple(rest)}")
        plan.count(tokens=named.sum())
        push = (scale * vector.to(tensor.device, torch.promote_types(tensor.dtype, torch.float32))).to(tensor.dtype)
        return torch.where(named.view(*named.shape, *(1 for _ in rest)), tensor + push, tensor)

    settings = {"site": site, "direction": digest(direction), "scale": scale, "positions": where.json}
    return Change("steer", settings, f"steer {site} by {scale:g}{where}", lambda model: _at_site(model, site, edit))


def _at_site(model: KimiVL, site: str, edit: Callable[[Tensor, Now | None, Plan], Tensor]) -> Plan:
    known = sites(model)
    if len(names := match(site, known)) > 1:
        raise EditError(f"{site!r} names {len(names)} sites, and a change is made at one; take {names[0]!r} or make one each")
    plan = Plan()
    if site == "embedded":  # which position a call of `embedded` begins at is known when the decoder gets it
        plan.entry = lambda x, now: edit(x, now, plan)
    elif known[site].token_axis not in (0, 1) or site.startswith("logits"):
        raise EditError(f"{site} has no axis of tokens; choose a site of the decoder, the projector or MoonViT")
    else:
        plan.sites[site] = lambda tensor, now: edit(tensor, now, plan)
    return plan


def values_at(tape: Tape, site: str, positions: Any, row: int = 0) -> Tensor:
    """Activations (N, ...) of a site that a tape has read whole, of one row of the batch, at positions over all its calls;
    on the picture's side, of its latest call. Raises EditError for positions that it does not have.

        values_at(tape, "decoder.layers.2", [4, 5, 6])      # (3, D)
    """
    calls, text = tape[site], site.startswith("decoder") or site == "embedded"
    joined = torch.cat([call[row] for call in calls]) if text else calls[-1]
    wanted = in_order(positions)
    inside(wanted, len(joined), "position")
    return joined[wanted]


def match_by_role(
    source: Sequence[str], target: Sequence[str], roles: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of two texts that stand for each other: the n-th token of a role here and there, as far as both go.

    source and target are roles by position, as in `Run.roles`; roles: which to match, such as ["image 0", "user"], all
    that both have if left out. Returns two arrays of equal length, ordered by the target. Raises EditError for no match.

        match_by_role(["user", "user", "answer"], ["system", "user", "answer", "answer"])     # ([0, 2], [1, 2])
    """
    pairs: list[tuple[int, int]] = []
    for role in dict.fromkeys(target) if roles is None else roles:
        there = [at for at, one in enumerate(source) if one == role]
        here = [at for at, one in enumerate(target) if one == role]
        pairs += zip(there, here, strict=False)
    if not pairs:
        raise EditError("no role is in both texts, so nothing stands for anything; check the roles")
    ordered = np.array(sorted(pairs, key=lambda pair: pair[1]), np.int64)
    return ordered[:, 0], ordered[:, 1]


def in_order(positions: Any) -> list[int]:
    """Positions as they are given, one after another. Raises EditError unless they are known and one list."""
    row = Where(positions).row
    if isinstance(row, range):
        if row.stop == FAR:
            raise EditError("which positions has to be known here; give a list or slice(start, stop)")
        return list(row)
    return [int(at) for at in positions]
