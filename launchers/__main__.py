"""python -m launchers: what became of sweeps, and what to do about it, from files and the scheduler."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from rich.console import Console

from launchers import status
from launchers.control import cancel, resume
from launchers.logs import logs
from launchers.standing import Target, find
from launchers.sync import sync
from launchers.table import make_console
from pipeline.config import ConfigError
from pipeline.overrides import run_command


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 all well, 1 some run failed, 2 the request is wrong, 3 refused, 130 interrupted."""
    options, rest = _parser().parse_known_args(arguments)
    return run_command(lambda: _run(make_console(), options, rest), arguments)


def _run(console: Console, options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "report":
        return subprocess.run([sys.executable, "-m", "analysis", options.name, *rest], check=False).returncode
    if rest and options.command != "resume":
        raise ConfigError(f"{rest[0]}: not understood. python -m launchers {options.command} --help")
    if options.command == "ls":
        return status.ls(console, options.json)
    target = _target(options)
    match options.command:
        case "status":
            return status.status(console, target, options.json)
        case "watch":
            return status.watch(console, target, options.json)
        case "logs":
            return logs(console, target, options.rank, options.attempt, options.follow, options.json)
        case "sync":
            return sync(console, target, options.json)
        case "cancel":
            return cancel(
                console,
                target,
                pending=options.pending,
                now=options.now,
                yes=options.yes,
                as_json=options.json,
            )
        case _:
            return resume(console, target, rest, options.launcher)


def _target(options: argparse.Namespace) -> Target:
    target = find(options.name)
    return target.only(options.only) if options.only else target


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launchers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, json: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        if name != "ls":
            one.add_argument("name", metavar="SWEEP|RUN")
        if name not in ("ls", "report"):
            one.add_argument(
                "--only",
                action="append",
                default=[],
                metavar="AXIS=VALUE",
                help="these runs of the sweep alone",
            )
        if json:
            one.add_argument("--json", action="store_true", help="for programs")
        return one

    command("ls", "all sweeps, one line each")
    command("status", "one line a run: how far it is, and what is wrong with it")
    command("watch", "the same, live; Ctrl-C asks whether to quit or to cancel")
    one = command("logs", "what a run printed; of a sweep: what its failed runs did")
    one.add_argument("-f", "--follow", action="store_true", help="go on printing what is added")
    one.add_argument("--rank", type=int, help="by default the one that tells most")
    one.add_argument("--attempt", type=int, help="by default the newest")
    one = command("cancel", "ends runs, with a checkpoint; asks first")
    one.add_argument("--pending", action="store_true", help="only those that wait")
    one.add_argument(
        "--now", action="store_true", help="without waiting for checkpoints, where a run has a job of its own"
    )
    one.add_argument("--yes", action="store_true", help="do not ask")
    one = command("resume", "goes on with what is missing; takes launch.minutes=… and the like", json=False)
    one.add_argument("--launcher", choices=("local", "slurm"), help="by default as before")
    command("sync", "sends the runs that were logged offline to wandb, each once")
    command("report", "compares the runs: python -m analysis", json=False)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
