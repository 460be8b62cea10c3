"""The logit lens: its last layer is the model, its numbers are those of a naive reading, and planted words are found."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny import picture, question, talking_model, tiny_chat, tiny_model
from workbench.analyses import lens
from workbench.analyses.lens import lens_logits, logit_lens, patch_words, shown_on, streams
from workbench.figures.lens import logit_lens_figure, patch_words_figure, patch_words_map
from workbench.runs import Run, record

MODEL, CHAT = talking_model(), tiny_chat()


@cache
def recorded(seed: int = 0) -> Run:
    asked = question("How many red circles?", picture(90, 60, seed))
    *_, run = record(MODEL, CHAT, asked, model_name="tiny model", max_new_tokens=5)
    assert isinstance(run, Run)
    return run


@torch.no_grad()
def by_hand(run: Run) -> tuple[list[Tensor], Tensor]:
    """The stream after every layer, layer after layer, (T, D) each, and the model's logits (T, W)."""
    pixels, grids, _ = CHAT.processor([one.image for one in run.pictures])
    ids = torch.tensor(run.token_ids[None].astype(int))
    x = MODEL.embedded(ids, MODEL.see(pixels, grids))
    found, where = [x[0]], MODEL.decoder.place(x, None)
    for layer in MODEL.decoder.layers:
        x = layer(x, where)
        found.append(x[0])
    return found, MODEL.logits(MODEL(ids, pixels, grids))[0]


def test_the_last_layer_is_the_models_logits_bit_for_bit() -> None:
    run = recorded()
    everything = list(range(len(run.token_ids)))
    found = streams(MODEL, CHAT, run, everything)
    assert list(found) == ["embedded", "0", "1", "2"]
    with torch.no_grad():
        assert torch.equal(lens_logits(MODEL, found["2"]), by_hand(run)[1])


def test_every_number_agrees_with_a_naive_reading() -> None:
    run = recorded()
    at = [2, 7, len(run.token_ids) - 1]
    wanted = [5, 9, 11]
    result = logit_lens(MODEL, CHAT, run, at, targets=wanted, top=3)
    found, final = by_hand(run)
    weight, scale, eps = MODEL.logits.weight, MODEL.decoder.norm.weight, MODEL.config.text.rms_norm_eps
    for layer, stream in enumerate(found):
        for n, t in enumerate(at):
            normed = stream[t] / (stream[t].square().mean() + eps).sqrt() * scale
            p, q = (weight @ normed).softmax(-1), final[t].softmax(-1)
            order = p.argsort(descending=True).tolist()
            assert result["words"][layer, n].tolist() == [CHAT.tokenizer.token_text(id) for id in order[:3]]
            assert result["probs"][layer, n] == pytest.approx(p[order[:3]].numpy(), rel=1e-4)
            assert result["prob"][layer, n] == pytest.approx(float(p[wanted[n]]), rel=1e-4)
            assert result["rank"][layer, n] == order.index(wanted[n])
            assert result["kl"][layer, n] == pytest.approx(float((q * (q / p).log()).sum()), abs=1e-5)
    assert result["kl"][-1] == pytest.approx(0, abs=1e-6)


def test_by_default_the_lens_follows_what_the_last_layer_says_where_the_reply_was_written() -> None:
    run = recorded()
    result = logit_lens(MODEL, CHAT, run)
    assert result.axes["prob"][1][1] == list(range(run.prompt_length - 1, len(run.token_ids) - 1))
    assert (result["rank"][-1] == 0).all() and result["words"][-1, :, 0].tolist() == run.texts[run.prompt_length :]  # greedy


def test_layers_that_write_nothing_leave_the_answer_to_the_embedding() -> None:
    model = tiny_model(3, vocab_size=CHAT.tokenizer.vocab_size)
    for layer in model.decoder.layers:
        for name, weight in layer.named_parameters():
            if name.split(".")[-2] == "out" or "down" in name and "attn" not in name:
                weight.zero_()
    *_, run = record(model, CHAT, question("How many?"), model_name="silent layers", max_new_tokens=3)
    assert isinstance(run, Run)
    result = logit_lens(model, CHAT, run)
    assert (result["first"] == 0).all() and (result["settled"] == 0).all() and result["kl"] == pytest.approx(0, abs=1e-6)


class Planted:
    """A model whose stream is the words themselves: channel i is token i."""

    logits = staticmethod(lambda x: x)
    decoder = SimpleNamespace(norm=staticmethod(lambda x: x))


def one_hot(*ids: int) -> Tensor:
    return 10.0 * torch.eye(CHAT.tokenizer.vocab_size)[list(ids)]


def test_first_is_the_first_time_and_settled_the_last_change(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {"embedded": one_hot(3, 4), "0": one_hot(7, 5), "1": one_hot(3, 5), "2": one_hot(7, 5)}
    monkeypatch.setattr(lens, "streams", lambda *_: planted)
    model: Any = Planted()
    model.logits = type("Logits", (), {"__call__": lambda self, x: x, "out_features": CHAT.tokenizer.vocab_size})()
    result = logit_lens(model, CHAT, recorded(), [4, 5])
    assert result["first"].tolist() == [1, 1] and result["settled"].tolist() == [3, 1]


def test_words_planted_on_patches_are_found_and_the_other_pictures_names_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {word: CHAT.tokenizer.encode(f" {word}")[0] for word in ("red", "circle", "many")}
    assert len(set(first.values())) == 3
    runs = [recorded(0), recorded(1)]
    grid = runs[0].pictures[0].grid
    left, right = grid.token_box(0), grid.token_box(1)
    assert left is not None and right is not None
    objects = [[("red circle", left), ("red", right)], [("many", left)]]

    def planted(model: Any, chat: Any, run: Run, positions: list[int]) -> dict[str, Tensor]:
        visual = run.positions("image 0")
        assert positions == visual[: len(positions)].tolist()
        said = [first["red"], first["red"]] if run is runs[0] else [first["many"]]
        return {"embedded": one_hot(*[0] * len(said)), "0": one_hot(*said)}

    monkeypatch.setattr(lens, "streams", planted)
    result = patch_words(Planted(), CHAT, runs, objects, top=1)  # type: ignore[arg-type]
    assert result["share"] == pytest.approx(np.array([[0, 1], [0, 2 / 3]]))  # "circle" is never said
    assert result.chance["share"] == pytest.approx(np.zeros((2, 2)))
    assert result.about["visual_tokens"] == 3
    figure = patch_words_figure(result)
    figure.canvas.draw()
    assert figure.get_supxlabel() == result.weights and "3 tokens of 2 pictures" in figure.get_suptitle()
    lines = [np.asarray(line.get_ydata()) for line in figure.axes[0].lines]
    for kind in (0, 1):  # any word, every word: the share, and the names of other pictures
        assert lines[2 * kind] == pytest.approx(result["share"][kind])
        assert lines[2 * kind + 1] == pytest.approx(np.asarray(result.chance["share"])[kind])


def test_a_token_shows_what_covers_half_of_it_and_small_things_inside_it() -> None:
    grid = CHAT.processor.grid(56, 56)
    assert grid.token_grid == (2, 2)
    large, small, smaller = ("large", (26, 0, 56, 28)), ("small", (30, 30, 44, 44)), ("smaller", (46, 46, 50, 50))
    assert shown_on(grid, [large, small, smaller]) == ["", "large", "", "small"]


def test_the_table_and_the_map_show_the_likeliest_words_and_name_the_weights() -> None:
    run = recorded()
    table = logit_lens(MODEL, CHAT, run)
    figure = logit_lens_figure(table)
    figure.canvas.draw()
    assert figure.get_supxlabel() == "tiny model"
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert len(shown) == table["prob"].size and shown[-1] == (str(table["words"][-1, -1, 0]).strip() or "' '")[:9]
    over = logit_lens(MODEL, CHAT, run, run.positions("image 0").tolist())
    figure = patch_words_map(over, run.pictures[0], 2)
    figure.canvas.draw()
    assert figure.get_supxlabel() == "tiny model"
    rows, columns = (n // 2 for n in run.pictures[0].grid.grid)  # the last column is 6 pixels wide: no room for a word
    assert len(figure.axes[1].texts) == rows * (columns - 1)
    with pytest.raises(ValueError, match="layer 9 is none of embedded, 0, 1, 2"):
        patch_words_map(over, run.pictures[0], 9)
    with pytest.raises(ValueError, match="visual tokens"):
        patch_words_map(table, run.pictures[0], 2)


def test_what_does_not_fit_the_run_is_refused() -> None:
    run = recorded()
    with pytest.raises(ValueError, match="do not fit the run"):
        logit_lens(MODEL, CHAT, run, [len(run.token_ids)])
    with pytest.raises(ValueError, match="1 targets for 2 positions"):
        logit_lens(MODEL, CHAT, run, [1, 2], targets=[3])
    with pytest.raises(ValueError, match="other weights"):
        logit_lens(tiny_model(9, vocab_size=CHAT.tokenizer.vocab_size), CHAT, run)
    with pytest.raises(ValueError, match="no visual token shows"):
        patch_words(MODEL, CHAT, [run], [[("red", (500.0, 500.0, 600.0, 600.0))]])
