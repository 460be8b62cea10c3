"""pyproject.toml, the locks, environment.yml, Makefile and README say the same thing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from test_imports import code, imports, sources

ROOT = Path(__file__).parent.parent
PYTHONS = ["3.11.2", "3.12.1", "3.13.0"]  # 3.11.2 is Debian's
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("kimi_vl_ref", "workbench", "demos")
GROUPS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


def direct(group: str) -> dict[str, Requirement]:
    """The direct requirements of a group, the model's own included, groups that it names opened."""
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, [*GROUPS[""], *GROUPS[group]]):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                found |= direct(extra)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def pins(lock: str, python: str = "3.12.1") -> dict[str, Version]:
    """Name and version of each line of a lock that holds on Linux with this Python."""
    environment = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, Version] = {}
    for line in (ROOT / "requirements" / lock).read_text().splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        (exact,) = requirement.specifier  # one clause and no more
        assert exact.operator == "==" and "*" not in exact.version, f"{lock}: '{line}' is not one version"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{lock} pins {name} twice for Python {python}"
        found[name] = Version(exact.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("group", ["demos", "dev"])
def test_the_lock_pins_every_direct_dependency_inside_its_range(group: str, python: str):
    locked = pins(f"{group}.lock", python)
    missing = direct(group).keys() - locked.keys()
    assert not missing, f"requirements/{group}.lock lacks {sorted(missing)}; run `make lock`"
    outside = [
        f"{n}=={locked[n]}: not '{r}'" for n, r in direct(group).items() if locked[n] not in r.specifier
    ]
    assert not outside, "\n".join(outside)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_page_runs_on_the_versions_that_are_tested(python: str):
    demos, dev = pins("demos.lock", python), pins("dev.lock", python)
    differ = {name: (str(v), str(dev.get(name))) for name, v in demos.items() if dev.get(name) != v}
    assert demos and not differ


def test_every_range_has_an_upper_bound():
    open_ended = [r for group in GROUPS.values() for r in group if not re.search("<|kimi-vl-workbench", r)]
    assert open_ended == ["packaging>=24"]  # its versions are years, and it breaks nobody


def test_the_locks_name_no_index_and_no_folder():
    for lock in (ROOT / "requirements").iterdir():
        text = lock.read_text()
        assert not re.search(r"https?:|file:|index-url|find-links|@ | /\w", text), lock.name
        assert not re.search(r"^(nvidia|cuda|triton)\S*==", text, re.M), f"{lock.name} pins CUDA packages"


def test_conda_gets_the_versions_of_the_lock():
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert "python=3.12" in wanted
    (from_pip,) = (entry["pip"] for entry in wanted if isinstance(entry, dict))
    assert {"-c requirements/dev.lock", "-e ."} <= set(from_pip)
    pinned = [Requirement(text) for text in from_pip if not text.startswith("-")]
    locked, declared = pins("dev.lock"), direct("dev")
    expected = {name: (f"=={locked[name]}", declared[name].extras) for name in declared}
    assert {canonicalize_name(r.name): (str(r.specifier), r.extras) for r in pinned} == expected


def test_what_a_package_imports_is_declared_in_its_group():
    """The model's in the core, the workbench's and the page's in the groups that install them."""
    distributions = packages_distributions()
    rooms = {"kimi_vl_ref": direct(""), "demos": direct("demos"), "workbench": direct("notebooks")}
    for room, declared in rooms.items():
        for path in sources(room):
            for line, name in imports(code(path)):
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top in (*rooms, "benchmarks"):  # the command says where those are
                    continue
                names = {canonicalize_name(d) for d in distributions.get(top, [])}
                where = f"{path.relative_to(ROOT)}:{line}"
                assert names & declared.keys(), f"{where} imports {top}, which its group lacks"


def test_python_versions_agree():
    makefile = (ROOT / "Makefile").read_text()
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info[:2] < (3, 14)" in makefile


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_documents_name_only_commands_that_exist(document: str):
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / document).read_text(), re.M))
    assert named and named <= targets(), named - targets()


def test_the_readme_names_only_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme) + re.findall(r"`(tests/\w+\.py)`", readme)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing, missing


def test_the_wheel_carries_what_the_packages_need(tmp_path: Path):
    """Built from a copy, with the setuptools of the lock and no network."""
    for package in PACKAGES:
        copytree(ROOT / package, tmp_path / package, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*build, "--wheel-dir", tmp_path / "out", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(tmp_path).as_posix()
        for package in PACKAGES
        for path in (tmp_path / package).rglob("*")
        if path.suffix in (".py", ".html", ".css", ".js", ".typed")
        or (path.is_file() and "checkpoint" in path.parts)
    }
    assert expected <= inside, f"left out of the wheel: {sorted(expected - inside)}"
    assert {name.partition("/")[0].partition("-")[0] for name in inside} == {*PACKAGES, "kimi_vl_workbench"}
