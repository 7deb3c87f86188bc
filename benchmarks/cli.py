"""How long the command line takes to answer: python -m benchmarks.cli [--repeat N] [--json]

Each answer is a fresh process. Exit code 1 when a median misses its target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.printing import beside_json

TARGET_S = 1.0
_SWEEP = ("-m", "experiment=demo", "batch=constant_16,constant_64,stages,norm_test", "seed=0,1")

# what is asked: (arguments of python, the exit code of the right answer, the target in seconds)
QUESTIONS: dict[str, tuple[tuple[str, ...], int, float | None]] = {
    "python -c 'import hydra' (the floor)": (("-c", "import hydra"), 0, None),
    "--help": (("-m", "pipeline", "--help"), 0, TARGET_S),
    "--cfg job": (("-m", "pipeline", "--cfg", "job"), 0, TARGET_S),
    "a misspelt key": (("-m", "pipeline", "batch.etaa=1"), 2, TARGET_S),
    "a misspelt option": (("-m", "pipeline", "model=tinny"), 2, TARGET_S),
    "an invalid value": (("-m", "pipeline", "batch.size=2"), 2, TARGET_S),
    "preview of 8 points": (("-m", "pipeline", *_SWEEP, "hydra/launcher=preview"), 0, None),
}


@dataclass(frozen=True)
class Answer:
    question: str
    median_s: float
    worst_s: float
    target_s: float | None

    @property
    def missed(self) -> bool:
        return self.target_s is not None and self.median_s > self.target_s


def measure(question: str, repeat: int) -> Answer:
    arguments, code, target = QUESTIONS[question]
    seconds = [_seconds(arguments, code) for _ in range(repeat)]
    return Answer(question, statistics.median(seconds), max(seconds), target)


def _seconds(arguments: tuple[str, ...], code: int) -> float:
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"CRESCENDO_HOME": home}
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
    if result.returncode != code:
        raise RuntimeError(f"{arguments} ended with {result.returncode}, not {code}:\n{result.stderr}")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, help="processes for each question (default 7)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    answers = [measure(question, options.repeat) for question in QUESTIONS]
    if options.json:
        print(json.dumps([asdict(answer) | {"missed": answer.missed} for answer in answers], indent=1))
    with beside_json(options.json):
        width = max(len(answer.question) for answer in answers)
        print(f"{'seconds to answer':{width}}  median  worst  target")
        for a in answers:
            target = "" if a.target_s is None else f"{a.target_s:6.2f}" + ("  MISSED" if a.missed else "")
            print(f"{a.question:{width}}  {a.median_s:6.2f} {a.worst_s:6.2f}  {target}".rstrip())
    return 1 if any(answer.missed for answer in answers) else 0


if __name__ == "__main__":
    sys.exit(main())
