"""The viewer's payload: what it keeps of a run, how exactly, and in how many bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from kimi_vl_ref.images import ImageProcessor
from workbench.runs import Run
from workbench.viewer import payload, standalone
from workbench.viewer.payload import pack_array, unpack_array

HALF = (0.5, 0.5, 0.5)
PROCESSOR = ImageProcessor(14, (2, 2), 4096, True, HALF, HALF)


def made_run(size=(112, 84), reply=8, layers=3, heads=2, experts=8, top_k=2, question="how many?", seed=0) -> Run:
    """A run of random numbers with the shapes and the sums of a recorded one."""
    random = np.random.default_rng(seed)
    _, _, pictures = PROCESSOR([Image.new("RGB", size, "white")])
    tokens = pictures[0].grid.token_count
    roles = ["special"] * 3 + ["image 0"] * tokens + ["special"] + ["user"] * 4 + ["special"] * 2
    prompt = len(roles)
    roles += ["thought"] * (reply // 2) + ["answer"] * (reply - reply // 2)
    total, first_row = len(roles), roles.index("user")
    rows = total - first_row
    names = list(dict.fromkeys(roles))
    mass = random.dirichlet(np.full(len(names), 0.5), (layers, heads, rows))
    within = random.gamma(0.3, 1, (layers, heads, rows, tokens)) + 1e-9
    attention = mass[..., [names.index("image 0")]] * within / within.sum(-1, keepdims=True)
    scores = random.beta(2, 2, (layers - 1, total, experts))
    bias = random.normal(0, 0.1, (layers - 1, experts))
    chosen = np.argsort(-(scores + bias[:, None]), -1)[..., :top_k]
    weights = np.take_along_axis(scores, chosen, -1)
    logprobs = np.where(np.arange(total) < prompt, np.nan, -random.gamma(0.3, 1, total))
    return Run(
        question=question,
        pictures=pictures,
        token_ids=np.arange(total, dtype=np.int32),
        texts=["" if role.startswith("image") else f" w{at}" for at, role in enumerate(roles)],
        roles=roles,
        prompt_length=prompt,
        logprobs=logprobs.astype(np.float32),
        entropies=(-logprobs).astype(np.float32),
        thought="thought",
        answer="answer",
        finished=True,
        moe_layers=list(range(1, layers)),
        n_experts=experts,
        chosen=chosen.astype(np.uint16),
        weights=(2.446 * weights / weights.sum(-1, keepdims=True)).astype(np.float16),
        scores=scores.astype(np.float16),
        bias=bias.astype(np.float32),
        first_row=first_row,
        picture_attention=attention.astype(np.float16),
        role_names=names,
        role_mass=mass.astype(np.float16),
        model_name="random numbers",
        device="cpu",
        dtype="float32",
    )


def test_numbers_come_back_as_exactly_as_the_documentation_says():
    run = made_run()
    shown = payload(run)
    attention = run.picture_attention.astype(np.float32)
    allowed = (2 * np.sqrt(attention) + 1 / 510) / 510 + 1e-7
    assert (np.abs(unpack_array(shown["attention"]) - attention) <= allowed).all()
    rows = slice(run.first_row, None)
    np.testing.assert_array_equal(unpack_array(shown["chosen"]), run.chosen[:, rows])
    np.testing.assert_allclose(unpack_array(shown["weights"]), run.weights[:, rows].astype(np.float32))
    np.testing.assert_allclose(unpack_array(shown["scores"]), run.scores[:, rows], atol=1e-4)
    np.testing.assert_allclose(unpack_array(shown["mass"]), run.role_mass, atol=1e-4)
    np.testing.assert_array_equal(unpack_array(shown["bias"]), run.bias)


def test_experts_of_pictures_and_of_the_words_before_the_rows_come_with_the_largest_weight_first():
    run = made_run(top_k=3)
    shown, image = payload(run), run.positions("image")
    early = [at for at in range(run.first_row) if at not in image]
    for name, positions in (("chosen_picture", image), ("chosen_early", early)):
        found = unpack_array(shown[name])
        assert found.shape == (len(run.moe_layers), len(positions), 3)
        for layer in range(len(found)):
            for ids, at in zip(found[layer], positions, strict=True):
                weight = dict(zip(run.chosen[layer, at].tolist(), run.weights[layer, at].tolist(), strict=True))
                assert sorted(weight.values(), reverse=True) == [weight[e] for e in ids.tolist()]


@pytest.mark.parametrize("kind", ["root8", "unit8", "unit16"])
def test_a_share_of_nothing_and_of_everything_are_exact(kind):
    assert unpack_array(pack_array(np.array([0.0, 1.0]), kind)).tolist() == [0.0, 1.0]


def test_words_are_all_tokens_but_those_of_pictures():
    run = made_run()
    words = payload(run)["words"]
    assert words["at"] == [at for at, role in enumerate(run.roles) if role != "image 0"]
    assert words["text"] == [run.texts[at] for at in words["at"]]
    assert words["logprob"][0] is None and words["logprob"][-1] == pytest.approx(run.logprobs[-1], abs=1e-4)


def test_a_payload_is_json_without_nan():
    json.dumps(payload(made_run(), truth={"answer": "3", "right": False}), allow_nan=False)


def test_a_run_without_a_picture_has_a_payload():
    run = made_run()
    bare = Run(**{**vars(run), "pictures": [], "picture_attention": run.picture_attention[..., :0]})
    shown = payload(bare)
    assert shown["pictures"] == [] and unpack_array(shown["attention"]).shape[-1] == 0


def test_three_hundred_tokens_of_the_study_model_stay_under_two_megabytes():
    run = made_run(size=(448, 448), reply=290, layers=5, heads=6, experts=16)
    assert run.pictures[0].grid.patch_count == 1024 and len(payload(run)["words"]["at"]) >= 300
    assert len(standalone(run).encode()) < 2_000_000


def test_a_run_too_large_for_its_limit_is_averaged_and_says_so():
    run = made_run(size=(640, 480), reply=6, layers=27, heads=16, experts=64, top_k=6)
    assert payload(run, attention_bytes=10_000)["averaged"] == "layers and heads"
    shown = payload(run, attention_bytes=200_000)
    assert shown["averaged"] == "heads"
    whole = run.picture_attention.astype(np.float32)
    np.testing.assert_allclose(unpack_array(shown["attention"]), whole.mean(1, keepdims=True), atol=0.003)
    assert unpack_array(shown["mass"]).shape[:2] == (27, 1)


def test_a_large_picture_is_shown_smaller_with_the_geometry_of_the_original():
    shown = payload(made_run(size=(2000, 1000), reply=2, layers=2))["pictures"][0]
    assert shown["original"] == [2000, 1000] and len(shown["src"]) < 400_000


def test_text_cannot_end_the_script_of_the_file():
    page = standalone(made_run(question="</script><script>alert(1)</script> @TITLE@ @SCRIPT@"), title="<b>@DATA@")
    assert page.count("</script>") == 2  # the data's and the viewer's own
    assert "alert(1)" in page and "<title>&lt;b&gt;@DATA@</title>" in page


def test_the_file_names_no_address_to_fetch_from():
    page = standalone(made_run())
    assert "http://" not in page and "https://" not in page and "//cdn" not in page
