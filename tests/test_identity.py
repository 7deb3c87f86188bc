"""What is the same run and what is another."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from pipeline.config import to_tree
from pipeline.identity import SCHEMA_VERSION, complete, identity_fields, run_id
from pipeline.store import thawed
from tests.support import config


def test_ten_hex_digits_of_the_canonical_json():
    fields = {**identity_fields(config()), "schema": SCHEMA_VERSION}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert run_id(config()) == hashlib.sha256(text.encode()).hexdigest()[:10]


@pytest.mark.parametrize(
    "overrides",
    [
        ["launch.device=cpu", "launch.max_parallel=4", "launch.cpus_per_task=2"],
        ["track=disabled", "track.project=other", "track.every=1", "track.tags=[a]"],
        ["sweep.name=other", "sweep.strict=true"],
        ["checkpoint.interval_tokens=1k", "checkpoint.interval_minutes=null"],
        ["data.workers=3", "data.files=[elsewhere.txt]"],
        ["optim.lr=0.003", "budget.tokens=2000000", "optim.clip=1"],  # the defaults, written differently
        ["batch.eta=0.1", "batch.max_size=64"],  # constant reads neither
    ],
)
def test_what_cannot_change_the_result_keeps_the_id(overrides: list[str]):
    assert run_id(config(*overrides)) == run_id(config())


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "data.seed=1", "budget.tokens=1M", "model.layers=3", "model.tied=true", "batch.size=16",
        "batch=norm_test", "optim.lr=0.001", "lr=warmup_stable_decay", "data.sequence_length=128",
        "data.micro_batch=8", "parallel=ddp", "parallel.precision=bfloat16", "eval.sequences=8",
        "data.fingerprint=abc", "data.validation_fraction=0.1",
    ],
)  # fmt: skip
def test_what_can_change_the_result_changes_the_id(override: str):
    assert run_id(config(override)) != run_id(config())


def test_settings_an_adaptive_schedule_reads_are_part_of_it():
    assert run_id(config("batch=norm_test", "batch.eta=0.1")) != run_id(config("batch=norm_test"))
    assert "sizes" not in identity_fields(config("batch=norm_test"))["batch"]


@pytest.mark.parametrize("schedule", ["inner_product", "coordinate_norm_test"])
def test_an_estimator_is_part_of_these_schedules_only_where_it_is_samples(schedule: str):
    """Their ids are older than it."""
    overrides = ["model=logistic", "data=digits", "parallel=ddp", f"batch={schedule}"]
    ids = {
        estimator: run_id(config(*overrides, f"batch.estimator={estimator}"))
        for estimator in ("microbatch", "worker", "sample")
    }
    assert ids["microbatch"] == ids["worker"] != ids["sample"]
    assert "estimator" not in identity_fields(config(*overrides))["batch"]


def test_a_value_without_canonical_form_is_an_error():
    good = config()
    bad = dataclasses.replace(good, optim=dataclasses.replace(good.optim, lr=float("nan")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_id(bad)


# --- labelled samples --------------------------------------------------------------------------------------

# As computed by the version before there were any, of the settings as they were then.
KNOWN = {
    "": "d82534a3d6",
    "batch=norm_test": "1d2fe69aa4",
    "data.fingerprint=text-0123456789abcdef data=text data.files=[a.txt]": "f61a9b82c0",
    "parallel=fsdp parallel.shard=2 model=10m": "6c71087075",
    "data.distribution=by_rank parallel=ddp parallel.replicate=4 sync=local_sgd": "83867a1e80",
    "imbalance=delay parallel=ddp parallel.replicate=2": "0c35bf32f3",
}


@pytest.mark.parametrize("overrides", KNOWN)
def test_runs_of_language_models_keep_their_ids(overrides: str):
    composed = config(*overrides.split())
    assert run_id(composed) == KNOWN[overrides]
    frozen = to_tree(composed)
    del frozen["model"]["kind"]
    for later in ("samples", "features", "standardise"):
        del frozen["data"][later]
    assert run_id(thawed(frozen)) == KNOWN[overrides]


LABELLED = ["model=logistic", "lr.warmup_tokens=0", "budget.tokens=1k"]


@pytest.mark.parametrize(
    ("source", "unread"),
    [
        ("data=digits", "data.samples=5 data.features=3 data.field=x data.files=[y] data.tokenizer=z"),
        ("data=synthetic_logistic", "data.field=x data.files=[y]"),
        ("data=libsvm data.files=[a]", "data.files=[b] data.samples=5"),
        ("data=libsvm data.files=[a,b]", "data.validation_fraction=0.5"),
        ("data=cifar data.files=[a]", "data.validation_fraction=0.5 data.samples=5"),
        (
            "data=stdlib model=tiny data.sequence_length=8",
            "data.samples=5 data.features=3 data.standardise=true",
        ),
    ],
)
def test_what_a_source_does_not_read_keeps_the_id(source: str, unread: str):
    base = [*LABELLED, *source.split()]
    assert run_id(config(*base, *unread.split())) == run_id(config(*base))


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("data=digits", "data.standardise=true"),
        ("data=digits", "data.validation_fraction=0.5"),
        ("data=digits", "model=mlp"),
        ("data=digits", "model.l2=0.1"),
        ("data=breast_cancer", "model.loss=binary"),
        ("data=synthetic_logistic", "data.samples=5000"),
        ("data=synthetic_logistic", "data.features=51"),
        ("data=libsvm data.files=[a]", "data.features=51"),
        ("data=libsvm data.files=[a]", "data.validation_fraction=0.5"),
        ("data=idx data.files=[a]", "data.validation_fraction=0.5"),
        ("data=cifar data.files=[a]", "data.standardise=false"),
    ],
)
def test_what_a_source_reads_changes_the_id(source: str, read: str):
    base = [*LABELLED, *source.split()]
    assert run_id(config(*base, read)) != run_id(config(*base))


def test_points_of_a_sweep_share_a_fingerprint_only_where_they_share_the_data():
    known: dict[object, str] = {}
    found = [
        complete(config(*LABELLED, "data=synthetic_logistic", override), known).data.fingerprint
        for override in ("data.samples=100", "data.samples=200", "data.features=7", "seed=1")
    ]
    assert found == [f"synthetic-logistic-{size}" for size in ("100x50", "200x50", "7000x7", "7000x50")]
