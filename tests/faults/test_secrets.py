"""A key of wandb's stays where it was put: no file, log, screen or report has it."""

from __future__ import annotations

import base64
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.secrets import keys, mask_files
from tests.faults.runs import SETTINGS
from tests.wandb_server import API_KEY, WandbServer

# Of the form that wandb gives out, and of no meaning.
KEY = "5ec4e7" + "0badc0ffee" * 3 + "dead"


class Telltale(WandbServer):
    """Says the key in its refusals, as a proxy that echoes a request would."""

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, Any]:
        status, told = super().answer(method, path, authorization, body)
        if status >= 400:
            told = {"errors": [{"message": f"key {KEY} is refused; Authorization: {authorization}"}]}
        return status, told


def said(*command: str, home: Path, **variables: str) -> str:
    """What it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=clean | {"CRESCENDO_HOME": str(home)} | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_no_key_in_what_a_sweep_and_its_report_leave(where: str, tmp_path: Path, small_corpus: list[str]):
    """The server knows another key, refuses this one and repeats it."""
    assert KEY != API_KEY and len(KEY) == 40
    home, user = tmp_path / "home", tmp_path / "user"
    user.mkdir()
    with Telltale() as server:
        variables = server.environment(user) | {"WANDB_API_KEY": KEY}
        if where == "netrc":
            del variables["WANDB_API_KEY"]
            host = server.url.removeprefix("http://")
            (user / ".netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
            (user / ".netrc").chmod(0o600)
        asked = [*SETTINGS, *small_corpus, "seed=0,1", "sweep.name=s", "track=online", "batch=constant"]
        printed = said("pipeline", "-m", *asked, "launch.max_parallel=2", home=home, **variables)
        printed += said("analysis", "s", home=home, **variables)
        printed += said("launchers", "status", "s", "--json", home=home, **variables)
        assert server.calls  # wandb came so far as to be refused
    assert KEY not in printed
    assert any(
        "*" * len(KEY) in path.read_text() for path in home.glob("runs/*/logs/*.log")
    )  # it was repeated
    files = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20 and any(path.name == "report.html" for path in files)
    sent = base64.b64encode(f"api:{KEY}".encode())  # as HTTP has it, which is as good
    leaks = [
        str(path.relative_to(home))
        for path in files
        if any(secret in path.read_bytes() for secret in (KEY.encode(), sent))
    ]
    assert not leaks


@pytest.mark.parametrize(
    "content", [None, b"\xff\xfe\0no text", b"machine m login user password " + KEY.encode()]
)
def test_a_run_that_ends_does_not_fail_for_want_of_a_netrc(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nor for want of a home directory: in a container a user may have neither a name nor a HOME."""
    log = tmp_path / "rank.log"
    log.write_text(f"before {KEY} after")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if content is None:
        for name in ("NETRC", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    else:
        (tmp_path / "netrc").write_bytes(content)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    known = bool(content and KEY.encode() in content)
    assert bool(keys()) == known
    mask_files([log, tmp_path / "there is none"])
    assert log.read_text() == f"before {'*' * len(KEY) if known else KEY} after"
