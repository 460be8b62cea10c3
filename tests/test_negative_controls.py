"""Each known way of getting Kimi-VL slightly wrong, done on purpose, must turn the peer comparison red.

The comparison is the fidelity tests' own, in float32, and names the first output that is off.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from agreement import assert_agree, load_case, our_outputs
from kimi_vl_ref import attention, vision
from kimi_vl_ref.cache import LatentCache
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.moe import MoE, Router, Scores
from kimi_vl_ref.projector import Merge, Projector
from kimi_vl_ref.rope import Rotation
from kimi_vl_ref.vision import Grids, Packing, PositionTable, VisionFFN
from peers import Case, peer_outputs, random_case

# Errors of an epsilon show where the stream is small; errors of an activation function where it is not.
QUIET = {
    "vision_tower.patch_embed": 0.05,
    ".wo.": 0.05,
    ".fc1.": 0.05,
    "final_layernorm": 0.2,
    "embed_tokens": 0.05,
    "kv_a_proj": 0.05,
    "o_proj": 0.05,
    "down_proj": 0.05,
}
Patch = pytest.MonkeyPatch
Break = Callable[[KimiVL, Patch], None]


@pytest.fixture(scope="module")
def loud() -> tuple[Case, dict[str, Tensor]]:
    return case_with_peer(scales={})


@pytest.fixture(scope="module")
def quiet() -> tuple[Case, dict[str, Tensor]]:
    return case_with_peer(scales=QUIET)


def case_with_peer(scales: dict[str, float]) -> tuple[Case, dict[str, Tensor]]:
    """Released rms_norm_eps, normalised weights and factor; two pictures, smaller than the position table."""
    case = random_case(8, scales=scales)
    return case, peer_outputs(case)


# --- in the picture -----------------------------------------------------------------------------------------


def erf_gelu_in_the_tower(model: KimiVL, patch: Patch) -> None:
    patch.setattr(VisionFFN, "forward", lambda self, x: self.fc1(F.gelu(self.fc0(x))))


def layer_norm_eps_in_the_blocks(model: KimiVL, patch: Patch) -> None:
    for layer in model.vision.layers:
        layer.attn_norm.eps = layer.ffn_norm.eps = 1e-6


def layer_norm_eps_at_the_end_of_the_tower(model: KimiVL, patch: Patch) -> None:
    model.vision.norm.eps = 1e-6


def rope_row_and_column_swapped(model: KimiVL, patch: Patch) -> None:
    relay_rotation(patch, lambda pairs: pairs.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def rope_half_columns_half_rows(model: KimiVL, patch: Patch) -> None:
    relay_rotation(patch, lambda pairs: pairs.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2))


def relay_rotation(patch: Patch, relay: Callable[[Tensor], Tensor]) -> None:
    right = vision.rotation_2d
    patch.setattr(vision, "rotation_2d", lambda *args: tuple(relay(part) for part in right(*args)))


def rope_in_halves_in_the_tower(model: KimiVL, patch: Patch) -> None:
    patch.setattr(vision, "rotate", rotate_halves)


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Pairs channel j with j + d/2 instead of its neighbour."""
    cos, sin = (part[..., None, :] for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def stretching(**options: object) -> Break:
    def apply(model: KimiVL, patch: Patch) -> None:
        def stretch(self: PositionTable, grid: tuple[int, int]) -> Tensor:
            table = F.interpolate(self.weight.permute(2, 0, 1)[None], size=grid, **options)  # type: ignore[arg-type]
            return table[0].flatten(1).T

        patch.setattr(PositionTable, "_stretch", stretch)

    return apply


def merging(order: str) -> Break:
    def apply(model: KimiVL, patch: Patch) -> None:
        def forward(self: Merge, x: Tensor, grids: Grids) -> Tensor:
            parts = x.split([h * w for h, w in grids])
            sizes = [{"h": h // 2, "a": 2, "w": w // 2, "b": 2} for h, w in grids]
            merged = [
                rearrange(part, f"(h a w b) v -> {order} v", **size)
                for part, size in zip(parts, sizes, strict=True)
            ]
            return torch.cat(merged)

        patch.setattr(Merge, "forward", forward)

    return apply


def pictures_see_each_other(model: KimiVL, patch: Patch) -> None:
    right = Packing.__init__

    def one_pack(self: Packing, grids: Grids, device: torch.device) -> None:
        right(self, [(1, sum(h * w for h, w in grids))], device)

    patch.setattr(Packing, "__init__", one_pack)


# --- in the projector ---------------------------------------------------------------------------------------


def tanh_gelu_in_the_projector(model: KimiVL, patch: Patch) -> None:
    def forward(self: Projector, x: Tensor, grids: Grids) -> Tensor:
        x = self.norm(self.merged(x, grids)).flatten(1)
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))

    patch.setattr(Projector, "forward", forward)


def layer_norm_eps_in_the_projector(model: KimiVL, patch: Patch) -> None:
    model.projector.norm.eps = 1e-6


# --- in the decoder -----------------------------------------------------------------------------------------


def routers(model: KimiVL) -> list[Router]:
    return [layer.ffn.router for layer in model.decoder.layers if isinstance(layer.ffn, MoE)]


def bias_in_the_weights(model: KimiVL, patch: Patch) -> None:
    def forward(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores(x)
        chosen = self.chosen(scores)
        return chosen, self.weights(scores + self.chosen.bias, chosen)

    patch.setattr(Router, "forward", forward)


def bias_not_in_the_choice(model: KimiVL, patch: Patch) -> None:
    for router in routers(model):
        router.chosen.bias.zero_()


def scaling_factor_skipped(model: KimiVL, patch: Patch) -> None:
    for router in routers(model):
        router.weights.scale = 1.0


def weights_not_normalised(model: KimiVL, patch: Patch) -> None:
    for router in routers(model):
        router.weights.normalise = False


def softmax_scores(model: KimiVL, patch: Patch) -> None:
    patch.setattr(Scores, "forward", lambda self, x: F.linear(x, self.weight).softmax(-1))


def shared_expert_scaled(model: KimiVL, patch: Patch) -> None:
    for layer in model.decoder.layers:
        if isinstance(layer.ffn, MoE):
            layer.ffn.shared.register_forward_hook(lambda _module, _inputs, out: out * 2.446)


def latent_norm_eps(model: KimiVL, patch: Patch) -> None:
    for layer in model.decoder.layers:
        layer.attn.latent.eps = 1e-5


def stream_norm_eps(model: KimiVL, patch: Patch) -> None:
    for layer in model.decoder.layers:
        layer.attn_norm.eps = layer.ffn_norm.eps = 1e-6


def rope_in_halves_in_the_decoder(model: KimiVL, patch: Patch) -> None:
    patch.setattr(attention, "rotate", rotate_halves)


def another_latent_cached_than_used(model: KimiVL, patch: Patch) -> None:
    """A cache that holds something else than what a prefill used shows in decoding only."""
    right = LatentCache.write

    def write(self: LatentCache, layer: int, latent: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        stored, k_rope = right(self, layer, latent * 1.01, *rest)
        return (latent if self.filled == 0 else stored), k_rope

    patch.setattr(LatentCache, "write", write)


def no_rotation_when_decoding(model: KimiVL, patch: Patch) -> None:
    right = attention.rotate
    patch.setattr(attention, "rotate", lambda x, r: x if x.shape[1] == 1 else right(x, r))


CONTROLS = {
    "erf GELU in the tower": ("loud", "vision_merged", erf_gelu_in_the_tower),
    "LayerNorm eps 1e-6 in the blocks": ("quiet", "vision_merged", layer_norm_eps_in_the_blocks),
    "LayerNorm eps 1e-6 at the end of the tower": (
        "quiet",
        "vision_merged",
        layer_norm_eps_at_the_end_of_the_tower,
    ),
    "RoPE row and column swapped": ("loud", "vision_merged", rope_row_and_column_swapped),
    "RoPE half columns, half rows": ("loud", "vision_merged", rope_half_columns_half_rows),
    "RoPE in halves in the tower": ("loud", "vision_merged", rope_in_halves_in_the_tower),
    "align_corners": ("loud", "vision_merged", stretching(mode="bicubic", align_corners=True)),
    "antialias": ("loud", "vision_merged", stretching(mode="bicubic", antialias=True)),
    "bilinear": ("loud", "vision_merged", stretching(mode="bilinear")),
    "merge order transposed in the cell": ("loud", "vision_merged", merging("(h w) (b a)")),
    "merge order of the cells transposed": ("loud", "vision_merged", merging("(w h) (a b)")),
    "pictures see each other": ("loud", "vision_merged", pictures_see_each_other),
    "tanh GELU in the projector": ("loud", "image_features", tanh_gelu_in_the_projector),
    "LayerNorm eps 1e-6 in the projector": ("quiet", "image_features", layer_norm_eps_in_the_projector),
    "bias used in the weights": ("loud", "logits", bias_in_the_weights),
    "bias not used in the choice": ("loud", "logits", bias_not_in_the_choice),
    "2.446 skipped": ("loud", "logits", scaling_factor_skipped),
    "weights not normalised": ("loud", "logits", weights_not_normalised),
    "softmax scores": ("loud", "logits", softmax_scores),
    "shared expert scaled": ("loud", "logits", shared_expert_scaled),
    "kv_a_layernorm eps 1e-5": ("quiet", "logits", latent_norm_eps),
    "RMSNorm eps 1e-6 in the stream": ("quiet", "logits", stream_norm_eps),
    "RoPE in halves in the decoder": ("loud", "logits", rope_in_halves_in_the_decoder),
    "another latent cached than used": ("loud", "decode_logits", another_latent_cached_than_used),
    "no rotation when decoding": ("loud", "decode_logits", no_rotation_when_decoding),
}


@pytest.mark.parametrize("name", ["loud", "quiet"])
def test_untouched_model_agrees(name: str, request: pytest.FixtureRequest) -> None:
    case, theirs = request.getfixturevalue(name)
    assert_agree(our_outputs(load_case(case), case), theirs)


@pytest.mark.parametrize("control", CONTROLS)
def test_control_turns_the_comparison_red(
    control: str, request: pytest.FixtureRequest, monkeypatch: Patch
) -> None:
    name, first_off, get_it_wrong = CONTROLS[control]
    case, theirs = request.getfixturevalue(name)
    model = load_case(case)
    get_it_wrong(model, monkeypatch)
    with pytest.raises(AssertionError, match=f"^{first_off} is off by"):
        assert_agree(our_outputs(model, case), theirs)
