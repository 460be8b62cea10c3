"""Runs made by hand, whose routing is known because it was written down: what the analyses of routing are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from kimi_vl_ref.images import PatchGrid, Picture
from workbench.runs import Run

NAME = "made by hand"


def hand_made(chosen: Any, n_experts: int, roles: Sequence[str] | None = None, **parts: Any) -> Run:
    """A run with this choice, (T, K) for one layer or (L, T, K); layers are numbered from 1.

    roles: default all "answer". parts: other fields of Run, such as scores, weights, bias, token_ids, prompt_length,
    pictures. What is not given is plain: equal weights, scores that lead to the choice, no bias.
    """
    chosen = np.asarray(chosen, np.uint16)
    chosen = chosen[None] if chosen.ndim == 2 else chosen
    layers, tokens, top_k = chosen.shape
    scores = np.full((layers, tokens, n_experts), 0.25)
    np.put_along_axis(scores, chosen.astype(int), np.broadcast_to(np.linspace(0.75, 0.5, top_k), chosen.shape), -1)
    ids = np.asarray(parts.pop("token_ids", range(tokens)), np.int32)
    pictures = parts.pop("pictures", [])
    visual = sum(picture.grid.token_count for picture in pictures)
    plain = {
        "question": "how many?",
        "texts": [f"w{id}" for id in ids],
        "roles": list(roles) if roles is not None else ["answer"] * tokens,
        "prompt_length": 0,
        "logprobs": np.zeros(tokens, np.float32),
        "entropies": np.zeros(tokens, np.float32),
        "thought": "",
        "answer": "",
        "finished": True,
        "moe_layers": list(range(1, layers + 1)),
        "weights": np.full(chosen.shape, 1 / top_k),
        "scores": scores,
        "bias": np.zeros((layers, n_experts)),
        "first_row": tokens,
        "picture_attention": np.zeros((1, 1, 0, visual), np.float16),
        "role_names": ["answer"],
        "role_mass": np.zeros((1, 1, 0, 1), np.float16),
        "model_name": NAME,
        "device": "cpu",
        "dtype": "float32",
        "versions": {"weights": "none"},
    }
    found = {**plain, **parts}
    for name, dtype in (("weights", np.float16), ("scores", np.float16), ("bias", np.float32), ("logprobs", np.float32)):
        found[name] = np.asarray(found[name], dtype)
    run = Run(token_ids=ids, pictures=pictures, n_experts=n_experts, chosen=chosen, **found)
    run.check()
    return run


def blank(rows: int, columns: int) -> Picture:
    """A grey picture of so many visual tokens of 28 pixels."""
    size = (28 * columns, 28 * rows)
    return Picture(Image.new("RGB", size, (128, 128, 128)), PatchGrid(size, size, (2 * rows, 2 * columns), 14, 2))


def random_choice(rng: np.random.Generator, tokens: int, experts: int, top_k: int, layers: int = 1) -> np.ndarray:
    """(L, T, K) different experts for each token, all sets alike likely."""
    return rng.random((layers, tokens, experts)).argsort(-1)[..., :top_k]


def drawn_words(figure: Figure) -> str:
    """What is written on a figure: its title, its foot, titles of panels and loose text. The figure is drawn once."""
    figure.draw_without_rendering()
    found = [figure.get_suptitle(), figure.get_supxlabel(), *(axes.get_title() for axes in figure.axes)]
    return "\n".join(found + [text.get_text() for axes in figure.axes for text in axes.texts])


def levels(axes: Axes) -> list[float]:
    """Heights of the level lines of a panel, where chance is drawn: those of axhline, and those of hlines."""
    lines = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    pieces = [piece for drawn in axes.collections if isinstance(drawn, LineCollection) for piece in drawn.get_segments()]
    lines += [np.asarray(piece)[:, 1] for piece in pieces if len(piece)]  # an interval that is not known has none
    return [float(line[0]) for line in lines if len(line) == 2 and line[0] == line[1]]
