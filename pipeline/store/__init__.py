"""What a run leaves on disk, and how it is read.

    runs/<id>/config.yaml  status.json  metrics.jsonl  checkpoints/  wandb/  logs/  lock  stop
              schedule.py      of a run whose batch schedule is a user's own

Everything a reader may see is replaced atomically or appended as one whole line, so a reader (or a restart
after kill -9) never meets half a file. What a full disk refuses is tried again, and nothing half-written
is left.
"""

from pipeline.store.files import home, python, report, sync_directory, try_lock, write_atomically
from pipeline.store.metrics import MetricsWriter, Row, decode, each_row, read_rows, supersede
from pipeline.store.run_directory import AlreadyRunning, RunDirectory, sealed, thawed
from pipeline.store.status import State, Status, StopState

__all__ = [
    "AlreadyRunning",
    "MetricsWriter",
    "Row",
    "RunDirectory",
    "State",
    "Status",
    "StopState",
    "decode",
    "each_row",
    "home",
    "python",
    "read_rows",
    "report",
    "sealed",
    "supersede",
    "sync_directory",
    "thawed",
    "try_lock",
    "write_atomically",
]
