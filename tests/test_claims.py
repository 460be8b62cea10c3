"""The claims: each holds where its effect is planted and fails where it is not, and every table has its control."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from kimi_vl_ref import load
from workbench.study import claims
from workbench.study.kinds import needle


@pytest.fixture(scope="module")
def study():
    return load("study")


def answering(monkeypatch, reply):
    """Puts reply(pair, settings) -> (thought, answer) in the place of the model."""

    def ask(model, chat, pairs, **settings):
        return [reply(pair, settings) for pair in pairs]

    monkeypatch.setattr(claims, "ask", ask)


def test_thinking_holds_where_only_thoughts_bring_right_answers(study, monkeypatch):
    def reply(pair, settings):
        own = settings.get("thought_budget") is None and settings.get("thoughts") is None
        return ("a thought", pair[1].answer) if own else ("", "no idea")

    answering(monkeypatch, reply)
    claim = claims.thinking(*study, scenes=5)
    assert claim.holds and "sum falls by 100.0 points" in claim.verdict
    assert [row["right"] for row in claim.rows if row["thought"] == "another scene's (control)"] == ["0.0", "0.0"]
    answering(monkeypatch, lambda pair, _: ("", pair[1].answer))  # answers that need no thought
    assert not claims.thinking(*study, scenes=5).holds


def test_native_holds_where_small_pictures_hide_small_things_only(study, monkeypatch):
    def reply(pair, settings):
        pictures, question = pair
        sharp = question.family != "tiny" or max(pictures.images[0].size) >= 336
        return "", question.answer if sharp else "no idea"

    answering(monkeypatch, reply)
    claim = claims.native(*study, scenes=5)
    assert claim.holds and "100.0 at native size, 0.0 at half" in claim.verdict
    assert sum("(control)" in row["family"] for row in claim.rows) == 5
    answering(monkeypatch, lambda pair, _: ("", pair[1].answer))
    assert not claims.native(*study, scenes=5).holds


def test_the_needle_holds_where_it_is_found_at_every_length(study, monkeypatch):
    answering(monkeypatch, lambda pair, _: ("", pair[1].answer))
    claim = claims.haystack(*study, scenes=10)
    assert claim.holds and len(claim.rows) == 6
    assert all(float(row["another hay's answer (control)"]) < 50 for row in claim.rows)
    assert {row["hay"].split()[1] for row in claim.rows} == {"pictures", "lines"}
    deep = lambda pair, _: ("", pair[1].answer if len(pair[0].views) < 40 else "picture 1")  # noqa: E731
    answering(monkeypatch, deep)
    failed = claims.haystack(*study, scenes=10)
    assert not failed.holds and "100.0 at a quarter" in failed.verdict


def test_the_commonest_guess_reads_pictures_or_lines_and_ignores_the_question():
    text = "red star 10. red circle 11. blue star 12. what has the number 12?"
    album, _ = needle.draw(1, "report", "full", length=4, variant="lines")
    assert claims.commonest(album, text) == "red star"
    pictures, _ = needle.draw(1, "report", "full", length=20, variant="pictures")
    colours = Counter(o.colour for view in pictures.views for o in view.objects)
    assert claims.commonest(pictures, "").split()[0] == colours.most_common(1)[0][0]


def test_rope_says_what_is_lost_without_the_rotation(study):
    claim = claims.rope(*study, scenes=2)
    assert len(claim.rows) == 18 and sum("(control)" in row["MoonViT"] for row in claim.rows) == 6
    assert re.search("where by -?[0-9.]+, name by -?[0-9.]+, point by", claim.verdict)


def test_experts_are_measured_beside_shuffled_kinds(study):
    claim = claims.experts(*study, scenes=1)
    assert len(claim.rows) == 4  # every layer that routes
    assert all(float(row["information, bits"]) > 0 for row in claim.rows)


def test_balance_compares_the_same_steps_with_and_without_the_update(study):
    claim = claims.balance(*study, steps=3, repeats=1)
    assert [row["bias update"] for row in claim.rows] == ["on", "off (control)"]


def test_an_unknown_claim_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="no claim 'thinkin'; choose among thinking, native"):
        claims.main(["thinkin"])
