"""Anybody's runs, written by wandb's own format with other names than ours, read through a file that tells them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from analysis import study, study_file
from analysis.__main__ import main
from analysis.load import Sweep
from analysis.report import Report, build
from analysis.study import load_study
from analysis.study_file import EXAMPLE, read_study
from analysis.summary import MORE, run_numbers
from analysis.tables import runs_table
from pipeline.config import ConfigError
from pipeline.store import Row
from tests.analysis.test_online import put
from tests.analysis.wandb_log import exit_record, framed, history_record, run_record
from tests.wandb_server import WandbServer

Read = pytest.CaptureFixture[str]
METRICS = {"train/loss": "loss", "val/loss": "eval/loss", "tokens": "consumed", "step": "global_step"}


def rows(final: float, steps: int = 20) -> list[Row]:
    """As many a trainer logs: the evaluation by itself, without the counters."""
    found: list[Row] = []
    for step in range(1, steps + 1):
        found.append({"loss": final + 1 / step, "consumed": 1000 * step, "global_step": step})
    return numbered([*found, {"eval/loss": final}])


def numbered(found: Sequence[Row]) -> list[Row]:
    return [{**row, "_step": i, "_runtime": 0.5 * (i + 1)} for i, row in enumerate(found)]


def write(
    home: Path,
    id_: str,
    logged: Sequence[Row],
    config: dict[str, Any],
    code: int | None = 0,
    started: int = 0,
    folder: str = "wandb",
) -> Path:
    file = home / folder / f"offline-run-{started}-{id_}" / f"run-{id_}.wandb"
    file.parent.mkdir(parents=True)
    end = [] if code is None else [exit_record(code)]
    records = [run_record(id_, config, 1_700_000_000 + started), *map(history_record, logged), *end]
    file.write_bytes(framed(records))
    return file


def config(batch: int, seed: int, **more: Any) -> dict[str, Any]:
    return {"train": {"batch_size": batch}, "rng": seed, **more}


LOSSES = {(16, 0): 2.0, (16, 1): 2.1, (64, 0): 2.2, (64, 1): 2.35}


@pytest.fixture
def offline(home: Path) -> Path:
    for number, ((batch, seed), loss) in enumerate(LOSSES.items()):
        write(home, f"r{number}", rows(loss), config(batch, seed), started=number)
    return home


def tree(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "study",
        "source": "wandb-offline",
        "files": ["wandb"],
        "axes": {"batch": "train.batch_size"},
        "seed": "rng",
        "metrics": METRICS,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def file_of(home: Path, **changes: Any) -> Path:
    path = home / "study.yaml"
    path.write_text(yaml.safe_dump(tree(**changes)))
    return path


def load(home: Path, **changes: Any) -> Sweep:
    return load_study(file_of(home, **changes))


def report(sweep: Sweep) -> Report:
    return build(sweep, [], 0.0)


def refused(home: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(home, **changes)
    return "\n".join(caught.value.problems)


def test_other_peoples_runs_are_compared(offline: Path) -> None:
    found = report(load(offline))
    assert [(s.label, s.by_seed("val_loss")) for s in found.schedules] == [
        ("16", {"0": 2.0, "1": 2.1}),
        ("64", {"0": 2.2, "1": 2.35}),
    ]
    (comparison,) = found.comparisons
    assert comparison.difference is not None
    assert comparison.difference.mean == pytest.approx((0.2 + 0.25) / 2)
    assert comparison.steps == (20, 20)
    numbers = found.numbers[0]
    assert (numbers.tokens, numbers.steps, numbers.seconds) == (20_000, 20, 10.5)
    assert numbers.train_loss == pytest.approx(2.05) and numbers.mean_batch is None
    assert found.headline.startswith("16 has the lowest mean validation loss after 20k tokens")
    assert found.resume == [] and "analysis" in found.commands[0]


def test_the_command_writes_all_files(offline: Path, capsys: Read) -> None:
    assert main([str(file_of(offline))]) == 0
    out = capsys.readouterr().out
    assert "reports/study/report.html" in out
    content = json.loads((offline / "reports/study/report.json").read_text())
    assert content["source"] == "wandb-offline" and content["finished"] == 4
    assert {figure.split("/")[1] for figure in content["figures"]} >= {
        "validation_loss.png",
        "training_loss.png",
    }
    assert not (offline / "reports/study/figures/batch_size.png").exists()


def test_the_server_gives_the_same(offline: Path, wandb_server: WandbServer) -> None:
    from_files = report(load(offline))
    for number, ((batch, seed), loss) in enumerate(LOSSES.items()):
        logged = [{k: v for k, v in row.items() if k != "_runtime"} for row in rows(loss)]
        put(wandb_server, f"r{number}", logged, config(batch, seed), group="g")
    put(wandb_server, "other", rows(9.0), config(16, 2), group="h")
    put(wandb_server, "failed", rows(9.0)[:3], config(16, 2), group="g", state="crashed")
    source = "wandb:team/crescendo"
    found = report(load(offline, source=source, files=None, filters={"group": ["g"]}))
    assert found.sweep.source.name == source
    assert [c.difference for c in found.comparisons] == [c.difference for c in from_files.comparisons]
    states = {run.id: (run.state, run.problem) for run in found.sweep.runs}
    crashed = {"failed": ("FAILED", "crashed, says wandb")}
    assert states == {f"r{number}": ("DONE", None) for number in range(4)} | crashed
    assert all(run.url and run.url.startswith(wandb_server.url) for run in found.sweep.runs)


# --- filters, axes, seeds, tasks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({"train.batch_size": 16}, ["r0", "r1"]),
        ({"train.batch_size": [16, 64], "rng": "1"}, ["r1", "r3"]),
        ({"group": "g", "state": "finished"}, ["r0", "r1", "r2", "r3"]),
        ({"tags": "b", "id": ["r2", "r9"]}, ["r2"]),
        ({"name": "name of r3"}, ["r3"]),
    ],
)
def test_filters(offline: Path, filters: dict[str, Any], ids: list[str]) -> None:
    assert [run.id for run in load(offline, filters=filters).runs] == ids


def test_a_filter_that_no_run_passes_tells_what_there_is(offline: Path) -> None:
    words = refused(offline, filters={"group": "ablation", "train.batch_size": 16})
    assert "none of 4 runs passes group: ablation, train.batch_size: 16" in words
    assert "There are: group: g (4)" in words and "There are: train.batch_size: 16 (2), 64 (2)" in words


def test_without_a_seed_nothing_is_paired(offline: Path) -> None:
    found = report(load(offline, seed=None))
    assert [len(s.finished) for s in found.schedules] == [2, 2]
    assert [c.kind for c in found.comparisons] == ["no shared seed"]
    assert any("No config key tells seeds apart" in words for words in found.cautions)


def test_tasks_are_told_apart(home: Path) -> None:
    for number, (batch, data, loss) in enumerate(
        ((16, "a", 2.0), (64, "a", 1.9), (16, "b", 1.0), (64, "b", 1.1))
    ):
        write(home, f"r{number}", rows(loss), config(batch, 0, data={"name": data}), started=number)
    found = report(load(home, task="data.name"))
    assert [(c.schedule, c.baseline) for c in found.comparisons] == [
        ("64 (1)", "16 (1)"),
        ("64 (2)", "16 (2)"),
    ]
    assert "data.name=a: 64 (1) has the lowest" in found.headline
    assert "data.name=b: 16 (2) has the lowest" in found.headline


def test_different_budgets_are_no_comparison(home: Path) -> None:
    write(home, "r0", rows(2.0), config(16, 0))
    write(home, "r1", rows(1.5, steps=40), config(64, 0), started=1)
    assert [c.kind for c in report(load(home)).comparisons] == ["different budget"]


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({"train.batch_size": 16.0}, ["r0", "r1"]),
        ({"train.batch_size": [64.0], "rng": "1.0"}, ["r3"]),
        ({"job_type": "train", "id": "r1"}, ["r1"]),
    ],
)
def test_filters_compare_numbers_as_numbers(offline: Path, filters: dict[str, Any], ids: list[str]) -> None:
    assert [run.id for run in load(offline, filters=filters).runs] == ids


def test_runs_that_differ_in_a_key_without_a_name_are_refused(home: Path, capsys: Read) -> None:
    for number, lr in enumerate((1, 2, 3)):
        own = f"r{number}"
        write(home, own, rows(2.0 + lr), config(16, 0, lr=lr, called=own), started=number)
    words = refused(home)
    assert "3 finished runs have batch: 16, seed: 0" in words and "r0, r1, r2" in words
    assert "lr: 1 (1), 2 (1), 3 (1)" in words and "under axes:" in words and "with filters:" in words
    assert "called" not in words, "it says nothing but which run this is"
    assert [run.axes["lr"] for run in load(home, axes={"batch": "train.batch_size", "lr": "lr"}).runs] == [
        *("1", "2", "3")
    ]
    assert [run.id for run in load(home, filters={"lr": 2}).runs] == ["r1"]


def test_the_same_run_once_more_or_an_attempt_that_failed_is_not_refused(offline: Path) -> None:
    write(offline, "again", rows(2.05), config(16, 0), started=8)
    write(offline, "failed", rows(9.0), config(64, 0, attempt=1), code=1, started=9)
    assert report(load(offline)).schedules[0].by_seed("val_loss") == {"0": 2.05, "1": 2.1}


def test_runs_of_unknown_seeds_share_none(offline: Path) -> None:
    for number, batch in enumerate((16, 16, 64)):
        bare = {"train": {"batch_size": batch}}
        write(offline, f"s{number}", rows(3.0), bare, started=10 + number)
    found = report(load(offline))
    assert [len(s.finished) for s in found.schedules] == [4, 3]
    assert found.comparisons[0].difference is not None and found.comparisons[0].difference.n == 2


# --- logs that are not as one would wish -----------------------------------------------------------------


def test_two_files_of_a_run_are_one_run_whose_later_rows_count(home: Path) -> None:
    whole = rows(2.0)
    write(home, "r0", numbered([{**row, "loss": 9.0} for row in whole[:12]]), config(16, 0), code=None)
    write(home, "r0", numbered(whole[8:]), config(16, 0), started=60)
    sweep = load(home)
    (run,) = sweep.runs
    assert (run.id, run.state) == ("r0", "DONE")
    training = sweep.record.drop_nulls("train/loss")
    assert training["step"].to_list() == list(range(1, 21))
    assert training["train/loss"][:8].to_list() == [9.0] * 8 and training["train/loss"][8] < 3
    times = sweep.record["time"].to_list()
    assert times == sorted(times) and times[-1] == 8 * 0.5 + 13 * 0.5 - 0.5


def test_files_without_a_counter_of_their_own(home: Path) -> None:
    write(home, "r0", rows(9.0), config(16, 0), code=None)
    write(home, "r0", rows(2.0), config(16, 0), started=60)
    sweep = load(home, metrics={"val/loss": "eval/loss"})
    assert sweep.record["val/loss"].to_list() == [2.0]
    assert any("the last file counts" in words and "r0" in words for words in sweep.cautions)


def test_a_run_that_went_back_counts_its_later_rows(home: Path) -> None:
    whole = rows(2.0)
    write(home, "r0", numbered([*whole[:12], *whole[5:]]), config(16, 0))
    assert load(home).record["step"].to_list() == [*range(1, 21), 20]


def test_a_metric_that_some_runs_lack_is_a_gap(offline: Path) -> None:
    write(offline, "r9", numbered([{"loss": 2.0, "global_step": 1}]), config(64, 9), started=9)
    found = report(load(offline))
    assert any("1 of 5 runs never logged eval/loss (val/loss): r9." in words for words in found.cautions)
    assert any("Without an evaluation after the last step: 1" in words for words in found.cautions)
    assert found.schedules[1].by_seed("val_loss") == {"0": 2.2, "1": 2.35}
    assert found.numbers[4].tokens is None


def test_a_run_that_counts_no_tokens_has_no_part_in_means_over_tokens(offline: Path) -> None:
    bare = [{key: value for key, value in row.items() if key != "consumed"} for row in rows(2.0)]
    write(offline, "r9", bare, config(64, 9), started=9)
    means = report(load(offline)).datasets["training_means"]
    drawn = set(zip(means["schedule"], means["axis"], strict=True))
    assert ("64", "step") in drawn and ("16", "tokens") in drawn and ("64", "tokens") not in drawn


def test_a_run_without_any_of_the_metrics_is_no_finished_run(offline: Path) -> None:
    write(offline, "r9", numbered([{"else": 1.0}]), config(64, 9), started=9)
    run = load(offline).runs[-1]
    assert run.state == "UNREADABLE"
    assert run.problem == "has no row with global_step, consumed, loss, eval/loss"


def test_numbers_that_are_none(offline: Path) -> None:
    bad = [
        {**row, **({"eval/loss": "NaN"} if "eval/loss" in row else {"loss": "Infinity"})} for row in rows(1.0)
    ]
    write(offline, "r9", bad, config(64, 9), started=9)
    found = report(load(offline))
    assert found.schedules[1].diverged == 1
    assert math.isnan(found.schedules[1].by_seed("val_loss")["9"])
    assert [c.kind for c in found.comparisons] == ["diverged"]


def test_one_row(home: Path) -> None:
    write(
        home,
        "r0",
        numbered([{"eval/loss": 2.0, "loss": 2.5, "global_step": 1, "consumed": 9}]),
        config(16, 0),
    )
    found = report(load(home))
    assert found.headline == "16 ends at validation loss 2.000 after 9 tokens."
    assert found.numbers[0].train_loss == 2.5


def test_without_tokens_and_batches(offline: Path) -> None:
    metrics = {"train/loss": "loss", "val/loss": "eval/loss"}
    found = report(load(offline, metrics=metrics))
    assert found.numbers[0].tokens is None and found.numbers[0].steps == 20
    assert found.numbers[0].train_loss == pytest.approx(2.05, abs=0.01)
    assert any("No metric counts tokens" in words for words in found.cautions)
    assert found.headline.startswith("16 has the lowest mean validation loss: ")
    assert [c.difference is not None for c in found.comparisons] == [True]


def test_states(home: Path) -> None:
    for number, code in enumerate((0, 1, None)):
        write(home, f"r{number}", rows(2.0), config(16, number), code=code, started=number)
    found = load(home).runs
    assert [(run.state, run.problem) for run in found] == [
        ("DONE", None),
        ("FAILED", "exit code 1"),
        ("LOST", "its file has no end: it was killed, or goes on"),
    ]


def test_a_damaged_file_is_told(offline: Path) -> None:
    (file,) = offline.glob("wandb/*-r1/*.wandb")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    sweep = load(offline)
    assert sweep.runs[1].state == "LOST"
    assert any(
        words.startswith("Logs that did not come whole") and "run-r1.wandb" in words
        for words in sweep.cautions
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "bytes cannot be read"),  # the first block of a whole file is damaged
        (bytes(300), "so it is no .wandb file"),
        (b"", "holds no record"),
    ],
)
def test_a_file_that_tells_no_run_is_told_and_the_others_go_on(
    offline: Path, data: bytes | None, words: str
) -> None:
    file = write(offline, "r9", rows(2.0), config(64, 9), started=9)
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 255
    file.write_bytes(damaged if data is None else data)
    sweep = load(offline)
    assert [run.id for run in sweep.runs] == ["r0", "r1", "r2", "r3"]
    (note,) = [note for note in sweep.cautions if note.startswith("Files that tell no run")]
    assert "run-r9.wandb" in note and words in note


def test_nothing_but_files_that_tell_no_run(home: Path) -> None:
    write(home, "r0", rows(2.0), config(16, 0)).write_bytes(bytes(300))
    words = refused(home)
    assert "no run is there" in words and "run-r0.wandb cannot be read" in words


def test_steps_that_are_log_calls_are_told(offline: Path) -> None:
    bare = {name: metric for name, metric in METRICS.items() if name != "step"}
    assert any("Steps are wandb's own, _step" in words for words in load(offline, metrics=bare).cautions)
    assert not any("_step" in words for words in load(offline).cautions)


def test_files_by_pattern_and_each_once(offline: Path) -> None:
    found = load(offline, files=["wandb/*-r[01]", "wandb/*/run-r1.wandb", str(offline / "wandb/*-r2")])
    assert [run.id for run in found.runs] == ["r0", "r1", "r2"]


# --- a file that is wrong --------------------------------------------------------------------------------


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(key)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": {}}, "metric: no such setting. Did you mean metrics?"),
        ({"name": None}, "name: missing"),
        *(({"name": name}, "without a slash") for name in ("a/b", "/", ".", "..", "a\nb", " ")),
        (
            {"axes": {"steps": "rng"}},
            "axes: steps: the table of runs has a column of that name. Call it config.steps: rng",
        ),
        ({"source": "wandb"}, "either wandb-offline or wandb:ENTITY/PROJECT"),
        ({"files": None}, "files: missing"),
        ({"files": ["nowhere"]}, "files: nowhere: holds no run-*.wandb"),
        (
            {"metrics": {"val/los": "eval/loss"}},
            "val/los: the report knows no such metric. Did you mean val/loss?",
        ),
        ({"metrics": {"tokens": "consumed"}}, "names no loss"),
        ({"metrics": {"val/loss": "eval/los"}}, "no run has the metric eval/los. Did you mean eval/loss?"),
        ({"metrics": {"val/loss": "eval/los"}}, "There are: consumed, eval/loss, global_step, loss"),
        (
            {"axes": {"batch": "train.batchsize"}},
            "no run has this config key. Did you mean train.batch_size?",
        ),
        ({"axes": {"batch": "train.batchsize"}}, "Keys that differ: train.batch_size, rng"),
        ({"seed": "sed"}, "sed: no run has this config key."),
        ({"axes": {"seed": "rng"}}, "axes: seed: is no axis"),
        ({"axes": "train.batch_size", "metrics": "loss"}, "metrics: is a mapping, not 'loss'"),
        ({"filters": {"rgn": 1}}, "rgn: no run has this config key. Did you mean rng?"),
    ],
)
def test_what_is_wrong_is_named(offline: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refused(offline, **changes)


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "\x00"])
def test_no_settings_at_all(home: Path, text: str, capsys: Read) -> None:
    path = home / "study.yaml"
    path.write_text(text)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.startswith(str(path))


def test_no_such_file_and_a_source_given_twice(offline: Path, capsys: Read) -> None:
    assert main(["nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such file" in capsys.readouterr().err
    assert main([str(file_of(offline)), "--source", "record"]) == 2
    assert "says itself where its runs are" in capsys.readouterr().err


def test_a_sweep_of_the_same_name_keeps_its_report(offline: Path) -> None:
    manifest = offline / "sweeps/study/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    assert "Choose another" in refused(offline)


def test_the_example_is_such_a_file(home: Path) -> None:
    path = home / "study.yaml"
    path.write_text(EXAMPLE)
    found = read_study(path)
    assert set(vars(found)) == set(yaml.safe_load(EXAMPLE))
    assert found.metrics["val/loss"] == "eval/loss" and study.COUNTERS[0] in found.metrics


def test_no_axis_takes_the_name_of_another_column(offline: Path) -> None:
    found = set(runs_table(report(load(offline))).columns)
    assert found == study_file.TAKEN - MORE.keys() | {"batch", "seed"}  # these only where a run has them


def test_numbers_are_those_of_the_last_measured_row(offline: Path) -> None:
    """Rows of something else at the end are no later step."""
    write(offline, "r9", numbered([*rows(2.0), {"global_step": 21, "gpu": 0.5}]), config(64, 9), started=9)
    assert run_numbers(load(offline).rows)[4].val_loss == 2.0
