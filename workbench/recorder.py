"""Reads what a run keeps while a model writes: all routing, and of attention the queries.

The queries and the latents of the cache together are every row there could be. Rows are computed at the end: only then is
it known which token belongs to the thought and which to the answer. While tokens come, nothing is converted or copied.
Letters: L layers, H heads, E experts, K chosen, M visual tokens, G roles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import LatentAttention
from kimi_vl_ref.cache import LatentCache

from .edits import in_force
from .edits.routing import moe_layers
from .kept import AttentionKept, attention_kept, on_steps
from .rows import decoder_rows
from .tape import Keep

PROMPT_ROWS = 1024  # attention rows kept of the prompt's end; a longer question keeps its last ones
SCRATCH = 1 << 24  # numbers of one (H, rows, S) block while rows are computed


class Recorder:
    """For one text: attach with `keeps()`, let the model write, `read_last`, and ask for `routing` and `attention`."""

    def __init__(self, model: KimiVL):
        self.model, self.moe_layers = model, moe_layers(model)
        self.first_row: int | None = None
        self.cache: LatentCache | None = None
        self.chosen_by: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self.moe_layers}  # scores, chosen
        self.weights: dict[int, list[Tensor]] = {layer: [] for layer in self.moe_layers}
        layers = range(len(model.decoder.layers))
        self.given = dict.fromkeys(layers, 0)  # tokens each core has been given
        self.queries: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def keeps(self) -> dict[str, Keep | None]:
        """What to read, for `attach`. The inputs of `weights` are the scores and the choice, so one hook sees all three."""
        cores: dict[str, Keep | None] = {f"decoder.layers.{i}.attn.core@in": self._keeper(i) for i in self.queries}
        inputs = {f"decoder.layers.{i}.ffn.router.weights@in": _appender(self.chosen_by[i]) for i in self.moe_layers}
        weights = {f"decoder.layers.{i}.ffn.router.weights": _appender(self.weights[i]) for i in self.moe_layers}
        return {"embedded@in": self._keep_prompt, "decoder@in": self._keep_cache, **cores, **inputs, **weights}

    def _keep_prompt(self, inputs: tuple[Any, ...], _site: str) -> None:
        if self.first_row is None:
            ids = inputs[0][0]
            pictures = (ids == self.model.config.media_placeholder_token_id).nonzero()
            self.first_row = max(int(pictures[-1]) + 1 if len(pictures) else 0, len(ids) - PROMPT_ROWS, 0)

    def _keep_cache(self, inputs: tuple[Any, ...], _site: str) -> None:
        self.cache = inputs[2]

    def _keeper(self, layer: int) -> Keep:
        queries, given = self.queries[layer], self.given

        def keep(inputs: tuple[Any, ...], _site: str) -> None:
            q_nope, q_rope = inputs[:2]
            assert self.first_row is not None
            if (skipped := self.first_row - given[layer]) > 0:  # a view would keep the queries of the whole prompt alive
                q_nope, q_rope = q_nope[:, skipped:].clone(), q_rope[:, skipped:].clone()
            given[layer] += inputs[0].shape[1]
            queries.append((q_nope, q_rope))

        return keep

    @torch.inference_mode()
    def read_last(self, token: int) -> None:
        """Gives the model the token it wrote last, so that every token has its routing and its row."""
        self.model(torch.tensor([[token]], device=self.model.logits.weight.device), cache=self.cache)

    @torch.inference_mode()
    def routing(self) -> dict[str, Any]:
        """`chosen`, `weights`, `scores`, `bias` and the layers they belong to, as a Run has them."""
        found: dict[str, list[Tensor]] = {"scores": [], "chosen": [], "weights": []}
        for layer in self.moe_layers:
            scores, chosen = zip(*self.chosen_by[layer], strict=True)
            for name, parts in (("scores", scores), ("chosen", chosen), ("weights", self.weights[layer])):
                found[name].append(torch.cat(list(parts), dim=1)[0])
        dtypes = {"scores": torch.float16, "chosen": torch.int16, "weights": torch.float16}
        arrays = {name: torch.stack(found[name]).to(dtype).cpu().numpy() for name, dtype in dtypes.items()}
        routers = [self.model.get_submodule(f"decoder.layers.{layer}.ffn.router.chosen") for layer in self.moe_layers]
        bias = torch.stack([router.bias for router in routers]).float().cpu().numpy()  # type: ignore[arg-type, union-attr]
        chosen = arrays.pop("chosen").astype(np.uint16)
        return {"moe_layers": self.moe_layers, "n_experts": bias.shape[1], "chosen": chosen, **arrays, "bias": bias}

    @torch.inference_mode()
    def attention(
        self, roles: Sequence[str], prompt_length: int, other: int, detail: str
    ) -> tuple[dict[str, Any], AttentionKept]:
        """`first_row`, `picture_attention`, `role_names` and `role_mass`, as a Run has them, and what was kept of them."""
        assert self.first_row is not None
        asked = [t for t in range(self.first_row, prompt_length) if roles[t] == "user"]
        first_row = asked[0] if asked else self.first_row
        visual = [t for t, role in enumerate(roles) if role.startswith("image ")]
        names = list(dict.fromkeys(roles))
        heads = self.model.config.text.num_attention_heads
        kept = attention_kept(len(self.queries), heads, len(roles) - first_row, len(visual), len(names), other, detail)
        first_row = len(roles) - kept.rows
        numbers = {name: at for at, name in enumerate(names)}
        device = self.model.logits.weight.device
        role_of = torch.tensor([numbers[role] for role in roles], device=device)
        columns = torch.tensor(visual, dtype=torch.long, device=device)
        layers = [self._layer(layer, first_row, columns, role_of, kept) for layer in self.queries]
        seen, mass = (np.stack(parts) for parts in zip(*layers, strict=True))
        return {"first_row": first_row, "picture_attention": seen, "role_names": names, "role_mass": mass}, kept

    def _layer(self, layer: int, first_row: int, visual: Tensor, role_of: Tensor, kept: AttentionKept) -> tuple[Any, Any]:
        """(H, rows, M) and (H, rows, G) of one layer, in blocks of rows; H is 1 where only the mean is kept."""
        assert self.first_row is not None and self.cache is not None
        skip, attn = first_row - self.first_row, self.model.decoder.layers[layer].attn
        assert isinstance(attn, LatentAttention)
        q_nope, q_rope = (torch.cat(parts, dim=1)[:, skip:] for parts in zip(*self.queries[layer], strict=True))
        latent, k_rope = self.cache.read(layer)
        up = attn.up.weight.view(attn.heads, -1, attn.rank)
        count, keys = q_nope.shape[1], latent.shape[1]
        member = nn.functional.one_hot(role_of).to(torch.promote_types(latent.dtype, torch.float32))
        block = max(1, SCRATCH // (q_nope.shape[2] * keys))
        seen, mass = [], []
        for start in range(0, count, block):
            rows = torch.arange(start, min(start + block, count), device=latent.device)
            visible = torch.arange(keys, device=latent.device) <= (first_row + rows)[:, None]
            inputs = (q_nope[:, rows], q_rope[:, rows], latent, k_rope, up, visible[None])
            probs = decoder_rows(inputs, hidden=self._hidden(layer, inputs))[0]  # (H, rows, S)
            probs = probs if kept.each else probs.mean(0, keepdim=True)
            looked = probs[..., visual]
            seen.append((on_steps(looked) if kept.steps else looked.to(torch.float16)).cpu())
            mass.append((probs @ member.to(probs.dtype)).to(torch.float16).cpu())
        return torch.cat(seen, dim=1).numpy(), torch.cat(mass, dim=1).numpy()

    def _hidden(self, layer: int, inputs: tuple[Any, ...]) -> Tensor | None:
        """Keys that changes in force have blocked: the recorded queries know nothing of it."""
        here = [one for one in in_force() if one.model is self.model]
        block = next((one.blocked[layer] for one in reversed(here) if layer in one.blocked), None)
        return None if block is None else block.up_to(inputs[2].shape[1]).hidden(inputs)


def _appender(entries: list[Any]) -> Keep:
    """Keeps on a list of its own, so that the tape need not add up bytes call by call."""
    return lambda value, _site: entries.append(value)


def fingerprint(model: nn.Module) -> str:
    """12 hex digits that tell weights apart: names, shapes and 64 values spread over every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].double().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:12]
