"""How far a corpus that is being built has come, on disk, for a builder that goes on after another."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.parts import BUFFER_BYTES, EXAMPLES_PER_REASON, SPLITS, Part
from pipeline.store import write_atomically

JOURNAL = "journal.json"


class Totals:
    """The counts of all parts, added in order."""

    def __init__(self, tree: dict[str, Any] | None = None) -> None:
        tree = tree or {}
        self._documents = Counter(tree.get("documents", {}))
        self._tokens = Counter(tree.get("tokens", {}))
        self._records = Counter(tree.get("records", {}))
        self._skipped = Counter(tree.get("skipped", {}))
        self._examples: dict[str, list[str]] = tree.get("examples", {})

    def tree(self) -> dict[str, Any]:
        """What makes it anew, for JSON."""
        return {name.removeprefix("_"): value for name, value in vars(self).items()}

    def add(self, part: Part) -> None:
        for example in part.examples:
            shown = self._examples.setdefault(example.skip.reason, [])
            if len(shown) < EXAMPLES_PER_REASON:
                shown.append(example.describe(self._records[example.path]))
        self._documents.update(part.documents)
        self._tokens.update(part.tokens)
        self._records.update(part.records)
        self._skipped.update(part.skipped)

    def report(self) -> dict[str, Any]:
        return {
            "documents": self._documents.total(),
            "validation_documents": self._documents["validation"],
            "tokens": self._tokens.total(),
            "train_tokens": self._tokens["train"],
            "validation_tokens": self._tokens["validation"],
            "skipped": dict(self._skipped.most_common()),
            "examples": [text for shown in self._examples.values() for text in shown],
        }


@dataclass
class Journal:
    """How far the files of a corpus that is being built reach."""

    grouping: int  # a checksum of the parts that it counts
    parts: int = 0
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    crc32: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    totals: Totals = field(default_factory=Totals)

    @staticmethod
    def read(directory: Path, grouping: int) -> Journal:
        """The journal there, with the files cut to what it vouches for; a new one if it does not hold."""
        try:
            tree = json.loads((directory / JOURNAL).read_text(encoding="utf-8"))
            journal = Journal(**tree | {"totals": Totals(tree["totals"])})
            if journal.grouping == grouping and all(journal._holds(directory, split) for split in SPLITS):
                for split in SPLITS:
                    os.truncate(directory / f"{split}.bin", journal.sizes[split])
                return journal
        except (OSError, ValueError, TypeError, KeyError):
            pass  # none, or torn
        for name in (JOURNAL, *(f"{split}.bin" for split in SPLITS)):
            (directory / name).unlink(missing_ok=True)
        return Journal(grouping)

    def _holds(self, directory: Path, split: str) -> bool:
        left, found = self.sizes[split], 0
        with open(directory / f"{split}.bin", "rb") as file:
            while left and (block := file.read(min(left, BUFFER_BYTES))):
                found, left = zlib.crc32(block, found), left - len(block)
        return left == 0 and found == self.crc32[split]

    def add(self, split: str, block: bytes) -> None:
        self.sizes[split] += len(block)
        self.crc32[split] = zlib.crc32(block, self.crc32[split])

    def write(self, directory: Path) -> None:
        tree = {**vars(self), "totals": self.totals.tree()}
        write_atomically(directory / JOURNAL, json.dumps(tree))
