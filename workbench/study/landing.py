"""Does attention land on the thing meant, rather than on things like it? Heads are found on one half of the scenes and
reported on the other.

For every scene the model reads its question and the written-out right reply. At named moments (the row of the last token
before something is written) each head's attention is summed over the target's box and over the boxes of its distractors:
things that share its colour or its shape, or, in a number, the other digits. Boxes are compared by attention per area, and
a distractor counts only where it shares no visual token with the target, since no head could tell those apart.
Letters: S samples, L layers, H heads, M visual tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from kimi_vl_ref import Chat, KimiVL
from kimi_vl_ref.chat import collate, reply_roles
from kimi_vl_ref.images import PatchGrid
from workbench.rows import decoder_rows
from workbench.tape import attach

from .batches import written_reply
from .evaluate import messages
from .families import Question, make
from .scenes import Scene
from .views import Box

HEADS = 3  # size of the fixed set
LEAST_MASS = 0.1  # of a head's attention on the target's visual tokens, on the first half: heads that barely look are out


@dataclass(frozen=True)
class Landing:
    family: str
    moment: str
    heads: list[tuple[int, int]]  # (layer, head)
    ratio: float  # attention per area, target over mean distractor, on the second half
    low: float  # 95% interval over scenes (bootstrap)
    high: float
    mass: float  # mean share of the set's attention on the visual tokens that the target touches
    misplaced: float  # the ratio when a distractor is taken for the target
    random_heads: float  # the ratio of as many heads taken at random, mean of 200 draws
    scenes: int  # of the second half, with at least one sample


@dataclass(frozen=True)
class _Sample:
    moment: str
    row: int  # token whose attention row is read
    target: Box
    distractors: list[Box]


def landing(model: KimiVL, chat: Chat, family: str, scenes: int = 200, split: str = "report", seed: int = 0) -> Landing:
    """Searches moments and heads on even scenes, reports odd ones. family: "point", "count" or "read"."""
    tables: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)  # by moment: scene, (3, L, H)
    for number in range(scenes):
        pictures, question = make(family, number, split)
        assert isinstance(pictures, Scene)
        for moment, found in _measured(model, chat, pictures, question):
            tables[moment].append((number, found))
    best: tuple[float, str, list[tuple[int, int]]] | None = None
    for moment, samples in tables.items():
        first = np.stack([found for number, found in samples if number % 2 == 0])
        chosen = _best_heads(first)
        if not chosen:
            continue
        ratio = _ratio(first, chosen)
        if best is None or ratio > best[0]:
            best = (ratio, moment, chosen)
    if best is None:
        raise ValueError(f"no head puts {LEAST_MASS:.0%} of its attention on the target of any {family!r} scene")
    _, moment, heads = best
    held = [(number, found) for number, found in tables[moment] if number % 2]
    return _report(family, moment, heads, held, np.random.default_rng(seed))


def _report(
    family: str, moment: str, heads: list[tuple[int, int]], held: list[tuple[int, np.ndarray]], rng: np.random.Generator
) -> Landing:
    numbers = np.array([number for number, _ in held])
    samples = np.stack([found for _, found in held])  # (S, 4, L, H)
    by_scene = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
    draws = []
    for _ in range(1000):
        drawn = rng.integers(len(by_scene), size=len(by_scene))
        draws.append(_ratio(samples[np.concatenate([by_scene[at] for at in drawn])], heads))
    low, high = np.quantile(draws, [0.025, 0.975])
    every = [(layer, head) for layer in range(samples.shape[2]) for head in range(samples.shape[3])]
    random_sets = [[every[at] for at in rng.choice(len(every), len(heads), replace=False)] for _ in range(200)]
    layers, columns = zip(*heads, strict=True)
    return Landing(
        family,
        moment,
        heads,
        _ratio(samples, heads),
        float(low),
        float(high),
        float(samples[:, 2, layers, columns].mean()),
        _ratio(samples, heads, target=3),
        float(np.mean([_ratio(samples, some) for some in random_sets])),
        len(by_scene),
    )


def _best_heads(samples: np.ndarray) -> list[tuple[int, int]]:
    """The heads with the largest ratio among those that look at the target at all; samples (S, 4, L, H)."""
    mean = samples.mean(0)
    ratio = np.where(mean[2] >= LEAST_MASS, mean[0] / np.maximum(mean[1], 1e-9), 0)
    order = np.argsort(ratio, axis=None)[::-1][:HEADS]
    heads = [np.unravel_index(at, ratio.shape) for at in order if ratio.flat[at] > 0]
    return [(int(layer), int(head)) for layer, head in heads]


def _ratio(samples: np.ndarray, heads: list[tuple[int, int]], target: int = 0) -> float:
    layers, columns = zip(*heads, strict=True)
    mean = samples[:, :, layers, columns].mean((0, 2))  # (4,)
    return float(mean[target] / max(mean[1], 1e-9))


def _measured(model: KimiVL, chat: Chat, scene: Scene, question: Question) -> Iterator[tuple[str, np.ndarray]]:
    """For each sample of a scene (4, L, H): attention per area on the target, on the mean distractor, share on the target's
    visual tokens, and attention per area on one distractor, which stands in for the target as a control.
    """
    prompt = chat.prompt(messages(scene, question))
    ids = chat.tokenizer.encode(written_reply(question))
    whole = replace(prompt, input_ids=prompt.input_ids + ids, roles=prompt.roles + reply_roles(chat.tokenizer, ids))
    grid = prompt.pictures[0].grid
    texts = [chat.tokenizer.token_text(token) for token in whole.input_ids]
    samples = []
    for sample in _samples(scene, question, texts, len(prompt.input_ids), whole.roles):
        apart = [box for box in sample.distractors if not (_cover(grid, box) * _cover(grid, sample.target)).any()]
        if apart:
            samples.append(replace(sample, distractors=apart))
    if not samples:
        return
    inputs = collate([whole], pad_id=0)
    rows = [sample.row for sample in samples]
    visual = torch.tensor([at for at, role in enumerate(whole.roles) if role == "image 0"])

    def keep(given: tuple, _site: str) -> np.ndarray:
        return decoder_rows(given, rows)[0][..., visual].numpy()  # (H, S, M)

    with torch.inference_mode(), attach(model, read={"decoder.layers.*.attn.core@in": keep}) as tape:
        model(inputs.input_ids, inputs.pixel_values, inputs.image_grid_hws)
    seen = np.stack([tape.last(site) for site in tape.sites])  # (L, H, S, M)
    for at, sample in enumerate(samples):
        density = [seen[:, :, at] @ _cover(grid, box) for box in (sample.target, *sample.distractors)]
        touched = seen[:, :, at] @ (_cover(grid, sample.target) > 0).astype(np.float32)
        other = density[1 + sample.row % (len(density) - 1)]
        yield sample.moment, np.stack([density[0], np.mean(density[1:], axis=0), touched, other])


def _cover(grid: PatchGrid, box: Box) -> np.ndarray:
    """(M,) the share of the box's area that lies in each visual token."""
    rows, columns = grid.token_grid
    cells = [grid.token_box(token) or (0.0, 0.0, 0.0, 0.0) for token in range(rows * columns)]
    x0, y0, x1, y1 = np.array(cells, np.float32).T
    wide = np.clip(np.minimum(x1, box[2]) - np.maximum(x0, box[0]), 0, None)
    tall = np.clip(np.minimum(y1, box[3]) - np.maximum(y0, box[1]), 0, None)
    return wide * tall / ((box[2] - box[0]) * (box[3] - box[1]))


def _samples(scene: Scene, question: Question, texts: list[str], begins: int, roles: list[str]) -> Iterator[_Sample]:
    """The moments of a reply that begins at token `begins`; a moment's row is that of the token before what it names."""
    if question.family == "read":
        written = [at for at in range(begins, len(texts)) if texts[at].strip().isdigit()]
        boxes = list(scene.digit_boxes)
        for place, (at, box) in enumerate(zip(written, boxes, strict=True)):
            yield _Sample("writing a digit", at - 1, box, boxes[:place] + boxes[place + 1 :])
        return
    if question.family == "point":
        things = [next(o for o in scene.objects if o.box == question.targets[0])]
    else:
        things = [next(o for o in scene.objects if o.box == box) for box in question.targets]
    starts = _starts(texts, begins, [thing.name for thing in things])
    for thing, start in zip(things, starts, strict=True):
        like = [o.box for o in scene.objects if o is not thing and (o.colour == thing.colour or o.shape == thing.shape)]
        shape = _starts(texts, start, [thing.shape])[0]
        zone = _starts(texts, shape, [thing.zone])[0]
        after = next((at for at in range(zone, len(texts)) if texts[at].strip(" ").startswith((",", "◁"))), len(texts) - 1)
        for name, at in (
            ("writing its colour in the thought", start - 1),
            ("writing its shape in the thought", shape - 1),
            ("writing its place in the thought", zone - 1),
            ("after its place in the thought", after - 1),
        ):
            yield _Sample(name, at, thing.box, like)
        if question.family == "point":
            digits = [at for at in range(after, len(texts)) if texts[at].isdigit()]
            for place, at in enumerate(digits):
                yield _Sample(f"writing digit {place % 4 + 1} of {'xy'[place // 4]}", at - 1, thing.box, like)
            asked = [at for at in range(begins) if roles[at] == "user"]
            last = asked[-1]
            yield _Sample("the end of the question", last, thing.box, like)
            yield _Sample("the start of the reply", begins - 1, thing.box, like)


def _starts(texts: list[str], begin: int, words: list[str]) -> list[int]:
    """The token in which each of these words begins, each found after the one before."""
    ends = np.cumsum([len(text) for text in texts])
    whole, at = "".join(texts), int(ends[begin] - len(texts[begin]))
    found = []
    for word in words:
        at = whole.index(word, at)
        found.append(int(np.searchsorted(ends, at, side="right")))
        at += len(word)
    return found
