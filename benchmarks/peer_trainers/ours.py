"""This project, as a user starts it."""

from __future__ import annotations

import os
import sys

from benchmarks.peer_trainers._task import Task

LAYOUTS = {
    "single": ["parallel=single"],
    "ddp": ["parallel=ddp", "parallel.replicate=2"],
    "fsdp": ["parallel=fsdp", "parallel.shard=2"],
}

if __name__ == "__main__":
    task = Task.of_command_line()
    command = [sys.executable, "-m", "pipeline", *task.overrides, *LAYOUTS[task.layout]]
    os.execv(command[0], command)
