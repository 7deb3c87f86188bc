"""What the pages tell a reader to type works, as printed, in the order of the page."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, blocks, run, shell
from tests.support import ROOT

TIMEOUT_S = 240  # of a page, on a machine that does other things besides
NEEDS = {"docs/reading-a-report.md": "docs/first-sweep.md"}  # is about what the commands of the other made
ON_A_CLUSTER = "docs/slurm.md"  # tests/slurm/test_documentation.py
RUN = [page for page in PAGES if shell(page) and page != ON_A_CLUSTER]
NOT_RUN = [page for page in PAGES if any(b.language == "bash" and not b.run for b in blocks(page))]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """Types what a page says, once. All in one directory, so that no run that two pages have is done twice."""
    directory, done = tmp_path_factory.mktemp("pages"), set[str]()

    def read(page: str) -> None:
        if page in done:
            return
        if page in NEEDS:
            read(NEEDS[page])
        run(shell(page), directory, TIMEOUT_S)
        done.add(page)

    return read


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_every_command_of_a_page_works(read: Callable[[str], None], page: str) -> None:
    read(page)


@pytest.mark.parametrize("page", NOT_RUN)
def test_what_is_not_run_is_at_least_possible(page: str, tmp_path: Path) -> None:
    """Its runs and sweeps are valid, its modules and make's targets exist."""
    previews = []
    for block in blocks(page):
        if block.language != "bash" or block.run:
            continue
        for words in block.commands:
            if words[:3] == ["python", "-m", "pipeline"]:
                asked = [word for word in words if not word.startswith("hydra/launcher=")]
                previews.append(shlex.join([*asked, "hydra/launcher=preview"]))
            elif words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]), words
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            else:
                assert words[0] == "wandb", words
    if previews:
        run("\n".join(previews), tmp_path, TIMEOUT_S)
        assert not (tmp_path / "runs").exists()


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="failed with 2: python -m pipeline batch=constantt"):
        run("true\npython -m pipeline batch=constantt\ntrue\n", tmp_path, TIMEOUT_S)
