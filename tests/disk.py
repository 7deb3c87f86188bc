"""A real disk that is small enough to fill."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(directory: Path, size: str) -> Iterator[Path]:
    """An empty file system of this size in memory. Skips the test where mounting is not allowed."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk needs the right to mount one: {getattr(error, 'stderr', error)}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leaves so many bytes (in whole pages) free; deleting the file `ballast` there frees the rest again."""
    free = os.statvfs(disk)
    size = max(0, free.f_bavail * free.f_frsize - leave)
    with open(disk / "ballast", "ab") as file:
        os.posix_fallocate(file.fileno(), 0, file.tell() + size)
