"""Rows computed afresh are the probabilities of the explicit cores, whatever the prompt, the cache and the precision; a head
is a head of the model, as wide as it reads.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agreement import load_case
from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import ExplicitCore
from kimi_vl_ref.vision import ExplicitPackedCore
from peers import casts_lifted, deepseek_v3, random_case
from tiny import tiny_inputs, tiny_model
from workbench.rows import decoder_norm_rows, decoder_rows, decoder_scores, head_writes, vision_norm_rows, vision_rows
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


@PRECISIONS
def test_content_and_position_add_up_to_the_scores_and_each_is_its_own_product(dtype: torch.dtype, limit: float) -> None:
    tape = explicit(dtype)
    for layer in range(3):
        for inputs in tape[f"decoder.layers.{layer}.attn.core@in"]:
            q_nope, q_rope, latent, k_rope, up, _ = inputs
            content, position, seen = decoder_scores(inputs)
            keys = torch.einsum("bsr,hnr->bshn", latent, up[:, :10])  # rebuilt, which decoder_scores does not do
            scale = (10 + 6) ** -0.5  # nope and rope channels of TINY
            assert apart(content, torch.einsum("bthn,bshn->bhts", q_nope, keys) * scale) <= 20 * limit
            assert apart(position, torch.einsum("bthr,bsr->bhts", q_rope, k_rope) * scale) <= 20 * limit
            total = (content + position).masked_fill(~seen, float("-inf"))
            assert apart(total.softmax(-1), decoder_rows(inputs)) == 0


def test_without_rotary_keys_a_score_is_all_content_and_without_latents_all_position() -> None:
    model, (ids, *_) = tiny_model(), tiny_inputs()
    for part, silent in (("k_rope", "position"), ("latent", "content")):
        site = f"decoder.layers.1.attn.{part}"
        with attach(model, read=[f"{CORE}@in"], edit={site: lambda value, site: torch.zeros_like(value)}) as tape:
            model(ids)
        scores = decoder_scores(tape["decoder.layers.1.attn.core@in"][0], [7, -1])
        assert scores._asdict().pop(silent).abs().max() == 0
        assert min(scores.content.std(), scores.position.std()) == 0 < max(scores.content.std(), scores.position.std())


@PRECISIONS
def test_what_heads_write_adds_up_to_what_attention_writes(dtype: torch.dtype, limit: float) -> None:
    model = tiny_model(dtype=dtype)
    sites = ["decoder.layers.*.attn.core", "decoder.layers.*.attn.out", "vision.layers.*.attn.core", "vision.layers.*.attn.out"]
    with attach(model, read=sites) as tape:
        conversation(model, dtype)
    for layer in range(3):
        out = model.decoder.layers[layer].attn.out
        for heads, written in zip(tape[CORE.replace("*", str(layer))], tape[out_site("decoder", layer)], strict=True):
            parts = head_writes(heads, out.weight)
            assert parts.shape == (*heads.shape[:2], 5, 52)
            assert apart(parts.sum(-2), written) <= 10 * limit
    out = model.vision.layers[1].attn.out
    parts = head_writes(tape["vision.layers.1.attn.core"][0], out.weight)
    assert parts.shape == (28, 7, 56)
    assert apart(parts.sum(-2) + out.bias, tape[out_site("vision", 1)][0]) <= 10 * limit


@PRECISIONS
def test_norm_weighted_rows_are_the_lengths_of_what_each_key_adds(dtype: torch.dtype, limit: float) -> None:
    """Naively: every weighted value sent through its head's part of W_O, for all pairs; those vectors add up to attn.out."""
    model = tiny_model(dtype=dtype)
    with attach(model, read=[f"{CORE}@in", f"{VISION}@in", "decoder.layers.*.attn.out"]) as tape:
        conversation(model, dtype)
    out = model.decoder.layers[1].attn.out.weight
    written = tape[out_site("decoder", 1)]
    for call in (0, 3):  # the prompts of unequal lengths, and the last cached step
        inputs = tape["decoder.layers.1.attn.core@in"][call]
        _, _, latent, _, up, _ = inputs
        values = torch.einsum("bsr,hvr->bhsv", latent, up[:, 10:])
        added = torch.einsum("bhts,bhsv,dhv->bhtsd", decoder_rows(inputs), values, out.unflatten(1, (5, 12)))
        for row, length in enumerate(TURNS[call]):
            assert apart(added.sum((1, 3))[row, :length], written[call][row, :length]) <= 10 * limit
        rows = decoder_norm_rows(inputs, out, [-1, 0])
        assert apart(rows, added[:, :, [-1, 0]].norm(dim=-1)) <= 10 * limit
    (inputs,) = tape["vision.layers.0.attn.core@in"]
    out = model.vision.layers[0].attn.out.weight
    values = inputs[2].split([8, 12, 8])[1]  # the second picture
    added = torch.einsum("hps,shd,vhd->hpsv", vision_rows(inputs, 1), values, out.unflatten(1, (7, 8)))
    assert apart(vision_norm_rows(inputs, out, 1, [4, 9]), added[:, [4, 9]].norm(dim=-1)) <= 10 * limit


@torch.no_grad()
@pytest.mark.parametrize("seed", [200, 201])
def test_ablating_a_head_is_zeroing_its_slice_before_the_peers_o_proj(seed: int) -> None:
    """The head axis has H heads of v_head_dim. A tool that cuts it by qk_rope_head_dim ablates parts of other heads."""
    case = random_case(seed).to(torch.float64)
    sizes = case.config["text_config"]
    heads, width = sizes["num_attention_heads"], sizes["v_head_dim"]
    assert len({width, sizes["qk_rope_head_dim"], sizes["qk_nope_head_dim"], heads}) == 4
    ours, head = load_case(case, torch.float64), heads - 2

    def without(value: Tensor, site: str) -> Tensor:
        assert value.shape[2:] == (heads, width)
        value[:, :, head] = 0
        return value

    def zero_slice(o_proj: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        given = (given[0].clone(),)
        given[0][..., head * width : (head + 1) * width] = 0
        return given

    with attach(ours, edit={"decoder.layers.1.attn.core": without}):
        ablated = ours.logits(ours(case.input_ids))
    with casts_lifted(torch.float64):
        peer = deepseek_v3(case.config, case.tensors)
        whole = peer(input_ids=case.input_ids).logits
        handle = peer.model.layers[1].self_attn.o_proj.register_forward_pre_hook(zero_slice)
        expected = peer(input_ids=case.input_ids).logits
        handle.remove()
    assert (expected - whole).abs().max() > 1e-3
    torch.testing.assert_close(ablated, expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_editing_router_scores_changes_the_answer() -> None:
    """Choice and weights both come after the scores: a hook on a finished choice would change nothing."""
    model, (ids, *_) = tiny_model(), tiny_inputs()
    plain = model.logits(model(ids))
    router = "decoder.layers.1.ffn.router"
    with attach(model, read=[f"{router}.chosen"], edit={f"{router}.scores": lambda scores, site: 1 - scores}) as tape:
        edited = model.logits(model(ids))
    with attach(model, read=[f"{router}.chosen"]) as before:
        model(ids)
    assert (edited - plain).abs().max() > 1e-3
    assert not torch.equal(tape[f"{router}.chosen"][0], before[f"{router}.chosen"][0])


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
    with pytest.raises(ValueError, match="5 heads of 6 channels do not fit an output weight of .52, 60."):
        head_writes(torch.ones(2, 5, 6), torch.ones(52, 60))


def out_site(part: str, layer: int) -> str:
    return f"{part}.layers.{layer}.attn.out"


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a - b).abs().max().item()
