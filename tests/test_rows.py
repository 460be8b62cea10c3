"""Rows computed afresh are the probabilities of the explicit cores, whatever the prompt, the cache and the precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import ExplicitCore
from kimi_vl_ref.vision import ExplicitPackedCore
from tiny import tiny_inputs, tiny_model
from workbench.rows import decoder_rows, vision_rows
from workbench.tape import Tape, attach

CORE, VISION = "decoder.layers.*.attn.core", "vision.layers.*.attn.core"
TURNS = [(19, 12), (2, 4), (1, 1), (1, 1)]  # how many tokens the two rows are given in each call
PRECISIONS = pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)


@torch.no_grad()
def conversation(model: KimiVL, dtype: torch.dtype) -> None:
    """Three pictures in two ragged rows, a second turn of several tokens, then single ones."""
    cache, (first, second, *singles) = model.new_cache(2), map(torch.tensor, TURNS)
    model(*tiny_inputs(dtype=dtype), lengths=first, cache=cache)
    model(torch.arange(8).reshape(2, 4), lengths=second, cache=cache)
    for _ in singles:
        model(torch.full((2, 1), 5), cache=cache)


def explicit(dtype: torch.dtype) -> Tape:
    """Inputs of every core, and the probabilities that the explicit cores made of them."""
    model = tiny_model(dtype=dtype)
    swap = {CORE: lambda original: ExplicitCore(), VISION: lambda original: ExplicitPackedCore()}
    with attach(model, read=[f"{CORE}@in", f"{CORE}.probs", f"{VISION}@in", f"{VISION}.probs"], swap=swap) as tape:
        conversation(model, dtype)
    return tape


@PRECISIONS
def test_decoder_rows_are_the_explicit_probabilities(dtype: torch.dtype, limit: float) -> None:
    tape = explicit(dtype)
    for layer in range(3):
        site = f"decoder.layers.{layer}.attn.core"
        calls = list(zip(tape[f"{site}@in"], tape[f"{site}.probs"], strict=True))
        assert [probs.shape[2:] for _, probs in calls] == [(19, 19), (4, 23), (1, 24), (1, 25)]
        for (inputs, probs), lengths in zip(calls, TURNS, strict=True):
            for row, length in enumerate(lengths):  # what padding read is overwritten in the cache by the next call
                assert apart(decoder_rows(inputs, slice(length))[row], probs[row, :, :length]) <= limit
                assert apart(decoder_rows(inputs, [length - 1, 0])[row], probs[row][:, [length - 1, 0]]) <= limit


@torch.no_grad()
def test_rows_taken_while_the_model_runs_hold_for_padding_too() -> None:
    model = tiny_model()
    read = {f"{CORE}@in": lambda inputs, site: decoder_rows(inputs), f"{CORE}.probs": lambda probs, site: probs.clone()}
    with attach(model, read=read, swap={CORE: lambda original: ExplicitCore()}) as tape:
        conversation(model, torch.float32)
    for rows, probs in zip(tape["decoder.layers.1.attn.core@in"], tape["decoder.layers.1.attn.core.probs"], strict=True):
        assert apart(rows, probs) <= 1e-6


@PRECISIONS
def test_vision_rows_are_the_explicit_probabilities(dtype: torch.dtype, limit: float) -> None:
    """The explicit core runs its softmax once a picture, but the three calls share one site: each is one entry."""
    tape = explicit(dtype)
    for layer in range(2):
        (inputs,) = tape[f"vision.layers.{layer}.attn.core@in"]
        probs = tape[f"vision.layers.{layer}.attn.core.probs"]
        assert [p.shape for p in probs] == [(7, 8, 8), (7, 12, 12), (7, 8, 8)]
        for picture, expected in enumerate(probs):
            assert apart(vision_rows(inputs, picture), expected) <= limit
            assert apart(vision_rows(inputs, picture, [5, 2]), expected[:, [5, 2]]) <= limit


def test_rows_times_values_are_what_the_fast_cores_read() -> None:
    """So the rows are those of the model as it runs, not only of the explicit cores."""
    model = tiny_model(dtype=torch.float64)
    with attach(model, read=[CORE, f"{CORE}@in", VISION, f"{VISION}@in"]) as tape:
        conversation(model, torch.float64)
    for layer in range(3):
        site = f"decoder.layers.{layer}.attn.core"
        for inputs, heads, lengths in zip(tape[f"{site}@in"], tape[site], TURNS, strict=True):
            _, _, latent, _, up, _ = inputs
            values = torch.einsum("bsr,hvr->bhsv", latent, up[:, 10:])
            read = (decoder_rows(inputs) @ values).transpose(1, 2)
            for row, length in enumerate(lengths):
                torch.testing.assert_close(read[row, :length], heads[row, :length], rtol=0, atol=1e-12)
    (inputs,), (heads,) = tape["vision.layers.1.attn.core@in"], tape["vision.layers.1.attn.core"]
    values = enumerate(inputs[2].split([8, 12, 8]))
    read = torch.cat([torch.einsum("hps,shd->phd", vision_rows(inputs, picture), v) for picture, v in values])
    torch.testing.assert_close(read, heads, rtol=0, atol=1e-12)


def test_rows_of_half_precision_are_float32_and_sum_to_one() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    with attach(model, read=[f"{CORE}@in"]) as tape:
        conversation(model, torch.bfloat16)
    rows = decoder_rows(tape["decoder.layers.0.attn.core@in"][1])
    assert rows.dtype == torch.float32
    assert (rows.sum(-1) - 1).abs().max() < 1e-6


def test_a_row_of_a_long_prompt_needs_no_square() -> None:
    """100,000 queries against 100,000 keys would be 186 GiB of probabilities."""
    long, heads = 100_000, 5
    inputs = (torch.ones(1, 1, 1, 1).expand(1, long, heads, 4), torch.zeros(1, 1, 1, 1).expand(1, long, heads, 2))
    latent = torch.arange(long, dtype=torch.float64)[None, :, None].expand(1, long, 3) / long
    up = torch.ones(heads, 9, 3, dtype=torch.float64)
    rows = decoder_rows((*inputs, latent, torch.zeros(1, long, 2), up, None), [long - 1, 0, 49_999])
    assert rows.shape == (1, heads, 3, long)
    assert torch.count_nonzero(rows[0, 0, 1]) == 1 and torch.count_nonzero(rows[0, 0, 2]) == 50_000
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, heads, 3), rtol=0, atol=1e-5)


def test_rows_that_do_not_exist_are_named() -> None:
    tape = explicit(torch.float32)
    with pytest.raises(ValueError, match="query 19 does not exist; this call has 19"):
        decoder_rows(tape["decoder.layers.0.attn.core@in"][0], [19])
    (vision,) = tape["vision.layers.0.attn.core@in"]
    with pytest.raises(ValueError, match="patch 8 does not exist; this call has 8"):
        vision_rows(vision, 0, [8])
    with pytest.raises(ValueError, match="picture 3 does not exist; this call saw pictures 0 to 2"):
        vision_rows(vision, 3)


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a - b).abs().max().item()
