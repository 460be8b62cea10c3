"""Where the decoder looks: attention by kind of position and over time (V5), sinks and massive activations (V6).

V5 takes recorded runs; V6 gives a run to its model once more, since a run keeps no rows of the prompt. Letters: N runs,
L layers, H heads, T positions, G groups of positions, W written tokens, D channels. Attention is not an explanation: a sink
takes a large share and may pass nothing on (rows.py has norm-weighted rows for that).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kimi_vl_ref import KimiVL
from kimi_vl_ref.images import ImageProcessor
from workbench.rows import decoder_rows
from workbench.tape import attach

from .replay import replayed
from .result import Result, about_runs

if TYPE_CHECKING:
    from workbench.runs import Run

SCRATCH = 1 << 24  # numbers of one (H, rows, T) block of attention
WRITTEN = ("thought", "answer")


# --- V5 ------------------------------------------------------------------------------------------------------------------


def modality_mass(runs: Sequence[Run], written: Sequence[str] = WRITTEN) -> Result:
    """V5: how much the model looks at each kind of position while it writes. FastV, arXiv 2403.06764, section 3.

    mass (L, G): probability on the group, mean over heads, written tokens and runs; a layer adds up to 1. mass_by_run
    (N, L, G) the same for each run. efficiency (L, G): mass divided by how many positions of the group could be seen, so
    that a long picture and a short question compare. Chance is attention spread evenly over everything visible.

    written: roles of the tokens whose writing counts. All pictures are one group, "image". A written token counts with the
    row that wrote it, that of the token before. Raises ValueError for runs without such tokens, or of several weights.

        result = modality_mass(runs)
        result["mass"][:, list(result.axes["mass"][1][1]).index("image")]      # (L,)
    """
    about = about_runs(runs, written=list(written))
    groups = list(dict.fromkeys(_group(role) for run in runs for role in run.roles))
    masses, efficiencies, chances, rates = zip(*(_mass(run, groups, written) for run in runs), strict=True)
    layers = [("layer", range(len(masses[0])))]
    group_axis = [("group", groups)]
    return Result(
        "modality-mass",
        f"Share of attention on each kind of position while {' and '.join(written)} are written",
        {"mass": np.mean(masses, 0), "mass_by_run": np.stack(masses), "efficiency": _mean(efficiencies)},
        {
            "mass": layers + group_axis,
            "mass_by_run": [("run", range(len(runs))), *layers, *group_axis],
            "efficiency": layers + group_axis,
        },
        chance={"mass": np.mean(chances, 0), "mass_by_run": np.stack(chances)[:, None], "efficiency": _mean(rates)},
        about=about | {"rows": sum(len(_rows(run, written)) for run in runs)},
    )


def _mass(run: Run, groups: Sequence[str], written: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Of one run: mass (L, G), efficiency (L, G), and both for attention spread evenly, (G,) each."""
    rows = _rows(run, written)
    if not len(rows):
        raise ValueError(f"the run about {run.question!r} wrote nothing as {' or '.join(written)}; give other roles or runs")
    by_role = run.role_mass[:, :, rows - run.first_row].astype(np.float64).mean(1)  # (L, W, roles)
    member = np.array([[_group(role) == group for group in groups] for role in run.role_names], np.float64)
    mass = by_role @ member  # (L, W, G)
    counts = _visible(run, groups)[rows]  # (W, G)
    seen = rows[:, None] + 1
    each = np.where(counts > 0, counts, np.nan)
    return mass.mean(1), _mean(np.moveaxis(mass / each, 1, 0)), (counts / seen).mean(0), _mean(each / each / seen)


def attention_timeline(run: Run) -> Result:
    """V5 over time: how much each written token looked at each picture.

    mass (L, W, pictures): probability, mean over heads; chance (W, pictures) is attention spread evenly over everything
    visible, and falls as the text grows. `received i` (rows, columns): the mean probability that each visual token of picture
    i received, over layers, heads and written tokens (phi of FastV, arXiv 2403.06764).

        result = attention_timeline(run)
        result["mass"].mean(0)[:, 0]       # (W,) on the first picture
    """
    rows = np.arange(max(run.prompt_length - 1, run.first_row), len(run.token_ids) - 1)
    if not run.pictures or not len(rows):
        raise ValueError("a timeline needs a picture and a written token; record a run that has both")
    pictures = [f"image {number}" for number in range(len(run.pictures))]
    at = rows - run.first_row
    columns = [run.role_names.index(name) for name in pictures]
    mass = run.role_mass[:, :, at][..., columns].astype(np.float64).mean(1)
    counts = np.array([picture.grid.token_count for picture in run.pictures])
    seen = rows[:, None] + 1
    values = {"mass": mass}
    axes: dict[str, Any] = {
        "mass": [("layer", range(len(mass))), ("token", (rows + 1).tolist()), ("picture", range(len(pictures)))]
    }
    chance: dict[str, Any] = {"mass": counts / seen}
    for number, picture in enumerate(run.pictures):
        received = run.picture_attention[:, :, at, run.tokens_of_picture(number)].astype(np.float64).mean((0, 1, 2))
        heat = values[f"received {number}"] = picture.grid.token_heat(received)
        axes[f"received {number}"] = [("row", range(heat.shape[0])), ("column", range(heat.shape[1]))]
        chance[f"received {number}"] = float((1 / seen).mean())
    words = [run.texts[token] for token in rows + 1]
    roles = [run.roles[token] for token in rows + 1]
    title = "Share of attention on each picture, by written token"
    return Result("attention-timeline", title, values, axes, chance, about_runs([run], words=words, roles=roles))


def _rows(run: Run, written: Sequence[str]) -> np.ndarray:
    """Positions whose row wrote a token of these roles."""
    tokens = run.positions(*written)
    rows = tokens[tokens >= run.prompt_length] - 1
    return rows[rows >= run.first_row]


def _group(role: str) -> str:
    return "image" if role.startswith("image ") else role


def _visible(run: Run, groups: Sequence[str]) -> np.ndarray:
    """How many positions of each group a query at each position sees, itself included: (T, G)."""
    return np.cumsum([[_group(role) == group for group in groups] for role in run.roles], axis=0)


def _mean(values: Any) -> np.ndarray:
    """Mean over the first axis of what is not nan; nan where nothing is."""
    array = np.asarray(values, np.float64)
    known = ~np.isnan(array)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, array, 0).sum(0) / np.maximum(count, 1), np.nan)


# --- V6 ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_sinks(model: KimiVL, processor: ImageProcessor, run: Run, epsilon: float = 0.3) -> Result:
    """V6: positions that later ones look at whatever is asked. Gu et al., arXiv 2410.10781; StreamingLLM, 2309.17453.

    received (L, T): mean over the queries from a position on of their attention to it, mean over heads; its chance is
    attention spread evenly, sum over q >= k of 1/(q+1), divided by T - k. sink (T): the share of all heads of all layers in
    which that mean is above epsilon. The last few positions are judged by few queries, and the very last by itself alone.

        result = attention_sinks(model, chat.processor, run)
        result["sink"].argmax()        # usually the first position
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon} is not a share; give a number between 0 and 1, such as 0.3")
    site = "decoder.layers.*.attn.core@in"
    with attach(model, read={site: lambda inputs, _: received(inputs).cpu()}) as tape:
        model.decoder(replayed(model, processor, run))
    alpha = torch.stack([tape[name][0] for name in tape.sites]).double().numpy()  # (L, H, T)
    count = alpha.shape[-1]
    later = np.cumsum(1 / np.arange(1, count + 1)[::-1])[::-1]  # sum over q >= k of 1 / (q + 1)
    sink = (alpha > epsilon).mean((0, 1))
    found = [
        {"position": int(at), "text": run.texts[at], "role": run.roles[at], "share": float(sink[at])}
        for at in np.argsort(-sink, kind="stable")[:5]
        if sink[at] > 0
    ]
    return Result(
        "attention-sinks",
        f"Attention sinks: share of heads that give a position more than {epsilon:.0%} on average",
        {"received": alpha.mean(1), "sink": sink},
        {"received": [("layer", range(len(alpha))), ("position", range(count))], "sink": [("position", range(count))]},
        chance={"received": later / np.arange(count, 0, -1)},
        about=about_runs([run], epsilon=epsilon, largest=found),
    )


def received(inputs: tuple[Any, ...]) -> Tensor:
    """Mean attention that each key gets from the queries that see it, (H, T): inputs of one core in a pass without cache."""
    q_nope = inputs[0]
    count, heads = q_nope.shape[1:3]
    total = torch.zeros(heads, count, dtype=torch.float64, device=q_nope.device)
    for rows in torch.arange(count, device=q_nope.device).split(max(1, SCRATCH // (heads * count))):
        total += decoder_rows(inputs, rows)[0].double().sum(1)
    return total / torch.arange(count, 0, -1, device=q_nope.device)


@torch.no_grad()
def massive_activations(
    model: KimiVL, processor: ImageProcessor, run: Run, above: float = 100.0, times_median: float = 1000.0
) -> Result:
    """V6: single numbers of the stream that dwarf all others. Sun et al., arXiv 2402.17762, section 2.

    A number x of the stream after a layer is massive if |x| > `above` and |x| >= `times_median` times the median |x| of that
    layer's whole stream. layer, position, channel and value (each (found,)) list them, the largest first; top (L + 1, 3) are
    the three largest |x| and median (L + 1) the median, from the embedding (-1) to the last layer. `channels` of the about
    counts in how many layers a channel is massive.

        result = massive_activations(model, chat.processor, run)
        list(zip(result["layer"], result["position"], result["channel"], result["value"]))
    """
    x = replayed(model, processor, run)
    keeps = ("embedded", "decoder.layers.*")

    def measure(stream: Tensor, _site: str = "") -> tuple[Tensor, Tensor, Tensor]:
        size = stream[0].float().abs()
        median = size.flatten().kthvalue((size.numel() + 1) // 2).values
        at = ((size > above) & (size >= times_median * median)).nonzero()  # (found, 2)
        values = stream[0].float()[at[:, 0], at[:, 1]]
        return size.flatten().topk(min(3, size.numel())).values.cpu(), median.cpu(), torch.cat([at, values[:, None]], 1).cpu()

    with attach(model, read={keeps[1]: measure}) as tape:
        model.decoder(x)
    measured = [measure(x), *(tape[site][0] for site in tape.sites)]
    layers = range(-1, len(measured) - 1)
    tops, medians, lists = zip(*measured, strict=True)
    found = sorted(
        ((layer, int(t), int(d), float(v)) for layer, rows in zip(layers, lists, strict=True) for t, d, v in rows.tolist()),
        key=lambda one: -abs(one[3]),
    )
    columns = zip(*found, strict=True) if found else ((), (), (), ())
    numbers = dict(zip(("layer", "position", "channel", "value"), map(np.array, columns), strict=True))
    where = {one[2]: {other[0] for other in found if other[2] == one[2]} for one in found}
    return Result(
        "massive-activations",
        f"Numbers of the stream above {above:g} and {times_median:g} times the median",
        {**numbers, "top": torch.stack(tops).numpy(), "median": torch.stack(medians).numpy()},
        {
            **dict.fromkeys(numbers, [("found", range(len(found)))]),
            "top": [("stream after layer", layers), ("rank", range(1, 1 + len(tops[0])))],
            "median": [("stream after layer", layers)],
        },
        about=about_runs(
            [run], above=above, times_median=times_median, channels={channel: len(where[channel]) for channel in where}
        ),
    )
