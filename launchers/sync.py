"""python -m launchers sync: sends the offline wandb files of runs to wandb's server, each once, with wandb's
own command.

`wandb sync` leaves a mark beside each file that it has sent, and passes over files with a mark. But it also
leaves one when the server refused the rows, it does not see that a file grew after its mark (somebody sent it
while the run went on), and a single file that cannot be read keeps it from sending all others: what is done
about these is here. A file is always sent whole: of one that grew, or whose sending was interrupted, wandb
may show the first rows twice, each time with the same `_step` and the same values.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import signal
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from launchers.plan import compare
from launchers.standing import Target, standings
from launchers.table import make_console, say, show_command, show_launchers, tally
from pipeline.config import ConfigError
from pipeline.secrets import masked
from pipeline.store import home, python

_SILENCE_S = 600.0  # wandb repeats what fails for longer than anybody waits, without a word
_REACH_S = 10.0
_END_S = 10.0
_HEADER_BYTES = 7  # of a file without a record

_SERVER = re.compile(r"credentials for (https?://\S+)")
_RUN = re.compile(r"\[(?:[^]/ ]+/)+([^]/ ]+)\] ")  # what wandb puts before its words about a run
_DIRECTORY = re.compile(r"offline-run-[\w-]+")
_URL = re.compile(r"View run .*?(https?://\S+/runs/(\S+))")


@dataclass(frozen=True)
class OfflineFile:
    """What wandb wrote of one attempt of a run."""

    run: str
    path: Path

    @property
    def id(self) -> str:
        """wandb's: `<run>-a<attempt>`."""
        return self.path.stem.removeprefix("run-")

    @property
    def attempt(self) -> int:
        return int(self.id.rpartition("-a")[2])

    @property
    def mark(self) -> Path:
        return self.path.with_name(self.path.name + ".synced")

    def is_sent(self) -> bool:
        """Whether it was, and has not grown since."""
        try:
            return self.mark.stat().st_mtime_ns >= self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return False

    def is_empty(self) -> bool:
        """Of a run that was killed as it began."""
        return self.path.stat().st_size <= _HEADER_BYTES


@dataclass
class Answer:
    """What `wandb sync` said, without keys: a server or a proxy may repeat the request that it refuses."""

    errors: dict[str, str] = field(default_factory=dict)  # by the wandb id or the directory that they name
    other_errors: list[str] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)  # by wandb id

    def add(self, line: str) -> None:
        line = masked(line)
        if found := _URL.search(line):
            self.urls[found[2]] = found[1]
        kind, _, words = line.removeprefix("wandb: ").partition(" ")
        if kind != "ERROR":
            return
        if about := _RUN.match(words):
            self.errors[about[1]] = words[about.end() :]
        elif directory := _DIRECTORY.search(words):
            self.errors[directory[0]] = words
        else:
            self.other_errors.append(words)

    def error_of(self, file: OfflineFile) -> str | None:
        return self.errors.get(file.id) or self.errors.get(file.path.parent.name)


def sync(console: Console, target: Target, as_json: bool) -> int:
    """Sends what is not sent yet of all attempts that have ended. The exit code: 1 when some failed. Raises
    ConfigError when there is no login or the server is out of reach."""
    states, problem = _offline_files(target)
    unsent = [file for file, state in states.items() if state == "unsent"]
    answer, failures = _send(unsent)
    states |= {file: "failed" if file in failures else "sent" for file in unsent}
    if as_json:
        told = [
            {
                "run": file.run,
                "attempt": file.attempt,
                "file": str(file.path),
                "state": state,
                "url": answer.urls.get(file.id),
                "error": failures.get(file),
            }
            for file, state in states.items()
        ]
        whole = {"name": target.name, "problem": problem, "files": told}
        console.print(json.dumps(whole, indent=1), soft_wrap=True)
    else:
        if problem:
            say(console, problem, style="yellow")
        _tell(console, target, states, failures, answer.urls)
    return 1 if failures else 0


def _offline_files(target: Target) -> tuple[dict[OfflineFile, str], str | None]:
    """All, with their states: running, empty, unchanged or unsent; and what kept the scheduler from being
    asked."""
    found, problem = standings(target)
    known = {standing.run: standing for standing in found}
    states = {}
    for run in target.directories():
        standing = known[run.id]
        running = standing.state == "running" or run.is_locked()
        for path in sorted(run.path.glob(f"wandb/offline-run-*/run-{run.id}-a*.wandb")):
            file = OfflineFile(run.id, path)
            if running and file.attempt >= standing.attempt:
                states[file] = "running"
            elif file.is_empty():
                states[file] = "empty"
            else:
                states[file] = "unchanged" if file.is_sent() else "unsent"
    return states, problem


def _send(files: Sequence[OfflineFile]) -> tuple[Answer, dict[OfflineFile, str]]:
    """What wandb said, and in its words why it did not send some of the files."""
    for file in files:
        file.mark.unlink(missing_ok=True)  # of before the file grew
    answer, left = Answer(), list(files)
    failures: dict[OfflineFile, str] = {}
    console = make_console(stderr=True)
    with Progress(console=console, transient=True, disable=not (files and console.is_terminal)) as bar:
        task = bar.add_task("Sending to wandb", total=len(files))
        while left:
            try:
                with contextlib.closing(_wandb_sync(left)) as lines:
                    for line in lines:
                        answer.add(line)
                        bar.advance(task, "Finished syncing" in line)
            finally:  # also when this is interrupted
                failures |= _settle(left, answer)
            rest = [file for file in left if file not in failures and not file.mark.exists()]
            if answer.other_errors or len(rest) == len(left):
                words = "; ".join(dict.fromkeys(answer.other_errors)) or "wandb does not say why"
                return answer, failures | dict.fromkeys(rest, words)
            left = rest  # held up by a file that cannot be read
    return answer, failures


def _settle(files: Sequence[OfflineFile], answer: Answer) -> dict[OfflineFile, str]:
    """Puts wandb's marks right. The failures that wandb names."""
    failures = {}
    for file in files:
        words = answer.error_of(file)
        if words and "incomplete record" in words and file.id in answer.urls:
            # Killed while it wrote: what is whole was sent, and no more will come.
            file.mark.touch()
        elif words:
            file.mark.unlink(missing_ok=True)
            failures[file] = words
    return failures


def _wandb_sync(files: Sequence[OfflineFile]) -> Generator[str, None, None]:
    """The lines that it prints, as they come. Raises ConfigError when there is no login, or no answer from
    the server."""
    process = subprocess.Popen(
        [sys.executable, "-m", "wandb", "sync", *(str(file.path.relative_to(home())) for file in files)],
        cwd=home(),  # where its own logs go
        env=os.environ | {"WANDB_SILENT": "false", "WANDB_MODE": "online"},
        stdin=subprocess.DEVNULL,  # so that it does not ask for a login
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends that one
    )
    said: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, said), daemon=True)
    reader.start()
    last = ""
    try:
        while (line := said.get(timeout=_SILENCE_S)) is not None:
            if server := _SERVER.search(line):
                _check(server[1])
            last = line or last
            yield line
        code = process.wait(_SILENCE_S)
    except (queue.Empty, subprocess.TimeoutExpired):
        yield f"ERROR no word from wandb for {_SILENCE_S:.0f} s"
        return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(_END_S)  # until its service, which sends, has followed it and leaves the pipe
    words = last.removeprefix("Error: ")
    if code and "API key" in words:
        login = shlex.join([python(), "-m", "wandb", "login"])
        raise ConfigError(f"wandb: {words} Log in with {login}, or set WANDB_API_KEY")
    if code:
        yield f"ERROR {words}"


def _read(process: subprocess.Popen[str], said: queue.Queue[str | None]) -> None:
    assert process.stdout
    for line in process.stdout:
        said.put(line.rstrip())
    said.put(None)


def _check(server: str) -> None:
    """Raises ConfigError when nothing answers there, for which wandb would wait long and silently."""
    try:
        urllib.request.urlopen(server, timeout=_REACH_S).close()
    except urllib.error.HTTPError:
        return  # an answer, too
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # wandb has certificates of its own
            raise ConfigError(
                f"{server}: out of reach from here ({reason}). Give the command where it can be reached, "
                f"such as on a login node, or name another server of wandb's with WANDB_BASE_URL"
            ) from None


def _tell(
    console: Console,
    target: Target,
    states: dict[OfflineFile, str],
    failures: dict[OfflineFile, str],
    urls: dict[str, str],
) -> None:
    order = ("failed", "running", "empty", "unchanged", "sent")
    notes = {"running": "left out until they end", "empty": "nothing was logged", "unchanged": "sent before"}
    attempts = tally(sorted(states.values(), key=order.index), notes)
    say(console, f"{target.name}: {attempts or 'nothing was logged offline'}")
    for words in dict.fromkeys(failures.values()):
        ids = [file.id for file, said in failures.items() if said == words]
        say(console, f"{', '.join(ids)}: {words}", style="red")
    places = [url.rpartition("/runs/")[0] if target.sweep else url for url in urls.values()]
    for place in dict.fromkeys(places):
        show_command(console, "see", place)
    if failures or "running" in states.values():
        show_command(console, "again", shlex.join([python(), "-m", "launchers", "sync", target.name]))
    elif target.sweep:
        show_command(console, "compare", compare(target.name))
    else:
        show_launchers(console, target.name, "status")
