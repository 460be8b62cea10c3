"""Every function that a researcher calls shows in its docstring how, and the call there fits the function; every analysis has a
name on the command line.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import workbench.analyses
from workbench import blocks, edits, parity, released, sites, sweeps, tape, thoughts
from workbench.analyses import trials

INSTRUMENT = [
    *(getattr(edits, name) for name in edits.__all__ if name[0].islower() and name != "in_force"),
    blocks.blocked, blocks.blocked_patches,
    parity.compare, released.as_transformers, released.released_sites,
    sites.sites, sites.sizes, sites.skeleton, sites.listing, sites.match,
    thoughts.cut_thought, thoughts.edit_thought, thoughts.insert_thought, thoughts.continue_from, thoughts.sentences,
    trials.make_trial, trials.scene_trial, trials.study_trials, trials.run_trial, trials.score,
]  # fmt: skip
IN_MODULE = [tape.attach, sweeps.sweep, parity.walk, parity.probe]  # shown where the module says what it is for


def analyses() -> list[Callable[..., Any]]:
    """What returns a Result; the command's own way of asking (posing.py, registries) is not for calling."""
    found = []
    for entry in pkgutil.iter_modules(workbench.analyses.__path__):
        if entry.name in ("posing", "command") or entry.name.startswith("registry"):
            continue
        module = importlib.import_module(f"workbench.analyses.{entry.name}")
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                if inspect.signature(value).return_annotation == "Result":
                    found.append(value)
    return found


def calls(function: Callable[..., Any], text: str) -> list[ast.Call]:
    """The calls of a function in the lines of a text that are code by themselves."""
    found = []
    for line in text.splitlines():
        code = line.strip()
        if f"{function.__name__}(" not in code:
            continue
        try:
            tree = ast.parse(f"{code}\n    pass" if code.endswith(":") or ": " in code and code.startswith("with ") else code)
        except SyntaxError:
            continue  # a sentence that mentions the function
        found += [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node) == function.__name__]
    return found


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def fits(function: Callable[..., Any], call: ast.Call) -> None:
    """Raises TypeError for arguments that the function does not take, or does not get."""
    signature, named = inspect.signature(function), {word.arg: None for word in call.keywords if word.arg is not None}
    open_ended = any(isinstance(one, ast.Starred) for one in call.args) or any(word.arg is None for word in call.keywords)
    given = [None for one in call.args if not isinstance(one, ast.Starred)]
    (signature.bind_partial if open_ended else signature.bind)(*given, **named)


@pytest.mark.parametrize("function", [*analyses(), *INSTRUMENT], ids=lambda one: f"{one.__module__}.{one.__name__}")
def test_a_function_shows_how_it_is_called(function: Callable[..., Any]) -> None:
    shown = calls(function, inspect.getdoc(function) or "")
    assert shown, f"the docstring of {function.__name__} calls it nowhere"
    for call in shown:
        fits(function, call)


@pytest.mark.parametrize("function", IN_MODULE, ids=lambda function: function.__name__)
def test_a_module_shows_how_its_function_is_called(function: Callable[..., Any]) -> None:
    shown = calls(function, inspect.getdoc(inspect.getmodule(function)) or "")
    assert shown
    for call in shown:
        fits(function, call)


def test_every_analysis_has_a_name() -> None:
    """Public functions of the analyses that return a Result; a name's own functions are in the modules of the registry."""
    folder = Path(workbench.analyses.__path__[0])
    named = "".join((folder / f"{module}.py").read_text() for module in ("registry_runs", "registry_models", "posing"))
    inner = {"budget.budget_curve"}  # the arithmetic of thought_budget
    found = [f"{one.__module__.split('.')[-1]}.{one.__name__}" for one in analyses()]
    assert len(found) > 50
    missing = [name for name in found if not re.search(rf"\b{re.escape(name)}\b", named) and name not in inner]
    assert not missing, "write an Entry for them"


def test_a_call_that_does_not_fit_is_seen() -> None:
    def scaled(value: float, *, by: float) -> float:
        return value * by

    def fitting(text: str) -> list[ast.Call]:
        return calls(scaled, text)

    fits(scaled, fitting("scaled(2, by=3)")[0])
    fits(scaled, fitting("with scaled(*many, by=2):")[0])
    for wrong in ("scaled(2, 3)", "scaled(2, factor=3)", "scaled(by=3)", "scaled(2, by=3, more=1)"):
        with pytest.raises(TypeError):
            fits(scaled, fitting(wrong)[0])
    assert fitting("as scaled(2, by=3) does, and") == []
