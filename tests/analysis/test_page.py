"""The page in a real browser, without network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.load import load_sweep
from analysis.render import render_html
from analysis.report import build
from tests.analysis.browser import BINARY, Browser, browser
from tests.analysis.synthetic import pairs, write_sweep

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium or Chrome on PATH")

DRAWN = "document.body !== null && document.body.dataset.charts === '{}'"
MARKS = "document.querySelectorAll('[data-panel] svg .mark-line path').length"
SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
OVERFLOWING = """[...document.querySelectorAll('.page *')].filter(e => !e.closest('.scroll, .legend, .command, svg')
  && e.getBoundingClientRect().right > innerWidth + 1 && !e.classList.contains('skip')).map(e => e.tagName)"""


@pytest.fixture(scope="module")
def page(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_charts_are_drawn(page: Browser, demo: Path, width: int, height: int, scheme: str) -> None:
    page.emulate(width, height, scheme, phone=width < 500)
    page.open(demo / "report.html")
    page.wait(DRAWN.format(scheme))
    assert page.problems() == []
    assert (
        page.evaluate("document.querySelectorAll('[data-panel] > svg, [data-panel] > div > svg').length") == 9
    )
    # 4 mean lines and 9 runs in 3 panels of both losses and in the batch figure, 1 and 2 in the noise scale
    assert page.evaluate(MARKS) >= 7 * 13 + 3
    assert page.evaluate(SIDEWAYS) <= 0
    assert page.evaluate(OVERFLOWING) == []
    width_of_chart = page.evaluate(
        "Math.max(...[...document.querySelectorAll('[data-panel] svg')].map(e => e.clientWidth))"
    )
    assert width_of_chart <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


def test_the_answer_is_on_the_first_screen(page: Browser, demo: Path) -> None:
    page.emulate(1280, 800, "light")
    page.open(demo / "report.html")
    page.wait(DRAWN.format("light"))
    bottom = page.evaluate(
        "document.querySelector('.verdicts li:nth-child(3)').getBoundingClientRect().bottom"
    )
    assert bottom < 800


def test_the_widest_table_scrolls_inside_the_page(page: Browser, home: Path) -> None:
    """With enough seeds for every column."""
    write_sweep("s", pairs({name: [2.0, 2.1, 2.3, 2.2, 2.4] for name in ("constant_16", "norm_test")}))
    path = home / "report.html"
    path.write_text(render_html(build(load_sweep("s"), [], 0.0)))
    page.emulate(390, 844, "light", phone=True)
    page.open(path)
    page.wait(DRAWN.format("light"))
    assert page.evaluate("document.querySelectorAll('[aria-labelledby=schedules] thead th').length") == 13
    assert page.evaluate(SIDEWAYS) <= 0
    assert page.evaluate(OVERFLOWING) == []


def test_charts_follow_the_scheme_and_the_legend(page: Browser, demo: Path) -> None:
    color = "document.querySelector('[data-panel=validation_tokens] .mark-line path').getAttribute('stroke')"
    page.emulate(1280, 800, "light")
    page.open(demo / "report.html")
    page.wait(DRAWN.format("light"))
    assert page.evaluate(color) == "#0072b2"
    page.scheme("dark")
    page.wait(DRAWN.format("dark"))
    assert page.evaluate(color) == "#56b4e9"

    before = page.evaluate(MARKS)
    page.evaluate("document.querySelector('[data-schedule=constant_64]').click()")
    page.wait(f"{MARKS} < {before}")
    assert page.evaluate("document.querySelector('[data-schedule=constant_64]').ariaPressed") == "false"
    page.scheme("light")  # what is hidden stays hidden
    page.wait(DRAWN.format("light"))
    assert page.evaluate(MARKS) < before
    page.evaluate("document.querySelector('[data-schedule=constant_64]').click()")
    page.wait(f"{MARKS} == {before}")
    assert page.problems() == []


def test_the_pointer_finds_the_numbers_of_a_mean(page: Browser, demo: Path) -> None:
    page.emulate(1280, 800, "light")
    page.open(demo / "report.html")
    page.wait(DRAWN.format("light"))
    page.evaluate("document.querySelector('#validation_loss').scrollIntoView()")
    x, y = page.evaluate("""(() => {
        const box = document.querySelector('[data-panel=validation_step] svg').getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    })()""")
    for shift in (8, 0):
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift, y=y)
    page.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    words = page.evaluate("document.querySelector('#vg-tooltip-element').innerText")
    assert "optimizer steps" in words and "validation loss" in words
    assert any(name in words for name in ("constant_16", "constant_64", "stages", "norm_test")), words
    assert "undefined" not in words
