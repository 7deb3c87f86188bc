"""Every experiment of conf/experiment/: its plan can be seen as its first lines say, and is the paper's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline.optim._learning_rate import learning_rate
from tests.launchers.test_preview import preview
from tests.support import ROOT, config

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
PAPERS = [
    "lau2024_microllama", "lau2024_tinyllama", "lau2024_openllama", "adadagrad", "naganuma2026", "merrill2025",
    "seesaw2025", "gpt3_ramp", "bollapragada2018", "espath2021", "adadagrad_mnist", "adadagrad_cifar",
    "xie2020", "coda2020",
]  # fmt: skip

# Of the data sets that labelled samples are read from, in the directory where the command stands.
FILES = [
    "gisette_scale",
    "gisette_scale.t",
    "ijcnn1",
    "ijcnn1.t",
    *(
        f"mnist/{part}-{what}"
        for part in ("train", "t10k")
        for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ),
    *(
        f"cifar-10-batches-bin/{part}_batch{n}.bin"
        for part, n in [("test", ""), *(("data", f"_{i}") for i in range(1, 6))]
    ),
]


def planned(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, str]]:
    """The rows of the preview of an experiment, by column; a wide screen shows all columns."""
    monkeypatch.setenv("COLUMNS", "200")
    extra = ["batch=constant"] if name == "demo" else []
    assert preview(monkeypatch, f"experiment={name}", *extra) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.split()[:1] == ["run"])
    starts = [found.start() for found in re.finditer(r"(?<=  )\S|^\S", header)]
    names = [header[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
    first = lines.index(header) + 1
    rows = [
        re.split(r"\s{2,}", line.strip()) for line in lines[first:] if re.match(r"\s*[0-9a-f]{10} ", line)
    ]
    return [dict(zip(names, row, strict=False)) | {"line": " ".join(row)} for row in rows]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_plan(name: str, here: Path, monkeypatch, capsys):
    for path in FILES:
        (here / path).parent.mkdir(exist_ok=True)
        (here / path).touch()
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    rows = planned(name, monkeypatch, capsys)
    assert rows
    assert f"experiment={name}" in text, "says how it is used"
    expected = len((yaml.safe_load(text).get("hydra") or {}).get("sweeper", {}).get("rows", []))
    assert len(rows) % max(expected, 1) == 0


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_has_a_form_for_two_cores(name: str):
    assert f"{name}_small" in EXPERIMENTS


@pytest.mark.parametrize("name", [f"lau2024_{model}" for model in ("microllama", "tinyllama", "openllama")])
def test_a_fair_form(name: str, here: Path, monkeypatch, capsys):
    """Three seeds and four rates for each row."""
    assert len(planned(f"{name}_fair", monkeypatch, capsys)) == 12 * len(planned(name, monkeypatch, capsys))


@pytest.mark.parametrize(
    ("name", "tests", "steps"),
    [
        ("lau2024_microllama", 4, {"2048": "977", "4096": "489", "8192": "245", "2048→4096→8192": "269"}),
        ("lau2024_tinyllama", 4, {"4096": "489", "8192": "245", "2048→4096→8192": "269"}),
        ("lau2024_openllama", 3, {"4096": "489", "8192": "245", "2048→4096→8192": "269"}),
    ],
)
def test_steps_of_tables_1_to_3(
    name: str, tests: int, steps: dict[str, str], here: Path, monkeypatch, capsys
):
    """Lau et al. 2024: constant and stagewise batches, and as many norm tests as the table has rows of η."""
    rows = planned(name, monkeypatch, capsys)
    assert sum("norm_test" in row["line"] for row in rows) == tests
    found = {row["line"]: row for row in rows if "norm_test" not in row["line"]}
    assert len(found) == len(steps)
    for size, count in steps.items():
        (row,) = (line.split() for line in found if size in line.split())
        assert row[row.index(size, 2 if "→" not in size else 0) :].count(count) == 1, row


@pytest.mark.parametrize("name", ["adadagrad_mnist", "adadagrad_mnist_small"])
def test_the_rate_of_adadagrad_on_mnist_is_constant(name: str):
    """The authors' expt.sh: --learning_rate=8e-3 --decay_lr=False."""
    composed = config(f"experiment={name}")
    rates = {
        learning_rate(composed, step=step, start=start, step_tokens=2)
        for step, start in ((1, 0), (1000, composed.budget.tokens // 2), (2000, composed.budget.tokens - 2))
    }
    assert rates == {composed.optim.lr}


def test_bollapragadas_method_is_whole():
    """As pipeline/batch/inner_product.py says it."""
    batch = config(
        "experiment=bollapragada2018", "batch=inner_product", "batch.theta=0.9", "batch.nu=5.84"
    ).batch
    assert (batch.estimator, batch.direction, batch.ema, batch.averaged_steps) == (
        "sample",
        "in_sample",
        0,
        10,
    )


def test_the_command_line_counts_for_every_row(here: Path, monkeypatch, capsys):
    """Eight rows, of which only the batch sizes are left to differ: 256 from the experiment, and three."""
    monkeypatch.setenv("COLUMNS", "200")
    assert preview(monkeypatch, "experiment=lau2024_microllama", "batch=constant", "seed=1,2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(bool(re.match(r"\s*[0-9a-f]{10} ", line)) for line in lines) == 2 * 4
