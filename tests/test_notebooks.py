"""Every notebook runs from top to bottom with its asserts alive, and keeps to the shape of the course."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from workbench.teaching import execute

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_000_000  # bytes, outputs included


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    execute(path, tmp_path / path.name)
    ran = cells(tmp_path / path.name, "code")
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    assert sum("assert " in cell.source for cell in ran) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_to_the_shape_of_the_course(path):
    code, text = cells(path, "code"), "\n".join(cell.source for cell in cells(path, "markdown"))
    assert path.stat().st_size < LARGEST
    assert "begin(" in code[0].source and "weights:" in str(code[0].outputs)
    assert all(cell.source.count("\n") < 10 for cell in code), "a cell of more than ten lines"
    assert all(cell.execution_count for cell in code), "committed without having been run"
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs), "no figure was drawn"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert text.count("## Exercise") == 2 and "What would prove this wrong" in text and "## Papers" in text
    assert sum("solution" in cell.metadata.get("tags", []) for cell in code) >= 2
    everything = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/", everything), "a path of somebody's machine"


def test_the_syllabus_lists_every_notebook():
    syllabus = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\((\d\d_\w+\.ipynb)\)", syllabus) == [path.name for path in NOTEBOOKS]
