from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.__main__ import main
from tests.analysis.synthetic import Point, realistic, realistic_run, write_sweep


@pytest.fixture(scope="package")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The report of the demo sweep, with one failed and one refused run beside it."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRESCENDO_HOME", str(folder))
        broken = realistic_run(lambda share: 16, 2, stop=0.3)
        points = [
            *realistic(),
            Point(
                {"batch": "constant_16", "seed": "2"}, broken, "FAILED", "RuntimeError: <b>full</b> | disk"
            ),
            Point({"batch": "constant_6", "seed": "0"}, problem="batch.size=6: smaller than one micro-batch"),
        ]
        write_sweep("demo", points)
        assert main(["demo"]) == 0
        yield folder / "reports" / "demo"
