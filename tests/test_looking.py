"""Where the decoder looks, where it was told to look; sinks and massive activations where they were planted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kimi_vl_ref.attention import ExplicitCore
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.looking import attention_sinks, attention_timeline, massive_activations, modality_mass
from workbench.figures.looking import (
    attention_sinks_figure,
    attention_timeline_figure,
    massive_activations_figure,
    modality_mass_figure,
)
from workbench.runs import Run, record
from workbench.tape import attach

MODEL, CHAT = talking_model(), tiny_chat()
NAME = "tiny model, random weights"
CORE = "decoder.layers.*.attn.core"


def recorded(text: str, tokens: int) -> Run:
    asked = question(text, picture(100, 60), picture(50, 90, seed=1))
    *_, run = record(MODEL, CHAT, asked, model_name=NAME, max_new_tokens=tokens)
    assert isinstance(run, Run)
    return run


@pytest.fixture(scope="module")
def run() -> Run:
    return recorded("How many red circles?", 6)


@pytest.fixture(scope="module")
def explicit(run: Run) -> list[Tensor]:
    """All probabilities of the whole sequence, (H, T, T) a layer, from the explicit core."""
    return _probs(run)


def _probs(run: Run) -> list[Tensor]:
    prompt = CHAT.prompt(question(run.question, picture(100, 60), picture(50, 90, seed=1)))
    with attach(MODEL, read=[f"{CORE}.probs"], swap={CORE: lambda core: ExplicitCore()}) as tape, torch.no_grad():
        MODEL(torch.tensor(run.token_ids[None], dtype=torch.long), prompt.pixel_values, prompt.image_grid_hws)
    return [tape[site][0][0] for site in tape.sites]


# --- V5 ------------------------------------------------------------------------------------------------------------------


def test_modality_mass_is_what_explicit_attention_adds_up_to(run: Run, explicit: list[Tensor]) -> None:
    result = modality_mass([run], written=["answer", "special"])
    groups = list(result.axes["mass"][1][1])
    rows = range(run.prompt_length - 1, len(run.roles) - 1)
    assert "answer" in groups and len(rows) == 6
    for layer, probs in enumerate(explicit):
        for at, group in enumerate(groups):
            keys = [k for k, role in enumerate(run.roles) if role == group or (group == "image" and role[:6] == "image ")]
            per_row = [(float(probs[:, q, keys].sum(-1).mean()), sum(k <= q for k in keys)) for q in rows]
            assert result["mass"][layer, at] == pytest.approx(np.mean([mass for mass, _ in per_row]), abs=2e-3)
            each = [mass / seen for mass, seen in per_row if seen]
            expected = np.mean(each) if each else np.nan  # a group that no row could see
            assert result["efficiency"][layer, at] == pytest.approx(expected, abs=2e-3, nan_ok=True)
    np.testing.assert_allclose(result["mass"].sum(1), 1, atol=2e-3)
    assert result.about["rows"] == len(rows)


def test_attention_spread_evenly_is_the_chance_line(run: Run) -> None:
    with attach(MODEL, edit={"decoder.layers.*.attn.q": lambda q, site: torch.zeros_like(q)}):
        even = recorded("How many?", 6)
    result = modality_mass([even], written=["answer", "special"])
    for name in ("mass", "efficiency"):
        np.testing.assert_allclose(result[name], np.broadcast_to(result.chance[name], result[name].shape), atol=2e-3)
    np.testing.assert_allclose(result.chance["mass"].sum(), 1)
    timeline = attention_timeline(even)
    np.testing.assert_allclose(timeline["mass"], np.broadcast_to(timeline.chance["mass"], timeline["mass"].shape), atol=2e-3)
    np.testing.assert_allclose(timeline["received 1"], timeline.chance["received 1"], atol=2e-3)


def planted(run: Run) -> Run:
    """Layer 1 looks at picture 0 only, layer 2 half at picture 1 and half at the question; the first row at itself."""
    names, mass = run.role_names, np.zeros_like(run.role_mass)
    mass[0, :, :, names.index("special")] = 1
    mass[1, :, :, names.index("image 0")] = 1
    mass[2, :, :, [names.index("image 1"), names.index("user")]] = 0.5
    return replace(run, role_mass=mass)


def test_planted_mass_is_found_in_its_layer_and_runs_count_alike(run: Run) -> None:
    result = modality_mass([planted(run), run], written=["answer"])
    groups = list(result.axes["mass"][1][1])
    first = dict(zip(groups, result["mass_by_run"][0].T, strict=True))
    assert first["image"].tolist() == [0, 1, 0.5] and first["user"].tolist() == [0, 0, 0.5]
    assert first["special"].tolist() == [1, 0, 0]
    np.testing.assert_allclose(result["mass"], result["mass_by_run"].mean(0))


def test_a_timeline_follows_the_picture_that_was_looked_at(run: Run) -> None:
    change = planted(run)
    later = change.role_mass.copy()
    at = run.prompt_length + 2 - run.first_row  # from the row that wrote the fourth token on
    later[1, :, at:] = 0
    later[1, :, at:, run.role_names.index("image 1")] = 1
    found = attention_timeline(replace(change, role_mass=later))
    written = len(run.token_ids) - run.prompt_length
    assert found["mass"][1, :, 0].tolist() == [1, 1, 1] + [0] * (written - 3)
    assert found["mass"][1, :, 1].tolist() == [0, 0, 0] + [1] * (written - 3)
    assert list(found.axes["mass"][1][1]) == list(range(run.prompt_length, len(run.token_ids)))
    counts = [p.grid.token_count for p in run.pictures]
    np.testing.assert_allclose(found.chance["mass"][0], np.array(counts) / run.prompt_length)
    assert found["received 0"].shape == run.pictures[0].grid.token_grid


def test_what_a_patch_received_is_the_mean_of_the_explicit_columns(run: Run, explicit: list[Tensor]) -> None:
    rows = range(run.prompt_length - 1, len(run.token_ids) - 1)
    columns = run.positions("image 1")
    expected = torch.stack([probs[:, list(rows)][:, :, columns.tolist()].mean((0, 1)) for probs in explicit]).mean(0)
    found = attention_timeline(run)["received 1"]
    np.testing.assert_allclose(found.ravel(), expected, atol=2e-3)


# --- V6 ------------------------------------------------------------------------------------------------------------------


def test_what_positions_receive_is_what_explicit_attention_gives_them(run: Run, explicit: list[Tensor]) -> None:
    count = len(run.token_ids)
    alpha = torch.zeros(len(explicit), 5, count)
    for layer, probs in enumerate(explicit):
        for key in range(count):
            alpha[layer, :, key] = probs[:, key:, key].mean(1)
    epsilon = float(alpha[..., 10].median()) + 1e-4  # between heads, so that some pass it and some do not
    result = attention_sinks(MODEL, CHAT.processor, run, epsilon=epsilon)
    np.testing.assert_allclose(result["received"], alpha.mean(1), atol=1e-5)
    np.testing.assert_allclose(result["sink"], (alpha > epsilon).float().mean((0, 1)), atol=1e-6)
    assert 0.2 < result["sink"][10] < 0.8
    even = torch.ones(count, count).tril() / torch.arange(1, count + 1)[:, None]
    np.testing.assert_allclose(result.chance["received"], [even[key:, key].mean() for key in range(count)], rtol=1e-4)


def test_a_planted_sink_is_found_and_nothing_else(run: Run) -> None:
    """One key has a rotary part that every query has too; all other keys have none, and no score has content."""
    sink = 4

    def keys(k_rope: Tensor, site: str) -> Tensor:
        k_rope[:] = 0
        k_rope[:, sink] = 100
        return k_rope

    edits = {
        "decoder.layers.*.attn.k_rope": keys,
        "decoder.layers.*.attn.q_rope": lambda q_rope, site: torch.ones_like(q_rope),
        "decoder.layers.*.attn.latent": lambda latent, site: torch.zeros_like(latent),
    }
    with attach(MODEL, edit=edits):
        result = attention_sinks(MODEL, CHAT.processor, run, epsilon=0.9)
    assert np.flatnonzero(result["sink"] == 1).tolist() == [sink]
    first = result["sink"][[0]]  # nothing but itself to look at in its own row, and evenly in the next
    assert first < 1 and (result["sink"][5:] == 0).all()
    np.testing.assert_allclose(result["received"][:, sink], 1, atol=1e-5)
    assert result.about["largest"][0] == {"position": 4, "text": run.texts[4], "role": run.roles[4], "share": 1.0}


@pytest.mark.parametrize("block", [1, 7])
def test_sinks_do_not_depend_on_the_block_of_rows(run: Run, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention_sinks(MODEL, CHAT.processor, run)["received"]
    monkeypatch.setattr("workbench.analyses.looking.SCRATCH", block * 5 * len(run.token_ids))
    np.testing.assert_allclose(attention_sinks(MODEL, CHAT.processor, run)["received"], whole, rtol=1e-5)


def test_a_planted_activation_is_found_in_every_layer_from_where_it_was_put(run: Run) -> None:
    def plant(mid: Tensor, site: str) -> Tensor:
        mid[0, 3, 17] = -1e4
        mid[0, 3, 18] = 90.0  # above 1000 medians in no layer, and below 100
        return mid

    with attach(MODEL, edit={"decoder.layers.1.resid_mid": plant}):
        result = massive_activations(MODEL, CHAT.processor, run)
    assert sorted(result["layer"].tolist()) == [1, 2]
    assert set(zip(result["position"].tolist(), result["channel"].tolist(), strict=True)) == {(3, 17)}
    assert (np.abs(result["value"] + 1e4) < 100).all()
    assert result.about["channels"] == {17: 2}
    assert result["top"].shape == (4, 3) and result["top"][2, 0] == pytest.approx(1e4, rel=0.01)
    assert result["top"][1, 0] < 100


def test_a_small_number_in_a_tiny_stream_is_not_massive(run: Run) -> None:
    def plant(mid: Tensor, site: str) -> Tensor:
        mid = mid * 1e-4
        mid[0, 3, 17] = 50.0
        return mid

    edits = {"decoder.layers.0.resid_mid": plant, "decoder.layers.0.ffn": lambda written, site: torch.zeros_like(written)}
    with attach(MODEL, edit=edits):
        assert not len(massive_activations(MODEL, CHAT.processor, run).values.get("layer", ()))
        lower = massive_activations(MODEL, CHAT.processor, run, above=49)
    assert set(lower["channel"].tolist()) == {17} and lower["layer"].min() == 0


def test_a_large_number_in_a_large_stream_is_not_massive(run: Run) -> None:
    """Everything times 1000: numbers are above 100, and none is 1000 times the median."""
    with attach(MODEL, edit={"decoder.layers.2.resid_mid": lambda mid, site: 1000 * mid}):
        result = massive_activations(MODEL, CHAT.processor, run)
    assert result["top"][3, 0] > 100 and not len(result.values.get("layer", ()))


# --- refusals and figures ------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="wrote nothing as thought; give other roles or runs"):
        modality_mass([run], written=["thought"])
    with pytest.raises(ValueError, match="epsilon=3 is not a share"):
        attention_sinks(MODEL, CHAT.processor, run, epsilon=3)
    with pytest.raises(ValueError, match="a timeline needs a picture and a written token"):
        attention_timeline(replace(run, pictures=[]))


def test_figures_show_the_numbers_their_chance_and_the_weights(run: Run) -> None:
    mass = modality_mass([planted(run)], written=["answer"])
    figures = [
        modality_mass_figure(mass),
        attention_timeline_figure(attention_timeline(planted(run))),
        attention_sinks_figure(attention_sinks(MODEL, CHAT.processor, run, epsilon=0.1)),
        massive_activations_figure(massive_activations(MODEL, CHAT.processor, run, above=1, times_median=2)),
    ]
    for figure in figures:
        assert figure.get_supxlabel() == NAME
        figure.draw_without_rendering()
    stacked = figures[0].axes[0]
    dashed = [line.get_ydata()[0] for line in stacked.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    np.testing.assert_allclose(dashed, np.cumsum(mass.chance["mass"])[:-1])
    strip = np.asarray(figures[1].axes[1].images[0].get_array())
    assert (strip[1] == 1).all() and (strip[0] == 0).all()
