"""Schedules of a user's own, by file: found by name, frozen with the run, told apart by what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.batch import _own
from pipeline.config import Config, ConfigError, parse
from pipeline.identity import complete, identity_fields, run_id
from pipeline.store import RunDirectory
from tests.support import ROOT, compose_tree

POWER = """
from dataclasses import dataclass

from pipeline.batch import Planned, cap_below_start, largest_below


@dataclass(frozen=True)
class Settings:
    power: float = 1.0
    scale_tokens: int = 2_560


class Schedule(Planned):
    settings = frozenset({"size", "max_size", "round_to"})

    def __init__(self, config):
        self.own = Settings(**config.batch.own)
        self.size, self.multiple, self.largest = config.batch.size, config.batch_multiple, largest_below(config)

    @staticmethod
    def check(config):
        return cap_below_start(config)

    def batch_at(self, done):
        return self.size * (1 + done.tokens / self.own.scale_tokens) ** self.own.power
"""
SMALL = ("batch.size=4", "batch.max_size=32", "budget.tokens=10k", "lr.warmup_tokens=0", "data.fingerprint=x")

Write = Callable[..., Path]


@pytest.fixture
def write(own_schedules: Path) -> Write:
    """Puts a file into the directory of own schedules."""

    def write(text: str, name: str = "power") -> Path:
        file = own_schedules / f"{name}.py"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def composed(*overrides: str) -> Config:
    return complete(parse(compose_tree(*SMALL, *overrides)))


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_batch_follows_the_file(write: Write) -> None:
    write(POWER)
    # 1, 2, 3, … times 4 sequences of 256 tokens: after 4 sequences (1,024 tokens) b = 4 · (1 + 0.4) = 5.6 → 8, …
    sizes = composed("batch=power").batch_plan().sizes
    expected, seen = [], 0
    while seen < 39:
        size = min(-int(-4 * (1 + seen * 256 / 2560) // 4) * 4, 32, 39 - seen)
        expected.append(size)
        seen += size
    assert sizes == expected and len(set(sizes)) > 3


def test_settings_have_the_types_of_the_dataclass(write: Write) -> None:
    write(POWER)
    own = composed("batch=power", "batch.own.power=2").batch.own
    assert own == {"power": 2.0, "scale_tokens": 2560} and isinstance(own["power"], float)
    with pytest.raises(ConfigError, match=r"batch\.own\.scale_tokens=1\.5: a whole number is needed"):
        composed("batch=power", "batch.own.scale_tokens=1.5")


def test_the_id_names_the_rule_and_its_settings(write: Write) -> None:
    file = write(POWER)
    first = composed("batch=power")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:10]
    assert first.batch.schedule == f"power@{digest}"
    assert run_id(composed("batch=power", "batch.own.power=1")) == run_id(first)
    assert run_id(composed("batch=power", "batch.eta=0.2")) == run_id(first)
    assert run_id(composed("batch=power", "batch.own.power=2")) != run_id(first)
    write(POWER.replace("** self.own.power", "** (2 * self.own.power)"))
    changed = composed("batch=power")
    assert run_id(changed) != run_id(first)
    assert changed.batch_plan().sizes != first.batch_plan().sizes


def test_the_settings_of_an_own_schedule_change_no_other_run(write: Write) -> None:
    write(POWER)
    assert run_id(composed("batch=constant", "++batch.own.power=2")) == run_id(composed("batch=constant"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\nimport nowhere_at_all\n", "line 2: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = 1\ndef f(:\n", "line 2: SyntaxError"),
        ("def f():\n    return 1 / 0\n\nf()\n", "line 2: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        ("x = 1\n", "defines no class Schedule"),
        ("class Schedule: pass\n", r"class Schedule has no check\(\)"),
        (
            POWER.replace('"size", ', '"size", "eta", '),
            "`settings` hold eta. Allowed: confirmations, direction",
        ),
        (POWER.replace("power: float = 1.0", "power: float"), "every field of Settings needs a default"),
        (POWER.replace("@dataclass(frozen=True)\n", ""), "Settings is no dataclass"),
    ],
)
def test_a_file_that_is_no_schedule_is_named_with_the_line(write: Write, text: str, problem: str) -> None:
    file = write(text, "broken")
    with pytest.raises(ConfigError, match=f"^{file}.*{problem}"):
        composed("batch=broken")
    composed("batch=constant")  # which executes no file of theirs


@pytest.mark.parametrize("name", ["norm_test", "constant_16"])
def test_a_built_in_name_is_refused_whatever_is_asked_for(write: Write, name: str) -> None:
    file = write(POWER, name)
    with pytest.raises(ConfigError, match=f"{file}: batch={name} is a schedule of Crescendo's. Rename"):
        composed("batch=constant")


@pytest.mark.parametrize("name", ["a@b", "two words", "x=1"])
def test_a_name_that_no_override_can_hold_is_refused(write: Write, name: str) -> None:
    file = write(POWER, name)
    with pytest.raises(ConfigError, match=f"{file}: batch={name} cannot be typed. Name it with letters"):
        composed("batch=constant")


def test_the_command_says_what_is_wrong(write: Write, home: Path) -> None:
    write(POWER)
    gone = command("pipeline", "batch=power", CRESCENDO_SCHEDULES="/nowhere/schedules")
    assert (gone.returncode, gone.stderr.splitlines()[0]) == (
        2,
        "CRESCENDO_SCHEDULES=/nowhere/schedules: no such directory",
    )
    misspelt = command("pipeline", "batch=power", "batch.own.powr=1")
    assert misspelt.returncode == 2
    assert misspelt.stderr.startswith("batch.own.powr: no such setting. Did you mean batch.own.power?\n")
    unknown = command("pipeline", "batch=pover")
    assert unknown.returncode == 2
    assert "batch=pover: no such option of batch. Did you mean power?" in unknown.stderr
    assert not (home / "runs").exists()


def test_an_attempt_needs_nothing_but_the_run_directory(
    write: Write, home: Path, small_corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a job of a cluster, days later, after the file was edited and its directory is not there."""
    file = write(POWER)
    settings = [*small_corpus, "batch=power", "batch.size=4", "batch.max_size=32", "budget.tokens=10k"]
    config = complete(
        parse(compose_tree(*settings, "lr.warmup_tokens=0", "model.layers=1", "eval.sequences=8"))
    )
    run, sizes = RunDirectory.of(config), config.batch_plan().sizes
    run.freeze(config)
    assert run.schedule_file.read_bytes() == file.read_bytes()
    file.unlink()
    monkeypatch.delenv("CRESCENDO_SCHEDULES")
    done = command("pipeline.worker", str(run.path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [row["batch/size"] for row in rows if "train/loss" in row] == sizes


def test_a_run_refuses_another_rule_than_it_began_with(write: Write, home: Path) -> None:
    write(POWER)
    config = composed("batch=power", "batch.own.power=3")
    run = RunDirectory.of(config)
    run.freeze(config)
    run.schedule_file.write_text(POWER + "# edited\n", encoding="utf-8")
    refused = command("pipeline.worker", str(run.path))
    assert refused.returncode == 2
    assert f"{run.schedule_file}: was changed" in refused.stderr


def test_reading_a_run_executes_nothing(write: Write, home: Path, tmp_path: Path) -> None:
    """A report may be made of runs of others. Their ids hold, without the file and with a harmful one."""
    write(POWER)
    config = composed("batch=power", "batch.own.power=4")
    run = RunDirectory.of(config)
    run.freeze(config)
    run.schedule_file.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n", encoding="utf-8")
    code = (
        "import sys; from pipeline.store import RunDirectory; from pipeline.identity import run_id\n"
        "print(run_id(RunDirectory(sys.argv[1]).config()))"
    )
    read = subprocess.run(
        [sys.executable, "-c", code, str(run.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CRESCENDO_SCHEDULES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (read.stdout.strip(), read.returncode) == (run.id, 0), read.stderr
    assert not (tmp_path / "executed").exists()


def test_a_run_of_before_is_the_same_run(write: Write) -> None:
    config = composed("batch=norm_test", "batch.size=8")
    assert "own" not in identity_fields(config)["batch"]
    assert run_id(replace(config, batch=replace(config.batch, own={"a": 1}))) == run_id(config)


def test_an_own_schedule_reads_settings_that_there_are() -> None:
    fields = set(compose_tree()["batch"])  # type: ignore[call-overload]
    assert fields >= _own.SETTINGS
