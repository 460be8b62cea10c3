"""What an answer loses without parts of the picture (paper I5): visual tokens replaced by the mean one, tokens dropped after a
layer as FastV does, blank and shuffled pictures; each ablation beside a random one of equal size.

"wrong" is the share of formerly right trials that are no longer right; right means that greedy decoding would write every
scored token. Letters: M visual tokens of a trial, D decoder stream, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kimi_vl_ref import KimiVL
from workbench.edits import ablate_visual_tokens, applied, block_attention
from workbench.rows import decoder_rows
from workbench.tape import attach

from .attribution import gradient_input
from .occlusion import target_tokens
from .result import Result
from .trials import Batch, Scores, Trial, about_trials, batches, by_domain, domains, read, score, score_batches, see

SETS = ("object", "random, as many", "gradient, as many", "object + 1 ring", "random, as many as the ring")
PICTURES = ("blank picture", "shuffled picture")


def visual_token_ablation(
    model: KimiVL, trials: Sequence[Trial], *, model_name: str, draws: int = 3, seed: int = 0
) -> Result:
    """How often a right answer turns wrong when visual tokens are replaced by the mean one (paper I5; arXiv 2410.07149).

        result = visual_token_ablation(model, trials, model_name="study")
        result["wrong"]             # (sets, domains), beside result["loss"] and result["tokens"]

    Sets: the tokens that show the trial's boxes; those and the ring around them; as many drawn at random outside the object
    (mean of `draws`); the same count with the highest |gradient x input|. Beside them the blank (mid-grey) picture and the
    one whose visual tokens' cells are shuffled. The mean is over the visual tokens of all trials. "loss" is in nats a scored
    token more, "tokens" how many were replaced. Domains without a right trial have nan. Raises ValueError for trials
    without boxes or without exactly one picture.
    """
    rng = np.random.default_rng(seed)
    before = score(model, trials)
    with torch.no_grad():
        bank = torch.cat([see(model, trial) for trial in trials])
    names = [*SETS, *PICTURES]
    wrong, loss = np.full((len(names), len(trials)), np.nan), np.zeros((len(names), len(trials)))
    tokens = np.zeros((len(names), len(trials)))
    for t, trial in enumerate(trials):
        sets = _token_sets(model, trial, draws, rng)
        for n, name in enumerate(names):
            if name in sets:
                after = [_without_tokens(model, trial, chosen, bank) for chosen in sets[name]]
                tokens[n, t] = len(sets[name][0])
            else:
                after = [score(model, [other_picture(trial, name, rng)])]
                tokens[n, t] = trial.pictures[0].grid.token_count
            loss[n, t] = np.mean([one.nll[0] for one in after]) - before.nll[t]
            if before.right[t]:
                wrong[n, t] = np.mean([not one.right[0] for one in after])
    values = {name: np.stack([by_domain(trials, row) for row in rows]) for name, rows in
              (("wrong", wrong), ("loss", loss), ("tokens", tokens))}  # fmt: skip
    return Result(
        "visual-token-ablation",
        "Formerly right answers that turn wrong without parts of the picture, share",
        values,
        dict.fromkeys(values, [("taken away", names), ("domain", domains(trials))]),
        about=about_trials(model, trials, model_name, right_before=int(before.right.sum()), draws=draws, seed=seed),
    )


def other_picture(trial: Trial, kind: str, rng: np.random.Generator) -> Trial:
    """The trial about a blank (mid-grey) or a shuffled picture: the cells of its visual tokens in another order."""
    assert trial.pixel_values is not None
    grid = trial.pictures[0].grid
    if kind == "blank picture":
        return replace(trial, pixel_values=torch.zeros_like(trial.pixel_values))
    order = rng.permutation(grid.token_count)
    shuffled = torch.empty_like(trial.pixel_values)
    for here, there in enumerate(order):
        shuffled[grid.patches_of_token(here)] = trial.pixel_values[grid.patches_of_token(int(there))]
    return replace(trial, pixel_values=shuffled)


def grown(hit: np.ndarray) -> np.ndarray:
    """bool (rows, columns) with the eight neighbours of every true cell added."""
    padded = np.pad(hit, 1)
    rows, columns = hit.shape
    return np.any([padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)], axis=0)


def _token_sets(model: KimiVL, trial: Trial, draws: int, rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """For each of SETS the visual tokens (M' numbers), once or for several draws."""
    hit = target_tokens(trial.pictures[0].grid, trial.boxes)
    shown, ring = np.flatnonzero(hit), np.flatnonzero(grown(hit))
    outside = np.flatnonzero(~hit)
    if not len(outside):
        raise ValueError(f"the target of {trial.question!r} fills the whole picture, which leaves no control; leave it out")

    def drawn(count: int) -> list[np.ndarray]:
        return [rng.choice(outside, min(count, len(outside)), replace=False) for _ in range(draws)]

    steepest = np.argsort(-np.abs(gradient_input(model, trial)), kind="stable")[: len(shown)]
    return dict(zip(SETS, ([shown], drawn(len(shown)), [steepest], [ring], drawn(len(ring))), strict=True))


def _without_tokens(model: KimiVL, trial: Trial, tokens: np.ndarray, bank: torch.Tensor) -> Scores:
    with applied(model, [ablate_visual_tokens(tokens.tolist(), "mean", values=bank)]):
        return score(model, [trial])


def visual_token_dropping(
    model: KimiVL,
    trials: Sequence[Trial],
    *,
    model_name: str,
    layer: int = 1,
    shares: Sequence[float] = (0, 0.25, 0.5, 0.75, 0.9),
    seed: int = 0,
) -> Result:
    """Right answers when visual tokens that got little attention in a layer are dropped after it (arXiv 2403.06764, FastV).

        result = visual_token_dropping(model, trials, model_name="study", layer=1)
        result["right"]             # (shares dropped, domains), beside "random" and "most attended"

    Attention received is the mean over heads and over all rows after the picture, in decoder layer `layer`; from the next
    layer on nothing looks at the dropped tokens, which is what taking them out of the sequence does to the rest. "random"
    drops as many at random, "most attended" the other end, as a check that attention ranks anything at all. Raises
    ValueError for a layer with none after it.
    """
    depth = len(model.decoder.layers)
    if not 0 <= layer < depth - 1:
        raise ValueError(f"layer={layer} has no layer after it in which tokens could be dropped; use 0 to {depth - 2}")
    rng = np.random.default_rng(seed)
    names = ("right", "random", "most attended")
    right = {name: np.zeros((len(shares), len(trials))) for name in names}
    loss = {name: np.zeros((len(shares), len(trials))) for name in names}
    for t, trial in enumerate(trials):
        seen = batches(model, [trial], 1)
        received = attention_received(model, trial, layer)
        orders = {"right": np.argsort(received, kind="stable"), "random": rng.permutation(len(received))}
        orders["most attended"] = orders["right"][::-1]
        for s, share in enumerate(shares):
            for name in names:
                after = _without_looks(model, seen, orders[name][: round(share * len(received))], layer)
                right[name][s, t], loss[name][s, t] = after.right[0], after.nll[0]
    values = {name: np.stack([by_domain(trials, row) for row in rows]) for name, rows in right.items()}
    losses = {"loss": "right", "random loss": "random", "most attended loss": "most attended"}
    values |= {name: np.stack([by_domain(trials, row) for row in loss[of]]) for name, of in losses.items()}
    return Result(
        "visual-token-dropping",
        f"Right answers when visual tokens are dropped after layer {layer}, share",
        values,
        dict.fromkeys(values, [("dropped", list(shares)), ("domain", domains(trials))]),
        about=about_trials(model, trials, model_name, layer=layer, seed=seed),
    )


@torch.no_grad()
def attention_received(model: KimiVL, trial: Trial, layer: int) -> np.ndarray:
    """Attention that each visual token gets in one decoder layer: the mean over heads and the rows after the picture, (M,)."""
    seen = trial.positions("picture")
    if not seen:
        raise ValueError(f"the trial {trial.question!r} has no picture; give one that has")
    rows = list(range(seen[-1] + 1, len(trial.ids)))
    site = f"decoder.layers.{layer}.attn.core@in"
    with attach(model, read=[site], keep=lambda given, _: decoder_rows(given, rows)[0].mean((0, 1))) as tape:
        read(model, trial)
    return tape.last(site)[seen].double().cpu().numpy()


def _without_looks(model: KimiVL, seen: list[Batch], tokens: np.ndarray, layer: int) -> Scores:
    (trial,) = seen[0].trials
    places = trial.positions("picture")
    dropped = sorted(places[token] for token in tokens)
    if not dropped:
        return score_batches(model, seen)
    others = sorted(set(range(len(trial.ids))) - set(dropped))
    layers = list(range(layer + 1, len(model.decoder.layers)))
    with applied(model, [block_attention(others, dropped, layers=layers)]):
        return score_batches(model, seen)
