"""What is the same run and what is another."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from pipeline.identity import SCHEMA_VERSION, identity_fields, run_id
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
