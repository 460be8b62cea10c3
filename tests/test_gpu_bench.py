"""The GPU script on a small model and a CPU: every row runs; a step of fixed shapes is the eager step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, peers
from benchmarks.graphs import FixedStep
from benchmarks.varlen import VarlenCore
from benchmarks.ways_speed import swapped
from tiny import tiny_model


@pytest.mark.parametrize("lengths", [[9], [3, 9, 6]], ids=["one row", "ragged rows"])
def test_a_fixed_step_is_the_eager_step(lengths: list[int]) -> None:
    model = tiny_model(2, torch.float64)
    planted, ids = peers.Planted(model, lengths, 5), torch.randint(120, (len(lengths), 5))
    with torch.inference_mode():
        eager, cache = planted.ours(), planted.ours()
        fixed = FixedStep(model, cache, max(lengths) + 4)
        for _ in range(2):  # and once more from the start
            fixed.rewind()
            eager = planted.ours()
            for at in range(3):
                expected = model.logits(model(ids[:, at : at + 1], cache=eager)[:, -1])
                torch.testing.assert_close(fixed(ids[:, at : at + 1]), expected)
        fixed.finish()  # the eager path goes on with the same cache
        assert cache.lengths.tolist() == eager.lengths.tolist() and cache.filled == eager.filled
        torch.testing.assert_close(model(ids[:, 3:4], cache=cache), model(ids[:, 3:4], cache=eager))


def test_a_full_fixed_step_says_so() -> None:
    model = tiny_model(2)
    cache = peers.Planted(model, [4], 1).ours()
    with pytest.raises(ValueError, match="4 slots hold no token after the 4"):
        FixedStep(model, cache, 4)
    fixed = FixedStep(model, cache, 5)
    with torch.inference_mode():
        fixed(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="all 5 slots are taken"):
        fixed(torch.tensor([[1]]))


def test_the_whole_script_runs_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    written = tmp_path / "gpu.json"
    gpu.main(["--small", "--device", "cpu", "--rounds", "1", "--json", str(written)])
    rows = json.loads(written.read_text())["rows"]
    works = ["rates", "rates", "decode", "decode", "prefill", "vision", "packed", "long", "recording"]
    assert [row["work"] for row in rows] == works
    assert rows[2]["graph gap"] < 1e-5 and rows[2]["transformers gap"] < 1e-4
    assert "device CPU" in capsys.readouterr().out  # nobody takes these figures for a GPU's


@pytest.mark.parametrize("grids", [[(2, 4)], [(2, 6), (4, 2), (2, 6), (2, 2)]], ids=["one", "a pack"])
def test_one_call_for_pictures_of_many_sizes_is_told_where_each_begins(
    grids: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself needs a GPU: a plain one takes its place, by what torch's own documentation says of it."""

    def plain(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and max_q == max_k == max(h * w for h, w in grids)
        rows = []
        for first, last in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
            scores = torch.einsum("phd,shd->hps", q[first:last], k[first:last]) * q.shape[-1] ** -0.5
            rows.append(torch.einsum("hps,shd->phd", scores.softmax(-1), v[first:last]))
        return torch.cat(rows)

    monkeypatch.setattr("benchmarks.varlen.varlen_attn", plain)
    model = tiny_model(2)
    pixels = torch.randn(sum(h * w for h, w in grids), 3, 14, 14)
    expected, own = model.vision(pixels, grids), [layer.attn.core for layer in model.vision.layers]
    with swapped(model, VarlenCore()):
        torch.testing.assert_close(model.vision(pixels, grids), expected)
    assert [layer.attn.core for layer in model.vision.layers] == own


def test_outputs_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing is timed"):
        gpu.gap(torch.ones(3), torch.tensor([1.0, 1.0, 1.01]))


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2 and "--small --device cpu" in capsys.readouterr().err
