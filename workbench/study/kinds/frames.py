"""Short films: numbered frames in which things move, turn another colour, come and go."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..drawing import paper
from ..families import Question
from ..scenes import COLOURS, SHAPES, Obj, content_key, zone_of
from ..views import Album, Box
from .place import clear, free_box, in_one_zone, in_split, ink_tint, level_of, other, pick, print_in_corner, show, thing, tint

WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LEAST_STEP = 8  # pixels from frame to frame
SIZES = ((84, 84), (112, 84), (84, 112))
CORNERS = ("top left", "top right", "bottom left", "bottom right")
NUMBER_SIZE = 14


@dataclass(frozen=True)
class Level:
    """How hard it is: frames and sides (pixels) as inclusive ranges, and the number of things."""

    frames: tuple[int, int] = (2, 5)
    side: tuple[int, int] = (18, 26)
    things: int = 3


LEVELS = {
    "first": Level(frames=(2, 2), side=(22, 28), things=2),
    "second": Level(frames=(2, 3), side=(20, 26), things=2),
    "third": Level(frames=(2, 4)),
    "full": Level(),
}


@dataclass(frozen=True)
class Track:
    """One thing through the film: its role, and colour and box in each frame (None where it is not shown)."""

    role: str  # "move", "turn", "appear", "once", "missing" or "still"
    shape: str
    colours: tuple[str, ...]
    boxes: tuple[Box | None, ...]
    way: str = ""
    event: int = 0  # the frame, from 0, in which it appears, is shown or is missing

    @property
    def name(self) -> str:
        return f"{self.colours[0]} {self.shape}"


@dataclass(frozen=True)
class _Film:
    width: int
    height: int
    frames: int
    corner: str
    tracks: tuple[Track, ...]

    def objects(self, frame: int) -> list[tuple[int, Obj]]:
        """The things shown in a frame, with the index of their track."""
        shown = []
        for k, track in enumerate(self.tracks):
            box = track.boxes[frame]
            if box is not None:
                shown.append((k, thing(track.colours[frame], track.shape, box, self.width, self.height)))
        return shown


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """Two to five frames of one scene and two to four questions; the same arguments always give the same.

    `targets` holds the box in the frame of the answer, or in the last frame where the answer is a direction; it is
    empty where the answer is the frame in which a thing is missing. Raises ValueError for an unknown split or level.
    """
    limits = level_of(LEVELS, level, split)
    rng = random.Random(f"frames/{seed}/{split}/{level}")
    film = in_split(split, lambda: _lay_out(rng, limits), _content)
    ground, dark = paper(film.width, film.height, rng), ink_tint(rng)
    tints = [{colour: tint(rng, colour) for colour in sorted(set(track.colours))} for track in film.tracks]
    views = []
    for k in range(film.frames):
        number, _ = print_in_corner(str(k + 1), NUMBER_SIZE, film.corner, film.width, film.height)
        things = [(o, tints[at][o.colour]) for at, o in film.objects(k)]
        views.append(show(ground, things, [number], dark))
    asked = [question for track in film.tracks for question in _ask(rng, film, track)]
    return Album(tuple(views), seed), asked


def _content(film: _Film) -> str:
    return "#".join(content_key(tuple(o for _, o in film.objects(k)), "") for k in range(film.frames))


def _lay_out(rng: random.Random, level: Level) -> _Film | None:
    """A moving thing, one of its colour and one of its shape; None if the room ran out."""
    (width, height), n = pick(rng, SIZES), rng.randint(*level.frames)
    corner = pick(rng, CORNERS)
    _, number = print_in_corner("4", NUMBER_SIZE, corner, width, height)
    colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    twins = ((colour, other(rng, SHAPES, shape)), (other(rng, COLOURS, colour), shape))
    late = ("appear",) if n > 2 else ()  # with two frames it could only be the second
    roles = ("move", pick(rng, ("turn", "turn", "missing", "once", "move", *late)))
    roles += (pick(rng, ("still", "still", "move", "missing", "once", *late)),)
    taken: list[list[Box]] = [[number] for _ in range(n)]
    tracks = []
    for (c, s), role in list(zip(((colour, shape), *twins), roles, strict=True))[: level.things]:
        side = rng.randint(*level.side)
        way = pick(rng, tuple(WAYS)) if role == "move" else ""
        path = _moving(rng, way, side, width, height, taken) if way else _resting(rng, side, width, height, taken)
        if path is None:
            return None
        for boxes, box in zip(taken, path, strict=True):
            boxes.append(box)
        event = 1 + int(rng.random() * (n - 1)) if role == "appear" else int(rng.random() * n)
        colours = tuple(rng.sample(COLOURS, n)) if role == "turn" else (c,) * n
        shown = tuple(box if _is_shown(role, k, event) else None for k, box in enumerate(path))
        tracks.append(Track(role, s, colours, shown, way, event))
    return _Film(width, height, n, corner, tuple(tracks))


def _is_shown(role: str, frame: int, event: int) -> bool:
    return {"appear": frame >= event, "once": frame == event, "missing": frame != event}.get(role, True)


def _resting(rng: random.Random, side: int, width: int, height: int, taken: list[list[Box]]) -> list[Box] | None:
    box = free_box(rng, side, width, height, [box for boxes in taken for box in boxes])
    return None if box is None else [box] * len(taken)


def _moving(
    rng: random.Random, way: str, side: int, width: int, height: int, taken: list[list[Box]]
) -> list[Box] | None:
    """Even steps one way, clear of the rest in every frame, from one zone into another."""
    (dx, dy), steps = WAYS[way], len(taken) - 1
    reach = (width if dx else height) - side - 4
    longest = min(reach // steps, 40)
    if longest < LEAST_STEP:
        return None
    for _ in range(30):
        step = rng.randint(LEAST_STEP, longest)
        room_x, room_y = width - side - 4 - abs(dx) * steps * step, height - side - 4 - abs(dy) * steps * step
        x = 2 + int(rng.random() * (room_x + 1)) + (steps * step if dx < 0 else 0)
        y = 2 + int(rng.random() * (room_y + 1)) + (steps * step if dy < 0 else 0)
        path = [(x + dx * k * step, y + dy * k * step) for k in range(steps + 1)]
        boxes = [(float(a), float(b), float(a + side), float(b + side)) for a, b in path]
        if not all(in_one_zone(box, width, height) for box in boxes):
            continue
        if _zone(boxes[0], width, height) == _zone(boxes[-1], width, height):
            continue  # a list of places could not tell the way
        if all(clear(box, others) for box, others in zip(boxes, taken, strict=True)):
            return boxes
    return None


def _zone(box: Box, width: int, height: int) -> str:
    return zone_of((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, width, height)


# ---- questions


def _ask(rng: random.Random, film: _Film, track: Track) -> list[Question]:
    if track.role == "move":
        return [_which_way(rng, film, track)]
    if track.role == "turn":
        return [_which_colour(rng, film, track, k) for k in rng.sample(range(film.frames), 2)]
    if track.role == "still":
        return []
    words = {
        "appear": ("in which frame does the {} appear?", "when does the {} appear?"),
        "once": ("in which frame is the {}?", "which frame has the {}?", "find the frame with the {}."),
        "missing": ("in which frame is there no {}?", "which frame has no {}?", "find the frame with no {}."),
    }[track.role]
    seen = ", ".join(f"frame {k + 1} {'no' if box is None else 'yes'}" for k, box in enumerate(track.boxes))
    thought = "" if track.role == "once" else f"{seen}, so frame {track.event + 1}"
    return [_frame(film, rng.choice(words).format(track.name), thought, track.event, track)]


def _frame(film: _Film, text: str, thought: str, at: int, track: Track) -> Question:
    box, key = track.boxes[at], f"frames {track.role} {film.frames}"
    targets = () if box is None else (box,)
    return Question("frames", text, thought, f"frame {at + 1}", targets, key, (film.width, film.height))


def _which_colour(rng: random.Random, film: _Film, track: Track, at: int) -> Question:
    text = rng.choice(("in which frame is the {s} {c}?", "which frame has the {c} {s}?", "when is the {s} {c}?"))
    return _frame(film, text.format(s=track.shape, c=track.colours[at]), "", at, track)


def _which_way(rng: random.Random, film: _Film, track: Track) -> Question:
    text = rng.choice(("which way did the {} move?", "which way does the {} go?", "in which direction did the {} move?"))
    boxes = [box for box in track.boxes if box is not None]
    places = ", ".join(f"frame {k + 1} {_zone(box, film.width, film.height)}" for k, box in enumerate(boxes))
    thought = f"{places}, so {track.way}"
    size = film.width, film.height
    return Question("frames", text.format(track.name), thought, track.way, (boxes[-1],), "frames way", size)
