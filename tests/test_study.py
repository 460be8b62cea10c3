"""The study model's trainer, and what its shipped checkpoint must be able to do."""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kimi_vl_ref import load
from kimi_vl_ref.images import PatchGrid
from kimi_vl_ref.weights import save_checkpoint
from workbench.study import average, evaluate, families, forest, optim, train
from workbench.study.batches import Forest, Mix, branch, draw_samples, plant, shared_part, written_reply
from workbench.study.eye import BREAK, MOST, NO_OBJECT, NO_TEXT, cell_labels
from workbench.study.kinds import wide
from workbench.study.optim import Balancer, MuonAdamW, as_matrices, orthogonalise
from workbench.study.scenes import COLOURS, GLYPHS, NO_GLYPH, SHAPES, UNSURE, scene
from workbench.study.views import View

CHECKPOINT = Path(train.__file__).parent / "checkpoint"
QUICK = (
    train.Stage("eye", 3, Mix({"any": 1.0}, levels=("first",)), batch=4, rate=1e-3, warm=1, dense=1.0),
    train.Stage("all", 3, Mix({"any": 1.0}, {"name": 1, "count": 1}, ("first",)), batch=4, rate=1e-3, warm=1, dense=0.1),
)


@pytest.fixture(scope="module")
def study():
    return load("study")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the one this CPU is quick at, and the other
def test_orthogonalising_keeps_directions_and_levels_their_sizes(dtype, monkeypatch):
    monkeypatch.setattr(optim, "quick_dtype", lambda: dtype)
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(3, 20, 20))
    v, _ = torch.linalg.qr(torch.randn(3, 33, 20))
    sizes = torch.logspace(0, -1, 20)
    made = orthogonalise(u * sizes @ v.mT)
    assert torch.linalg.svdvals(made).sub(1).abs().max() < 0.5  # five steps level the sizes roughly, as in Moonlight
    assert (u.mT @ made @ v).diagonal(dim1=1, dim2=2).min() > 0.5  # each direction kept its partner


def test_a_muon_step_has_the_size_of_an_adamw_step():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 160))
    weight.grad = torch.randn(64, 160)
    MuonAdamW({"some.weight": weight}, decay=0.0).step(1.0, 1.0)
    # an orthogonal 64 x 160 matrix has an RMS of 1/sqrt(160), which the factor 0.2 sqrt(160) brings to 0.2
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_stacked_parameters_are_orthogonalised_one_matrix_at_a_time():
    assert as_matrices("x.attn.qkv.weight", torch.zeros(12, 4)).shape == (3, 4, 4)
    assert as_matrices("x.experts.gate_up", torch.zeros(5, 6, 4)).shape == (10, 3, 4)
    assert as_matrices("x.experts.down", torch.zeros(5, 4, 3)).shape == (5, 4, 3)


def test_the_bias_of_a_busy_expert_sinks_and_of_an_idle_one_rises():
    model = train.new_model(0)
    balancer = Balancer(model)
    balancer.loads += 10
    balancer.loads[0, 3], balancer.loads[0, 5] = 50, 0
    violation = balancer.update(0.01)
    bias = balancer.choices[0].bias
    assert bias[3] < 0 < bias[5] and violation[0] > 1
    assert torch.equal(balancer.choices[1].bias, torch.zeros_like(bias)) and violation[1] == 0
    assert balancer.loads.abs().sum() == 0
    balancer.close()


def test_the_rate_warms_up_and_falls_to_its_end():
    stage = replace(train.STAGES[-1], steps=100, warm=10, rate=1.0, final_rate=0.0, decay_from=0.5)
    assert stage.rate_at(0) == pytest.approx(0.1) and stage.rate_at(30) == 1.0
    assert stage.rate_at(75) == pytest.approx(0.5) and stage.rate_at(99) == pytest.approx(0.02)


def test_a_folder_whose_making_was_killed_is_completed(tmp_path):
    train.prepare(tmp_path)
    made = {path: path.read_bytes() for path in (tmp_path / "release").iterdir()}
    assert len(made) == 4
    for path in made:
        path.unlink()
        train.prepare(tmp_path)
        assert {one: one.read_bytes() for one in (tmp_path / "release").iterdir()} == made


def test_pictures_for_the_eye_alone_add_to_the_loss_and_share_no_seed(tmp_path):
    (tmp_path / "one").mkdir()
    train.prepare(tmp_path / "one")
    stage = replace(QUICK[0], mix=MIX, batch=2, dense=0.3, also=2)
    for ranks in (1, 2):
        runs = [train.Run(tmp_path / "one", 5, rank, ranks, (stage,)) for rank in range(ranks)]
        seeds = [run.seeds(1, 2) + run.seeds(1, 2, train.SEEN_ALSO) for run in runs]
        runs[0].progress.step += 1
        later = runs[0].seeds(1, 2) + runs[0].seeds(1, 2, train.SEEN_ALSO)
        assert len({seed for own in seeds for seed in own}) == 4 and not {seed for own in seeds for seed in own} & set(later)
    losses = {}
    for also in (0, 2):
        run = train.Run(tmp_path / "one", 5, 0, 1, (stage,))
        run.compute_in("float32")
        losses[also] = run.step(replace(stage, also=also), 0)
    assert losses[2]["words"] == losses[0]["words"] and losses[2]["loss"] > losses[0]["loss"]
    run = train.Run(tmp_path / "one", 5, 0, 1, (stage,))
    run.compute_in("float32")
    sheets = run.step(replace(stage, beside=Mix({"sheet": 1.0}, {}, ("full",), 0)), 0)
    assert sheets["words"] == losses[0]["words"] and sheets["loss"] not in (losses[0]["loss"], losses[2]["loss"])


def test_a_question_about_a_hay_is_never_a_second_turn(study):
    _, chat = study
    mix = Mix({"lines": 1.0}, second_turn=1.0)
    samples = draw_samples(mix, [1, 2, 3, 4], 0.0)
    assert max(len(sample.questions) for sample in samples) > mix.questions  # those on one hay are all asked
    planted = plant(chat, mix, samples)
    for (start, stop), sample in zip(planted.trees, samples, strict=True):
        assert int(planted.branches[start:stop].max()) == len(sample.questions)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        out.mkdir()
        train.prepare(out)
    train.Run(whole, 0, 0, 1, QUICK).train(save_every=100)
    stopped = train.Run(parts, 0, 0, 1, QUICK)
    stopped.compute_in(QUICK[0].dtype)
    for _ in range(2):
        stopped.step(QUICK[0], 0)
        stopped.progress.step += 1
    stopped.save()
    train.Run(parts, 0, 0, 1, QUICK).train(save_every=100)
    one, other = (load_file(out / "state-2-0.safetensors") for out in (whole, parts))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


KINDS = {"objects": 1.0, "sums": 1.0, "compare": 1.0}
MIX = Mix(KINDS, {"count": 1, "where": 1, "describe": 1}, ("first",), questions=4, cut=0.0)


def test_training_conversations_are_what_the_model_is_asked_later(study):
    _, chat = study
    for sample in draw_samples(MIX, [5, 6, 7, 8, 9, 10], 0.0):
        turns = sample.questions[:2]
        images = [{"type": "image", "image": image} for image in sample.pictures.images]
        messages = []
        for question in turns:
            text = {"type": "text", "text": question.text}
            messages.append({"role": "user", "content": [*images, text]})
            messages.append({"role": "assistant", "content": written_reply(question)})
            images = []
        whole = chat.prompt(messages, add_generation_prompt=False)
        ours = shared_part(chat, [p.grid.token_count for p in whole.pictures])
        written, following, _ = branch(chat, turns, random.Random(0))
        assert ours + written == whole.input_ids
        learnt = [token for token in following if token >= 0]
        end = chat.tokenizer.special["<|im_end|>"]
        assert learnt.count(end) == len(turns)
        assert [i for i in learnt if i != end] == [i for q in turns for i in chat.tokenizer.encode(written_reply(q))]


def test_a_forest_computes_what_each_conversation_computes_alone(study):
    """Branches share the tokens of the pictures and never see each other; several pictures and second turns included."""
    model, chat = study
    model = copy.deepcopy(model)
    samples = draw_samples(replace(MIX, second_turn=0.5), [5, 6, 7, 8, 9, 10], 0.0)
    planted = plant(chat, replace(MIX, second_turn=0.5), samples)
    with torch.inference_mode():
        visual = model.projector(model.vision(planted.pixel_values, planted.grids), planted.grids)
        alone, rows = [], []
        for start, stop in planted.trees:
            branches = planted.branches[start:stop]
            for number in range(1, int(branches.max()) + 1):
                own = start + ((branches == 0) | (branches == number)).nonzero()[:, 0]
                ids = planted.input_ids[own]
                before = int((planted.input_ids[:start] == model.config.media_placeholder_token_id).sum())
                count = int((ids == model.config.media_placeholder_token_id).sum())
                alone.append(model.decoder(model.embedded(ids[None], visual[before : before + count]))[0])
                rows.append(own)
                assert planted.positions[own].tolist() == list(range(len(own)))
        core = forest.TreeCore()
        for layer in model.decoder.layers:
            layer.attn.core = core
        core.plant(planted)
        together = forest.run(model, planted, visual)
    assert len(alone) > len(samples)
    for stream, own in zip(alone, rows, strict=True):
        assert (together[own] - stream).abs().max() < 2e-4


def test_of_several_scenes_the_one_with_the_hardest_neighbours_is_shown():
    mix = Mix({"objects": 1.0}, {"relation": 1.0})
    for seed in range(5):
        (plain,), (hardest,) = draw_samples(mix, [seed], 0.0), draw_samples(replace(mix, hardest=8), [seed], 0.0)
        again = draw_samples(replace(mix, hardest=8), [seed], 0.0)[0]
        points = [families.hard_neighbours(sample.pictures) for sample in (plain, hardest, again)]
        assert points[0] <= points[1] == points[2]
        assert points[1] >= 10
    assert scene(0, "train", "full", "objects").objects == draw_samples(mix, [0], 0.0)[0].pictures.objects


def test_a_thought_that_is_cut_off_teaches_its_answer_only(study):
    _, chat = study
    _, question = families.make("sum", 3, "train")
    encode = chat.tokenizer.encode
    for seed in range(20):
        ids, following, _ = branch(chat, [question], random.Random(seed), cut=1.0)
        learnt = [token for token in following if token >= 0]
        assert learnt == [*encode(f" {question.answer}"), chat.tokenizer.special["<|im_end|>"]]
        text = chat.tokenizer.decode(ids)
        kept = text[text.index("◁think▷") + 7 : text.index("◁/think▷")]
        assert f" {question.thought}".startswith(kept)


@pytest.mark.parametrize("thought, answer, family, loose, decisive", [
    ("1 red star top left 39 25, 2 blue star centre 04 51, so 2", "2", "count", "9541", ""),
    ("9 red star 08, 10 blue star 31, so 10 blue star", "blue star", "wide", "81", ""),
    ("red star top left 15 06, so nothing", "nothing", "relation", "56", " so"),
    ("red star top left 15 06, blue cross centre 17 18, so blue cross", "blue cross", "relation", "5678", " blue cross"),
    ("red star top left", "click(x=0.123, y=0.456)", "point", "36", ""),
    ("12+34, 12+34: 2+4+0=06, 1+3+0=04, so 46", "46", "sum", "", ""),
    ("red star 42, so 42", "42", "needle", "", ""),
])  # fmt: skip
def test_last_figures_of_coordinates_count_less_and_a_neighbour_more(study, thought, answer, family, loose, decisive):
    _, chat = study
    question = families.Question(family, "where?", thought, answer, (), family, (100, 100))
    _, following, counts = branch(chat, [question, question], random.Random(0))

    def counting(wanted):
        return chat.tokenizer.decode([token for token, count in zip(following, counts, strict=True) if count == wanted])

    assert counting(families.LOOSE) == 2 * loose
    assert counting(families.DECISIVE) == 2 * decisive
    assert set(counts) <= {1.0, families.LOOSE, families.DECISIVE}


def test_a_forest_weighs_words_by_what_they_count_and_by_the_root_of_their_reply(study):
    _, chat = study
    mix = Mix({"objects": 1.0}, {"relation": 1.0, "point": 1.0}, questions=4, second_turn=0.0, again=True, cut=0.0)
    samples = draw_samples(replace(mix, hardest=3), range(3), 0.0)
    planted = plant(chat, mix, samples)
    assert {question.family for sample in samples for question in sample.questions} == {"relation", "point"}
    for sample, (start, stop) in zip(samples, planted.trees, strict=True):
        for number, question in enumerate(sample.questions, start=1):
            _, following, counts = branch(chat, [question], random.Random(0))
            expected = [count for token, count in zip(following, counts, strict=True) if token >= 0]
            own = (planted.branches[start:stop] == number) & (planted.targets[start:stop] >= 0)
            shares = [count * len(expected) ** -0.5 for count in expected]
            assert planted.weights[start:stop][own].tolist() == pytest.approx(shares)


def test_each_branch_sees_the_pictures_and_itself():
    ids, positions, branches = torch.tensor([[0] * 6, [0, 1, 2, 3, 2, 3], [0, 0, 1, 1, 2, 2]])
    planted = Forest([], torch.zeros(0), [], ids, positions, branches, [(0, 6)], torch.zeros(6), torch.zeros(6))
    core = forest.TreeCore()
    core.plant(planted)
    assert (core.trees[0][1] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_cell_labels_put_each_object_where_its_centre_is():
    drawn = scene(11, "train", "full", "objects")
    rows, columns = -(-drawn.size[1] // 28), -(-drawn.size[0] // 28)
    centre, xy, spot, turn, *_ = cell_labels(drawn, rows, columns)
    ys, xs = np.mgrid[:rows, :columns]
    middles = np.stack([xs, ys], axis=-1) + 0.5
    grid = PatchGrid(drawn.size, drawn.size, (2 * rows, 2 * columns), 14, 2)
    labelled = {}
    for thing in drawn.objects:
        cell = divmod(grid.token_at(*thing.centre), columns)
        if centre[cell] >= 0:
            assert centre[cell] == COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
            assert xy[cell] == pytest.approx((thing.centre[0] / drawn.size[0], thing.centre[1] / drawn.size[1]))
            assert 28 * spot[cell] == pytest.approx(thing.centre)
            middles[cell] = spot[cell]
            assert turn[cell] == drawn.objects.index(thing)
            labelled[cell] = thing
    assert len(labelled) == ((centre != NO_OBJECT) & (centre >= 0)).sum()
    # elsewhere a cell's spot is its own middle, where that is in the picture
    inside = (28 * middles < drawn.size).all(-1) & (centre != UNSURE)
    assert np.isnan(spot[~inside]).all() and np.array_equal(spot[inside], middles[inside].astype(np.float32))


def test_things_of_a_strip_are_numbered_along_it():
    otherwise = 0  # strips whose reading order, by the nine parts of the picture, is another
    for seed in range(12):
        (strip,) = wide.draw(seed)[0].views
        turn = cell_labels(strip, -(-strip.size[1] // 28), -(-strip.size[0] // 28))[3]
        along = int(strip.size[1] > strip.size[0])
        row = sorted(strip.objects, key=lambda o: o.centre[along])
        for number, thing in enumerate(row):
            assert turn[int(thing.centre[1] // 28), int(thing.centre[0] // 28)] in (number, UNSURE)
        assert ((0 <= turn) & (turn < MOST)).sum() > 1
        otherwise += tuple(row) != strip.objects
    assert otherwise > 2


def printed(*lines: tuple[str, int, int]) -> View:
    """A picture of 84 x 56 pixels (cells of 28) with texts whose characters are 8 wide and 10 high, a pixel apart."""
    glyphs = [(c, (x + 9.0 * k, float(y), x + 9.0 * k + 8, y + 10.0)) for text, x, y in lines for k, c in enumerate(text)]
    return View(Image.new("RGB", (84, 56)), glyphs=tuple(glyphs))


def test_print_labels_say_what_follows_what_and_where_a_text_ends():
    def shown(*lines: tuple[str, int, int]) -> dict[tuple[int, int], tuple[str, int, int, int]]:
        slots, place, rest, text = cell_labels(printed(*lines), 2, 3)[5:9]
        back = {number: character for character, number in GLYPHS.items()} | {BREAK: "|", NO_GLYPH: ""}
        cells = {(r, c): "".join(back[int(g)] for g in slots[r, c]) for r in range(2) for c in range(3)}
        for cell, s in cells.items():
            assert (place[cell] == MOST) == (rest[cell] == MOST) == (text[cell] == NO_TEXT) == (not s)
        return {at: (s, int(place[at]), int(rest[at]), int(text[at])) for at, s in cells.items() if s}

    # one number over two cells: three of its digits have their middles left of x = 28
    assert shown(("51337", 1, 9)) == {(0, 0): ("513", 0, 4, 0), (0, 1): ("37", 3, 1, 0)}
    # two numbers, one below the other in the same cells
    assert shown(("307", 1, 2), ("10", 10, 14)) == {(0, 0): ("307|10", 0, 2, 0)}
    # a plus between two numbers of one line parts them and is not read
    assert shown(("5+3", 1, 9)) == {(0, 0): ("5|3", 0, 0, 0)}
    assert shown(("5+36", 10, 9)) == {(0, 0): ("5", 0, 0, 0), (0, 1): ("36", 0, 1, 1)}
    # of more than two texts nobody can say which is the first
    assert shown(("1", 1, 1), ("2", 30, 1), ("3", 1, 30)) == {
        (0, 0): ("1", 0, 0, UNSURE),
        (0, 1): ("2", 0, 0, UNSURE),
        (1, 0): ("3", 0, 0, UNSURE),
    }


def test_print_labels_spell_each_text_place_by_place():
    back, none = {number: character for character, number in GLYPHS.items()} | {NO_GLYPH: ".", UNSURE: "?"}, MOST * "."

    def spelled(*lines: tuple[str, int, int]) -> list[str]:
        labels = cell_labels(printed(*lines), 2, 3)[9]
        assert labels.shape == (2, 3, MOST)
        return ["".join(back[int(glyph)] for glyph in labels[0, c]) for c in range(3)]

    assert spelled(("51337", 1, 9)) == ["513.....", "...37...", none]
    # of two texts in one cell nobody can say whose character is meant
    assert spelled(("307", 1, 2), ("10", 10, 14)) == ["??7.....", none, none]
    assert spelled(("307", 1, 2), ("10", 60, 2)) == ["307.....", none, "10......"]


def test_the_last_stage_asks_by_share_and_the_others_ask_everything_once():
    asked = {"relation": 8.0, "count": 1.0, "where": 1.0, "name": 1.0, "point": 1.0, "describe": 1.0}
    shares = {}
    for again in (False, True):
        mix = Mix({"objects": 1.0}, asked, again=again)
        families_asked = [q.family for s in draw_samples(mix, range(60), 0.0) for q in s.questions]
        shares[again] = families_asked.count("relation") / len(families_asked)
    assert shares[False] < 0.25 < 0.4 < shares[True]


def test_the_average_of_two_sets_of_weights_lies_between_them(study, tmp_path):
    model, chat = study
    old = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in old.parameters():
            value += torch.randn(value.shape, generator=generator) / 8
        old.decoder.layers[1].ffn.router.chosen.bias += 0.5
    save_checkpoint(old, shutil.copytree(CHECKPOINT, tmp_path / "old"))
    average.main("study", tmp_path / "old", tmp_path / "new", 0.75)
    between, _ = load(tmp_path / "new", dtype=torch.float32)
    asked = [{"role": "user", "content": "where is the red star?"}]
    assert load(tmp_path / "new")[1].prompt(asked).input_ids == chat.prompt(asked).input_ids
    a, b = model.state_dict(), old.state_dict()
    for name, value in between.state_dict().items():
        expected = (3 * a[name] + b[name]) / 4
        torch.testing.assert_close(value, expected, rtol=2**-8, atol=1e-6, msg=name)
    assert not (tmp_path / "new" / "evaluation.json").exists()  # its figures are those of other weights


def test_the_shipped_checkpoint_beats_constant_answers_clearly(study):
    """On scenes of the split "choose", so that the published figures stay those of scenes nobody looked at."""
    model, chat = study
    for family, margin in {"name": 0.4, "where": 0.35, "count": 0.3, "point": 0.3, "relation": 0.2}.items():
        (score,) = evaluate.evaluate(model, chat, [family], scenes=60, split="choose")
        assert score.accuracy > score.baseline + margin, score


def test_the_model_card_quotes_the_recorded_figures():
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    figures = json.loads((CHECKPOINT / "evaluation.json").read_text(encoding="utf-8"))
    assert {f["family"] for f in figures} == set(families.FAMILIES)
    scores = [evaluate.Score(**f) for f in figures]
    assert evaluate.table(scores) in card
    readme = (CHECKPOINT.parents[2] / "README.md").read_text(encoding="utf-8")
    assert evaluate.table(scores) in readme


def test_wilson_intervals_behave_at_the_ends():
    assert evaluate.wilson(0, 100)[0] == 0 and 0.03 < evaluate.wilson(0, 100)[1] < 0.05
    low, high = evaluate.wilson(50, 100)
    assert low == pytest.approx(0.404, abs=2e-3) and high == pytest.approx(0.596, abs=2e-3)


def test_a_reply_counts_by_the_root_of_its_length_and_nothing_else_counts(study):
    _, chat = study
    mix = Mix({"sums": 1.0}, second_turn=0.0, cut=0.0)
    planted = plant(chat, mix, draw_samples(mix, [3], 0.0))
    for number in planted.branches.unique():
        own = planted.branches == number
        learnt = (planted.targets[own] >= 0).sum()
        assert (number == 0) == (learnt == 0)
        counted = planted.weights[own][planted.targets[own] >= 0].sum()
        assert torch.isclose(counted, learnt.float().sqrt())
