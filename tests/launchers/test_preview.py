from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

import pipeline.__main__
from launchers import manifest
from launchers.plan import freeze
from launchers.preview import Rates, describe
from tests.launchers.support import plan, tree_of
from tests.support import config

DEMO = ("experiment=demo", "batch=constant_16,constant_64,stages,norm_test", "seed=0,1")


def preview(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `python -m pipeline -m …arguments hydra/launcher=preview`."""
    monkeypatch.setattr("sys.argv", ["pipeline", "-m", *arguments, "hydra/launcher=preview"])
    try:
        return pipeline.__main__.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def test_it_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze(plan("experiment=demo", "batch=constant_16").valid)
    before = tree_of(here)
    assert preview(monkeypatch, "experiment=demo", "batch=constant_16,norm_test") == 0
    assert tree_of(here) == before


def test_the_screen(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = plan("experiment=demo", "batch=constant_16", "seed=1")
    freeze(done.valid)
    done.points[0].directory.update_status(state="DONE")
    assert preview(monkeypatch, *DEMO) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sweep demo: 8 points = batch(4) × seed(2)"
    assert lines[1].strip() == "all with experiment=demo"
    rows = {tuple(line.split()[1:3]): line.split()[3:] for line in lines[4:12]}
    assert lines[3].split() == [
        "run",
        "batch",
        "seed",
        "ranks",
        "batch",
        "size",
        "steps",
        "est.",
        "time",
        "state",
    ]
    assert rows["constant_16", "0"] == ["2", "16", "391", "–", "new"]
    assert rows["constant_16", "1"] == ["2", "16", "391", "–", "done"]
    assert rows["norm_test", "0"] == ["2", "8…256", "norm_test", "25…782", "–", "new"]
    assert "7 new, 1 done (skipped). Nothing was written." in lines
    assert lines[-1] == f"run: python -m pipeline -m {' '.join(DEMO)} hydra/launcher=local"


def test_invalid_points_are_listed_with_all_reasons(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = preview(monkeypatch, "batch=norm_test", "batch.size=2,8", "seed=0,1", "batch.ema=0.9")
    text = capsys.readouterr().out
    assert code == 2
    assert "invalid: batch.size=2 seed=0,1\n" in text  # the same reasons are told once
    assert "smaller than one micro-batch on every rank" in text and "needs two micro-batches" in text
    assert "2 invalid (excluded), 2 new." in text and list(here.iterdir()) == []


def test_when_all_is_done_it_points_to_the_comparison(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    p = plan("seed=0", "sweep.name=s")
    freeze(p.valid)
    p.points[0].directory.update_status(state="DONE")
    run = "run: python -m pipeline -m seed=0 sweep.name=s hydra/launcher=local"  # writes what compare reads
    assert preview(monkeypatch, "seed=0", "sweep.name=s") == 0
    assert capsys.readouterr().out.splitlines()[-1] == run
    manifest.write(plan("seed=1", "sweep.name=s"), "local")
    assert preview(monkeypatch, "seed=0", "sweep.name=s") == 0
    assert capsys.readouterr().out.splitlines()[-1] == run
    manifest.write(p, "local")
    assert preview(monkeypatch, "seed=0", "sweep.name=s") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "compare: python -m analysis s"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=glob(*)"], "seed=glob(*): gives no value, so there is nothing to run."),
        (
            ["hydra/launcher=basic"],
            "hydra/launcher=basic: runs no sweeps here. Allowed: local, preview, slurm\n",
        ),
    ],
)
def test_a_sweep_that_could_not_be_one_is_refused(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["pipeline", "-m", "seed=0", *arguments])
    assert pipeline.__main__.main() == 2
    assert capsys.readouterr().err.startswith(message) and tree_of(here) == {}


# 800 000 tokens are 6250 sequences of 128. The stages end at 625, 1875 and 6250 sequences; a step takes the
# size of the stage it starts in: 40 × 16 = 640, then 39 × 32 up to 1888, then 69 × 64, the last one cut.
@pytest.mark.parametrize(
    ("overrides", "batch", "steps"),
    [
        (["batch=constant_16"], "16", "391"),
        (["batch=constant_64"], "64", "98"),
        (["batch=stages"], "16→32→64", str(40 + 39 + 69)),
        (["batch=norm_test"], "8…256 norm_test", "25…782"),
        (["batch=norm_test", "batch.size=9", "batch.max_size=255"], "16…248 norm_test", "26…391"),
        (["batch=constant", "batch.size=3120"], "3120", "3"),
        (
            ["batch=stages", "batch.sizes=[8,16,24,32,40]", "batch.fractions=[0.2,0.2,0.2,0.2,0.2]"],
            "8→…→40",
            str(157 + 78 + 52 + 39 + 32),
        ),
    ],
)
def test_batch_plan_and_steps(overrides: list[str], batch: str, steps: str) -> None:
    work = describe(config("experiment=demo", *overrides))
    assert (work.batch, work.steps) == (batch, steps)


def finish(home: Path, tokens: int, seconds: float, *overrides: str) -> None:
    p = plan(*overrides)
    freeze(p.valid)
    run = p.points[0].directory
    row = {"step": 1, "tokens": tokens, "time": seconds, "attempt": 1, "train/loss": 1.0}
    run.metrics_file.write_text(json.dumps(row) + "\n")
    run.update_status(state="DONE")


def test_the_time_is_estimated_from_finished_runs_alike(home: Path) -> None:
    finish(home, 1000, 1.0, "batch.size=16", "seed=1")
    finish(home, 3000, 1.0, "batch.size=16", "seed=2")
    finish(home, 8000, 1.0, "batch.size=16", "seed=3")
    finish(home, 9_000_000, 1.0, "parallel=ddp")
    finish(home, 9_000_000, 1.0, "model=10m")
    finish(home, 9_000_000, 1.0, "data.sequence_length=64")
    rates = Rates()
    other_batch = config("batch=constant_64", "data.fingerprint=x")
    assert rates.seconds(other_batch) == pytest.approx(other_batch.budget_tokens / 3000)
    finish(home, 500, 1.0, "batch=constant_64")  # the same batch group is the better guide
    assert Rates().seconds(other_batch) == pytest.approx(other_batch.budget_tokens / 500)
    assert Rates().seconds(config("model=60m")) is None


def test_labelled_runs_count_samples(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = ("model=logistic", "data=digits", "lr.warmup_tokens=0", "budget.tokens=5k")
    assert preview(monkeypatch, *labelled) == 0
    assert "5k samples to train; no finished run here" in capsys.readouterr().out
    finish(here, 5000, 5.0, *labelled, "seed=1")
    assert preview(monkeypatch, *labelled) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "5k samples to train, about 0:05, 1 at a time (from the median samples/s of finished" in said
    assert "same model, mesh and data)" in said


def test_unfinished_and_unreadable_runs_do_not_count(home: Path) -> None:
    p = plan("seed=0")
    freeze(p.valid)
    run = p.points[0].directory
    run.metrics_file.write_text(
        json.dumps({"step": 1, "tokens": 10, "time": 1.0, "attempt": 1, "train/loss": 1.0}) + "\n"
    )
    assert Rates().seconds(config("seed=1")) is None
    run.update_status(state="DONE")
    assert Rates().seconds(config("seed=1")) is not None
    run.config_file.write_text("seed: 0\n")  # frozen under another schema
    assert Rates().seconds(dataclasses.replace(config("seed=1"))) is None


def test_points_that_differ_in_the_rate_or_the_length_have_their_own_steps(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seesaw's batches follow the cuts of the rate; twice the sequence length halves the steps."""
    monkeypatch.setenv("COLUMNS", "200")
    seesaw = ["batch=seesaw", "lr.batch_scaling=sqrt", "lr.cut_factor=1.1,2", "data.sequence_length=128,256"]
    assert preview(monkeypatch, *seesaw, "budget.tokens=4M") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"[0-9a-f]{10} ", line)]
    shown = {(row[1], row[2]): (row[4], int(row[5])) for row in rows}
    assert shown["1.1", "128"][0] != shown["2", "128"][0]
    for factor in ("1.1", "2"):
        assert shown[factor, "128"][1] == pytest.approx(2 * shown[factor, "256"][1], abs=4)
