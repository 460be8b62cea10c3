"""Loading so that it fits: experts apart, weights left on the disk, weights in few bits, and the choice between them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from demos.session import Session
from kimi_vl_ref import TINY, KimiVL, checkpoint_folder, choose_fit, fit, load, load_checkpoint, reply, save_checkpoint
from kimi_vl_ref.config import KIMI_VL_A3B, KimiVLConfig
from kimi_vl_ref.experts import SeparateExperts
from kimi_vl_ref.fit import Room, needed, whole_bytes
from kimi_vl_ref.mapped import map_checkpoint, separate, widen
from kimi_vl_ref.moe import Experts
from kimi_vl_ref.quantise import Quantised, QuantisedExperts, QuantisedLinear, held_bytes, quantise, quantised_bytes
from kimi_vl_ref.sizes import active, cache_bytes_a_token, decoder, parameters, tower
from kimi_vl_ref.weights import CheckpointError, parameter_count
from tiny import tiny_inputs, tiny_model
from workbench import cli
from workbench.checkup.standin import SMALL, write_standin
from workbench.edits import ablate_experts, applied, expert_output
from workbench.study.evaluate import messages
from workbench.study.families import make
from workbench.tape import attach

STUDY = checkpoint_folder("study")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is quick at every dtype, whichever runs the tests."""
    monkeypatch.setattr(fit, "slow_at", lambda dtype: False)


def on_meta(config: KimiVLConfig) -> KimiVL:
    with torch.device("meta"):
        return KimiVL(config)


# --- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [KIMI_VL_A3B, TINY, SMALL], ids=["full", "tiny", "small"])
def test_sizes_are_those_of_the_model(config: KimiVLConfig) -> None:
    model = on_meta(config)

    def count(*modules: nn.Module) -> int:
        return sum(tensor.numel() for module in modules for tensor in module.state_dict().values())

    assert parameters(config) == parameter_count(model)
    assert tower(config) == count(model.vision, model.projector)
    assert decoder(config.text) == count(model.decoder)
    numbers = config.text.kv_lora_rank + config.text.qk_rope_head_dim
    assert cache_bytes_a_token(config.text) == 2 * numbers * len(model.decoder.layers)


def test_sizes_of_the_release() -> None:
    assert parameters(KIMI_VL_A3B) == 16_407_656_048
    assert active(KIMI_VL_A3B.text) == 2_579_231_872  # counted elsewhere, from the report's table
    assert cache_bytes_a_token(KIMI_VL_A3B.text) == 31_104


# --- experts apart ------------------------------------------------------------------------------------------


def random_experts(seed: int) -> tuple[Experts, SeparateExperts, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The same random experts stacked and apart, and what they are given; sizes differ from seed to seed."""
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    class Text:
        hidden_size, moe_intermediate_size = 2 * some(2, 30), 2 * some(2, 20)
        n_routed_experts, initializer_range = some(2, 12), 0.3

    stacked, apart = Experts(Text), SeparateExperts(Text)  # type: ignore[arg-type]
    for weight in (stacked.gate_up, stacked.down):
        weight.data.normal_(std=0.3, generator=generator)
    for e, one in enumerate(apart):
        one.gate.weight.data, one.up.weight.data = stacked.gate_up[e].chunk(2)  # type: ignore[union-attr]
        one.down.weight.data = stacked.down[e]  # type: ignore[union-attr]
    batch, tokens, top_k = some(1, 4), some(1, 9), some(1, Text.n_routed_experts + 1)
    x = torch.randn(batch, tokens, Text.hidden_size, generator=generator)
    scores = torch.rand(batch, tokens, Text.n_routed_experts, generator=generator)
    return stacked.double(), apart.double(), (x.double(), scores.topk(top_k).indices, scores.topk(top_k).values.double())


@pytest.mark.parametrize("seed", range(12))
def test_experts_apart_are_experts_stacked(seed: int) -> None:
    stacked, apart, given = random_experts(seed)
    torch.testing.assert_close(apart(*given), stacked(*given), rtol=1e-12, atol=1e-12)


def test_an_expert_that_no_token_chose_is_not_touched() -> None:
    _, apart, (x, chosen, weights) = random_experts(3)
    for e, one in enumerate(apart):
        if not bool((chosen == 0).any()) or e:
            continue
        one.down.weight.data.fill_(float("nan"))  # type: ignore[union-attr]
        assert bool(apart(x, chosen, weights).isnan().any())
        others = torch.where(chosen == 0, 1, chosen)
        assert not bool(apart(x, others, weights).isnan().any())
        return
    raise AssertionError("no token chose expert 0; take another seed")


# --- left on the disk ---------------------------------------------------------------------------------------


def own_memory(model: nn.Module, folder: Path) -> list[str]:
    """The tensors that do not lie in a shard mapped from the folder."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line and line.endswith(".safetensors"):
            start, _, end = line.split()[0].partition("-")
            regions.append((int(start, 16), int(end, 16)))
    state = model.state_dict()
    return [n for n, t in state.items() if not any(a <= t.data_ptr() < b for a, b in regions)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped where")
def test_a_mapped_checkpoint_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path, dtype=torch.bfloat16, max_shard_bytes=40_000)
    assert own_memory(map_checkpoint(tmp_path), tmp_path) == []
    assert len(own_memory(load_checkpoint(tmp_path), tmp_path)) == len(load_checkpoint(tmp_path).state_dict())
    # asked for in another dtype, all but the selection biases, which are float32 as they are stored, have to be copied
    copied = own_memory(map_checkpoint(tmp_path, torch.float32), tmp_path)
    assert copied and not [name for name in copied if name.endswith(".chosen.bias")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_model_says_what_a_loaded_one_says(tmp_path: Path, dtype: torch.dtype) -> None:
    save_checkpoint(tiny_model(), tmp_path, dtype=dtype, max_shard_bytes=40_000)
    ids, pixels, grids = tiny_inputs()
    mapped, loaded = map_checkpoint(tmp_path), load_checkpoint(tmp_path)
    assert {t.dtype for n, t in mapped.state_dict().items() if not n.endswith("chosen.bias")} == {dtype}
    assert mapped.decoder.layers[1].ffn.router.chosen.bias.dtype == torch.float32  # type: ignore[union-attr]
    a, b = (model.logits(model(ids, pixels, grids)) for model in (mapped, loaded))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.float().square().mean().sqrt()))


def test_a_widened_model_computes_in_float32_with_the_stored_weights(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(4), tmp_path, dtype=torch.bfloat16)
    ids, pixels, grids = tiny_inputs()
    expected = load_checkpoint(tmp_path, dtype=torch.float32)(ids, pixels, grids)
    model = widen(map_checkpoint(tmp_path), torch.float32)
    out = model(ids, pixels, grids)
    assert out.dtype == torch.float32 == model.logits.weight.dtype
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    left = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16}
    pattern = r"decoder.*(attn\.q|attn\.out|ffn.*(gate|up|down))\.weight"
    large = {name for name in model.state_dict() if re.search(pattern, name)}
    assert left == large and not left & set(own_memory(model, tmp_path))  # these are the pages of the file


def test_a_mapped_model_can_be_saved(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path / "a", max_shard_bytes=40_000)
    save_checkpoint(map_checkpoint(tmp_path / "a"), tmp_path / "b")
    again, first = (load_checkpoint(tmp_path / name).state_dict() for name in "ba")
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_a_damaged_checkpoint_is_refused_alike(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path, max_shard_bytes=40_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=shard.name):
        map_checkpoint(tmp_path)


# --- in few bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
def test_a_weight_comes_back_within_half_a_step(bits: int, group: int) -> None:
    weight = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(bits))
    packed = Quantised(weight, bits)
    step = weight.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (packed.dense(torch.float64) - weight).unflatten(-1, (-1, group)).abs()
    # bfloat16 rounds a scale by up to 1/256, which can push the largest number of a group that much past the end
    assert bool((error <= step * (0.5 + 2 ** (bits - 1) / 256)).all())
    assert torch.equal(packed.dense(torch.float32, 1), packed.dense(torch.float32)[1])
    assert packed.stored.nbytes == weight.numel() * bits // 8


def test_whole_numbers_in_range_are_kept_exactly() -> None:
    """Every value that comes up, in both halves of a byte; the largest sets a scale of 1."""
    row = torch.tensor([7.0, -7, -7, -1, 0, 1, 2, 3, 4, 5, 6, -2, -3, -4, -5, -6]).repeat(2)
    assert torch.equal(Quantised(row[None], 4).dense(torch.float32)[0], row)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", range(4))
def test_quantised_experts_are_experts_with_the_weights_they_stand_for(seed: int, bits: int) -> None:
    stacked, apart, given = random_experts(seed)
    both = [QuantisedExperts(experts, bits, torch.device("cpu")) for experts in (stacked, apart)]
    stacked.gate_up.data, stacked.down.data = (getattr(both[0], n).dense(torch.float64) for n in ("gate_up", "down"))
    for quantised in both:
        torch.testing.assert_close(quantised(*given), stacked(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("config", [TINY, SMALL], ids=["tiny", "small"])
def test_what_is_held_is_what_was_promised(bits: int, config: KimiVLConfig) -> None:
    torch.manual_seed(0)
    whole = KimiVL(config).to(torch.bfloat16).requires_grad_(False)
    before = held_bytes(whole)
    model = quantise(whole, bits)
    assert held_bytes(model) == quantised_bytes(config, bits) < before
    biases = {tensor.dtype for name, tensor in model.state_dict().items() if name.endswith("chosen.bias")}
    assert biases == {torch.float32} and model.embedded.weight.dtype == torch.bfloat16
    kinds = {type(m) for m in model.decoder.modules()}
    assert {QuantisedLinear, QuantisedExperts} <= kinds and not kinds & {Experts, SeparateExperts}


def test_a_part_that_was_skipped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a library passes over fused experts without a word."""
    monkeypatch.setattr("kimi_vl_ref.quantise.QuantisedExperts", lambda experts, bits, device: experts)
    with pytest.raises(RuntimeError, match="were promised"):
        quantise(KimiVL(TINY), 8)


def test_the_release_in_few_bits() -> None:
    assert quantised_bytes(KIMI_VL_A3B, 8) < 18e9 and quantised_bytes(KIMI_VL_A3B, 4) < 11e9
    assert parameters(KIMI_VL_A3B) == parameter_count(separate(KIMI_VL_A3B))


def test_a_quantised_model_is_not_saved_as_if_it_were_whole(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="few bits"):
        save_checkpoint(quantise(tiny_model(), 8), tmp_path)


@pytest.mark.parametrize("bits", [3, 16, 0])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="8 or 4"):
        quantise(tiny_model(), bits)


@pytest.mark.parametrize("way", ["whole", "mapped", "int8", "int4"])
def test_the_study_model_answers_in_every_way(way: str) -> None:
    model, chat = load("study", fit=way)
    right = 0
    for seed in range(6):
        scene, question = make("name", seed=seed)
        right += reply(model, chat, messages(scene, question)).answer == question.answer
    assert right >= 5


def test_the_instrument_reads_and_edits_a_model_that_was_made_to_fit() -> None:
    """Sites are where they always are; what needs all experts side by side says so."""
    _, chat = load("study")
    scene, question = make("count", seed=1)
    for way in ("mapped", "int8"):
        model, _ = load("study", fit=way)
        site = "decoder.layers.1.ffn.experts"
        with attach(model, [site, "decoder.layers.*.ffn.router.chosen"]) as tape:
            said = reply(model, chat, messages(scene, question))
        assert len(tape[site]) == len(said.token_ids) and bool(tape[site][0].any())
        with applied(model, [ablate_experts(1, [0, 1])]) as done:
            reply(model, chat, messages(scene, question))
        assert done.report()
        with pytest.raises(ValueError, match="without fit="):
            expert_output(model, 1, [0], tape[site][0])


# --- the choice ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json is all that the choice reads."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "config.json").write_text(json.dumps(KIMI_VL_A3B.to_dict()))
    return folder


GB = 1_000_000_000


@pytest.mark.parametrize(
    ("free", "device", "bits", "mapped"),
    [
        (Room(64 * GB, 80 * GB, "a card"), "cuda", None, False),
        (Room(16 * GB, 48 * GB, "a card"), "cuda", None, False),
        (Room(16 * GB, 24 * GB, "a card"), "cuda", 8, False),
        (Room(64 * GB, 16 * GB, "a card"), "cuda", 4, False),
        (Room(64 * GB, 8 * GB, "a card"), "cpu", None, False),
        (Room(64 * GB), "cpu", None, False),
        (Room(24 * GB), "cpu", None, True),
        (Room(4 * GB, 4 * GB, "a card"), "cpu", None, True),
    ],
)
def test_the_first_way_that_fits(full: Path, free: Room, device: str, bits: int | None, mapped: bool) -> None:
    chosen = choose_fit(full, free=free)
    assert (chosen.device, chosen.bits, chosen.mapped, chosen.dtype) == (device, bits, mapped, torch.bfloat16)
    assert "GB" in chosen.says and ("free" in chosen.says) and ("a card" in chosen.says) == (free.gpu is not None)
    if not mapped:
        size = quantised_bytes(KIMI_VL_A3B, bits) if bits else whole_bytes(KIMI_VL_A3B, torch.bfloat16)
        assert needed(KIMI_VL_A3B, size, torch.bfloat16) <= (free.gpu or 0 if device == "cuda" else free.ram)


@pytest.mark.parametrize("free", [Room(64 * GB), Room(24 * GB), Room(64 * GB, 8 * GB, "a card")])
def test_a_processor_slow_at_bfloat16_computes_in_float32(full: Path, free: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "slow_at", lambda dtype: dtype == torch.bfloat16)
    slow = choose_fit(full, free=free)
    assert slow.mapped and slow.compute == torch.float32 and "computed in float32, since this processor is slow" in slow.says
    assert choose_fit(full, "whole", free=free).compute is None  # as asked
    card = choose_fit(full, free=Room(GB, 80 * GB, "a card"))
    assert card.device == "cuda" and card.compute is None


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_on_a_slow_processor_are_computed_with_in_float32(
    full: Path, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = f"int{bits}"
    assert choose_fit(full, way, free=Room(64 * GB)).compute is None  # a quick one
    monkeypatch.setattr(fit, "slow_at", lambda dtype: dtype == torch.bfloat16)
    chosen = choose_fit(full, way, free=Room(64 * GB))
    assert (chosen.device, chosen.bits, chosen.mapped, chosen.compute) == ("cpu", bits, False, torch.float32)
    assert f"as asked: {quantised_bytes(KIMI_VL_A3B, bits, 4) / 1e9:.1f} GB" in chosen.says
    assert "computed in float32, since this processor is slow at bfloat16" in chosen.says
    card = choose_fit(full, way, free=Room(GB, 80 * GB, "a card"))
    assert card.compute is None and f"{quantised_bytes(KIMI_VL_A3B, bits) / 1e9:.1f} GB" in card.says

    write_standin(tmp_path / "standin", SMALL)
    model, chat = load(tmp_path / "standin", fit=way)
    assert held_bytes(model) == quantised_bytes(SMALL, bits, 4)
    scales = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert scales and all(name.endswith(".scale") for name in scales)
    asked = [{"role": "user", "content": "what?"}]
    with attach(model, ["decoder.norm"]) as tape:
        answer = reply(model, chat, asked, max_new_tokens=3)
    assert tape["decoder.norm"][0].dtype == torch.float32
    plain = quantise(load(tmp_path / "standin", dtype=torch.float32)[0], bits)  # the same bits of the same weights
    assert answer.token_ids == reply(plain, chat, asked, max_new_tokens=3).token_ids


def test_a_model_fitted_to_a_slow_processor_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "slow_at", lambda dtype: True)
    write_standin(tmp_path / "standin", SMALL)
    model, chat = load(tmp_path / "standin", fit="auto")
    assert model.logits.weight.dtype == torch.float32
    answer = reply(model, chat, [{"role": "user", "content": "what?"}], max_new_tokens=3)
    plain, _ = load(tmp_path / "standin", dtype=torch.float32)
    assert answer.token_ids == reply(plain, chat, [{"role": "user", "content": "what?"}], max_new_tokens=3).token_ids


def test_a_way_that_is_asked_for_is_taken(full: Path) -> None:
    chosen = choose_fit(full, "int4", free=Room(GB, GB, "a card"))
    assert (chosen.device, chosen.bits) == ("cuda", 4) and "as asked" in chosen.says
    with pytest.raises(ValueError, match="auto, whole, int8, int4, mapped"):
        choose_fit(full, "int3")


def test_auto_loads_the_study_model_as_this_machine_allows() -> None:
    chosen = choose_fit(STUDY, free=Room(GB))
    assert (chosen.device, chosen.bits, chosen.mapped) == ("cpu", None, False)
    assert load(STUDY, fit=chosen)[0].logits.weight.dtype == torch.bfloat16
    assert choose_fit(STUDY, free=Room(20_000_000)).mapped


def test_the_command_line_and_the_page_say_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "standin"
    write_standin(folder, SMALL)
    assert cli.main(["chat", "--model", str(folder), "--max-tokens", "2", "what?"]) == 0
    assert capsys.readouterr().err.startswith("(bfloat16 ")
    assert cli.main(["chat", "--model", str(folder), "--fit", "int4", "--max-tokens", "2", "what?"]) == 0
    assert capsys.readouterr().err.startswith("(int4 on ")
    session = Session.load(str(folder))
    assert capsys.readouterr().err.startswith("(bfloat16 ")
    assert session.model_name == f"standin, {parameters(SMALL) / 1e6:.1f} M parameters"
