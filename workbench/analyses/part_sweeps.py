"""Loss without one head, and without what one part of a layer writes, each beside a random control of its size (paper I6, and
what I4d does for experts). One case a part, run by `workbench.sweeps.sweep`: stopped, gone on with, on several cores.

Letters: B rows, T tokens, L layers, H heads, v channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_vl_ref import load
from workbench.edits import ablate_heads, ablate_layer, applied
from workbench.tape import Edit, attach

from .ablations import swept
from .result import Result
from .trials import by_domain, score_batches

PARTS = ("attn", "ffn")


def single_heads(
    *,
    path: str | Path,
    model_name: str = "study",
    families: Sequence[str] = ("name", "where", "read"),
    scenes: int = 20,
    first: int = 0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Loss of each head: how much worse the study scenes' answers become when what it read is zero (arXiv 1905.10650).

        result = single_heads(path="heads.jsonl", scenes=200)
        result["loss"]              # (layers, heads, domains) nats a scored token more than with all heads

    "control" zeroes one head of the same layer for each token, drawn at random: as many (token, head) slots. Scenes `first`
    to `first + scenes - 1` of each family. model_name: as for `kimi_vl_ref.load`; `path` and `options` as for
    `ablations.single_experts`. Raises ValueError for a layer that does not exist, SweepError when stopped before the end.
    """
    model, chat = load(model_name)
    depth, heads = len(model.decoder.layers), model.config.text.num_attention_heads
    chosen = list(range(depth)) if layers is None else list(layers)
    if outside := [layer for layer in chosen if not 0 <= layer < depth]:
        raise ValueError(f"layer {outside[0]} does not exist; use some of 0 to {depth - 1}")
    cases = [{"layer": layer, "head": head} for layer in chosen for head in range(heads)]
    settings = {"model": model_name, "families": list(families), "scenes": scenes, "first": first, "seed": seed}
    table, about = swept(model, chat, cases, settings, path=path, work=f"{__name__}:measure_head", **options)
    axes = [("layer", chosen), ("head", range(heads)), ("domain", list(families))]
    return _result("single-heads", "Loss without what one head read, nats a token more", table, axes, about)


def single_layers(
    *,
    path: str | Path,
    model_name: str = "study",
    families: Sequence[str] = ("name", "where", "read"),
    scenes: int = 20,
    first: int = 0,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Loss of each layer's attention and FFN: how much worse answers become when the part writes nothing into the stream.

        result = single_layers(path="layers.jsonl", scenes=200)
        result["loss"]              # (layers, attention and FFN, domains) nats a scored token more

    "control" takes the same part away from one layer drawn at random for each token: as many (token, layer) slots, so it
    says how much of a loss is that layer's and not that of losing any. Otherwise as `single_heads`.
    """
    model, chat = load(model_name)
    layers = list(range(len(model.decoder.layers)))
    cases = [{"layer": layer, "part": part} for layer in layers for part in PARTS]
    settings = {"model": model_name, "families": list(families), "scenes": scenes, "first": first, "seed": seed}
    table, about = swept(model, chat, cases, settings, path=path, work=f"{__name__}:measure_part", **options)
    axes = [("layer", layers), ("part", ["attention", "FFN"]), ("domain", list(families))]
    return _result("single-layers", "Loss without what one part of a layer writes, nats a token more", table, axes, about)


def _result(name: str, title: str, table: list[dict[str, Any]], axes: list[Any], about: dict[str, Any]) -> Result:
    about = {**about, "beware": "taken away one at a time: what two parts can do for each other is not seen"}
    shape = tuple(len(labels) for _, labels in axes)
    values = {value: np.array([one[value] for one in table]).reshape(shape) for value in ("loss", "control")}
    return Result(name, title, values, dict.fromkeys(values, axes), {"loss": 0.0}, about)


def measure_head(shared: Mapping[str, Any], case: Mapping[str, int]) -> dict[str, Any]:
    """One case of `single_heads`: losses by domain without a head, and without a random head of the layer for each token."""
    layer, heads = case["layer"], shared["model"].config.text.num_attention_heads
    generator = torch.Generator().manual_seed(shared["seed"] * 100_003 + layer * 1009 + case["head"])
    control = {f"decoder.layers.{layer}.attn.core": without_one_a_token(heads, generator)}
    return _measured(shared, [ablate_heads(layer, [case["head"]])], control)


def without_one_a_token(heads: int, generator: torch.Generator) -> Edit:
    """An edit of what heads read, (B, T, H, v): zero for one head of each token, drawn anew for each."""

    def edit(core: Tensor, _site: str) -> Tensor:
        drawn = torch.randint(heads, core.shape[:2], generator=generator).to(core.device)
        return core.masked_fill(torch.nn.functional.one_hot(drawn, heads).bool()[..., None], 0)

    return edit


def measure_part(shared: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, Any]:
    """One case of `single_layers`: losses by domain without a part, and without that of a random layer for each token."""
    depth = len(shared["model"].decoder.layers)
    generator = torch.Generator().manual_seed(shared["seed"] * 100_003 + case["layer"] * 1009 + PARTS.index(case["part"]))
    scattered = Scattered(depth, generator)
    control = {f"decoder.layers.{layer}.{case['part']}": scattered.edit(layer) for layer in range(depth)}
    return _measured(shared, [ablate_layer(case["layer"], case["part"])], control)


class Scattered:
    """For each token one layer, drawn anew in each pass; `edit` takes what that layer writes at that token away."""

    def __init__(self, depth: int, generator: torch.Generator):
        self.depth, self.generator = depth, generator
        self.drawn = torch.empty(0)

    def edit(self, layer: int) -> Edit:
        def edit(written: Tensor, _site: str) -> Tensor:
            if layer == 0:
                self.drawn = torch.randint(self.depth, written.shape[:2], generator=self.generator).to(written.device)
            return written.masked_fill((self.drawn == layer)[..., None], 0)

        return edit


def _measured(shared: Mapping[str, Any], changes: list[Any], control: Mapping[str, Edit]) -> dict[str, Any]:
    model, seen, trials, before = (shared[name] for name in ("model", "seen", "trials", "before"))
    with applied(model, changes):
        loss = score_batches(model, seen).nll - before
    with attach(model, edit=control):
        random = score_batches(model, seen).nll - before
    return {"loss": by_domain(trials, loss).tolist(), "control": by_domain(trials, random).tolist()}
