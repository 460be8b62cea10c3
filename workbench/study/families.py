"""Questions about scenes, one family for each ability: wording, thought, exact answer and a strict check.

Every family is a function (scene, rng) -> Question or None (None: this scene offers no clear question). All
words are lower case and from a small closed vocabulary.
"""

from __future__ import annotations

import importlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from workbench.study.scenes import COLOURS, SHAPES, Level, Obj, Scene, has_distractors, is_unique, scene
from workbench.study.views import Album, Box

PLURALS = {s: "crosses" if s == "cross" else s + "s" for s in SHAPES}
DIRECTIONS = ("left of", "right of", "above", "below")
MOST_COUNTED = 5
HALF_PATCH = 7  # pixels

# families that say where things stand, the last figure of each coordinate ("39 25," "0.587"), and where a thought of a
# relation names the neighbour, or turns to say that there is none
PLACING = ("count", "wide", "relation", "point")
LOOSE, DECISIVE = 0.1, 4.0  # what these count in training, beside 1 for any other word
_LAST_FIGURE = re.compile(r"(?<= \d)\d(?= \d|,)|(?<=\.\d\d)\d")
_NEIGHBOUR = re.compile(r"(?<=,)( so| \w+ \w+)")

_POINT = re.compile(r"click\(x=([01]?\.\d+|[01]),y=([01]?\.\d+|[01])\)")


@dataclass(frozen=True)
class Question:
    """One question on one scene. `thought` is "" where the answer needs none.

    `targets` are the boxes (picture pixels) the answer is about, `size` is the picture's (width, height), and
    questions with one `chance_key` compete for one constant answer in `majority_baseline`.
    """

    family: str
    text: str
    thought: str
    answer: str
    targets: tuple[Box, ...]
    chance_key: str
    size: tuple[int, int]

    def check(self, reply_answer: str) -> bool:
        """True for a right answer: the same words up to case and spaces, or a click inside the target."""
        if self.family == "point":
            point = parse_point(reply_answer)
            return point is not None and self._hit(*point)
        return _normal(reply_answer) == _normal(self.answer)

    def _hit(self, x: float, y: float) -> bool:
        (x0, y0, x1, y1), (width, height) = self.targets[0], self.size
        return x0 <= x * width <= x1 and y0 <= y * height <= y1


def parse_point(text: str) -> tuple[float, float] | None:
    """The (x, y) of "click(x=0.365, y=0.317)", as shares of width and height; None for anything else."""
    found = _POINT.fullmatch("".join(text.lower().split()))
    if found is None:
        return None
    x, y = float(found[1]), float(found[2])
    return (x, y) if x <= 1 and y <= 1 else None


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def placed(objects: Iterable[Obj]) -> str:
    """Each with its place, in the order given: what descriptions and comparisons list."""
    return ", ".join(f"{o.name} {o.zone}" for o in objects)


def numbered(things: Iterable[str]) -> str:
    """ "1 red circle, 2 red circle": of things alike, a number says which of them comes next."""
    return ", ".join(f"{k} {thing}" for k, thing in enumerate(things, start=1))


def hundredths(length: float, whole: float) -> str:
    """ "07": a length in hundredths of a longer one, always two digits."""
    return f"{int(100 * length / whole):02d}"


def _with_spot(o: Obj) -> str:
    """ "red star top left 05 06": name, zone, and the centre in half patches of 7 pixels, across and down.

    Which of two things is nearer, and whether one stands beside or below another, is decided in one unit for both directions.
    """
    return " ".join([placed((o,)), *(f"{int(at / HALF_PATCH):02d}" for at in o.centre)])


def _with_centre(o: Obj, size: tuple[int, int]) -> str:
    """ "red star centre 48 41": name, zone, and the centre in hundredths of the picture's width and height."""
    return " ".join([placed((o,)), *(hundredths(at, side) for at, side in zip(o.centre, size, strict=True))])


def what_counts(question: Question, reply: str) -> dict[int, float]:
    """What the characters of a reply count in training that do not count 1, by their place in it.

    Last figures of coordinates are known hardly better than by chance (2.3 nats for the third of a click, as much as for one
    figure in ten), and they are many: counted in full they made most of the loss, and the words that decide drowned in them.
    """
    counts = {}
    if question.family in PLACING:
        counts = {found.start(): LOOSE for found in _LAST_FIGURE.finditer(reply)}
    if question.family == "relation" and (named := _NEIGHBOUR.search(reply)):
        counts |= dict.fromkeys(range(*named.span()), DECISIVE)
    return counts


# ---- the families. Each takes (scene, rng) and gives one Question or None.


def describe(scene: Scene, rng: random.Random) -> Question | None:
    text = rng.choice(("list everything.", "what is in the picture?", "describe the picture."))
    parts = [placed(scene.objects)] * bool(scene.objects) + [f"number {scene.number}"] * bool(scene.number)
    boxes = tuple(o.box for o in scene.objects) + scene.digit_boxes
    return Question("describe", text, "", ", ".join(parts), boxes, "describe", scene.size)


def name(scene: Scene, rng: random.Random) -> Question | None:
    """What stands in a zone (mostly), or the other attribute of the only thing of some colour or shape."""
    options = {"zone": [], "colour": [], "shape": []}
    for o in scene.objects:
        if sum(p.zone == o.zone for p in scene.objects) == 1:
            options["zone"].append(o)
        if sum(p.shape == o.shape for p in scene.objects) == 1:
            options["colour"].append(o)
        if sum(p.colour == o.colour for p in scene.objects) == 1:
            options["shape"].append(o)
    weights = [share if options[kind] else 0 for kind, share in (("zone", 6), ("colour", 2), ("shape", 2))]
    if not any(weights):
        return None
    kind = rng.choices(list(options), weights)[0]
    o = rng.choice(options[kind])
    words = {
        "zone": ("what is in the {z}?", "what do you see in the {z}?", "name the thing in the {z}."),
        "colour": ("what colour is the {s}?", "which colour has the {s}?", "name the colour of the {s}."),
        "shape": ("what shape is the {c} thing?", "which shape has the {c} thing?",
                  "name the shape of the {c} thing."),
    }[kind]  # fmt: skip
    text = rng.choice(words).format(z=o.zone, s=o.shape, c=o.colour)
    answer = {"zone": o.name, "colour": o.colour, "shape": o.shape}[kind]
    return Question("name", text, "", answer, (o.box,), f"name {kind}", scene.size)


def _kinds_by_count(objects: Sequence[Obj]) -> dict[int, list[tuple[str, str]]]:
    """Every countable (colour or "", shape or "") under its count; of absent pairs only the near misses."""
    counts = Counter((c, s) for o in objects for c, s in ((o.colour, o.shape), (o.colour, ""), ("", o.shape)))
    by_count: dict[int, list[tuple[str, str]]] = {}
    for kind, n in counts.items():
        by_count.setdefault(n, []).append(kind)
    pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, "") in counts or ("", s) in counts]
    kinds = pairs + [(c, "") for c in COLOURS] + [("", s) for s in SHAPES]
    by_count[0] = [kind for kind in kinds if kind not in counts]
    return by_count


def count(scene: Scene, rng: random.Random, wanted: int | None = None) -> Question | None:
    """How many of a colour, of a shape or of both; `wanted` asks for something that occurs so many times."""
    by_count = _kinds_by_count(scene.objects)
    if wanted is None:
        numbers = [n for n in sorted(by_count) if n <= MOST_COUNTED]
        wanted = rng.choices(numbers, [1 + n * n for n in numbers])[0]  # high counts are rare: seize them
    elif wanted not in by_count:
        return None
    c, s = rng.choice(by_count[wanted])
    found = [o for o in scene.objects if o.colour == (c or o.colour) and o.shape == (s or o.shape)]
    plural = f"{c} {PLURALS[s] if s else 'things'}".strip()
    text = rng.choice(("how many {}?", "count the {}.", "how many {} are there?")).format(plural)
    answer = str(len(found))
    # where each stands is a mark of what has been counted: two alike in one zone differ in nothing else
    thought = f"{numbered(_with_centre(o, scene.size) for o in found) or 'none'}, so {answer}"
    return Question("count", text, thought, answer, tuple(o.box for o in found), "count", scene.size)


def _pick(scene: Scene, rng: random.Random) -> Obj | None:
    """An object its name alone singles out; mostly one that shares its colour and its shape with others."""
    unique = [o for o in scene.objects if is_unique(o, scene.objects)]
    hard = [o for o in unique if has_distractors(o, scene.objects)]
    if hard and rng.random() < 0.8:
        return rng.choice(hard)
    return rng.choice(unique) if unique else None


def where(scene: Scene, rng: random.Random) -> Question | None:
    o = _pick(scene, rng)
    if o is None:
        return None
    text = rng.choice(("where is the {}?", "find the {}.", "in which part is the {}?")).format(o.name)
    return Question("where", text, "", o.zone, (o.box,), "where", scene.size)


def point(scene: Scene, rng: random.Random) -> Question | None:
    o = _pick(scene, rng)
    if o is None:
        return None
    text = rng.choice(("click the {}.", "point at the {}.", "press the {}.")).format(o.name)
    (x, y), (width, height) = o.centre, scene.size
    answer = f"click(x={x / width:.3f}, y={y / height:.3f})"
    return Question("point", text, f"{o.name} {o.zone}", answer, (o.box,), "point", scene.size)


def read(scene: Scene, rng: random.Random) -> Question | None:
    if not scene.number:
        return None
    text = rng.choice(("what number is written?", "read the number.", "which digits are written?"))
    return Question("read", text, "", scene.number, scene.digit_boxes, "read", scene.size)


def _off(o: Obj, direction: str, other: Obj) -> tuple[float, float]:
    """How far another object's centre lies ahead in that direction (below 0: behind) and aside of it, in pixels."""
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[direction]
    return sign * (other.centre[axis] - o.centre[axis]), abs(other.centre[1 - axis] - o.centre[1 - axis])


def neighbour(o: Obj, direction: str, objects: Sequence[Obj]) -> tuple[bool, Obj | None]:
    """(is the case clear, the nearest object on that side or None).

    With `ahead` and `aside` the distances of centres along and across the direction: an object counts if
    aside <= 0.5 ahead and does not if aside > 1.2 ahead. In between, or a runner-up within 8 px: not clear.
    """
    inside, doubtful = [], []
    for other in objects:
        ahead, aside = _off(o, direction, other)
        if other is not o and ahead > 0 and aside <= 1.2 * ahead:
            (inside if aside <= 0.5 * ahead else doubtful).append((ahead, other))
    inside.sort(key=lambda pair: pair[0])
    if not inside:
        return not doubtful, None
    nearest = inside[0][0]
    clear = all(ahead >= nearest + 8 for ahead, _ in inside[1:] + doubtful)
    return clear, inside[0][1]


def _cases(scene: Scene) -> list[tuple[Obj, str, Obj | None]]:
    """Every clear (thing that its name singles out, direction, what stands next to it there or None)."""
    cases = []
    for o in scene.objects:
        if is_unique(o, scene.objects):
            for direction in DIRECTIONS:
                clear, other = neighbour(o, direction, scene.objects)
                if clear:
                    cases.append((o, direction, other))
    return cases


def hard_neighbours(scene: Scene) -> int:
    """How much a scene offers of what was missed most: neighbours that stand askew, and some thing behind them that stands
    straighter.
    """
    points = 0
    for o, direction, other in _cases(scene):
        if other is not None:
            ahead, aside = _off(o, direction, other)
            others = (_off(o, direction, thing) for thing in scene.objects)
            straighter = any(further > ahead and less < aside for further, less in others)
            points += 1 + 2 * (aside >= 0.2 * ahead) + 6 * straighter
    return points


def relation(scene: Scene, rng: random.Random) -> Question | None:
    """What stands next to something on one side; "nothing" is kept to a quarter of the answers or so.

    The thought says where both stand.
    """
    cases = _cases(scene)
    something = [case for case in cases if case[2] is not None]
    cases = something if rng.random() < 0.8 else [case for case in cases if case[2] is None]
    if not cases:
        return None
    o, direction, other = rng.choice(cases)
    words = ("what is {} the {}?", "which thing is {} the {}?", "name the thing {} the {}.")
    text = rng.choice(words).format(direction, o.name)
    answer = other.name if other else "nothing"
    thought = f"{', '.join(_with_spot(thing) for thing in (o, other) if thing)}, so {answer}"
    boxes = (other.box, o.box) if other else (o.box,)
    return Question("relation", text, thought, answer, boxes, "relation", scene.size)


@dataclass(frozen=True)
class Family:
    """One ability: what it asks, what in the report it stands for, and the kind of pictures that suits it.

    A kind of scene is asked by `ask`; one of the DRAWN kinds brings its questions, and those whose chance_key starts with
    `key` are this family's.
    """

    name: str
    line: str
    stands_for: str
    kind: str
    ask: Callable[[Scene, random.Random], Question | None] | None = None
    key: str = ""
    pictures: str = "one"  # or "several"


FAMILIES = {
    family.name: family
    for family in (
        Family("describe", "List every object and where it is.",
               "captions of the vision pre-training", "objects", describe),
        Family("name", "Name what is in one part of the picture.",
               "general visual questions (MMBench)", "distractors", name),
        Family("count", "Count things of a colour, a shape or both.",
               "reasoning in steps over a picture (MathVista)", "count", count),
        Family("where", "Say in which part of the picture a thing is.",
               "grounding boxes of the vision pre-training", "distractors", where),
        Family("point", "Click a thing.",
               "screens: a click inside the target (ScreenSpot)", "distractors", point),
        Family("read", "Read a printed number.",
               "text in pictures (OCRBench, InfoVQA)", "read", read),
        Family("relation", "Name the neighbour on one side of a thing.",
               "spatial relations (RealWorldQA)", "objects", relation),
        Family("words", "Read a printed word.",
               "text in pictures (OCRBench)", "words", key="read word"),
        Family("sum", "Add two printed numbers.",
               "mathematics with a long thought (MathVista)", "sums", key="sum"),
        Family("chart", "Read a bar chart: largest, smallest, value, difference.",
               "charts (InfoVQA)", "chart", key="chart"),
        Family("window", "Click a button of a mock window.",
               "screens: a click inside the target (ScreenSpot)", "window", key="point window"),
        Family("compare", "Say which of several pictures has more of something.",
               "several pictures (BLINK)", "compare", key="compare", pictures="several"),
        Family("frames", "Say how a thing moves, or in which frame something is missing.",
               "video (Video-MME)", "frames", key="frames", pictures="several"),
        Family("tiny", "Name a very small thing in a large picture.",
               "high resolution (V*, ScreenSpot-Pro)", "tiny", key="tiny"),
        Family("needle", "Find one among many lines or pictures.",
               "long context (needle in a haystack)", "needle", key="needle", pictures="several"),
        Family("wide", "Name things in a strip ten times as long as wide.",
               "extreme aspect ratio", "wide", key="wide"),
    )
}  # fmt: skip


# Kinds of pictures that bring their own questions (`sheet` none); each module has `draw(seed, split, level)`.
DRAWN = ("chart", "sums", "words", "window", "compare", "frames", "tiny", "needle", "lines", "pictures", "sheet", "wide")


def drawn(kind: str, seed: int, split: str, level: str) -> tuple[Album, list[Question]]:
    """Pictures of one of the DRAWN kinds and the questions that can be asked of them."""
    return importlib.import_module(f"workbench.study.kinds.{kind}").draw(seed, split, level)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"no family is called {name!r}; choose among {', '.join(FAMILIES)}")
    return FAMILIES[name]


def questions(scene: Scene, rng: random.Random, families: Sequence[str], n: int) -> list[Question]:
    """Up to n different questions on one scene, families in random order and as evenly as possible.

    Families of the DRAWN kinds have no questions about a scene and are passed over.
    """
    asked: dict[tuple, Question] = {}
    order = [ask for name in families if (ask := _family(name).ask) is not None]
    for _ in range(3 * max(1, -(-n // max(1, len(order))))):
        rng.shuffle(order)
        for ask in order:
            if len(asked) >= n:
                return list(asked.values())
            q = ask(scene, rng)
            if q is not None:
                asked.setdefault((q.family, q.targets, q.answer), q)
    return list(asked.values())


def make(
    family: str, seed: int, split: str = "report", level: Level | str = "full"
) -> tuple[Scene | Album, Question]:
    """A picture, or an Album of several, suited to the family and one question; the same arguments give the same pair.

    For name, where and point the thing asked about shares its colour with another object and its shape with
    a third, unless the level is too small for that; for count the answers 0 to 5 come equally often as far as
    the level allows. Splits never share a content: see `scenes.split_of`.
    """
    chosen = _family(family)
    rng = random.Random(f"make/{family}/{seed}/{split}")
    if chosen.ask is None:
        return _make_drawn(chosen, seed, split, level if isinstance(level, str) else level.name, rng)
    wanted = rng.randint(0, MOST_COUNTED)
    for k in range(400):
        picture = scene(1000 * seed + k, split, level, chosen.kind)
        if family == "count":
            if k % 40 == 39:
                wanted = rng.randint(0, MOST_COUNTED)  # the level may be too small for the first choice
            q = count(picture, rng, wanted)
        else:
            q = chosen.ask(picture, rng)
        if q is not None and (k >= 200 or _suits(picture, q)):
            return picture, q
    raise ValueError(f"level {level!r} gives no scene to ask {family!r} about; allow more objects")


def _make_drawn(family: Family, seed: int, split: str, level: str, rng: random.Random) -> tuple[Album, Question]:
    """A drawing of the family's kind and one of its questions, each kind of question equally likely."""
    for k in range(50):
        pictures, asked = drawn(family.kind, 1000 * seed + k, split, level)
        by_key: dict[str, list[Question]] = {}
        for q in asked:
            if q.chance_key.startswith(family.key):
                by_key.setdefault(q.chance_key, []).append(q)
        if by_key:
            return pictures, rng.choice(by_key[rng.choice(sorted(by_key))])
    raise ValueError(f"level {level!r} gives no {family.kind!r} to ask {family.name!r} about; choose another level")


def _suits(picture: Scene, q: Question) -> bool:
    """False where colour or shape alone would do, or where a lone short number is all there is.

    A scene that shows "6" and nothing else is one content out of ten; a held-out split would repeat it often.
    """
    if q.family == "read":
        return bool(picture.objects) or len(picture.number) > 2
    if q.family not in ("name", "where", "point") or len(picture.objects) < 3:
        return True
    target = next(o for o in picture.objects if o.box == q.targets[0])
    return has_distractors(target, picture.objects)


def majority_baseline(train: Sequence[Question], held: Sequence[Question]) -> float:
    """Share of held-out questions of one family that the best constant answer in training gets right.

    Each chance_key has its own constant. For clicks it is the best of a 32 x 32 grid of points and the mean.
    """
    if not train or not held:
        raise ValueError(f"got {len(train)} training and {len(held)} held-out questions; give some of both")
    right = 0
    for key in {q.chance_key for q in held}:
        seen = [q for q in train if q.chance_key == key]
        if seen:
            answers = Counter(q.answer for q in seen)
            constant = _best_point(seen) if seen[0].family == "point" else answers.most_common(1)[0][0]
            right += sum(q.check(constant) for q in held if q.chance_key == key)
    return right / len(held)


def _best_point(train: Sequence[Question]) -> str:
    centres = [parse_point(q.answer) or (0.5, 0.5) for q in train]
    mean = (sum(x for x, _ in centres) / len(train), sum(y for _, y in centres) / len(train))
    grid = [((i + 0.5) / 32, (j + 0.5) / 32) for i in range(32) for j in range(32)]
    x, y = max([mean, *grid], key=lambda p: sum(q._hit(*p) for q in train))
    return f"click(x={x:.3f}, y={y:.3f})"


def corpus(n: int) -> list[str]:
    """Questions, thoughts and answers of n training scenes, one text each, to build the tokenizer from."""
    texts = []
    for seed in range(n):
        rng = random.Random(f"corpus/{seed}")
        for q in questions(scene(seed), rng, tuple(FAMILIES), len(FAMILIES)):
            texts += [text for text in (q.text, q.thought, q.answer) if text]
    return texts
