"""Claims of the report in miniature, each measured by one command with its control beside it.

    kimi-vl study claim thinking          # or native, rope, experts, landing, balance, needle; `all` for the seven

A claim is a table and a sentence that says whether it held in this measurement. Nothing is tuned on the scenes that are
reported: the split is "report", as for the table of accuracies.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kimi_vl_ref import Chat, KimiVL, load
from kimi_vl_ref.rope import Rotation
from workbench.analyses.routing import kind_information
from workbench.runs import Run, record
from workbench.tape import attach

from .evaluate import ask, check_json_path, count_right, messages, wilson
from .families import make
from .kinds import needle
from .kinds.tiny import shrunk
from .landing import landing
from .scenes import Level, Scene
from .views import Album, View

BUDGETS = (0, 4, 8, 12, 16, 24, 32, 48, 64)
# Larger than any picture in training, of scenes (224 pixels a side) and of the other kinds (504)
BEYOND = Level("beyond", size=(532, 672), objects=(3, 8), side=(28, 46), number_chance=0.0)


@dataclass(frozen=True)
class Claim:
    name: str
    statement: str
    holds: bool
    verdict: str  # one sentence with the figures that decide
    rows: list[dict[str, Any]]  # the table, controls included
    about: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(row.get(key, "")) for key in columns) + " |" for row in self.rows]
        return "\n".join(lines)


def thinking(model: KimiVL, chat: Chat, scenes: int = 500, split: str = "report") -> Claim:
    """Thinking helps: accuracy without a thought, with budgets, with its own, and with another scene's thought.

    The control is a finished thought of the same kind about another picture: if any text of that length would do, it
    would help as much. Training cut a tenth of all thoughts short, so an early answer is nothing new to the model.
    """
    rows, falls = [], {}
    for family in ("sum", "count"):
        pairs = [make(family, seed, split) for seed in range(scenes)]
        shares: dict[str, float] = {}

        def measure(name: str, right: int, family: str = family, shares: dict[str, float] = shares) -> None:
            shares[name] = right / scenes
            rows.append({"family": family, "thought": name, **_share(right, scenes)})

        for budget in BUDGETS:
            name = "forced empty" if budget == 0 else f"at most {budget} tokens"
            measure(name, count_right(pairs, ask(model, chat, pairs, thought_budget=budget)))
        own = ask(model, chat, pairs)
        measure("its own", count_right(pairs, own))
        others = [thought for thought, _ in own[1:] + own[:1]]
        measure("another scene's (control)", count_right(pairs, ask(model, chat, pairs, thoughts=others)))
        falls[family] = 100 * (shares["its own"] - shares["forced empty"])
    holds = all(fall >= 20 for fall in falls.values())
    told = " and ".join(f"{family} falls by {fall:.1f} points" for family, fall in falls.items())
    return Claim("thinking", "Thinking helps", holds, f"With the thought forced empty, {told} (asked: 20).", rows)


def native(model: KimiVL, chat: Chat, scenes: int = 500, split: str = "report") -> Claim:
    """Native resolution helps: a small thing at full, half and quarter size.

    Controls: pictures shrunk and enlarged again (as many tokens as before, the detail gone), and `name`, whose things
    are large, shrunk alike. What enlarging brings back was lost to fewer and coarser tokens; the rest was detail.
    """
    rows, shares = [], {}
    for family in ("tiny", "name"):
        pairs = [make(family, seed, split) for seed in range(scenes)]
        for factor in (1.0, 0.5, 0.25):
            for back in (False, True) if factor < 1 else (False,):
                changed = [(_resized(pictures, factor, back), question) for pictures, question in pairs]
                right = count_right(changed, ask(model, chat, changed))
                how = "native" if factor == 1 else f"{factor:g} of the size" + (", enlarged again (control)" if back else "")
                shares[family, factor, back] = 100 * right / scenes
                tokens = sum(-(-w // 28) * -(-h // 28) for p, _ in changed for w, h in (i.size for i in p.images)) / scenes
                who = family if family == "tiny" else f"{family} (control)"
                rows.append({"family": who, "pictures": how, "visual tokens": round(tokens), **_share(right, scenes)})
    full, half, quarter = (shares["tiny", factor, False] for factor in (1.0, 0.5, 0.25))
    lost = shares["name", 1.0, False] - shares["name", 0.5, False]
    again = shares["tiny", 0.25, True]
    holds = full > half + 10 and full > quarter + 10 and full - half > lost  # once it guesses, it can fall no further
    verdict = f"tiny: {full:.1f} at native size, {half:.1f} at half, {quarter:.1f} at a quarter ({again:.1f} enlarged again); "
    verdict += f"name loses {lost:.1f} at half."
    return Claim("native", "Native resolution helps", holds, verdict, rows)


def _resized(pictures: Scene | Album, factor: float, back: bool) -> Scene | Album:
    if factor == 1:
        return pictures
    album = pictures if isinstance(pictures, Album) else Album(tuple(View(v.image) for v in pictures.views), pictures.seed)
    small = shrunk(album, factor)
    if not back:
        return small
    return Album(
        tuple(View(s.image.resize(v.size)) for s, v in zip(small.views, album.views, strict=True)), album.seed
    )


def rope(model: KimiVL, chat: Chat, scenes: int = 300, split: str = "report") -> Claim:
    """2-D RoPE helps: scenes larger than any in training, with the rotation in MoonViT and without it.

    Controls: the same without the learned position table in place of the rotation, and both at sizes seen in training.
    Nothing is retrained, so this says what the trained model leans on, not what it could learn without.
    """
    rows, shares = [], {}
    parts: dict[str, dict[str, Any]] = {
        "as trained": {},
        "no 2-D RoPE": {"swap": {"vision.layers.*": WithoutRotation}},
        "no position table (control)": {"edit": {"vision.positions": lambda table, _: torch.zeros_like(table)}},
    }
    for size, level in (("as in training", "full"), ("larger than any in training", BEYOND)):
        for family in ("where", "name", "point"):
            pairs = [make(family, seed, split, level) for seed in range(scenes)]
            for name, change in parts.items():
                with attach(model, **change):
                    right = count_right(pairs, ask(model, chat, pairs, batch=25))
                shares[size, family, name] = 100 * right / scenes
                rows.append({"scenes": size, "family": family, "MoonViT": name, **_share(right, scenes)})
    falls = {
        family: shares["larger than any in training", family, "as trained"]
        - shares["larger than any in training", family, "no 2-D RoPE"]
        for family in ("where", "name", "point")
    }
    holds = sum(falls.values()) / len(falls) > 5
    told = ", ".join(f"{family} by {fall:.1f}" for family, fall in falls.items())
    return Claim("rope", "2-D RoPE helps", holds, f"On larger scenes, without RoPE, accuracy falls: {told} points.", rows)


class WithoutRotation(nn.Module):
    """A MoonViT layer whose queries and keys are not turned."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, rotation: Rotation, packing: Any) -> Tensor:
        cos, sin = rotation
        return self.layer(x, (torch.ones_like(cos), torch.zeros_like(sin)), packing)


def experts(model: KimiVL, chat: Chat, scenes: int = 15, split: str = "report") -> Claim:
    """Experts specialise: information between an expert's choice and the kind of its token, beside shuffled kinds."""
    runs = [_recorded(model, chat, *make(f, seed, split)) for f in EVERY_KIND for seed in range(scenes)]
    result = kind_information(runs)
    clear = result["information_low"] > 2 * result["shuffled_high"]
    layers = runs[0].moe_layers
    rows = [
        {
            "layer": layer,
            "information, bits": f"{result['information'][at]:.3f}",
            "shuffled kinds (control), 97.5%": f"{result['shuffled_high'][at]:.3f}",
            "MaxVio": f"{result['max_vio'][at]:.2f}",
            "dead experts": int(result["dead"][at]),
        }
        for at, layer in enumerate(layers)
    ]
    dead = int(result["dead"].sum())
    holds = clear.sum() > len(layers) / 2 and dead == 0
    verdict = f"{int(clear.sum())} of {len(layers)} layers are clear of the shuffled control; {dead} experts are dead."
    return Claim("experts", "Experts specialise", bool(holds), verdict, rows, {"runs": len(runs)})


EVERY_KIND = ("describe", "count", "point", "read", "relation", "sum", "chart", "window", "compare", "frames", "wide")


def _recorded(model: KimiVL, chat: Chat, pictures: Scene | Album, question: Any) -> Run:
    *_, run = record(model, chat, messages(pictures, question), model_name="study")
    assert isinstance(run, Run)
    return run


def lands(model: KimiVL, chat: Chat, scenes: int = 200, split: str = "report") -> Claim:
    """Attention lands: a fixed set of heads, found on one half of the scenes and reported on the other."""
    rows, ratios = [], {}
    for family in ("point", "read", "count"):
        found = landing(model, chat, family, scenes, split)
        ratios[family] = found.ratio
        rows.append(
            {
                "family": family,
                "at": found.moment,
                "heads (layer.head)": ", ".join(f"{layer}.{head}" for layer, head in found.heads),
                "target : mean distractor": f"{found.ratio:.1f} ({found.low:.1f} to {found.high:.1f})",
                "a distractor in its place (control)": f"{found.misplaced:.2f}",
                "as many random heads (control)": f"{found.random_heads:.1f}",
                "share on the target": f"{found.mass:.2f}",
                "scenes": found.scenes,
            }
        )
    holds = all(ratio >= 3 for ratio in ratios.values())
    told = ", ".join(f"{family} {ratio:.1f}" for family, ratio in ratios.items())
    return Claim("landing", "Attention lands", holds, f"Target over mean distractor, by area: {told} (asked: 3).", rows)


def balance(model: KimiVL, chat: Chat, steps: int = 60, repeats: int = 3) -> Claim:
    """Balance without a loss: training goes on from the checkpoint with the biases at zero, once with their update, once
    without, on the same batches. The load is that of the last third of the steps.
    """
    from .train import continue_briefly

    rows, ends = [], {True: [], False: []}
    for seed in range(repeats):
        for update in (True, False):
            violations = continue_briefly(model, chat, steps, seed, update)
            end = sum(violations[-(steps // 3) :]) / (steps // 3)
            ends[update].append(end)
            how = "on" if update else "off (control)"
            rows.append({"seed": seed, "bias update": how, "MaxVio, last third of the steps": f"{end:.2f}"})
    worst, best = max(ends[True]), min(ends[False])
    verdict = f"MaxVio ends at {worst:.2f} or less with the update and at {best:.2f} or more without."
    return Claim("balance", "Balance without a loss", best > worst, verdict, rows, {"steps": steps})


def haystack(model: KimiVL, chat: Chat, scenes: int = 100, split: str = "report") -> Claim:
    """A needle is found in a long context: at a quarter, a half and all of the longest context in training, by depth.

    Controls: the answer to another hay, right by accident only; and a guess that never looks for what is asked, the
    commonest colour with the commonest shape: only an accuracy above it says that anything was found.
    """
    rows, shares = [], {}
    for share in (0.25, 0.5, 1.0):
        for variant in needle.VARIANTS:
            length = int(share * needle.LONGEST[variant])
            pairs = []
            for seed in range(scenes):
                depth = (seed % 5 + 0.5) / 5
                album, asked = needle.draw(seed, split, "full", length=length, depth=depth, variant=variant)
                pairs.append((album, asked[seed % 2]))  # the number that a name has, and the name that a number has
            replies = ask(model, chat, pairs, batch=20)
            hits = [question.check(answer) for (_, question), (_, answer) in zip(pairs, replies, strict=True)]
            astray = count_right(pairs, replies[2:] + replies[:2])
            shares[share, variant] = sum(hits) / scenes
            depths = {f"depth {(d + 0.5) / 5:.1f}": f"{100 * sum(hits[d::5]) / len(hits[d::5]):.0f}" for d in range(5)}
            tokens = sum(len(chat.prompt(messages(*pair)).input_ids) for pair in pairs[:10]) / 10
            guessed = sum(question.check(commonest(album, question.text)) for album, question in pairs)
            row = {"hay": f"{length} {variant}", "tokens": round(tokens), **_share(sum(hits), scenes), **depths}
            row |= {"another hay's answer (control)": f"{100 * astray / scenes:.1f}"}
            rows.append(row | {"commonest colour and shape (control)": f"{100 * guessed / scenes:.1f}"})
    quarter, full = (min(shares[share, variant] for variant in needle.VARIANTS) for share in (0.25, 1.0))
    verdict = f"At least {100 * quarter:.1f} at a quarter of the context (asked: 95), {100 * full:.1f} at all of it (85)."
    return Claim("needle", "A needle is found in a long context", quarter >= 0.95 and full >= 0.85, verdict, rows)


def commonest(album: Album, text: str) -> str:
    """The commonest colour with the commonest shape among the pictures of a hay, or among its lines: a guess."""
    held = [o.name for view in album.views for o in view.objects]
    names = held if len(held) > 1 else re.findall(r"(\w+ \w+) \d+\.", text)
    return " ".join(Counter(words).most_common(1)[0][0] for words in zip(*(name.split() for name in names), strict=True))


CLAIMS: dict[str, Callable[..., Claim]] = {
    "thinking": thinking,
    "native": native,
    "rope": rope,
    "experts": experts,
    "landing": lands,
    "balance": balance,
    "needle": haystack,
}


def _share(right: int, n: int) -> dict[str, str]:
    low, high = wilson(right, n)
    return {"right": f"{100 * right / n:.1f}", "95% interval": f"{100 * low:.1f} to {100 * high:.1f}"}


def main(
    names: Sequence[str], model: str = "study", scenes: int | None = None, json_path: str | Path | None = None
) -> list[Claim]:
    """Prints each claim with its table; `scenes` replaces the number of scenes (or, for balance, of steps)."""
    check_json_path(json_path)
    unknown = [name for name in names if name not in CLAIMS and name != "all"]
    if unknown:
        raise ValueError(f"there is no claim {unknown[0]!r}; choose among {', '.join(CLAIMS)} or all")
    chosen = list(CLAIMS) if "all" in names else list(names)
    loaded, chat = load(model)
    done = []
    for name in tqdm(chosen, desc="claims", disable=len(chosen) == 1):
        claim = CLAIMS[name](loaded, chat, *([] if scenes is None else [scenes]))
        done.append(claim)
        print(f"\n{claim.statement}: {'held' if claim.holds else 'NOT held'}. {claim.verdict} Weights: {model}.\n")
        print(claim.table())
    if json_path is not None:
        Path(json_path).write_text(json.dumps([asdict(claim) for claim in done], indent=2) + "\n", encoding="utf-8")
    return done
