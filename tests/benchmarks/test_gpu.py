"""The benchmark of a GPU, all of it but the GPU: a tiny model on the CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.gpu
from benchmarks.gpu import (
    CASES,
    Case,
    Figures,
    Switch,
    compiled_graphs,
    content,
    describe,
    main,
    random_corpus,
    verdicts,
)
from benchmarks.step import EVERY_STEP, trainer
from pipeline.throughput import peak_flops
from tests.support import config

ON_CPU = ["data.sequence_length=32", "budget.tokens=1M", "parallel.precision=bfloat16", "launch.device=cpu"]
FAST = Figures(2e5, 0.55, 30.0, 30.1, {"ratio": 1.005, "q1": 1.0, "q3": 1.01}, [1, 1, 2, 2, 4, 4], 1, 0)


@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_all_parts_on_a_cpu(home: Path, compiled: str, capsys: pytest.CaptureFixture[str]):
    told = content({"small": Case("tiny", 2, 0.5)}, 3, [*ON_CPU, f"parallel.compile={compiled}"])
    found = told["figures"]["small"]
    assert found["accumulations"] == [1, 1, 2, 2, 4, 4]
    assert found["tokens_per_s"] > 0 and 0.2 < found["statistics"]["ratio"] < 5
    assert found["mfu"] is found["peak_gib"] is None
    assert found["compiled"] == (1 if compiled == "true" else 0)
    assert found["compiled_again"] == 0 and found["met"] == {"compiled once": True}
    assert told["machine"]["torch"] == torch.__version__
    table = capsys.readouterr().out
    assert "target for an H200 ≥ 0.50" in table and "compiled once" in table


def test_statistics_are_off_without_their_hooks(home: Path, small_corpus: list[str]):
    overrides = ["model=tiny", "data.sequence_length=32", *small_corpus]
    run = trainer(config(*overrides))
    switch = Switch(run, config(*overrides, *EVERY_STEP))
    for on in (False, True, False):
        switch.set(on)
        assert all(bool(weight._backward_hooks) == on for weight in run.parameters)
        run.step()
    run.close(0)
    assert ["stat/variance" in row for row in run.run.rows()] == [False, True, False]


def test_what_is_compiled_again_is_counted():
    double = torch.compile(lambda tensor: 2 * tensor, backend="eager")
    before, counts = compiled_graphs(), []
    for sequences in (2, 2, 3):
        double(torch.ones(sequences, 4))
        counts.append(compiled_graphs() - before)
    assert counts == [1, 1, 2]


def test_targets_count_on_an_h200_alone():
    case, h200, other = CASES["300M"], "NVIDIA H200", "NVIDIA H100 80GB HBM3"
    assert verdicts(case, FAST, h200) == {"statistics": True, "MFU": True, "compiled once": True}
    assert verdicts(case, replace(FAST, mfu=0.49), h200)["MFU"] is False
    assert verdicts(case, replace(FAST, statistics={"ratio": 1.02}), h200)["statistics"] is False
    assert verdicts(case, replace(FAST, mfu=0.1), other) == {"compiled once": True}
    assert verdicts(case, replace(FAST, compiled_again=2), other) == {"compiled once": False}
    assert verdicts(CASES["3B"], "does not fit", h200) == {"fits": False}
    assert verdicts(CASES["3B"], "does not fit", other) == {}
    assert "≥ 0.50 MISSED" in describe("300M", case, replace(FAST, mfu=0.49), h200)


def test_the_models_are_as_large_as_they_are_called():
    sizes = {name: config(f"model={case.model}").model.parameters for name, case in CASES.items()}
    assert sizes["300M"] == pytest.approx(3.0e8, rel=0.05)
    assert sizes["1B"] == pytest.approx(1.1e9, rel=0.05)
    assert sizes["3B"] == pytest.approx(3.4e9, rel=0.05)


def test_random_tokens_use_the_whole_vocabulary():
    composed = config("model=tinyllama_1b", "data.sequence_length=2048")
    corpus = random_corpus(composed)
    assert len(np.unique(corpus.train)) == corpus.vocab_size == 32000


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert main() == 0
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "no CUDA device here: nothing is measured\n"


def test_a_model_that_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch):
    def spawned(*arguments: object) -> object:
        text = "torch.OutOfMemoryError: CUDA out of memory"
        raise torch.multiprocessing.ProcessRaisedException(text, 0, 1)

    monkeypatch.setattr(benchmarks.gpu, "on_mesh", spawned)
    figure = content({"small": Case("tiny", 2, None)}, 3, ON_CPU)["figures"]["small"]
    assert "does not fit" in figure["failed"] and figure["met"] == {}


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_of_a_device_by_its_name(name: str, tera: int | None):
    assert peak_flops(name) == (None if tera is None else tera * 1e12)
