"""A copy of the code as it is now, from which the jobs of a sweep run, whatever becomes of the original.

    sweeps/<name>/code/<hash>/    conf/ and the packages: tracked files as they are on disk, and new ones that
                                  git does not ignore
        snapshot.json             {commit, changed, diff}: where it comes from

Named by its content: a sweep that is submitted again with the same code has one copy of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from pipeline.environment import CODE, SNAPSHOT, git, revision

PACKAGES = ("conf", "pipeline", "launchers", "analysis", "hydra_plugins")


def take(directory: Path) -> Path:
    """Copies the code into `directory`, unless it is there. Where."""
    files = _files()
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file).encode() + b"\0" + (CODE / file).read_bytes() + b"\0")
    copy = directory / digest.hexdigest()[:10]
    if copy.exists():
        return copy
    partial = directory / f".{copy.name}.{os.getpid()}"
    try:
        for file in files:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CODE / file, partial / file)
        origin = {**revision(), "diff": git("diff", "HEAD")}
        (partial / SNAPSHOT).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        partial.rename(copy)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return copy


def _files() -> list[Path]:
    """Of the packages, relative to their directory."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    if listed is None:  # installed, not checked out
        found = (path.relative_to(CODE) for package in PACKAGES for path in (CODE / package).rglob("*.*"))
        return sorted(path for path in found if path.suffix != ".pyc" and (CODE / path).is_file())
    # Deleted ones are listed, too, and links to directories.
    return sorted(Path(name) for name in listed.split("\0") if name and (CODE / name).is_file())
