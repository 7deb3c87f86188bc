"""Keeps the keys of this user out of what a run leaves: wandb's own log has what a server answers, word for
word, and a proxy may repeat the request that it refuses."""

from __future__ import annotations

import base64
import contextlib
import netrc
import os
from collections.abc import Iterable
from pathlib import Path

_SHORTEST = 16  # characters: what is shorter is no key, and may be a word


def keys() -> list[bytes]:
    """Those of wandb's that a client here would use, as they are and as HTTP sends them."""
    found = [os.environ.get("WANDB_API_KEY", "")]
    file = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")  # `Path.home` raises where there is none
    with contextlib.suppress(OSError, ValueError, netrc.NetrcParseError):  # ValueError: it is no text
        found += [password for _, _, password in netrc.netrc(file).hosts.values()]
    plain = [os.fsencode(key) for key in found if len(key) >= _SHORTEST]
    return [*plain, *(base64.b64encode(b"api:" + key) for key in plain)]


def masked(text: str) -> str:
    """With asterisks in the place of keys."""
    for key in keys():
        text = text.replace(os.fsdecode(key), "*" * len(key))
    return text


def mask_files(paths: Iterable[Path]) -> None:
    """The same in files, in place and without changing their length: others may be writing at their ends."""
    secret = keys()
    for path in paths if secret else ():
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            data = file.read()
            for key in secret:
                at = data.find(key)
                while at >= 0:
                    file.seek(at)
                    file.write(b"*" * len(key))
                    at = data.find(key, at + 1)
