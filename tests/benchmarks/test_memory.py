from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from benchmarks.memory import peak_mib
from tests.support import ROOT

CHILD = "from benchmarks.memory import peak_mib; held = bytearray(40 * 2**20); del held; print(peak_mib())"


def test_a_childs_peak_is_its_own():
    """Of this process, which has had 300 MiB more, nothing is counted."""
    held = np.ones(300 * 2**17)
    own = peak_mib()
    command = [sys.executable, "-c", CHILD]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert held.nbytes / 2**20 == 300 and own > 300
    assert 45 < float(found.stdout) < 150


def test_a_process_that_has_ended_has_no_memory():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    with pytest.raises(ProcessLookupError):
        while True:  # until it is a zombie, which this process has not reaped yet
            peak_mib(ended.pid)
    ended.wait(60)
