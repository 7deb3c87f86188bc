"""A stand-in for the Hugging Face Hub, on this machine: as much of its protocol as the real client asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Files = dict[str, bytes]  # by "datasets/OWNER/NAME/FILE" or "OWNER/NAME/FILE"


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: Files
    requests: list[str]
    broken_after: int | None  # requests for a file's content that are answered before the rest fails

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(f"{self.command} {path}")
        if info := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/revision/(\w+)", path):
            self._json({"id": info[2], "sha": info[3], "siblings": []})
        elif tree := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/(\w+)/(.+)", path):
            prefix = ("datasets/" if tree[1] == "datasets" else "") + tree[2] + "/"
            listed = [name.removeprefix(prefix) for name in self.files if name.startswith(prefix)]
            self._json(
                [
                    {"type": "file", "path": name, "size": len(self.files[prefix + name]), "oid": "0" * 40}
                    for name in listed
                    if name.startswith(tree[4])
                ]
            )
        elif content := re.fullmatch(r"/(.+)/resolve/(\w+)/(.+)", path):
            self._content(f"{content[1]}/{content[3]}", content[2])
        else:
            self._send(404, b"")

    def _content(self, name: str, commit: str) -> None:
        if name not in self.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.broken_after is not None:
            if self.broken_after == 0:
                self._send(403, b"")
                return
            type(self).broken_after = self.broken_after - 1
        data, headers = self.files[name], {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), int(found[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            self._send(206, data[first : last + 1], headers)
        else:
            self._send(200, data, headers)

    def _json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serving(files: Files, broken_after: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub with these files, and what it was asked for."""
    requests: list[str] = []
    handler = type("Hub", (_Hub,), {"files": files, "requests": requests, "broken_after": broken_after})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
