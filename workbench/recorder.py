"""Reads what a run keeps while a model writes: all routing, and of attention the queries.

The queries and the latents of the cache together are every row there could be. Rows are computed at the end: only then is
it known which token belongs to the thought and which to the answer. While tokens come, nothing is converted or copied.
Letters: L layers, H heads, E experts, K chosen, M visual tokens, G roles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kimi_vl_ref import KimiVL
from kimi_vl_ref.cache import LatentCache

from .edits import in_force
from .edits.routing import moe_layers
from .kept import AttentionKept, attention_kept, on_steps
from .rows import decoder_rows
from .tape import Keep

PROMPT_ROWS = 1024  # attention rows kept of the prompt's end; a longer question keeps its last ones
SCRATCH = 1 << 20  # numbers of one (H, rows, S) block while rows are computed
JOINED = 64  # steps whose tensors become one: an object a step would weigh as much as the numbers in it


class Recorder:
    """For one text: attach with `keeps()`, let the model write, `read_last`, and ask for `routing` and `attention`."""

    def __init__(self, model: KimiVL):
        self.model, self.moe_layers = model, moe_layers(model)
        self.first_row: int | None = None
        self.cache: LatentCache | None = None
        queries = [_core(layer) for layer in range(len(model.decoder.layers))]
        routing = [f"{_weights(layer)}{read}" for layer in self.moe_layers for read in ("@in", "")]
        self.read: dict[str, Grown] = {site: Grown() for site in (*queries, *routing)}

    @property
    def nbytes(self) -> int:
        """Bytes held of tokens so far, besides the model's own cache: so many a token, however many came before it."""
        memory = [part.untyped_storage() for site in self.read.values() for part in site]
        return sum({one.data_ptr(): one.nbytes() for one in memory}.values())

    def keeps(self) -> dict[str, Keep | None]:
        """What to read, for `attach`. The inputs of `weights` are the scores and the choice, so one hook sees all three."""
        return {
            "embedded@in": self._keep_prompt,
            "decoder@in": self._keep_cache,
            _core("*"): self._keep_queries,
            f"{_weights('*')}@in": self._keep,
            _weights("*"): self._keep,
        }

    def _keep_prompt(self, inputs: tuple[Any, ...], _site: str) -> None:
        if self.first_row is None:
            ids = inputs[0][0]
            pictures = (ids == self.model.config.media_placeholder_token_id).nonzero()
            self.first_row = max(int(pictures[-1]) + 1 if len(pictures) else 0, len(ids) - PROMPT_ROWS, 0)

    def _keep_cache(self, inputs: tuple[Any, ...], _site: str) -> None:
        self.cache = inputs[2]

    def _keep_queries(self, inputs: tuple[Any, ...], site: str) -> None:
        q_nope, q_rope, latent = inputs[:3]
        assert self.first_row is not None
        if (skipped := self.first_row + q_nope.shape[1] - latent.shape[1]) > 0:
            # a view would keep the queries of the whole prompt alive
            q_nope, q_rope = q_nope[:, skipped:].clone(), q_rope[:, skipped:].clone()
        self.read[site].add((q_nope, q_rope))

    def _keep(self, value: Tensor | tuple[Tensor, ...], site: str) -> None:
        self.read[site].add(value if isinstance(value, tuple) else (value,))

    @torch.inference_mode()
    def read_last(self, token: int) -> None:
        """Gives the model the token it wrote last, so that every token has its routing and its row."""
        self.model(torch.tensor([[token]], device=self.model.logits.weight.device), cache=self.cache)

    @torch.inference_mode()
    def routing(self) -> dict[str, Any]:
        """`chosen`, `weights`, `scores`, `bias` and the layers they belong to, as a Run has them."""
        found: dict[str, list[Tensor]] = {"scores": [], "chosen": [], "weights": []}
        for layer in self.moe_layers:
            scores, chosen = self.read[f"{_weights(layer)}@in"].whole()
            (weights,) = self.read[_weights(layer)].whole()
            for name, tensor in (("scores", scores), ("chosen", chosen), ("weights", weights)):
                found[name].append(tensor[0])
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
        layers = len(self.model.decoder.layers)
        kept = attention_kept(layers, heads, len(roles) - first_row, len(visual), len(names), other, detail)
        first_row = len(roles) - kept.rows
        numbers = {name: at for at, name in enumerate(names)}
        device = self.model.logits.weight.device
        role_of = torch.tensor([numbers[role] for role in roles], device=device)
        member = nn.functional.one_hot(role_of).to(torch.promote_types(self.model.logits.weight.dtype, torch.float32))
        columns = torch.tensor(visual, dtype=torch.long, device=device)
        blocked = any(one.blocked for one in in_force() if one.model is self.model)
        # filled in place: small results that outlive their block would keep the allocator from using its memory again
        shape = (layers, heads if kept.each else 1, kept.rows)
        seen, mass = (torch.empty(*shape, last, dtype=torch.float16) for last in (len(visual), len(names)))
        together = 1 if blocked else max(1, SCRATCH // max(1, heads * kept.rows * len(roles)))  # a batch, for a short text
        for at in range(0, layers, together):
            self._look(range(at, min(at + together, layers)), first_row, columns, member, kept, seen, mass)
        arrays = {"picture_attention": seen.numpy(), "role_names": names, "role_mass": mass.numpy()}
        return {"first_row": first_row, **arrays}, kept

    def _look(
        self, layers: range, first_row: int, visual: Tensor, member: Tensor, kept: AttentionKept, seen: Tensor, mass: Tensor
    ) -> None:
        """Fills `seen` (L, H, rows, M) and `mass` (L, H, rows, G) at these layers, in blocks of rows; H is 1 where only the
        mean is kept.
        """
        assert self.first_row is not None and self.cache is not None
        attns = [self.model.decoder.layers[layer].attn for layer in layers]
        queries = zip(*(self.read[_core(layer)].whole() for layer in layers), strict=True)
        keys = zip(*(self.cache.read(layer) for layer in layers), strict=True)
        q_nope, q_rope = (torch.cat(parts)[:, first_row - self.first_row :] for parts in queries)  # (L, rows, H, n or r)
        latent, k_rope = (torch.cat(parts) for parts in keys)  # (L, S, R or r)
        up = torch.stack([attn.up.weight.view(attn.heads, -1, attn.rank) for attn in attns])  # type: ignore[union-attr, operator]
        (count, heads), slots = q_nope.shape[1:3], torch.arange(latent.shape[1], device=latent.device)
        block = max(1, SCRATCH // (len(layers) * heads * len(slots)))
        here = slice(layers.start, layers.stop)
        for start in range(0, count, block):
            rows = slice(start, min(start + block, count))
            visible = slots <= slots[first_row:][rows, None]
            inputs = (q_nope[:, rows], q_rope[:, rows], latent, k_rope, up, visible[None])
            probs = decoder_rows(inputs, hidden=self._hidden(layers, inputs))  # (L, H, rows, S)
            probs = probs if kept.each else probs.mean(1, keepdim=True)
            looked = probs[..., visual]
            seen[here, :, rows] = (on_steps(looked) if kept.steps else looked.to(torch.float16)).cpu()
            mass[here, :, rows] = (probs @ member.to(probs.dtype)).to(torch.float16).cpu()

    def _hidden(self, layers: range, inputs: tuple[Any, ...]) -> Tensor | None:
        """Keys that changes in force have blocked: the recorded queries know nothing of it. Asked for one layer at a time."""
        here = [one for one in in_force() if one.model is self.model]
        block = next((one.blocked[layers[0]] for one in reversed(here) if layers[0] in one.blocked), None)
        return None if block is None else block.up_to(inputs[2].shape[1]).hidden(inputs)


class Grown:
    """Tensors of one site, as they came along the axis of tokens: one for every JOINED calls, and those since."""

    def __init__(self) -> None:
        self.blocks: list[tuple[Tensor, ...]] = []
        self.fresh: list[tuple[Tensor, ...]] = []

    def add(self, tensors: tuple[Tensor, ...]) -> None:
        self.fresh.append(tensors)
        if len(self.fresh) >= JOINED:
            self.blocks.append(_join(self.fresh))
            self.fresh = []

    def whole(self) -> tuple[Tensor, ...]:
        return _join(self.blocks + self.fresh)

    def __iter__(self) -> Iterator[Tensor]:
        return chain.from_iterable(self.blocks + self.fresh)


def _join(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))


def _core(layer: int | str) -> str:
    return f"decoder.layers.{layer}.attn.core@in"


def _weights(layer: int | str) -> str:
    return f"decoder.layers.{layer}.ffn.router.weights"


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """12 hex digits that tell weights apart: names, shapes and 64 values spread over every tensor."""
    tensors = sorted(model.state_dict(keep_vars=True).items())
    samples = [tensor.flatten()[:: max(1, tensor.numel() // 64)] for _, tensor in tensors]
    values, at = torch.cat(samples).double().cpu().numpy(), 0  # to the host at once
    digest = hashlib.sha256()
    for (name, tensor), sample in zip(tensors, samples, strict=True):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + values[at : at + sample.shape[0]].tobytes())
        at += sample.shape[0]
    return digest.hexdigest()[:12]
