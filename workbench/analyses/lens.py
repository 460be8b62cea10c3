"""The logit lens: every layer's stream read as if it were the last, for words and for patches (analysis P1).

Letters: L1 the streams (embedded, then after each layer), N positions looked at, W vocabulary, D decoder stream, k words kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_vl_ref import Chat, KimiVL
from kimi_vl_ref.images import PatchGrid
from workbench.runs import Run
from workbench.study.scenes import Scene
from workbench.study.views import Album
from workbench.tape import attach

from .replay import replayed
from .result import Result, about_runs

Box = tuple[float, float, float, float]
Named = tuple[str, Box]  # what is there, and where in pixels of the picture

BLOCK = 1 << 24  # logits held at once, about 100 rows of the released vocabulary


def lens_logits(model: KimiVL, stream: Tensor) -> Tensor:
    """(..., D) of any layer -> (..., W) in at least float32: softmax(W_U norm(x)) before the softmax (nostalgebraist 2020)."""
    logits = model.logits(model.decoder.norm(stream))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.inference_mode()
def streams(model: KimiVL, chat: Chat, run: Run, positions: Sequence[int]) -> dict[str, Tensor]:
    """The stream of a run at these positions, (N, D) by name: "embedded", then "0", "1", ... after each decoder layer.

    The run's tokens and pictures are read once more, in one pass. Raises ValueError for a run of other weights and for
    positions that it does not have.
    """
    if not len(positions) or min(positions) < 0 or max(positions) >= len(run.token_ids):
        raise ValueError(f"positions {list(positions)[:5]} do not fit the run; give some from 0 to {len(run.token_ids) - 1}")
    with attach(model, read=["embedded", "decoder.layers.*"], rows=[int(at) for at in positions]) as tape:
        model.decoder(replayed(model, chat.processor, run))
    return {site.removeprefix("decoder.layers."): tape.last(site)[0] for site in tape.sites}


def logit_lens(
    model: KimiVL,
    chat: Chat,
    run: Run,
    positions: Sequence[int] | None = None,
    *,
    targets: Sequence[int] | None = None,
    top: int = 5,
) -> Result:
    """P1: what each layer would say next if it were the last (also for visual tokens: arXiv 2410.07149).

        result = logit_lens(model, chat, run, run.positions("image"))
        result["words"]     # (L1, N, k), most likely first

    positions default to those that wrote the reply. `targets` (N,) are token ids, default: what the last layer says.
    words, probs (L1, N, k)     the k likeliest tokens
    prob, rank (L1, N)          of the target; rank 0 is the likeliest
    kl (L1, N)                  KL(last layer || this one), nats
    first, settled (N,)         number of the first stream whose likeliest token is the last layer's, and of the first from
                                which that stays so (0 is embedded)
    Chance is a uniform guess. The lens reads early layers in the last one's terms, which they need not speak.
    Raises ValueError as `streams` does, and for targets that do not fit.
    """
    about = about_runs([run], positions="those that wrote the reply" if positions is None else "as given")
    at = list(range(run.prompt_length - 1, len(run.token_ids) - 1)) if positions is None else [int(t) for t in positions]
    if targets is not None and len(targets) != len(at):
        raise ValueError(f"there are {len(targets)} targets for {len(at)} positions; give one for each")
    found = streams(model, chat, run, at)
    size = model.logits.out_features
    step, parts = max(1, BLOCK // size), []
    for start in range(0, len(at), step):
        block = {name: stream[start : start + step] for name, stream in found.items()}
        parts.append(_read(model, block, None if targets is None else targets[start : start + step], min(top, size)))
    joined = [np.concatenate(each, min(1, each[0].ndim - 1)) for each in zip(*parts, strict=True)]  # along the positions
    ids, probs, prob, rank, kl, entropy = joined
    same = ids[..., 0] == ids[-1, :, 0]  # (L1, N)
    values = {
        "words": np.vectorize(chat.tokenizer.token_text, otypes=[str])(ids),
        "probs": probs,
        "prob": prob,
        "rank": rank,
        "kl": kl,
        "first": same.argmax(0),
        "settled": len(same) - np.cumprod(same[::-1], 0).sum(0),
    }
    layers, tokens = ("layer", list(found)), ("position", at)
    axes: dict[str, Any] = dict.fromkeys(("prob", "rank", "kl"), [layers, tokens])
    axes |= dict.fromkeys(("words", "probs"), [layers, tokens, ("place", list(range(ids.shape[-1])))])
    axes |= dict.fromkeys(("first", "settled"), [tokens])
    chance = {"prob": 1 / size, "rank": (size - 1) / 2, "kl": np.broadcast_to(np.log(size) - entropy, kl.shape)}
    about |= {"tokens_shown": [run.texts[t] for t in at], "targets": "given" if targets is not None else "the last layer's"}
    return Result("logit-lens", "What each layer would say next", values, axes, chance, about)


@torch.inference_mode()
def _read(model: KimiVL, found: dict[str, Tensor], targets: Sequence[int] | None, top: int) -> tuple[np.ndarray, ...]:
    """Of a block of n positions: ids and probs (L1, n, k), prob, rank and kl (L1, n), the last layer's entropy (n,)."""
    final = lens_logits(model, list(found.values())[-1]).log_softmax(-1)  # (n, W)
    target = final.argmax(-1) if targets is None else torch.tensor(list(targets), device=final.device)
    layers: list[list[Tensor]] = []
    for stream in found.values():
        logprobs = lens_logits(model, stream).log_softmax(-1)
        best = logprobs.topk(top, dim=-1)
        own = logprobs.gather(-1, target[:, None])
        kl = (final.exp() * (final - logprobs)).sum(-1).clamp(min=0)
        layers.append([best.indices, best.values.exp(), own[:, 0].exp(), (logprobs > own).sum(-1), kl])
    stacked = [torch.stack(each).cpu().numpy() for each in zip(*layers, strict=True)]
    return *stacked, (-(final.exp() * final).sum(-1)).cpu().numpy()


# ---- words on patches


def patch_words(
    model: KimiVL,
    chat: Chat,
    runs: Sequence[Run],
    objects: Sequence[Sequence[Named]],
    *,
    top: int = 5,
    shuffles: int = 20,
    seed: int = 0,
) -> Result:
    """P1 for patches: on how many visual tokens of an object does the lens name it? (arXiv 2410.07149)

        result = patch_words(model, chat, runs, [named_objects(scene) for scene in scenes])

    share (2, L1): of the visual tokens that show an object, those among whose `top` words is any word of its name, and those
    with every word; a word is told by its first token. Objects are those of each run's first picture. Chance: the same
    tokens judged by the names of objects in another picture (the same one if there is no other), the mean of `shuffles`
    draws with their 95% range in `shuffled_low` and `shuffled_high`. Raises ValueError where no visual token shows an object.
    """
    if len(objects) != len(runs):
        raise ValueError(f"there are {len(objects)} lists of objects for {len(runs)} runs; give one for each")
    about = about_runs(runs, top=top, seed=seed, shuffles=shuffles)
    said: list[np.ndarray] = []  # (L1, tokens of the run, k) token ids
    of: list[tuple[int, str]] = []  # for each token of `said`: its run and the name of what it shows
    names: list[str] = []
    for number, (run, named) in enumerate(zip(runs, objects, strict=True)):
        shown = shown_on(run.pictures[0].grid, named) if run.pictures else []
        covered = [token for token, name in enumerate(shown) if name]
        if covered:
            found = streams(model, chat, run, run.positions("image 0")[covered].tolist())
            names = list(found)
            with torch.inference_mode():
                said.append(np.stack([lens_logits(model, x).topk(top, -1).indices.cpu().numpy() for x in found.values()]))
            of += [(number, shown[token]) for token in covered]
    if not of:
        raise ValueError("no visual token shows an annotated object; give runs about pictures with the boxes of their objects")
    words = np.concatenate(said, 1)
    pieces = {name: [_first_tokens(chat, word) for word in name.split()] for name in {name for _, name in of}}
    share = _named(words, [pieces[name] for _, name in of])
    rng = np.random.default_rng(seed)
    others = [_named(words, [pieces[name] for name in _of_others(of, rng)]) for _ in range(shuffles)]
    low, high = np.quantile(others, (0.025, 0.975), axis=0)
    values = {"share": share, "shuffled_low": low, "shuffled_high": high}
    axes = dict.fromkeys(values, [("named by", ["any word", "every word"]), ("layer", names)])
    about |= {"visual_tokens": len(of), "objects": sum(map(len, objects))}
    title = f"Visual tokens of an object whose top {top} words name it"
    return Result("patch-words", title, values, axes, {"share": np.mean(others, 0)}, about)


def named_objects(pictures: Scene | Album) -> list[Named]:
    """Objects and printed characters of the (first) picture of a study scene, with their boxes."""
    view = pictures.views[0]
    return [(thing.name, thing.box) for thing in view.objects] + list(view.glyphs)


def shown_on(grid: PatchGrid, named: Sequence[Named]) -> list[str]:
    """For each visual token the name of the object that covers most of it, "" where none covers half of the smaller one."""
    shown = []
    for token in range(grid.token_count):
        cell, best, name = grid.token_box(token) or (0.0, 0.0, 0.0, 0.0), 0.0, ""  # a token of padding shows nothing
        for what, box in named:
            common = _area((max(cell[0], box[0]), max(cell[1], box[1]), min(cell[2], box[2]), min(cell[3], box[3])))
            if common > best and common >= 0.5 * min(_area(cell), _area(box)):
                best, name = common, what
        shown.append(name)
    return shown


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _first_tokens(chat: Chat, word: str) -> list[int]:
    """Ids with which a word may begin, after a blank and without one; a token of blanks alone says nothing."""
    written = [chat.tokenizer.encode(text) for text in (f" {word}", word)]
    return [next(id for id in ids if chat.tokenizer.token_text(id).strip()) for ids in written]


def _named(words: np.ndarray, pieces: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """(2, L1) shares of the tokens that say any and every word; words (L1, tokens, k), pieces: each token's words' ids."""
    said = [
        np.stack([np.isin(words[:, at], ids).any(-1) for ids in wanted]) for at, wanted in enumerate(pieces)
    ]  # tokens times (words of the name, L1)
    return np.stack([np.mean([one.any(0) for one in said], 0), np.mean([one.all(0) for one in said], 0)])


def _of_others(of: Sequence[tuple[int, str]], rng: np.random.Generator) -> list[str]:
    """For each visual token the name of something in another run's picture, or in its own if there is no other."""
    runs = sorted({run for run, _ in of})
    by_run = {run: [name for r, name in of if r == run] for run in runs}
    stand_in = {run: int(rng.choice([r for r in runs if r != run] or [run])) for run in runs}
    return [str(rng.choice(by_run[stand_in[run]])) for run, _ in of]
