"""Which room may import which, and what no file may do: unpickle, or run code that came with weights.

kimi_vl_ref <- workbench <- demos, notebooks, benchmarks. Read from the source; nothing is imported.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_OPEN = {
    "kimi_vl_ref": {"kimi_vl_ref"},
    "workbench": {"kimi_vl_ref", "workbench"},
    "demos": {"kimi_vl_ref", "workbench", "demos"},
    "notebooks": {"kimi_vl_ref", "workbench"},
    "benchmarks": {"kimi_vl_ref", "workbench", "benchmarks"},
}
MODEL_NEEDS = {"torch", "einops", "safetensors", "numpy", "PIL", "tiktoken"}
# `kimi-vl demo` starts the page, and `kimi-vl bench` the benchmarks, without knowing anything of them
PERMITTED = {("workbench/cli.py", "demos.app"), ("workbench/cli.py", "benchmarks.speed")}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# in two halves, so that this file does not hold what it looks for
FORBIDDEN = ["trust_remote_code" + "=True", "pickle" + ".load", "torch" + ".load(", "allow_pickle" + "=True"]
TEXTS = {".py", ".ipynb", ".md", ".toml", ".yml", ".txt", ".lock", ".js", ".html", ".css", ".sh"}


def sources(room: str) -> list[Path]:
    return sorted(
        p
        for p in (ROOT / room).rglob("*")
        if p.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in p.parts
    )


def code(path: Path) -> str:
    """The Python of a file; of a notebook, its code cells without the lines that are for the shell."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = ("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    return "\n".join(
        "" if line.lstrip().startswith(("%", "!")) else line for cell in cells for line in cell.split("\n")
    )


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all a source imports, at run time too; relative ones stay in their room."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__", "run_module") and isinstance(name, str):
                yield node.lineno, name


def offences(room: str, source: str, where: str) -> list[str]:
    """What a source of a room imports and may not."""
    found = []
    for line, name in imports(source):
        top = name.partition(".")[0]
        if top in MAY_OPEN or top == "tests":
            wrong = top not in MAY_OPEN[room] and (where, name) not in PERMITTED
        else:
            wrong = room == "kimi_vl_ref" and top not in MODEL_NEEDS | sys.stdlib_module_names
        if wrong or top in UNPICKLERS:
            found.append(f"{where}:{line} imports {name}")
    return found


@pytest.mark.parametrize("room", MAY_OPEN)
def test_doors_open_one_way(room: str):
    found = [
        o for path in sources(room) for o in offences(room, code(path), path.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n".join(found)


def test_the_packages_are_there_to_be_read():
    assert all(len(sources(room)) > 1 for room in ("kimi_vl_ref", "workbench", "demos"))


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("kimi_vl_ref", "import workbench.sites"),
        ("kimi_vl_ref", "def f():\n    from workbench import tape"),
        ("kimi_vl_ref", "import transformers"),
        ("kimi_vl_ref", "import matplotlib.pyplot as plt"),
        ("kimi_vl_ref", "from importlib import import_module\nimport_module('workbench')"),
        ("workbench", "from demos import app"),
        ("workbench", "import importlib\nimportlib.import_module('demos.app')"),
        ("workbench", "import notebooks"),
        ("workbench", "from tests import peers"),
        ("demos", "import benchmarks.speed"),
        ("workbench", "import pickle"),
    ],
)
def test_a_wrong_import_is_seen(room: str, source: str):
    assert len(offences(room, source, f"{room}/planted.py")) == 1


def test_right_imports_pass():
    source = "import json, torch\nfrom torch.nn import functional\nfrom .rope import x\nimport kimi_vl_ref"
    assert not offences("kimi_vl_ref", source, "kimi_vl_ref/planted.py")
    assert not offences("demos", source + "\nimport gradio, workbench.sites", "demos/planted.py")


def test_no_file_unpickles_or_runs_code_from_a_checkpoint():
    rooms = [*MAY_OPEN, "tests", "requirements", "docs", ".ci"]
    files = [p for p in ROOT.iterdir() if p.is_file()] + [
        p for room in rooms for p in (ROOT / room).rglob("*")
    ]
    found = []
    for path in files:
        if path.suffix in TEXTS or path.name in ("Makefile", "run"):
            text = path.read_text(encoding="utf-8")
            found += [f"{path.relative_to(ROOT)} has {words}" for words in FORBIDDEN if words in text]
    assert len(files) > 20 and not found, "\n".join(found)
