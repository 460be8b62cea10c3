"""`kimi-vl doctor --deep`: our modules against transformers' on the weights of a checkpoint, one layer in memory at a time.

A piece is a model with a single decoder layer, the real one, whose embedding table *is* the stream that reaches this layer.
Both implementations get it, so differences do not add up from layer to layer, and the first piece that differs is where to
look. The first piece also holds MoonViT, the projector and the real embedding, the last one the real logits. At full size the
largest piece takes about 10 GB in float32.

In float32 every site is compared, choosing experts freely. Then in bfloat16, as the model is used: the layer's output with
experts chosen freely, and again with transformers made to use our choice, so that rounding that flips a near tie is told
from a difference in the arithmetic.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from kimi_vl_ref.config import KimiVLConfig, VisionConfig
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.weights import Filling, empty_model, find_shards, read_config

from ..parity import Difference, Probe, probe, walk
from ..released import as_decoder, as_transformers
from ..tape import attach
from .files import locate
from .findings import Report

NO_TOWER = VisionConfig(14, 8, 1, 2, 8, 2, 2)  # stands in where a piece has no pictures
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
TOLERANCE = 5e-2  # of the layer's own output in bfloat16, with the same experts


@dataclass(frozen=True)
class Piece:
    """What was found at one decoder layer. Differences are relative, of the root mean square."""

    layer: int
    worst: Difference  # in float32, of all sites
    first: Difference | None  # the first that passes the tolerance
    sites: int
    tokens: int
    flips: int  # tokens for which the two choose other experts, in bfloat16
    margin: float  # the largest lead of the last chosen expert over the next at such a token; nan without flips
    free: float  # difference of the layer's output in bfloat16, each with its own choice
    pinned: float  # the same, both with ours

    @property
    def agrees(self) -> bool:
        return self.first is None and self.pinned <= TOLERANCE


class Shards:
    """Tensors of a checkpoint by name, read when asked for."""

    def __init__(self, folder: Path):
        self.opened = [safe_open(shard, framework="pt", device="cpu") for shard in find_shards(folder)]
        self.where = {name: opened for opened in self.opened for name in opened.keys()}  # noqa: SIM118, not a dict

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)


def pieces(folder: Path) -> Iterator[Piece]:
    """Every decoder layer in turn, the first with what comes before it, the last with what comes after."""
    config, shards = read_config(folder), Shards(folder)
    given = probe(config)
    ids = torch.cat([given.input_ids, given.decode_ids], dim=1)
    prompt, last = given.input_ids.shape[1], config.text.num_hidden_layers - 1
    model = _piece(shards, config, 0, None)
    stream = torch.empty(0)
    for layer in range(last + 1):
        if layer:
            model = _piece(shards, config, layer, stream)
            ids = torch.arange(ids.numel()).view_as(ids)
            given = Probe(ids[:, :prompt], ids[:, prompt:], given.pixel_values, given.image_grid_hws)
        theirs = as_decoder(model) if layer else as_transformers(model)
        found = walk(model, theirs, given, names=("kimi_vl_ref", "transformers"))
        all_of_them = [one for step in found.steps for one in step]
        worst = max(all_of_them, key=lambda one: one.relative)
        with torch.no_grad(), attach(model, ["decoder.layers.0"]) as tape:
            pictures = () if layer else (given.pixel_values, given.image_grid_hws)
            model(ids, *pictures)
        after = tape["decoder.layers.0"][0]
        x = _stream(model, ids, None if layer else given)
        del theirs  # rounding ours does not free what theirs still holds
        rounded = _rounded(model, x)
        first = None if found.first is None else _at(found.first, layer)
        yield Piece(layer, _at(worst, layer), first, len({one.site for one in all_of_them}), ids.numel(), *rounded)
        stream = after
        del model


def _piece(shards: Shards, config: KimiVLConfig, layer: int, stream: Tensor | None) -> KimiVL:
    """A model of one decoder layer in float32; from the second on, its embedding is the stream (B, T, D)."""
    text = config.text
    count = text.vocab_size if stream is None or layer == text.num_hidden_layers - 1 else stream[..., 0].numel() + 1
    assert stream is None or stream[..., 0].numel() < count
    small = replace(
        text,
        num_hidden_layers=1,
        first_k_dense_replace=int(layer < text.first_k_dense_replace),
        vocab_size=count,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    placeholder = config.media_placeholder_token_id if stream is None else count - 1
    vision = config.vision if stream is None else NO_TOWER
    model = empty_model(KimiVLConfig(vision, small, placeholder, "float32"), "cpu", torch.float32)
    for parameter in model.vision.parameters():
        nn.init.zeros_(parameter)
    for parameter in model.projector.parameters():
        nn.init.zeros_(parameter)
    fill = Filling(model)
    mine = "language_model.model.layers.0."
    for name in list(fill.missing):
        if name == EMBEDDING and stream is not None:
            table = torch.zeros(count, text.hidden_size)
            table[: stream[..., 0].numel()] = stream.flatten(0, 1)
            fill.put(name, table, "the stream")
        elif name == HEAD:
            fill.put(name, shards[name][:count], "the shards")
        elif name.startswith(mine):
            fill.put(name, shards[name.replace(mine, f"language_model.model.layers.{layer}.")], "the shards")
        elif stream is None or name.startswith("language_model."):
            fill.put(name, shards[name], "the shards")
    return model


def _stream(model: KimiVL, ids: Tensor, given: Probe | None) -> Tensor:
    """What reaches the layer, (B, T, D): pictures in place where the piece has any."""
    with torch.no_grad():
        return model.embedded(ids, None if given is None else model.see(given.pixel_values, given.image_grid_hws))


@torch.no_grad()
def _rounded(model: KimiVL, stream: Tensor) -> tuple[int, float, float, float]:
    """The layer in bfloat16: flips, the largest margin of one, the output's difference with free and with pinned experts.

    The model is rounded in place.
    """
    text, ids = model.config.text, torch.arange(stream[..., 0].numel()).view(stream.shape[:2])
    # the stream in the place of the embedding, here for the first piece too; the logits play no part
    model.config = replace(model.config, text=replace(text, vocab_size=ids.numel()))
    model.embedded.weight = nn.Parameter(stream.flatten(0, 1), requires_grad=False)
    model.logits.weight = nn.Parameter(model.logits.weight[: ids.numel()].clone(), requires_grad=False)
    theirs = as_decoder(model.to(torch.bfloat16))
    router, out = "decoder.layers.0.ffn.router", "decoder.layers.0"
    routed = not text.first_k_dense_replace
    read = [out, *([f"{router}.chosen", f"{router}.scores"] if routed else [])]
    with attach(model, read) as ours:
        model.decoder(model.embedded(ids))
    with attach(theirs, read) as free:
        theirs(input_ids=ids, use_cache=False)
    if not routed:
        gap = _relative(ours[out][0], free[out][0])
        return 0, float("nan"), gap, gap
    mine, other = ours[f"{router}.chosen"][0], free[f"{router}.chosen"][0]
    flipped = (mine.sort(-1).values != other.sort(-1).values).any(-1)
    biased = ours[f"{router}.scores"][0] + model.decoder.layers[0].ffn.router.chosen.bias  # type: ignore[union-attr]
    best = biased.topk(min(text.num_experts_per_tok + 1, text.n_routed_experts), dim=-1).values
    margins = (best[..., -2] - best[..., -1])[flipped]
    with attach(theirs, [out], edit={f"{router}.chosen": lambda value, site: mine.to(value.dtype)}) as pinned:
        theirs(input_ids=ids, use_cache=False)
    margin = float(margins.max()) if len(margins) else float("nan")
    return int(flipped.sum()), margin, _relative(ours[out][0], free[out][0]), _relative(ours[out][0], pinned[out][0])


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt() / torch.maximum(a.square().mean(), b.square().mean()).sqrt())


def check_deep(report: Report, source: str, to: Path | None = None, *, progress: bool = False) -> list[Piece]:
    """Adds a line for the sites, one for the routing, and one for each layer that differs; writes the table to a file.

    Raises ValueError where transformers is not installed, or for a position table that it does not know.
    """
    folder, name = locate(source)
    start, found = time.monotonic(), []
    layers = read_config(folder).text.num_hidden_layers
    for piece in tqdm(pieces(folder), total=layers, desc="layers", disable=not progress, leave=False):
        found.append(piece)
    for piece in found:
        if piece.first is not None:
            report.add("deep", "FAIL", f"layer {piece.layer} in float32: the first site that differs is {piece.first}")
        elif not piece.agrees:
            says = f"layer {piece.layer} in bfloat16 differs by {piece.pinned:.1e} with the same experts"
            report.add("deep", "FAIL", says)
    worst, seconds = max(piece.worst.relative for piece in found), time.monotonic() - start
    if all(piece.agrees for piece in found):
        says = f"{sum(piece.sites for piece in found)} sites of {layers} layers agree with transformers"
        report.add("deep", "ok", f"{says} in float32, to {worst:.0e} of their size; {seconds:.0f} s")
    routed = [piece for piece in found if piece.layer >= read_config(folder).text.first_k_dense_replace]
    flips, tokens = sum(p.flips for p in routed), sum(p.tokens for p in routed)
    free, pinned = (max(getattr(p, key) for p in found) for key in ("free", "pinned"))
    says = f"in bfloat16 {flips} of {tokens} choices differ; layers differ by up to {free:.1e}, {pinned:.1e} with ours pinned"
    report.add("deep routing", "ok" if pinned <= TOLERANCE else "FAIL", says)
    if to is not None:
        to.write_text("\n".join([*table(name, found), "", *report.lines()[1:]]) + "\n", encoding="utf-8")
        report.add("deep report", "ok", f"{to}; attach it to an issue")
    return found


def _at(one: Difference, layer: int) -> Difference:
    """The difference under the name that its site has in the whole model."""
    return replace(one, site=one.site.replace("decoder.layers.0", f"decoder.layers.{layer}"))


def table(name: str, found: list[Piece]) -> list[str]:
    """The report as Markdown: what was run with what, and a row for each layer."""
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "safetensors"))
    head = "layer | sites | worst in float32 | at | flips | margin | bfloat16 free | bfloat16 pinned"
    rows: list[Any] = [
        f"{p.layer} | {p.sites} | {p.worst.relative:.1e} | {p.worst.site} | {p.flips} of {p.tokens} | {p.margin:.1e} | "
        f"{p.free:.1e} | {p.pinned:.1e}"
        for p in found
    ]
    return [
        f"# {name} against transformers",
        "",
        f"{packages}, Python {platform.python_version()}, {platform.machine()}; differences are relative, root mean square",
        "",
        *(f"| {row} |" for row in (head, " | ".join(["---"] * 8), *rows)),
    ]
