"""A point composed from a copy is, setting by setting, what Hydra composes from its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from omegaconf import DictConfig

from launchers.compose import Composer
from pipeline.config import ConfigError, typed
from tests.launchers.support import composed
from tests.support import ROOT

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))

# Points after one another, so that what one sets would show in the next if they shared a tree.
VARIED = [
    ["seed=7", "batch=stages", "optim.lr=1e-4", "model.width=128"],
    ["batch=stages"],  # `data.seed: ${seed}` and what the experiment sets in the group
    ["batch=norm_test", "parallel=fsdp", "batch.eta=0.9", "seed=2", "data.seed=5", "budget.tokens=6M"],
    ["model=10m", "lr=warmup_stable_decay", "lr.warmup_tokens=null", "lr.warmup_steps=9", "sweep.name=other"],
]

ONE_BY_ONE = [
    ["seed=${batch.size}", "batch.size=24"],
    ["batch.eta=0.1", "batch.eta=0.2", "batch.eta=0.1", "batch.eta=0.3"],
    ["batch.sizes=[8,16]", "batch.fractions=[0.25,0.75]"],
    ["data.files=[a.txt,'b c.txt']", "data.field='x=y'", "track.tags=[]"],
    ["track.group=${sweep.name}", "sweep.name=s"],
    ["optim.lr=1e-3", "optim.clip=null", "parallel.compile=true"],
    ["batch={eta:0.1,size:8}", "batch.eta=0.4"],
    ["batch.eta=0.4", "batch={eta:0.1,size:8}"],
    ["+batch={eta:0.1}", "batch.size=8"],
    ["++batch.eta=0.7", "seed=1"],
    ["++seed=4"],
    ["model=tiny", "model=10m"],
    ["experiment=demo", "~experiment"],
    ["hydra.job.name=x", "seed=2"],
    # and mistakes, which are told in the same words
    ["batch.etaa=1"],
    ["batch.etaa.b=1"],
    ["seed.a=1"],
    ["modell=tiny"],
    ["model=tinny"],
    ["model=null"],
    ["model=[tiny]"],
    ["lr=0.1"],
    ["+seed=1"],
    ["+batch.etaa=1"],
    ["~track.entity"],
    ["~data"],
    ["data.source=???"],
    ["seed=${sed}"],
    ["seed=0.5", "batch.eta=abc", "budget.tokens=2X"],
    ["data.files=[a"],
    ["seed"],
    ["seed=1,2"],
    ["model@other=tiny"],
    ["batch.eta@other=1"],
    ["hydra.launchr=1"],
    ["hydra/launcher=locl"],
]


def outcome(compose: Callable[[Sequence[str]], DictConfig], overrides: Sequence[str]) -> object:
    """The typed config, or the words in which it is refused."""
    try:
        return typed(compose(overrides))
    except Exception as error:
        return type(error), str(error), getattr(error, "override", None), getattr(error, "full_key", None)


def settings(composer: Composer) -> Callable[[Sequence[str]], DictConfig]:
    return lambda overrides: composer(overrides).settings


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "null"])
def test_every_experiment_with_varied_values(experiment: str) -> None:
    chosen = [] if experiment == "null" else [f"experiment={experiment}"]
    composer = settings(Composer(composed, zips=[]))
    for point in VARIED:
        overrides = [*chosen, *point]
        assert outcome(composer, overrides) == outcome(composed, overrides)


def test_every_form_of_an_override() -> None:
    composer = settings(Composer(composed, zips=[]))
    for overrides in ONE_BY_ONE:
        truth = outcome(composed, overrides)
        assert outcome(composer, overrides) == truth, overrides
        assert outcome(composer, overrides) == truth, overrides  # from what is kept now


def test_hydra_composes_each_choice_of_options_once() -> None:
    asked: list[list[str]] = []

    def counted(overrides: Sequence[str]) -> DictConfig:
        asked.append(list(overrides))
        return composed(overrides)

    composer = Composer(counted, zips=[])
    for model in ("tiny", "10m"):
        for seed in range(3):
            point = composer([f"model={model}", f"seed={seed}", "batch=stages", "optim.lr=1e-3"])
            assert typed(point.settings).seed == seed
    assert asked == [["model=tiny", "batch=stages"], ["model=10m", "batch=stages"]]
    composer(["model=tiny", "batch=stages", "++seed=3"])
    assert asked[-1] == ["model=tiny", "batch=stages", "++seed=3"]


def test_the_choices_name_what_an_experiment_chose() -> None:
    choices = Composer(composed, zips=[])(["experiment=demo", "seed=3", "model=10m"]).choices
    assert choices["parallel"] == "ddp" and choices["model"] == "10m" and choices["experiment"] == "demo"


def test_a_sweep_has_one_zip() -> None:
    zipped = "sweep.zip=[[seed,model]]"
    Composer(composed, zips=[["seed", "model"]])([zipped, "seed=1"])
    with pytest.raises(ConfigError, match=r"^sweep\.zip=\[\[seed, model\]\]: is of one point alone"):
        Composer(composed, zips=[])([zipped])
    with pytest.raises(ConfigError, match=r"^sweep\.zip=\[\]: is of one point alone"):
        Composer(composed, zips=[["seed", "model"]])(["seed=1"])
