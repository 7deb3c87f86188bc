"""Where benchmarks print."""

from __future__ import annotations

import contextlib
import sys


def beside_json(json: bool) -> contextlib.AbstractContextManager[object]:
    """Around a table: on standard error where standard output is for JSON, so that both can be had."""
    return contextlib.redirect_stdout(sys.stderr if json else sys.stdout)
