"""sweep.zip and sweep.exclude, against points written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

import pipeline.__main__
from launchers import local
from launchers.exclude import comparable
from launchers.grammar import expand
from pipeline.config import ConfigError
from tests.launchers.support import Stub, plan, tree_of
from tests.launchers.test_preview import preview


def points(zips: list[list[str]], *arguments: str) -> list[str]:
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    return [" ".join(point) for point in expand(parsed, zips)]


# --- sweep.zip -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zips", "arguments", "expected"),
    [
        ([], ["a=1,2", "b=x", "c=3,4"], ["a=1 b=x c=3", "a=1 b=x c=4", "a=2 b=x c=3", "a=2 b=x c=4"]),
        ([["a", "c"]], ["a=1,2", "b=x", "c=3,4"], ["a=1 c=3 b=x", "a=2 c=4 b=x"]),
        ([["c", "a"]], ["a=1,2", "b=x,y", "c=3,4"], ["c=3 a=1 b=x", "c=3 a=1 b=y", "c=4 a=2 b=x", "c=4 a=2 b=y"]),
        ([["b", "c"]], ["a=1,2", "b=x,y", "c=3,4"], ["a=1 b=x c=3", "a=1 b=y c=4", "a=2 b=x c=3", "a=2 b=y c=4"]),
        (
            [["a", "b"], ["c", "d"]],
            ["a=1,2", "b=x,y", "c=3,4", "d=z,w"],
            ["a=1 b=x c=3 d=z", "a=1 b=x c=4 d=w", "a=2 b=y c=3 d=z", "a=2 b=y c=4 d=w"],
        ),
        ([["s", "a"]], ["s=range(3)", "a=x,y,z"], ["s=0 a=x", "s=1 a=y", "s=2 a=z"]),
        ([["a", "b"]], ["a=1,1,2", "b=x,y,y"], ["a=1 b=x", "a=1 b=y", "a=2 b=y"]),
        ([["a", "b"]], ["a=1", "b=x"], ["a=1 b=x"]),
        ([["a", "b"]], ["a=1,2", "b=x,y,z", "b=v,w"], ["a=1 b=v", "a=2 b=w"]),  # the last value counts
    ],
)  # fmt: skip
def test_points_written_out_by_hand(zips: list[list[str]], arguments: list[str], expected: list[str]) -> None:
    assert points(zips, *arguments) == expected


def test_without_a_zip_the_points_are_hydras() -> None:
    arguments = [
        "model=10m",
        "seed=range(1,7,2)",
        "batch=a,b",
        "+x='p q',r",
        "data.files=[a,b],[c]",
        "batch=c,d",
    ]
    parsed = OverridesParser.create().parse_overrides(arguments)
    assert [expand(parsed, [])] == BasicSweeper.split_arguments(parsed, None)


@pytest.mark.parametrize(
    ("zips", "message"),
    [
        ([["a", "b"]], "sweep.zip=[[a,b]]: walked together, so all need as many values, but a has 2, b has 3. Give"),
        ([["a", "model"]], "sweep.zip=[[a,model]]: walked together, so all need as many values, but a has 2, model has 1"),
        ([["a", "optim.lr"]], "sweep.zip: optim.lr is not swept. Did you mean optim.lrr?"),
        ([["a", "zzz"]], "sweep.zip: zzz is not swept. Give it values, as in zzz=a,b"),
        ([["a", "optim.lrr"], ["c", "a"]], "sweep.zip: a stands in it 2 times. One axis walks with one group"),
    ],
)  # fmt: skip
def test_a_zip_that_cannot_be_walked(zips: list[list[str]], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        points(zips, "a=1,2", "b=1,2,3", "c=3,4", "optim.lrr=1,2", "model=tiny")
    assert raised.value.problems[0].startswith(message)


def test_zip_on_the_command_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = ("model=tiny,10m", "optim.lr=3e-3,1e-3", "seed=range(2)")
    assert preview(monkeypatch, "sweep.zip=[[model,optim.lr]]", *swept, "sweep.name=z") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sweep z: 4 points = (model, optim.lr)(2) × seed(2)"
    rows = [line.split()[1:4] for line in lines[3:7]]
    assert rows == [
        ["tiny", "0.003", "0"],
        ["tiny", "0.003", "1"],
        ["10m", "0.001", "0"],
        ["10m", "0.001", "1"],
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "sweep.zip=[[model,seed]]",
            "sweep.zip=[[model,seed]]: walked together, so all need as many values, but",
        ),
        (
            "sweep.zip=[model,seed]",
            "sweep.zip=['model', 'seed']: a list of lists of texts is needed, such as [[a, b]]",
        ),
        ("sweep.zip=model", "sweep.zip=model: a list of lists of texts is needed, such as [[a, b]]"),
        ("sweep.zip=[[model]],[[seed]]", "sweep.zip=[[model]]: is of one point alone"),
        ("sweep.zp=[]", "sweep.zp: no such setting. Did you mean sweep.zip?"),
    ],
)
def test_a_mistaken_zip_is_refused(
    given: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preview(monkeypatch, given, "model=tiny,10m", "seed=0,1,2") == 2
    assert message in capsys.readouterr().err


EXPERIMENT = """\
# @package _global_
sweep: {name: zipped, zip: [[model, optim.lr]], exclude: ["seed=1 model=10m"]}
hydra:
  sweeper:
    params: {model: "tiny,10m", optim.lr: "3e-3,1e-3"}
    rows: ["batch=constant batch.size=16", batch=stages]
"""


@pytest.fixture
def experiment(here: Path) -> str:
    """A directory of configs with one more experiment."""
    (here / "more" / "experiment").mkdir(parents=True)
    (here / "more" / "experiment" / "zipped.yaml").write_text(EXPERIMENT)
    return f"hydra.searchpath=[file://{here}/more]"


def test_zip_and_exclude_of_an_experiment_with_params_and_rows(
    experiment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ("batch.sizes=[16,32]", "batch.fractions=[0.5,0.5]")
    assert preview(monkeypatch, experiment, "experiment=zipped", "seed=0,1", *stages) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "sweep zipped: 6 points = batch(2) × (model, optim.lr)(2) × seed(2), 2 left out by sweep.exclude"
    )
    rows = [line.split() for line in lines if line.endswith(" new")]
    first = next(index for index, word in enumerate(rows[0]) if word == "tiny")
    assert [row[first : first + 3] for row in rows] == 2 * [
        ["tiny", "0.003", "0"],
        ["tiny", "0.003", "1"],
        ["10m", "0.001", "0"],
    ]
    assert preview(monkeypatch, experiment, "experiment=demo,zipped") == 2
    assert "is of one point alone" in capsys.readouterr().err


# --- sweep.exclude ---------------------------------------------------------------------------------------

SWEPT = ("model=tiny,10m", "parallel=single,ddp,hsdp", "batch=constant,norm_test", "data.micro_batch=2")
ALL = {
    (m, p, b) for m in ("tiny", "10m") for p in ("single", "ddp", "hsdp") for b in ("constant", "norm_test")
}


@pytest.mark.parametrize(
    ("condition", "left_out"),
    [
        ("model=10m", {x for x in ALL if x[0] == "10m"}),
        ("model=10m parallel=ddp", {x for x in ALL if x[:2] == ("10m", "ddp")}),
        ("model!=10m batch=norm_test", {x for x in ALL if x[0] == "tiny" and x[2] == "norm_test"}),
        ("parallel.world_size>2", {x for x in ALL if x[1] == "hsdp"}),  # 2 × 2 ranks
        ("parallel.world_size>=2", {x for x in ALL if x[1] != "single"}),
        ("parallel.world_size < 2", {x for x in ALL if x[1] == "single"}),
        ("parallel.world_size<=2.5 batch.schedule!=constant", {x for x in ALL if x[1] != "hsdp" and x[2] != "constant"}),
        ("model.parameters>2M", {x for x in ALL if x[0] == "10m"}),
        ("model.parameters<2e6", {x for x in ALL if x[0] == "tiny"}),
        ("budget.tokens=2M parallel=hsdp", {x for x in ALL if x[1] == "hsdp"}),
        ("budget.tokens=2000000 parallel=hsdp", {x for x in ALL if x[1] == "hsdp"}),
        ("optim.lr=0.003 model=tiny", {x for x in ALL if x[0] == "tiny"}),
        ("optim.betas=[0.9,0.95] model=tiny", {x for x in ALL if x[0] == "tiny"}),
        ("batch.max_size<=256 model=tiny", {x for x in ALL if x[0] == "tiny" and x[2] == "norm_test"}),
        ("parallel.compile=false model=tiny", {x for x in ALL if x[0] == "tiny"}),
        ("batch.round_to=null model=tiny", {x for x in ALL if x[0] == "tiny"}),
        ("batch.sizes!=null", set()),
        ("batch.round_to<=1000", set()),  # what is not set has no place in an order
        ("experiment=null model=tiny", {x for x in ALL if x[0] == "tiny"}),
    ],
)  # fmt: skip
def test_a_condition(condition: str, left_out: set[tuple[str, ...]], home: Path) -> None:
    p = plan(*SWEPT, f"sweep.exclude=['{condition}']")
    kept = {(x.axes["model"], x.axes["parallel"], x.axes["batch"]) for x in p.points}
    assert kept == ALL - left_out
    assert len(p.excluded) == len(left_out) and not p.invalid
    assert p.unmet == ([] if left_out else [condition])


def test_an_option_that_an_experiment_chose(home: Path) -> None:
    swept = ("experiment=demo", "seed=0,1", "model=tiny,10m")
    p = plan(*swept, "sweep.exclude=['experiment=demo parallel=ddp seed=1']")
    assert [point.axes for point in p.excluded] == [{"seed": "1", "model": m} for m in ("tiny", "10m")]
    assert plan(*swept, "parallel=single", "sweep.exclude=['parallel=ddp seed=1']").excluded == []


def test_several_conditions_and_the_name_of_the_sweep(home: Path) -> None:
    p = plan("model=tiny,10m", "seed=0,1,2", "sweep.exclude=['model=10m seed>0', 'seed=2']")
    assert [tuple(point.axes.values()) for point in p.points] == [("tiny", "0"), ("tiny", "1"), ("10m", "0")]
    assert plan("model=tiny", "seed=0,1").points[1].run == p.points[1].run  # no part of what a run is
    alone = plan("seed=0,1")
    assert plan("seed=0,1,2", "sweep.exclude=['seed=2']").name == alone.name


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("modle=10m", "sweep.exclude, modle=10m: no such setting. Did you mean model?"),
        ("seed=5 batch.etaa=1", "sweep.exclude, batch.etaa=1: no such setting. Did you mean batch.eta?"),
        ("parallel.mesh>8", "sweep.exclude, parallel.mesh>8: no such setting."),
        ("parallel.worldsize>8", "sweep.exclude, parallel.worldsize>8: no such setting. Did you mean parallel.world_size?"),
        ("model>tiny", "sweep.exclude, model>tiny: > orders numbers, and model is none. Use = or !="),
        ("batch.schedule<=constant", "sweep.exclude, batch.schedule<=constant: <= orders numbers"),
        ("batch.size>x", "sweep.exclude, batch.size>x: a number is needed, such as 8, 0.3 or 2M"),
        ("batch.size>null", "sweep.exclude, batch.size>null: a number is needed"),
        ("parallel.compile=yes", "sweep.exclude, parallel.compile=yes: true or false is needed"),
        ("seed==1", "sweep.exclude, seed==1: not a comparison such as model=60m; the operators are = != < <= > >="),
        ("seed", "sweep.exclude, seed: not a comparison"),
        (" ", "sweep.exclude,  : an empty condition would leave out every point"),
        ('model="tiny', 'sweep.exclude, model="tiny: No closing quotation'),
    ],
)  # fmt: skip
def test_a_mistaken_condition(condition: str, message: str, home: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        plan("seed=0,1", f"sweep.exclude=['{condition}']")
    assert str(raised.value).startswith(message)


def test_every_setting_and_derived_number_can_be_named() -> None:
    kinds = comparable()
    assert kinds["model.parameters"] is int and kinds["seed"] is int and kinds["optim.lr"] is float
    assert kinds["batch.estimator"] is str and kinds["batch.max_size"] is int and kinds["model.tied"] is bool
    assert kinds["budget.tokens"] is int and kinds["trained_tokens"] is int
    assert (
        kinds["batch.measured_tokens"] == list[int] and "parallel.mesh" not in kinds and "model" not in kinds
    )


def test_the_heading_counts_what_is_left_out_and_names_what_matches_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exclude = 'sweep.exclude=["model=10m seed=1","model=10m parallel=ddp"]'
    assert preview(monkeypatch, exclude, "model=tiny,10m", "seed=range(3)", "sweep.name=x") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sweep x: 5 points = model(2) × seed(3), 1 left out by sweep.exclude"
    assert lines[1] == "  sweep.exclude: no point meets model=10m parallel=ddp"
    assert "5 new. Nothing was written." in lines
    exclude = "sweep.exclude=['model=10m']"
    assert preview(monkeypatch, exclude, "model=tiny,10m", "seed=range(3)", "sweep.name=x") == 0
    heading = capsys.readouterr().out.splitlines()[0]
    assert heading == "sweep x: 3 points = model(2) × seed(3), 3 left out by sweep.exclude"


def test_an_option_that_there_is_not_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would exclude nothing."""
    assert preview(monkeypatch, "sweep.exclude=['parallel=dpp']", "seed=0,1") == 2
    assert "parallel=dpp: no such option of parallel. Did you mean ddp?" in capsys.readouterr().err


def test_an_excluded_point_is_not_invalid(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = ("batch=norm_test", "batch.size=2,8")
    assert preview(monkeypatch, *swept) == 2
    assert "1 invalid" in capsys.readouterr().out
    assert preview(monkeypatch, *swept, "sweep.exclude=['batch.size<4']", "sweep.strict=true") == 0
    assert "invalid" not in capsys.readouterr().out


def test_nothing_is_left(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for launcher in ("preview", "local"):
        arguments = ["-m", "seed=0,1", "sweep.exclude=['seed=0','seed>=0']", f"hydra/launcher={launcher}"]
        monkeypatch.setattr("sys.argv", ["pipeline", *arguments])
        assert pipeline.__main__.main() == 2
        assert capsys.readouterr().err.splitlines()[:3] == [
            "sweep.exclude: leaves out all of 2 points, so there is nothing to run",
            "  seed=0: 1 point",
            "  seed>=0: 2 points",
        ]
        assert tree_of(here) == {}


def test_excluded_points_are_not_run(home: Path) -> None:
    stub = Stub(home)
    p = plan("seed=range(3)", "data.fingerprint=x", "sweep.exclude=['seed=1']")
    assert local.run_plan(p, stub) == 0
    assert sorted(stub.runs()) == sorted(point.run for point in p.points if point.run)
    assert len(stub.runs()) == 2 and len(list((home / "runs").iterdir())) == 2
