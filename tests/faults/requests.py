"""Settings that nobody should ask for. Each must be understood, or refused in a paragraph."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import hypothesis
from hypothesis import strategies as st

import pipeline.__main__ as command
from pipeline.config import known_keys
from pipeline.overrides import group_names, options_of
from tests.faults.campaign import Place, Verdict, family
from tests.faults.runs import in_process

_ODD = [
    "null", "true", "yes", "[]", "{}", "[1,2]", "{a:1}", "1k", "-1M", "1e999", "nan", "0x10", "''", "'", "${seed}",
    "${nothing}", "${", "[", "}", "a=b", "1,2", "!!python/none", "~", "../..", "\\", "é", "[1e400]", "1e308", "0",
    "-0.0", "1_000", "[[[[1]]]]", "{a:{b:[]}}", "0.5", "", "9" * 400,
]  # fmt: skip
_EXAMPLES = 12  # the first ones that hypothesis makes are the simplest there are
_PARAGRAPH = 12  # lines


def _values() -> st.SearchStrategy[str]:
    return st.one_of(
        st.integers(-(10**24), 10**24).map(str),
        st.floats().map(str),
        st.sampled_from(_ODD),
        st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20),
    )


def _keys() -> st.SearchStrategy[str]:
    known = st.sampled_from(sorted(known_keys()))
    misspelt = st.tuples(known, st.integers(0, 30)).map(lambda k: k[0][: k[1]] + k[0][k[1] + 1 :])
    return st.one_of(known, known, known, misspelt, st.sampled_from(group_names()))


def _options() -> st.SearchStrategy[str]:
    return st.sampled_from([f"{group}={option}" for group in group_names() for option in options_of(group)])


def _overrides() -> st.SearchStrategy[list[str]]:
    marks = st.sampled_from(["", "", "", "", "+", "++", "~"])
    setting = st.tuples(marks, _keys(), _values()).map(lambda m: f"{m[0]}{m[1]}={m[2]}")
    return st.tuples(st.lists(_options(), max_size=2), st.lists(setting, min_size=1, max_size=3)).map(
        lambda parts: [*parts[0], *parts[1]]
    )


def drawn(seed: int) -> list[str]:
    """Overrides, always the same ones of a seed."""
    found: list[list[str]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=_EXAMPLES, database=None, phases=[hypothesis.Phase.generate], deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(_overrides())
    def collect(overrides: list[str]) -> None:
        found.append(overrides)

    collect()
    return found[-1]


@family("malformed config", 200)
def malformed_config(place: Place, draw: random.Random, number: int) -> Verdict:
    overrides = drawn(draw.randrange(2**32))
    asked = ["-m", *overrides, "hydra/launcher=preview"] if number % 4 == 3 else overrides
    command._run = lambda config: 0  # what is valid is not to be trained here
    print(asked)

    def main(arguments: Sequence[str]) -> int:
        sys.argv = ["pipeline", *arguments]
        return command.main()

    ended = in_process(main, *asked)
    text = ended.output.strip()
    if ended.code == 0 and "Traceback" not in text:
        return Verdict("survived")
    if ended.code == 2 and text and "Traceback" not in text and len(text.splitlines()) <= _PARAGRAPH:
        return Verdict("failed cleanly", text[:200])
    return Verdict("lost data", f"{asked}: exit code {ended.code}: {text[-300:]}")
