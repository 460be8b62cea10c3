"""Teaching the eye first: dense labels for every patch and visual token, read by heads that are thrown away afterwards.

Stands for the report's first stage (MoonViT by itself, then aligned to the language model), which used captions and a
contrastive loss on 2.1T tokens. With exact ground truth a few minutes of dense labels do the same for small pictures.
Letters: P patches, M visual tokens (28-pixel cells), V and D channels of MoonViT and of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_vl_ref.config import KimiVLConfig

from .scenes import COLOURS, GLYPHS, NO_GLYPH, NO_OBJECT, SHAPES, UNSURE, ZONES, Scene, patch_labels
from .views import View

GLYPH_SLOTS = 4  # characters whose centres fall into one cell, left to right
CELL = 28


@dataclass(frozen=True)
class EyeLabels:
    """What a batch of pictures shows, packed like the patches."""

    object_of_patch: Tensor  # (P,)
    glyph_of_patch: Tensor  # (P,)
    centre_object: Tensor  # (M,) the object whose centre lies in the cell
    centre_xy: Tensor  # (M, 2) that centre, normalised by the picture's size; nan elsewhere
    glyphs: Tensor  # (M, GLYPH_SLOTS)
    zone: Tensor  # (M,) the ninth of the picture that the cell's middle lies in


class EyeHeads(nn.Module):
    """Linear readers on MoonViT's output and on the projector's; their weights are not part of any checkpoint."""

    def __init__(self, config: KimiVLConfig):
        super().__init__()
        vision, text = config.vision.hidden_size, config.text.hidden_size
        self.object_of_patch = nn.Linear(vision, NO_OBJECT + 1)
        self.glyph_of_patch = nn.Linear(vision, NO_GLYPH + 1)
        self.centre_object = nn.Linear(text, NO_OBJECT + 1)
        self.centre_xy = nn.Linear(text, 2)
        self.glyphs = nn.Linear(text, GLYPH_SLOTS * (NO_GLYPH + 1))
        self.zone = nn.Linear(text, len(ZONES))

    def forward(self, patches: Tensor, tokens: Tensor, labels: EyeLabels) -> dict[str, Tensor]:
        """patches (P, V), tokens (M, D) -> one loss a task."""
        tokens = F.rms_norm(tokens, tokens.shape[-1:])
        glyphs = self.glyphs(tokens).unflatten(-1, (GLYPH_SLOTS, -1)).flatten(0, 1)
        centres = ~labels.centre_xy[:, 0].isnan()  # there may be none: a picture of text
        off = (self.centre_xy(tokens)[centres].sigmoid() - labels.centre_xy[centres]).abs()
        return {
            "object_of_patch": _balanced(self.object_of_patch(patches), labels.object_of_patch, NO_OBJECT),
            "glyph_of_patch": _balanced(self.glyph_of_patch(patches), labels.glyph_of_patch, NO_GLYPH),
            "centre_object": _balanced(self.centre_object(tokens), labels.centre_object, NO_OBJECT),
            "centre_xy": 4 * off.sum() / centres.sum().clamp(min=1) / 2,
            "glyphs": _balanced(glyphs, labels.glyphs.flatten(), NO_GLYPH),
            "zone": 0.5 * F.cross_entropy(self.zone(tokens), labels.zone, ignore_index=UNSURE),
        }

    @torch.no_grad()
    def accuracies(self, patches: Tensor, tokens: Tensor, labels: EyeLabels) -> dict[str, float]:
        """Share right, counted only where there is something to name (an empty cell is easy)."""
        tokens = F.rms_norm(tokens, tokens.shape[-1:])
        glyphs = self.glyphs(tokens).unflatten(-1, (GLYPH_SLOTS, -1)).flatten(0, 1)
        pairs = {
            "object_of_patch": (self.object_of_patch(patches), labels.object_of_patch, NO_OBJECT),
            "glyph_of_patch": (self.glyph_of_patch(patches), labels.glyph_of_patch, NO_GLYPH),
            "centre_object": (self.centre_object(tokens), labels.centre_object, NO_OBJECT),
            "glyphs": (glyphs, labels.glyphs.flatten(), NO_GLYPH),
            "zone": (self.zone(tokens), labels.zone, UNSURE),
        }
        result = {}
        for name, (scores, truth, none) in pairs.items():
            shown = (truth != none) & (truth != UNSURE)
            result[name] = float((scores[shown].argmax(-1) == truth[shown]).float().mean())
        return result


def _balanced(scores: Tensor, truth: Tensor, none: int) -> Tensor:
    """Cross-entropy in which empty places together weigh as much as the places that show something."""
    each = F.cross_entropy(scores, truth, ignore_index=UNSURE, reduction="none")
    empty, shown = truth == none, (truth != none) & (truth != UNSURE)
    return 0.3 * each[empty].sum() / empty.sum().clamp(min=1) + each[shown].sum() / shown.sum().clamp(min=1)


def eye_labels(views: Sequence[Scene | View], grids: list[tuple[int, int]]) -> EyeLabels:
    """Ground truth for these pictures, whose patch grids are (h, w)."""
    parts: list[list[np.ndarray]] = [[] for _ in range(6)]
    for view, (h, w) in zip(views, grids, strict=True):
        objects, glyphs = patch_labels(view, h, w)
        centre, xy, slots, zone = cell_labels(view, h // 2, w // 2)
        for part, array in zip(parts, (objects, glyphs, centre, xy, slots, zone), strict=True):
            part.append(array.reshape(-1, *array.shape[2:]))
    return EyeLabels(*(torch.from_numpy(np.concatenate(part)) for part in parts))


def cell_labels(
    view: Scene | View, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels of the 28-pixel cells: centre object (r, c), its place (r, c, 2), glyphs (r, c, slots), zone (r, c)."""
    width, height = view.size
    centre = np.full((rows, columns), NO_OBJECT)
    xy = np.full((rows, columns, 2), np.nan, dtype=np.float32)
    for thing in view.objects:
        x, y = thing.centre
        cell = int(y // CELL), int(x // CELL)
        if centre[cell] != NO_OBJECT:  # two centres in one cell: neither can be asked for
            centre[cell], xy[cell] = UNSURE, np.nan
        else:
            centre[cell] = COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
            xy[cell] = x / width, y / height
    slots = np.full((rows, columns, GLYPH_SLOTS), NO_GLYPH)
    used = np.zeros((rows, columns), dtype=int)
    for character, (x0, y0, x1, y1) in view.glyphs:
        cell = int((y0 + y1) / 2 // CELL), int((x0 + x1) / 2 // CELL)
        if used[cell] < GLYPH_SLOTS:
            slots[cell][used[cell]] = GLYPHS.get(character.lower(), UNSURE)
        used[cell] += 1
    y, x = (np.arange(rows) + 0.5) * CELL, (np.arange(columns) + 0.5) * CELL  # middles of the cells
    zone = 3 * np.minimum(2, 3 * y // height)[:, None] + np.minimum(2, 3 * x // width)[None]
    zone[y >= height] = UNSURE
    zone[:, x >= width] = UNSURE
    return centre, xy, slots, zone.astype(np.int64)
