"""Training batches: pictures with several questions each, as conversations in the model's own chat format.

The questions about one picture (or one series of pictures) are branches of a tree: they share the tokens up to the end of
the last picture, and any text they all begin with, which are computed once, and never see each other. All trees of a batch
lie in one long row without padding. Everything follows from (stage, step, place in the batch), so a resumed run sees exactly
what it would have seen.
Letters: N tokens of all trees, P patches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kimi_vl_ref.chat import Chat, StreamDecoder
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT

from . import families
from .scenes import LEVELS, Scene, scene
from .views import Album, View

Grids = list[tuple[int, int]]
# kinds shown at every level all the time: the longest cost most and teach no more; a further question costs little
HAYS = ("needle", "lines", "pictures")
ANEW = 1 << 56  # how far apart the seeds of several draws of one scene lie: beyond those of every step


@dataclass(frozen=True)
class Mix:
    """What a stage shows: kinds of pictures and, for scenes of objects, question families, with their shares."""

    kinds: dict[str, float]  # of scenes.KINDS or families.DRAWN
    families: dict[str, float] = field(default_factory=dict)
    levels: tuple[str, ...] = ("full",)  # walked through in equal parts of the stage
    questions: int = 6
    second_turn: float = 0.15  # share of branches that go on with a second question
    hardest: int = 1  # of so many scenes of kind "objects" the one is shown whose neighbours are hardest
    again: bool = False  # whether a family may be asked twice about a picture while another is not asked at all
    cut: float = 0.1  # share of thoughts that are cut off and answered as they stand, as a thought budget does


@dataclass(frozen=True)
class Sample:
    """Pictures with everything that stands in them, and what is asked about them."""

    pictures: Scene | Album
    questions: list[families.Question]
    seed: int


@dataclass(frozen=True)
class Forest:
    """The trees of a batch, one after another."""

    views: Sequence[Scene | View]  # every picture, in order
    pixel_values: Tensor  # (P, 3, 14, 14)
    grids: Grids
    input_ids: Tensor  # (N,)
    positions: Tensor  # (N,) counted from the start of the tree; branches count on from the shared part
    branches: Tensor  # (N,) 0 in the shared part, then 1, 2, ... inside each tree
    trees: list[tuple[int, int]]  # first and last + 1 of the N
    targets: Tensor  # (N,) the token that follows where the assistant writes it, else -1
    weights: Tensor  # (N,) what a target counts: a long reply more than a short one, but not by its length


def draw_samples(mix: Mix, seeds: Sequence[int], progress: float) -> list[Sample]:
    """Training samples for these seeds; `progress` in [0, 1) through the stage picks the level."""
    kinds, shares = list(mix.kinds), list(mix.kinds.values())
    drawn = []
    for seed in seeds:
        rng = random.Random(seed)
        upto = min(int(progress * len(mix.levels)), len(mix.levels) - 1)
        # mostly the level that is due, sometimes an easier one so that nothing is forgotten
        level = mix.levels[upto if rng.random() < 0.75 else rng.randint(0, upto)]
        kind = rng.choices(kinds, shares)[0]
        if kind in HAYS:
            level = rng.choice(list(LEVELS))
        if kind in families.DRAWN:
            pictures, asked = families.drawn(kind, seed, "train", level)
            rng.shuffle(asked)
            drawn.append(Sample(pictures, asked if kind in HAYS else asked[: mix.questions], seed))
        else:
            draws = mix.hardest if kind == "objects" else 1
            scenes = (scene(seed + k * ANEW, "train", LEVELS[level], kind) for k in range(draws))
            picture = max(scenes, key=families.hard_neighbours)
            drawn.append(Sample(picture, _asked(mix, picture, rng) if mix.families else [], seed))
    return drawn


def _asked(mix: Mix, picture: Scene, rng: random.Random) -> list[families.Question]:
    if mix.again:
        wanted = rng.choices(list(mix.families), list(mix.families.values()), k=mix.questions)
    else:
        ranked = sorted(mix.families, key=lambda name: rng.random() ** (1 / mix.families[name]), reverse=True)
        wanted = ranked[: mix.questions]
    return families.questions(picture, rng, wanted, mix.questions)


def plant(chat: Chat, mix: Mix, samples: Sequence[Sample]) -> Forest:
    """Samples -> one Forest. A stage without families gives pictures only: no tokens."""
    views = [view for sample in samples for view in sample.pictures.views]
    pixel_values, grids, _ = chat.processor([view.image for view in views])
    counts = iter([int(h) * int(w) // 4 for h, w in grids.tolist()])
    ids: list[int] = []
    positions, branches, targets, weights, trees = [], [], [], [], []
    for sample in samples if any(s.questions for s in samples) else ():
        rng = random.Random(sample.seed + 1)
        shared = shared_part(chat, [next(counts) for _ in sample.pictures.views])
        written = [branch(chat, turns, rng, mix.cut) for turns in _conversations(mix, sample.questions, rng)]
        alike = _alike([row for row, _, _ in written])  # a long text before every question is part of what they share
        shared += written[0][0][:alike] if written else []
        start = len(ids)
        ids += shared
        positions += range(len(shared))
        branches += [0] * len(shared)
        targets += [-1] * len(shared)
        weights += [0.0] * len(shared)
        for number, (row, following, shares) in enumerate(written, start=1):
            ids += row[alike:]
            positions += range(len(shared), len(shared) + len(row) - alike)
            branches += [number] * (len(row) - alike)
            targets += following[alike:]
            # by the token, answers of two words would drown in thoughts of forty
            by_root = sum(token >= 0 for token in following) ** -0.5
            weights += [by_root * share for share in shares[alike:]]
        trees.append((start, len(ids)))
    return Forest(
        views,
        pixel_values,
        [(h, w) for h, w in grids.tolist()],
        input_ids=torch.tensor(ids, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        branches=torch.tensor(branches, dtype=torch.long),
        trees=trees,
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights),
    )


def _alike(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with; 0 for a single row, which has nobody to share with."""
    if len(rows) < 2:
        return 0
    return next((k for k, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), 0)


def _conversations(mix: Mix, asked: list[families.Question], rng: random.Random) -> list[list[families.Question]]:
    """One branch a question; some branches hold a second one. A full list comes last, since later turns could copy it.

    A question about a hay stands alone: it brings its lines along, which a second turn would hold once more.
    """
    rows: list[list[families.Question]] = []
    for question in asked:
        alone = question.family == "needle"
        if not alone and rows and len(rows[-1]) == 1 and rng.random() < mix.second_turn:
            rows[-1].append(question)
        else:
            rows.append([question])
    for row in rows:
        row.sort(key=lambda question: question.family == "describe")
    return rows


def shared_part(chat: Chat, token_counts: Sequence[int]) -> list[int]:
    """Ids from the start of a conversation to the end of its last picture: `Chat.prompt` without its text."""
    special, text = chat.tokenizer.special, chat.tokenizer.encode
    ids = _before_user_text(chat)
    for count in token_counts:
        ids += [special["<|media_start|>"], *text("image"), special["<|media_content|>"]]
        ids += [special["<|media_pad|>"]] * count + [special["<|media_end|>"]]
    return ids


def _before_user_text(chat: Chat) -> list[int]:
    """System turn and the opening of the user's turn."""
    ids = chat.prompt([{"role": "user", "content": "x"}], add_generation_prompt=False).input_ids
    return ids[: len(ids) - 1 - len(chat.tokenizer.encode("x"))]


def branch(
    chat: Chat, asked: Sequence[families.Question], rng: random.Random, cut: float = 0.0
) -> tuple[list[int], list[int], list[float]]:
    """Ids from the first question's text to the last <|im_end|>; for each the next token if it is to be learnt, else -1, and
    what that one counts (families.what_counts).

    A thought that is cut off teaches its answer only: where a budget ends cannot be foreseen.
    """
    special, encode = chat.tokenizer.special, chat.tokenizer.encode
    end, opened = special["<|im_end|>"], special["<|im_middle|>"]
    ids: list[int] = []
    learnt: list[bool] = []
    counts: list[float] = []
    for number, question in enumerate(asked):
        if number:
            ids += [special["<|im_user|>"], *encode("user"), opened]
        ids += [*encode(question.text), end, special["<|im_assistant|>"], *encode("assistant"), opened]
        learnt += [False] * (len(ids) - len(learnt))
        if question.thought and rng.random() < cut:
            thought = encode(f"{OPEN_THOUGHT} {question.thought}")
            least = len(encode(OPEN_THOUGHT))
            kept = thought[: least + int(rng.random() ** 1.5 * (len(thought) - least))]
            ids += kept + encode(CLOSE_THOUGHT)
            learnt += [False] * (len(ids) - len(learnt))
            reply = f" {question.answer}"
        else:
            reply = written_reply(question)
        counts += [1.0] * (len(ids) - len(counts))
        ids += [*encode(reply), end]
        learnt += [True] * (len(ids) - len(learnt))
        counts += [*_by_token(chat, ids[len(counts) : -1], families.what_counts(question, reply)), 1.0]
    following = [token if mine else -1 for token, mine in zip(ids[1:], learnt[1:], strict=True)]
    return ids, [*following, -1], [*counts[1:], 1.0]


def _by_token(chat: Chat, ids: Sequence[int], counts: dict[int, float]) -> list[float]:
    """What each token of a text counts: as its first character does."""
    found, at, reader = [], 0, StreamDecoder(chat.tokenizer)  # a character may be cut in two
    for token in ids:
        found.append(counts.get(at, 1.0))
        at += len(reader.feed(token))
    return found


def written_reply(question: families.Question) -> str:
    """The assistant's text: a thought between the real markers where the family has one, then the answer."""
    return f"{OPEN_THOUGHT} {question.thought}{CLOSE_THOUGHT} {question.answer}" if question.thought else question.answer
