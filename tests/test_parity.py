"""One walk for parity and research: our names in other people's modules, and the first site at which two models differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agreement import load_case
from kimi_vl_ref import KimiVL
from kimi_vl_ref.cache import LatentCache
from kimi_vl_ref.projector import Projector
from kimi_vl_ref.weights import save_checkpoint
from peers import Case, casts_lifted, deepseek_v3, kimi_k25, random_case
from test_negative_controls import rope_row_and_column_swapped
from tiny import tiny_model
from workbench import cli
from workbench.parity import Probe, compare, probe, walk
from workbench.released import WITHOUT, as_transformers, released_sites
from workbench.sites import SiteError, sites
from workbench.tape import attach

Patch = pytest.MonkeyPatch
DOUBLE = torch.float64
ROUTER = "decoder.layers.{}.ffn.router"


def given(case: Case) -> Probe:
    return Probe(case.input_ids, case.decode_ids, case.pixel_values, case.image_grid_hws)


@pytest.fixture(scope="module")
def pair() -> tuple[KimiVL, nn.Module, Probe]:
    """Ours and transformers' Kimi-K2.5 with the same random weights, both in float64 throughout."""
    case = random_case(1).to(DOUBLE)
    with casts_lifted(DOUBLE):
        return load_case(case, DOUBLE), kimi_k25(case.config, case.tensors), given(case)


@torch.no_grad()
def scores(model: nn.Module, inputs: Probe) -> list[Tensor]:
    """Scores (B, T, W) of the prompt and of a cached step."""
    ids, step = inputs.input_ids, inputs.decode_ids[:, :1]
    if isinstance(model, KimiVL):
        cache = model.new_cache(len(ids))
        prompt = model.logits(model(ids, inputs.pixel_values, inputs.image_grid_hws, cache=cache))
        return [prompt, model.logits(model(step, cache=cache))]
    grids = F.pad(inputs.image_grid_hws, (1, 0), value=1)
    with casts_lifted(DOUBLE):
        prompt = model(input_ids=ids, pixel_values=inputs.pixel_values, image_grid_thw=grids, use_cache=True)
        return [prompt.logits, model(input_ids=step, past_key_values=prompt.past_key_values, use_cache=True).logits]


# --- our names in their modules ------------------------------------------------------------------------------------------


def test_every_site_has_a_counterpart_but_those_that_are_said_to_have_none(pair: Any) -> None:
    ours, theirs, _ = pair
    layers = range(len(ours.vision.layers) + len(ours.decoder.layers))
    without = {template.format(i=i) for template in WITHOUT for i in layers}
    assert list(released_sites(theirs)) == [name for name in sites(ours) if name not in without]
    assert without & set(sites(ours))


def test_the_decoder_alone_has_the_sites_of_the_decoder() -> None:
    case = random_case(100)
    theirs, ours = released_sites(deepseek_v3(case.config, case.tensors)), sites(load_case(case))
    rotated = (".q_rope", ".k_rope")
    assert list(theirs) == [n for n in ours if n.startswith(("embedded", "decoder", "logits")) and not n.endswith(rotated)]


def test_reading_every_site_of_theirs_leaves_their_logits_bit_identical(pair: Any) -> None:
    _, theirs, inputs = pair
    untouched = scores(theirs, inputs)
    with attach(theirs, read=["**"]) as tape:
        read = scores(theirs, inputs)
    assert all(torch.equal(a, b) for a, b in zip(untouched, read, strict=True))
    assert set(tape.sites) == set(released_sites(theirs)) and torch.equal(tape["logits"][0], untouched[0])


def test_an_edit_by_our_name_does_to_theirs_what_it_does_to_ours(pair: Any) -> None:
    """Every site that can be edited there; one edit for both, which does not mind the order of chosen experts."""
    ours, theirs, inputs = pair
    experts = ours.config.text.n_routed_experts

    def nudge(tensor: Tensor, site: str) -> Tensor:
        if tensor.dtype == torch.int64:
            return (tensor + 1) % experts
        if site.endswith(".weights"):
            return tensor * 1.3
        return tensor + 0.1 * tensor.std() * torch.arange(tensor[0].numel(), dtype=tensor.dtype).cos().view(tensor.shape[1:])

    untouched, edited = scores(theirs, inputs), 0
    for name, site in released_sites(theirs).items():
        if site.view is not None and site.view.put is None:
            continue
        both = []
        for model in (ours, theirs):
            with attach(model, edit={name: nudge}):
                both.append(scores(model, inputs))
        for before, ours_after, theirs_after in zip(untouched, *both, strict=True):
            assert (before - theirs_after).abs().max() > 1e-6, name
            assert (ours_after - theirs_after).abs().max() < 1e-9, name
        edited += 1
    assert edited > 40


def test_ablating_one_true_head_of_theirs_is_zeroing_its_slice_before_their_o_proj(pair: Any) -> None:
    _, theirs, inputs = pair
    layer, width = theirs.model.language_model.layers[1], theirs.config.text_config.v_head_dim

    def without_head(heads: Tensor, site: str) -> Tensor:
        heads[:, :, 1] = 0
        return heads

    with attach(theirs, edit={"decoder.layers.1.attn.core": without_head}):
        by_name = scores(theirs, inputs)
    kept, weight = layer.self_attn.o_proj.weight, layer.self_attn.o_proj.weight.clone()
    weight[:, width : 2 * width] = 0
    layer.self_attn.o_proj.weight = nn.Parameter(weight, requires_grad=False)
    by_weight = scores(theirs, inputs)
    layer.self_attn.o_proj.weight = kept
    assert all(torch.equal(a, b) for a, b in zip(by_name, by_weight, strict=True))
    assert not torch.equal(by_name[0], scores(theirs, inputs)[0])


def test_what_passes_nothing_on_in_theirs_can_be_read_and_not_edited(pair: Any) -> None:
    ours, theirs, inputs = pair
    for name in ("decoder.layers.1.resid_mid", ROUTER.format(1) + ".scores", "vision.layers.0.resid_mid"):
        tapes = []
        for model in (ours, theirs):
            with attach(model, read=[name]) as tape:
                scores(model, inputs)
            tapes.append(tape[name][0])
        torch.testing.assert_close(*tapes, rtol=0, atol=1e-10)
        with pytest.raises(SiteError, match=f"{name} of Kimi_K25.* can be read but not edited"):
            with attach(theirs, edit={name: lambda tensor, site: tensor}):
                pass


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"read": ["decoder.layers.0.attn.q_rope"]}, "no site of this model is called 'decoder.layers.0.attn.q_rope'"),
        ({"read": ["decoder.layers.0@in"]}, "inputs differ from one implementation to another"),
        ({"swap": {"decoder.layers.1.attn.core": nn.Identity()}}, "no module of its own in this implementation"),
    ],
)
def test_what_is_not_the_same_in_theirs_is_refused(pair: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(SiteError, match=says):
        with attach(pair[1], **arguments):
            scores(pair[1], pair[2])


def test_positions_are_the_same_tokens_in_theirs(pair: Any) -> None:
    ours, theirs, inputs = pair
    step = inputs.input_ids.shape[1]
    read = ["embedded", "decoder.layers.1.attn.core", "decoder.layers.1.ffn.experts", "logits"]
    tapes = []
    for model in (ours, theirs):
        with attach(model, read=read, tokens=[2, step - 1, step]) as tape:
            scores(model, inputs)
        tapes.append(tape)
    for site in read:
        (a, at), (b, there) = (tape.tokens(site) for tape in tapes)
        assert torch.equal(at, there) and at[:, 2].unique().tolist() == [2, step - 1, step]
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_padding_in_theirs_has_no_positions() -> None:
    case = random_case(100)
    theirs = deepseek_v3(case.config, case.tensors)
    mask = torch.ones_like(case.input_ids)
    mask[0, 0] = 0
    with pytest.raises(SiteError, match="cannot place padded rows"):
        with attach(theirs, read=["decoder.norm"], tokens=[3]):
            theirs(input_ids=case.input_ids, attention_mask=mask)


def test_weights_brought_over_by_our_table_are_those_brought_over_by_hand(pair: Any) -> None:
    ours, theirs, _ = pair
    ours_there, by_hand = as_transformers(ours).state_dict(), theirs.state_dict()
    assert ours_there.keys() == by_hand.keys()
    assert all(torch.equal(ours_there[name], tensor) for name, tensor in by_hand.items())


# --- walks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2, 5])
@pytest.mark.parametrize(("build", "pictures"), [(kimi_k25, True), (deepseek_v3, False)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_ours_agrees_with_theirs_at_every_site(seed: int, build: Callable, pictures: bool, dtype: torch.dtype) -> None:
    case = random_case(seed, grouped=seed == 5).to(dtype)
    with casts_lifted(dtype):
        theirs = build(case.config, case.tensors)
        report = walk(load_case(case, dtype), theirs, given(case), tolerance=1e-12 if dtype == DOUBLE else None)
    assert report.first is None, report.first
    assert len(report.steps) == 4 and any(one.site == "vision" for one in report.steps[0]) == pictures
    assert [one.site for one in report.steps[3]][-1] == "logits"
    assert report.lines()[-1].startswith("all ")


def test_sites_are_compared_in_the_order_in_which_they_run() -> None:
    model = tiny_model()
    order: list[str] = []
    keep = lambda value, site: order.append(site)  # noqa: E731
    ids = probe(model.config)
    with attach(model, read=["**"], keep=keep), torch.no_grad():
        model.logits(model(ids.input_ids, ids.pixel_values, ids.image_grid_hws))
    assert [one.site for one in walk(model, model, ids).steps[0]] == order == list(sites(model))


def part(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def router_row(model: KimiVL, _: Patch) -> None:
    part(model, "decoder.layers.1.ffn.router.scores").weight[3] *= 1.01


def selection_bias(model: KimiVL, _: Patch) -> None:
    part(model, "decoder.layers.2.ffn.router.chosen").bias[2] += 0.5


def routed_scale(model: KimiVL, _: Patch) -> None:
    part(model, "decoder.layers.1.ffn.router.weights").scale *= 1.001


def one_expert(model: KimiVL, _: Patch) -> None:
    part(model, "decoder.layers.2.ffn.experts").down[4] *= 1.01


def latent_eps(model: KimiVL, _: Patch) -> None:
    part(model, "decoder.layers.1.attn.latent").eps = 1e-5


def tower_eps(model: KimiVL, _: Patch) -> None:
    part(model, "vision.layers.0.ffn_norm").eps = 1e-6


def tanh_gelu(model: KimiVL, patch: Patch) -> None:
    def forward(self: Projector, x: Tensor, grids: Any) -> Tensor:
        x = self.norm(self.merged(x, grids)).flatten(1)
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))

    patch.setattr(Projector, "forward", forward)


def shared_up(model: KimiVL, _: Patch) -> None:
    part(model, "decoder.layers.2.ffn.shared.up").weight[0, 0] += 0.01


def other_latent_cached(model: KimiVL, patch: Patch) -> None:
    """Shows in decoding only."""
    right = LatentCache.write

    def write(self: LatentCache, layer: int, latent: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        stored, k_rope = right(self, layer, latent * (1.01 if layer == 1 else 1), *rest)
        return (latent if self.filled == 0 else stored), k_rope

    patch.setattr(LatentCache, "write", write)


MISTAKES = {
    "one row of a router": (router_row, "decoder.layers.1.ffn.router.scores", 0),
    "a selection bias": (selection_bias, "decoder.layers.2.ffn.router.chosen", 0),
    "the factor of the routed experts": (routed_scale, "decoder.layers.1.ffn.router.weights", 0),
    "one expert": (one_expert, "decoder.layers.2.ffn.experts", 0),
    "the epsilon of the latent norm": (latent_eps, "decoder.layers.1.attn.latent", 0),
    "an epsilon in the tower": (tower_eps, "vision.layers.0.ffn_norm", 0),
    "the projector's GELU": (tanh_gelu, "projector.linear_2", 0),
    "row and column of the tower's rotation": (rope_row_and_column_swapped, "vision.layers.0.attn.core", 0),
    "one number of a shared expert": (shared_up, "decoder.layers.2.ffn.shared.up", 0),
    "what is cached": (other_latent_cached, "decoder.layers.1.attn.core", 1),
}


@pytest.fixture(scope="module")
def right() -> tuple[nn.Module, Case]:
    """Transformers' Kimi-K2.5, in float64 throughout, so that an epsilon shows on a stream of any size."""
    case = random_case(9).to(DOUBLE)
    with casts_lifted(DOUBLE):
        return kimi_k25(case.config, case.tensors), case


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_a_walk_names_exactly_the_site_of_a_mistake(mistake: str | None, right: Any, monkeypatch: Patch) -> None:
    """Theirs is right, ours has the mistake."""
    theirs, case = right
    ours = load_case(case, DOUBLE)
    if mistake is not None:
        MISTAKES[mistake][0](ours, monkeypatch)
    with casts_lifted(DOUBLE):
        first = walk(ours, theirs, given(case), tolerance=1e-12).first
    assert (first and (first.site, first.step)) == (MISTAKES[mistake][1:] if mistake else None)


def test_two_dtypes_agree_to_the_coarser_one() -> None:
    wide, narrow = tiny_model(dtype=DOUBLE), tiny_model()
    report = walk(wide, narrow, probe(wide.config))
    assert report.tolerance == 1e-5 and report.first is None
    assert walk(wide, narrow, probe(wide.config), tolerance=1e-12).first is not None


def test_the_order_of_chosen_experts_is_no_difference() -> None:
    model, other = tiny_model(dtype=DOUBLE), tiny_model(dtype=DOUBLE)
    with attach(other, edit={f"{ROUTER.format('*')}.chosen": lambda chosen, site: chosen.flip(-1)}):
        report = walk(model, other, probe(model.config))
    assert report.first is None


def test_numbers_are_those_of_their_definition() -> None:
    model, other = tiny_model(dtype=DOUBLE), tiny_model(dtype=DOUBLE)
    other.logits.weight.mul_(1.5)
    first = walk(model, other, probe(model.config)).first
    assert first is not None and first.site == "logits" and first.relative == pytest.approx(1 / 3)
    with attach(model, read=["logits"]) as tape, torch.no_grad():
        inputs = probe(model.config)
        model.logits(model(inputs.input_ids, inputs.pixel_values.double(), inputs.image_grid_hws))
    assert first.largest == pytest.approx(float(tape["logits"][0].abs().max()) / 2)


def test_a_number_that_is_none_is_a_difference() -> None:
    model, other = tiny_model(), tiny_model()
    other.decoder.norm.weight[5] = torch.nan
    first = walk(model, other, probe(model.config)).first
    assert first is not None and first.site == "decoder.norm" and first.relative == torch.inf


def test_models_that_cannot_be_compared_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(SiteError, match="Linear is not known"):
        walk(model, nn.Linear(2, 2), probe(model.config))
    with pytest.raises(SiteError, match="only one of the two models has decoder.layers.3.attn_norm"):
        walk(model, tiny_model(num_hidden_layers=4), probe(model.config))
    with pytest.raises(SiteError, match=r"logits is \(2, 14, 131\) in one and \(2, 14, 133\) in the other"):
        walk(model, tiny_model(vocab_size=133), probe(model.config), tolerance=torch.inf)
    with pytest.raises(ValueError, match="the position table is 9 x 13, and transformers knows only square ones"):
        as_transformers(model)


# --- on the command line -------------------------------------------------------------------------------------------------


def test_parity_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    save_checkpoint(model, tmp_path / "a", dtype=torch.float32)
    router_row(model, pytest.MonkeyPatch())
    save_checkpoint(model, tmp_path / "b", dtype=torch.float32)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert cli.main(["parity", a, a]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"all {len(sites(model))} sites agree in 4 calls")
    assert cli.main(["parity", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"the first site that differs is {ROUTER.format(1)}.scores in the prompt")
    marked = [line.split()[0] for line in lines if line.endswith("<- differs")]
    assert marked[0] == f"{ROUTER.format(1)}.scores"
    assert cli.main(["parity", a, f"transformers:{a}"]) == 2
    assert "9 x 13" in capsys.readouterr().err
    assert cli.main(["parity", a, b, "--dtype", "int8"]) == 2
    assert "choose one of float64, float32" in capsys.readouterr().err


def test_a_folder_against_its_weights_in_transformers(tmp_path: Path) -> None:
    case = random_case(3)
    save_checkpoint(load_case(case), tmp_path, dtype=torch.float32)
    report = compare(str(tmp_path), f"transformers:{tmp_path}")
    assert report.first is None and report.names[1].startswith("transformers:")
    assert report.lines()[-2].endswith("vision.layers.*.attn.qkv, decoder.layers.*.attn.q_rope, decoder.layers.*.attn.k_rope")


def test_sites_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    save_checkpoint(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the sizes stand in config.json
    assert cli.main(["sites", "decoder.layers.*.ffn.router.*", "--model", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["site", "axes", "sizes", "what", "it", "is"]
    assert [line.split()[0] for line in lines[1:]] == [n for n in sites(model) if ".router." in n]
    assert re.split(r"\s{2,}", lines[1])[1:3] == ["B T E", "B x T x 11"]
    assert cli.main(["sites", "--model", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert len(names) == len(set(names)) and "decoder.layers.*.ffn.gate" in names and names[-1] == "logits"
    assert cli.main(["sites", "decoder.layers.9", "--model", str(tmp_path)]) == 2
    assert "did you mean decoder.layers.2" in capsys.readouterr().err
