"""How long the command line takes to answer, and a run to begin.

    python -m benchmarks.cli [--repeat N] [--only TEXT] [--beside DIR] [--json]

Each answer is a fresh process; a question's time ends when the answer is there. Of a run it ends when the
first optimizer step is done, which is when metrics.jsonl has its first row: from a cold `python -m pipeline`,
with the corpus prepared. Its floor is `python -c 'import torch'`, which every rank has to do; the ratio to it
says what the pipeline adds. Rounds of all questions alternate, so that what else the machine does falls on
all of them alike.

--beside DIR asks the code in another checkout the same, in turns within the same rounds, and prints by how
much this one is faster: the ratio of medians there / here. `git worktree add ../before main` makes such a
checkout; it runs in this environment's packages.

Exit code 1 when a median misses its target. The machine should be idle: a busy one adds to all figures.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.printing import beside_json, print_json

HERE = Path(__file__).resolve().parents[1]
TARGET_S = 1.0
TIMEOUT_S = 600
SWEEP = "demo"
_GRID = ("-m", "experiment=demo", "batch=constant_16,constant_64,stages,norm_test", "seed=0,1")
_RUN = ("-m", "pipeline", "experiment=demo", "batch=constant_16", "sweep.name=null")
_SHORT = ("budget.tokens=5k", "lr.warmup_tokens=1k", "eval.sequences=8", "data.sequence_length=64")


@dataclass(frozen=True)
class Question:
    arguments: tuple[str, ...]  # of python
    exit_code: int = 0  # of the right answer
    target_s: float | None = TARGET_S
    first_step: bool = False  # the answer is a run's first row, and nothing after it is waited for


QUESTIONS = {
    "python -c 'import hydra' (floor of the command line)": Question(("-c", "import hydra"), target_s=None),
    "pipeline --help": Question(("-m", "pipeline", "--help")),
    "pipeline --cfg job": Question(("-m", "pipeline", "--cfg", "job")),
    "a misspelt key": Question(("-m", "pipeline", "batch.etaa=1"), 2),
    "a misspelt option": Question(("-m", "pipeline", "model=tinny"), 2),
    "an invalid value": Question(("-m", "pipeline", "batch.size=2"), 2),
    "preview of 8 points": Question(("-m", "pipeline", *_GRID, "hydra/launcher=preview"), target_s=None),
    "launchers --help": Question(("-m", "launchers", "--help")),
    "launchers ls": Question(("-m", "launchers", "ls")),
    "launchers status SWEEP": Question(("-m", "launchers", "status", SWEEP)),
    "launchers logs SWEEP": Question(("-m", "launchers", "logs", SWEEP)),
    "launchers sync --help": Question(("-m", "launchers", "sync", "--help")),
    "analysis --help": Question(("-m", "analysis", "--help")),
    "analysis SWEEP": Question(("-m", "analysis", SWEEP), target_s=None),
    "pipeline.data data=stdlib": Question(("-m", "pipeline.data", "data=stdlib"), target_s=None),
    "pipeline.export --help": Question(("-m", "pipeline.export", "--help")),
    "python -c 'import torch' (floor of a run)": Question(("-c", "import torch"), target_s=None),
    "first step, 1 process": Question((*_RUN, "parallel=single"), target_s=None, first_step=True),
    "first step, 2 processes (ddp)": Question((*_RUN, "parallel=ddp"), target_s=None, first_step=True),
}
RUN_FLOOR = "python -c 'import torch' (floor of a run)"


@dataclass(frozen=True)
class Answer:
    question: str
    median_s: float
    worst_s: float
    target_s: float | None
    of_floor: float | None = None  # a run's: the median as a multiple of `import torch`
    faster: float | None = None  # with --beside: the median there / here

    @property
    def missed(self) -> bool:
        return self.target_s is not None and self.median_s > self.target_s


def measure(questions: list[str], repeat: int, homes: Path, beside: Path | None) -> list[Answer]:
    """`homes`: a directory for a CRESCENDO_HOME of each code, which may not read what another writes."""
    codes = [HERE, *filter(None, [beside])]
    home = {code: homes / str(number) for number, code in enumerate(codes)}
    for code in codes:
        prepare(home[code], code)
    seconds: dict[tuple[str, Path], list[float]] = {(name, code): [] for name in questions for code in codes}
    for turn in range(repeat):
        for name in questions:
            for code in codes if turn % 2 == 0 else reversed(codes):
                seconds[name, code].append(_ask(QUESTIONS[name], code, home[code], turn))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    floor = median.get((RUN_FLOOR, HERE))
    return [
        Answer(
            name,
            median[name, HERE],
            max(seconds[name, HERE]),
            QUESTIONS[name].target_s,
            median[name, HERE] / floor if floor and QUESTIONS[name].first_step else None,
            median[name, beside] / median[name, HERE] if beside else None,
        )
        for name in questions
    ]


def _ask(question: Question, code: Path, home: Path, turn: int) -> float:
    arguments = question.arguments
    if question.first_step:  # a run that there has not been yet
        arguments = (*arguments, f"seed={1000 + turn}")
    with tempfile.TemporaryDirectory() as empty:
        place = Path(empty)
        for entry in ("corpora", "runs", "sweeps"):
            if (home / entry).exists() and not (question.first_step and entry == "runs"):
                (place / entry).symlink_to(home / entry)
        environment = os.environ | {"CRESCENDO_HOME": empty, "PYTHONPATH": str(code)}
        ask = _first_step if question.first_step else _answer
        return ask([sys.executable, *arguments], code, environment, question.exit_code)


def _answer(command: list[str], code: Path, environment: dict[str, str], exit_code: int) -> float:
    start = time.perf_counter()
    result = subprocess.run(
        command, cwd=code, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    seconds = time.perf_counter() - start
    if result.returncode != exit_code:
        raise RuntimeError(f"{command} ended with {result.returncode}, not {exit_code}:\n{result.stderr}")
    return seconds


def _first_step(command: list[str], code: Path, environment: dict[str, str], _: int) -> float:
    runs = Path(environment["CRESCENDO_HOME"]) / "runs"
    start = time.perf_counter()
    with _ended(subprocess.Popen(command, cwd=code, env=environment, stdout=subprocess.DEVNULL)) as process:
        while not any(file.stat().st_size for file in runs.glob("*/metrics.jsonl")):
            if process.poll() is not None or time.perf_counter() - start > TIMEOUT_S:
                raise RuntimeError(f"{command}: no step")
            time.sleep(0.002)
        return time.perf_counter() - start


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """It and its ranks are gone when the block ends."""
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGTERM):  # the second does not wait for a checkpoint
            process.send_signal(number)
            time.sleep(0.2)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def prepare(home: Path, code: Path) -> None:
    """The sweep that some ask about, of two short runs, and with it a corpus."""
    arguments = ("-m", "pipeline", "-m", "experiment=demo", "parallel=single", "seed=0,1", *_SHORT)
    environment = os.environ | {"CRESCENDO_HOME": str(home), "PYTHONPATH": str(code)}
    _answer([sys.executable, *arguments], code, environment, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, help="processes for each question (default 7)")
    parser.add_argument("--only", metavar="TEXT", help="the questions that contain this, and the floors")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another checkout, asked in turns")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    asked = [name for name in QUESTIONS if not options.only or options.only in name or "floor" in name]
    with tempfile.TemporaryDirectory() as homes:
        beside = options.beside.resolve() if options.beside else None
        answers = measure(asked, options.repeat, Path(homes), beside)
    if options.json:
        print_json([asdict(answer) | {"missed": answer.missed} for answer in answers])
    with beside_json(options.json):
        print("\n".join(_table(answers)))
    return 1 if any(answer.missed for answer in answers) else 0


def _table(answers: list[Answer]) -> list[str]:
    width = max(len(answer.question) for answer in answers)
    lines = [f"{'seconds to answer':{width}}  median  worst  target  of floor  before/now"]
    missed = "  MISSED"
    for a in answers:
        cells = (_cell(a.target_s, 6), _cell(a.of_floor, 8), _cell(a.faster, 10))
        line = f"{a.question:{width}}  {a.median_s:6.2f} {a.worst_s:6.2f}  {'  '.join(cells)}"
        lines.append(line.rstrip() + (missed if a.missed else ""))
    return lines


def _cell(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:{width}.2f}"


if __name__ == "__main__":
    sys.exit(main())
