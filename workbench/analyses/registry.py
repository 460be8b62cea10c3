"""Analyses by name: what `kimi-vl analyse` can do with recorded runs, and with a model and pictures."""

from __future__ import annotations

from difflib import get_close_matches

from .given import Entry, flag
from .registry_models import MODELS
from .registry_runs import RUNS

ENTRIES: dict[str, Entry] = {**RUNS, **MODELS}

TAKES = {
    "runs": "From recorded runs: kimi-vl analyse NAME RUN... (--family or --image in place of runs records them first)",
    "questions": "From a model and scenes, or your picture: NAME [--family F --scenes N] or NAME --image P --question '...'",
    "pictures": "From a model and pictures alone: NAME [--family F --scenes N] or NAME --image P",
    "scenes": "From a model and scenes, whose truth is known: NAME [--family F --scenes N --seed S]",
    "weights": "From a model's weights: NAME [--model FOLDER]",
}


def find(name: str) -> Entry:
    """The entry of this name. Raises ValueError for an unknown one, naming near ones and all."""
    if name not in ENTRIES:
        near = get_close_matches(name, ENTRIES, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no analysis is called {name!r}; {hint}The names are: {', '.join(ENTRIES)}")
    return ENTRIES[name]


def listing() -> list[str]:
    """Lines for the eye: names in the groups of TAKES, with the number in the paper's list, what each shows and its options."""
    width = max(map(len, ENTRIES))
    lines: list[str] = []
    for takes, title in TAKES.items():
        group = {name: entry for name, entry in ENTRIES.items() if entry.takes == takes}
        lines += ["", title] if lines else [title]
        lines += [f"  {name:{width}}  {one.paper:3}  {one.line}{_needs(one)}" for name, one in group.items()]
    return lines


def _needs(entry: Entry) -> str:
    one = {"runs": "; one run", "pictures": "; one picture"}.get(entry.takes, "; one question") if entry.one else ""
    options = ", ".join(map(flag, dict.fromkeys([*entry.uses, *entry.uses_of_yours])))
    return f"{one} ({options})" if options else one
