"""`kimi-vl doctor --deep`: the pieces are the model, they agree with transformers, and a difference is laid at its layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kimi_vl_ref import load_checkpoint
from workbench import cli
from workbench.checkup import deep
from workbench.checkup.standin import SMALL, write_standin
from workbench.parity import probe
from workbench.tape import attach


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "Kimi-VL-small-Instruct"
    write_standin(folder, SMALL)
    return folder


def test_layers_agree_and_the_report_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "report.md"
    assert cli.main(["doctor", str(folder), "--deep", "--report", str(to)]) == 0
    out = capsys.readouterr().out
    assert "sites of 4 layers agree with transformers in float32" in out and "deep routing" in out
    text = to.read_text()
    assert text.startswith(f"# {folder.name} against transformers") and text.count("\n| ") == 6  # head, rule, 4 layers
    assert f"torch {torch.__version__}" in text and str(folder.parent) not in text


def test_the_pieces_together_are_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that each piece is given is what the whole model has there, and the last piece has its logits."""
    model, given = load_checkpoint(folder, dtype=torch.float32), probe(SMALL)
    ids = torch.cat([given.input_ids, given.decode_ids], dim=1)
    with torch.no_grad(), attach(model, ["embedded", "decoder.layers.*", "decoder.norm"]) as tape:
        whole = model.logits(model(ids, given.pixel_values, given.image_grid_hws))
    seen: list[tuple[torch.Tensor, nn.Module]] = []
    original = deep._stream

    def watch(piece: Any, *rest: Any) -> torch.Tensor:
        stream = original(piece, *rest)
        with torch.no_grad():
            logits = piece.logits(piece.decoder(stream))
        seen.append((stream, logits))
        return stream

    monkeypatch.setattr(deep, "_stream", watch)
    found = list(deep.pieces(folder))
    before = ["embedded", *(f"decoder.layers.{layer}" for layer in range(3))]
    for name, (stream, _) in zip(before, seen, strict=True):
        torch.testing.assert_close(stream, tape[name][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[-1][1], whole, rtol=1e-4, atol=1e-4)
    assert [piece.layer for piece in found] == [0, 1, 2, 3] and all(piece.agrees for piece in found)
    layers = SMALL.vision.num_hidden_layers
    assert found[1].sites > 15 and found[0].sites > found[1].sites + 10 * layers  # the tower is in the first


def planted(change: Callable[[nn.Module], None], layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes transformers' side of one layer, in float32 and in bfloat16."""
    original, built = deep.as_decoder, []

    def wrong(model: Any) -> nn.Module:
        theirs = original(model)
        built.append(theirs)
        # layer 0 is built once (bfloat16; the walk takes the whole of transformers' model), each later one twice
        if layer and (len(built) - 2) // 2 + 1 == layer and len(built) > 1:
            with torch.no_grad():
                change(theirs.model.layers[0])
        return theirs

    monkeypatch.setattr(deep, "as_decoder", wrong)


def test_a_difference_is_laid_at_its_layer_and_site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(layer: Any) -> None:
        layer.self_attn.kv_a_layernorm.weight = nn.Parameter(layer.self_attn.kv_a_layernorm.weight * 1.01, False)

    planted(other, 2, monkeypatch)
    found = list(deep.pieces(folder))
    assert [piece.layer for piece in found if not piece.agrees] == [2]
    first = found[2].first
    assert first is not None and first.site == "decoder.layers.2.attn.latent"


def test_other_choices_are_counted_and_do_not_count_against_the_pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(layer: Any) -> None:
        bias = layer.mlp.gate.e_score_correction_bias
        bias.data = bias + 0.02 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(0))

    planted(other, 3, monkeypatch)
    found = list(deep.pieces(folder))
    third = found[3]
    assert third.flips > 0 and third.margin > 0 and third.free > 2 * third.pinned and third.pinned <= deep.TOLERANCE
    assert all(piece.flips == 0 and math.isnan(piece.margin) for piece in found[:3])
    # in float32 the choice itself is the first thing that differs
    assert third.first is not None and third.first.site.endswith(".chosen")
