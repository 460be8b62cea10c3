"""Several pictures of different sizes: which holds more of something, and which holds the one thing asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..drawing import paper
from ..families import PLURALS, Question, placed
from ..scenes import COLOURS, SHAPES, Obj, content_key, in_reading_order
from ..views import Album, Box
from .place import free_box, in_split, level_of, other, pick, show, thing, tint


@dataclass(frozen=True)
class Level:
    """How hard it is; pairs are inclusive ranges, sizes in pixels, `most` the objects that a picture may hold."""

    pictures: tuple[int, int] = (2, 4)
    size: tuple[int, int] = (84, 140)
    most: int = 5
    side: tuple[int, int] = (20, 40)


LEVELS = {
    "first": Level(pictures=(2, 2), size=(84, 84), most=2, side=(24, 40)),
    "second": Level(pictures=(2, 3), size=(84, 112), most=3, side=(22, 40)),
    "third": Level(pictures=(2, 3), size=(84, 126), most=4),
    "full": Level(),
}


@dataclass(frozen=True)
class _Page:
    width: int
    height: int
    objects: tuple[Obj, ...]


Pages = list[_Page]


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """Two to four pictures and up to seven questions; the same arguments always give the same.

    `targets` are the boxes that count in the picture of the answer, `size` is the size of that picture. Raises
    ValueError for an unknown split or level.
    """
    limits = level_of(LEVELS, level, split)
    rng = random.Random(f"compare/{seed}/{split}/{level}")
    pages = in_split(split, lambda: _lay_out(rng, limits), _content)
    views = [show(paper(p.width, p.height, rng), [(o, tint(rng, o.colour)) for o in p.objects]) for p in pages]
    asked = [*_most(rng, pages, 2), *_find(rng, pages, 2), *_pair(rng, pages), *_list(rng, pages, 2)]
    return Album(tuple(views), seed), asked


def _content(pages: Pages) -> str:
    return "#".join(content_key(page.objects, "") for page in pages)


def _lay_out(rng: random.Random, level: Level) -> Pages | None:
    """One thing occurs once, and other pictures hold its colour and its shape; None if the room ran out."""
    n = rng.randint(*level.pictures)
    colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    held: list[list[tuple[str, str]]] = [[] for _ in range(n)]
    home = int(rng.random() * n)
    held[home].append((colour, shape))
    for near_miss in ((colour, other(rng, SHAPES, shape)), (other(rng, COLOURS, colour), shape)):
        held[(home + 1 + int(rng.random() * (n - 1))) % n].append(near_miss)
    for pairs in held:
        wanted = max(rng.randint(0, level.most), rng.randint(0, level.most))  # seldom an empty picture
        while len(pairs) < wanted:
            c, s = pick(rng, COLOURS), pick(rng, SHAPES)
            c, s = pick(rng, ((colour, s), (c, shape), pairs[-1] if pairs else (c, s)))
            if (c, s) != (colour, shape):
                pairs.append((c, s))
    pages = [_page(rng, level, pairs) for pairs in held]
    return None if None in pages else [page for page in pages if page is not None]


def _page(rng: random.Random, level: Level, pairs: list[tuple[str, str]]) -> _Page | None:
    width, height = rng.randint(*level.size), rng.randint(*level.size)
    largest = int(0.6 * (width * height / (len(pairs) + 1)) ** 0.5)
    largest = min(level.side[1], max(level.side[0], largest))
    boxes: list[Box] = []
    objects = []
    for colour, shape in pairs:
        box = free_box(rng, rng.randint(level.side[0], largest), width, height, boxes)
        if box is None:
            return None
        boxes.append(box)
        objects.append(thing(colour, shape, box, width, height))
    return _Page(width, height, tuple(objects))


# ---- questions


def _countable(pages: Pages) -> list[tuple[str, list[list[Obj]]]]:
    """Plural names of all that can be counted (shapes, colours, both) with what each picture holds of them."""
    kinds = [("", s) for s in SHAPES] + [(c, "") for c in COLOURS]
    kinds += sorted({(o.colour, o.shape) for page in pages for o in page.objects})
    countable = []
    for c, s in kinds:
        found = [[o for o in p.objects if o.colour == (c or o.colour) and o.shape == (s or o.shape)] for p in pages]
        if any(found):
            countable.append((f"{c} {PLURALS[s] if s else 'things'}".strip(), found))
    return countable


def _counts(numbers: list[int], found: list[list[Obj]]) -> str:
    """What counts in each picture, one by one and then as a number: as for `count`, so that one skill serves both."""
    return ", ".join(f"picture {k + 1}: {placed(in_reading_order(found[k])) or 'none'}, so {len(found[k])}" for k in numbers)


def _answer(family: str, pages: Pages, at: int, text: str, thought: str, key: str, boxes: list[Obj]) -> Question:
    targets, page = tuple(o.box for o in boxes), pages[at]
    return Question(family, text, thought, f"picture {at + 1}", targets, key, (page.width, page.height))


def _most(rng: random.Random, pages: Pages, n: int) -> list[Question]:
    """Which picture has the most or the fewest of something, where one alone does."""
    crowds = [len(page.objects) for page in pages]
    cases: dict[bool, list] = {False: [], True: []}  # by whether the fullest or emptiest picture would be a wrong guess
    for what, found in _countable(pages):
        counts = [len(group) for group in found]
        for best, words in ((max, ("more", "the most")), (min, ("fewer", "the fewest"))):
            if counts.count(best(counts)) == 1:
                at = counts.index(best(counts))
                cases[crowds[at] != best(crowds)].append((what, found, at, words[len(pages) > 2]))
    asked = []
    for _ in range(n):
        choice = cases[rng.random() < 0.4] or cases[True] or cases[False]
        if not choice:
            break
        # high counts are rare: prefer them
        case = rng.choices(choice, [1 + max(len(group) for group in found) ** 2 for _, found, _, _ in choice])[0]
        choice.remove(case)
        what, found, at, most = case
        text = rng.choice((
            "which picture has {} {}?", "in which picture are there {} {}?", "find the picture with {} {}.",
        )).format(most, what)  # fmt: skip
        thought = f"{_counts(list(range(len(pages))), found)}, so picture {at + 1}"
        asked.append(_answer("compare", pages, at, text, thought, f"compare most {len(pages)}", found[at]))
    return asked


def _pair(rng: random.Random, pages: Pages) -> list[Question]:
    """Which of two pictures has more or fewer of something."""
    cases = []
    for what, found in _countable(pages):
        for i in range(len(pages)):
            for j in range(i):
                if len(found[i]) != len(found[j]):
                    cases.append((what, found, i, j))
    what, found, i, j = rng.choices(cases, [1 + len(found[i]) * len(found[j]) for _, found, i, j in cases])[0]
    if rng.random() < 0.5:
        i, j = j, i
    more = rng.random() < 0.5
    at = i if (len(found[i]) > len(found[j])) == more else j
    text = rng.choice(("are there {m} {w} in picture {i} or picture {j}?", "which has {m} {w}, picture {i} or picture {j}?"))
    text = text.format(m="more" if more else "fewer", w=what, i=i + 1, j=j + 1)
    thought = f"{_counts([i, j], found)}, so picture {at + 1}"
    return [_answer("compare", pages, at, text, thought, f"compare pair {len(pages)}", found[at])]


def _find(rng: random.Random, pages: Pages, n: int) -> list[Question]:
    """In which picture the one such thing is, where its colour and its shape occur in other pictures."""
    everything = [(at, o) for at, page in enumerate(pages) for o in page.objects]
    names = [o.name for _, o in everything]
    cases = []
    for at, o in everything:
        elsewhere = [p for k, p in everything if k != at]
        hard = any(p.colour == o.colour for p in elsewhere) and any(p.shape == o.shape for p in elsewhere)
        if hard and names.count(o.name) == 1:
            cases.append((at, o))
    asked = []
    for at, o in rng.sample(cases, min(n, len(cases))):
        text = rng.choice(("in which picture is the {}?", "which picture has the {}?", "find the picture with the {}."))
        looked = ", ".join(f"picture {k + 1} {'yes' if k == at else 'no'}" for k in range(len(pages)))
        thought = f"{looked}, so picture {at + 1}"
        asked.append(_answer("compare", pages, at, text.format(o.name), thought, f"compare find {len(pages)}", [o]))
    return asked


def _list(rng: random.Random, pages: Pages, n: int) -> list[Question]:
    """Everything in one picture: teaches which picture a number means. Not counted with the comparisons."""
    asked = []
    for at in rng.sample(range(len(pages)), n):
        text = rng.choice(("what is in picture {}?", "list everything in picture {}.", "describe picture {}.")).format(at + 1)
        page, boxes = pages[at], tuple(o.box for o in pages[at].objects)
        answer = placed(in_reading_order(page.objects)) or "nothing"
        asked.append(Question("compare", text, "", answer, boxes, "list", (page.width, page.height)))
    return asked
