"""python -m tests.faults [FAMILY…] [--seed N] [--share x/y] [--json]: injects faults and counts what became of
the runs. Exit code 1 when data were lost or something hung, or when all were asked for and too few injected."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from benchmarks.printing import print_json
from tests.faults import families, runs  # noqa: F401
from tests.faults.campaign import BAD, FAMILIES, OUTCOMES, Tally, campaign

AT_LEAST = 500
COUNTED = ["injected", *OUTCOMES]


def main() -> int:
    options = _parser().parse_args()
    if unknown := set(options.family) - set(FAMILIES):
        print(f"{', '.join(unknown)}: no such family. There are: {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    chosen = [FAMILIES[name] for name in options.family or FAMILIES]
    part, parts = map(int, options.share.split("/"))
    began = time.monotonic()
    lab = Path(tempfile.mkdtemp(prefix="crescendo-faults-"))
    with open(lab / "prepare.log", "w") as log:
        prepared = get_context("forkserver").Process(target=runs.prepare_all, args=(lab, log.name))
        prepared.start()
        prepared.join(600)
    if prepared.exitcode != 0:
        print(f"the runs that faults are to befall could not be made: {lab}/prepare.log", file=sys.stderr)
        return 2
    tallies = campaign(
        chosen, lab, options.seed, (part, parts), options.jobs, lambda tally: _tell(tally, lab)
    )
    counts = {tally.family: _counts(tally) for tally in tallies}
    counts["all"] = {name: sum(count[name] for count in counts.values()) for name in COUNTED}
    injected, bad = counts["all"]["injected"], sum(counts["all"][outcome] for outcome in BAD)
    too_few = not options.family and parts == 1 and injected < AT_LEAST
    seconds = round(time.monotonic() - began)
    if options.json:
        print_json(counts, seed=options.seed, share=options.share, seconds=seconds)
    else:
        print(_table(counts, seconds))
    if too_few:
        print(f"{injected} are fewer than {AT_LEAST}", file=sys.stderr)
    if bad:
        print(f"what they left: {lab}/faults", file=sys.stderr)
    else:
        shutil.rmtree(lab)
    return 1 if bad or too_few else 0


def _tell(tally: Tally, lab: Path) -> None:
    """A line for a family that is through, and one for each fault that ended badly."""
    counts = ", ".join(f"{tally.count(outcome)} {outcome}" for outcome in OUTCOMES if tally.count(outcome))
    print(f"{tally.family}: {counts} ({tally.seconds:.0f} s)", file=sys.stderr, flush=True)
    for number, verdict in tally.verdicts.items():
        if verdict.outcome in BAD:
            print(f"  {number}: {verdict.outcome}: {verdict.why}", file=sys.stderr, flush=True)


def _counts(tally: Tally) -> dict[str, int]:
    return {"injected": tally.injected} | {outcome: tally.count(outcome) for outcome in OUTCOMES}


def _table(counts: dict[str, dict[str, int]], seconds: int) -> str:
    rows = [["family", *COUNTED], *([family, *count.values()] for family, count in counts.items())]
    lines = [f"{row[0]:24}" + "".join(f"{cell:>16}" for cell in row[1:]) for row in rows]
    return "\n".join([*lines, f"in {seconds} s"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("family", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--seed", type=int, default=0, help="of what the faults draw")
    parser.add_argument(
        "--share", default="1/1", metavar="x/y", help="every y-th fault of each family, from the x-th"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="faults at a time")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
