"""Each change does what its docstring says: compared with a model whose weights were altered by hand, or with plain sums."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import expand
from tiny import tiny_inputs, tiny_model
from workbench.edits import (
    Change,
    EditError,
    ablate_experts,
    ablate_heads,
    ablate_layer,
    ablate_patches,
    ablate_shared,
    ablate_visual_tokens,
    applied,
    block_attention,
    block_patches,
    expert_output,
    force_experts,
    in_force,
    match_by_role,
    patch,
    pin_routing,
    routing_of,
    set_top_k,
    shift_bias,
    steer,
    swap_experts,
    values_at,
)
from workbench.tape import attach, in_own_context

MODEL = tiny_model(dtype=torch.float64)
IDS, PIXELS, GRIDS = tiny_inputs(dtype=torch.float64)
T, D, V, HEADS, EXPERTS, TOP_K = 19, 52, 12, 5, 11, 4
ROUTER = "decoder.layers.1.ffn.router"
NOISE = torch.randn(40, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@torch.no_grad()
def logits(model: KimiVL = MODEL) -> Tensor:
    return model.logits(model(IDS, PIXELS, GRIDS))


@torch.no_grad()
def in_steps(first: int = 12, model: KimiVL = MODEL) -> Tensor:
    """The same text: a first part at once, the rest token by token on the cache."""
    cache = model.new_cache(2)
    visual = model.see(PIXELS, GRIDS)
    x = model.embedded(IDS, visual)
    parts = [model.decoder(x[:, :first], cache=cache)]
    parts += [model.decoder(x[:, at : at + 1], cache=cache) for at in range(first, T)]
    return model.logits(torch.cat(parts, dim=1))


UNTOUCHED = logits()


def under(*changes: Change, read: Any = ()) -> tuple[Tensor, Any]:
    with applied(MODEL, changes, read=read) as done:
        return logits(), done


def altered(alter: Any) -> Tensor:
    """Logits of a copy of the model whose weights were changed by hand."""
    model = deepcopy(MODEL)
    with torch.no_grad():
        alter(model)
    return logits(model)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def touched(done: Any, at: int = 0) -> dict[str, int]:
    return done.report()[at]["touched"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in MODEL.modules())
    assert in_force() == () and torch.equal(logits(), UNTOUCHED)


# --- heads, layers, shared experts ---------------------------------------------------------------------------------------


def test_a_head_without_what_it_read_is_a_head_without_its_columns_of_the_output_projection() -> None:
    def alter(model: KimiVL) -> None:
        for head in (1, 4):
            model.decoder.layers[2].attn.out.weight[:, head * V : (head + 1) * V] = 0  # type: ignore[union-attr, index]

    found, done = under(ablate_heads(2, [1, 4]))
    close(found, altered(alter))
    assert touched(done) == {"tokens": 2 * T, "heads": 2}


def test_a_vision_head_too() -> None:
    def alter(model: KimiVL) -> None:
        model.vision.layers[1].attn.out.weight[:, 16:24] = 0  # type: ignore[union-attr, index]

    found, done = under(ablate_heads(1, 2, tower="vision"))
    close(found, altered(alter))
    assert touched(done) == {"tokens": 28, "heads": 1}


def test_a_mean_and_a_sample_stand_where_the_heads_read_something() -> None:
    bank = torch.arange(3 * 2 * V, dtype=torch.float64).view(3, 2, V)
    site = "decoder.layers.1.attn.core"
    _, done = under(ablate_heads(1, [0, 3], "mean", bank, tokens=[2, 5]), read=[site])
    (plain,) = under(read=[site])[1].tape[site]
    (core,) = done.tape[site]
    assert torch.equal(core[:, [2, 5]][:, :, [0, 3]], bank.mean(0).expand(2, 2, 2, V))
    kept = torch.ones(2, T, HEADS, dtype=torch.bool)
    kept[:, torch.tensor([2, 5])[:, None], torch.tensor([0, 3])] = False
    assert torch.equal(core[kept], plain[kept])
    _, done = under(ablate_heads(1, [0, 3], "resample", bank), read=[site])
    (core,) = done.tape[site]
    drawn = (core[:, :, [0, 3]].flatten(0, 1)[:, None] == bank).all((2, 3))  # (2T, 3) which sample each token got
    assert (drawn.sum(1) == 1).all() and (drawn.sum(0) > 0).all()
    other = under(ablate_heads(1, [0, 3], "resample", bank, seed=1), read=[site])[1].tape[site][0]
    assert not torch.equal(core, other)


@pytest.mark.parametrize("part", ["attn", "ffn", "both"])
def test_a_layer_without_a_part_passes_the_stream_on(part: str) -> None:
    sites = ["decoder.layers.0", "decoder.layers.1.resid_mid", "decoder.layers.1"]
    _, done = under(ablate_layer(1, part), read=sites)
    before, middle, after = (done.tape[site][0] for site in sites)
    assert torch.equal(before, middle) == (part != "ffn")
    assert torch.equal(middle, after) == (part != "attn")
    assert touched(done) == {"tokens": 2 * T * (2 if part == "both" else 1)}


def test_an_ablated_shared_expert_leaves_the_routed_ones() -> None:
    ffn = "decoder.layers.2.ffn"
    _, done = under(ablate_shared(2), read=[ffn, f"{ffn}.experts"])
    assert torch.equal(done.tape[ffn][0], done.tape[f"{ffn}.experts"][0])
    _, done = under(ablate_shared(2, "mean", values=NOISE, tokens=[7]), read=[f"{ffn}.shared"])
    close(done.tape[f"{ffn}.shared"][0][:, 7], NOISE.mean(0).expand(2, D))
    assert touched(done) == {"tokens": 2}


# --- experts: each way of taking one away --------------------------------------------------------------------------------


def chosen_by(done: Any, part: str = "chosen") -> Tensor:
    return done.tape[f"{ROUTER}.{part}"][0]


PLAIN = under(read=[f"{ROUTER}.*", "decoder.layers.1.ffn_norm", "decoder.layers.1.ffn.experts"])[1]
SCORES, CHOSEN, WEIGHTS = (chosen_by(PLAIN, part) for part in ("scores", "chosen", "weights"))
BUSY = int(torch.bincount(CHOSEN.flatten(), minlength=EXPERTS).argmax())  # an expert with work to take away
OTHER = (BUSY + 1) % EXPERTS
BIAS = MODEL.decoder.layers[1].ffn.router.chosen.bias  # type: ignore[union-attr]


def test_a_contribution_of_zero_is_an_expert_that_writes_zero() -> None:
    found, done = under(ablate_experts(1, [BUSY, OTHER]), read=[f"{ROUTER}.*"])

    def alter(model: KimiVL) -> None:
        model.decoder.layers[1].ffn.experts.down[[BUSY, OTHER]] = 0  # type: ignore[union-attr, index]

    close(found, altered(alter))
    assert torch.equal(chosen_by(done), CHOSEN)
    hit = (CHOSEN == BUSY) | (CHOSEN == OTHER)
    assert torch.equal(chosen_by(done, "weights"), WEIGHTS.masked_fill(hit, 0))
    assert touched(done) == {"tokens": int(hit.any(-1).sum()), "slots": int(hit.sum())}


def test_a_mean_contribution_counts_as_much_as_the_expert_did() -> None:
    bank = NOISE[:6].view(3, 2, D)
    site = "decoder.layers.1.ffn.experts"
    _, done = under(ablate_experts(1, [BUSY, OTHER], "mean", values=bank), read=[site])
    x = PLAIN.tape["decoder.layers.1.ffn_norm"][0]
    expected = torch.zeros(2, T, D, dtype=torch.float64)
    for row in range(2):
        for t in range(T):
            for k in range(TOP_K):
                expert = int(CHOSEN[row, t, k])
                stands = {BUSY: bank[:, 0].mean(0), OTHER: bank[:, 1].mean(0)}.get(expert)
                wrote = expert_output(MODEL, 1, expert, x[row, t])[0] if stands is None else stands
                expected[row, t] += WEIGHTS[row, t, k] * wrote
    close(done.tape[site][0], expected)
    one = expert_output(MODEL, 1, [BUSY], x)  # (B, T, 1, D) one sample a token: none of them is what it would have been
    _, done = under(ablate_experts(1, BUSY, "resample", values=one.flatten(0, 1)), read=[site])
    plain = PLAIN.tape[site][0]
    assert torch.equal((done.tape[site][0] != plain).any(-1), (CHOSEN == BUSY).any(-1))


def test_renormalising_keeps_the_sum_and_the_proportions_of_the_others() -> None:
    _, done = under(ablate_experts(1, BUSY, "renormalise"), read=[f"{ROUTER}.*"])
    hit, weights = CHOSEN == BUSY, chosen_by(done, "weights")
    assert torch.equal(chosen_by(done), CHOSEN) and (weights[hit] == 0).all()
    close(weights.sum(-1), WEIGHTS.sum(-1))
    factor = WEIGHTS.sum(-1) / (WEIGHTS * ~hit).sum(-1)
    close(weights[~hit], (WEIGHTS * factor[..., None])[~hit])
    _, done = under(ablate_experts(1, range(EXPERTS), "renormalise"), read=["decoder.layers.1.ffn.experts"])
    assert not done.tape["decoder.layers.1.ffn.experts"][0].any()  # nobody is left to scale up


def test_routing_around_chooses_the_next_best_biased_score() -> None:
    found, done = under(ablate_experts(1, BUSY, "route around"), read=[f"{ROUTER}.*"])
    close(found, altered(lambda model: model.decoder.layers[1].ffn.router.chosen.bias.index_fill_(0, torch.tensor(BUSY), -99)))
    chosen = chosen_by(done)
    for row in range(2):
        for t in range(T):
            by_hand = sorted((e for e in range(EXPERTS) if e != BUSY), key=lambda e: -float(SCORES[row, t, e] + BIAS[e]))
            assert chosen[row, t].tolist() == by_hand[:TOP_K]
    assert touched(done)["slots"] == int((CHOSEN == BUSY).sum())


def test_tokens_that_are_not_named_keep_their_choice() -> None:
    _, done = under(ablate_experts(1, BUSY, "route around", tokens=slice(10, None)), read=[f"{ROUTER}.chosen"])
    assert torch.equal(chosen_by(done)[:, :10], CHOSEN[:, :10]) and not (chosen_by(done)[:, 10:] == BUSY).any()
    _, done = under(ablate_experts(1, BUSY, tokens=[[3], list(range(T))]), read=[f"{ROUTER}.weights"])  # one choice a row
    zero = chosen_by(done, "weights") == 0
    assert torch.equal(zero[1], CHOSEN[1] == BUSY) and not zero[0, [t for t in range(T) if t != 3]].any()


def test_a_forced_expert_takes_the_place_of_the_lowest() -> None:
    _, done = under(force_experts(1, BUSY), read=[f"{ROUTER}.*"])
    chosen, without = chosen_by(done), (CHOSEN != BUSY).all(-1)
    assert (chosen == BUSY).any(-1).all() and torch.equal(chosen[~without], CHOSEN[~without])
    assert torch.equal(chosen[without], torch.cat([CHOSEN[without][:, :-1], torch.full((int(without.sum()), 1), BUSY)], -1))
    scores = SCORES.gather(-1, chosen)
    close(chosen_by(done, "weights"), scores / scores.sum(-1, keepdim=True) * 2.446)
    assert touched(done) == {"tokens": int(without.sum()), "slots": int(without.sum())}


def test_swapped_experts_are_two_experts_that_exchanged_their_parameters() -> None:
    def alter(model: KimiVL) -> None:
        experts = model.decoder.layers[1].ffn.experts  # type: ignore[union-attr]
        for weight in (experts.gate_up, experts.down):
            weight[[BUSY, OTHER]] = weight[[OTHER, BUSY]]  # type: ignore[index]

    found, done = under(swap_experts(1, BUSY, OTHER), read=[f"{ROUTER}.*"])
    close(found, altered(alter))
    assert torch.equal(chosen_by(done, "weights"), WEIGHTS)  # a slot keeps its weight
    assert torch.equal(chosen_by(done) == OTHER, CHOSEN == BUSY) and torch.equal(chosen_by(done) == BUSY, CHOSEN == OTHER)
    around, _ = under(swap_experts(1, BUSY, OTHER), swap_experts(1, OTHER, BUSY))
    close(around, UNTOUCHED)
    cycle, _ = under(swap_experts(1, 0, 1), swap_experts(1, 1, 2))  # what 0 would have done, 2 does

    def turn(model: KimiVL) -> None:
        experts = model.decoder.layers[1].ffn.experts  # type: ignore[union-attr]
        for weight in (experts.gate_up, experts.down):
            weight[[0, 1, 2]] = weight[[2, 0, 1]]  # type: ignore[index]

    close(cycle, altered(turn))


def test_pinning_its_own_routing_changes_no_bit_and_pinning_another_is_that_routing() -> None:
    _, done = under(read=["decoder.layers.*.ffn.router.chosen"])
    own = routing_of(done.tape)
    found, done = under(pin_routing(own))
    assert torch.equal(found, UNTOUCHED) and touched(done) == {"tokens": 2 * 2 * T, "slots": 0}
    other = torch.stack([torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(t))[:TOP_K] for t in range(8)])
    _, done = under(pin_routing({1: other.numpy().astype(np.uint16)}), read=[f"{ROUTER}.*"])
    chosen = chosen_by(done)
    assert torch.equal(chosen[:, :8], other.expand(2, 8, TOP_K)) and torch.equal(chosen[:, 8:], CHOSEN[:, 8:])
    scores = SCORES.gather(-1, chosen)
    close(chosen_by(done, "weights"), scores / scores.sum(-1, keepdim=True) * 2.446)
    assert touched(done)["tokens"] == 16


def test_a_shifted_bias_is_another_buffer() -> None:
    found, done = under(shift_bias(1, [BUSY, OTHER], -0.2), shift_bias(1, OTHER, 0.5))
    by = torch.zeros(EXPERTS, dtype=torch.float64)
    by[BUSY], by[OTHER] = -0.2, 0.3
    close(found, altered(lambda model: model.decoder.layers[1].ffn.router.chosen.bias.add_(by)))
    assert touched(done, 0)["slots"] > 0 and touched(done, 1)["slots"] > 0


@pytest.mark.parametrize("k", [1, 7])
def test_another_top_k_is_another_top_k_of_the_model(k: int) -> None:
    def alter(model: KimiVL) -> None:
        for layer in (1, 2):
            model.decoder.layers[layer].ffn.router.chosen.top_k = k  # type: ignore[union-attr]

    found, done = under(set_top_k(None, k))
    close(found, altered(alter))
    assert touched(done) == {"tokens": 2 * 2 * T, "slots": 2 * 2 * T * abs(k - TOP_K)}


def test_groups_still_compete_where_there_are_some() -> None:
    model = tiny_model(dtype=torch.float64, n_routed_experts=12, n_group=3, topk_group=2)
    site = "decoder.layers.1.ffn.router.chosen"
    with applied(model, [ablate_experts(1, 5, "route around")], read=[site]) as done:
        logits(model)
    (chosen,) = done.tape[site]
    assert not (chosen == 5).any() and all(len({e // 4 for e in token}) <= 2 for token in chosen.flatten(0, 1).tolist())
    with applied(model, [shift_bias(1, 5, 1e-12)], read=[site], idle="report") as done:
        logits(model)
    with attach(model, read=[site]) as tape:
        logits(model)
    assert torch.equal(done.tape[site][0], tape[site][0])


# --- attention -----------------------------------------------------------------------------------------------------------


def test_a_blocked_look_is_a_score_of_minus_infinity() -> None:
    queries, keys, heads = [9, 10, 15], [3, 4, 12, 18], [0, 2]
    site = "decoder.layers.1.attn.core"
    _, done = under(block_attention(queries, keys, layers=1, heads=heads), read=[site, f"{site}@in"])
    q_nope, q_rope, latent, k_rope, up, _ = done.tape[f"{site}@in"][0]
    q, k, v = expand(q_nope, q_rope, latent, k_rope, up)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    allowed = torch.ones(T, T, dtype=torch.bool).tril().expand(HEADS, -1, -1).clone()
    for head in heads:
        for query in queries:
            allowed[head, query, keys] = False
    expected = torch.einsum("bhts,bshv->bthv", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)
    close(done.tape[site][0], expected)
    lost = sum(key <= query for query in queries for key in keys)
    assert touched(done) == {"queries": 2 * 3, "looks": 2 * 2 * lost}


def test_blocks_of_several_changes_add_up_also_for_what_is_not_written_yet() -> None:
    whole, done = under(block_attention(slice(8, None), [3, 4, 5, 6]))
    apart, _ = under(block_attention(range(8, 19), [3, 4]), block_attention(slice(8, None), slice(5, 7)))
    close(whole, apart)
    assert touched(done) == {"queries": 2 * 11 * 3, "looks": 2 * 11 * 4 * 3 * HEADS}


def test_a_blocked_look_between_patches_is_a_score_of_minus_infinity() -> None:
    """Of the pictures of 8, 12 and 8 patches the second, in one head of one layer."""
    site = "vision.layers.1.attn.core"
    change = block_patches([2, 11], [0, 5], layers=1, heads=[4], picture=1)
    with applied(MODEL, [change], read=[site, f"{site}@in"]) as done:
        blocked = logits()
    (q, k, v, packing), (heads,) = done.tape[f"{site}@in"][0], done.tape[site]
    assert packing.counts == [8, 12, 8]
    scores = torch.einsum("phd,shd->hps", q[8:20], k[8:20]) * q.shape[-1] ** -0.5
    scores[4, [[2], [11]], [0, 5]] = float("-inf")
    close(heads[8:20], torch.einsum("hps,shd->phd", scores.softmax(-1), v[8:20]))
    assert touched(done) == {"patches": 2, "looks": 4} and not torch.equal(blocked, UNTOUCHED)
    plain = torch.nn.functional.scaled_dot_product_attention(*(part[:8].transpose(0, 1) for part in (q, k, v))).transpose(0, 1)
    close(heads[:8], plain)  # the other pictures are as they were


def test_blocks_between_patches_add_up_in_one_list_and_nested() -> None:
    first, second = block_patches([1], [2, 3]), block_patches([1, 4], [3, 0], heads=[0, 1])
    together, _ = under(first, second)
    with applied(MODEL, [first]) as outer, applied(MODEL, [second]) as inner:
        close(logits(), together)
    layers, heads = len(MODEL.vision.layers), MODEL.config.vision.num_attention_heads
    assert touched(outer) == {"patches": layers, "looks": 2 * layers * heads}
    assert touched(inner) == {"patches": 2 * layers, "looks": 4 * layers * 2}
    alone = [under(change)[0] for change in (first, second)]
    assert all((one - together).abs().max() > 1e-6 for one in alone)


# --- the picture's side --------------------------------------------------------------------------------------------------


def test_visual_tokens_become_zero_or_the_mean_or_others() -> None:
    (plain,) = under(read=["projector"])[1].tape["projector"]
    named, kept = [1, 4], [0, 2, 3, 5, 6]
    for how, values, expected in (
        ("zero", None, torch.zeros(2, D, dtype=torch.float64)),
        ("mean", None, plain.mean(0).expand(2, D)),
        ("mean", NOISE, NOISE.mean(0).expand(2, D)),
    ):
        _, done = under(ablate_visual_tokens(named, how, values=values), read=["projector"])
        (found,) = done.tape["projector"]
        close(found[named], expected)
        assert torch.equal(found[kept], plain[kept]) and touched(done) == {"visual_tokens": 2}
    _, done = under(ablate_visual_tokens(named, "resample"), read=["projector"])
    for row in done.tape["projector"][0][named]:
        assert any(torch.equal(row, plain[other]) for other in kept)


def test_patches_lose_what_they_show_and_keep_their_place() -> None:
    def alter(model: KimiVL) -> None:
        model.vision.patches.bias.zero_()  # type: ignore[union-attr]
        model.vision.patches.weight.zero_()  # type: ignore[union-attr]

    found, done = under(ablate_patches(range(28)))
    close(found, altered(alter))
    assert touched(done) == {"patches": 28}


# --- any site ------------------------------------------------------------------------------------------------------------


def other_text() -> Any:
    """Another text and other pictures, of the same lengths."""
    ids = IDS.clone()
    ids[:, 12:] = (ids[:, 12:] + 7) % 100
    with attach(MODEL, read=["**"]) as tape, torch.no_grad():
        found = MODEL.logits(MODEL(ids, PIXELS.flip(0), GRIDS))
    return found, tape


@pytest.mark.parametrize("site", ["embedded", "decoder.layers.1", "decoder.norm"])
def test_patching_all_positions_is_the_other_run(site: str) -> None:
    expected, tape = other_text()
    found, done = under(patch(site, tape[site][0], range(T)))
    close(found, expected)
    assert touched(done) == {"tokens": 2 * T}


def test_patching_some_positions_takes_them_in_the_order_given() -> None:
    site = "decoder.layers.0"
    _, tape = other_text()
    values = values_at(tape, site, [8, 3, 17])
    assert torch.equal(values, tape[site][0][0, [8, 3, 17]])
    _, done = under(patch(site, values, [9, 2, 4]), read=[site])
    (found,), (plain,) = done.tape[site], under(read=[site])[1].tape[site]
    assert torch.equal(found[:, [9, 2, 4]], values.expand(2, 3, D))
    rest = [t for t in range(T) if t not in (9, 2, 4)]
    assert torch.equal(found[:, rest], plain[:, rest])
    _, done = under(patch("projector", NOISE[:2], [5, 0]), read=["projector"])
    assert torch.equal(done.tape["projector"][0][[5, 0]], NOISE[:2])


def test_positions_stand_for_each_other_by_role_and_order() -> None:
    source = ["special", "image 0", "image 0", "user", "user", "user", "answer"]
    target = ["image 0", "special", "image 0", "image 0", "user", "user", "thought"]
    there, here = match_by_role(source, target)
    assert (there.tolist(), here.tolist()) == ([1, 0, 2, 3, 4], [0, 1, 2, 4, 5])
    there, here = match_by_role(source, target, ["user"])
    assert (there.tolist(), here.tolist()) == ([3, 4], [4, 5])
    with pytest.raises(EditError, match="no role is in both"):
        match_by_role(source, target, ["thought"])


@pytest.mark.parametrize("site", ["embedded", "decoder.layers.1.attn.core", "decoder.layers.1"])
def test_steering_adds_the_direction_and_nothing_else(site: str) -> None:
    shape = (HEADS, V) if site.endswith("core") else (D,)
    direction = torch.linspace(-1, 1, steps=int(np.prod(shape)), dtype=torch.float64).view(shape)
    read = "decoder.layers.0.attn_norm@in" if site == "embedded" else site
    (plain,) = under(read=[read])[1].tape[read]
    (found,) = under(steer(site, direction, 3.0, [4, 11]), read=[read])[1].tape[read]
    plain, found = (value[0] if isinstance(value, tuple) else value for value in (plain, found))
    expected = plain.clone()
    expected[:, [4, 11]] += 3.0 * direction
    close(found, expected)


# --- positions, order, contexts ------------------------------------------------------------------------------------------

AT = [2, 5, 12, 15]
EVERY = [
    ablate_heads(1, [0, 3], tokens=AT),
    ablate_heads(1, [0, 3], "resample", NOISE[:, : 2 * V].reshape(40, 2, V), tokens=AT),
    ablate_layer(1, "ffn", tokens=AT),
    ablate_shared(2, tokens=slice(3, 14)),
    ablate_experts(1, [BUSY, OTHER], tokens=slice(3, 14)),
    ablate_experts(1, [BUSY, OTHER], "resample", values=NOISE.view(20, 2, D), tokens=slice(3, 14)),
    ablate_experts(1, BUSY, "renormalise", tokens=slice(3, 14)),
    ablate_experts(1, BUSY, "route around", tokens=slice(3, 14)),
    force_experts(1, BUSY, tokens=slice(3, 14)),
    swap_experts(1, BUSY, OTHER),
    pin_routing({1: CHOSEN[0, :14].flip(0)}),
    shift_bias(1, BUSY, -0.3),
    set_top_k(1, 2),
    block_attention(AT, [0, 1, 3, 12], heads=[1, 2]),
    block_attention(slice(6, None), range(2, 6), layers=2),
    block_patches([1, 6], [0, 3], heads=[1]),
    ablate_visual_tokens([0, 5], "mean"),
    ablate_patches([3, 20], "resample"),
    patch("decoder.layers.1", NOISE[:4], AT),
    patch("embedded", NOISE[:4], [15, 12, 5, 2]),
    steer("decoder.layers.0.resid_mid", NOISE[0], 2.0, slice(9, 16)),
]


@pytest.mark.parametrize("change", EVERY, ids=str)
def test_a_change_is_the_same_at_once_and_in_cached_steps(change: Change) -> None:
    with applied(MODEL, [change]) as at_once:
        whole = logits()
    with applied(MODEL, [change]) as stepwise:
        close(in_steps(), whole)
    assert not torch.allclose(whole, UNTOUCHED, atol=1e-6)
    assert touched(at_once) == touched(stepwise) and all(touched(at_once).values())
    json.dumps(at_once.report())
    assert str(change) in json.dumps(at_once.report()[0]["change"])


@torch.no_grad()
def test_rows_of_unequal_length_are_counted_each_from_its_own_start_and_padding_is_not() -> None:
    lengths, cache = torch.tensor([19, 14]), MODEL.new_cache(2)
    site = "decoder.layers.1"
    with applied(MODEL, [steer(site, NOISE[0], 1.0, [15, 20])], read=[site]) as done:
        MODEL(IDS, PIXELS, GRIDS, lengths=lengths, cache=cache)
        MODEL(torch.tensor([[5], [6]]), cache=cache)  # positions 19 and 14
        MODEL(torch.tensor([[7], [8]]), cache=cache)  # positions 20 and 15
    assert touched(done) == {"tokens": 3}  # 15 and 20 of the first row, 15 of the second, which comes in the second step
    cache = MODEL.new_cache(2)
    with attach(MODEL, read=[site]) as tape:
        MODEL(IDS, PIXELS, GRIDS, lengths=lengths, cache=cache)
        MODEL(torch.tensor([[5], [6]]), cache=cache)
    close(done.tape[site][0][0, 15], tape[site][0][0, 15] + NOISE[0])
    close(done.tape[site][0][1], tape[site][0][1])
    close(done.tape[site][1], tape[site][1])  # nothing in the first step: layer 0 and 1 see only what was before position 15


def test_all_changes_work_in_one_list() -> None:
    with applied(MODEL, EVERY, read=["**"], idle="report") as done:
        found = logits()
        assert in_force() == (done,)
    assert found.isfinite().all() and len(done.report()) == len(EVERY)
    # routing around leaves nothing to renormalise; all others have something to do
    assert done.idle() == [str(change) for change in EVERY if change.settings.get("how") == "renormalise"]


def test_changes_at_one_place_act_in_the_order_given() -> None:
    site = "decoder.layers.1.ffn"
    push, zero = steer(site, NOISE[0]), ablate_layer(1, "ffn")
    close(under(push, zero, read=[site])[1].tape[site][0], torch.zeros(2, T, D, dtype=torch.float64))
    close(under(zero, push, read=[site])[1].tape[site][0], NOISE[0].expand(2, T, D))
    force, around = force_experts(1, BUSY), ablate_experts(1, BUSY, "route around")
    assert not (chosen_by(under(force, around, read=[f"{ROUTER}.chosen"])[1]) == BUSY).any()
    assert (chosen_by(under(around, force, read=[f"{ROUTER}.chosen"])[1]) == BUSY).any(-1).all()


def test_choosing_swapping_and_dropping_follow_one_another() -> None:
    """Experts 0 and 1 are pinned first for all; 1 is then served by 2, whose contribution is dropped."""
    pinned = torch.tensor([0, 1, 3, 4]).expand(T, TOP_K)
    changes = [ablate_experts(1, 2), swap_experts(1, 1, 2), pin_routing({1: pinned})]
    _, done = under(*changes, read=[f"{ROUTER}.*"])
    assert torch.equal(chosen_by(done), torch.tensor([0, 2, 3, 4]).expand(2, T, TOP_K))
    scores = SCORES[..., [0, 1, 3, 4]]
    expected = scores / scores.sum(-1, keepdim=True) * 2.446
    expected[..., 1] = 0
    close(chosen_by(done, "weights"), expected)
    assert [touched(done, at)["slots"] for at in (0, 1)] == [2 * T, 2 * T]


def test_two_contexts_do_not_see_each_others_changes() -> None:
    def asking(*changes: Change) -> Generator[Tensor, None, None]:
        with applied(MODEL, changes):
            for _ in range(3):
                yield logits()

    first, second = ablate_heads(1, [0]), ablate_heads(1, [3])
    alone = [under(change)[0] for change in (first, second)]
    for a, b in zip(in_own_context(asking(first)), in_own_context(asking(second)), strict=True):
        assert torch.equal(a, alone[0]) and torch.equal(b, alone[1]) and torch.equal(logits(), UNTOUCHED)


def test_nested_blocks_add_up() -> None:
    first = [ablate_heads(1, [0], tokens=[4, 9]), block_attention([9], [2]), force_experts(1, BUSY)]
    second = [block_attention([9, 10], [3]), ablate_experts(1, BUSY), patch("embedded", NOISE[:1], [6])]
    with applied(MODEL, first) as outer, applied(MODEL, second) as inner:
        assert in_force() == (outer, inner)
        found = logits()
    close(found, under(*first, *second)[0])
    assert touched(outer)["tokens"] == 4 and touched(outer, 1)["queries"] == 6 and touched(inner)["queries"] == 12
    assert touched(inner, 1)["slots"] == 2 * T  # all were forced to it


# --- loud ----------------------------------------------------------------------------------------------------------------


def test_a_change_that_touched_nothing_is_not_silent() -> None:
    unused = next(e for e in range(EXPERTS) if not (CHOSEN[:, [0, 1]] == e).any())
    lonely = ablate_experts(1, unused, tokens=[0, 1])
    for change in (lonely, ablate_heads(0, 1, tokens=[400]), shift_bias(1, BUSY, 1e-13), set_top_k(1, TOP_K)):
        with pytest.raises(EditError, match="touched nothing; check positions"):
            under(change)
        with applied(MODEL, [change], idle="report") as done:
            logits()
        assert done.idle() == [str(change)] and not any(touched(done).values())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ablate_heads(3, 0), "layer 3 does not exist; this decoder has layers 0 to 2"),
        (lambda: ablate_heads(0, 5), "head 5 does not exist; here are heads 0 to 4"),
        (lambda: ablate_heads(0, []), "no heads"),
        (lambda: ablate_heads(0, -1), "-1 is not the number of a head"),
        (lambda: ablate_heads(0, 0, "mean"), "needs values"),
        (lambda: ablate_heads(0, 0, "off"), "how='off' is unknown"),
        (lambda: ablate_heads(0, 0, "zero", NOISE), "takes no values"),
        (lambda: ablate_heads(0, 0, "mean", NOISE), r"expected floats of \(1, 12\)"),
        (lambda: ablate_heads(0, 0, tokens=[-1]), "counts from the end"),
        (lambda: ablate_heads(0, 0, tokens=[]), "names no position"),
        (lambda: ablate_heads(0, 0, tower="third"), "tower='third' is unknown"),
        (lambda: ablate_layer(1, "all"), "part='all' is unknown"),
        (lambda: ablate_layer(1, "both", how="mean", values=NOISE), "one part at a time"),
        (lambda: ablate_experts(0, 1), "layer 0 has no experts; the layers that route are layers 1, 2"),
        (lambda: ablate_experts(1, 11), "expert 11 does not exist"),
        (lambda: ablate_experts(1, 1, "delete"), "how='delete' is unknown for experts"),
        (lambda: ablate_experts(1, 1, "mean"), "needs values"),
        (lambda: ablate_experts(1, range(8), "route around"), "fewer than 4 experts"),
        (lambda: force_experts(1, range(5)), "5 experts are forced on layer 1, which chooses 4"),
        (lambda: swap_experts(1, 3, 3), "with itself"),
        (lambda: pin_routing({}), "no routing to pin"),
        (lambda: pin_routing({1: [[1, 2, 3]]}), "3 experts a token are pinned on layer 1, which chooses 4"),
        (lambda: pin_routing({1: [[1, 2, 3, 3]]}), "names an expert twice"),
        (lambda: pin_routing({1: CHOSEN[:1].repeat(3, 1, 1)}), "pinned for 3 rows, but this call has 2"),
        (lambda: shift_bias(1, 1, 0), "shifts nothing"),
        (lambda: set_top_k(1, 12), "expert 11 does not exist"),
        (lambda: set_top_k(1, 0), "leaves no expert"),
        (lambda: block_attention([4], [[3], [4]]), "the same for all rows"),
        (lambda: block_attention([0], [0]), "see nothing"),
        (lambda: block_attention([4], [0], heads=9), "head 9 does not exist"),
        (lambda: block_patches([8], [0]), "patch 8 of picture 0 is blocked but does not exist"),
        (lambda: block_patches([1], range(8)), "patch 1 of picture 0 would see nothing"),
        (lambda: block_patches([1], [0], layers=[9]), "vision layer 9 does not exist"),
        (lambda: block_patches([1], [0], heads=9), "head 9 does not exist"),
        (lambda: block_patches([1], [0], picture=-1), "picture -1 is not the number of a picture"),
        (lambda: block_patches([1], [0], picture=3), "patch 0 of picture 3 is blocked but does not exist"),
        (lambda: ablate_visual_tokens(7), "visual token 7 does not exist"),
        (lambda: ablate_patches(28), "patch 28 does not exist"),
        (lambda: patch("decoder.layers.*", NOISE[:1], [0]), "names 3 sites"),
        (lambda: patch("decoder.layers.9", NOISE[:1], [0]), "no site of this model"),
        (lambda: patch("logits", NOISE[:1], [0]), "has no axis of tokens"),
        (lambda: patch("decoder.layers.1", NOISE[:2], [0]), "do not fit 1 positions"),
        (lambda: patch("decoder.layers.1", NOISE[:2], [4, 4]), "name each once"),
        (lambda: patch("decoder.layers.1", NOISE[:2], slice(4, None)), "has to be known"),
        (lambda: patch("decoder.layers.1", NOISE[:2], None), "the same for all rows"),
        (lambda: steer("decoder.layers.1", NOISE), "does not fit decoder.layers.1"),
        (lambda: steer("decoder.layers.1", 0 * NOISE[0]), "zero, not finite"),
    ],
)
def test_what_cannot_be_done_is_said(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        under(make())
    assert "\n" not in str(refusal.value)


def test_other_models_and_layers_outside_the_decoder_are_refused() -> None:
    with pytest.raises(EditError, match="not to Linear"), applied(torch.nn.Linear(1, 1), []):  # type: ignore[arg-type]
        pass
    with pytest.raises(EditError, match="idle='hush' is unknown"), applied(MODEL, [], idle="hush"):
        pass
    with pytest.raises(EditError, match="ran outside the decoder"), applied(MODEL, [ablate_heads(1, 0)]):
        where = MODEL.decoder.place(NOISE[None, :3], None)
        MODEL.decoder.layers[1](NOISE[None, :3], where)


def test_a_change_is_read_by_people_and_by_json() -> None:
    change = ablate_heads(2, [3, 1], "mean", NOISE[:2, :V], tokens=slice(4, None))
    assert str(change) == "ablate heads 3, 1 of layer 2 (mean) at positions 4 to the end"
    assert change.settings["tokens"] == {"from": 4, "to": None, "step": 1}
    assert change.settings["values"]["shape"] == [2, V]
    assert str(block_attention(range(2, 5), [1], layers=1)) == (
        "block attention from positions 2 to 4 to position 1 (layer 1, all heads)"
    )
    plans = [change.build(MODEL) for _ in range(2)]
    plans[0].count(tokens=3)
    assert plans[1].counts() == {}  # fresh every time
