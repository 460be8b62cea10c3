"""A stand-in for the hub on 127.0.0.1: the few answers that fetching a repository asks for, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as `owner/name`. The faults are plain attributes, to be set by a test."""

    daemon_threads = True

    def __init__(self, folder: Path, hub_id: str = "moonshotai/Kimi-VL-small"):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.hub_id = folder, hub_id
        self.status: int | None = None  # every request is answered with it
        self.cut: dict[str, int] = {}  # file -> bytes after which the next transfers break off, this many times once
        self.announced: dict[str, int] = {}  # file -> a size that is not its own
        self.listed: list[str] = []  # more names in the listing
        self.asked: list[tuple[str, str, str | None]] = []  # method, file, range

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> set[str]:
        return {name for method, name, _ in self.asked if method == "GET"}


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if hub.status is not None:
            return self._send(hub.status, b"{}", body)
        api, resolve = f"/api/models/{hub.hub_id}", f"/{hub.hub_id}/resolve/"
        if path.startswith(api):
            rest = path.removeprefix(api).strip("/").split("/")
            if rest[0] and rest[-1] not in ("main", COMMIT) and rest[1:2] not in (["main"], [COMMIT]):
                return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            names = sorted(p.name for p in hub.folder.iterdir())
            extra = [{"type": "file", "path": name, "size": 3, "oid": "0" * 40} for name in hub.listed]
            if rest[0] == "tree":
                sizes = {name: (hub.folder / name).stat().st_size for name in names}
                listed = [{"type": "file", "path": n, "size": size, "oid": self._tag(n)} for n, size in sizes.items()]
                return self._send(200, json.dumps(listed + extra).encode(), body)
            info = {"id": hub.hub_id, "modelId": hub.hub_id, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
            siblings = [{"rfilename": name} for name in [*names, *hub.listed]]
            return self._send(200, json.dumps(info | {"siblings": siblings}).encode(), body)
        if not path.startswith(resolve):
            return self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        self._file(path.removeprefix(resolve).partition("/")[2], body)

    def _tag(self, name: str) -> str:
        return hashlib.sha1((self.server.folder / name).read_bytes()).hexdigest()

    def _file(self, name: str, body: bool) -> None:
        hub, file = self.server, self.server.folder / name
        if not file.is_file():
            return self._send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})
        wanted = self.headers.get("Range")
        hub.asked.append((self.command, name, wanted))
        data = file.read_bytes()
        size = hub.announced.get(name, len(data))
        extra = {"ETag": f'"{self._tag(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted and body else 0
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if not body:
            return self._send(200, b"", False, extra | {"Content-Length": str(size)})
        stop = hub.cut.pop(name, None)
        self._send(206 if start else 200, data[start:], True, extra, stop)

    def _send(
        self, status: int, data: bytes, body: bool, extra: dict[str, str] | None = None, stop: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | (extra or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:stop])
        if stop is not None:
            self.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
