"""What every notebook begins with, and how all of them are run again.

    python -m workbench.teaching notebooks/*.ipynb      # executes them in place, outputs included
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kimi_vl_ref import Chat, KimiVL, load
from workbench.analyses.given import name_of
from workbench.runs import fingerprint

SHOWN = ("torch", "transformers", "captum", "matplotlib")
LIMIT = 1800  # seconds a cell may take, on a loaded machine; and a kernel to start


def begin(source: str = "study", seed: int = 0) -> tuple[KimiVL, Chat]:
    """Loads "study" or a checkpoint folder, seeds torch, and prints versions, weights and device. Raises ValueError.

        model, chat = begin()                          # the line to change for the real weights
    """
    torch.manual_seed(seed)
    _show_figures()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, chat = load(source, device=device)
    size = sum(p.numel() for p in model.parameters())
    print(f"weights: {name_of(source)} ({fingerprint(model)}), {size / 1e6:,.1f} M parameters, {model.logits.weight.dtype}")
    print(f"device: {device}; python {sys.version.split()[0]}; {'; '.join(filter(None, map(_version, SHOWN)))}")
    return model, chat


def _show_figures() -> None:
    """A Figure that is the last value of a cell is drawn; without pyplot the kernel has not learnt that yet."""
    ipython = sys.modules.get("IPython")  # there is one in a notebook, and nowhere else is it needed
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:
        shell.run_line_magic("matplotlib", "inline")


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def execute(path: Path, out: Path | None = None) -> float:
    """Runs a notebook from top to bottom in a fresh kernel and writes it with its outputs; the seconds it took.

    Raises nbclient's CellExecutionError with the traceback of the first cell that fails; the file is then as before.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    began = time.monotonic()
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=LIMIT, startup_timeout=LIMIT, resources=where, record_timing=False).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # the same every time, so that a new run changes outputs only
    notebook.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(notebook, out or path)
    return time.monotonic() - began


def main(paths: Sequence[str]) -> None:
    for name in paths:
        took = execute(Path(name))
        print(f"{name}: {took:.0f} s, {Path(name).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
