from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis import typeset
from analysis.latex import Strong, escaped, tabular
from analysis.load import load_sweep
from analysis.render import render
from analysis.report import Report, build
from analysis.tables import tables
from tests.analysis.synthetic import Point, pairs, short_run, write_sweep
from tests.analysis.test_report import cells

AWKWARD = (
    r"""a_b 50% A&B #1 ~x ^y \z {q} $5 <i> |p| "c" [d]* --no e--f 1 ± 2 × 3 · η = 0.2 −1 – — … ≤ ≥ é ß 中"""
)

# What each piece of LaTeX stands for, to read a table back independently of how it was written.
PIECES = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textasciigrave{}": "`",
    r"\ldots{}": "…",
    r"$\pm$": "±",
    r"$\times$": "×",
    r"$\cdot$": "·",
    r"$\leq$": "≤",
    r"$\geq$": "≥",
    r"$\eta$": "η",
    r"$\theta$": "θ",
    "$-$": "−",
    "$<$": "<",
    "$>$": ">",
    "$|$": "|",
    **{f"\\{c}": c for c in "&%$#_{}"},
    "---": "—",
    "--": "–",
    "''": '"',
    "{-}": "-",
    "{[}": "[",
    "{*}": "*",
    "~": "\N{NO-BREAK SPACE}",
}
READER = re.compile("|".join(map(re.escape, sorted(PIECES, key=len, reverse=True))) + r"|[^\\{}$&%#_^~]")


def read(source: str) -> str:
    """The words of a cell; fails on any character that LaTeX takes for a command."""
    found, place = [], 0
    while place < len(source):
        piece = READER.match(source, place)
        assert piece, source[place:]
        found.append(PIECES.get(piece.group(), piece.group()))
        place = piece.end()
    return "".join(found)


def rows_of(source: str) -> list[list[str]]:
    """The cells of a tabular, bold ones between asterisks; fails where a row has more or fewer columns."""
    lines = source.splitlines()
    begin = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[1])
    assert begin and lines[0].startswith("%") and lines[-1] == r"\end{tabular}"
    assert (lines[2], lines[-2]) == (r"\toprule", r"\bottomrule")
    found = []
    for line in lines[2:-2]:
        if line in (r"\toprule", r"\midrule"):
            continue
        assert line.endswith(r" \\")
        body = line.removesuffix(r" \\")
        if title := re.fullmatch(r"\\multicolumn\{(\d+)\}\{l\}\{(.*)\}", body):
            assert int(title[1]) == len(begin[1])
            found.append([read(title[2])])
            continue
        row = re.split(r" & ", body)
        assert len(row) == len(begin[1]), line
        bold = [re.fullmatch(r"\\textbf\{(.*)\}", cell) for cell in row]
        found.append([f"*{read(b[1])}*" if b else read(cell) for cell, b in zip(row, bold, strict=True)])
    return found


def test_every_special_character_is_escaped() -> None:
    assert read(escaped(AWKWARD)) == AWKWARD.replace("中", "[U+4E2D]")
    assert escaped("two\n\nlines  \t here") == "two lines here"
    assert "---" not in escaped("a---b")  # no dash where there were hyphens


def test_a_table_by_hand() -> None:
    blocks = [("tiny", [["a_1", Strong("2 ± 1")], ["b", "3"]]), ("", [["c", "–"]])]
    assert tabular(["x", "y"], blocks, 1) == (
        "% needs \\usepackage{booktabs}\n"
        "\\begin{tabular}{lr}\n\\toprule\nx & y \\\\\n\\midrule\n"
        "\\multicolumn{2}{l}{tiny} \\\\\n"
        "a\\_1 & \\textbf{2 $\\pm$ 1} \\\\\nb & 3 \\\\\n"
        "\\midrule\nc & -- \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


LOSSES = {"constant_16": [2.00, 2.10, 2.20], "norm_test": [1.90, 2.01, 2.10], "stages": [1.95, 2.08, 2.30]}


@pytest.fixture
def report(home: Path) -> Report:
    write_sweep("s", pairs(LOSSES))
    manifest = home / "sweeps/s/manifest.json"
    manifest.write_text(manifest.read_text().replace('"batch": "stages"', r'"batch": "a_b%&#{}~^\\\\"'))
    return build(load_sweep("s"), [], 0.0)


def test_the_numbers_are_those_of_the_report(report: Report) -> None:
    latex = typeset.latex(report)
    markdown = render("report.md.j2", report)
    header, *rows = rows_of(latex["schedules"])
    shown = [dict(zip(header, row, strict=True)) for row in rows]
    assert shown[2]["schedule"] == r"a_b%&#{}~^\\"
    for row, other in zip(shown, cells(markdown, "Schedules"), strict=True):
        for column in (
            "validation loss",
            "difference to baseline",
            "p, corrected",
            "steps",
            "training time",
            "runs",
        ):
            assert row[column].strip("*") == other[column].replace("&lt;", "<"), column
    for name, source in latex.items():
        assert len(rows_of(source)) > 1, name


def test_bold_is_what_can_be_told_from_all_others(home: Path) -> None:
    """norm_test is lower by 0.1 or so in every seed; of the two others none can be told from the lower."""
    write_sweep("s", pairs({"norm_test": LOSSES["norm_test"], "constant_16": LOSSES["constant_16"]}))
    header, *rows = rows_of(typeset.latex(build(load_sweep("s"), [], 0.0))["schedules"])
    column = header.index("validation loss")
    assert [row[column].startswith("*") for row in rows] == [True, False]


def test_nothing_is_bold_among_the_indistinguishable(report: Report) -> None:
    header, *rows = rows_of(typeset.latex(report)["schedules"])
    assert not [row for row in rows if row[header.index("validation loss")].startswith("*")]


def test_the_layout_of_the_paper(home: Path) -> None:
    """Adaptive schedules by eta, constants by size, stages; one block for each model."""
    points = [
        Point({"model": model, "batch": batch, **more, "seed": "0"}, short_run(2.0, seconds=7200.0))
        for model in ("tiny", "10m")
        for batch, more in (
            ("stages", {}),
            ("constant_64", {}),
            ("norm_test", {"batch.eta": "0.3"}),
            ("constant_16", {}),
            ("linear", {}),
            ("norm_test", {"batch.eta": "0.15"}),
        )
    ]
    points[-1].state = "FAILED"  # nothing to show of it
    write_sweep("s", points)
    found = build(load_sweep("s"), [], 0.0)
    header, *rows = rows_of(typeset.latex(found)["lau_table"])
    assert header == ["schedule", "steps", "batch size", "time (h)", "training loss", "validation loss"]
    names = [
        "norm_test, η = 0.15",
        "norm_test, η = 0.3",
        "constant 16",
        "constant 64",
        "stages 16-32-64 for 10-20-70%",
        "10m · linear",
    ]
    assert [row[0] for row in rows] == ["tiny", *names[:-1], "tiny · linear", "10m", *names[1:]]
    assert rows[1] == ["norm_test, η = 0.15", "4", "1,562", "2.00", "3.000", "2.000"]
    markdown = typeset.lau_markdown(found).splitlines()
    assert markdown[2] == "| *tiny* | | | | | |"
    assert markdown[3] == "| norm_test, η = 0.15 | 4 | 1,562 | 2.00 | 3.000 | 2.000 |"
    assert tables(found)["lau_table"]["hours"].to_list() == [2.0] * 11


def test_two_schedules_of_one_name_are_told_apart(home: Path) -> None:
    points = [
        Point({"batch": "constant_16", "optim.lr": lr, "seed": "0"}, short_run(2.0))
        for lr in ("0.001", "0.002")
    ]
    write_sweep("s", points)
    rows = rows_of(typeset.latex(build(load_sweep("s"), [], 0.0))["lau_table"])
    assert [row[0] for row in rows[2:]] == [
        "constant 16 (constant_16 · lr=0.001)",
        "constant 16 (constant_16 · lr=0.002)",
    ]


@pytest.mark.parametrize("name", ["schedules", "runs", "equal", "targets", "lau_table"])
def test_csv_and_parquet_hold_the_same(demo: Path, name: str) -> None:
    parquet = pl.read_parquet(demo / f"tables/{name}.parquet")
    text = pl.read_csv(
        demo / f"tables/{name}.csv", schema_overrides=dict.fromkeys(parquet.columns, pl.String)
    )
    assert_frame_equal(text, pl.read_csv(parquet.write_csv().encode(), schema_overrides=dict(text.schema)))
    assert len(parquet) > 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on PATH")
def test_it_compiles_with_booktabs_alone(report: Report, tmp_path: Path) -> None:
    tables = [*typeset.latex(report).values(), tabular(["x"], [(AWKWARD, [[AWKWARD], [Strong(AWKWARD)]])], 1)]
    body = "\n\n".join(tables)
    document = (
        f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{body}\n\\end{{document}}\n"
    )
    (tmp_path / "tables.tex").write_text(document)
    command = ["pdflatex", "-draftmode", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "tables.log").read_text(errors="replace")
