"""What benchmarks print, and where."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any


def print_json(figures: Any, **more: Any) -> None:
    """With the conditions they were measured in; what lies in benchmarks/results is this."""
    machine = here() | {"load": round(os.getloadavg()[0], 1)}
    print(json.dumps({"machine": machine, "figures": figures, **more}, indent=1))


def here() -> dict[str, str]:
    """Date, hardware and versions."""
    return {
        "date": str(date.today()),
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def beside_json(json: bool) -> contextlib.AbstractContextManager[object]:
    """Around a table: on standard error where standard output is for JSON, so that both can be had."""
    return contextlib.redirect_stdout(sys.stderr if json else sys.stdout)
