"""What analyses need besides their trials when they are called by name: a patch, boxes, maps to compare, labels to probe.

Functions of what was asked for (`given.Posed`), used by `registry_models`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kimi_vl_ref import KimiVL
from kimi_vl_ref.chat import Prompt
from kimi_vl_ref.images import Picture
from workbench.study.evaluate import messages
from workbench.study.families import make
from workbench.study.scenes import Scene

from . import attribution, causes, economy, eyes, lens, localise, occlusion, probes
from .given import Posed
from .result import Result, about_runs
from .trials import Box, Trial

OTHER_SCENES = 12  # on which heads are found that then point on a picture
SITES = ("vision.layers.*", "projector", "decoder.layers.*")


# ---- pictures and places


def picture(posed: Posed) -> Picture:
    """The picture that is looked at, with its grid. Raises ValueError for one that does not exist."""
    if not 0 <= posed.picture < len(posed.pictures):
        raise ValueError(f"picture {posed.picture} does not exist; there are {len(posed.pictures)}, counted from 0")
    image = posed.pictures[posed.picture]
    return Picture(image, posed.chat.processor.grid(*image.size))


def patch(posed: Posed) -> int:
    """The patch at the point asked for; else what the question is about, else the middle of the picture."""
    grid = picture(posed).grid
    box = truth(posed) or (0.0, 0.0, *map(float, grid.original))
    return grid.patch_at(*(posed.at or ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)))


def truth(posed: Posed) -> Box | None:
    """The first box that the one question about a scene is about; None if unknown."""
    if posed.images or posed.picture or not posed.pairs[0][1].targets:
        return None
    return posed.pairs[0][1].targets[0]


def boxes(posed: Posed) -> list[Box]:
    """What each located question is about, the first thing of it."""
    return [posed.pairs[at][1].targets[0] for at in posed.located]


def located_trials(posed: Posed) -> list[Trial]:
    return [posed.trials[at] for at in posed.located]


# ---- looks


def relevancy(posed: Posed) -> Result:
    run = posed.run
    written = [at for at in range(run.prompt_length, len(run.token_ids)) if run.roles[at] == "answer"]
    token = posed.position if posed.position is not None else (written or [run.prompt_length])[0]
    return eyes.relevancy(posed.net, posed.chat.processor, run, token)


def localisation(posed: Posed) -> Result:
    """Heads of the first half of the scenes, judged on the second. Raises ValueError for fewer than two scenes."""
    runs, half = [posed.runs[at] for at in posed.located], len(posed.located) // 2
    if not half:
        raise ValueError("one scene finds no heads to judge on another; use --scenes 2 or more")
    heads = localise.localisation_heads(runs[:half]).about["heads"]
    return localise.localisation(runs[half:], boxes(posed)[half:], heads, seed=posed.seed)


def pointing(posed: Posed) -> Result:
    """The map and the box of heads that were found on other scenes: map (rows, columns), box (4,) in pixels."""
    others = [make("where", number) for number in range(posed.seed + 1, posed.seed + 1 + OTHER_SCENES)]
    runs = [posed.recorded(messages(scene, question), max_new_tokens=1) for scene, question in others]
    heads = localise.localisation_heads(runs).about["heads"]
    heat, box = localise.localise(posed.run, heads, posed.picture)
    axes: dict[str, Any] = {
        "map": [("row", range(heat.shape[0])), ("column", range(heat.shape[1]))],
        "box": [("side", ["x0", "y0", "x1", "y1"])],
    }
    about = about_runs([posed.run], heads=heads, found_on=f"{OTHER_SCENES} scenes of 'where'", truth=truth(posed))
    return Result("pointing", "Where the localisation heads point", {"map": heat, "box": np.array(box)}, axes, {}, about)


def relative_attention(posed: Posed) -> Result:
    neutral = posed.recorded(posed.conversation("describe the picture."), max_new_tokens=1)
    return localise.relative_attention(posed.run, neutral, posed.picture)


# ---- thoughts


def length_reward(posed: Posed) -> Result:
    """Sampled replies to one question, at temperature 1."""
    seeds = range(posed.seed * posed.samples, (posed.seed + 1) * posed.samples)
    runs = [posed.recorded(posed.conversations[0], temperature=1.0, seed=seed) for seed in seeds]
    return economy.length_rewards(runs, posed.pairs[0][1].check)


# ---- lenses and probes


def patch_lens(posed: Posed) -> Result:
    found = lens.logit_lens(posed.net, posed.chat, posed.run, posed.run.positions(f"image {posed.picture}").tolist())
    return replace(found, analysis="patch-lens", title="What each layer would say next at each visual token")


def last_layer(posed: Posed) -> int:
    return len(posed.net.decoder.layers) - 1


# What a visual token shows, by the name of the thing there ("red circle", "7", "" for nothing) and its cell; None: not asked
LABELS: Mapping[str, Callable[[str, tuple[int, int]], str | None]] = {
    "colour": lambda name, _: name.split()[0] if " " in name else None,
    "shape": lambda name, _: name.split()[1] if " " in name else None,
    "character": lambda name, _: name if len(name) == 1 else None,
    "row": lambda _, cell: str(cell[0]),
    "column": lambda _, cell: str(cell[1]),
}


def probed(posed: Posed) -> Result:
    """Probes of a label of LABELS on the visual tokens of each first picture; the control task is drawn for each cell."""
    if posed.label not in LABELS:
        raise ValueError(f"--label {posed.label!r} is unknown; use one of {', '.join(LABELS)}")
    prompts = posed.prompts
    labels: list[str | None] = []
    cells: list[tuple[int, int]] = []
    for prompt, (scene, _) in zip(prompts, posed.pairs, strict=True):
        grid = prompt.pictures[0].grid
        for token, name in enumerate(lens.shown_on(grid, lens.named_objects(scene))):
            cells.append(divmod(token, grid.token_grid[1]))
            labels.append(LABELS[posed.label](name, cells[-1]))
    kept = np.array([label is not None for label in labels])
    if not kept.any():
        raise ValueError(f"no visual token of {', '.join(posed.families)} has a {posed.label}; ask another --family or --label")
    found, group = probes.features(posed.net, prompts, SITES, where=_first_picture)
    about = probes.about_prompts(posed.net, posed.model_name, prompts, families=list(posed.families), label=posed.label)
    named = np.array([label or "" for label in labels])[kept]
    types = np.array(cells)[kept]
    some = {site: value[kept] for site, value in found.items()}
    return probes.linear_probes(some, named, group[kept], about, types=types, splits=3, seed=posed.seed)


def _first_picture(prompt: Prompt) -> list[int]:
    return [at for at, role in enumerate(prompt.roles) if role == "image 0"]


def similarity(posed: Posed) -> Result:
    found, _ = probes.features(posed.net, posed.prompts, SITES)
    return probes.similarity(found, probes.about_prompts(posed.net, posed.model_name, posed.prompts), seed=posed.seed)


def modality_gap(posed: Posed) -> Result:
    prompts = posed.prompts
    found, _ = probes.features(posed.net, prompts, where=lambda prompt: range(len(prompt.input_ids)))
    seen = np.concatenate([[role.startswith("image ") for role in prompt.roles] for prompt in prompts])
    return probes.modality_gap(found, seen, probes.about_prompts(posed.net, posed.model_name, prompts), seed=posed.seed)


def shapes(model: KimiVL) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the first matrix of each group of weights."""
    found: dict[str, tuple[int, int]] = {}
    for group, _, matrices in probes.weight_matrices(model):
        found.setdefault(group, (matrices.shape[1], matrices.shape[2]))
    return found


# ---- causes and maps


def patching(posed: Posed) -> Result:
    """Pairs of a scene and its mirror image. Raises ValueError for a family that has none, which is any but "where"."""
    if list(posed.families) != ["where"]:
        raise ValueError(f"a mirror changes no answer of {', '.join(posed.families)}; use --family where, alone")
    by_group = posed.site not in ("heads", "patches")
    if posed.site == "patches" and posed.scenes != 1:
        raise ValueError("patches are compared within one picture; use --site patches with --scenes 1")
    pairs, number = [], posed.first
    while len(pairs) < (posed.scenes or 1):
        scene, question = make("where", number)
        number += 1
        if isinstance(scene, Scene) and {"left", "right"} & set(question.answer.split()):
            pairs.append(causes.mirrored_trials(posed.chat, scene, question))
    groups = causes.role_groups if by_group else None
    layers = one_layer(posed)
    return causes.activation_patching(
        posed.net, pairs, model_name=posed.model_name, site=posed.site, groups=groups, layers=layers
    )


def one_layer(posed: Posed) -> list[int] | None:
    return None if posed.layer is None else [posed.layer]


def maps(posed: Posed) -> dict[str, occlusion.MapMaker]:
    """Maps that compete in T3."""
    model, name = posed.net, posed.model_name

    def gradients(trial: Trial) -> np.ndarray:
        found = attribution.integrated_gradients(model, trial, model_name=name, steps=16)["routing free"]
        return trial.pictures[0].grid.token_heat(found)

    return {
        "attention": occlusion.attention_map(model),
        "gradient x input": lambda trial: trial.pictures[0].grid.token_heat(attribution.gradient_input(model, trial)),
        "integrated gradients": gradients,
        "occlusion": lambda trial: occlusion.occlusion(model, trial, model_name=name)["loss"],
    }


def swept(posed: Posed, sweep: Callable[..., Result], **options: Any) -> Result:
    """One of the sweeps, whose finished cases are kept in the folder that the figure goes to."""
    found = sweep(
        path=posed.out / "sweep.jsonl",
        model_name=posed.model,
        families=posed.families,
        scenes=posed.scenes,
        first=posed.first,
        seed=posed.seed,
        workers=posed.workers,
        progress=posed.progress,
        **options,
    )
    return replace(found, about={**found.about, "weights": posed.model_name})
