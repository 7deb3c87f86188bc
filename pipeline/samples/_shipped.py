"""Files that scikit-learn brings along: real data without a download. They are read here, because to import
scikit-learn takes longer than a short run."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from pipeline.config import ConfigError


def shipped(name: str) -> Path:
    """Raises ConfigError without scikit-learn."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ConfigError(
            f"data={name.partition('.')[0]}: this data set comes with scikit-learn. "
            f"pip install 'crescendo[problems]'"
        )
    return Path(package.origin).parent / "datasets" / "data" / name


def fingerprint_of(path: Path) -> str:
    """The stem of the file and 16 hex digits of SHA-256 over its bytes."""
    return f"{path.name.partition('.')[0]}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
