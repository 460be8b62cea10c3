"""Many visitors at once on the page: is every answer the one a single visitor gets, how long is the wait, is memory flat?

    python -m benchmarks.visitors --visitors 50 --minutes 10 --plot docs/visitors.png

The page runs in a process of its own with the study model. Each visitor has a scene, a question and a seed of their own and
samples at temperature 0.7. First each asks alone; then all ask again and again at once, over HTTP as the browser does. Every
answer is compared with the one alone: words, attention, routing and pictures, all that the viewer is sent but the run's number.
An answer that holds anything of another visitor's is therefore not equal.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx

from workbench.study.families import make

FAMILIES = ("count", "where", "read", "point", "name", "sum")
LONGEST = 48  # tokens of a reply


@dataclass
class Page:
    """The page in its own process, and the numbers of the events that a visitor sets off."""

    process: subprocess.Popen[bytes]
    address: str
    events: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls) -> Page:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "workbench.cli", "demo", "--port", str(port)]
        page = cls(subprocess.Popen(command, stdout=subprocess.DEVNULL), f"http://127.0.0.1:{port}")
        until = time.monotonic() + 300
        while True:
            try:
                config = httpx.get(f"{page.address}/config", timeout=10).json()
                break
            except (httpx.HTTPError, ValueError):
                if time.monotonic() > until or page.process.poll() is not None:
                    raise RuntimeError("the page did not start") from None
                time.sleep(0.5)
        names = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
        for number, event in enumerate(config["dependencies"]):
            for id, kind in event["targets"]:
                page.events.setdefault(f"{names.get(id)}.{kind}", event.get("id", number))
        return page

    def memory(self) -> float:
        """MB resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1000


class Visitor:
    """One browser's worth of state: a session, a picture, a question, a seed."""

    def __init__(self, page: Page, number: int):
        self.page, self.number, self.session = page, number, f"visitor{number:04d}x{time.monotonic_ns()}"
        scene, asked = make(FAMILIES[number % len(FAMILIES)], 500 + number)
        file = BytesIO()
        scene.image.save(file, "PNG")
        self.picture, self.question = file.getvalue(), asked.text
        self.http = httpx.Client(base_url=f"{page.address}/gradio_api", timeout=900)
        self.alone: dict[str, Any] = {}
        self.waits: list[float] = []
        self.wrong: list[str] = []

    def event(self, name: str, data: list[Any], told: Any = None) -> dict[str, Any]:
        """Sets off an event and returns the last thing it gave."""
        asked = {"data": data, "event_data": told, "fn_index": self.page.events[name], "session_hash": self.session}
        self.http.post("/queue/join", json={**asked, "trigger_id": None}).raise_for_status()
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(str(message["output"])[:300])
                    return message["output"]
        raise RuntimeError("the page closed the line before the answer")

    def bring(self) -> None:
        """Uploads the picture; it is the only one then."""
        files = {"files": (f"{self.number}.png", self.picture, "image/png")}
        path = self.http.post("/upload", files=files).raise_for_status().json()[0]
        self.event("picture.arrange", [], {"what": "add", "files": [{"path": path, "name": "own.png"}]})

    def ask(self) -> dict[str, Any]:
        output = self.event("ask-button.click", [self.question, 0.7, -1, LONGEST, self.number])
        run = output["data"][0]
        if isinstance(run, dict) and run.get("__type__") == "update":
            run = run["value"]
        if run.get("kind") != "run":
            raise RuntimeError(f"no answer but {str(run)[:200]}")
        return {name: value for name, value in run.items() if name != "id"}

    def go_on(self, until: float) -> None:
        """Asks until the time is over."""
        while time.monotonic() < until:
            began = time.monotonic()
            try:
                found = self.ask()
                differing = [name for name in self.alone if found.get(name) != self.alone[name]]
                if differing:
                    self.wrong.append(f"visitor {self.number}: {', '.join(differing)} differ from the answer alone")
            except Exception as error:
                self.wrong.append(f"visitor {self.number}: {type(error).__name__}: {str(error)[:200]}")
                time.sleep(1)
            self.waits.append(time.monotonic() - began)


def plot(path: Path, memory: list[tuple[float, float]], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([at / 60 for at, _ in memory], [mb for _, mb in memory], lw=1)
    axes.set(xlabel="minutes", ylabel="MB resident", title=title, ylim=(0, 1.15 * max(mb for _, mb in memory)))
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--plot", type=Path, help="a PNG of the page's memory")
    given = parser.parse_args()
    page = Page.start()
    try:
        visitors = [Visitor(page, number) for number in range(given.visitors)]
        began = time.monotonic()
        for one in visitors:
            one.bring()
            one.alone = one.ask()
        print(f"alone: {given.visitors} answers, {(time.monotonic() - began) / given.visitors:.2f} s each", flush=True)
        began, memory = time.monotonic(), [(0.0, page.memory())]
        threads = [threading.Thread(target=one.go_on, args=(began + 60 * given.minutes,)) for one in visitors]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            memory.append((time.monotonic() - began, page.memory()))
        waits = sorted(wait for one in visitors for wait in one.waits)
        wrong = [line for one in visitors for line in one.wrong]
        least = min(len(one.waits) for one in visitors)
        half = len(memory) // 2
        print(f"at once: {given.visitors} visitors, {len(waits)} answers in {memory[-1][0]:.0f} s, {len(wrong)} wrong")
        print(f"wait: median {waits[len(waits) // 2]:.1f} s, longest {waits[-1]:.1f} s; fewest answers a visitor {least}")
        first, middle, last = (memory[at][1] for at in (0, half, -1))
        most = max(mb for _, mb in memory)
        print(f"memory, MB: {first:.0f} at first, {middle:.0f} half-way, {last:.0f} at the end, {most:.0f} at most")
        print("\n".join(wrong[:10]))
        if given.plot:
            plot(given.plot, memory, f"{given.visitors} visitors at once, study model")
    finally:
        page.process.terminate()
        page.process.wait(30)


if __name__ == "__main__":
    main()
