"""The list of changes as the browser sends it, checked against the run and the model, one sentence for what will not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kimi_vl_ref.told import shown

from .act import Asked
from .change_kinds import Bias, Block, Experts, Heads, Kind, Layer, Region, Tokens, TopK, merged, spoken
from .change_places import belongs

MOST = 64  # changes in one list
LARGEST_SHIFT = 5.0  # scores lie between 0 and 1: a shift of more than 1 settles the choice already


def changes_of(asked: Asked) -> list[Kind]:
    """args: changes, a list of {"kind": ..., and what the kind needs}. Raises ValueError.

    {"kind": "expert", "layer": 3, "expert": 7, "how": "contribution"}     {"kind": "head", "layer", "head", "how"}
    {"kind": "layer", "layer", "part"}      {"kind": "token", "token", "how"}      {"kind": "picture", "picture", "how"}
    {"kind": "region", "picture", "box": [x0, y0, x1, y1]}                  {"kind": "bias", "layer", "expert", "by"}
    {"kind": "top-k", "k"}                  {"kind": "block", "from", "to"}
    """
    listed = asked.args.get("changes")
    if not isinstance(listed, list) or not listed:
        raise ValueError("the list of changes is empty; add one, such as an expert to switch off")
    if len(listed) > MOST:
        raise ValueError(f"the list has {len(listed)} changes; keep it to {MOST}")
    found = []
    for spec in listed:
        if not isinstance(spec, dict):
            raise ValueError(f"{shown(spec)} is no change; remove it from the list")
        one = replace(asked, args=spec)
        found.append(READ[one.one_of("kind", tuple(READ))](one))
    if len({one.k for one in found if isinstance(one, TopK)}) > 1:
        raise ValueError("the list sets two different numbers of experts a token; remove one of them")
    return merged(found)


def _expert(one: Asked) -> Experts:
    return Experts(_routing_layer(one), (_expert_of(one),), one.one_of("how", tuple(Experts.HOW)))


def _bias(one: Asked) -> Bias:
    by = float(one.number("by", -LARGEST_SHIFT, LARGEST_SHIFT))
    if not by:
        raise ValueError("a bias shifted by 0 changes nothing; move the slider")
    return Bias(_routing_layer(one), (_expert_of(one),), by)


def _head(one: Asked) -> Heads:
    heads = one.session.model.config.text.num_attention_heads
    return Heads(_layer_of(one), (one.whole("head", 0, heads - 1),), one.one_of("how", ("zero", "mean")))


def _layer(one: Asked) -> Layer:
    return Layer(_layer_of(one), one.one_of("part", ("attn", "ffn", "both")))


def _token(one: Asked) -> Tokens:
    _needs_picture(one)
    last = sum(picture.grid.token_count for picture in one.run.pictures) - 1
    return Tokens((one.whole("token", 0, last),), one.one_of("how", ("mean", "zero")))


def _picture(one: Asked) -> Tokens:
    tokens = one.run.tokens_of_picture(_picture_of(one))
    return Tokens(tuple(range(tokens.start, tokens.stop)), one.one_of("how", ("mean", "zero")))


def _region(one: Asked) -> Region:
    picture, box = _picture_of(one), one.args.get("box")
    width, height = one.run.pictures[picture].grid.original
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"the region is {shown(box)}; draw a rectangle on the picture")
    sides = [replace(one, args={"side": side}).number("side", -1e6, 1e6) for side in box]
    x0, y0, x1, y1 = (round(min(max(side, 0), most)) for side, most in zip(sides, (width, height) * 2, strict=True))
    if x1 <= x0 or y1 <= y0:
        raise ValueError("the rectangle covers no pixel of the picture; draw a larger one on it")
    return Region(picture, (x0, y0, x1, y1))


def _top_k(one: Asked) -> TopK:
    k, now = one.whole("k", 1, one.run.n_experts), one.run.chosen.shape[2]
    if k == now:
        raise ValueError(f"{k} experts a token is what this model chooses already; take another number")
    return TopK(k)


def _block(one: Asked) -> Block:
    pictures = [f"picture {number}" for number in range(len(one.run.pictures))]
    source = one.one_of("from", ("everything", "reply", "thought", "answer", "question", *pictures))
    target = one.one_of("to", ("question", "thought", "picture", *pictures))
    if source.startswith("picture") or target.startswith("picture"):
        _needs_picture(one)
    if "thought" in (source, target) and not one.run.thought:
        raise ValueError("this reply has no thought to block; ask something the model thinks about")
    if target == "thought" and source != "answer":
        raise ValueError("only the answer comes after the thought; block from the answer to the thought")
    if source == target or (source.startswith("picture") and target == "picture"):
        raise ValueError(f"{spoken(source)} cannot be kept from looking at itself; choose two different parts")
    roles = list(one.run.roles[: one.run.prompt_length])
    here, there = ([at for at, role in enumerate(roles) if belongs(role, name)] for name in (source, target))
    if here and there and max(here) < min(there):
        raise ValueError(f"{spoken(source)} stands before {spoken(target)}, and no word looks ahead; nothing to block")
    return Block(source, target)


def _layer_of(one: Asked) -> int:
    return one.whole("layer", 0, len(one.session.model.decoder.layers) - 1)


def _routing_layer(one: Asked) -> int:
    layer, routing = _layer_of(one), one.run.moe_layers
    if layer not in routing:
        raise ValueError(f"layer {layer} has no experts to choose from; take one of {', '.join(map(str, routing))}")
    return layer


def _expert_of(one: Asked) -> int:
    return one.whole("expert", 0, one.run.n_experts - 1)


def _picture_of(one: Asked) -> int:
    _needs_picture(one)
    return one.whole("picture", 0, len(one.run.pictures) - 1)


def _needs_picture(one: Asked) -> None:
    if not one.run.pictures:
        raise ValueError("there is no picture in this conversation; ask about one first")


READ: dict[str, Callable[[Asked], Any]] = {
    "expert": _expert,
    "head": _head,
    "layer": _layer,
    "token": _token,
    "picture": _picture,
    "region": _region,
    "bias": _bias,
    "top-k": _top_k,
    "block": _block,
}
