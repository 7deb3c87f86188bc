"""What an attempt records about the code, the packages and the machine it ran with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from pipeline import environment

Program = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Puts a program of this name in front of the others."""
    directory = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def put(name: str, script: str) -> None:
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)

    return put


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of code in place of the project's own."""
    directory = tmp_path / "code"
    directory.mkdir()
    (directory / "kept.py").write_text("kept = 1\n")
    (directory / "edited.py").write_text("edited = 1\n")
    monkeypatch.setattr(environment, "CODE", directory)
    return directory


def committed(code: Path) -> str:
    """Makes a repository of it. Its commit."""
    as_somebody = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], [*as_somebody, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(code), *command], check=True)
    head = ["git", "-C", str(code), "rev-parse", "HEAD"]
    return subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_the_files_that_differ_from_it(code: Path) -> None:
    commit = committed(code)
    assert environment.revision() == {"commit": commit, "changed": []}
    (code / "edited.py").write_text("edited = 2\n")
    (code / "new.py").write_text("")
    assert environment.revision() == {"commit": commit, "changed": ["edited.py", "new.py"]}


def test_without_a_repository(code: Path) -> None:
    assert environment.revision() == {"commit": None, "changed": None}
    assert environment.git("rev-parse", "HEAD") is None


def test_a_repository_further_up_is_another_projects(code: Path) -> None:
    """As where the packages are installed below somebody's home directory, which is a repository."""
    committed(code.parent)
    assert environment.revision() == {"commit": None, "changed": None}


def test_without_git(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(code)
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.revision() == {"commit": None, "changed": None}


def test_a_copy_of_the_code_says_where_it_comes_from(code: Path) -> None:
    origin = {"commit": "c0ffee", "changed": ["a.py"], "diff": "…"}
    (code / environment.SNAPSHOT).write_text(json.dumps(origin))
    assert environment.revision() == {"commit": "c0ffee", "changed": ["a.py"]}


def test_host_packages_and_job(code: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program("nvidia-smi", "exit 9")  # as where there is no driver
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    told = environment.environment()
    assert told["host"] == socket.gethostname() and told["gpus"] == []
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["packages"]["torch"] == metadata.version("torch") and "numpy" in told["packages"]
    assert told["code"]["directory"] == str(code)
    assert told["slurm"]["SLURM_JOB_PARTITION"] == "main"
    assert "secret" not in json.dumps(told)


def test_gpus_and_driver(program: Program) -> None:
    line = "NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB"
    program("nvidia-smi", f"printf '%s\\n' '{line}' '{line}'")
    gpu = {"name": "NVIDIA H100 80GB HBM3", "driver_version": "550.54.15", "memory.total": "81559 MiB"}
    assert environment.environment()["gpus"] == [gpu, gpu]


def test_a_driver_that_hangs_is_not_waited_for(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_TIMEOUT_S", 0.2)
    program("nvidia-smi", "exec sleep 600")
    before = time.monotonic()
    assert environment.environment()["gpus"] == []
    assert time.monotonic() - before < 30
