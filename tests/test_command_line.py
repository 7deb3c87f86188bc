"""What a user types and is told, up to the start of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf

import pipeline.__main__
import pipeline.samples
import pipeline.worker
from pipeline.config import ClassifierConfig, Config, check, hints_of, known_keys, typed
from pipeline.store import RunDirectory
from tests.launchers.support import tree_of
from tests.support import ROOT, compose_tree, config

CONF = ROOT / "conf"


@pytest.fixture(autouse=True)
def elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run directories handed to the worker, which trains nothing and says 7."""
    runs: list[str] = []
    monkeypatch.setattr(pipeline.worker, "main", lambda arguments: runs.extend(arguments) or 7)
    return runs


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    try:
        return pipeline.__main__.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


# --- a rejected request ----------------------------------------------------------------------------------

NO_SWEEP = "several values make a sweep, which needs -m: python -m pipeline -m "
REJECTED = {
    "batch.etaa=1": "batch.etaa: no such setting. Did you mean batch.eta?",
    "+batch.etaa=1": "batch.etaa: no such setting. Did you mean batch.eta?",
    "++foo=1": "foo: no such setting.",
    "~batch.etaa": "batch.etaa: no such setting. Did you mean batch.eta?",
    "~lr.warmup_steps": "lr.warmup_steps: is null; there is nothing to delete",
    "~batch=6": "~batch=6: batch is a group of settings, its options are",
    "~optim=[1e400]": "~optim=[1e400]: optim is a group of settings, its options are",
    "model.l2=1": "model.l2: only a model of model.kind=logistic|mlp|cnn|resnet18 has it",
    "modell=tiny": "modell: no such setting. Did you mean model?",
    "model=tinny": "model=tinny: no such option of model. Did you mean tiny? Options: 10m, 60m,",
    "batch=Norm_test": "batch=Norm_test: no such option of batch. Did you mean norm_test? Options: composite,",
    "parallel=dpp": "parallel=dpp: no such option of parallel. Did you mean ddp? Options: ddp,",
    "experiment=demoo": "experiment=demoo: no such option of experiment. Did you mean demo? Options: adadagrad,",
    "hydra/launcher=locl": "hydra/launcher=locl: no such option of hydra/launcher. Did you mean local?",
    "hydra.launchr=1": "hydra.launchr: Hydra has no such setting",
    "lr=0.1": "lr=0.1: lr is a group of settings, its options are cosine, warmup_stable_decay; one setting",
    "model=null": "model=null: model is a group of settings, its options are 10m,",
    "+experiment=demo": "+experiment=demo: experiment has a value already; leave out the +",
    "batch.eta=abc": "batch.eta=abc: a number is needed, not a text",
    "seed=0.5": "seed=0.5: a whole number is needed, not a number",
    "budget.tokens=2X": "budget.tokens=2X: a count of tokens is needed, such as 300000, 300k, 2M or 1.5B",
    "batch=constant,stages": f"batch=constant,stages: {NO_SWEEP}batch=constant,stages …",
    "seed=range(3)": f"seed=range(3): {NO_SWEEP}'seed=range(3)' …",
    "seed": "seed: not of the form setting=value, such as seed=…",
    "modle": "modle: not of the form setting=value, such as model=10m",
    "data.files=[a": "data.files=[a: cannot be read",
    "seed=${sed}": "seed: Interpolation key 'sed' not found",
    "~data": "data.source: needs a value. An option of its group sets it: data=…",
    "data.source=???": "data.source: needs a value.",
    "batch.size=2": "batch.size=2: smaller than one micro-batch on every rank",
}


@pytest.mark.parametrize("argument", REJECTED)
def test_a_rejected_request_is_explained(
    argument: str,
    started: list[str],
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, argument) == 2
    out, err = capsys.readouterr()
    assert err.startswith(REJECTED[argument]) and out == ""
    assert err.endswith("python -m pipeline --help\n") and "Traceback" not in err and "Hydra14" not in err
    assert started == [] and tree_of(elsewhere) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch.etaa=1,2"], "batch.etaa: no such setting. Did you mean batch.eta?"),
        (["+batch.etaa=1", "seed=0,1"], "batch.etaa: no such setting. Did you mean batch.eta?"),
        (["model=tiny,tinny"], "model=tinny: no such option of model. Did you mean tiny?"),
        (["batch.eta=0.1,abc"], "batch.eta=abc: a number is needed, not a text"),
        (["batch.eta=interval(0,1)"], "batch.eta=interval(0,1): not a list of values."),
        (["hydra/launcher=local,preview"], "Sweeping over Hydra's configuration is not supported"),
        (["sweep.name=a/b"], "sweep.name=a/b: names a directory"),
    ],
)
def test_a_rejected_sweep_is_explained(
    arguments: list[str],
    message: str,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "-m", *arguments) == 2
    assert capsys.readouterr().err.startswith(message)
    assert tree_of(elsewhere) == {}


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), ValueError("a bug"), OSError("a bug")])
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tree: object) -> Config:
        raise bug

    monkeypatch.setattr(pipeline.__main__, "complete", broken)
    with pytest.raises(type(bug), match="a bug"):
        call(monkeypatch, "seed=0")


# --- a single run ----------------------------------------------------------------------------------------


def test_a_single_run_is_frozen_and_handed_to_the_worker(
    started: list[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("batch=norm_test", "seed=3", "data.fingerprint=x")
    assert call(monkeypatch, *arguments) == 7  # the worker's exit code
    run = RunDirectory.of(config(*arguments))
    assert started == [str(run.path)]
    assert run.config().batch.schedule == "norm_test" and run.path.parent == elsewhere / "runs"


def test_settings_that_nothing_reads_are_named(
    started: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = ("model=logistic", "data=digits", "lr.warmup_tokens=0")
    assert (
        call(monkeypatch, *labelled, "optim=adam", "optim.l1=0.1", "data.samples=100", "batch.eta=0.1") == 7
    )
    assert capsys.readouterr().err.splitlines() == [
        "optim.l1: not read by optim=adam",
        "data.samples: not read by data=digits",
        "batch.eta: not read by batch.schedule=constant",
    ]
    read = ("optim=prox_sgd", "optim.l1=0.1", "optim.clip=2", "data.standardise=true", "data.seed=3")
    assert call(monkeypatch, *labelled, *read) == 7
    assert capsys.readouterr().err == ""


def test_the_frozen_config_names_its_data(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "seed=0")
    fingerprint = RunDirectory(started[0]).config().data.fingerprint
    assert fingerprint and fingerprint.startswith("stdlib-3.")


def test_a_chosen_launcher_makes_a_sweep_even_without_m(
    started: list[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "seed=0", "hydra/launcher=preview") == 0
    assert "Nothing was written" in capsys.readouterr().out
    assert started == [] and tree_of(elsewhere) == {}


def test_m_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "seed=0,1", "-m", "model=tiny", "hydra/launcher=preview") == 0
    assert ": 2 points = seed(2)" in capsys.readouterr().out


# --- composition -----------------------------------------------------------------------------------------


def test_an_experiment_overrides_groups_and_the_command_line_overrides_it() -> None:
    group = yaml.safe_load((CONF / "batch" / "stages.yaml").read_text())
    experiment = yaml.safe_load((CONF / "experiment" / "demo.yaml").read_text())
    composed = config("experiment=demo", "batch=stages")
    assert composed.batch.sizes == experiment["batch"]["sizes"] != group["sizes"]
    assert composed.parallel.strategy == "ddp" and composed.budget.tokens == 800_000
    typed_by_hand = config(
        "experiment=demo", "batch=stages", "parallel=single", "budget.tokens=100k", "batch.sizes=[8,16,24]"
    )
    assert typed_by_hand.parallel.strategy == "single" and typed_by_hand.budget.tokens == 100_000
    assert typed_by_hand.batch.sizes == [8, 16, 24]


GROUPS = [
    (file.parent.name, file.stem)
    for file in sorted(CONF.glob("*/*.yaml"))
    if file.parent.name not in ("hydra",)
]


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_of_every_group_works_with_the_defaults(group: str, option: str) -> None:
    needs = {
        ("data", "text"): ["data.files=[x.txt]"],
        ("batch", "coordinate_norm_test"): ["parallel=ddp"],
        ("batch", "composite"): ["optim=prox_sgd", "optim.clip=null"],
        ("optim", "coda"): ["model=logistic", "model.loss=auc", "data=breast_cancer"],
        ("imbalance", "delay"): ["parallel=ddp"],
        ("batch", "seesaw"): ["lr.cut_factor=1.1", "lr.batch_scaling=sqrt"],
        ("batch", "critical"): ["batch.measured_tokens=[1M]", "batch.measured_sizes=[70]"],
        **{("model", kind): ["data=digits"] for kind in get_args(hints_of(ClassifierConfig)["kind"])},
        **{("data", source): ["model=logistic", "data.files=[x]"] for source in pipeline.samples.names()},
    }
    overrides = needs.get((group, option), [])
    if group == "sync":
        overrides = ["parallel=ddp", *(["optim=sgd"] if option == "def" else [])]
    check(typed(OmegaConf.create(compose_tree(f"{group}={option}", *overrides))))


@pytest.mark.parametrize("file", sorted(CONF.glob("hydra/*/*.yaml")), ids=lambda file: file.stem)
def test_every_plugin_that_a_config_names_exists(file: Path) -> None:
    assert get_class(yaml.safe_load(file.read_text())["_target_"]).__module__ == "hydra_plugins.crescendo"


def test_every_group_is_listed_in_the_main_config() -> None:
    listed = {key for entry in yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
              if isinstance(entry, dict) for key in entry if not key.startswith("override ")}  # fmt: skip
    assert listed == {group for group, _ in GROUPS}


# --- real processes --------------------------------------------------------------------------------------


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_exit_code_and_streams_of_a_process() -> None:
    result = python("-m", "pipeline", "batch.etaa=1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "batch.etaa: no such setting. Did you mean batch.eta?",
        "All settings and options: python -m pipeline --help",
    ]


NO_TORCH = """
import sys
import pipeline.__main__
for arguments in (["--help"], ["--cfg", "job"], ["model=tinny"], ["batch.etaa=1"], ["batch.size=2"],
                  ["-m", "seed=0,1", "batch.size=2,16", "hydra/launcher=preview"]):
    sys.argv = ["pipeline", *arguments]
    try:
        code = pipeline.__main__.main()
    except SystemExit as stop:
        code = stop.code
    print("#", arguments, code)
    for module in ("torch", "wandb"):
        assert module not in sys.modules, (arguments, module)
"""


def test_nothing_before_a_run_imports_torch(elsewhere: Path) -> None:
    result = python("-c", NO_TORCH)
    assert result.returncode == 0, result.stderr
    codes = [line.rsplit(" ", 1)[1] for line in result.stdout.splitlines() if line.startswith("# [")]
    assert codes == ["0", "0", "2", "2", "2", "2"]
    help_text = result.stdout[: result.stdout.index("# [")]
    assert "batch: composite, constant, " in help_text and "micro_batch: 4" in help_text
    assert tree_of(elsewhere) == {}


def test_the_pipeline_imports_neither_launchers_nor_analysis() -> None:
    code = "import sys, pipeline.__main__, pipeline.worker\n"
    code += "print([m for m in sys.modules if m.split('.')[0] in ('launchers', 'analysis')])"
    assert python("-c", code).stdout.strip() == "[]"


def test_help_shows_every_option_and_every_setting_with_its_meaning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for group in ("batch", "model", "parallel", "lr"):
        options = ", ".join(sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")))
        assert f"  {group}: {options}\n" in text
    leaves = {key.rsplit(".", 1)[-1] for key in known_keys() if "." in key and not key.startswith("model.")}
    for leaf in leaves:
        assert f"\n  {leaf}: " in text, leaf
    assert "# never shrink" in text
