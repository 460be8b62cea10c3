"""The same thing computed in two ways by our own code: cores, experts, cache, packs, batches, precisions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from agreement import (
    FLOAT32,
    FLOAT64,
    assert_agree,
    gap,
    load_case,
    our_outputs,
    text_outputs,
    vision_outputs,
)
from kimi_vl_ref.attention import AbsorbedCore, ExpandedCore, ExplicitCore
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.moe import Experts, MoE, grouped_linear, padded_grouped_linear
from kimi_vl_ref.vision import ExplicitPackedCore
from peers import Case, random_case

BOTH = pytest.mark.parametrize(
    ("dtype", "limits"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)], ids=["fp32", "fp64"]
)
SEEDS = pytest.mark.parametrize("seed", range(200, 204))


# --- attention cores and experts ----------------------------------------------------------------------------


@BOTH
@SEEDS
def test_attention_cores_agree(seed: int, dtype: torch.dtype, limits: dict[str, float]) -> None:
    """Prefill, one-token decode, and a chunk of two tokens behind a cache, by each core in all layers."""
    case = random_case(seed).to(dtype)
    model = load_case(case, dtype)
    usual = outputs_with_chunk(model, case)
    for core in (ExpandedCore(), AbsorbedCore(), ExplicitCore()):
        for layer in model.decoder.layers:
            layer.attn.core = core
        assert_agree(outputs_with_chunk(model, case), usual, limits | {"chunk": limits["logits"]})


@torch.no_grad()
def outputs_with_chunk(model: KimiVL, case: Case) -> dict[str, Tensor]:
    cache = model.new_cache(len(case.input_ids))
    model(case.input_ids, case.pixel_values, case.image_grid_hws, cache=cache)
    chunk = model.logits(model(case.decode_ids[:, :2], cache=cache))
    return text_outputs(model, case, pictures=True) | {"chunk": chunk}


@BOTH
@SEEDS
def test_vision_cores_agree(seed: int, dtype: torch.dtype, limits: dict[str, float]) -> None:
    case = random_case(seed).to(dtype)
    model = load_case(case, dtype)
    packed = vision_outputs(model, case)
    for layer in model.vision.layers:
        layer.attn.core = ExplicitPackedCore()
    assert_agree(vision_outputs(model, case), packed, limits)


class LoopedExperts(nn.Module):
    """Token by token and expert by expert, as the formula reads."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for b, t in itertools.product(*map(range, x.shape[:2])):
            for expert, weight in zip(chosen[b, t], weights[b, t], strict=True):
                gate, up = (self.experts.gate_up[expert] @ x[b, t]).chunk(2)
                y[b, t] += weight * (self.experts.down[expert] @ (nn.functional.silu(gate) * up))
        return y


@BOTH
@SEEDS
@torch.no_grad()
def test_grouped_experts_are_the_looped_experts(
    seed: int, dtype: torch.dtype, limits: dict[str, float]
) -> None:
    """Even seeds have widths for the fused grouped product in float32, odd ones take the padded one."""
    case = random_case(seed)
    model = load_case(case, dtype)
    grouped = our_outputs(model, case)
    for layer in model.decoder.layers:
        if isinstance(layer.ffn, MoE):
            layer.ffn.experts = LoopedExperts(layer.ffn.experts)
    assert_agree(our_outputs(model, case), grouped, limits)


@pytest.mark.parametrize(
    "load", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], ids=str
)
@pytest.mark.parametrize("shape", [(8, 12), (7, 5)], ids=["fused", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_product_for_any_load(load: list[int], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Experts that nobody chose, one that everybody chose, no token at all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(load), shape[0], generator=generator, dtype=dtype)
    weight = torch.randn(len(load), shape[1], shape[0], generator=generator, dtype=dtype)
    expected = torch.cat([rows @ weight[e].T for e, rows in enumerate(x.split(load))])
    for product in (grouped_linear, padded_grouped_linear):
        torch.testing.assert_close(product(x, weight, torch.tensor(load)), expected)


# --- one pass or many ---------------------------------------------------------------------------------------


@BOTH
@SEEDS
@pytest.mark.parametrize("chunk", [1, 5])
@torch.no_grad()
def test_prefill_is_the_same_in_pieces(
    seed: int, chunk: int, dtype: torch.dtype, limits: dict[str, float]
) -> None:
    """Pieces cut through pictures: the stream is embedded once and read in pieces."""
    case = random_case(seed).to(dtype)
    model = load_case(case, dtype)
    stream = model.embedded(case.input_ids, model.see(case.pixel_values, case.image_grid_hws))
    cache = model.new_cache(len(stream))
    pieces = [model.logits(model.decoder(piece, cache=cache)) for piece in stream.split(chunk, dim=1)]
    assert cache.lengths.tolist() == [stream.shape[1]] * len(stream)
    whole = model.logits(model(case.input_ids, case.pixel_values, case.image_grid_hws))
    assert gap(torch.cat(pieces, dim=1), whole) <= limits["logits"]


@torch.no_grad()
def test_a_second_turn_brings_its_own_pictures() -> None:
    model, rows = ragged_rows(200, torch.float64)
    (ids, pixels, grids), (more_ids, more_pixels, more_grids) = rows[0], rows[2]
    cache = model.new_cache(1)
    turns = [
        model(ids[None], pixels, grids, cache=cache),
        model(more_ids[None], more_pixels, more_grids, cache=cache),
    ]
    at_once = model(
        torch.cat([ids, more_ids])[None], torch.cat([pixels, more_pixels]), torch.cat([grids, more_grids])
    )
    assert gap(model.logits(torch.cat(turns, dim=1)), model.logits(at_once)) <= FLOAT64["logits"]


# --- packs and batches --------------------------------------------------------------------------------------


@BOTH
@SEEDS
@torch.no_grad()
def test_a_pack_of_pictures_is_each_alone(seed: int, dtype: torch.dtype, limits: dict[str, float]) -> None:
    case = random_case(seed).to(dtype)
    model = load_case(case, dtype)
    counts = case.image_grid_hws.prod(-1).tolist()
    alone = [
        vision_outputs(model, replace(case, pixel_values=pixels, image_grid_hws=grid))
        for pixels, grid in zip(case.pixel_values.split(counts), case.image_grid_hws.split(1), strict=True)
    ]
    assert_agree(
        vision_outputs(model, case),
        {name: torch.cat([one[name] for one in alone]) for name in alone[0]},
        limits,
    )


@BOTH
@SEEDS
@torch.no_grad()
def test_a_batch_is_each_prompt_alone(seed: int, dtype: torch.dtype, limits: dict[str, float]) -> None:
    """Ragged rows with several, one and no pictures; a ragged second turn of text; then token by token."""
    model, rows = ragged_rows(seed, dtype)
    turns = [torch.arange(3, 3 + n) for n in (2, 6, 1, 4)]
    singles = []
    for (ids, pixels, grids), turn in zip(rows, turns, strict=True):
        cache = model.new_cache(1)
        pictures = (pixels, grids) if len(grids) else ()
        parts = [model(ids[None], *pictures, cache=cache), model(turn[None], cache=cache)]
        parts += [model(torch.tensor([[token]]), cache=cache) for token in (7, 8, 9)]
        singles.append([model.logits(part)[0] for part in parts])

    cache = model.new_cache(len(rows))
    ids, lengths = pad([row[0] for row in rows])
    turn_ids, turn_lengths = pad(turns)
    pixels, grids = (torch.cat([row[i] for row in rows]) for i in (1, 2))
    parts = [model(ids, pixels, grids, lengths=lengths, cache=cache)]
    without_cache = model(ids, pixels, grids, lengths=lengths)
    assert gap(without_cache, parts[0]) <= limits["logits"]
    parts.append(model(turn_ids, lengths=turn_lengths, cache=cache))
    parts += [model(torch.full((len(rows), 1), token), cache=cache) for token in (7, 8, 9)]
    assert cache.lengths.tolist() == (lengths + turn_lengths + 3).tolist()

    for part, name in enumerate(["prompt", "second turn", "token 1", "token 2", "token 3"]):
        logits = model.logits(parts[part])
        for row, single in enumerate(singles):
            distance = gap(logits[row, : len(single[part])], single[part])
            assert distance <= limits["logits"], f"row {row}, {name}: off by {distance:.1e}"


def ragged_rows(seed: int, dtype: torch.dtype) -> tuple[KimiVL, list[tuple[Tensor, Tensor, Tensor]]]:
    """Four prompts of different lengths: ids (T,), pixel_values, image_grid_hws."""
    case = random_case(seed).to(dtype)
    grids = [[(4, 6), (2, 8)], [], [(6, 2)], []]
    generator, placeholder = torch.Generator().manual_seed(seed), case.config["media_placeholder_token_id"]
    patch = case.config["vision_config"]["patch_size"]
    rows = []
    for pictures, words in zip(grids, (5, 9, 2, 1), strict=True):
        ids = torch.randint(placeholder, (words,), generator=generator)
        for h, w in pictures:
            ids = torch.cat([torch.tensor([2]), torch.full((h * w // 4,), placeholder), ids])
        patches = sum(h * w for h, w in pictures)
        pixels = torch.rand(patches, 3, patch, patch, generator=generator, dtype=torch.float32).to(dtype)
        rows.append((ids, pixels, torch.tensor(pictures, dtype=torch.long).reshape(-1, 2)))
    return load_case(case, dtype), rows


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1), lengths


def test_pictures_and_placeholders_must_match() -> None:
    """Too few or too many placeholders, and grids that are not those of the patches, each said in a sentence."""
    model, rows = ragged_rows(200, torch.float32)
    (ids, pixels, grids), (no_pictures, _, _) = rows[0], rows[1]
    for wrong in (ids[1:3], torch.cat([ids, ids[1:2]]), no_pictures):
        with pytest.raises(ValueError, match=r"placeholders but the pictures make 10 visual tokens"):
            model(wrong[None], pixels, grids)
    with pytest.raises(ValueError, match=r"make 24 patches, but pixel_values holds 40"):
        model(ids[None], pixels, grids[:1])


# --- precision ----------------------------------------------------------------------------------------------


@SEEDS
def test_float64_stays_float64(seed: int) -> None:
    case = random_case(seed)
    model = load_case(case, torch.float64)
    seen: set[torch.dtype] = set()
    for module in model.modules():
        module.register_forward_hook(
            lambda _m, _x, out: seen.update(t.dtype for t in [out] if isinstance(t, Tensor))
        )
    outputs = our_outputs(model, case)
    assert {out.dtype for out in outputs.values()} == {torch.float64}
    assert seen == {torch.float64, torch.int64}  # int64: the chosen experts


@SEEDS
def test_bfloat16_stays_near_float32(seed: int) -> None:
    """In the root mean square: single tokens may choose other experts. The weights are rounded for both."""
    case = random_case(seed)
    rounded = {name: t if "bias" in name else t.bfloat16().float() for name, t in case.tensors.items()}
    case = replace(case, tensors=rounded, pixel_values=case.pixel_values.bfloat16().float())
    fine, coarse = our_outputs(load_case(case), case), our_outputs(load_case(case, torch.bfloat16), case)
    for name, expected in fine.items():
        assert coarse[name].dtype == torch.bfloat16
        error = (coarse[name].float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
        assert error < (0.03 if name in ("vision_merged", "image_features") else 0.2), f"{name}: {error:.3f}"


def test_selection_bias_keeps_its_precision() -> None:
    case = random_case(200)
    name = next(name for name in case.tensors if name.endswith("e_score_correction_bias"))
    layer = int(name.split(".")[3])

    def bias(model: KimiVL) -> Tensor:
        return model.decoder.layers[layer].ffn.router.chosen.bias

    assert torch.equal(bias(load_case(case, torch.bfloat16)), case.tensors[name])
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()):
        assert torch.equal(bias(cast(load_case(case))), case.tensors[name])
    assert bias(load_case(case).double()).dtype == torch.float64
