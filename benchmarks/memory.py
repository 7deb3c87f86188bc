"""How much memory a process has had at most."""

from __future__ import annotations

from pathlib import Path


def peak_mib(process: int | None = None) -> float:
    """Highest resident memory in MiB of a process that runs, this one by default.

    From the kernel's VmHWM: ru_maxrss of getrusage and wait4 begins in a child with what its parent had when
    it was started. Raises OSError, or ProcessLookupError when the process has ended and has no memory.
    """
    status = Path(f"/proc/{process or 'self'}/status").read_text(encoding="ascii")
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    raise ProcessLookupError(f"process {process} has ended")
