"""Files that survive a full disk and a power cut, and where they lie."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO


def home() -> Path:
    """Where runs/, sweeps/, reports/, corpora/, optima/ live: CRESCENDO_HOME, else the current directory."""
    return Path(os.environ.get("CRESCENDO_HOME") or ".").resolve()


def python() -> str:
    """What to type for the interpreter that runs now, which knows this project's packages.

    The `python` that a shell finds may be another: after `make demo` it is not .venv/bin/python. A virtual
    environment's python links to the one it was made from, so the directory tells them apart, not the file.
    """
    found, this = shutil.which("python"), Path(sys.executable)
    if found and os.path.samefile(found, this) and os.path.samefile(Path(found).parent, this.parent):
        return "python"
    return str(this.relative_to(Path.cwd()) if this.is_relative_to(Path.cwd()) else this)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces `path` whole: a reader sees the old or the new content, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """The names in this directory as they are now survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def try_lock(file: TextIO, kind: int) -> bool:
    """Whether this process now holds the lock: fcntl.LOCK_EX, or LOCK_SH beside others."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def report(line: str) -> None:
    """Prints a line at once. The output is often a log in the run directory: a full disk, of which the line
    may well tell, must not end the run. What was refused comes before the next line, up to some kilobytes."""
    with contextlib.suppress(OSError):
        print(line, flush=True)
