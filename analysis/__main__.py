"""python -m analysis SWEEP: compares the runs of a sweep and writes reports/SWEEP/."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from analysis.load import Sweep, load_sweep
from analysis.projection import GPU_COUNTS
from analysis.render import write
from analysis.report import Report, build
from analysis.sources import SOURCES
from analysis.study import load_study
from analysis.study_file import EXAMPLE
from analysis.synchronisation import Network
from analysis.tables import to_json
from pipeline.config import ConfigError
from pipeline.store import home, python


def main(arguments: Sequence[str] | None = None) -> int:
    """0: written. 1: written, but no run has finished or nobody reads the output. 2: the request is wrong."""
    try:
        try:
            return _report(arguments)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be caught
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _report(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    sweep = _load(options.sweep, options.source)
    gpu_counts = _numbers("--gpus", options.gpus, int) if options.gpus else GPU_COUNTS
    network = Network(*_numbers("--network", options.network, float, 2)) if options.network else None
    report = build(sweep, options.baseline, time.time(), options.target, gpu_counts, network)
    # Beside the report of the record, which knows more.
    folder = home() / "reports" / sweep.name / sweep.source.folder
    try:
        paths = write(report, folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written: {error}. CRESCENDO_HOME says where reports go"
        ) from None
    address = refused = None
    if options.publish is not None:
        try:
            address = _published(report, folder, options.publish)
        except ConfigError as error:
            refused = error  # the report is there all the same
    if options.json:
        places = {"files": [str(path) for path in paths], **({"published": address} if address else {})}
        print(json.dumps({**to_json(report), **places}, indent=1, allow_nan=False))
    else:
        print("\n".join(_screen(report, paths, address)))
    if refused:
        raise refused
    if not report.finished:
        print(f"{report.sweep.name}: no run has finished; the report shows how far they got", file=sys.stderr)
        return 1
    return 0


def _load(sweep: str, source: str | None) -> Sweep:
    if not sweep.endswith((".yaml", ".yml")):
        return load_sweep(sweep, source or "record")
    if source is not None:
        raise ConfigError(f"--source {source}: {sweep} says itself where its runs are: source: …")
    return load_study(Path(sweep))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m analysis",
        description="Compares the runs of a sweep.",
        epilog=f"Runs that this project did not make: a file instead of SWEEP, such as\n\n{EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sweep",
        metavar="SWEEP",
        help="name of a sweep: a folder of sweeps/; or a .yaml file that says what anybody's runs are",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="AXIS=VALUE",
        help="what the others are compared with, such as batch=constant_16; may be given for several axes "
        "(default: the first constant batch, else the first schedule)",
    )
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        help=f"where the rows of the runs are read from: {', '.join(SOURCES)} or wandb:ENTITY/PROJECT, whose "
        "runs are kept in cache/ and fetched again only when they have changed (default: record)",
    )
    parser.add_argument(
        "--target",
        type=float,
        metavar="LOSS",
        help="a validation loss: the report says how many tokens and steps and how much time it takes to "
        "reach it (default: the highest final one of the baseline's runs)",
    )
    parser.add_argument(
        "--gpus",
        metavar="N,N",
        help=f"numbers of GPUs to project to (default: {','.join(map(str, GPU_COUNTS))})",
    )
    parser.add_argument(
        "--network",
        metavar="GB_PER_S,MICROSECONDS",
        help="bandwidth of each GPU and time of an empty message, for the projection (default: as the runs "
        f"measured it at several widths, else {Network().bandwidth_gb_per_s:g},{Network().latency_us:g})",
    )
    parser.add_argument(
        "--publish",
        nargs="?",
        const="",
        metavar="ENTITY/PROJECT",
        help="also write the report as a W&B Report into this project (default: that of the runs)",
    )
    parser.add_argument("--json", action="store_true", help="print report.json and the paths instead of text")
    return parser


T = TypeVar("T", int, float)


def _numbers(option: str, text: str, kind: type[T], count: int | None = None) -> list[T]:
    """Of a list such as 8,64. Raises ConfigError when it is none."""
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or count not in (None, len(found)):
        what = "numbers" if count is None else f"{count} numbers"
        raise ConfigError(f"{option} {text}: must be {what} with commas between them, such as 8,64")
    return found


def _published(report: Report, folder: Path, place: str) -> str:
    try:
        from analysis.publish import publish
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "wandb_workspaces":
            raise
        raise ConfigError(
            "--publish: needs wandb-workspaces, which is not installed: "
            "pip install --constraint constraints.txt --editable '.[publish]'"
        ) from None
    return publish(report, folder, place)


def _screen(report: Report, paths: Sequence[Path], address: str | None) -> list[str]:
    lines = [report.headline, ""]
    lines += [f"  {comparison.sentence}" for comparison in report.comparisons]
    lines += [f"  {target.sentence}" for target in report.targets]
    lines += [f"  Note: {caution}" for caution in report.cautions]
    beside = dict.fromkeys(p if p.parent == paths[0].parent else p.parent for p in paths)  # folders once
    places = [*(_relative(path) for path in beside), *([address] if address else [])]
    lines += ["", *(f"  {place}" for place in places), ""]
    if report.resume:
        done = f"{len(report.finished)} of {len(report.runs)} runs finished"
        return [*lines, f"{done}. Next, the missing ones:", *(f"  {command}" for command in report.resume)]
    return [*lines, "Next, read it:", f"  {python()} -m webbrowser {_relative(paths[0])}"]


def _relative(path: Path) -> str:
    """Short where that still finds the file."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
