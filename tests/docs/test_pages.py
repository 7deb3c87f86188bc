"""The pages say what is there: links, options, settings, names in the code, environment variables."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, blocks, text_of
from tests.support import ROOT, compose_tree

ALL = [*PAGES, "CHANGELOG.md"]
_CODE = re.compile(r"```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NAMED = re.compile(r"`([\w/.]+\.py)(?:::([\w.]+))?`")


def _anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page: str) -> None:
    for link in _LINK.findall(_CODE.sub("", text_of(page))):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_in_bash_blocks(page: str) -> None:
    """Where they are found and run."""
    for block in blocks(page):
        if block.language != "bash":
            assert not re.search(r"^(python -m|make) ", block.text, re.MULTILINE), block.text


def test_every_page_is_linked_from_the_index() -> None:
    linked = {
        (ROOT / "docs" / link.partition("#")[0]).resolve()
        for link in _LINK.findall(text_of("docs/README.md"))
    }
    for page in ROOT.glob("docs/*.md"):
        assert page.resolve() in linked or page.name == "README.md", page


@pytest.mark.parametrize(
    ("page", "group"),
    [
        ("docs/schedules.md", "batch"),
        ("docs/ranks.md", "sync"),
        ("docs/ranks.md", "parallel"),
        ("docs/problems.md", "model"),
        ("docs/wandb.md", "track"),
    ],
)
def test_every_option_of_a_group_is_on_its_page(page: str, group: str) -> None:
    options = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    if group == "model":
        options = {"logistic", "mlp", "cnn", "resnet18"}
    text = text_of(page)
    missing = {name for name in options if f"`{name}`" not in text and f"={name}`" not in text}
    assert not missing


@pytest.mark.parametrize(("page", "group"), [("docs/schedules.md", "batch"), ("docs/ranks.md", "sync")])
def test_every_setting_of_a_group_is_on_its_page(page: str, group: str) -> None:
    settings = compose_tree()[group]
    assert isinstance(settings, dict)
    missing = [name for name in settings if f"`{name}`" not in text_of(page)]
    assert not missing


def _names(file: Path) -> set[str]:
    """Of its classes, functions and methods: Trainer, Trainer.step, train."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_in_the_code_exists(page: str) -> None:
    for path, name in _NAMED.findall(text_of(page)):
        if "/" not in path or "NAME" in path:  # a file beside one that was named, or one to be written
            continue
        file = ROOT / path
        assert file.exists(), path
        assert not name or name in _names(file), f"{path}::{name}"


def test_the_architecture_names_much() -> None:
    """So that the test above has something to check."""
    assert len([name for _, name in _NAMED.findall(text_of("docs/architecture.md")) if name]) > 40


def test_every_environment_variable_is_documented() -> None:
    packages = ("pipeline", "launchers", "analysis", "hydra_plugins", "benchmarks", "tests")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    code = "\n".join(
        file.read_text(encoding="utf-8") for file in [*files, ROOT / ".ci/run", ROOT / "Makefile"]
    )
    read = set(re.findall(r"CRESCENDO_[A-Z_]*[A-Z]", code))
    assert read > {"CRESCENDO_HOME", "CRESCENDO_SCHEDULES"}
    assert {name for name in read if f"`{name}`" not in text_of("docs/README.md")} == set()


def test_every_command_of_the_launchers_is_documented() -> None:
    offered = subprocess.run(
        [sys.executable, "-m", "launchers", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    commands = re.findall(r"^    (\w+) ", offered, re.MULTILINE)
    assert len(commands) > 5
    assert [name for name in commands if f"`{name}" not in text_of("docs/slurm.md")] == []
