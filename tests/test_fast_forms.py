"""Fast forms of attention beside the formula as written, over random shapes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import AbsorbedCore, BlockwiseCore, ExpandedCore, ExplicitCore, LatentCore, causal_attention
from kimi_vl_ref.chat import Inputs
from kimi_vl_ref.generate import prefill
from tiny import tiny_model

MODEL: KimiVL = tiny_model(3, torch.float64)
CORES = [AbsorbedCore(), ExpandedCore(), BlockwiseCore(block=7), BlockwiseCore()]
SEEDS = pytest.mark.parametrize("seed", range(12))


def core_inputs(seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of one call behind a cache, and the mask (B, T, S) in which the queries are the last of the keys."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, h, n, r, rank, v = (rng.randint(1, 9) for _ in range(6))
    t = rng.choice([1, 1, 2, 30, 300])
    s = t + rng.choice([0, 1, 17, 400])

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stored = noise(b, s, rank + r)  # latent and key lie side by side, as in the cache
    inputs = (noise(b, t, h, n), noise(b, t, h, r), stored[..., :rank], stored[..., rank:], noise(h, n + v, rank))
    visible = torch.arange(s) <= torch.arange(s - t, s)[:, None]
    return inputs, visible.expand(b, -1, -1)


@SEEDS
@pytest.mark.parametrize("core", CORES, ids=["absorbed", "expanded", "blocks of 7", "one block"])
def test_cores_without_a_mask_are_the_formula_with_one(core: torch.nn.Module, seed: int) -> None:
    inputs, visible = core_inputs(seed)
    expected = ExplicitCore()(*inputs, visible)
    for mask in (None, visible):
        torch.testing.assert_close(core(*inputs, mask), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ExplicitCore()(*inputs, None), expected, rtol=1e-10, atol=1e-10)


@SEEDS
def test_cores_of_ragged_rows_are_the_formula(seed: int) -> None:
    inputs, visible = core_inputs(seed)
    hidden = torch.rand(visible.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    hidden[..., 0] = seed % 2 == 1  # now and then the first key is hidden, and with small blocks all of the first block
    hidden[..., 7:14] = hidden[..., 7:14] | (seed % 3 == 0)  # a whole block in the middle
    hidden.scatter_(2, visible.sum(-1, keepdim=True) - 1, False)  # each query sees itself
    visible = visible & ~hidden
    expected = ExplicitCore()(*inputs, visible)
    for core in CORES:
        torch.testing.assert_close(core(*inputs, visible), expected, rtol=1e-10, atol=1e-10)


@SEEDS
def test_blocks_of_queries_are_the_queries_at_once(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    t, past = rng.randint(1, 40), rng.randint(0, 30)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (t, t + past, t + past))
    mask = torch.ones(t, t + past, dtype=torch.bool).tril(past)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(causal_attention(q, k, v, block=rng.randint(1, 12)), expected)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(t, t + past))
    torch.testing.assert_close(fused, expected)  # the form a GPU takes


def masks_of(model: KimiVL, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...] | None]:
    """Sizes of the masks made from now on, one a forward pass; None where none was."""
    found: list[tuple[int, ...] | None] = []
    place = model.decoder.place

    def noted(*given: object) -> object:
        where = place(*given)  # type: ignore[arg-type]
        found.append(None if where.visible is None else tuple(where.visible.shape))
        return where

    monkeypatch.setattr(model.decoder, "place", noted)
    return found


def test_chunks_of_rows_of_one_length_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(120, (2, 300), generator=torch.Generator().manual_seed(0))
    inputs = Inputs(ids, torch.tensor([300, 300]), None, None, [])
    whole = MODEL(ids)[:, -1]
    masks, cache = masks_of(MODEL, monkeypatch), MODEL.new_cache(2)
    torch.testing.assert_close(prefill(MODEL, inputs, cache, chunk=110), whole, rtol=1e-9, atol=1e-9)
    MODEL(ids[:, :1], cache=cache)
    assert cache.even and masks == [None] * 4


def test_ragged_rows_do(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(120, (2, 9), generator=torch.Generator().manual_seed(0))
    masks, cache = masks_of(MODEL, monkeypatch), MODEL.new_cache(2)
    prefill(MODEL, Inputs(ids, torch.tensor([4, 9]), None, None, []), cache)
    MODEL(ids[:, :1], cache=cache)
    MODEL(ids[:, :1], cache=cache)
    assert not cache.even and masks == [None, (2, 1, 10), (2, 1, 11)]


def test_a_long_cache_is_read_in_one_pass() -> None:
    core = LatentCore(MODEL.config.text)
    used: list[str] = []
    for name, part in core.named_children():
        part.register_forward_hook(lambda *_, name=name: used.append(name))
    for s in (8192, 8193):
        generator = torch.Generator().manual_seed(s)
        shapes = ((1, 1, 5, 10), (1, 1, 5, 6), (1, s, 22), (1, s, 6), (5, 22, 22))
        inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
        torch.testing.assert_close(core(*inputs, None), ExplicitCore()(*inputs, None), rtol=1e-10, atol=1e-10)
    assert used == ["absorbed", "blockwise"]
