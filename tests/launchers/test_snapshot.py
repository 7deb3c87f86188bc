"""The copy of the code that a sweep's jobs run from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import snapshot
from pipeline import environment

FILES = {
    "conf/config.yaml": "seed: 0\n",
    "pipeline/__init__.py": "",
    "pipeline/kept.py": "where = 'committed'\n",
    "pipeline/edited.py": "where = 'committed'\n",
    "pipeline/deleted.py": "",
    "launchers/__init__.py": "",
    "analysis/page.html": "<p>\n",
    "hydra_plugins/crescendo.py": "",
    "tests/test_it.py": "",
    ".gitignore": "*.log\n__pycache__/\n",
}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in place of this one, as somebody is working on it."""
    directory = tmp_path / "project"
    write(directory, FILES)
    as_somebody = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], [*as_somebody, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(directory), *command], check=True)
    write(
        directory,
        {
            "pipeline/edited.py": "where = 'on disk'\n",
            "pipeline/new.py": "where = 'new'\n",
            "pipeline/noise.log": "much",
            "pipeline/__pycache__/kept.pyc": "old",
            "runs/a/status.json": "{}",
        },
    )
    (directory / "pipeline/deleted.py").unlink()
    use(directory, monkeypatch)
    return directory


def use(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CODE", directory)
    monkeypatch.setattr(snapshot, "CODE", directory)


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "snapshot.json")
    return {str(path.relative_to(directory)): path.read_text() for path in files}


COPIED = {
    **{name: text for name, text in FILES.items() if not name.startswith(("tests", "."))},
    "pipeline/edited.py": "where = 'on disk'\n",
    "pipeline/new.py": "where = 'new'\n",
}
del COPIED["pipeline/deleted.py"]


def test_the_copy_is_what_is_on_disk_without_what_git_ignores(code: Path, tmp_path: Path) -> None:
    copy = snapshot.take(tmp_path / "copies")
    assert contents(copy) == COPIED
    assert list((tmp_path / "copies").iterdir()) == [copy]


def test_where_it_comes_from(code: Path, tmp_path: Path) -> None:
    told = json.loads((snapshot.take(tmp_path / "copies") / "snapshot.json").read_text())
    head = ["git", "-C", str(code), "rev-parse", "HEAD"]
    assert told["commit"] == subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    assert set(told["changed"]) == {"pipeline/deleted.py", "pipeline/edited.py", "pipeline/new.py", "runs/"}
    assert "-where = 'committed'\n+where = 'on disk'\n" in told["diff"]


def test_the_same_code_has_one_copy(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = snapshot.take(tmp_path / "copies")
    write(code, {"runs/b/status.json": "{}", "tests/test_it.py": "changed", "pipeline/other.log": ""})
    before = (first / "snapshot.json").stat()
    assert snapshot.take(tmp_path / "copies") == first
    assert (first / "snapshot.json").stat() == before
    # The same files elsewhere, without their history, too.
    installed = tmp_path / "installed"
    shutil.copytree(first, installed)
    (installed / "snapshot.json").unlink()
    use(installed, monkeypatch)
    assert snapshot.take(tmp_path / "copies") == first


@pytest.mark.parametrize(
    "change", [{"pipeline/kept.py": "where = 'later'\n"}, {"conf/new.yaml": ""}, {"conf/config.yaml": ""}]
)
def test_other_code_has_another(code: Path, tmp_path: Path, change: dict[str, str]) -> None:
    first = snapshot.take(tmp_path / "copies")
    write(code, change)
    second = snapshot.take(tmp_path / "copies")
    assert second != first and contents(first) == COPIED and contents(second) == COPIED | change


def test_a_file_under_another_name_is_other_code(code: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "copies")
    (code / "pipeline/new.py").rename(code / "pipeline/newer.py")
    assert snapshot.take(tmp_path / "copies") != first


def test_without_git(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "installed"
    write(installed, {**COPIED, "pipeline/__pycache__/kept.pyc": "old", "numpy/__init__.py": ""})
    use(installed, monkeypatch)
    copy = snapshot.take(tmp_path / "copies")
    assert contents(copy) == COPIED
    told = json.loads((copy / "snapshot.json").read_text())
    assert told == {"commit": None, "changed": None, "diff": None}


def test_a_copy_that_fails_on_the_way_is_not_taken_for_one(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="no space"):
        broken.setattr(shutil, "copyfile", full)
        snapshot.take(tmp_path / "copies")
    assert list((tmp_path / "copies").iterdir()) == []
    assert contents(snapshot.take(tmp_path / "copies")) == COPIED


def test_a_process_runs_the_copy_wherever_it_starts(code: Path, tmp_path: Path) -> None:
    copy = snapshot.take(tmp_path / "copies")
    write(code, {"pipeline/edited.py": "where = 'after the submission'\n"})
    ask = "import pipeline.edited as e; print(e.where, e.__file__)"
    answers = {
        subprocess.run(
            [sys.executable, "-c", ask],
            cwd=directory,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for directory in (code, tmp_path)
    }
    assert answers == {f"on disk {copy / 'pipeline/edited.py'}\n"}


def test_this_project_can_be_copied(tmp_path: Path) -> None:
    """And what it needs to begin a run is in the copy."""
    copy = snapshot.take(tmp_path / "copies")
    subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(copy)},
        capture_output=True,
        check=True,
    )
