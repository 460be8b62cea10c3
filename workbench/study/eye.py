"""Teaching the eye first: dense labels for every patch and visual token, read by heads that are thrown away afterwards.

Stands for the report's first stage (MoonViT by itself, then aligned to the language model), which used captions and a
contrastive loss on 2.1T tokens. With exact ground truth a few minutes of dense labels do the same for small pictures.
Letters: P patches, M visual tokens (28-pixel cells), V and D channels of MoonViT and of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_vl_ref.config import KimiVLConfig

from .scenes import COLOURS, GLYPHS, NO_GLYPH, NO_OBJECT, SHAPES, UNSURE, ZONES, Scene, patch_labels
from .views import Box, View

GLYPH_SLOTS = 8  # characters whose centres fall into one cell, text by text and left to right, with BREAK between texts
BREAK = NO_GLYPH + 1
CELL = 28
MOST = 8  # characters of a text and things of a picture that are told apart by their number
NO_TEXT = 2  # the picture's first and second text are 0 and 1


@dataclass(frozen=True)
class EyeLabels:
    """What a batch of pictures shows, packed like the patches."""

    object_of_patch: Tensor  # (P,)
    glyph_of_patch: Tensor  # (P,)
    centre_object: Tensor  # (M,) the object whose centre lies in the cell
    centre_xy: Tensor  # (M, 2) that centre, normalised by the picture's size; nan elsewhere
    spot: Tensor  # (M, 2) in cells from the top left: that centre, elsewhere the cell's own middle; nan in the padding
    turn: Tensor  # (M,) which in reading order the object is whose centre lies in the cell; MOST where there is none
    zone: Tensor  # (M,) the ninth of the picture that the cell's middle lies in
    glyphs: Tensor  # (M, GLYPH_SLOTS)
    place: Tensor  # (M,) of the cell's first character: how many stand before it in its text; MOST where there is none
    rest: Tensor  # (M,) the same for those that follow it
    text: Tensor  # (M,) that text, the picture's first or second; NO_TEXT where there is none
    spelled: Tensor  # (M, MOST) for each place in a text the cell's character that stands there


class EyeHeads(nn.Module):
    """Linear readers on MoonViT's output and on the projector's; their weights are not part of any checkpoint."""

    def __init__(self, config: KimiVLConfig):
        super().__init__()
        vision, text = config.vision.hidden_size, config.text.hidden_size
        self.object_of_patch = nn.Linear(vision, NO_OBJECT + 1)
        self.glyph_of_patch = nn.Linear(vision, NO_GLYPH + 1)
        self.centre_object = nn.Linear(text, NO_OBJECT + 1)
        self.centre_xy, self.spot = nn.Linear(text, 2), nn.Linear(text, 2)
        self.glyphs = nn.Linear(text, GLYPH_SLOTS * (BREAK + 1))
        self.zone = nn.Linear(text, len(ZONES))
        self.turn, self.place, self.rest = (nn.Linear(text, MOST + 1) for _ in range(3))
        self.text = nn.Linear(text, NO_TEXT + 1)
        self.spelled = nn.Linear(text, MOST * (NO_GLYPH + 1))

    def forward(self, patches: Tensor, tokens: Tensor, labels: EyeLabels) -> dict[str, Tensor]:
        """patches (P, V), tokens (M, D) -> one loss a task."""
        tokens = _normed(tokens)
        read = self._read(patches, tokens, labels)
        losses = {name: weight * _balanced(scores, truth, none) for name, (weight, scores, truth, none) in read.items()}
        centres = ~labels.centre_xy[:, 0].isnan()  # there may be none: a picture of text
        off = (self.centre_xy(tokens)[centres].sigmoid() - labels.centre_xy[centres]).abs()
        losses["centre_xy"] = 4 * off.sum() / centres.sum().clamp(min=1) / 2
        for weight, cells in ((1.0, centres), (0.3, ~centres & ~labels.spot[:, 0].isnan())):
            losses["spot"] = losses.get("spot", 0) + weight * self._off(tokens, labels, cells).sum() / cells.sum().clamp(min=1)
        return losses

    def _off(self, tokens: Tensor, labels: EyeLabels, which: Tensor) -> Tensor:
        """How far the spots that are read of some tokens lie from the true ones, in cells, the mean of across and down.

        tokens: normed. Chosen first: the gradient of a difference to nan is nan, whatever its weight.
        """
        return (self.spot(tokens[which]) - labels.spot[which]).abs().mean(-1)

    @torch.no_grad()
    def accuracies(self, patches: Tensor, tokens: Tensor, labels: EyeLabels) -> dict[str, float]:
        """Share right, counted only where there is something to name (an empty cell is easy); of spots, those within half a
        cell.
        """
        tokens = _normed(tokens)
        result = {"spot": float((self._off(tokens, labels, ~labels.spot[:, 0].isnan()) < 0.5).float().mean())}
        for name, (_, scores, truth, none) in self._read(patches, tokens, labels).items():
            shown = (truth != none) & (truth != UNSURE)
            result[name] = float((scores[shown].argmax(-1) == truth[shown]).float().mean())
        return result

    def _read(
        self, patches: Tensor, tokens: Tensor, labels: EyeLabels
    ) -> dict[str, tuple[float, Tensor, Tensor, int]]:
        """Of every task that names something: what its loss weighs, scores, truth, and the class of an empty place.

        tokens: normed.
        """
        glyphs = self.glyphs(tokens).unflatten(-1, (GLYPH_SLOTS, -1)).flatten(0, 1)
        spelled = self.spelled(tokens).unflatten(-1, (MOST, -1)).flatten(0, 1)
        return {
            "object_of_patch": (1, self.object_of_patch(patches), labels.object_of_patch, NO_OBJECT),
            "glyph_of_patch": (1, self.glyph_of_patch(patches), labels.glyph_of_patch, NO_GLYPH),
            "centre_object": (1, self.centre_object(tokens), labels.centre_object, NO_OBJECT),
            "glyphs": (1, glyphs, labels.glyphs.flatten(), NO_GLYPH),
            "zone": (0.5, self.zone(tokens), labels.zone, UNSURE),  # unsure in the padding, else there is one
            "turn": (0.5, self.turn(tokens), labels.turn, MOST),
            "place": (0.5, self.place(tokens), labels.place, MOST),
            "rest": (0.5, self.rest(tokens), labels.rest, MOST),
            "text": (0.5, self.text(tokens), labels.text, NO_TEXT),
            "spelled": (0.5, spelled, labels.spelled.flatten(), NO_GLYPH),
        }


def _normed(tokens: Tensor) -> Tensor:
    """As the decoder's layers read them."""
    return F.rms_norm(tokens, tokens.shape[-1:])


def _balanced(scores: Tensor, truth: Tensor, none: int) -> Tensor:
    """Cross-entropy in which empty places together weigh as much as the places that show something."""
    each = F.cross_entropy(scores, truth, ignore_index=UNSURE, reduction="none")
    empty, shown = truth == none, (truth != none) & (truth != UNSURE)
    return 0.3 * each[empty].sum() / empty.sum().clamp(min=1) + each[shown].sum() / shown.sum().clamp(min=1)


def eye_labels(views: Sequence[Scene | View], grids: list[tuple[int, int]]) -> EyeLabels:
    """Ground truth for these pictures, whose patch grids are (h, w)."""
    parts: list[list[np.ndarray]] = [[] for _ in fields(EyeLabels)]
    for view, (h, w) in zip(views, grids, strict=True):
        objects, glyphs = patch_labels(view, h, w)
        for part, array in zip(parts, (objects, glyphs, *cell_labels(view, h // 2, w // 2)), strict=True):
            part.append(array.reshape(-1, *array.shape[2:]))
    return EyeLabels(*(torch.from_numpy(np.concatenate(part)) for part in parts))


def _goes_on(before: Box, box: Box) -> bool:
    """Whether a character stands beside the one before it, in the same line and no further off than it is high."""
    overlap = min(before[3], box[3]) - max(before[1], box[1])
    height = min(before[3] - before[1], box[3] - box[1])
    return 2 * overlap > height and -1 <= box[0] - before[2] <= height


def _texts(glyphs: Sequence[tuple[str, Box]]) -> list[list[tuple[str, Box]]]:
    """Printed characters, text by text; a plus only parts two numbers."""
    found: list[list[tuple[str, Box]]] = []
    before = None
    for character, box in glyphs:
        if character == "+":
            before = None
            continue
        if before is None or not _goes_on(before, box):
            found.append([])
        found[-1].append((character, box))
        before = box
    return found


def cell_labels(view: Scene | View, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Labels of the 28-pixel cells, (rows, columns) each or with one more axis, in the order of EyeLabels."""
    return *_object_labels(view, rows, columns), *_print_labels(view, rows, columns)


def _object_labels(view: Scene | View, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Object whose centre lies in a cell, that centre as shares of the picture and in cells, its turn, and the cell's zone."""
    width, height = view.size
    centre = np.full((rows, columns), NO_OBJECT)
    xy = np.full((rows, columns, 2), np.nan, dtype=np.float32)
    y, x = (np.arange(rows) + 0.5) * CELL, (np.arange(columns) + 0.5) * CELL  # middles of the cells
    zone = 3 * np.minimum(2, 3 * y // height)[:, None] + np.minimum(2, 3 * x // width)[None]
    zone[y >= height] = UNSURE
    zone[:, x >= width] = UNSURE
    spot = np.stack(np.meshgrid(x, y), axis=-1).astype(np.float32) / CELL
    spot[zone == UNSURE] = np.nan
    turn = np.full((rows, columns), MOST)
    objects = view.objects
    if max(view.size) > 3 * min(view.size):  # a strip is read along its length
        objects = tuple(sorted(objects, key=lambda o: o.centre[height > width]))
    for number, thing in enumerate(objects):
        at_x, at_y = thing.centre
        cell = int(at_y // CELL), int(at_x // CELL)
        if centre[cell] != NO_OBJECT:  # two centres in one cell: neither can be asked for
            centre[cell], xy[cell], spot[cell], turn[cell] = UNSURE, np.nan, np.nan, UNSURE
        else:
            centre[cell] = COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
            xy[cell] = at_x / width, at_y / height
            spot[cell] = at_x / CELL, at_y / CELL
            turn[cell] = number if number < MOST else UNSURE
    return centre, xy, spot, turn, zone.astype(np.int64)


def _print_labels(view: Scene | View, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Characters whose centres lie in a cell; place, rest and text of the first of them; each by its place in its text."""
    slots = np.full((rows, columns, GLYPH_SLOTS), NO_GLYPH)
    spelled = np.full((rows, columns, MOST), NO_GLYPH)
    used = np.zeros((rows, columns), dtype=int)
    place, rest, which = (np.full((rows, columns), none) for none in (MOST, MOST, NO_TEXT))
    last = np.zeros((rows, columns), dtype=int)  # the text of the character that a cell got last
    lines = _texts(view.glyphs)
    for number, line in enumerate(lines):
        for k, (character, box) in enumerate(line):
            cell = int((box[1] + box[3]) / 2 // CELL), int((box[0] + box[2]) / 2 // CELL)
            if not used[cell]:
                place[cell], rest[cell] = (n if n < MOST else UNSURE for n in (k, len(line) - 1 - k))
                which[cell] = number if len(lines) <= NO_TEXT else UNSURE
            glyph = GLYPHS.get(character.lower(), UNSURE)
            if k < MOST:  # two texts may have a character of one place in one cell
                spelled[cell][k] = glyph if spelled[cell][k] == NO_GLYPH else UNSURE
            parts = [BREAK] * bool(used[cell] and last[cell] != number) + [glyph]
            for part in parts:
                if used[cell] < GLYPH_SLOTS:
                    slots[cell][used[cell]] = part
                used[cell] += 1
            last[cell] = number
    return slots, place, rest, which, spelled
