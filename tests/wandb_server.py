"""A stand-in for wandb's server on a loopback port: enough of its protocol for the real client of wandb 0.31 to
upload runs (`wandb sync`, mode="online") and to read them (`wandb.Api().runs(…, lazy=False)`, `scan_history`).

It is not the real server: it takes rows at the offsets that the client names, never samples, exports rows as
parquet only when told to (`Run.export`), and knows few of the filters: equality, $in and $regex.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import re
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlparse

import polars as pl

ENTITY = "team"  # of the API key
API_KEY = "0123456789" * 4
SENT_KEY = base64.b64encode(f"api:{API_KEY}".encode()).decode()
_NOW = "2026-01-01T00:00:00Z"

Json = dict[str, Any]


@dataclass
class Run:
    entity: str
    project: str
    id: str
    name: str = ""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    state: str = "running"
    exit_code: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    streams: dict[str, dict[int, str]] = field(default_factory=dict)  # lines of a file, by offset
    received: int = 0  # rows of history, repeated ones as often as they came
    heartbeat: int = 0  # how often it gave a sign of life
    line_count: int | None = None  # what is said of the number of rows, where it is not true
    exported: bytes | None = None  # the first rows, as parquet
    exported_rows: int = 0

    @property
    def path(self) -> str:
        return f"{self.entity}/{self.project}/{self.id}"

    @property
    def rows(self) -> list[Json]:
        """The history, as the rows were logged."""
        return [json.loads(line) for _, line in sorted(self.streams.get("wandb-history.jsonl", {}).items())]

    def update(self, v: Json) -> None:
        """With the variables of an UpsertBucket, which leaves out what it does not change."""
        self.name = v.get("displayName") or self.name
        self.group = v.get("groupName") or self.group
        self.job_type = v.get("jobType") or self.job_type
        self.tags = v.get("tags") or self.tags
        if v.get("config"):
            self.config = {key: kept["value"] for key, kept in json.loads(v["config"]).items()}

    def stream(self, body: Json) -> Json:
        """Takes lines at the offsets that they come with, and the answer to that."""
        self.heartbeat += 1
        for name, chunk in (body.get("files") or {}).items():
            lines = dict(enumerate(chunk["content"], start=chunk["offset"]))
            self.streams.setdefault(name, {}).update(lines)
            if name == "wandb-history.jsonl":
                self.received += len(lines)
            if name == "wandb-summary.json":
                self.summary = json.loads(chunk["content"][-1])
        if body.get("complete"):
            self.exit_code = body["exitcode"]
            self.state = "failed" if self.exit_code else "finished"
        return {"exitcode": None, "limits": {}}

    def export(self) -> None:
        """As the real server does it now and then: what is there so far, absent values as null."""
        self.exported_rows = len(self.rows)
        file = io.BytesIO()
        pl.DataFrame(self.rows, infer_schema_length=None).write_parquet(file)
        self.exported = file.getvalue()

    def node(self) -> Json:
        """As GraphQL shows it: what is free of form is JSON within JSON."""
        return {
            "id": self.path,
            "name": self.id,
            "displayName": self.name,
            "group": self.group,
            "jobType": self.job_type,
            "tags": self.tags,
            "state": self.state,
            "config": json.dumps({key: {"value": value} for key, value in self.config.items()}),
            "summaryMetrics": json.dumps(self.summary),
            "systemMetrics": "{}",
            "historyKeys": self.history_keys(),
            "historyLineCount": len(self.rows) if self.line_count is None else self.line_count,
            "createdAt": _NOW,
            "heartbeatAt": f"2026-01-01T{self.heartbeat // 60:02}:{self.heartbeat % 60:02}:00Z",
            "readOnly": False,
            "sweepName": None,
            "commit": None,
            "description": "",
            "notes": "",
            "user": {"name": ENTITY, "username": ENTITY},
            "project": {
                "id": self.project,
                "name": self.project,
                "entity": {"id": self.entity, "name": self.entity},
            },
            "projectId": "1",  # a number, of which the client makes nothing
        }

    def history_keys(self) -> Json:
        counts = Counter(key for row in self.rows for key in row)
        keys = {
            key: {"typeCounts": [{"type": "number", "count": n}], "monotonic": False, "previousValue": 0}
            for key, n in counts.items()
        }
        return {"sets": [], "keys": keys, "lastStep": max((row["_step"] for row in self.rows), default=-1)}


class WandbServer:
    """Serves while the `with` block runs. What it was asked and does not know fails the test at the block's end."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}  # by id
        self.views: dict[str, Json] = {}  # W&B Reports, by id
        self.calls: list[str] = []  # names of GraphQL operations, and "file_stream"
        self.unknown: list[str] = []
        self.forbidden: set[str] = set()  # projects that the login may not read: they are as if they were not
        self._failures: list[tuple[int, str]] = []  # HTTP status, and what it befalls
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._http = _Http(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        if error is None:
            assert not self.unknown, (
                f"the stand-in for wandb's server was asked what it does not know: {self.unknown}"
            )

    def environment(self, directory: Path) -> dict[str, str]:
        """For a client that shall know this server alone, and keep its own files in `directory`."""
        kept = {
            f"WANDB_{name}_DIR": str(directory / name.lower())
            for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")
        }
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": API_KEY,
            "WANDB_ERROR_REPORTING": "false",
            "HOME": str(directory),
            **kept,
        }

    def fail_next(self, number: int, status: int, call: str) -> None:
        """The next `number` calls of this name are answered with this HTTP status, and with the key that they
        came with, as some proxies repeat what they refuse."""
        with self._lock:
            self._failures += [(status, call)] * number

    def recover(self) -> None:
        """No more of the failures that were asked for."""
        with self._lock:
            self._failures.clear()

    # --- what the client asks

    def answer(
        self, method: str, path: str, authorization: str | None, body: bytes
    ) -> tuple[int, Json | bytes]:
        """The HTTP status and what goes with it."""
        with self._lock:
            match method, [unquote(part) for part in path.strip("/").split("/")]:
                case "POST", ["graphql"]:
                    asked = json.loads(body)  # its operationName is empty
                    call = "".join(re.findall(r"\b(?:query|mutation)\s+(\w+)", asked["query"])[:1])
                    reply = functools.partial(self._graphql, call, asked.get("variables") or {})
                case "POST", ["files", entity, project, id_, "file_stream"]:
                    call = "file_stream"
                    reply = functools.partial(self._run(entity, project, id_).stream, json.loads(body))
                case ("GET", [""]) | ("POST", ["sdk", "otel", *_]):  # the latter: the client's own statistics
                    return 200, {}
                case "GET", ["parquet", id_]:  # the same
                    return 200, self.runs[id_].exported or b""
                case "PUT", ["storage", entity, project, id_, *name]:  # a signed address: it needs no key
                    self._run(entity, project, id_).files["/".join(name)] = body
                    return 200, {}
                case _:
                    self.unknown.append(f"{method} {path}")
                    return 404, {}
            self.calls.append(call)
            if authorization != f"Basic {SENT_KEY}":
                return 401, {"errors": [{"message": "invalid API key"}]}
            if failure := next((each for each in self._failures if each[1] == call), None):
                self._failures.remove(failure)
                return failure[0], {"errors": [{"message": f"injected by the test: {authorization}"}]}
            return 200, reply()

    def _run(self, entity: str | None, project: str | None, id_: str) -> Run:
        return self.runs.setdefault(id_, Run(entity or ENTITY, project or "uncategorized", id_))

    def _graphql(self, operation: str, v: Json) -> Json:
        data = self._operation(operation, v)
        if data is None:
            self.unknown.append(f"{operation} {json.dumps(v)}")
            return {"data": {}, "errors": [{"message": f"unknown operation {operation}"}]}
        return {"data": data}

    def _operation(self, operation: str, v: Json) -> Json | None:
        match operation:
            case "Viewer" | "GetDefaultEntity":
                teams = {"edges": [{"node": {"name": ENTITY}}]}
                viewer = {
                    "id": "u",
                    "entity": ENTITY,
                    "username": ENTITY,
                    "email": "u@example.org",
                    "name": ENTITY,
                }
                viewer |= {"flags": "{}", "admin": False, "teams": teams, "apiKeys": {"edges": []}}
                return {"viewer": viewer | {"defaultEntity": {"name": ENTITY}}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": {"organization": None}}
            case "RunStoppedStatus":
                return {"project": {"run": {"stopped": False}}}
            case "UpsertBucket":
                known = next((run for run in self.runs.values() if run.path == v.get("id")), None)
                run = known or self._run(v.get("entity"), v.get("project"), v["name"])
                run.update(v)
                return {"upsertBucket": {"bucket": run.node(), "inserted": known is None}}
            case "CreateRunFiles":
                run = self._run(v["entity"], v["project"], v["run"])
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/storage/{run.path}/{name}"}
                    for name in v["files"]
                ]
                return {"createRunFiles": {"runID": run.path, "uploadHeaders": [], "files": files}}
            case "Runs":
                return self._runs(v)
            case "RunHistoryKeys":
                return {"project": {"run": {"historyKeys": self.runs[v["name"]].history_keys()}}}
            case "RunParquetHistory":  # none: all of it is "live"
                run = self.runs[v["runName"]]
                urls = [f"{self.url}/parquet/{run.id}"] if run.exported is not None else []
                live = [{"_step": row["_step"]} for row in run.rows[run.exported_rows :][:1]]
                parts = {"parquetUrls": urls, "liveData": live if urls else [{"_step": 0}]}
                return {"project": {"run": {"parquetHistory": parts}}}
            case "GetProjects":
                found = {run.project: run for run in self.runs.values() if run.entity == v["entity"]}
                nodes = [
                    {"__typename": "Project", "id": name, "name": name, "entityName": v["entity"]}
                    | {"createdAt": _NOW, "isBenchmark": False, "user": None}
                    for name in found
                    if name not in self.forbidden
                ]
                info = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
                return {"models": {"pageInfo": info, "edges": [{"node": node} for node in nodes]}}
            case "ProjectInternalId":
                return {"project": {"id": v["projectName"], "internalId": "1"}}
            case "upsertView":
                kept = self.views.get(v["id"] or "", {"id": f"view{len(self.views)}", "createdAt": _NOW})
                project = {"id": v["projectName"], "name": v["projectName"], "entityName": v["entityName"]}
                view = kept | v | {"id": kept["id"], "project": project, "updatedAt": _NOW}
                self.views[kept["id"]] = view
                return {"upsertView": {"view": view, "inserted": v["id"] is None}}
            case "SpecificReport":
                return {"view": self.views.get(v["reportId"])}
            case "HistoryPage":
                rows = [
                    row for row in self.runs[v["run"]].rows if v["minStep"] <= row["_step"] < v["maxStep"]
                ]
                return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}
        return None

    def _runs(self, v: Json) -> Json | None:
        """A page of a project's runs; None for a filter that it does not know."""
        wanted = json.loads(v.get("filters") or "{}")
        if not set(wanted) <= {"group", "state", "name", "displayName", "jobType", "tags"}:
            return None
        nodes = [
            run.node()
            for run in self.runs.values()
            if (run.entity, run.project) == (v["entity"], v["project"])
        ]
        if not nodes or v["project"] in self.forbidden:
            return {"project": None}
        nodes = [node for node in nodes if all(_passes(node[key], each) for key, each in wanted.items())]
        if v.get("order", "").startswith("-"):
            nodes.reverse()
        start = int(v.get("cursor") or 0)
        page = nodes[start : start + (v.get("perPage") or 50)]
        end = start + len(page)
        info = {"endCursor": str(end), "hasNextPage": end < len(nodes)}
        edges = [{"node": node, "cursor": str(start + i + 1)} for i, node in enumerate(page)]
        runs = {"edges": edges, "pageInfo": info}
        return {"project": {"internalId": "1", "runCount": len(nodes), "readOnly": False, "runs": runs}}


def _passes(value: Any, wanted: Any) -> bool:
    """Whether a value, or one of a list, is what a filter wants."""
    if isinstance(value, list):
        return any(_passes(each, wanted) for each in value)
    match wanted:
        case {"$in": options}:
            return value in options
        case {"$regex": pattern}:
            return re.search(pattern, value or "") is not None
    return bool(value == wanted)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client leaves open connections behind when it ends."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    stand_in: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path, method = urlparse(self.path).path, "GET" if self.command == "HEAD" else self.command
        status, answer = self.stand_in.answer(method, path, self.headers.get("Authorization"), body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        first, last = 0, len(data) - 1
        if part := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            start, end = part.groups()
            first = int(start) if start else max(0, len(data) - int(end))
            last = min(int(end), last) if start and end else last
            status = 206
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing, or it would fill the output of the tests."""
