"""Routing: which expert served which patch and word, picture against words, load, who works with whom; against Python."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from page import close, expert_at, file, open_table, outside, part, percent, rows_of, select, word  # noqa: F401
from test_page_look import point, underlined
from test_payload import made_run
from workbench.analyses.experts import coactivation, first_experts
from workbench.analyses.routing import expert_loads, expert_map, modality_specialisation
from workbench.runs import Run

pytestmark = pytest.mark.browser


def opened(file, run: Run, layer: int = 0):
    page = file(run)
    page.get_by_role("tab", name="Route").click()
    part(page, "route-layer").select_option(index=layer)
    return page


def with_chosen(run: Run, chosen: np.ndarray) -> Run:
    return replace(run, chosen=chosen.astype(np.uint16))


def test_picture_and_words_of_each_expert_are_pythons(file):
    run = made_run(question="which?", seed=4)
    page = opened(file, run, layer=1)
    loads = expert_loads([run], groups=("picture", "text"))["load"][:, 1]
    preference = modality_specialisation([run], shuffles=2)["preference"][1]
    for e, (name, picture, words, leaning) in enumerate(open_table(page, "route-sides-table")):
        assert int(name) == e
        assert close(picture, loads[0, e]) and close(words, loads[1, e])
        said = leaning.replace("−", "-")
        assert said == "none" if np.isnan(preference[e]) else float(said) == pytest.approx(preference[e], abs=0.006)


def test_how_far_apart_they_are_stands_beside_a_control_like_pythons(file):
    run = made_run(size=(280, 280), reply=60, seed=2)
    found = modality_specialisation([run])
    page = opened(file, run)
    rows = open_table(page, "route-apart-table")
    assert [int(row[0]) for row in rows] == run.moe_layers
    for layer, (_, value, low, high) in enumerate(rows):
        assert float(value) == pytest.approx(found["divergence"][layer], abs=6e-4)
        # both controls are 200 deals, of two generators
        assert float(low) == pytest.approx(found["divergence_shuffled"][0, layer], rel=0.35, abs=2e-3)
        assert float(high) == pytest.approx(found["divergence_shuffled"][1, layer], rel=0.35, abs=2e-3)
        assert float(low) < float(high)
    first = [row[1:] for row in rows]
    assert [row[1:] for row in open_table(opened(file, run), "route-apart-table")] == first  # the seed is fixed


def test_nothing_in_common_is_one_bit_and_above_every_deal(file):
    run = made_run()
    at, chosen = run.positions("image"), np.zeros_like(run.chosen)
    chosen[..., 1] = 1
    chosen[:, at] += 4
    page = opened(file, with_chosen(run, chosen))
    for _, value, _, high in open_table(page, "route-apart-table"):
        assert float(value) == 1 and float(high) < 1
    assert "2 of 2 layers lie above" in part(page, "route-apart-note").inner_text()
    # dealt the other way round: the same for pictures and words
    chosen[:, at] -= 4
    page = opened(file, with_chosen(run, chosen))
    assert all(float(row[1]) == 0 for row in open_table(page, "route-apart-table"))
    assert "0 of 2 layers lie above" in part(page, "route-apart-note").inner_text()


def test_load_and_max_vio_of_every_group_are_pythons(file):
    run = made_run(seed=6)
    page = opened(file, run, layer=1)
    groups = ("all", "picture", "text", "question", "thought", "answer")
    found = expert_loads([run], groups=groups)
    for number, group in enumerate(groups):
        part(page, "route-group").select_option(group)
        *experts, violation = open_table(page, "route-load-table")
        for e, row in enumerate(experts):
            assert all(close(cell, found["load"][number, layer, e]) for layer, cell in enumerate(row[1:])), group
        assert [float(cell) for cell in violation[1:]] == pytest.approx(found["max_vio"][number].tolist(), abs=0.006)
        said = part(page, "route-load-note").inner_text()
        assert f"{found['tokens'][number]} tokens" in said and f"MaxVio {found['max_vio'][number, 1]:.2f}" in said
    select(page, run, int(run.positions("answer")[0]))
    part(page, "route-group").select_option("selected")
    assert "1 token:" in part(page, "route-load-note").inner_text()


def test_who_works_with_whom_is_pythons_and_follows_the_pointer(file):
    run = made_run(seed=8, size=(168, 168))
    page = opened(file, run)
    found = coactivation([run])
    more = np.where(np.eye(run.n_experts, dtype=bool), -1, found["together"] - found["by_load"])[0]
    i, j = np.unravel_index(np.nanargmax(more), more.shape)
    said = part(page, "route-pairs-note").inner_text()
    assert f"tokens of expert {i}, " in said and f"chose expert {j} as well" in said
    for e, (_, share, loads) in enumerate(open_table(page, "route-pairs-table")):
        assert close(share, found["together"][0, i, e]) and close(loads, found["by_load"][0, i, e])
    part(page, "route-pairs").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight"):  # to row 1, column 2
        page.keyboard.press(key)
    said = part(page, "route-pairs-note").inner_text()
    shares = [percent(text) for text in re.findall(r"[<\d.]+%", said)]
    assert "expert 1," in said and "expert 2" in said
    assert shares == pytest.approx([found["together"][0, 1, 2], found["by_load"][0, 1, 2]], abs=0.006)


def test_a_pair_that_always_works_together_stands_out(file):
    run = made_run(size=(168, 168))
    random = np.random.default_rng(0)
    chosen = np.argsort(random.random((*run.chosen.shape[:2], 6)), -1)[..., :2]
    chosen[:, ::3] = [6, 7]  # and never with another
    page = opened(file, with_chosen(run, chosen))
    said = part(page, "route-pairs-note").inner_text()
    assert re.search(r"of expert 6, 100% chose expert 7|of expert 7, 100% chose expert 6", said)


def test_the_picture_is_painted_by_the_expert_with_the_largest_weight(file):
    run = made_run(seed=9)
    page = opened(file, run, layer=1)
    expected = expert_map(run, run.moe_layers[1])["weight"].argmax(0).ravel()
    assert [int(cell.split(" ")[1]) for cell in cells_by_script(page)] == expected.tolist()
    for button in part(page, "expert-key").locator("button").all():
        name, share = button.inner_text().split(" · ")
        counted = (expected == int(name)).mean()
        assert share == "words" if not counted else close(share, counted)
    # the words: in the colour of theirs, named when pointed at
    first = first_experts(run)[1]
    for position in (*run.positions("thought"), *run.positions("answer")):
        assert word(page, run, position).get_attribute("title") == f"expert {first[position - 1]}"


def cells_by_script(page) -> list[str]:
    page.evaluate("document.querySelector('#viewer').shadowRoot.querySelector('[data-part=heat-table]').open = true")
    part(page, "heat-table").locator("tbody tr").first.wait_for(state="attached")
    return [cell for row in rows_of(part(page, "heat-table")) for cell in row[1:]]


def test_choosing_an_expert_lights_the_patches_and_words_that_it_served(file):
    run = made_run(seed=1)
    page, layer, expert = opened(file, run), 1, 3
    at, box = expert_at(page, run, layer, expert), part(page, "experts").bounding_box()
    served = (run.chosen[layer] == expert).any(-1)
    picture = served[run.positions("image")]
    asked = [t for t, role in enumerate(run.roles) if role in ("user", "thought", "answer")]
    words = served[[t - 1 if t >= run.prompt_length else t for t in asked]]
    page.mouse.move(*at)
    assert part(page, "experts").bounding_box() == box  # and moves nothing under the pointer
    assert underlined(page) == words.sum()  # pointing shows it
    page.mouse.move(5, 5)
    assert underlined(page) == len(asked)  # the colours of all experts again
    page.mouse.click(*at)
    page.mouse.move(5, 5)
    assert underlined(page) == words.sum()
    assert [cell == "served by it" for cell in cells_by_script(page)] == picture.tolist()
    said = part(page, "heat-caption").inner_text()
    assert f"{picture.sum()} of {len(picture)} picture tokens that chose expert {expert}" in said
    assert part(page, "route-layer").input_value() == str(layer)
    part(page, "route-free").click()
    assert underlined(page) == len(asked)
    part(page, "experts").focus()
    page.keyboard.press("ArrowRight")  # the first expert, by keyboard
    assert "Expert 0 of layer" in part(page, "route-expert").inner_text()


def test_a_run_without_a_picture_has_its_routing_too(file):
    run = made_run()
    bare = Run(**{**vars(run), "pictures": [], "picture_attention": run.picture_attention[..., :0]})
    bare = replace(bare, roles=["special" if role == "image 0" else role for role in run.roles])
    page = opened(file, bare)
    assert "no picture" in part(page, "route-apart-note").inner_text()
    found = expert_loads([bare], groups=("all",))["load"][0]
    *experts, _ = open_table(page, "route-load-table")
    for e, row in enumerate(experts):
        assert all(close(cell, found[layer, e]) for layer, cell in enumerate(row[1:]))


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_of_the_panel(file, page, width):
    page.set_viewport_size({"width": width, "height": 900})
    opened(file, made_run(size=(280, 224), experts=64, top_k=6))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert outside(page) == []


def test_a_patch_names_the_experts_that_serve_it(file):
    run = made_run(seed=5)
    page, token = opened(file, run, layer=1), 6
    point(page, run, token, click=False)
    at = int(run.positions("image")[token])
    order = np.argsort(-run.weights[1, at].astype(np.float32), kind="stable")
    first, second = (int(e) for e in run.chosen[1, at][order])
    assert f"experts {first} and {second}" in part(page, "readout").inner_text()
