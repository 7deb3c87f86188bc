"""Where the ranks of a run meet: a store that rank 0 serves, on a socket that its supervisor opened.

The socket listens before any rank starts, and rank 0 inherits it. So no other program can take the port in
between, and ranks that are sooner up than rank 0 wait in the socket's queue instead of trying again.
Importing this imports no torch: supervisors do.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_LISTENER_VARIABLE = "CRESCENDO_LISTENER"  # the file descriptor that rank 0 inherits
_QUEUE = 4096  # ranks that may wait for rank 0; the kernel cuts it to net.core.somaxconn


@dataclass(frozen=True)
class Place:
    """One rank among the ranks, and the address at which they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    port: int


def listen(host: str | None = None) -> socket.socket:
    """A listening socket with a free port: of this host's address, or of all that this machine has."""
    if host is None and socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_QUEUE)
    return socket.create_server((host or "", 0), backlog=_QUEUE)


def variables(place: Place, listener: int | None) -> dict[str, str]:
    """Of the environment of a rank, by the names that torch and its launchers use."""
    told = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_world_size,
        "MASTER_ADDR": place.host,
        "MASTER_PORT": place.port,
    }
    own = {} if listener is None else {_LISTENER_VARIABLE: listener}
    return {name: str(value) for name, value in (told | own).items()}


def store(timeout: timedelta, environment: Mapping[str, str] = os.environ) -> TCPStore:
    """The store of this process's run, for a rank. All ranks call it, and wait for each other."""
    from torch.distributed import TCPStore

    listener = environment.get(_LISTENER_VARIABLE)
    return TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        int(environment["WORLD_SIZE"]),
        is_master=environment["RANK"] == "0",
        timeout=timeout,
        master_listen_fd=None if listener is None else int(listener),
    )
