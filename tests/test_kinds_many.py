"""Kinds of pictures with many parts or extreme sizes: their answers are true of what is drawn, and splits share nothing."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import median

import numpy as np
import pytest
from PIL import Image

from workbench.study import scenes
from workbench.study.families import PLURALS, Question
from workbench.study.kinds import compare, frames, lines, needle, pictures, sheet, tiny, wide
from workbench.study.scenes import COLOURS, PALETTE, SHAPES, SPLITS, ZONES, Obj, content_key, split_of_content
from workbench.study.views import Album, View

KINDS = {"compare": compare, "frames": frames, "tiny": tiny, "needle": needle, "wide": wide}
LEVELS = ("first", "second", "third", "full")
Drawn = list[tuple[Album, list[Question]]]


@lru_cache(maxsize=32)
def drawn(kind: str, level: str = "full", split: str = "train", n: int = 50) -> Drawn:
    return [KINDS[kind].draw(seed, split, level) for seed in range(n)]


def asked(kind: str, key: str, level: str = "full") -> list[tuple[Album, Question]]:
    """Questions of the kind whose chance_key begins so; there must be some."""
    found = [(a, q) for a, qs in drawn(kind, level) for q in qs if q.chance_key.startswith(key)]
    assert found
    return found


def written(view: View) -> str:
    return "".join(character for character, _ in view.glyphs)


def named(text: str) -> list[tuple[str, str]]:
    """Every "colour shape" in a text."""
    return re.findall(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)


def number_in(text: str) -> int:
    """The one number that a text holds."""
    (number,) = re.findall(r"\d+", text)
    return int(number)


# ---- all kinds


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_and_split_gives_distinct_questions_in_plain_words(kind):
    for level in LEVELS:
        for split in SPLITS:
            for album, questions in drawn(kind, level, split):
                assert 2 <= len(questions) <= (12 if kind == "needle" else 7)
                assert len({(q.text, q.answer) for q in questions}) == len(questions)
                for q in questions:
                    assert q.family == kind and q.check(q.answer) and not q.check("no idea")
                    assert set(q.text + q.thought + q.answer) <= set("abcdefghijklmnopqrstuvwxyz0123456789 .,?:")
                    place = r"(\d )?" if kind == "wide" else ""
                    assert not q.thought or re.search(rf", so {place}{re.escape(q.answer)}$", q.thought)
                    assert q.size in [view.size for view in album.views]


@pytest.mark.parametrize("kind", KINDS)
def test_things_are_drawn_where_and_in_the_colour_that_is_recorded(kind):
    for album, _ in drawn(kind)[:25]:
        for view in album.views:
            pixels = np.asarray(view.image).astype(float)
            ink = abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).max(2) > 25
            for o in view.objects:
                x, y = (int(c) for c in o.centre)
                assert min(COLOURS, key=lambda c: abs(pixels[y, x] - np.array(PALETTE[c])).sum()) == o.colour
            for x0, y0, x1, y1 in [o.box for o in view.objects] + [box for _, box in view.glyphs]:
                assert 0 <= x0 and 0 <= y0 and x1 <= view.size[0] and y1 <= view.size[1]
                inside = ink[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
                assert inside.any()  # and boxes do not overlap: an earlier one would have cleared it
                inside[...] = False
            assert not ink.any()


@pytest.mark.parametrize("kind", KINDS)
def test_things_keep_apart(kind):
    for album, _ in drawn(kind):
        for view in album.views:
            boxes = [o.box for o in view.objects]
            for i, (a0, b0, a1, b1) in enumerate(boxes):
                for c0, d0, c1, d1 in boxes[:i] + [box for _, box in view.glyphs]:
                    assert max(c0 - a1, a0 - c1, d0 - b1, b0 - d1) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_pixels_and_another_seed_does_not(kind):
    for level in ("first", "full"):
        one, questions = KINDS[kind].draw(3, "choose", level)
        two, same = KINDS[kind].draw(3, "choose", level)
        assert questions == same and [i.tobytes() for i in one.images] == [i.tobytes() for i in two.images]
        assert [i.tobytes() for i in KINDS[kind].draw(4, "choose", level)[0].images] != [i.tobytes() for i in one.images]


def shown_content(kind: str, album: Album, questions: list[Question]) -> str:
    """What decides the split, read off the finished pictures and questions."""
    if kind in ("compare", "frames"):
        return "#".join(content_key(view.objects, "") for view in album.views)
    view = album.views[0]
    if kind == "tiny":
        return content_key(view.objects, written(view)) + "|" + questions[0].answer
    if kind == "wide":
        lies = view.size[0] > view.size[1]
        return f"{'lying' if lies else 'standing'} " + ";".join(o.name for o in in_a_row(view))
    lines = re.findall(r"(\w+ \w+) (\d+)\. ", questions[0].text)
    if lines:
        return f"{tuple(name for name, _ in lines)}{tuple(int(number) for _, number in lines)}"
    names = tuple(view.objects[0].name for view in album.views)
    return f"{names}{tuple(int(written(view)) for view in album.views)}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_decides_the_split(kind):
    for level in ("first", "full"):
        for split in SPLITS:
            for album, questions in drawn(kind, level, split):
                assert split_of_content(shown_content(kind, album, questions)) == split


def test_contents_are_split_as_scenes_are():
    splits = [split_of_content(content_key((), str(n))) for n in range(400)]
    assert splits == [scenes.split_of((), str(n)) for n in range(400)] and set(splits) == set(SPLITS)


@pytest.mark.parametrize("kind", KINDS)
def test_things_come_in_reading_order(kind):
    for album, _ in drawn(kind):
        for view in album.views:
            places = [(ZONES.index(o.zone), o.centre[0]) for o in view.objects]
            assert places == sorted(places)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_levels_and_splits_are_refused_with_the_choices(kind):
    with pytest.raises(ValueError, match="choose one of first, second, third, full"):
        KINDS[kind].draw(0, "train", "huge")
    with pytest.raises(ValueError, match="choose one of train, choose, report"):
        KINDS[kind].draw(0, "test", "full")


# ---- compare


def counted(album: Album, text: str) -> list[int]:
    """How many of what the text names each picture holds."""
    singular = {plural: shape for shape, plural in PLURALS.items()}
    words = re.findall("[a-z]+", text)
    colour = next((w for w in words if w in COLOURS), None)
    shape = next((singular[w] for w in words if w in singular), None)
    assert colour or shape
    return [sum(colour in (None, o.colour) and shape in (None, o.shape) for o in v.objects) for v in album.views]


def in_reading_order(objects: Iterable[Obj]) -> str:
    ordered = sorted(objects, key=lambda o: (ZONES.index(o.zone), o.centre))
    return ", ".join(f"{o.name} {o.zone}" for o in ordered)


def counting(album: Album, text: str, pictures: Iterable[int]) -> str:
    """The thought that counts in these pictures: each thing that the text names, in reading order, then their number."""
    steps = []
    for k in pictures:
        view = album.views[k]
        of = [o for o in view.objects if counted(Album((View(view.image, (o,)),), 0), text) == [1]]
        steps.append(f"picture {k + 1}: {in_reading_order(of) or 'none'}, so {len(of)}")
    return ", ".join(steps)


@pytest.mark.parametrize("level", LEVELS)
def test_the_picture_with_the_most_or_fewest_is_the_only_one(level):
    for album, q in asked("compare", "compare most", level):
        counts = counted(album, q.text)
        best = max(counts) if " more " in q.text or " most " in q.text else min(counts)
        assert [k + 1 for k, n in enumerate(counts) if n == best] == [number_in(q.answer)]
        assert q.thought == f"{counting(album, q.text, range(len(counts)))}, so {q.answer}"
        assert len(q.targets) == counts[number_in(q.answer) - 1]
        assert (" more " in q.text or " fewer " in q.text) == (len(counts) == 2)


@pytest.mark.parametrize("level", LEVELS)
def test_of_two_pictures_the_one_with_more_or_fewer_is_named(level):
    for album, q in asked("compare", "compare pair", level):
        counts = counted(album, q.text)
        i, j = (int(n) for n in re.findall(r"picture (\d)", q.text))
        best = (max if " more " in q.text else min)((i, j), key=lambda k: counts[k - 1])
        assert counts[i - 1] != counts[j - 1] and q.answer == f"picture {best}"
        assert q.thought == f"{counting(album, q.text, (i - 1, j - 1))}, so {q.answer}"


@pytest.mark.parametrize("level", LEVELS)
def test_one_picture_holds_the_thing_and_others_its_colour_and_its_shape(level):
    for album, q in asked("compare", "compare find", level):
        ((colour, shape),) = named(q.text)
        held = [[(o.colour, o.shape) for o in view.objects] for view in album.views]
        assert sum(pairs.count((colour, shape)) for pairs in held) == 1
        at = number_in(q.answer) - 1
        elsewhere = [pair for k, pairs in enumerate(held) if k != at for pair in pairs]
        assert (colour, shape) in held[at]
        assert colour in [c for c, _ in elsewhere] and shape in [s for _, s in elsewhere]
        assert q.targets[0] in [o.box for o in album.views[at].objects] and q.size == album.views[at].size
        looked = [f"picture {k + 1} {'yes' if (colour, shape) in pairs else 'no'}" for k, pairs in enumerate(held)]
        assert q.thought == f"{', '.join(looked)}, so {q.answer}"


def test_a_list_of_one_picture_names_everything_in_it_and_is_not_counted_as_a_comparison():
    for album, q in asked("compare", "list"):
        view = album.views[number_in(q.text) - 1]
        assert q.answer == (in_reading_order(view.objects) or "nothing")
        assert set(q.targets) == {o.box for o in view.objects}


def test_pictures_to_compare_differ_in_size_and_no_place_is_favoured():
    pictures = [len(album.views) for album, _ in drawn("compare")]
    assert set(pictures) == {2, 3, 4}
    assert all(84 <= side <= 140 for album, _ in drawn("compare") for v in album.views for side in v.size)
    answers = Counter(q.answer for seed in range(300) for q in compare.draw(seed)[1] if q.chance_key.endswith("3"))
    assert all(0.26 < answers[f"picture {k}"] / sum(answers.values()) < 0.41 for k in (1, 2, 3))


# ---- frames


def seen(album: Album, text: str) -> list[Obj | None]:
    """The one thing that the text names, in every frame."""
    ((colour, shape),) = named(text)
    found = [[o for o in view.objects if (o.colour, o.shape) == (colour, shape)] for view in album.views]
    assert all(len(things) < 2 for things in found)
    return [things[0] if things else None for things in found]


@pytest.mark.parametrize("level", LEVELS)
def test_the_thing_moves_evenly_the_way_that_is_answered(level):
    for album, q in asked("frames", "frames way", level):
        track = [o for o in seen(album, q.text) if o is not None]
        assert len(track) == len(album.views)
        centres = np.array([o.centre for o in track])
        (step,) = {tuple(step) for step in np.diff(centres, axis=0)}
        along = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[q.answer]
        length = np.dot(step, along)
        assert length >= 8 and np.allclose(step, length * np.array(along))
        assert q.thought == ", ".join(f"frame {k + 1} {o.zone}" for k, o in enumerate(track)) + f", so {q.answer}"
        assert track[0].zone != track[-1].zone and q.targets == (track[-1].box,)


@pytest.mark.parametrize(("key", "here"), [("frames once", 1), ("frames turn", 1), ("frames missing", 0)])
def test_the_frame_of_the_answer_is_the_only_one_of_its_sort(key, here):
    for level in LEVELS:
        for album, q in asked("frames", key, level):
            text = re.sub(f"({'|'.join(SHAPES)}) ({'|'.join(COLOURS)})", r"\2 \1", q.text)  # "the star blue"
            shown = [int(o is not None) for o in seen(album, text)]
            assert [k + 1 for k, there in enumerate(shown) if there == here] == [number_in(q.answer)]
            if key == "frames missing":
                listed = ", ".join(f"frame {k + 1} {('no', 'yes')[there]}" for k, there in enumerate(shown))
                assert q.thought == f"{listed}, so {q.answer}"
            if key == "frames turn":
                ((_, shape),) = named(text)
                assert all([o.shape for o in view.objects].count(shape) == 1 for view in album.views)


def test_a_thing_appears_once_and_stays():
    for album, q in asked("frames", "frames appear"):
        shown = [o is not None for o in seen(album, q.text)]
        at = number_in(q.answer) - 1
        assert shown == [k >= at for k in range(len(shown))] and at > 0 and len(shown) > 2


def test_frames_are_numbered_and_share_their_ground():
    for album, _ in drawn("frames"):
        assert [written(view) for view in album.views] == [str(k + 1) for k in range(len(album.views))]
        first = np.asarray(album.image).astype(int)
        for view in album.views:
            same = (np.asarray(view.image) == first).all(2)
            for x0, y0, x1, y1 in [t.box for v in (view, album.views[0]) for t in v.objects] + [
                box for v in (view, album.views[0]) for _, box in v.glyphs
            ]:
                same[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
            assert same.all()


def test_all_ways_and_frames_are_answers():
    questions = [q for seed in range(400) for q in frames.draw(seed)[1]]
    ways = Counter(q.answer for q in questions if q.chance_key == "frames way")
    assert all(0.18 < ways[way] / sum(ways.values()) < 0.32 for way in ("left", "right", "up", "down"))
    turns = {q.answer for q in questions if q.chance_key.startswith("frames turn")}
    assert turns == {f"frame {k}" for k in range(1, 6)}


# ---- tiny


@pytest.mark.parametrize("level", LEVELS)
def test_the_tiny_thing_is_the_smallest_by_far_and_needs_colour_and_shape(level):
    for album, questions in drawn("tiny", level):
        (view,) = album.views
        target, *others = sorted(view.objects, key=lambda o: o.box[2] - o.box[0])
        assert 10 <= target.box[2] - target.box[0] < 15 and 2 <= len(others) <= 4
        assert all(30 <= o.box[2] - o.box[0] <= 46 for o in others)
        assert any(o.colour == target.colour for o in others) and any(o.shape == target.shape for o in others)
        assert all((o.colour, o.shape) != (target.colour, target.shape) for o in others)
        assert questions[0].answer == f"{target.colour} {target.shape}" and questions[0].targets == (target.box,)
        assert questions[1].answer == target.shape
        assert [q.answer for q in questions[2:]] == ([written(view)] if view.glyphs else [])


def test_full_tiny_pictures_are_large_and_never_too_large():
    sides = [side for album, _ in drawn("tiny") for side in album.size]
    assert min(sides) >= 336 and max(sides) <= 504


def test_tiny_shapes_differ_at_native_size():
    """Nearest of a few examples, by ink alone: the shapes can be told apart without any learning."""
    looks: list[tuple[str, np.ndarray]] = []
    for seed in range(260):
        (view,) = tiny.draw(seed)[0].views
        target = min(view.objects, key=lambda o: o.box[2] - o.box[0])
        x, y = (int(c) for c in target.centre)
        pixels = np.asarray(view.image.crop((x - 8, y - 8, x + 9, y + 9))).astype(float)
        look = abs(pixels - np.array(view.image.getpixel((0, 0)))).sum(2)  # the corner is always bare
        looks.append((target.shape, look / look.max()))
    known, unknown = looks[:200], looks[200:]
    right = [min(known, key=lambda k: ((k[1] - look) ** 2).sum())[0] == shape for shape, look in unknown]
    assert np.mean(right) > 0.95


def test_shrinking_scales_pictures_and_boxes_alike():
    album, _ = tiny.draw(1)
    half = tiny.shrunk(album, 0.5)
    for big, small in zip(album.views, half.views, strict=True):
        assert np.allclose(small.size, np.array(big.size) / 2, atol=0.5)
        for o, p in zip(big.objects, small.objects, strict=True):
            assert o.name == p.name and np.allclose(np.array(p.box), np.array(o.box) / 2, atol=0.6)
        assert [c for c, _ in small.glyphs] == [c for c, _ in big.glyphs]
        (o,) = [o for o in small.objects if o.box[2] - o.box[0] < 7.5]
        x, y = (int(c) for c in o.centre)
        seen_colour = np.asarray(small.image)[y, x].astype(float)
        assert min(COLOURS, key=lambda c: abs(seen_colour - np.array(PALETTE[c])).sum()) == o.colour
    assert tiny.shrunk(album, 1).image.tobytes() == album.image.tobytes()
    for factor in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            tiny.shrunk(album, factor)


def test_shrinking_averages_and_does_not_sample():
    """A board of black and white pixels turns grey."""
    board = np.indices((64, 96)).sum(0) % 2 * 255
    picture = Image.fromarray(np.repeat(board[..., None], 3, axis=2).astype(np.uint8))
    for factor in (0.5, 0.25):
        grey = np.asarray(tiny.shrunk(Album((View(picture),), 0), factor).image)[2:-2, 2:-2]
        assert abs(grey.astype(float) - 127.5).max() < 8


# ---- needle


def square_of(name: str, names: list[str]) -> bool:
    """Whether names hold one thing of the needle's colour, one of its shape, and the one that completes the square."""
    colour, shape = name.split()
    colours = {c for c, s in (other.split() for other in names) if s == shape and c != colour}
    shapes = {s for c, s in (other.split() for other in names) if c == colour and s != shape}
    return any(f"{c} {s}" in names for c in colours for s in shapes)


@pytest.mark.parametrize("level", LEVELS)
def test_one_numbered_picture_holds_the_needle(level):
    for album, q in asked("needle", "needle picture", level):
        name = named_in(q.text)
        held = [o.name for view in album.views for o in view.objects]
        assert len(held) == len(album.views) and held.count(name) == 1 and square_of(name, held)
        assert held.index(name) + 1 == number_in(q.answer)
        assert [written(view) for view in album.views] == [str(k + 1) for k in range(len(held))]
        assert q.targets == (album.views[number_in(q.answer) - 1].objects[0].box,)
    for album, q in asked("needle", "needle thing in picture", level):
        assert q.answer == album.views[number_in(q.text) - 1].objects[0].name


@pytest.mark.parametrize("level", LEVELS)
def test_one_line_holds_the_needle(level):
    for key in ("needle number", "needle thing in line"):
        for album, q in asked("needle", key, level):
            assert len(album.views) == 1 and not album.views[0].glyphs and q.targets == ()
            *lines, question = q.text.split(". ") if q.text.endswith("?") else re.split(r"(?<=\d)\. ", q.text)
            pairs = [line.rsplit(" ", 1) for line in lines]
            names, numbers = [name for name, _ in pairs], [number for _, number in pairs]
            name, number = (q.answer, str(number_in(question))) if "line" in key else (named_in(question), q.answer)
            assert names.count(name) == 1 and numbers.count(number) == 1
            assert names.index(name) == numbers.index(number) and square_of(name, names)
            assert album.views[0].objects[0].name != name


@pytest.mark.parametrize("level", LEVELS)
def test_other_straws_are_asked_for_too_and_can_be_told_apart(level):
    for album, q in asked("needle", "hay", level):
        if len(album.views) > 1:
            straws = [(view.objects[0].name, f"picture {k}") for k, view in enumerate(album.views, 1)]
            wanted = f"picture {number_in(q.text)}" if re.search(r"\d", q.text) else named_in(q.text)
        else:
            straws = re.findall(r"(\w+ \w+) (\d+)\. ", q.text)
            question = re.sub(r"\w+ \w+ \d+\. ", "", q.text)
            wanted = str(number_in(question)) if re.search(r"\d", question) else named_in(question)
        (found,) = [straw for straw in straws if wanted in straw]
        assert q.answer == found[1 - found.index(wanted)]


@pytest.mark.parametrize("variant", needle.VARIANTS)
@pytest.mark.parametrize(("length", "most"), [(4, 0.4), (15, 0.3), (60, 0.15)])
def test_no_guess_from_the_names_alone_finds_the_needle(variant, length, most):
    """What stands in the hay does not give away what is asked: the commonest colour and shape, the rarest name."""
    commonest = rarest = 0
    for seed in range(100):
        album, (_, q, *_) = needle.draw(seed, "report", "full", length=length, variant=variant)
        names = re.findall(r"(\w+ \w+) \d+\. ", q.text) or [view.objects[0].name for view in album.views]
        assert len(names) == length
        words = zip(*(name.split() for name in names), strict=True)
        commonest += q.check(" ".join(Counter(column).most_common(1)[0][0] for column in words))
        rarest += q.check(min(Counter(sorted(names)).items(), key=lambda item: item[1])[0])
    assert commonest <= 100 * most and rarest <= 100 * most


def named_in(text: str) -> str:
    ((colour, shape),) = named(text)
    return f"{colour} {shape}"


@pytest.mark.parametrize("variant", needle.VARIANTS)
def test_length_and_depth_are_what_was_asked_for(variant):
    for length in (needle.SHORTEST, 20, needle.LONGEST[variant]):
        for depth in (0.0, 0.5, 1.0):
            album, questions = needle.draw(5, "report", "full", length=length, depth=depth, variant=variant)
            if variant == "pictures":
                n, at = len(album.views), number_in(questions[0].answer) - 1
            else:
                lines = re.findall(r"(\w+ \w+) (\d+)\. ", questions[0].text)
                n, at = len(lines), [number for _, number in lines].index(questions[0].answer)
            assert n == length and at == {0.0: 0, 0.5: length // 2, 1.0: length - 1}[depth]


def test_levels_lengthen_the_context_and_depth_is_uniform():
    lengths = {}
    for level in LEVELS:
        albums = [needle.draw(seed, "train", level, variant="pictures")[0] for seed in range(20)]
        lengths[level] = max(len(album.views) for album in albums)
    assert lengths["first"] <= 6 and lengths["first"] < lengths["second"] < lengths["third"] < lengths["full"] <= 60
    depths = []
    for seed in range(300):
        _, (q, *_) = needle.draw(seed, length=100, variant="lines")
        depths.append(re.findall(r"\w+ \w+ (\d+)\. ", q.text).index(q.answer))
    assert np.histogram(depths, bins=4, range=(0, 100))[0].min() > 50


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"length": 3}, "choose 4 to 60 for pictures"),
        ({"length": 61}, "choose 4 to 60 for pictures"),
        ({"depth": 1.1}, "choose 0"),
        ({"variant": "films"}, "choose one of pictures, lines"),
    ],
)
def test_impossible_needles_are_refused_with_the_remedy(wrong, remedy):
    with pytest.raises(ValueError, match=remedy):
        needle.draw(0, **{"variant": "pictures", **wrong})


def test_thoughts_say_the_whole_straw_beginning_with_what_is_asked_for():
    for album, q in asked("needle", ""):
        hay = [f"{view.objects[0].name} picture {written(view)}" for view in album.views]
        hay = hay if len(hay) > 1 else re.findall(r"(\w+ \w+ \d+)\.", q.text)
        said, so = q.thought.rsplit(", so ", 1)
        asks, words = re.split(r"\d\. ", q.text)[-1], said.split()
        first = " ".join(words[:2]) if words[0] in COLOURS or words[0] == "picture" else words[0]
        turned = said if words[0] in COLOURS else " ".join([*words[-2:], *words[:-2]])
        assert turned in hay and first in asks and q.answer not in asks
        assert so == q.answer


def test_short_hays_are_of_lines_alone_at_every_level():
    lengths = set()
    for level in LEVELS:
        for seed in range(30):
            album, questions = lines.draw(seed, "train", level)
            assert len(album.views) == 1 and len(questions) > 4 and {q.family for q in questions} == {"needle"}
            lengths.add(len(re.findall(r"\d+\. ", questions[0].text)))
    assert min(lengths) == needle.SHORTEST and max(lengths) == lines.LONGEST
    with pytest.raises(ValueError, match="choose one of train, choose, report"):
        lines.draw(0, "test")


def test_hays_of_pictures_are_mostly_short_and_numbered_from_anywhere():
    lengths, numbers = [], set()
    for level in LEVELS:
        for seed in range(30):
            album, questions = pictures.draw(seed, "train", level)
            shown = [number_in(written(view)) for view in album.views]
            assert shown == list(range(shown[0], shown[0] + len(shown)))
            for q in questions:  # the answer is the number that is printed, or the thing beside it
                number = number_in(q.answer if q.answer.startswith("picture") else q.text)
                assert " ".join(named(q.thought)[0]) == album.views[number - shown[0]].objects[0].name
            numbers |= set(shown)
            assert len(questions) > 4 and {q.family for q in questions} == {"needle"}
            lengths.append(len(album.views))
    assert min(lengths) == needle.SHORTEST and max(lengths) > 50 and median(lengths) < 20
    assert numbers == set(range(1, needle.LONGEST["pictures"] + 1))


# ---- sheets of small print


@pytest.mark.parametrize("split", SPLITS)
def test_a_visual_token_of_a_sheet_holds_one_text_in_small_print(split):
    seen = 0
    for seed in range(60):
        album, questions = sheet.draw(seed, split)
        (view,) = album.views
        assert questions == [] and sheet.draw(seed, split)[0].image.tobytes() == album.image.tobytes()
        cells: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for _, (x0, y0, x1, y1) in view.glyphs:
            assert 3 <= x0 and x1 <= view.size[0] - 3 and 3 <= y0 and y1 <= view.size[1] - 3 and y1 - y0 <= 17
            cells.setdefault((int((y0 + y1) / 2 // 28), int((x0 + x1) / 2 // 28)), []).append((x0, y1))
        for row in cells.values():  # left to right, and never one line above another
            assert row == sorted(row) and max(y for _, y in row) - min(y for _, y in row) <= 6
        seen += len(view.glyphs)
    assert seen > 60 * 15
    with pytest.raises(ValueError, match="choose one of train, choose, report"):
        sheet.draw(0, "test")


def test_a_word_on_a_sheet_belongs_to_its_split():
    rng = random.Random(0)
    for split in SPLITS:
        words = [text.lower() for text in (sheet.a_text(rng, split) for _ in range(200)) if text.isupper()]
        assert len(words) > 20 and all(split_of_content(word) == split for word in words)


# ---- wide


def in_a_row(view: View) -> list[Obj]:
    axis = 0 if view.size[0] > view.size[1] else 1
    return sorted(view.objects, key=lambda o: o.box[axis])


def test_full_strips_are_ten_to_one_both_ways_and_stay_small():
    shapes = set()
    for album, _ in drawn("wide"):
        width, height = album.size
        assert max(album.size) == 10 * min(album.size) and 56 <= min(album.size) <= 84
        assert -(-width // 28) * -(-height // 28) <= 90
        shapes.add(width > height)
    assert shapes == {True, False}


def counted_off(row: Sequence[Obj], size: tuple[int, int]) -> str:
    """Each with its number and how far along the strip its middle is, in hundredths."""
    axis = 0 if size[0] > size[1] else 1
    along = [(o.box[axis] + o.box[axis + 2]) / 2 / size[axis] for o in row]
    return ", ".join(f"{k + 1} {o.name} {int(100 * at):02d}" for k, (o, at) in enumerate(zip(row, along, strict=True)))


@pytest.mark.parametrize("level", LEVELS)
def test_neighbours_in_the_strip_are_adjacent(level):
    for album, q in asked("wide", "wide next", level):
        row = in_a_row(album.views[0])
        names = [o.name for o in row]
        name = named_in(q.text)
        (way,) = [w for w in ("left of", "right of", "above", "below") if f" {w} " in q.text]
        assert (way in ("left of", "right of")) == (album.size[0] > album.size[1])
        assert names.count(name) == 1
        colour, shape = name.split()
        assert any(o.colour == colour and o.shape != shape for o in row)
        assert any(o.shape == shape and o.colour != colour for o in row)
        at = names.index(name) + (-1 if way in ("left of", "above") else 1)
        assert q.answer == (names[at] if 0 <= at < len(names) else "nothing")
        upto = max(names.index(name), min(at, len(names) - 1)) + 1
        so = q.answer if q.answer == "nothing" else f"{at + 1} {q.answer}"
        assert q.thought == f"{counted_off(row[:upto], album.size)}, so {so}"


@pytest.mark.parametrize("level", LEVELS)
def test_ends_and_ordinals_count_from_the_right_side(level):
    for key in ("wide end", "wide order"):
        for album, q in asked("wide", key, level):
            row = in_a_row(album.views[0])
            words = re.findall("[a-z]+", q.text)
            (side,) = [w for w in words if w in ("left", "right", "top", "bottom")]
            assert (side in ("left", "right")) == (album.size[0] > album.size[1])
            k = 0 if key == "wide end" else ["second", "third", "fourth"].index(*set(words) & {"second", "third", "fourth"}) + 1
            from_end = side in ("right", "bottom")
            o = row[-1 - k] if from_end else row[k]
            assert q.answer == o.name and q.targets == (o.box,)
            listed = counted_off(row if from_end else row[: k + 1], album.size)
            so = f"{len(row) - k if from_end else k + 1} {q.answer}"
            assert q.thought == ("" if key == "wide end" else f"{listed}, so {so}")


def test_nothing_is_a_rare_answer():
    answers = [q.answer for seed in range(200) for q in wide.draw(seed)[1] if q.chance_key == "wide next"]
    assert 0.02 < answers.count("nothing") / len(answers) < 0.2

