from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.batch import _own
from tests.disk import mounted
from tests.wandb_server import WandbServer

# Models as small as these only lose by more threads, and other tests run beside. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more about the machine than about the code.
settings.register_profile("crescendo", deadline=None)
settings.load_profile("crescendo")


# A shell that starts the tests in the background has them ignore Ctrl-C, nohup the end of the session; so would
# what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, lest one worker is left with the longest of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh CRESCENDO_HOME, without wandb unless a test asks for it."""
    monkeypatch.setenv("CRESCENDO_HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # By this wandb makes processes share a service: runs are to start their own, whatever this process did.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    return tmp_path


@pytest.fixture
def small_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh CRESCENDO_HOME on a disk of 16 MiB."""
    with mounted(home / "disk", "16m") as disk:
        monkeypatch.setenv("CRESCENDO_HOME", str(disk))
        yield disk


@pytest.fixture
def own_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a user's own schedules, empty; what the test loads of it is unknown to the next one."""
    directory = tmp_path / "schedules"
    directory.mkdir()
    monkeypatch.setenv(_own.VARIABLE, str(directory))
    monkeypatch.setattr(_own, "_files", {})
    return directory


@pytest.fixture
def wandb_server(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WandbServer]:
    """A stand-in for wandb's server, the one that clients started here know, with a login."""
    with WandbServer() as server:
        for name, value in server.environment(tmp_path_factory.mktemp("client")).items():
            monkeypatch.setenv(name, value)
        yield server


def _prose(draw: random.Random, words: int) -> str:
    """Something to learn: words of a few letters, some far more frequent than others, each with its followers.
    Of all that Python draws, `random()` alone is promised to be the same in every version."""
    some = random.Random(0).random
    vocabulary = [
        "".join("etaoinshrdlu"[int(12 * some() ** 2)] for _ in range(2 + int(7 * some())))
        for _ in range(1000)
    ]
    text, word = [], 0
    for position in range(1, words + 1):
        word = (7 * word + int(1000 * draw.random() ** 4)) % 1000
        text.append(vocabulary[word] + (".\n" if position % 12 == 0 else " "))
    return "".join(text)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a text of some 600 kB that is tokenised in milliseconds and is the same on every machine."""
    directory = tmp_path_factory.mktemp("text")
    for number in range(40):
        (directory / f"{number:02d}.txt").write_text(_prose(random.Random(number), 2_500))
    return ["data=text", f"data.files=[{directory}/*.txt]", "data.validation_fraction=0.1", "data.workers=1"]
