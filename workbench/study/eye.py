"""Teaching the eye first: dense labels for every patch and visual token, read by heads that are thrown away afterwards.

Stands for the report's first stage (MoonViT by itself, then aligned to the language model), which used captions and a
contrastive loss on 2.1T tokens. With exact ground truth a few minutes of dense labels do the same for small pictures.
Letters: P patches, M visual tokens (28-pixel cells), V and D channels of MoonViT and of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_vl_ref.config import KimiVLConfig

from .scenes import COLOURS, NO_DIGIT, NO_OBJECT, SHAPES, UNSURE, ZONES, Scene, patch_labels, zone_of

DIGIT_SLOTS = 3  # digits whose centres fall into one cell, left to right
CELL = 28


@dataclass(frozen=True)
class EyeLabels:
    """What a batch of pictures shows, packed like the patches."""

    object_of_patch: Tensor  # (P,)
    digit_of_patch: Tensor  # (P,)
    centre_object: Tensor  # (M,) the object whose centre lies in the cell
    centre_xy: Tensor  # (M, 2) that centre, normalised by the picture's size; nan elsewhere
    digits: Tensor  # (M, DIGIT_SLOTS)
    zone: Tensor  # (M,) the ninth of the picture that the cell's middle lies in


class EyeHeads(nn.Module):
    """Linear readers on MoonViT's output and on the projector's; their weights are not part of any checkpoint."""

    def __init__(self, config: KimiVLConfig):
        super().__init__()
        vision, text = config.vision.hidden_size, config.text.hidden_size
        self.object_of_patch = nn.Linear(vision, NO_OBJECT + 1)
        self.digit_of_patch = nn.Linear(vision, NO_DIGIT + 1)
        self.centre_object = nn.Linear(text, NO_OBJECT + 1)
        self.centre_xy = nn.Linear(text, 2)
        self.digits = nn.Linear(text, DIGIT_SLOTS * (NO_DIGIT + 1))
        self.zone = nn.Linear(text, len(ZONES))

    def forward(self, patches: Tensor, tokens: Tensor, labels: EyeLabels) -> dict[str, Tensor]:
        """patches (P, V), tokens (M, D) -> one loss a task."""
        tokens = F.rms_norm(tokens, tokens.shape[-1:])
        digits = self.digits(tokens).unflatten(-1, (DIGIT_SLOTS, -1)).flatten(0, 1)
        centres = ~labels.centre_xy[:, 0].isnan()
        return {
            "object_of_patch": _balanced(self.object_of_patch(patches), labels.object_of_patch, NO_OBJECT),
            "digit_of_patch": _balanced(self.digit_of_patch(patches), labels.digit_of_patch, NO_DIGIT),
            "centre_object": _balanced(self.centre_object(tokens), labels.centre_object, NO_OBJECT),
            "centre_xy": 4 * F.l1_loss(self.centre_xy(tokens)[centres].sigmoid(), labels.centre_xy[centres]),
            "digits": _balanced(digits, labels.digits.flatten(), NO_DIGIT),
            "zone": 0.5 * F.cross_entropy(self.zone(tokens), labels.zone, ignore_index=UNSURE),
        }

    @torch.no_grad()
    def accuracies(self, patches: Tensor, tokens: Tensor, labels: EyeLabels) -> dict[str, float]:
        """Share right, counted only where there is something to name (an empty cell is easy)."""
        tokens = F.rms_norm(tokens, tokens.shape[-1:])
        digits = self.digits(tokens).unflatten(-1, (DIGIT_SLOTS, -1)).flatten(0, 1)
        pairs = {
            "object_of_patch": (self.object_of_patch(patches), labels.object_of_patch, NO_OBJECT),
            "digit_of_patch": (self.digit_of_patch(patches), labels.digit_of_patch, NO_DIGIT),
            "centre_object": (self.centre_object(tokens), labels.centre_object, NO_OBJECT),
            "digits": (digits, labels.digits.flatten(), NO_DIGIT),
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


def eye_labels(scenes: list[Scene], grids: list[tuple[int, int]]) -> EyeLabels:
    """Ground truth for the pictures of `scenes`, whose patch grids are (h, w)."""
    parts: list[list[np.ndarray]] = [[] for _ in range(6)]
    for scene, (h, w) in zip(scenes, grids, strict=True):
        objects, digits = patch_labels(scene, h, w)
        centre, xy, slots, zone = cell_labels(scene, h // 2, w // 2)
        for part, array in zip(parts, (objects, digits, centre, xy, slots, zone), strict=True):
            part.append(array.reshape(-1, *array.shape[2:]))
    return EyeLabels(*(torch.from_numpy(np.concatenate(part)) for part in parts))


def cell_labels(scene: Scene, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels of the 28-pixel cells: centre object (r, c), its place (r, c, 2), digits (r, c, slots), zone (r, c)."""
    width, height = scene.size
    centre = np.full((rows, columns), NO_OBJECT)
    xy = np.full((rows, columns, 2), np.nan, dtype=np.float32)
    for thing in scene.objects:
        x, y = thing.centre
        cell = int(y // CELL), int(x // CELL)
        if centre[cell] != NO_OBJECT:  # two centres in one cell: neither can be asked for
            centre[cell], xy[cell] = UNSURE, np.nan
        else:
            centre[cell] = COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
            xy[cell] = x / width, y / height
    slots = np.full((rows, columns, DIGIT_SLOTS), NO_DIGIT)
    used = np.zeros((rows, columns), dtype=int)
    for digit, (x0, y0, x1, y1) in zip(scene.number, scene.digit_boxes, strict=True):
        cell = int((y0 + y1) / 2 // CELL), int((x0 + x1) / 2 // CELL)
        if used[cell] < DIGIT_SLOTS:
            slots[cell][used[cell]] = int(digit)
        used[cell] += 1
    zone = np.full((rows, columns), UNSURE)
    for r in range(rows):
        for c in range(columns):
            x, y = (c + 0.5) * CELL, (r + 0.5) * CELL
            if x < width and y < height:
                zone[r, c] = ZONES.index(zone_of(x, y, width, height))
    return centre, xy, slots, zone
