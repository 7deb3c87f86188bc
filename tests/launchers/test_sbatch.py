"""The scripts that sbatch gets, compared with golden files; an `sbatch` that only says yes stands in for SLURM.

To accept what has changed: delete the file, run the test, read the new one.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from launchers import manifest, slurm
from launchers.shapes import by_shape
from tests.launchers.support import plan

GOLDEN = Path(__file__).with_name("golden")

ANSWERS = {
    "sbatch": "echo Submitted batch job $$",
    "srun": "exit 1",
    "squeue": "true",
    "scancel": "true",
    "sinfo": "echo main",
    "scontrol": "echo 'MaxArraySize            = 1001'",
}
CASES = {
    "one_run_per_gpu": ["parallel=single", "seed=0,1,2", "launch.max_parallel=2"],
    "two_nodes": [
        *["parallel=hsdp", "parallel.replicate=2", "parallel.shard=8", "seed=0,1", "launch.gpus_per_node=8"],
        *["launch.cpus_per_task=6", "launch.mem_gb=512", "launch.minutes=240", "launch.warning_s=300"],
        *["launch.partition=gpu", "launch.qos=high", "launch.account=lab", "launch.constraint=h100"],
        *[
            "launch.setup=['module load cuda', 'ulimit -n 65536']",
            'launch.sbatch=["reservation=week",exclusive]',
        ],
    ],
    "packed_on_cpus": [
        "parallel=ddp",
        "seed=range(5)",
        "launch.pack=2",
        "launch.device=cpu",
        "launch.minutes=15",
    ],
}


@pytest.fixture
def stand_in(here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("bin")
    for program, answer in ANSWERS.items():
        (directory / program).write_text(f"#!/bin/sh\n{answer}\n")
        (directory / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return here


@pytest.mark.parametrize("case", CASES)
def test_scripts(case: str, stand_in: Path) -> None:
    p = plan(
        "budget.tokens=1M", "batch.size=64", "sweep.name=s", "launch.confirm_gpu_hours=1000", *CASES[case]
    )
    assert len(by_shape([(point, point.config) for point in p.valid if point.config])) == 1
    assert slurm.submit(slurm.make_console(), p) == 0
    batch, report = manifest.load("s")["jobs"]
    check(f"{case}.sbatch", script(stand_in, batch["name"]))
    check(f"{case}.report.sbatch", script(stand_in, report["name"]))


def script(home: Path, name: str) -> str:
    """Without what differs from machine to machine and from time to time."""
    (file,) = home.glob(f"sweeps/s/slurm/{name}/[0-9]*.sh")
    text = file.read_text().replace(str(home), "/home").replace(sys.executable, "python")
    text = re.sub(r"/code/[0-9a-f]{10}", "/code/CODE", text)
    text = re.sub(r"afterany:\d+", "afterany:JOB", text)
    return re.sub(rf"{re.escape(name.rpartition('.')[0])}\.[0-9a-f]{{6}}", "NAME", text)


def check(name: str, text: str) -> None:
    file = GOLDEN / name
    if not file.exists():
        file.write_text(text)
        pytest.fail(f"{file} was missing and has been written: read it, then run the test again")
    assert text == file.read_text()
