"""With which code, packages and machine an attempt ran: runs/<id>/logs/attempt-N.environment.json."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

CODE = Path(__file__).resolve().parents[1]  # what holds conf/ and the packages
SNAPSHOT = "snapshot.json"  # in a copy of the code that a sweep keeps: what `revision` was where it was taken
_TIMEOUT_S = 20  # of a program that is asked; a driver in trouble may not answer at all


def environment() -> dict[str, Any]:
    """What a result may depend on besides its config: machine, GPUs, code and packages."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        "python": sys.version.split()[0],
        "code": {"directory": str(CODE), **revision()},
        "packages": _packages(),
        "slurm": {key: value for key, value in sorted(os.environ.items()) if key.startswith("SLURM_JOB_")},
    }


def _packages() -> dict[str, str]:
    """Version by name. From the first lines alone: `metadata` parses long descriptions for each of the two,
    which takes a quarter of a second for a hundred packages."""
    found: dict[str, str] = {}
    for package in metadata.distributions():
        header = (package.read_text("METADATA") or package.read_text("PKG-INFO") or "").partition("\n\n")[0]
        fields = dict(line.partition(": ")[::2] for line in header.splitlines())
        if {"Name", "Version"} <= fields.keys():
            found.setdefault(fields["Name"], fields["Version"])  # the first on the path is the one in use
    return dict(sorted(found.items()))


def revision() -> dict[str, Any]:
    """{commit, changed}: the commit of the code and the files in which it differs. None: not known."""
    snapshot = CODE / SNAPSHOT
    if snapshot.exists():
        recorded: dict[str, Any] = json.loads(snapshot.read_text(encoding="utf-8"))
        return {key: recorded[key] for key in ("commit", "changed")}
    commit, changed = git("rev-parse", "HEAD"), git("diff", "-z", "--name-only", "HEAD")
    new = git("ls-files", "-z", "--others", "--exclude-standard", "--directory")
    if commit is None or changed is None or new is None:
        return {"commit": None, "changed": None}
    return {"commit": commit.strip(), "changed": sorted(filter(None, (changed + new).split("\0")))}


def git(*arguments: str) -> str | None:
    """What git answers about the code; None where there is no git or the code is in no repository."""
    if not (CODE / ".git").exists():
        return None
    return _ask("git", "-C", str(CODE), *arguments)


def _gpus() -> list[dict[str, str]]:
    fields = ("name", "driver_version", "memory.total")
    answer = _ask("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    lines = answer.splitlines() if answer else []
    return [dict(zip(fields, line.split(", "), strict=False)) for line in lines]


def _ask(*command: str) -> str | None:
    try:
        answer = subprocess.run(
            command, capture_output=True, errors="surrogateescape", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
