"""Batch schedules that cannot run are refused with the numbers and a remedy."""

from __future__ import annotations

import pytest

from pipeline.batch import names
from pipeline.config import ConfigError
from tests.batch.support import SMALL
from tests.support import config

INNER = "batch=inner_product"
LINEAR = "batch=linear"
CRITICAL = ["batch=critical", "batch.measured_tokens=[10k,20k]", "batch.measured_sizes=[10,20]"]
SEESAW = ["batch=seesaw", "lr.cut_factor=1.1", "lr.batch_scaling=sqrt"]
DDP = "parallel=ddp"
SAMPLE = "batch.estimator=sample"
DIGITS = ["model=logistic", "data=digits", "data.sequence_length=1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["batch=norm_test", SAMPLE],
            "model=tiny: gradients of single samples are those of labelled ones. Use batch.estimator=microbatch; "
            "with data.micro_batch=1",
        ),
        (
            ["batch=norm_test", SAMPLE, *DIGITS, "parallel=fsdp"],
            "which parallel=fsdp spreads. Use parallel=single or parallel=ddp, or batch.estimator=microbatch",
        ),
        ([INNER, SAMPLE, *DIGITS, "parallel.compile=true"], "Use parallel.compile=false"),
        ([INNER, SAMPLE, *DIGITS, "parallel.precision=bfloat16"], "Use parallel.precision=float32"),
        ([INNER, SAMPLE, *DIGITS, "model.loss=auc"], "model.loss=auc: the saddle point's own"),
        (
            ["batch=norm_test", SAMPLE, *DIGITS, "batch.measured_units=2"],
            "batch.measured_units=2: counts micro-batches; batch.estimator=sample needs it to be null",
        ),
        (
            ["batch=norm_test", SAMPLE, *DIGITS, "batch.size=1", "data.micro_batch=1"],
            "batch.size=1: the variance needs two samples. Nearest batch.size: 2",
        ),
        (
            [INNER, SAMPLE, *DIGITS, DDP, "sync=local_sgd"],
            "not of samples. Use batch.direction=in_sample batch.estimator=worker",
        ),
        (
            [INNER, SAMPLE, *DIGITS, DDP, "sync=local_sgd", "batch.direction=in_sample"],
            "not of samples. Use batch.estimator=worker",
        ),
        (
            ["batch=stages", "batch.fractions=[0.5,0.4,0.2]"],
            "sum to 1.1, they must sum to 1; [0.5, 0.4, 0.1] does",
        ),
        (["batch=stages", "batch.fractions=[0.5,0.5]"], "3 sizes for 2 fractions"),
        (["batch=stages", "batch.sizes=[2,32,64]"], "2 is smaller than one micro-batch"),
        (["batch=norm_test", "batch.estimator=worker"], "does not show"),
        (
            ["batch=norm_test", "batch.max_size=4"],
            "below the first batch, batch.size=8 rounded up to a multiple of 4. Nearest: 8",
        ),
        (["batch=norm_test", DDP, "batch.size=18", "batch.max_size=20"], "multiple of 8. Nearest: 24"),
        (["batch=norm_test", "batch.max_size=null"], "needs a cap"),
        (["batch=norm_test", "batch.eta=0"], "batch.eta=0: must be above 0"),
        (["batch=norm_test", "batch.eta=-0.1"], "batch.eta=-0.1: must be above 0"),
        (
            ["batch=norm_test", "batch.size=4"],
            "1 data-parallel rank with accumulation 1 has one. Nearest batch.size: 8 (accumulation 2)",
        ),
        (["batch=norm_test", "batch.schedule=normtest"], "Did you mean norm_test?"),
        (
            ["batch=norm_test", DDP, "batch.estimator=worker", "batch.measured_units=2"],
            "counts micro-batches",
        ),
        ([INNER, "batch.theta=null"], "batch.theta=null: the inner-product test needs it (0.9 in"),
        ([INNER, "batch.nu=null"], "batch.nu=null: the orthogonality test needs it (5.84 there"),
        ([INNER, "batch.epsilon=0.5"], "epsilon stands for both"),
        ([INNER, "batch.measured_units=1"], "needs two micro-batches. Nearest: 2"),
        (
            ["batch=noise_scale", "batch.norm=l1", "batch.estimator=worker", "batch.signal=plain"],
            "batch.norm=l1: compares the gradients of data-parallel ranks",
        ),
        (
            ["branch.run=x", "branch.tokens=255k"],
            "budget.tokens=256000: less than one batch after branch.tok",
        ),
        ([INNER, "batch.direction=in_sample"], "batch.direction=in_sample: compares the gradients of data-"),
        (
            [INNER, "optim=adagrad"],
            "optim=adagrad keeps no first moment of the gradient; use batch.direction=pre",
        ),
        ([INNER, "optim=sgd", "optim.momentum=0"], "keeps no first moment"),
        (["batch=coordinate_norm_test"], "batch.schedule=coordinate_norm_test: compares the gradients of"),
        (["batch=coordinate_norm_test", DDP, "batch.share=0"], "batch.share=0.0: must be above 0"),
        (["batch=noise_scale", "batch.c=0"], "batch.c=0: must be above 0"),
        (["batch=noise_scale", DDP, "batch.estimator=paper"], "is of batch.schedule=norm_test alone"),
        (["batch=noise_scale", DDP, "batch.norm=l1"], "batch.norm=l1 compares coordinates of ranks"),
        ([LINEAR, "batch.max_size=4"], "below the first batch"),
        ([LINEAR, "batch.max_size=null"], "needs the size that it ends with"),
        ([LINEAR, "batch.ramp_tokens=null"], "A tenth of the budget: 25600"),
        (["batch=seesaw", "lr.batch_scaling=sqrt"], "lr.cut_factor=null: batch.schedule=seesaw grows the"),
        (
            ["batch=seesaw", "lr.cut_factor=1.1"],
            "lr.batch_scaling=none: batch.schedule=seesaw is defined with",
        ),
        ([*SEESAW, "lr.cut_factor=1.0"], "lr.cut_factor=1.0: must be above 1"),
        ([*SEESAW, "lr.min_ratio=0"], "would grow without end. A usual choice: 512"),
        (["batch=critical"], "needs both, the critical batch"),
        ([*CRITICAL, "batch.measured_sizes=[10]"], "1 sizes for 2 token counts"),
        ([*CRITICAL, "batch.measured_tokens=[20k,10k]"], "must increase. Sorted: [10000, 20000]"),
        ([*CRITICAL, "batch.measured_tokens=[a,b]"], "a count of tokens is needed"),
        (
            ["lr.batch_scaling=linear"],
            "lr.batch_scaling=linear: is not defined for optim=adamw, which has none",
        ),
        (["lr.batch_scaling=adascale"], "is not defined for optim=adamw"),
        (["optim=sgd", "lr.batch_scaling=sqrt"], "for optim=sgd, which has none and linear and adascale"),
        (
            ["optim.name=adan"],
            "backtracking, coda, muon, prox_sgd, sam, sgd, signum, swa. Did you mean adam?",
        ),
    ],
)
def test_refuses_what_cannot_run(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        config(*SMALL, *overrides)
    assert message in str(refused.value)


def test_every_file_is_an_option():
    assert names() == [
        "composite", "constant", "coordinate_norm_test", "critical", "inner_product", "linear", "noise_scale", "norm_test",
        "seesaw", "stages",
    ]  # fmt: skip
