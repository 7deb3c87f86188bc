"""The pages, and the commands on them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    if path.name not in ("CHANGELOG.md", "tables.md")
]
STOP_S = 30
_BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Of a page's shell: stops at the first command that fails, and names it.
_PREAMBLE = """set -eEuo pipefail
trap 'echo "failed with $?: $BASH_COMMAND" >&2' ERR
"""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    run: bool

    @property
    def commands(self) -> list[list[str]]:
        """Its lines as words, without those of here-documents."""
        text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", self.text, flags=re.MULTILINE | re.DOTALL)
        lines = text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    return [Block(language, text, not mark) for mark, language, text in _BLOCK.findall(text_of(page))]


def shell(page: str) -> str:
    """All that is to be run of a page, in its order."""
    return "".join(block.text for block in blocks(page) if block.language == "bash" and block.run)


def run(script: str, directory: Path, timeout_s: float, **environment: str) -> str:
    """What a script printed, run with `directory` as the current one and as CRESCENDO_HOME; fails with that when a
    command does."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CRESCENDO_", "WANDB_"))}
    process = subprocess.Popen(
        ["bash", "-c", _PREAMBLE + script],
        cwd=directory,
        env={
            **kept,
            "CRESCENDO_HOME": str(directory),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # on which a sweep stops its runs
        try:
            printed, _ = process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
        raise AssertionError(f"not done after {timeout_s:g} s\n{printed[-6000:]}") from None
    assert process.returncode == 0, printed[-6000:]
    return printed
