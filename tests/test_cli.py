"""`kimi-vl`: whatever is typed wrongly is one sentence on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from workbench import cli


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chat"], "question"),
        (["chat", "  "], "empty"),
        (["chat", "--seed", "-1", "what?"], "--seed"),
        (["chat", "--temperature", "warm", "what?"], "--temperature"),
        (["chat", "--nonsense", "what?"], "--nonsense"),
        (["chat", "--fit", "int3", "what?"], "int3"),
        (["chat", "--model", "no/such/folder", "what?"], "no/such/folder"),
        (["demo", "--port", "99999"], "--port"),
        (["study"], "command"),
        (["study", "evaluate", "--scenes", "0"], "scenes"),
        (["paint"], "paint"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kimi-vl: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("the picture\nis   torn; use another"), "the picture is torn; use another"),
        (
            FileNotFoundError(2, "No such file or directory", "gone.png"),
            "gone.png: No such file or directory",
        ),
        (OSError("port 7860 is taken"), "port 7860 is taken"),
        (
            ModuleNotFoundError("No module named 'gradio'", name="gradio"),
            "gradio is not installed: pip install 'kimi-vl-workbench[demos]'",
        ),
    ],
)
def test_what_the_library_raises_is_one_sentence(error, says, capsys, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=fail))
    assert cli.main(["demo", "--port", free_port()]) == 2
    assert capsys.readouterr().err == f"kimi-vl: {says}\n"


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    def fail(**_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=fail))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo", "--port", free_port()])


def test_demo_starts_the_page_with_what_was_asked_for(monkeypatch):
    calls = []
    page = SimpleNamespace(main=lambda **options: calls.append(options))
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: {"demos.app": page}[name])
    port = free_port()
    assert cli.main(["demo", "--model", "folder", "--host", "0.0.0.0", "--port", port]) == 0
    assert calls == [{"model": "folder", "against": None, "host": "0.0.0.0", "port": int(port)}]


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_a_port_that_cannot_be_opened_is_one_sentence(host: str, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["demo", "--host", host, "--port", port]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"kimi-vl: port {port} at {host} cannot be opened") and err.count("\n") == 1


def test_a_reply_is_printed_once_as_it_grows(capsys):
    thought, whole = "\nOne, two.", "\nTwo. "
    steps = [SimpleNamespace(thought=thought[:n], answer="") for n in range(len(thought) + 1)]
    steps += [SimpleNamespace(thought=thought, answer=whole[:n]) for n in range(len(whole) + 1)]
    steps += [SimpleNamespace(thought="One, two.", answer="Two.")]  # stripped at the end
    assert cli.show(steps) is steps[-1]
    assert capsys.readouterr().out == "One, two.\n\nTwo. \n"


def test_help_does_not_wait_for_torch():
    check = "import sys, workbench.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0 and all(name in done.stdout for name in ("chat", "demo", "study"))
