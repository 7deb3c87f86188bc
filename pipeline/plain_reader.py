"""Reads checkpoints of torch.distributed.checkpoint without executing what is in them.

torch unpickles the index of a checkpoint (`.metadata`) and what of it is no tensor (an optimizer's settings)
with the full power of pickle: a file that somebody else could write would run code here. The index is made of
few classes, which are admitted by name; the rest is read as torch.load(weights_only=True) does.
"""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_INDEX = "torch.distributed.checkpoint.metadata"
_ADMITTED = {
    *((_INDEX, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
    *((_INDEX, name) for name in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    *((_INDEX, name) for name in ("MetadataIndex", "StorageMeta")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


def _member(enumeration: Any, name: str) -> Enum:
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum)):
        raise pickle.UnpicklingError(f"getattr of {enumeration!r} has no place in an index")
    return enumeration[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.2, Debian's, pickles an Enum's member
            return _member
        if module == "pathlib._local":  # where Python 3.13, and no other, has it
            module = "pathlib"
        if (module, name) in _ADMITTED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")


def index_of(data: bytes) -> Metadata:
    """What a `.metadata` file says. Raises nearly anything for bytes that are none, UnpicklingError for
    one that asks for other code than an index is made of."""
    found = _Unpickler(io.BytesIO(data)).load()
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise pickle.UnpicklingError("it is no index")
    if foreign := [e.relative_path for e in found.storage_data.values() if "/" in e.relative_path]:
        raise pickle.UnpicklingError(f"{foreign[0]} is not beside it")
    return found


class Reader(dcp.FileSystemReader):
    """Of a checkpoint in a directory."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = index_of((Path(self.path) / ".metadata").read_bytes())
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Planner(DefaultLoadPlanner):
    """Reads what is no tensor as plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)  # raises for anything else
        plain.seek(0)
        super().load_bytes(read_item, plain)
