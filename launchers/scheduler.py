"""What SLURM is asked: squeue, scontrol, scancel, sbatch and, where there is accounting, sacct.

One question for all jobs at a time, each with a timeout. Everything works without sacct.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from launchers.state import Queue, QueuedJob
from pipeline.config import ConfigError
from pipeline.store import Status

TIMEOUT_S = 60
_ASKED_AT_ONCE = 500  # job ids in one command line
_DEFAULT_MAX_ARRAY_SIZE = 1001


class SchedulerError(ConfigError):
    """SLURM refused or did not answer; says what it was asked and its words."""


def available() -> bool:
    """Whether this machine can submit to SLURM."""
    return shutil.which("sbatch") is not None


def queue_of(statuses: Iterable[Status | None]) -> Queue | None:
    """The queue, as far as it holds jobs of runs with these statuses. Raises SchedulerError when SLURM does
    not answer."""
    return queue({status.job for status in statuses if status and status.job and status.state != "DONE"})


def queue(jobs: Iterable[str]) -> Queue | None:
    """Those of the jobs that are in the queue; None where there is no SLURM to ask. Asks nothing when there
    is nothing to ask for. Raises SchedulerError when SLURM does not answer."""
    masters = sorted({job.partition("_")[0] for job in jobs})
    if not masters:
        return {}
    if not available():
        return None
    found = {}
    for some in _portions(masters):
        try:
            lines = ask("squeue", "-a", "-h", "-r", "-o", "%i|%T|%r|%N", "-j", ",".join(some))
        except SchedulerError as error:
            if "Invalid job id" in str(error):  # what it says of a single job that has left its memory
                continue
            raise
        for line in lines.splitlines():
            job, state, reason, nodes = line.split("|", 3)
            found[job] = QueuedJob(state, reason, nodes)
    return found


def named(name: str) -> list[str]:
    """The jobs in the queue with this name."""
    return ask("squeue", "-a", "-h", "-o", "%A", "--name", name).split()


def ended(jobs: Sequence[str]) -> dict[str, str]:
    """How jobs that left the queue ended, in SLURM's words ("TIMEOUT", "OUT_OF_MEMORY"); those that it does
    not remember are missing, all of them where there is no accounting."""
    words: dict[str, str] = {}
    for some in _portions(jobs):
        try:
            # Without a start time sacct looks at today alone.
            answer = ask(
                "sacct", "-n", "-P", "-X", "-S", "now-90days", "-o", "JobID,State", "-j", ",".join(some)
            )
        except SchedulerError:
            return words
        for line in answer.splitlines():
            job, _, state = line.partition("|")
            words[job] = state
    return words


def cancel(jobs: Sequence[str]) -> None:
    """Ends these jobs. Raises SchedulerError."""
    for some in _portions(jobs):
        ask("scancel", *some)


def release(jobs: Sequence[str]) -> None:
    """Lets jobs and arrays start that were submitted on hold."""
    for some in _portions(jobs):
        try:
            ask("scontrol", "release", ",".join(some))
        except SchedulerError as error:
            # An earlier release, whose record was lost, has done it, or somebody cancelled them on hold.
            if not any(words in str(error) for words in ("no longer pending", "already", "Invalid job id")):
                raise


def max_array_size() -> int:
    """Elements that an array can have."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(found[1])) if found else _DEFAULT_MAX_ARRAY_SIZE


def partitions() -> list[str]:
    """Their names. Raises SchedulerError."""
    return sorted(set(ask("sinfo", "-h", "-o", "%R").split()))


def nodes_out_of_service(partition: str | None) -> bool:
    """Whether some nodes are drained or down; of all partitions, if none is named."""
    states = ask("sinfo", "-h", "-o", "%t", *(["-p", partition] if partition else [])).split()
    return any(
        state.startswith(("drain", "drng", "down", "maint", "fail", "boot", "resv")) for state in states
    )


def earliest_start(script: str) -> str | None:
    """When SLURM expects to start this batch script; nothing is submitted. Raises SchedulerError with its
    reasons when it would refuse it."""
    answer = ask("sbatch", "--test-only", text=script, on_stderr=True)
    found = re.search(r"to start at (\S+)", answer)
    return found[1] if found else None


def ask(*command: str, text: str | None = None, on_stderr: bool = False) -> str:
    """What the command prints, if need be `on_stderr`, where others put warnings. Raises SchedulerError when
    it fails, is missing or takes too long."""
    try:
        with clean_environment():
            answer = subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]}: not found; is this a machine of the cluster?") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]}: no answer within {TIMEOUT_S} s; is slurmctld up?") from None
    if answer.returncode:
        lines = (answer.stderr or answer.stdout).splitlines()
        words = [re.sub(r"^(\w+: )?((error|fatal): )?", "", line) for line in lines if line.strip()]
        raise SchedulerError(f"{command[0]}: " + ("; ".join(words) or f"exit code {answer.returncode}"))
    return answer.stderr if on_stderr else answer.stdout


@contextmanager
def clean_environment() -> Iterator[None]:
    """Without the variables of a job that this process may itself be in, which sbatch would pass on, and
    without a user's filters of squeue, but with the cluster's configuration and the user's of sbatch."""
    from submitit.helpers import clean_env  # takes a while to import, which a preview need not wait for

    kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or k.startswith("SBATCH_")}
    filters = [name for name in os.environ if name.startswith(("SQUEUE_", "SCANCEL_", "SACCT_", "SINFO_"))]
    with clean_env(extra_names=filters):
        os.environ.update(kept)
        try:
            yield
        finally:
            for name in kept:
                os.environ.pop(name, None)


def _portions(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), _ASKED_AT_ONCE):
        yield items[start : start + _ASKED_AT_ONCE]
