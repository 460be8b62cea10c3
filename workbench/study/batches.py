"""Training batches: scenes with several questions each, as whole conversations in the model's own chat format.

A picture with many questions pays its cost in the eye once. Everything follows from (stage, step, row), so a resumed
run sees exactly the scenes it would have seen. Letters: B rows, T tokens, N patches.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kimi_vl_ref.chat import Chat

from . import families
from .scenes import LEVELS, Scene, scene

Grids = list[tuple[int, int]]


@dataclass(frozen=True)
class Mix:
    """What a stage shows: scene kinds and question families with their shares, and how hard the scenes are."""

    kinds: dict[str, float]
    families: dict[str, float] = field(default_factory=dict)
    levels: tuple[str, ...] = ("full",)  # walked through in equal parts of the stage
    questions: int = 5


@dataclass(frozen=True)
class Batch:
    """Several rows may be about one picture: its visual tokens are computed once and go into each."""

    scenes: list[Scene]
    pixel_values: Tensor  # (N, 3, 14, 14)
    grids: Grids
    scene_of_row: list[int]
    input_ids: Tensor  # (B, T)
    lengths: Tensor  # (B,)
    supervised: Tensor  # (B, T) bool: this column is written by the assistant, so its predecessor predicts it

    def visual_rows(self, tokens: Tensor) -> Tensor:
        """Visual tokens (M, D) of the pictures -> those of the rows, in the order of the rows' placeholders."""
        per_picture = tokens.split([h * w // 4 for h, w in self.grids])
        return torch.cat([per_picture[index] for index in self.scene_of_row])


def draw_scenes(mix: Mix, seeds: list[int], progress: float) -> list[Scene]:
    """Training scenes for these seeds; `progress` in [0, 1) through the stage picks the level."""
    kinds, shares = list(mix.kinds), list(mix.kinds.values())
    drawn = []
    for seed in seeds:
        rng = random.Random(seed)
        upto = min(int(progress * len(mix.levels)), len(mix.levels) - 1)
        # mostly the level that is due, sometimes an easier one so that nothing is forgotten
        level = LEVELS[mix.levels[upto if rng.random() < 0.75 else rng.randint(0, upto)]]
        drawn.append(scene(seed, "train", level, rng.choices(kinds, shares)[0]))
    return drawn


def picture_batch(chat: Chat, scenes: list[Scene]) -> tuple[Tensor, Grids]:
    pixel_values, grids, _ = chat.processor([s.image for s in scenes])
    return pixel_values, [(h, w) for h, w in grids.tolist()]


def conversation_batch(chat: Chat, mix: Mix, scenes: list[Scene]) -> Batch:
    rows, scene_of_row = [], []
    for index, drawn in enumerate(scenes):
        for asked in _rows(mix, drawn):
            rows.append(_conversation(chat, drawn, asked))
            scene_of_row.append(index)
    pixel_values, grids = picture_batch(chat, scenes)
    lengths = torch.tensor([len(ids) for ids in rows])
    input_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    supervised = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        supervised[row, : len(ids)] = torch.from_numpy(assistant_columns(chat, ids))
    return Batch(scenes, pixel_values, grids, scene_of_row, input_ids, lengths, supervised)


def _rows(mix: Mix, drawn: Scene) -> list[list[families.Question]]:
    """Questions of one scene in conversations of at most two turns.

    Later turns can copy from earlier ones instead of looking, so most questions come first, and a full list comes last.
    """
    rng = random.Random(drawn.seed + 1)
    wanted = sorted(mix.families, key=lambda name: rng.random() ** (1 / mix.families[name]), reverse=True)
    asked = families.questions(drawn, rng, wanted[: mix.questions], mix.questions)
    firsts = asked[: (len(asked) + 1) // 2]
    rows = [[question] for question in firsts]
    for row, question in zip(rows, asked[len(firsts) :], strict=False):
        row.append(question)
    for row in rows:
        row.sort(key=lambda question: question.family == "describe")
    return rows


def _conversation(chat: Chat, drawn: Scene, asked: list[families.Question]) -> list[int]:
    messages = []
    for number, question in enumerate(asked):
        text = {"type": "text", "text": question.text}
        content = [{"type": "image", "image": drawn.image}, text] if number == 0 else [text]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": written_reply(question)}]
    return chat.prompt(messages, add_generation_prompt=False).input_ids


def written_reply(question: families.Question) -> str:
    """The assistant's text: a thought between the real markers where the family has one, then the answer."""
    return f"◁think▷ {question.thought}◁/think▷ {question.answer}" if question.thought else question.answer


def assistant_columns(chat: Chat, ids: list[int]) -> np.ndarray:
    """True where the assistant writes: after its turn's <|im_middle|>, up to and including <|im_end|>."""
    special = chat.tokenizer.special
    written, turn, inside = np.zeros(len(ids), dtype=bool), False, False
    for column, token in enumerate(ids):
        written[column] = inside
        if token == special["<|im_assistant|>"]:
            turn = True
        elif token == special["<|im_middle|>"]:
            inside = turn
        elif token == special["<|im_end|>"]:
            turn = inside = False
    return written
