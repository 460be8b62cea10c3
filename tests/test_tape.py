"""Reading changes nothing, editing changes the answer, and whatever goes wrong is said."""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import ExplicitCore
from kimi_vl_ref.cache import LatentCache
from tiny import tiny_inputs, tiny_model
from workbench.sites import SiteError, match, sites
from workbench.sites import sizes as sizes_of
from workbench.tape import active_edits, attach, in_own_context

MODEL = tiny_model(dtype=torch.float64)
SITES = sites(MODEL)
ROUTER = "decoder.layers.1.ffn.router"


@torch.no_grad()
def answer(model: nn.Module = MODEL) -> list[Tensor]:
    """Logits of the prompt and of two cached steps."""
    assert isinstance(model, KimiVL)
    cache = model.new_cache(2)
    ids, pixels, grids = tiny_inputs(dtype=torch.float64)
    return [model.logits(model(ids, pixels, grids, cache=cache))] + [
        model.logits(model(torch.full((2, 1), token), cache=cache)) for token in (5, 6)
    ]


UNTOUCHED = answer()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def bare(model: nn.Module = MODEL) -> bool:
    """No hook and no detour is left anywhere."""
    hooked = (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())
    return not any(hooked)


def nudge(tensor: Tensor, site: str) -> Tensor:
    """Something else of the same kind: other experts, or other numbers."""
    if tensor.dtype == torch.int64:
        return (tensor + 1) % MODEL.config.text.n_routed_experts
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=tensor.dtype)
    return tensor * (1 + 0.1 * noise) + 0.1 * noise.abs()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert bare()


# --- sites ---------------------------------------------------------------------------------------------------------------


def test_reading_every_site_and_input_leaves_the_logits_bit_identical() -> None:
    with attach(MODEL, read=["**", "**@in"]) as tape:
        logits = answer()
    assert same(logits, UNTOUCHED)
    assert sorted(tape.sites) == sorted([*SITES, *(f"{name}@in" for name in SITES)])
    for name in tape.sites:
        seen_once = name.startswith(("vision", "projector"))
        assert len(tape[name]) == (1 if seen_once else 3), name
    assert same(tape["logits"], UNTOUCHED)


@pytest.mark.parametrize("site", SITES)
def test_editing_any_site_changes_the_logits(site: str) -> None:
    with attach(MODEL, edit={site: nudge}), torch.no_grad():
        logits = MODEL.logits(MODEL(*tiny_inputs(dtype=torch.float64)))
    assert not torch.equal(logits, UNTOUCHED[0])
    assert bool(logits.isfinite().all())


def test_an_edit_that_changes_nothing_changes_nothing() -> None:
    with attach(MODEL, edit={"**": lambda tensor, site: tensor}):
        assert same(answer(), UNTOUCHED)


def test_every_part_that_returns_one_tensor_is_a_site() -> None:
    """Apart from the forms of the core, of which each call takes one, and the model itself."""
    returned: set[str] = set()
    names = {module: name for name, module in MODEL.named_modules()}
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _inputs, output: returned.add(names[module]) if isinstance(output, Tensor) else None
    )
    answer()
    hook.remove()
    assert {name for name in returned if name and ".core." not in name} == set(SITES)


def test_axes_are_those_that_the_table_gives() -> None:
    ids, pixels, grids = tiny_inputs()
    text, vision = MODEL.config.text, MODEL.config.vision
    sizes = {
        "B": 2, "T": 19, "Q": 19, "P": 28, "M": 7, "C": 4, "D": text.hidden_size, "V": vision.hidden_size, "1": 1,
        "3V": 3 * vision.hidden_size, "R": text.kv_lora_rank, "r": text.qk_rope_head_dim, "v": text.v_head_dim,
        "d": vision.head_dim, "E": text.n_routed_experts, "K": text.num_experts_per_tok, "W": text.vocab_size,
        "R+r": text.kv_lora_rank + text.qk_rope_head_dim, "H(n+r)": text.num_attention_heads * text.qk_head_dim,
    }  # fmt: skip
    with attach(MODEL, read=["**"]) as tape:
        answer()
    for name, site in SITES.items():
        sizes["H"] = vision.num_attention_heads if name.startswith("vision") else text.num_attention_heads
        shape, axes = tape[name][0].shape, site.axes.split()
        assert [sizes.get(axis, size) for axis, size in zip(axes, shape, strict=True)] == list(shape), name
        for said, size in zip(sizes_of(MODEL.config, site), shape, strict=True):
            assert said == size or isinstance(said, str) and sizes[said] == size, name


def test_sites_that_are_called_the_same_are_the_same() -> None:
    with attach(MODEL, read=["**"]) as tape:
        answer()
    for name, site in SITES.items():
        if site.what.startswith("the same as the layer's "):
            twin = f"{name.split('.')[0]}.layers.{name.split('.')[2]}.{site.what.split()[-1]}"
            twin = twin.replace(".shared", ".ffn.shared")
        elif site.what.startswith("the same as a dense layer's ffn"):
            twin = name.removesuffix(".down")
        elif site.what.startswith("the same as "):
            twin = site.what.split()[-1]
        else:
            continue
        assert torch.equal(tape[name][0], tape[twin][0]), name


def test_globs_stay_inside_a_part_unless_doubled() -> None:
    assert match("decoder.layers.*", SITES) == [f"decoder.layers.{i}" for i in range(3)]
    assert match("decoder.layers.[12].ffn.router.*", SITES) == [
        f"decoder.layers.{i}.ffn.router.{part}" for i in (1, 2) for part in ("scores", "chosen", "weights")
    ]
    assert match("**.resid_mid", SITES) == [name for name in SITES if name.endswith("resid_mid")]


# --- reading -------------------------------------------------------------------------------------------------------------


def test_inputs_can_be_read() -> None:
    with attach(MODEL, read=["decoder.layers.1.ffn@in", "decoder.layers.1.ffn_norm"]) as tape:
        answer()
    for given, normed in zip(tape["decoder.layers.1.ffn@in"], tape["decoder.layers.1.ffn_norm"], strict=True):
        assert torch.equal(given[0], normed)
    assert tape.last("decoder.layers.1.ffn@in")[0].shape == (2, 1, 52)


def test_rows_and_keep_store_a_part() -> None:
    with attach(MODEL, read=["decoder.layers.0", "vision.norm"], rows=slice(-1, None)) as tape:
        answer()
    with attach(MODEL, read={"decoder.layers.0": lambda x, site: (site, x.shape), "vision.norm": None}) as kept:
        answer()
    assert [step.shape for step in tape["decoder.layers.0"]] == [(2, 1, 52)] * 3
    assert torch.equal(tape["vision.norm"][0], kept["vision.norm"][0][-1:])
    assert kept["decoder.layers.0"][0] == ("decoder.layers.0", (2, 19, 52))
    with attach(MODEL, read=["vision.norm"], rows=[3, -1]) as picked:
        answer()
    assert torch.equal(picked["vision.norm"][0], kept["vision.norm"][0][[3, -1]])
    with pytest.raises(SiteError, match="row 3 is outside this call of decoder.norm, which has 1"):
        with attach(MODEL, read=["decoder.norm"], rows=[3]):
            answer()


def test_a_site_is_read_after_its_edit() -> None:
    with attach(MODEL, read=["decoder.layers.0"], edit={"decoder.layers.0": lambda x, site: x * 0}) as tape:
        answer()
    assert not tape["decoder.layers.0"][0].any()


def test_gradients_flow_through_what_was_read() -> None:
    with attach(MODEL, read=["embedded"], edit={"embedded": lambda x, site: x.requires_grad_()}) as tape:
        ids, pixels, grids = tiny_inputs(dtype=torch.float64)
        MODEL.logits(MODEL(ids, pixels, grids)).square().sum().backward()
    assert tape["embedded"][0].grad.abs().sum(-1).gt(0).all()


# --- editing and swapping ------------------------------------------------------------------------------------------------


def test_an_edit_may_write_in_what_it_gets() -> None:
    """resid_mid returns its input and the vision q, k, v share memory: the function gets a copy."""

    def in_place(tensor: Tensor, site: str) -> Tensor:
        tensor[..., 0] = 2
        return tensor

    def out_of_place(tensor: Tensor, site: str) -> Tensor:
        return torch.cat([torch.full_like(tensor[..., :1], 2), tensor[..., 1:]], dim=-1)

    where = ["decoder.layers.*.resid_mid", "vision.layers.*.attn.q"]
    results = []
    for edit in (in_place, out_of_place):
        with attach(MODEL, edit=dict.fromkeys(where, edit)):
            results.append(answer())
    assert same(*results) and not same(results[0], UNTOUCHED)


def test_pinned_routing_makes_the_weights_follow() -> None:
    def experts(tensor: Tensor, site: str) -> Tensor:
        return torch.tensor([7, 2, 9, 0]).expand_as(tensor)

    with attach(MODEL, read=[f"{ROUTER}.*"], edit={f"{ROUTER}.chosen": experts}) as tape:
        answer()
    for scores, chosen, weights in zip(*(tape[f"{ROUTER}.{part}"] for part in ("scores", "chosen", "weights")), strict=True):
        assert torch.equal(chosen, experts(chosen, ""))
        raw = scores[..., [7, 2, 9, 0]]
        torch.testing.assert_close(weights, 2.446 * raw / raw.sum(-1, keepdim=True))


def test_a_swapped_core_shows_its_probabilities() -> None:
    core = "decoder.layers.*.attn.core"
    with attach(MODEL, read=[f"{core}.probs", core], swap={core: lambda original: ExplicitCore()}) as tape:
        logits = answer()
    for ours, theirs in zip(logits, UNTOUCHED, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    probs = tape["decoder.layers.2.attn.core.probs"]
    assert [step.shape for step in probs] == [(2, 5, 19, 19), (2, 5, 1, 20), (2, 5, 1, 21)]
    torch.testing.assert_close(probs[0].sum(-1), torch.ones(2, 5, 19, dtype=torch.float64))


def test_what_was_swapped_out_does_not_run_and_the_module_tree_stays() -> None:
    names = [name for name, _ in MODEL.named_modules()]
    with attach(MODEL, swap={"decoder.layers.1.ffn": nn.Identity()}) as tape:
        answer()
        assert [name for name, _ in MODEL.named_modules()] == names
    assert tape.sites == []
    with pytest.raises(SiteError, match="no site of this model is called 'decoder.layers.1.ffn.shared'"):
        with attach(MODEL, read=["decoder.layers.1.ffn.shared"], swap={"decoder.layers.1.ffn": nn.Identity()}):
            pass


def test_sessions_may_nest_and_end_in_any_order() -> None:
    inner = attach(MODEL, swap={"decoder.layers.1.ffn": nn.Identity()})
    outer = attach(MODEL, swap={"decoder.layers.1.ffn": lambda original: Zero()})
    outer.__enter__()
    with_zero = answer()
    inner.__enter__()
    with_identity = answer()
    assert active_edits() == ["swap decoder.layers.1.ffn"] * 2
    outer.__exit__(None, None, None)
    assert same(answer(), with_identity) and not same(with_identity, with_zero)
    inner.__exit__(None, None, None)
    assert active_edits() == []


def test_a_stand_in_may_call_what_it_replaces() -> None:
    site = "decoder.layers.1.ffn"
    read = [site, f"{site}.inner", f"{site}.inner.experts", f"{site}.inner.shared"]
    with attach(MODEL, read=[site]) as outer, attach(MODEL, read=read, swap={site: Twice}) as tape:
        wrapped = answer()
    with attach(MODEL, edit={site: lambda x, name: 2 * x}):
        assert same(wrapped, answer())
    for whole, seen, inner, *halves in zip(outer[site], *(tape[name] for name in read), strict=True):
        assert torch.equal(whole, seen) and torch.equal(seen, 2 * inner) and torch.equal(inner, halves[0] + halves[1])


class Twice(nn.Module):
    def __init__(self, original: nn.Module):
        super().__init__()
        self.inner = original

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_another_model_can_be_read_too() -> None:
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    with attach(other, read=["*"], edit={"0": lambda x, site: x * 0}) as tape:
        other(torch.ones(1, 3))
    assert not tape["1"][0].any()


# --- loud ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, hint",
    [
        ("decoder.layers.1.ffn.router.choosen", "did you mean decoder.layers.1.ffn.router.chosen or "),
        ("decoder.layers.*.atn.core", r"did you mean decoder.layers.\*.attn.core"),
        ("decoder.layers.7.attn", "did you mean decoder.layers.2.attn or "),
        ("zzz", "sites.sites"),
    ],
)
def test_an_unknown_name_raises_with_near_matches(name: str, hint: str) -> None:
    asked: list[dict[str, Any]] = [{"read": [name]}, {"edit": {name: nudge}}, {"swap": {name: nn.Identity()}}]
    for arguments in asked:
        with pytest.raises(SiteError, match=hint):
            with attach(MODEL, **arguments):
                answer()


def test_parts_that_return_no_single_tensor_are_no_sites() -> None:
    with pytest.raises(SiteError, match="no site of this model is called 'decoder.layers.1.ffn.router'"):
        with attach(MODEL, read=[ROUTER]):
            answer()


def test_asking_the_tape_for_what_was_not_read_raises() -> None:
    with attach(MODEL, read=["decoder.layers.*"]) as tape:
        answer()
    with pytest.raises(SiteError, match="did you mean decoder.layers.2"):
        tape["decoder.layers.3"]
    with pytest.raises(SiteError, match="names several sites"):
        tape["decoder.layers.*"]


def test_a_site_that_never_ran_raises_at_the_end() -> None:
    with pytest.raises(SiteError, match="vision.norm and 1 more never ran"):
        with attach(MODEL, read=["vision.norm", "embedded"], edit={"projector": nudge}):
            MODEL(torch.tensor([[1, 2, 3]]))
    with pytest.raises(SiteError, match="decoder.layers.0.ffn never ran"):
        with attach(MODEL, swap={"decoder.layers.0.ffn": nn.Identity()}):
            pass


def test_the_error_of_the_block_is_not_hidden() -> None:
    with pytest.raises(KeyError, match="mine"):
        with attach(MODEL, read=["vision.norm"]):
            raise KeyError("mine")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda x, site: x[:, :-1], r"returned \(2, 18, 52\) float64 on cpu where \(2, 19, 52\) float64 on cpu is expected"),
        (lambda x, site: x.float(), r"returned \(2, 19, 52\) float32"),
        (lambda x, site: None, "returned NoneType; return the tensor"),
    ],
)
def test_an_edit_that_does_not_fit_raises(edit, message: str) -> None:
    with pytest.raises(SiteError, match="the edit of decoder.layers.1.attn " + message):
        with attach(MODEL, edit={"decoder.layers.1.attn": edit}):
            answer()


def test_inputs_cannot_be_edited() -> None:
    with pytest.raises(SiteError, match="can be read but not edited"):
        with attach(MODEL, edit={"decoder.layers.1.ffn_norm@in": nudge}):
            answer()


def test_one_module_cannot_stand_in_for_several() -> None:
    with pytest.raises(SiteError, match="names 3 sites"):
        with attach(MODEL, swap={"decoder.layers.*.attn.core": ExplicitCore()}):
            answer()


def test_a_compiled_model_is_refused() -> None:
    wrapped: Any = torch.compile(MODEL, backend="eager")
    part = tiny_model()
    part.decoder.layers[1].compile(backend="eager")
    forward = tiny_model()
    forward.logits.forward = torch.compile(forward.logits.forward, backend="eager")
    for model, name in ((wrapped, "the model"), (part, "decoder.layers.1"), (forward, "logits")):
        with pytest.raises(SiteError, match=f"{name} is compiled"):
            with attach(model, read=["**.logits"]):
                pass


# --- every exit ----------------------------------------------------------------------------------------------------------


def test_hooks_go_when_the_block_or_the_model_fails() -> None:
    def fail(tensor: Tensor, site: str) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        with attach(MODEL, read=["**"], edit={"decoder.layers.1": fail}, swap={"decoder.layers.2.ffn": nn.Identity()}):
            assert not bare()
            answer()
    assert bare()


def steps(edit: bool) -> Generator[Tensor, None, None]:
    """Five tokens on a cache, with the stream doubled at layer 1 or not."""
    with attach(MODEL, edit={"decoder.layers.1": lambda x, site: x * 2} if edit else {}):
        cache = LatentCache(MODEL.config.text, 1, device="cpu", dtype=torch.float64)
        for token in range(5):
            yield MODEL.logits(MODEL(torch.tensor([[token]]), cache=cache))


@pytest.mark.parametrize("own", [True, False])
def test_hooks_go_with_an_abandoned_generator(own: bool) -> None:
    items = in_own_context(steps(True)) if own else steps(True)
    next(items)
    assert not bare()
    del items
    gc.collect()
    assert bare() and active_edits() == []


def test_hooks_go_with_a_block_that_nobody_left() -> None:
    block = attach(MODEL, edit={"decoder.layers.1": nudge})
    block.__enter__()
    assert not bare()
    del block
    gc.collect()
    assert bare()


# --- sessions ------------------------------------------------------------------------------------------------------------


def test_two_generators_in_one_thread_do_not_see_each_other() -> None:
    alone = {edit: list(in_own_context(steps(edit))) for edit in (False, True)}
    assert not same(alone[False], alone[True])
    both = zip(in_own_context(steps(False)), in_own_context(steps(True)), strict=True)
    mixed = []
    for pair in both:
        mixed.append(pair)
        assert same(answer(), UNTOUCHED)  # nor does who takes the items
    assert same([a for a, _ in mixed], alone[False]) and same([b for _, b in mixed], alone[True])


def test_the_items_of_a_generator_may_be_taken_in_other_threads() -> None:
    expected = list(in_own_context(steps(True)))
    items, taken = in_own_context(steps(True)), []
    for _ in range(5):
        thread = threading.Thread(target=lambda: taken.append(next(items)))
        thread.start()
        thread.join()
    assert same(taken, expected)
    assert next(items, None) is None


def test_two_threads_on_one_model_do_not_see_each_other() -> None:
    """Both are inside their blocks before either runs, and stay there until both have run."""
    barrier, results, sizes = threading.Barrier(2, timeout=60), {}, {}

    def session(factor: float) -> None:
        swap = {"decoder.layers.2.ffn": Zero()} if factor == 3 else {}
        edit = {"decoder.layers.1": lambda x, site: x * factor}
        with attach(MODEL, read=["decoder.layers.1"], edit=edit, swap=swap) as tape:
            barrier.wait()
            results[factor] = answer()
            barrier.wait()
        sizes[factor] = len(tape["decoder.layers.1"])

    threads = [threading.Thread(target=session, args=(factor,)) for factor in (1.0, 3.0)]
    for thread in threads:
        thread.start()
    barrier_free = answer()  # a third user, outside both
    for thread in threads:
        thread.join()
    assert sizes == {1.0: 3, 3.0: 3}
    assert same(barrier_free, UNTOUCHED) and same(results[1.0], UNTOUCHED) and not same(results[3.0], UNTOUCHED)
