"""Charts, sums, words and windows: what is asked is what is drawn, and splits share nothing."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from workbench.study.families import Question, parse_point
from workbench.study.kinds import chart, sums, window, words
from workbench.study.kinds.written import LEVELS
from workbench.study.scenes import COLOURS, PALETTE, SPLITS, ZONES, split_of_content
from workbench.study.views import Album

MODULES = (chart, sums, words, window)
Drawn = list[tuple[Album, list[Question]]]


@pytest.fixture(scope="module")
def drawn() -> dict[str, Drawn]:
    """Some pictures of every module, of all levels and splits."""
    return {
        module.__name__.split(".")[-1]: [
            module.draw(seed, split, level) for level in LEVELS for split in SPLITS for seed in range(12)
        ]
        for module in MODULES
    }


def pixels(album: Album) -> np.ndarray:
    return np.asarray(album.image).astype(float)


def word_of(album: Album) -> str:
    return "".join(character for character, _ in album.views[0].glyphs)


# ---- all four


@pytest.mark.parametrize("module", MODULES)
def test_every_level_and_split_gives_questions_for_fifty_seeds(module):
    for level in LEVELS:
        for split in SPLITS:
            for seed in range(50):
                album, asked = module.draw(seed, split, level)
                assert 1 <= len(asked) <= 6 and len(album.views) == 1 and album.seed == seed
                assert len({(q.family, q.text) for q in asked}) == len(asked)
                for q in asked:
                    assert q.check(q.answer) and q.size == album.size and q.targets
                    for x0, y0, x1, y1 in q.targets:
                        assert 0 <= x0 < x1 <= album.size[0] and 0 <= y0 < y1 <= album.size[1]


@pytest.mark.parametrize("module", MODULES)
def test_same_arguments_give_the_same_pixels_and_questions_and_others_do_not(module):
    for seed in range(5):
        (one, asked), (two, again) = module.draw(seed, "choose", "third"), module.draw(seed, "choose", "third")
        assert one.image.tobytes() == two.image.tobytes() and one.views[0].glyphs == two.views[0].glyphs
        assert asked == again
        assert module.draw(seed + 1, "choose", "third")[0].image.tobytes() != one.image.tobytes()
        assert module.draw(seed, "train", "third")[0].image.tobytes() != one.image.tobytes()


def _content(module, seed: int, split: str) -> str:
    """What a picture shows, told by its print and its answers alone."""
    album, asked = module.draw(seed, split, "first")
    if module is sums:
        return "+".join(sorted(word_of(album).split("+"))) if "+" in word_of(album) else ""
    if module is words:
        return word_of(album)
    if module is chart:
        return next((q.thought.split(", so")[0] for q in asked if "so" in q.thought), "")
    return ";".join(sorted(f"{b.colour} {b.label}" for b in window.buttons(seed, split, "first")))


@pytest.mark.parametrize("module", MODULES)
def test_splits_share_no_content(module):
    """On the smallest level, where contents would soonest meet: any two splits drawn alike do share some."""
    found = {
        split: {_content(module, seed, split) for seed in range(n)} - {""}
        for split, n in (("train", 500), ("choose", 100), ("report", 100))
    }
    assert all(len(contents) > 20 for contents in found.values())
    assert not found["train"] & found["choose"]
    assert not found["train"] & found["report"]
    assert not found["choose"] & found["report"]


def test_a_sixteenth_of_the_contents_each_is_kept_for_choosing_and_for_the_report():
    shares = Counter(split_of_content(sums.sum_key(n, 17)) for n in range(100, 16_100))
    assert shares["report"] == pytest.approx(1000, abs=150) and shares["choose"] == pytest.approx(1000, abs=150)
    assert sums.sum_key(348, 75) == sums.sum_key(75, 348)


@pytest.mark.parametrize("module", MODULES)
def test_unknown_names_are_refused_with_the_choices(module):
    with pytest.raises(ValueError, match="choose one of train"):
        module.draw(0, "test")
    with pytest.raises(ValueError, match="choose one of first"):
        module.draw(0, "train", "tiny")


def test_all_words_are_lower_case_and_few(drawn):
    texts = [t for pairs in drawn.values() for _, asked in pairs for q in asked for t in (q.text, q.thought, q.answer)]
    assert set("".join(texts)) <= set("abcdefghijklmnopqrstuvwxyz0123456789 .,?:()+-=")
    asked_words = {w for pairs in drawn.values() for _, asked in pairs for q in asked for w in re.findall("[a-z]+", q.text)}
    assert len(asked_words) < 75


def _templates() -> dict[tuple[int, int], list[tuple[str, np.ndarray]]]:
    """Every capital and digit in every size, drawn by Pillow, by the (height, width) of its ink."""
    found: dict[tuple[int, int], list[tuple[str, np.ndarray]]] = {}
    for size in range(10, 35):
        for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+":
            image = Image.new("L", (60, 60))
            ImageDraw.Draw(image).text((10, 10), character, fill=255, font=ImageFont.load_default(size))
            look = np.asarray(image).astype(float)
            look[look < 8] = 0
            rows, columns = np.flatnonzero(look.any(1)), np.flatnonzero(look.any(0))
            look = look[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            found.setdefault(look.shape, []).append((character, look))
    return found


def test_every_printed_character_is_the_recorded_one(drawn):
    """Looked up among Pillow's own capitals and digits at the recorded box, dark on light or light on dark."""
    templates = _templates()
    for name, pairs in drawn.items():
        for album, _ in pairs[::8]:
            gray = pixels(album).mean(2)
            for character, (x0, y0, x1, y1) in album.views[0].glyphs:
                look = gray[int(y0) : int(y1), int(x0) : int(x1)]
                off = {
                    c: min(np.abs(_scaled(sign * look) - _scaled(t)).mean() for sign in (1, -1))
                    for c, t in templates[look.shape]
                }
                assert off[character] <= min(off.values()) + 0.02, (name, character)


def _scaled(look: np.ndarray) -> np.ndarray:
    low, high = look.min(), look.max()
    return (look - low) / max(1.0, high - low)


# ---- charts


def _values(album: Album, asked: list[Question]) -> dict[str, int]:
    """Colour -> value of all bars, left to right, read from the pixels: bars by hue, values by the grid lines."""
    image = pixels(album)
    vivid = image.max(2) - image.min(2) > 90
    axis = max(range(image.shape[0]), key=lambda y: (image[y].max(1) < 80).sum())
    last = np.flatnonzero(image[axis].max(1) < 80)[-1]
    lines = [y for y in range(axis) if image[y, last].max() < 222]
    values = {}
    columns = np.flatnonzero(vivid[:axis].sum(0) > 3)
    for run in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
        x = int(run[len(run) // 2])
        top = np.flatnonzero(vivid[:, x])[0]
        colour = min(COLOURS, key=lambda c: np.abs(image[axis - 3, x] - PALETTE[c]).sum())
        values[colour] = sum(y >= top - 1 for y in lines)
    return values


def test_chart_answers_follow_from_the_pixels(drawn):
    seen = Counter()
    for album, asked in drawn["chart"]:
        values = _values(album, asked)
        for q in asked:
            named = [w for w in re.findall("[a-z]+", q.text) if w in COLOURS]
            seen[q.chance_key] += 1
            if q.chance_key == "chart value":
                assert q.answer == str(values[named[0]]) and q.thought == ""
            elif q.chance_key == "chart difference":
                a, b = (values[colour] for colour in named)
                assert a > b and q.answer == str(a - b)
                assert q.thought == f"{named[0]} {a}, {named[1]} {b}, {a}-{b}={a - b}"
            else:
                extreme = (max if "largest" in q.text else min)(values.values())
                assert [c for c, v in values.items() if v == extreme] == [q.answer]
                assert q.thought == ", ".join(f"{c} {v}" for c, v in values.items()) + f", so {q.answer}"
    assert len(seen) == 4 and min(seen.values()) > 50


def test_chart_boxes_are_the_bars(drawn):
    for album, asked in drawn["chart"]:
        image = pixels(album)
        for q in asked:
            colour = q.answer if q.answer in COLOURS else next(w for w in re.findall("[a-z]+", q.text) if w in COLOURS)
            x0, y0, x1, y1 = (int(v) for v in q.targets[0])
            off = np.abs(image - PALETTE[colour]).max(2)
            assert (off[y0 + 1 : y1, x0 + 1 : x1 - 1] <= 11).all()
            assert (off[y0 - 1, x0:x1] > 40).all() and (off[y1, x0:x1] > 20).all()
            assert (off[y0:y1, x0 - 1] > 40).all() and (off[y0:y1, x1] > 40).all()


def test_full_charts_have_two_to_five_bars_of_all_values():
    values = [_values(*chart.draw(seed)) for seed in range(60)]
    assert {len(v) for v in values} == {2, 3, 4, 5}
    assert {n for v in values for n in v.values()} == set(range(1, 10))


# ---- sums


@given(st.integers(0, 999), st.integers(0, 999))
def test_every_carry_of_the_thought_is_right(a, b):
    found = re.fullmatch(rf"{a}\+{b}, (\d{{3}})\+(\d{{3}}): (.*), so (\d+)", sums.steps(a, b))
    assert found and int(found[1]) == a and int(found[2]) == b and int(found[4]) == a + b
    columns = [re.fullmatch(r"(\d)\+(\d)\+([01])=([01])(\d)", part) for part in found[3].split(", ")]
    assert len(columns) == 3
    for place, column in enumerate(columns):
        assert column is not None
        x, y, carried, carry, stays = (int(digit) for digit in column.groups())
        power = 10**place
        assert x == a // power % 10 and y == b // power % 10
        assert carried == (a % power + b % power >= power)
        assert carry == (a % (10 * power) + b % (10 * power) >= 10 * power)
        assert stays == (a + b) // power % 10


def test_a_sum_with_carries_reads_as_documented():
    assert sums.steps(348, 75) == "348+75, 348+075: 8+5+0=13, 4+7+1=12, 3+0+1=04, so 423"
    assert sums.steps(999, 1) == "999+1, 999+001: 9+1+0=10, 9+0+1=10, 9+0+1=10, so 1000"


def test_sums_add_the_printed_numbers_and_their_boxes_hold_all_ink(drawn):
    signs = Counter()
    for album, asked in drawn["sums"]:
        total, first, second = asked
        printed = "".join(c for c in word_of(album) if c != "+")
        assert printed == first.answer + second.answer and "first" in first.text and "second" in second.text
        a, b = int(first.answer), int(second.answer)
        assert total.answer == str(a + b) and total.thought == sums.steps(a, b)
        assert (total.family, first.family, total.chance_key, first.chance_key) == ("sum", "read", "sum", "read sum")
        assert total.targets == first.targets + second.targets
        boxes = [box for c, box in album.views[0].glyphs if c != "+"]
        assert list(total.targets) == boxes
        (fx0, fy0, *_), (sx0, sy0, *_) = first.targets[0], second.targets[0]
        assert fx0 < sx0 if abs(fy0 - sy0) < 3 else fy0 < sy0  # the first number stands left or above
        dark = pixels(album).max(2) < 110
        for _, (x0, y0, x1, y1) in album.views[0].glyphs:
            window_ = dark[int(y0) : int(y1), int(x0) : int(x1)]
            assert window_.any()
            window_[...] = False
        assert len(np.flatnonzero(dark.any(1))) <= 1  # at most the rule is left
        signs["+" in word_of(album)] += 1
    assert signs[True] > 20 and signs[False] > 5


# ---- words


def test_words_are_answered_as_printed_and_spelled_in_the_thought(drawn):
    for album, asked in drawn["words"]:
        word, boxes = word_of(album), tuple(box for _, box in album.views[0].glyphs)
        whole, first, last = asked
        assert word.isupper() and 3 <= len(word) <= 6
        assert whole.answer == word.lower() and whole.thought == " ".join(word.lower()) and whole.targets == boxes
        assert first.answer == word[0].lower() and first.targets == boxes[:1] and "first" in first.text
        assert last.answer == word[-1].lower() and last.targets == boxes[-1:] and "last" in last.text
        assert {q.family for q in asked} == {"read"}
        assert [q.chance_key for q in asked] == ["read word", "read letter", "read letter"]


def test_word_and_shape_boxes_hold_their_ink_and_keep_apart(drawn):
    seen = 0
    for album, _ in drawn["words"]:
        image, view = pixels(album), album.views[0]
        vivid, dark = image.max(2) - image.min(2) > 90, image.max(2) < 110
        width, height = album.size
        for o in view.objects:
            x0, y0, x1, y1 = (int(v) for v in o.box)
            assert vivid[y0:y1, x0:x1].mean() > 0.2
            assert (np.abs(image[(y0 + y1) // 2 + 2, (x0 + x1) // 2] - PALETTE[o.colour]) <= 11).all()
            vivid[y0:y1, x0:x1] = False
            assert ZONES[3 * int(o.centre[1] // (height / 3)) + int(o.centre[0] // (width / 3))] == o.zone
            assert not dark[y0:y1, x0:x1].any() or o.shape == "star"
            seen += 1
        for _, (x0, y0, x1, y1) in view.glyphs:
            dark[int(y0) : int(y1), int(x0) : int(x1)] = False
        assert not vivid.any() and not dark.any()
    assert seen > 40


def test_no_letter_is_rare_in_words():
    letters = Counter("".join(word_of(words.draw(seed)[0]) for seed in range(600)))
    assert len(letters) == 26 and min(letters.values()) > 0.01 * sum(letters.values())


# ---- windows


def _shown(split: str = "train", n: int = 80) -> list[tuple[Album, list[Question], tuple[window.Button, ...]]]:
    return [(*window.draw(seed, split), window.buttons(seed, split)) for seed in range(n)]


def test_clicks_land_in_the_middle_of_the_named_button():
    for album, asked, shown in _shown():
        width, height = album.size
        for q in asked:
            (button,) = [b for b in shown if b.box == q.targets[0]]
            found = parse_point(q.answer)
            assert found is not None and q.check(q.answer) and (q.family, q.chance_key) == ("point", "point window")
            x0, y0, x1, y1 = button.box
            assert found[0] * width == pytest.approx((x0 + x1) / 2, abs=0.2)
            assert found[1] * height == pytest.approx((y0 + y1) / 2, abs=0.2)
            zone = ZONES[3 * int(3 * found[1]) + int(3 * found[0])]
            assert q.thought.endswith(f"{button.label} {zone}") and button.label in q.text.rstrip(".").split()
            assert not any(p.check(q.answer) for p in asked if p is not q)


def test_buttons_have_their_colour_and_label_where_they_are_said_to_be():
    for album, _, shown in _shown():
        image, glyphs = pixels(album), album.views[0].glyphs
        for button in shown:
            x0, y0, x1, y1 = (int(v) for v in button.box)
            inside = [c for c, b in glyphs if x0 < b[0] and b[2] < x1 and y0 < b[1] and b[3] < y1]
            assert "".join(inside).lower() == button.label
            assert (np.abs(image[(y0 + y1) // 2, x0 + 3] - window.FILLS[button.colour]) <= 11).all()
            outside = image[y0:y1, x1 + 1 : x1 + 3]
            assert (outside.min(2) > 210).all() and (outside.max(2) - outside.min(2) < 3).all()


def test_where_a_label_occurs_twice_neither_label_nor_colour_names_what_is_asked():
    twice = 0
    for _, asked, shown in _shown():
        labels, colours = Counter(b.label for b in shown), Counter(b.colour for b in shown)
        assert len({(b.label, b.colour) for b in shown}) == len(shown)
        for q in asked:
            (button,) = [b for b in shown if b.box == q.targets[0]]
            if max(labels.values()) > 1:
                assert labels[button.label] > 1 and colours[button.colour] > 1
                assert f"{button.colour} {button.label}" in q.text and q.thought.startswith(button.colour)
            else:
                assert not set(q.text.rstrip(".").split()) & set(window.FILLS)
        twice += max(labels.values()) > 1
    assert 20 < twice < 60


def test_print_on_buttons_stands_out():
    for album, _, _ in _shown(n=40):
        gray = pixels(album).mean(2)
        for _, (x0, y0, x1, y1) in album.views[0].glyphs:
            look = gray[int(y0) - 1 : int(y1) + 1, int(x0) - 1 : int(x1) + 1]
            assert look.max() - look.min() > 60
