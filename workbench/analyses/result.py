"""What every analysis returns: named arrays, what their axes are, the chance lines, and what they were computed from.

A Result is plain data: it needs no model, saves to a folder of CSV files beside one JSON file, and is what a default
figure is drawn from.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from workbench.runs import Run


@dataclass(frozen=True)
class Result:
    """`values[name]` has one entry of `axes[name]` for each of its dimensions: the axis' name and its labels."""

    analysis: str  # name on the command line, such as "expert-load"
    title: str  # one line for a person, with the unit
    values: Mapping[str, np.ndarray]
    axes: Mapping[str, Sequence[tuple[str, Sequence[Any]]]]
    chance: Mapping[str, Any] = field(default_factory=dict)  # by name of the value: a number, or an array that fits it
    about: Mapping[str, Any] = field(default_factory=dict)  # weights, prompts, how many, seed, and what to beware of

    def __post_init__(self) -> None:
        for name, array in self.values.items():
            shape = tuple(len(labels) for _, labels in self.axes[name])
            if array.shape != shape:
                raise ValueError(f"{self.analysis}: {name} has the shape {array.shape}, but its axes say {shape}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

    @property
    def weights(self) -> str:
        """The model whose numbers these are, as every figure has to name it."""
        return str(self.about.get("weights", "unknown weights"))

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """One value in long form: a dictionary an entry, with a column an axis."""
        labels = self.axes[name]
        for at, value in zip(product(*(values for _, values in labels)), self.values[name].flat, strict=True):
            yield {**dict(zip((axis for axis, _ in labels), at, strict=True)), name: value.item()}

    def save(self, folder: str | Path) -> list[Path]:
        """One CSV a value and `about.json`; returns what was written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name in self.values:
            path = folder / f"{name}.csv"
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [axis for axis, _ in self.axes[name]] + [name])
                writer.writeheader()
                writer.writerows(self.rows(name))
            written.append(path)
        about = {"analysis": self.analysis, "title": self.title, "about": self.about, "chance": self.chance}
        path = folder / "about.json"
        path.write_text(json.dumps(about, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")
        return [*written, path]


def about_runs(runs: Sequence[Run], **more: Any) -> dict[str, Any]:
    """What a Result says of the runs that it was computed from. Raises ValueError for none, or for runs of several
    weights.
    """
    if not runs:
        raise ValueError("there are no runs to analyse; give at least one")
    names = {(run.model_name, run.versions.get("weights", "")) for run in runs}
    if len(names) > 1:
        listed = ", ".join(sorted(f"{name} ({weights})" for name, weights in names))
        raise ValueError(f"the runs come from several weights: {listed}; analyse those of one model at a time")
    return {
        "weights": runs[0].model_name,
        "fingerprint": runs[0].versions.get("weights", ""),
        "runs": len(runs),
        "tokens": sum(len(run.token_ids) for run in runs),
        "prompts": [run.question for run in runs],
        "seeds": [run.seed for run in runs],
        "edits": sorted({str(edit) for run in runs for edit in run.edits}),
        **more,
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)
