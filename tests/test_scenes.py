"""The study pictures and their questions: the ground truth is true, and splits share nothing."""

import random
import re

import numpy as np
import pytest
from PIL import Image

from workbench.study.families import (
    DIRECTIONS,
    FAMILIES,
    PLURALS,
    Question,
    corpus,
    hard_neighbours,
    majority_baseline,
    make,
    neighbour,
    parse_point,
    questions,
)
from workbench.study.scenes import (
    COLOURS,
    KINDS,
    LARGE,
    LEVELS,
    NO_GLYPH,
    NO_OBJECT,
    PALETTE,
    SHAPES,
    UNSURE,
    ZONES,
    Level,
    Obj,
    Scene,
    content_key,
    has_distractors,
    patch_labels,
    scene,
    split_of,
    token_labels,
)

OF_SCENES = tuple(name for name, family in FAMILIES.items() if family.ask is not None)
DRAWINGS = tuple(name for name in FAMILIES if name not in OF_SCENES)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(seed) for seed in range(300)]


@pytest.fixture(scope="module")
def asked(scenes) -> list[tuple[Scene, Question]]:
    rng = random.Random(1)
    return [(s, q) for s in scenes for q in questions(s, rng, OF_SCENES, 10)]


def pixels(s: Scene) -> np.ndarray:
    return np.asarray(s.image).astype(float)


def inked(s: Scene) -> np.ndarray:
    """Pixels that clearly differ from the paper, bool (height, width)."""
    image = pixels(s)
    paper = np.median(image.reshape(-1, 3), axis=0)
    return abs(image - paper).max(2) > 25


# ---- pictures


def test_ink_lies_in_the_boxes_and_reaches_their_edges(scenes):
    for s in scenes:
        ink = inked(s)
        for x0, y0, x1, y1 in [o.box for o in s.objects] + list(s.digit_boxes):
            left, top, right, bottom = int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1))
            assert 0 <= left and 0 <= top and right <= s.size[0] and bottom <= s.size[1]
            inside = ink[top:bottom, left:right].copy()
            ink[top:bottom, left:right] = False
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            slack = 3  # the tip of a star is thinner than a pixel
            assert rows[0] <= slack and columns[0] <= slack
            assert rows[-1] >= len(inside) - 1 - slack and columns[-1] >= inside.shape[1] - 1 - slack
        assert not ink.any()


def test_the_named_colour_fills_the_middle_of_the_box(scenes):
    for s in scenes:
        image = pixels(s)
        for o in s.objects:
            x, y = (int(c) for c in o.centre)
            seen = image[y, x]
            nearest = min(COLOURS, key=lambda c: abs(seen - np.array(PALETTE[c])).sum())
            assert nearest == o.colour


def test_shapes_cover_what_their_geometry_says():
    share = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 0.36 * (2 - 0.36), "star": 0.326}
    seen: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    for seed in range(200):
        s = scene(seed, level=Level("large", objects=(1, 3), side=(36, 46), number_chance=0), kind="objects")
        image, ink = pixels(s), inked(s)
        assert image.shape[2] == 3
        for o in s.objects:
            x0, y0, x1, y1 = (round(v) for v in o.box)
            seen[o.shape].append(ink[y0:y1, x0:x1].mean())
    for shape, shares in seen.items():
        assert np.mean(shares) == pytest.approx(share[shape], abs=0.05), shape


def test_things_stand_apart_and_within_the_level():
    for name, level in LEVELS.items():
        for seed in range(60):
            s = scene(seed, level=name)
            assert all(level.size[0] <= side <= level.size[1] for side in s.size)
            assert len(s.objects) <= level.objects[1]
            assert len(s.number) <= level.digits[1]
            assert all(level.side[0] <= o.box[2] - o.box[0] <= level.side[1] for o in s.objects)
            boxes = [o.box for o in s.objects]
            if s.digit_boxes:
                corners = np.array(s.digit_boxes)
                boxes.append((*corners[:, :2].min(0), *corners[:, 2:].max(0)))
            for i, (a0, b0, a1, b1) in enumerate(boxes):
                for c0, d0, c1, d1 in boxes[:i]:
                    assert max(c0 - a1, a0 - c1, d0 - b1, b0 - d1) >= 3


def test_zones_are_the_cells_of_a_three_by_three_grid_in_reading_order(scenes):
    for s in scenes:
        width, height = s.size
        for o in s.objects:
            x, y = o.centre
            assert o.zone == ZONES[int(y // (height / 3)) * 3 + int(x // (width / 3))]
        order = [(ZONES.index(o.zone), o.centre[0]) for o in s.objects]
        assert order == sorted(order)


def test_digit_boxes_run_left_to_right_and_hold_all_dark_ink():
    for seed in range(100):
        s = scene(seed, kind="read")
        assert len(s.digit_boxes) == len(s.number) >= 1 and s.number.isdecimal()
        assert [b[0] for b in s.digit_boxes] == sorted(b[0] for b in s.digit_boxes)
        dark = pixels(s).max(2) < 110
        for x0, y0, x1, y1 in s.digit_boxes:
            window = dark[int(y0) : int(y1), int(x0) : int(x1)]
            assert window.any()
            window[...] = False
        assert not dark.any()


def test_same_digit_looks_the_same_and_others_do_not():
    """The printed digit is the recorded one: ink agrees within a digit and differs between digits."""
    level = Level("print", digits=(6, 6), font=(30, 30), objects=(1, 1), size=(200, 224))
    looks: dict[str, list[np.ndarray]] = {}
    for seed in range(20):
        s = scene(seed, level=level, kind="read")
        gray = 255 - pixels(s).mean(2)
        for digit, (x0, y0, x1, y1) in zip(s.number, s.digit_boxes, strict=True):
            look = gray[int(y0) : int(y1), int(x0) : int(x1)] > 120
            missing = 40 - np.array(look.shape)
            looks.setdefault(digit, []).append(np.pad(look, ((0, missing[0]), (0, missing[1]))))
    assert sorted(looks) == list("0123456789")
    means = {digit: np.mean(masks, axis=0) for digit, masks in looks.items()}
    for digit, masks in looks.items():
        for mask in masks:
            assert min(means, key=lambda d: abs(means[d] - mask).sum()) == digit


# ---- splits and kinds


def test_same_arguments_give_the_same_scene_and_others_another():
    for kind in KINDS:
        one, two = scene(5, "choose", "full", kind), scene(5, "choose", "full", kind)
        assert one.objects == two.objects and one.number == two.number and one.digit_boxes == two.digit_boxes
        assert one.image.tobytes() == two.image.tobytes()
        assert scene(6, "choose", "full", kind).image.tobytes() != one.image.tobytes()


def test_splits_share_no_content_over_thousands_of_scenes():
    counts = {"train": 3000, "choose": 300, "report": 300}
    contents = {
        split: {content_key(s.objects, s.number) for s in (scene(i, split, "first") for i in range(n))}
        for split, n in counts.items()
    }
    assert not contents["train"] & contents["choose"]
    assert not contents["train"] & contents["report"]
    assert not contents["choose"] & contents["report"]


def test_split_depends_on_content_alone():
    a = Obj("red", "star", (10, 10, 40, 40), "top left")
    b = Obj("blue", "cross", (60, 60, 90, 90), "centre")
    moved = Obj("red", "star", (12, 9, 36, 33), "top left")
    assert split_of((a, b), "42") == split_of((b, moved), "42")
    shares = [split_of((), str(n)) for n in range(16_000)]
    assert shares.count("report") == pytest.approx(1000, abs=150)
    assert shares.count("choose") == pytest.approx(1000, abs=150)


def test_most_scenes_of_three_or_more_need_colour_and_shape(scenes):
    several = [s for s in (scene(i, kind="objects") for i in range(400)) if len(s.objects) >= 3]
    hard = sum(any(has_distractors(o, s.objects) for o in s.objects) for s in several)
    assert hard / len(several) > 0.7
    for seed in range(50):
        s = scene(seed, kind="distractors")
        assert any(
            [p.name for p in s.objects].count(o.name) == 1
            and {p.shape for p in s.objects if p.colour == o.colour} - {o.shape}
            and {p.colour for p in s.objects if p.shape == o.shape} - {o.colour}
            for o in s.objects
        )


def test_large_scenes_keep_their_level_in_all_but_their_size():
    for level in ("first", "full"):
        drawn = [scene(seed, "train", level, "large") for seed in range(20)]
        sides = [side for s in drawn for side in s.size]
        assert LARGE[0] <= min(sides) and LEVELS["full"].size[1] < min(sides) and 450 < max(sides) <= LARGE[1]
        assert max(len(s.objects) for s in drawn) <= LEVELS[level].objects[1]


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"level": "tiny"}, {"kind": "photo"}])
def test_unknown_names_are_refused_with_the_choices(wrong):
    with pytest.raises(ValueError, match="choose one of"):
        scene(0, **wrong)


# ---- labels


def test_labels_agree_with_boxes(scenes):
    for s in scenes[:150]:
        width, height = s.size
        for cell, labels in ((28, token_labels), (14, patch_labels)):
            grid = 2 * -(-height // 28) * 14 // cell, 2 * -(-width // 28) * 14 // cell
            objects, digits = labels(s, *grid)
            assert objects.shape == digits.shape == grid and objects.dtype == digits.dtype == np.int64
            for (r, c), label in np.ndenumerate(objects):
                touching = [o for o in s.objects if _overlap(o.box, c * cell, r * cell, cell) > 0]
                if label not in (NO_OBJECT, UNSURE):
                    colour, shape = COLOURS[label // 5], SHAPES[label % 5]
                    assert (colour, shape) in [(o.colour, o.shape) for o in touching]
                if not touching:
                    assert label == NO_OBJECT
            for (r, c), label in np.ndenumerate(digits):
                boxes = zip(s.number, s.digit_boxes, strict=True)
                shown = {d for d, box in boxes if _overlap(box, c * cell, r * cell, cell) > 0}
                assert shown if label != NO_GLYPH else not shown
                assert label in (NO_GLYPH, UNSURE) or str(label) in shown


def _overlap(box, x: float, y: float, cell: int) -> float:
    x0, y0, x1, y1 = box
    return max(0, min(x1, x + cell) - max(x0, x)) * max(0, min(y1, y + cell) - max(y0, y))


def test_every_square_is_labelled_in_the_cell_of_its_centre():
    level = Level("squares", objects=(1, 1), side=(40, 46), number_chance=0)
    for seed in range(60):
        s = scene(seed, level=level, kind="objects")
        (o,) = s.objects
        label = 5 * COLOURS.index(o.colour) + SHAPES.index(o.shape)
        objects, digits = patch_labels(s, 16, 16)
        assert objects[int(o.centre[1] // 14), int(o.centre[0] // 14)] == label
        assert set(np.unique(objects)) <= {label, NO_OBJECT, UNSURE}
        assert (digits == NO_GLYPH).all()


def test_a_grid_that_is_too_small_is_refused():
    s = scene(0, level=Level("wide", size=(100, 100)))
    with pytest.raises(ValueError, match="at least 4 x 4"):
        token_labels(s, 4, 3)


# ---- questions: every answer is recomputed here from the objects alone


def test_all_families_are_asked_in_several_phrasings(asked):
    for family in OF_SCENES:
        shapes = {
            re.sub("|".join([*PLURALS.values(), *SHAPES, *COLOURS, *ZONES, *DIRECTIONS]), "_", q.text)
            for _, q in asked
            if q.family == family
        }
        assert len(shapes) >= 3, family


def test_describe_lists_every_object_and_the_number(asked):
    for s, q in asked:
        if q.family == "describe":
            parts = q.answer.split(", ")
            expected = [f"{o.colour} {o.shape} {o.zone}" for o in s.objects]
            assert parts == expected + ([f"number {s.number}"] if s.number else [])


def test_name_answers_are_the_only_possible_ones(asked):
    for s, q in asked:
        if q.family == "name":
            words = set(re.findall("[a-z]+", q.text))
            zone = next((z for z in ZONES if q.text.rstrip("?.").endswith("the " + z)), None)
            if zone:
                possible = [o.name for o in s.objects if o.zone == zone]
            elif words & set(SHAPES):
                possible = [o.colour for o in s.objects if o.shape in words]
            else:
                possible = [o.shape for o in s.objects if o.colour in words]
            assert possible == [q.answer]


def test_counts_and_their_thoughts_add_up(asked):
    singular = {plural: shape for shape, plural in PLURALS.items()}
    seen = set()
    for s, q in asked:
        if q.family == "count":
            words = re.findall("[a-z]+", q.text)
            colour = next((w for w in words if w in COLOURS), None)
            shape = next((singular[w] for w in words if w in singular), None)
            assert colour or shape
            found = [o for o in s.objects if colour in (None, o.colour) and shape in (None, o.shape)]
            assert q.answer == str(len(found))
            places = [(int(100 * o.centre[0] / s.size[0]), int(100 * o.centre[1] / s.size[1])) for o in found]
            said = [f"{o.colour} {o.shape} {o.zone} {x:02d} {y:02d}" for o, (x, y) in zip(found, places, strict=True)]
            listed = ", ".join(f"{k} {one}" for k, one in enumerate(said, 1)) or "none"
            assert q.thought == f"{listed}, so {len(found)}"
            assert sorted(q.targets) == sorted(o.box for o in found)
            seen.add(q.answer)
    assert seen == set("012345")


def _named(s: Scene, text: str) -> Obj:
    """The one object whose colour and shape the text names."""
    (o,) = [o for o in s.objects if f"{o.colour} {o.shape}" in text]
    return o


def test_where_and_point_mean_one_object(asked):
    for s, q in asked:
        if q.family == "where":
            assert q.answer == _named(s, q.text).zone
        if q.family == "point":
            o = _named(s, q.text)
            point = parse_point(q.answer)
            assert point is not None and q.targets == (o.box,)
            assert point[0] * s.size[0] == pytest.approx((o.box[0] + o.box[2]) / 2, abs=0.2)
            assert point[1] * s.size[1] == pytest.approx((o.box[1] + o.box[3]) / 2, abs=0.2)
            assert q.thought == f"{o.name} {o.zone}"


def test_read_gives_the_number(asked):
    assert all(q.answer == s.number and q.targets == s.digit_boxes for s, q in asked if q.family == "read")


def test_relations_hold_in_the_picture(asked):
    answered = {True: 0, False: 0}
    for s, q in asked:
        if q.family == "relation":
            (direction,) = [d for d in DIRECTIONS if f" {d} " in q.text]
            o = _named(s, q.text)
            dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[direction]
            ahead = {}
            for p in s.objects:
                x, y = p.centre[0] - o.centre[0], p.centre[1] - o.centre[1]
                forward, sideways = x * dx + y * dy, abs(x * dy) + abs(y * dx)
                if forward > 0 and sideways <= forward / 2:
                    ahead[forward] = p
            seen = [o, *([ahead[min(ahead)]] if ahead else [])]
            assert q.answer == (seen[1].name if ahead else "nothing")
            spots = [f"{p.name} {p.zone} {p.centre[0] // 7:02.0f} {p.centre[1] // 7:02.0f}" for p in seen]
            assert q.thought == f"{', '.join(spots)}, so {q.answer}"
            answered[bool(ahead)] += 1
    assert min(answered.values()) > 5


def test_doubtful_neighbours_are_not_clear():
    def at(x: float, y: float) -> Obj:
        return Obj("red", "star", (x - 10, y - 10, x + 10, y + 10), "centre")

    o, beside, oblique, close = at(50, 50), at(100, 52), at(90, 85), at(95, 40)
    assert neighbour(o, "right of", (o, beside)) == (True, beside)
    assert neighbour(o, "left of", (o, beside)) == (True, None)
    assert neighbour(o, "right of", (o, oblique)) == (False, None)
    assert neighbour(o, "right of", (o, beside, close))[0] is False
    assert neighbour(o, "right of", (o, at(140, 50), beside)) == (True, beside)


def test_neighbours_that_stand_askew_before_a_straighter_thing_are_hard():
    def at(colour: str, x: float, y: float) -> Obj:
        return Obj(colour, "star", (x - 10, y - 10, x + 10, y + 10), "centre")

    def points(*objects: Obj) -> int:
        return hard_neighbours(Scene(Image.new("RGB", (200, 100)), objects, "", (), 0))

    red, green = at("red", 50, 50), at("green", 140, 51)
    assert points(red) == 0
    assert points(red, at("blue", 90, 52)) == 1 + 1  # right of one, left of the other
    assert points(red, at("blue", 90, 66)) == 3 + 3
    assert points(red, at("blue", 90, 66), green) == 9 + 3 + 3 + 9
    assert points(red, at("blue", 90, 52), at("green", 140, 80)) == 1 + 1  # further off and less straight: no trap


# ---- checks, baselines and the rest


def test_check_accepts_the_truth_and_rejects_others(asked):
    by_family: dict[str, list[Question]] = {}
    for _, q in asked:
        assert q.check(q.answer) and q.check("  " + q.answer.upper().replace(" ", "  ") + "\n")
        assert not q.check("") and not q.check(q.answer + " x") and not q.check("no idea")
        by_family.setdefault(q.family, []).append(q)
    for family, qs in by_family.items():
        if family != "point":
            assert all(q.check(p.answer) == (p.answer == q.answer) for q in qs[:50] for p in qs[:50])


def test_clicks_count_inside_the_box_only():
    box, size = (40, 80, 60, 120), (100, 200)
    q = Question("point", "click the red star.", "", "click(x=0.500, y=0.500)", (box,), "point", size)
    assert q.check("click(x=0.41, y=0.59)") and q.check("Click( x = .6 , y = 0.4 )")
    for x, y in ((0.39, 0.5), (0.61, 0.5), (0.5, 0.39), (0.5, 0.61)):
        assert not q.check(f"click(x={x}, y={y})")


@pytest.mark.parametrize(
    "text", ["", "click", "click(0.5, 0.5)", "click(x=0.5)", "click(x=nan, y=0.5)", "click(x=1.5, y=0.2)",
             "click(x=-0.1, y=0.2)", "click(x=0.5, y=0.5) click(x=0.1, y=0.1)", "click(x=50, y=50)"]
)  # fmt: skip
def test_malformed_clicks_are_no_points(text):
    assert parse_point(text) is None


def test_questions_on_one_scene_differ_and_respect_the_limit(scenes):
    for s in scenes[:60]:
        qs = questions(s, random.Random(3), ("where", "count", "read"), 5)
        assert len(qs) <= 5
        assert len({(q.family, q.targets, q.answer) for q in qs}) == len(qs)
        assert {q.family for q in qs} <= {"where", "count", "read"}


@pytest.mark.parametrize("family", OF_SCENES)
def test_made_questions_suit_their_family_and_repeat(family):
    for seed in range(12):
        s, q = make(family, seed, "report")
        again, same = make(family, seed, "report")
        assert q == same and s.image.tobytes() == again.image.tobytes()
        assert q.family == family and q.check(q.answer) and split_of(s.objects, s.number) == "report"
        if family in ("name", "where", "point"):
            (target,) = [o for o in s.objects if o.box == q.targets[0]]
            assert has_distractors(target, s.objects)
    for level in LEVELS:
        assert make(family, 1, "train", level)[1].family == family


@pytest.mark.parametrize("family", DRAWINGS)
def test_questions_about_drawings_are_of_their_family_and_repeat(family):
    keys = set()
    for seed in range(25):
        pictures, q = make(family, seed, "report")
        again, same = make(family, seed, "report")
        assert q == same and [i.tobytes() for i in pictures.images] == [i.tobytes() for i in again.images]
        assert q.chance_key.startswith(FAMILIES[family].key) and q.check(q.answer)
        assert FAMILIES[family].pictures == "several" or len(pictures.images) == 1
        keys.add(q.chance_key.rstrip(" 0123456789"))
    several = {"chart": 4, "compare": 3, "frames": 2, "tiny": 2, "needle": 2, "wide": 3}
    assert "read sum" not in keys and len(keys) >= several.get(family, 1)
    for level in LEVELS:
        assert make(family, 1, "train", level)[1].chance_key.startswith(FAMILIES[family].key)


def test_made_counts_are_balanced():
    answers = [make("count", seed)[1].answer for seed in range(120)]
    assert all(8 <= answers.count(n) <= 36 for n in "012345")


def test_majority_baseline_is_the_best_constant():
    def q(answer: str, key: str = "count") -> Question:
        return Question("count", "how many?", "", answer, (), key, (100, 100))

    train = [q("1"), q("1"), q("2"), q("3", "other")]
    assert majority_baseline(train, [q("1"), q("2"), q("1"), q("3", "other")]) == 0.75
    clicks = []
    for x in (20, 20, 20, 80):
        box = (x - 5, 40, x + 5, 60)
        clicks.append(Question("point", "", "", f"click(x=0.{x}0, y=0.500)", (box,), "point", (100, 100)))
    assert majority_baseline(clicks, clicks) == 0.75
    with pytest.raises(ValueError, match="give some of both"):
        majority_baseline(train, [])
    with pytest.raises(ValueError, match="choose among"):
        make("sing", 0)


def test_corpus_is_small_closed_and_lower_case():
    texts = corpus(200)
    assert len(texts) > 1000 and all(t == t.lower() for t in texts)
    assert len({w for t in texts for w in re.findall("[a-z]+", t)}) < 80
    assert set("".join(texts)) <= set("abcdefghijklmnopqrstuvwxyz0123456789 .,?()=")


def test_a_scene_may_be_larger_than_the_grain_of_its_paper():
    large = scene(1, "report", Level("beyond", size=(532, 672), objects=(3, 8), side=(28, 46), number_chance=0.0))
    assert min(large.size) >= 532 and len(large.objects) >= 3
    pixels = np.asarray(large.image)[-20:, -20:].reshape(-1, 3)  # the far corner has paper too, with its grain
    assert pixels.min() > 200 and len(np.unique(pixels)) > 2
