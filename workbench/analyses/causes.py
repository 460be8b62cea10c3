"""What causes an answer: activations moved from one run to another (I1), and looks between groups of positions taken away (I3).

Letters: B rows, T tokens, L decoder layers, H heads, P patches, M visual tokens, D stream, U units that are patched one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from kimi_vl_ref import Chat, KimiVL
from kimi_vl_ref.moe import MoE
from workbench.edits import applied, block_attention
from workbench.study.batches import written_reply
from workbench.study.families import Question
from workbench.study.scenes import Scene
from workbench.tape import Edit, attach

from .occlusion import target_tokens
from .result import Result
from .trials import Batch, Trial, about_trials, batches, make_trial, read, scene_trial, score_batches, see

SITES = {
    "residual": "decoder.layers.{i}",
    "attention": "decoder.layers.{i}.attn",
    "heads": "decoder.layers.{i}.attn.core",
    "experts": "decoder.layers.{i}.ffn.experts",
    "routing": "decoder.layers.{i}.ffn.router.chosen",
    "patches": "vision.patches",
}
PAIRS = (("picture", "question"), ("picture", "last"), ("question", "last"), ("thought", "last"))

Units = Mapping[str, Sequence[int]]


# --- I1: activation patching ---------------------------------------------------------------------------------------------


def mirrored_trials(chat: Chat, scene: Scene, question: Question) -> tuple[Trial, Trial]:
    """A question of the family "where", about its picture and about the same picture seen in a mirror: one wording, one size,
    two answers. Raises ValueError for an answer that a mirror does not change.

        clean, corrupted = mirrored_trials(chat, *make("where", seed=1))
    """
    sides = {"left": "right", "right": "left"}
    answer = " ".join(sides.get(word, word) for word in question.answer.split())
    if question.family != "where" or answer == question.answer:
        raise ValueError(f"a mirror leaves the answer {question.answer!r} as it is; take a 'where' question about one side")
    width = scene.size[0]
    boxes = tuple((width - x1, y0, width - x0, y1) for x0, y0, x1, y1 in question.targets)
    other = replace(question, answer=answer, targets=boxes)
    content = [{"type": "image", "image": ImageOps.mirror(scene.image)}, {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    corrupted = make_trial(chat, messages, written_reply(other), boxes=boxes, domain=question.family)
    return scene_trial(chat, scene, question), corrupted


def role_groups(clean: Trial, corrupted: Trial) -> Units:
    """Positions of a pair that belong together: where the target is in either picture, the rest of the picture, the
    question, the rest of the prompt, and the row that predicts the answer.
    """
    seen, end = clean.positions("picture"), _split(clean, corrupted)
    target: list[int] = []
    if clean.boxes and corrupted.boxes:
        hit = target_tokens(clean.pictures[0].grid, clean.boxes) | target_tokens(clean.pictures[0].grid, corrupted.boxes)
        target = [seen[at] for at in np.flatnonzero(hit)]
    question = clean.positions("question")
    named = {*seen, *question, end - 1}
    rest = [at for at in range(end) if at not in named]
    groups = {
        "target": target,
        "rest of the picture": [at for at in seen if at not in target],
        "question": question,
        "other text": rest,
        "last row": [end - 1],
    }
    return {name: positions for name, positions in groups.items() if positions}


def activation_patching(
    model: KimiVL,
    pairs: Sequence[tuple[Trial, Trial]],
    *,
    model_name: str,
    site: str = "residual",
    groups: Callable[[Trial, Trial], Units] | None = None,
    layers: Sequence[int] | None = None,
    batch: int = 32,
) -> Result:
    """How far activations of one run, put into another, carry the answer over (paper I1; arXiv 2309.16042, 2404.15255).

        pairs = [mirrored_trials(chat, *make("where", seed)) for seed in (1, 2)]
        result = activation_patching(model, pairs, model_name="study", site="attention", groups=role_groups)
        result["denoise"]           # (layers, groups): 0 nothing, 1 the whole way to the clean run's answer

    pairs      (clean, corrupted): the same text about pictures of the same size, with two answers.
    site       "residual" (after the layer), "attention", "experts" (what they write), "routing" (who is chosen), by layer and
               unit of positions; "heads" by layer and head, at all positions; "patches" by visual token, before MoonViT.
    groups     the units of positions of a pair; default every position by itself, which takes pairs of one text.
    Scale: LD is the logit of the clean answer's first differing token minus the corrupted one's. "denoise" puts clean
    activations into the corrupted run: (LD - LD_corrupted) / (LD_clean - LD_corrupted). "noise" puts corrupted ones into the
    clean run, on the same scale turned round. Both are 0 when nothing is patched and 1 when everything is; means over pairs.
    Raises ValueError for pairs that differ in more than their pictures and answers.
    """
    if site not in SITES:
        raise ValueError(f"site is {site!r}; use one of {', '.join(SITES)}")
    chosen = _layers(model, site, layers)
    found: dict[str, list[np.ndarray]] = {"denoise": [], "noise": []}
    labels: list[list[str]] = []
    lead = []
    for clean, corrupted in pairs:
        units = _units(model, clean, corrupted, site, groups)
        labels.append(list(units))
        if labels[-1] != labels[0]:
            raise ValueError("the pairs do not have the same units of positions; give groups=, such as role_groups")
        runs = [_Side(model, trial, _split(clean, corrupted), clean, corrupted) for trial in (clean, corrupted)]
        whole = runs[0].lead - runs[1].lead
        if abs(whole) < 1e-6:
            raise ValueError(f"the two runs of {clean.question!r} lean alike, so there is no way between them; change the pair")
        lead.append([run.lead for run in runs])
        names = [SITES[site].format(i=layer) for layer in chosen]
        for name, base, source in (("denoise", runs[1], runs[0]), ("noise", runs[0], runs[1])):
            values = source.activations(names)
            moved = [base.patched(place, values[place], list(units.values()), batch) for place in names]
            found[name].append((np.stack(moved) - base.lead) / (source.lead - base.lead))
    about = about_trials(model, [trial for pair in pairs for trial in pair], model_name, pairs=len(pairs), site=site)
    about["logit_differences"] = lead
    about["beware"] = "denoise finds what is enough for the answer, noise what is needed; they need not agree"
    unit = {"heads": "head", "patches": "visual token"}.get(site, "position")
    axes = [("layer", chosen if site != "patches" else ["patches"]), (unit, labels[0])]
    return Result(
        "activation-patching",
        f"How far patching the {site} carries the answer over (0 nothing, 1 the whole way)",
        {name: np.mean(each, 0) for name, each in found.items()},
        {name: axes for name in found},
        about=about,
    )


@dataclass
class _Side:
    """One run of a pair, cut before the first token in which the replies differ."""

    model: KimiVL
    trial: Trial
    end: int
    clean: Trial
    corrupted: Trial

    def __post_init__(self) -> None:
        self.trial = replace(self.trial, ids=self.trial.ids[: self.end])
        self.wanted = int(self.clean.ids[self.end]), int(self.corrupted.ids[self.end])
        with torch.no_grad():
            self.visual = see(self.model, self.trial)
            self.lead = float(self._leads(read(self.model, self.trial, self.visual[None]))[0])

    def _leads(self, stream: Tensor) -> Tensor:
        logits = self.model.logits(stream[:, self.end - 1])
        return (logits[:, self.wanted[0]] - logits[:, self.wanted[1]]).double()

    @torch.no_grad()
    def activations(self, sites: Sequence[str]) -> dict[str, Tensor]:
        with attach(self.model, read=sites) as tape:
            read(self.model, self.trial)
        return {site: tape.last(site) for site in sites}

    @torch.no_grad()
    def patched(self, site: str, values: Tensor, units: Sequence[Sequence[int]], batch: int) -> np.ndarray:
        """LD of this run with another run's values at a site, unit after unit, (U,); one unit a row of the batch."""
        found = []
        for start in range(0, len(units), batch):
            some = units[start : start + batch]
            with attach(self.model, edit={site: _put(values, some)}):
                if site == "vision.patches":
                    trial = self.trial
                    assert trial.pixel_values is not None and trial.grids is not None
                    pixels = trial.pixel_values.to(values).repeat(len(some), 1, 1, 1)
                    visual = self.model.see(pixels, trial.grids.repeat(len(some), 1)).unflatten(0, (len(some), -1))
                else:
                    visual = self.visual.expand(len(some), -1, -1)
                found.append(self._leads(read(self.model, self.trial, visual)).cpu().numpy())
        return np.concatenate(found)


def _put(values: Tensor, units: Sequence[Sequence[int]]) -> Edit:
    """Row b of a batch gets `values` at the entries of unit b: positions of (B, T, ...), heads of (B, T, H, v), or patches of
    the pack (B * P, V).
    """

    def edit(tensor: Tensor, site: str) -> Tensor:
        if site == "vision.patches":
            rows = tensor.view(len(units), -1, tensor.shape[-1])
            for row, unit in enumerate(units):
                rows[row, list(unit)] = values[list(unit)]
        elif site.endswith(".core"):
            for row, unit in enumerate(units):
                tensor[row, :, list(unit)] = values[0][:, list(unit)]
        else:
            for row, unit in enumerate(units):
                tensor[row, list(unit)] = values[0, list(unit)]
        return tensor

    return edit


def _split(clean: Trial, corrupted: Trial) -> int:
    """The first position where the two replies differ. Raises ValueError unless all before it is the same."""
    same = min(len(clean.ids), len(corrupted.ids))
    differ = (clean.ids[:same] != corrupted.ids[:same]).nonzero().flatten()
    grids = [None if trial.grids is None else trial.grids.tolist() for trial in (clean, corrupted)]
    if grids[0] is None or grids[0] != grids[1]:
        raise ValueError(f"the pictures of the pair {clean.question!r} have the grids {grids}; use two of one size")
    if not len(differ):
        raise ValueError(f"both runs of {clean.question!r} have the reply {clean.reply!r}; a pair needs two answers")
    end = int(differ[0])
    if end not in clean.scored or end not in corrupted.scored:
        raise ValueError(f"the pair {clean.question!r} differs before its answer, at {clean.texts[end]!r}; use one wording")
    return end


def _layers(model: KimiVL, site: str, layers: Sequence[int] | None) -> list[int]:
    if site == "patches":
        return [0]
    able = [
        i for i, layer in enumerate(model.decoder.layers) if site not in ("experts", "routing") or isinstance(layer.ffn, MoE)
    ]
    if outside := [layer for layer in layers or () if layer not in able]:
        raise ValueError(f"layer {outside[0]} has no {site} to patch; use some of {able}")
    return able if layers is None else list(layers)


def _units(
    model: KimiVL, clean: Trial, corrupted: Trial, site: str, groups: Callable[[Trial, Trial], Units] | None
) -> Units:
    end = _split(clean, corrupted)
    if site == "heads":
        return {str(head): [head] for head in range(model.config.text.num_attention_heads)}
    if site == "patches":
        grid = clean.pictures[0].grid
        return {str(token): grid.patches_of_token(token) for token in range(grid.token_count)}
    if groups is None:
        seen = set(clean.positions("picture"))
        words = ["picture" if at in seen else clean.texts[at].strip("<|> ") for at in range(end)]
        return {f"{at} {word}": [at] for at, word in enumerate(words)}
    units = {name: [at for at in positions if at < end] for name, positions in groups(clean, corrupted).items()}
    return {name: positions for name, positions in units.items() if positions}


# --- I3: attention knockout ----------------------------------------------------------------------------------------------


def attention_knockout(
    model: KimiVL,
    trials: Sequence[Trial],
    *,
    model_name: str,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    window: int = 1,
    seed: int = 0,
) -> Result:
    """What an answer loses when one group of positions may not be looked at by another (paper I3; arXiv 2304.14767).

        result = attention_knockout(model, trials, model_name="study", window=2)
        result["change"]            # (pairs, first layer of the window): (p_ko - p) / p, -1 when the answer is gone

    pairs     (from, to): where information comes from and who may not fetch it; groups as in `Trial.positions`. A trial
              without one of them (no thought) does not count for that pair, and a pair that no trial has is left out.
    window    how many layers from the first one are blocked; "everywhere" has all layers blocked.
    p is the probability of the scored reply; values are means over trials. Beside each, "control" blocks as many positions
    drawn at random among all that those queries see: it shows what losing that many positions costs anyway.
    Raises ValueError for a window that the model does not have.
    """
    depth = len(model.decoder.layers)
    if not 1 <= window <= depth:
        raise ValueError(f"window={window} does not fit {depth} layers; use 1 to {depth}")
    starts = list(range(depth - window + 1))
    spans = [list(range(start, start + window)) for start in starts] + [list(range(depth))]
    seen = [batches(model, [trial], 1) for trial in trials]  # pictures are seen once; blocks act in the decoder
    before = [float(score_batches(model, one).logprob[0]) for one in seen]
    kept, counts = [], {}
    found: dict[str, list[np.ndarray]] = {"change": [], "control": []}
    for source, target in pairs:
        rng = np.random.default_rng(seed)
        changes: dict[str, list[list[float]]] = {"change": [], "control": []}
        for trial, x, p in zip(trials, seen, before, strict=True):
            keys, queries = knocked_out(trial, source, target)
            if not keys or not queries:
                continue
            control = random_positions(queries, len(keys), rng)
            for name, hidden in (("change", keys), ("control", control)):
                changes[name].append([_change(model, x, queries, hidden, span, p) for span in spans])
        if changes["change"]:
            kept.append(f"{source} to {target}")
            counts[kept[-1]] = len(changes["change"])
            for name, each in changes.items():
                found[name].append(np.mean(each, 0))
    if not kept:
        raise ValueError("no trial has both groups of any pair; choose other pairs or trials")
    values = {name: np.stack(each) for name, each in found.items()}
    axes = [("pair", kept), ("first layer", starts)]
    return Result(
        "attention-knockout",
        f"Change of the reply's probability when looks are blocked in {window} layer{'s' * (window > 1)}, as a share of it",
        {
            "change": values["change"][:, :-1],
            "control": values["control"][:, :-1],
            "change everywhere": values["change"][:, -1],
            "control everywhere": values["control"][:, -1],
        },
        {"change": axes, "control": axes, "change everywhere": axes[:1], "control everywhere": axes[:1]},
        chance={"change": 0.0},
        about=about_trials(
            model,
            trials,
            model_name,
            seed=seed,
            window=window,
            trials_of_pair=counts,
            beware="random positions may hit what a group's never are, such as the question: a control can lose more",
        ),
    )


def knocked_out(trial: Trial, source: str, target: str) -> tuple[list[int], list[int]]:
    """(keys, queries) of a pair of groups: queries see themselves, and only keys before them can be lost."""
    keys = trial.positions(source)
    queries = [at for at in trial.positions(target) if at not in keys and keys and at > keys[0]]
    return keys, queries


def random_positions(queries: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """As many positions as `count`, drawn among those that the queries see and that are not queries themselves."""
    pool = [at for at in range(max(queries)) if at not in queries]
    return sorted(rng.choice(pool, size=min(count, len(pool)), replace=False).tolist())


def _change(
    model: KimiVL, seen: list[Batch], queries: list[int], keys: list[int], layers: list[int], before: float
) -> float:
    with applied(model, [block_attention(queries, keys, layers=layers)], idle="report"):
        after = float(score_batches(model, seen).logprob[0])
    return float(np.expm1(after - before))  # (p_ko - p) / p
