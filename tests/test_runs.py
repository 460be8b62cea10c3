"""A run is what happened: the tokens that come without recording, the model's own rows and routing, whole on disk."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from kimi_vl_ref import Reply, stream_reply
from kimi_vl_ref.attention import ExplicitCore
from kimi_vl_ref.images import PatchGrid, Picture
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT
from tiny import picture, question, saying, talking_model, tiny_chat
from workbench import kept, recorder, run_files, runs
from workbench.edits import ablate_heads, applied, block_attention, force_experts, set_top_k
from workbench.runs import ARRAYS, Run, RunError, record
from workbench.tape import attach

MODEL, CHAT = talking_model(), tiny_chat()
ASKED = question("How many red circles?", picture(100, 60), picture(50, 90, seed=1))
NAME = "tiny model, random weights"


def recorded(messages: list[dict[str, Any]] = ASKED, tokens: int = 12, **options: Any) -> Run:
    *replies, run = record(MODEL, CHAT, messages, model_name=NAME, max_new_tokens=tokens, **options)
    assert isinstance(run, Run) and all(isinstance(reply, Reply) for reply in replies)
    return run


@pytest.fixture(scope="module")
def run() -> Run:
    return recorded()


@pytest.fixture(scope="module")
def thinking() -> Run:
    with attach(MODEL, edit=saying(f"{OPEN_THOUGHT}count the circles{CLOSE_THOUGHT}There are two.")):
        return recorded(tokens=100)


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not any(module._forward_hooks for module in MODEL.modules())


# --- recording -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}, {"thought_budget": 2}], ids=str)
def test_recording_changes_no_token_and_no_logprob(options: dict[str, Any]) -> None:
    *_, plain = stream_reply(MODEL, CHAT, ASKED, max_new_tokens=8, **options)
    run = recorded(tokens=8, **options)
    n = run.prompt_length
    assert run.token_ids.tolist() == plain.prompt.input_ids + plain.token_ids
    assert run.logprobs[n:].tolist() == np.array(plain.logprobs, np.float32).tolist()  # bit for bit
    assert run.entropies[n:].tolist() == np.array(plain.entropies, np.float32).tolist()
    assert np.isnan(run.logprobs[:n]).all() and np.isnan(run.entropies[:n]).all()
    assert (run.thought, run.answer, run.finished) == (plain.thought, plain.answer, plain.finished)
    assert run.roles[:n] == plain.prompt.roles
    assert run.settings["temperature"] == options.get("temperature", 0.0) and run.seed == options.get("seed")


def test_rows_and_routing_are_those_of_the_whole_sequence_in_one_pass(run: Run) -> None:
    """The last token included, which generation itself never reads."""
    prompt = CHAT.prompt(ASKED)
    core, router = "decoder.layers.*.attn.core", "decoder.layers.[12].ffn.router.*"
    with attach(MODEL, read=[f"{core}.probs", router], swap={core: lambda original: ExplicitCore()}) as tape, torch.no_grad():
        MODEL(torch.tensor(run.token_ids[None], dtype=torch.long), prompt.pixel_values, prompt.image_grid_hws)
    visual = run.positions("image")
    assert run.moe_layers == [1, 2] and run.picture_attention.shape == (3, 5, len(run.token_ids) - run.first_row, len(visual))
    for layer in range(3):
        (probs,) = tape[f"decoder.layers.{layer}.attn.core.probs"]
        rows = probs[0, :, run.first_row :].numpy()
        np.testing.assert_allclose(run.picture_attention[layer], rows[..., visual], atol=1e-3)
        for at, role in enumerate(run.role_names):
            np.testing.assert_allclose(run.role_mass[layer, :, :, at], rows[..., run.positions(role)].sum(-1), atol=2e-3)
    for at, layer in enumerate(run.moe_layers):
        parts = [f"decoder.layers.{layer}.ffn.router.{part}" for part in ("scores", "chosen", "weights")]
        scores, chosen, weights = (tape[part][0][0] for part in parts)
        assert np.array_equal(run.chosen[at], chosen.numpy())
        np.testing.assert_allclose(run.weights[at], weights.numpy(), atol=2e-3)
        np.testing.assert_allclose(run.scores[at], scores.numpy(), atol=1e-3)
        biased = run.scores[at].astype(np.float32) + run.bias[at]
        kept = np.take_along_axis(biased, run.chosen[at].astype(int), -1).min(-1)
        assert (kept >= np.sort(biased, -1)[:, -4] - 2e-3).all()  # the bias is the one that chose


def test_attention_of_a_row_is_divided_among_the_roles(run: Run) -> None:
    np.testing.assert_allclose(run.role_mass.astype(np.float32).sum(-1), 1, atol=4e-3)
    pictures = [name.startswith("image") for name in run.role_names]
    on_pictures = run.role_mass[..., pictures].astype(np.float32).sum(-1)
    np.testing.assert_allclose(run.picture_attention.astype(np.float32).sum(-1), on_pictures, atol=4e-3)


def test_heat_is_a_row_on_the_grid_of_its_picture(run: Run) -> None:
    (first, second), t = run.pictures, run.first_row + 3
    assert (run.tokens_of_picture(0), run.tokens_of_picture(1)) == (slice(0, 12), slice(12, 20))
    heat = run.heat(t, 1, layer=2, head=4)
    assert heat.shape == second.grid.token_grid == (4, 2)
    assert np.array_equal(heat.ravel(), run.picture_attention[2, 4, 3, 12:].astype(np.float32))
    mean = run.picture_attention[:, :, 3, :12].astype(np.float32).mean((0, 1))
    np.testing.assert_allclose(run.heat(t, 0).ravel(), mean, rtol=1e-5)
    assert run.heat(t).shape == first.grid.token_grid
    for wrong in ({"position": 0}, {"position": 999}, {"picture": 2}, {"layer": 3}, {"head": 5}):
        with pytest.raises(RunError):
            run.heat(**{"position": t, **wrong})


def test_rows_begin_with_the_text_after_the_last_picture(run: Run) -> None:
    assert run.roles[run.first_row] == "user" and run.first_row > run.positions("image").max()
    assert "user" not in run.roles[: run.first_row]
    assert "".join(run.texts[run.first_row : run.positions("user").max() + 1]) == "How many red circles?"
    assert run.question == "How many red circles?"
    assert run.messages[0]["content"][1] == {"type": "image", "image": 1}


def test_a_run_without_pictures() -> None:
    run = recorded(question("Hello"), tokens=3)
    assert run.picture_attention.shape == (3, 5, len(run.token_ids) - run.first_row, 0)
    assert run.roles[run.first_row] == "user" and run.pictures == []


def test_thought_answer_and_markers_have_their_roles(thinking: Run) -> None:
    assert (thinking.thought, thinking.answer, thinking.finished) == ("count the circles", "There are two.", True)
    written = range(thinking.prompt_length, len(thinking.token_ids))

    def text(role: str) -> str:
        return "".join(thinking.texts[t] for t in written if thinking.roles[t] == role)

    assert text("thought") == "count the circles"
    assert text("answer") == "There are two."
    assert thinking.roles[-1] == "special" and thinking.texts[-1] == "<|im_end|>"
    assert thinking.edits == ["edit logits"]
    assert {"thought", "answer"} <= set(thinking.role_names)


def test_a_reader_may_stop_early() -> None:
    asked = iter([False, False, True])
    run = recorded(should_stop=lambda: next(asked))
    whole = recorded(tokens=3)
    assert not run.finished and run.token_ids.tolist() == whole.token_ids.tolist()
    assert np.array_equal(run.chosen, whole.chosen) and np.array_equal(run.picture_attention, whole.picture_attention)


def test_an_abandoned_recording_leaves_nothing() -> None:
    items = record(MODEL, CHAT, ASKED, model_name=NAME)
    next(items)
    assert any(module._forward_hooks for module in MODEL.modules())
    del items


def test_two_recordings_at_once_are_each_alone(run: Run, thinking: Run) -> None:
    other = question("count the circles", picture(30, 30, seed=5))
    alone = recorded(other)
    pairs = zip(*(record(MODEL, CHAT, m, model_name=NAME, max_new_tokens=12) for m in (ASKED, other)), strict=True)
    *_, (first, second) = pairs
    for ours, theirs in ((first, run), (second, alone)):
        assert isinstance(ours, Run)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_a_long_question_keeps_its_last_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "PROMPT_ROWS", 4)
    short = recorded()
    assert short.first_row == run.prompt_length - 4
    assert np.array_equal(short.picture_attention, run.picture_attention[:, :, short.first_row - run.first_row :])


def bytes_beside_attention(run: Run) -> int:
    """What a run of these tokens keeps besides attention, as `kept` counts it."""
    arrays = run.chosen.nbytes + run.weights.nbytes + run.scores.nbytes + run.bias.nbytes
    return arrays + 200 * len(run.token_ids) + sum(3 * p.image.width * p.image.height for p in run.pictures)


def test_a_large_run_keeps_steps_then_the_mean_over_heads_and_then_the_last_rows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, exact = bytes_beside_attention(run), run.picture_attention.astype(np.float32)
    monkeypatch.setattr(recorder, "SCRATCH", 1)  # and computes row by row
    monkeypatch.setattr(kept, "FILE_BYTES", beside + run.picture_attention.nbytes + run.role_mass.nbytes)
    row_by_row = recorded()
    np.testing.assert_allclose(row_by_row.picture_attention, run.picture_attention, atol=1e-3)
    assert row_by_row.kept == {}
    monkeypatch.setattr(kept, "FILE_BYTES", kept.FILE_BYTES - 1)
    steps = recorded()
    assert steps.kept == {"picture_attention": "square root steps"} and steps.settings["heads"] == "each"
    # the steps themselves, and float16 beside them
    assert (np.abs(steps.picture_attention - exact) <= (2 * np.sqrt(exact) + 1 / 510) / 510 + 1e-3 * exact + 1e-7).all()
    np.testing.assert_allclose(steps.role_mass, run.role_mass, atol=1e-3)
    steps.save(tmp_path / "steps.run")
    assert np.array_equal(Run.load(tmp_path / "steps.run").picture_attention, steps.picture_attention)
    assert load_file(tmp_path / "steps.run")["picture_attention"].dtype == np.uint8
    monkeypatch.setattr(kept, "FILE_BYTES", beside + run.picture_attention.nbytes // 2 + run.role_mass.nbytes - 1)
    mean = recorded()
    assert mean.first_row == run.first_row and mean.settings["heads"] == "mean over heads"
    np.testing.assert_allclose(mean.picture_attention, exact.mean(1, keepdims=True), atol=4e-3)
    np.testing.assert_allclose(mean.role_mass, run.role_mass.astype(np.float32).mean(1, keepdims=True), atol=1e-3)
    with pytest.raises(RunError, match=r"head 1 does not exist; this run has heads 0 to 0 \(mean over heads\)"):
        mean.heat(mean.first_row, head=1)
    monkeypatch.setattr(kept, "FILE_BYTES", beside + 7 * 3 * (20 + 2 * len(run.role_names)))
    last = recorded()
    assert last.first_row == len(run.token_ids) - 7
    assert np.array_equal(last.picture_attention, mean.picture_attention[:, :, -7:])
    full = recorded(detail="full")
    assert np.array_equal(full.picture_attention, row_by_row.picture_attention) and full.kept == {}


REAL = {"layers": 27, "heads": 16, "experts": 64, "top_k": 6, "visual": 1024}


def real_size_run(reply: int, question: int, detail: str = "default") -> Run:
    """Random numbers in the sizes of the real model: a picture of 1,024 visual tokens that no compression makes smaller."""
    random, side = np.random.default_rng(0), 896
    image = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
    roles = ["special"] * 4 + ["image 0"] * REAL["visual"] + ["special"] + ["user"] * question + ["special"] * 3
    prompt = len(roles)
    roles += ["thought"] * (reply // 2) + ["answer"] * (reply - reply // 2)
    total, first, names = len(roles), roles.index("user"), list(dict.fromkeys(roles))
    moe, experts = REAL["layers"] - 1, REAL["experts"]
    scores = np.resize(random.random(9973, np.float32).astype(np.float16), (moe, total, experts))
    chosen = np.resize(np.arange(experts, dtype=np.uint16), (moe, total, REAL["top_k"]))
    arrays = {"chosen": chosen, "weights": scores[..., : REAL["top_k"]], "scores": scores}
    other = sum(array.nbytes for array in arrays.values()) + 200 * total + 3 * side * side
    found = kept.attention_kept(REAL["layers"], REAL["heads"], total - first, REAL["visual"], len(names), other, detail)
    shape = (REAL["layers"], REAL["heads"] if found.each else 1, found.rows)
    attention = kept.from_steps(np.resize(random.integers(0, 256, 9973, dtype=np.uint8), (*shape, REAL["visual"])))
    return Run(
        question="q" * question,
        pictures=[Picture(image, PatchGrid((side, side), (side, side), (64, 64), 14, 2))],
        token_ids=np.arange(total, dtype=np.int32),
        texts=[" word"] * total,
        roles=roles,
        prompt_length=prompt,
        logprobs=np.zeros(total, np.float32),
        entropies=np.zeros(total, np.float32),
        thought="word " * (reply // 2),
        answer="word " * (reply - reply // 2),
        finished=True,
        moe_layers=list(range(1, REAL["layers"])),
        n_experts=experts,
        **arrays,
        bias=np.zeros((moe, experts), np.float32),
        first_row=total - found.rows,
        picture_attention=attention,
        role_names=names,
        role_mass=np.zeros((*shape, len(names)), np.float16),
        model_name="random numbers in the sizes of the real model",
        device="cpu",
        dtype="bfloat16",
        kept={"picture_attention": "square root steps"} if found.steps else {},
    )


def test_five_hundred_tokens_about_1024_visual_tokens_of_the_real_model_stay_under_25_megabytes(tmp_path: Path) -> None:
    run = real_size_run(reply=500, question=20)
    assert run.picture_attention.shape == (27, 1, 523, 1024)  # every row of question and reply
    run.save(tmp_path / "real.run")
    assert (tmp_path / "real.run").stat().st_size < 25_000_000
    back = Run.load(tmp_path / "real.run")
    assert np.array_equal(back.picture_attention, run.picture_attention) and np.array_equal(back.scores, run.scores)
    # exactly: L rows M steps, L rows G and the routing in float16 and uint16, the picture; text and headers are the rest
    arrays = 27 * 523 * (1024 + 2 * len(run.role_names)) + 2 * 26 * len(run.roles) * (64 + 6 + 6) + 4 * 26 * 64
    picture = load_file(tmp_path / "real.run")["picture 0"].nbytes
    assert 0 < (tmp_path / "real.run").stat().st_size - arrays - picture - 12 * len(run.roles) < 100_000


def test_what_is_kept_of_attention_by_size() -> None:
    study: dict[str, Any] = {"layers": 5, "heads": 6, "roles": 6, "other": 1_000_000}
    real: dict[str, Any] = {"layers": 27, "heads": 16, "roles": 7, "other": 9_000_000}

    def heads_and_rows(detail: str = "default", **sizes: Any) -> tuple[bool, bool, int]:
        found = kept.attention_kept(**sizes, detail=detail)
        return found.each, found.steps, found.rows

    assert heads_and_rows(rows=300, visual=256, **study) == (True, False, 300)
    assert heads_and_rows(rows=500, visual=1024, **study) == (True, True, 500)
    assert heads_and_rows(rows=530, visual=1024, **real) == (False, True, 530)
    assert heads_and_rows(rows=2000, visual=1024, **real) == (False, True, 15_000_000 // (27 * (1024 + 14)))
    assert heads_and_rows("full", rows=530, visual=1024, **real) == (True, False, 530)
    assert heads_and_rows("full", rows=2000, visual=1024, **real) == (False, True, 2000)


def test_a_picture_of_many_pixels_is_kept_as_the_model_saw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = PatchGrid((1400, 1000), (140, 98), (8, 10), 14, 2)
    large = Picture(picture(1400, 1000), seen)
    small = kept.picture_kept(large, "default")
    assert small.image.size == (140, 98) and small.grid == seen and kept.picture_kept(large, "full") is large
    assert small.image.tobytes() == large.image.resize((140, 98), Image.Resampling.BICUBIC).tobytes()
    assert kept.picture_kept(Picture(picture(999, 1000), seen), "default").image.size == (999, 1000)


# --- what it costs in memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 8, 16, 64])
def test_a_recorder_holds_the_same_bytes_for_every_token(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: memory that a view keeps alive is counted whole, so nothing of T x T and no query of a long question hides."""
    monkeypatch.setattr(recorder, "JOINED", 4)
    monkeypatch.setattr(recorder, "PROMPT_ROWS", 7)
    held, cache, text = recorder.Recorder(MODEL), MODEL.new_cache(1), MODEL.config.text
    with attach(MODEL, read=held.keeps()), torch.inference_mode():
        MODEL(torch.arange(50)[None], cache=cache)
        for token in range(calls - 1):
            MODEL(torch.tensor([[token]]), cache=cache)
    layers, routed = text.num_hidden_layers, text.num_hidden_layers - 1
    queries = 4 * layers * text.num_attention_heads * text.qk_head_dim  # float32
    routing = routed * (4 * text.n_routed_experts + (8 + 4) * text.num_experts_per_tok)  # scores, experts' numbers, weights
    assert held.nbytes == (50 + calls - 1) * routing + (7 + calls - 1) * queries


def test_a_run_takes_the_same_bytes_for_every_token_written(run: Run) -> None:
    def held(one: Run) -> int:
        return sum(getattr(one, name).nbytes for name in ARRAYS)

    text, (experts, top_k) = MODEL.config.text, (run.n_experts, run.chosen.shape[2])
    routing = 2 * len(run.moe_layers) * (experts + 2 * top_k)
    attention = 2 * text.num_hidden_layers * text.num_attention_heads * (len(run.positions("image")) + len(run.role_names))
    for tokens in (24, 48):
        longer = recorded(tokens=tokens)
        assert longer.role_names == run.role_names
        assert held(longer) - held(run) == (len(longer.token_ids) - len(run.token_ids)) * (3 * 4 + routing + attention)
        assert len(longer.token_ids) == len(run.token_ids) + tokens - 12


# --- changes -------------------------------------------------------------------------------------------------------------


def test_changes_are_recorded_with_what_they_touched_and_the_rows_show_them(run: Run, tmp_path: Path) -> None:
    changes = [block_attention(slice(run.prompt_length, None), run.positions("image 0"), layers=[1], heads=[2]),
               force_experts(2, 3), ablate_heads(0, [1])]  # fmt: skip
    edited = recorded(changes=changes)
    assert edited.edits == [str(change) for change in changes]
    report = edited.settings["changes"]
    written = len(edited.token_ids) - edited.prompt_length
    assert report[0]["touched"] == {"queries": written, "looks": written * 12}
    assert report[2]["touched"] == {"tokens": len(edited.token_ids), "heads": 1}
    assert report[1]["settings"]["name"] == "force_experts" and (edited.chosen[1] == 3).any(-1).all()
    rows = edited.picture_attention[1, 2, edited.prompt_length - edited.first_row :, :12]
    assert not rows.any() and edited.picture_attention[1, 1].any() and edited.picture_attention[2, 2, :, :12].any()
    np.testing.assert_allclose(edited.role_mass.astype(np.float32).sum(-1), 1, atol=4e-3)
    edited.save(tmp_path / "edited.run")
    back = Run.load(tmp_path / "edited.run")
    assert back.edits == edited.edits and back.settings == edited.settings
    assert recorded().edits == []


def test_changes_around_a_recording_are_in_it_and_counted_for_it_alone(run: Run) -> None:
    with attach(MODEL, edit={"vision.norm": lambda tensor, site: tensor}), applied(MODEL, [ablate_heads(0, [1])]) as done:
        first, second = recorded(), recorded()
    for one in (first, second):
        assert one.edits == ["ablate head 1 of layer 0 (zero)", "edit vision.norm"]
        assert one.settings["changes"][0]["touched"]["tokens"] == len(one.token_ids)
    assert done.report()[0]["touched"]["tokens"] == 2 * len(first.token_ids)
    inside = recorded(changes=[ablate_heads(0, [1])])
    assert inside.token_ids.tolist() == first.token_ids.tolist() != run.token_ids.tolist()


def test_a_change_that_touched_nothing_is_warned_of_and_the_run_is_not_lost() -> None:
    with pytest.warns(RuntimeWarning, match="ablate head 1 of layer 0 .* touched nothing in this run"):
        run = recorded(changes=[ablate_heads(0, [1], tokens=[3000])])
    assert run.settings["changes"][0]["touched"] == {"tokens": 0, "heads": 0}


def test_one_top_k_for_all_layers_is_recorded_and_several_are_refused() -> None:
    assert recorded(changes=[set_top_k(None, 2)]).chosen.shape[2] == 2
    with pytest.raises(RunError, match=r"layers would choose \[2, 4\] experts a token"):
        recorded(changes=[set_top_k(1, 2)])
    with pytest.raises(RunError, match="detail='all' is unknown"):
        recorded(detail="all")


def test_weights_have_a_fingerprint(run: Run) -> None:
    moved = talking_model.__wrapped__()
    assert runs.fingerprint(moved) == run.versions["weights"]
    moved.vision.norm.bias[0] += 1
    assert runs.fingerprint(moved) != run.versions["weights"]


# --- on disk -------------------------------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was(thinking: Run, tmp_path: Path) -> None:
    odd = replace(thinking, texts=[*thinking.texts[:-1], "\ud83d <\u25c1>\n"], question='"äß🙂"')
    odd.save(tmp_path / "one.run")
    odd.save(tmp_path / "one.run")  # again, over it
    back = Run.load(str(tmp_path / "one.run"))
    for name, (dtype, _) in ARRAYS.items():
        assert getattr(back, name).dtype == dtype
        np.testing.assert_array_equal(getattr(back, name), getattr(odd, name))
    for name in runs._STORY:
        assert getattr(back, name) == getattr(odd, name), name
    for ours, theirs in zip(back.pictures, odd.pictures, strict=True):
        assert ours.grid == theirs.grid and ours.image.tobytes() == theirs.image.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["one.run"]


def test_a_run_without_pictures_comes_back(tmp_path: Path) -> None:
    run = recorded(question("Hello"), tokens=2)
    run.save(tmp_path / "one.run")
    assert Run.load(tmp_path / "one.run").picture_attention.shape == run.picture_attention.shape


@pytest.fixture(scope="module")
def saved(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "good.run"
    run.save(path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(RunError) as refusal:
        Run.load(path)
    message = str(refusal.value)
    assert str(path) in message and "\n" not in message
    return message


def test_each_damage_is_named(saved: Path, tmp_path: Path) -> None:
    good, bad = saved.read_bytes(), tmp_path / "bad.run"
    assert "there is no file" in refused(tmp_path / "none.run")
    assert "there is no file" in refused(tmp_path)
    for cut in (0, 7, 300, len(good) // 2, len(good) - 1):
        bad.write_bytes(good[:cut])
        assert "cut off, damaged or not a run" in refused(bad)
    bad.write_bytes(good + b"more")
    assert "cut off, damaged or not a run" in refused(bad)
    bad.write_bytes(b"\xff" * 200)
    assert "cut off, damaged or not a run" in refused(bad)
    for at in range(len(good) - 900, len(good), 90):
        bad.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert "do not match its checksum" in refused(bad)
    at = good.index(b"How many red")
    bad.write_bytes(good[:at] + b"N" + good[at + 1 :])
    assert "do not match its checksum" in refused(bad)


def test_other_files_and_versions_are_named(saved: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.run"
    save_file({"x": np.zeros(3)}, bad)
    assert "is a safetensors file but not a run" in refused(bad)
    for other in ("1", "3"):
        rewrite(saved, bad, marks={"format": other})
        assert f"is a run of format {other}, and this version reads format 2" in refused(bad)


def without(name: str) -> Any:
    return lambda story, arrays: (story if name in story else arrays).pop(name)


@pytest.mark.parametrize(
    "change, message",
    [
        (without("question"), "question"),
        (without("pictures"), "'pictures' is missing"),
        (without("picture 1"), "'picture 1' is missing"),
        (without("chosen"), "chosen"),
        (lambda story, arrays: story.update(colour="red"), "colour"),
        (lambda story, arrays: story.update(n_experts=3), "scores has the shape"),
        (lambda story, arrays: story.update(first_row=2), "picture_attention has the shape"),
        (lambda story, arrays: story.update(role_names=["user"]), "role_mass has the shape"),
        (lambda story, arrays: story["roles"].pop(), "roles for"),
        (lambda story, arrays: story.update(prompt_length=-1), "prompt_length=-1"),
        (lambda story, arrays: story["pictures"][0].pop("grid"), "grid"),
        (lambda story, arrays: story["pictures"].pop(), "picture 1"),
        (lambda story, arrays: arrays.update(chosen=arrays["chosen"] + np.uint16(500)), "but there are 11"),
        (lambda story, arrays: arrays.update(weights=arrays["weights"].astype(np.float32)), "weights is float32"),
        (lambda story, arrays: arrays.update({"picture 0": arrays["picture 0"][:200]}), "is damaged"),
        (lambda story, arrays: story.update(texts=None), "is damaged"),
        (lambda story, arrays: story.update(kept={"picture_attention": "square root steps"}), "said to be kept in steps"),
    ],
)
def test_a_run_that_does_not_add_up_is_refused(change: Any, message: str, saved: Path, tmp_path: Path) -> None:
    """Even with a checksum that is right."""
    rewrite(saved, tmp_path / "bad.run", change)
    refusal = refused(tmp_path / "bad.run")
    assert "is damaged: " in refusal and message in refusal


def rewrite(source: Path, target: Path, change: Any = lambda story, arrays: None, marks: dict[str, str] | None = None) -> None:
    text, arrays = run_files.read(Path(source))
    story = json.loads(text)
    change(story, arrays)
    text = json.dumps(story)
    metadata = {"kimi_vl_run": text, "format": "2", "sha256": run_files.digest(text, arrays)}
    save_file(arrays, target, metadata | (marks or {}))


def test_the_file_is_safetensors_that_others_can_read(saved: Path, run: Run) -> None:
    arrays = load_file(saved)
    assert np.array_equal(arrays["chosen"], run.chosen)
    assert arrays["picture 0"].tobytes().startswith(b"\x89PNG")


def test_saving_says_why_it_cannot(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write .*none/one.run .*; choose a folder that exists"):
        run.save(tmp_path / "none" / "one.run")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        run.save(tmp_path / "folder")
    with pytest.raises(RunError, match="roles for"):
        replace(run, roles=run.roles[1:]).save(tmp_path / "one.run")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


KILLING = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from workbench.run_files import read, write
path, seen = Path(sys.argv[1]), set()
random.seed(0)
write(path, "save 0", {"numbers": np.full(1 << 20, 0, np.int32)})
for turn in range(40):
    before, writer = set(path.parent.iterdir()), os.fork()
    while writer == 0:
        seen.add(len(seen))
        write(path, f"save {len(seen)}", {"numbers": np.full(1 << 20, len(seen), np.int32)})
    time.sleep(random.uniform(0, 0.04))
    while turn % 2 and set(path.parent.iterdir()) == before:
        pass  # until a save is under way, however busy the machine
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    text, arrays = read(path)  # refuses what is not whole
    assert (arrays["numbers"] == int(text.removeprefix("save "))).all()
"""  # as Run.save does; in a process of its own, which can fork cheaply


def test_a_kill_while_saving_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLING, str(tmp_path / "one.run")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    parts = [file.name for file in tmp_path.iterdir()]
    assert all(name == "one.run" or name.startswith(".one.run.") for name in parts)
    assert len(parts) > 1  # some kills came in the middle of a save
