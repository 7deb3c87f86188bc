"""The page in a real browser, without network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.load import load_sweep
from analysis.render import render_html
from analysis.report import build
from tests.analysis.browser import BINARY, Browser, browser
from tests.analysis.synthetic import Point, many_long_runs, pairs, realistic_run, write_sweep

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium or Chrome on PATH")

DRAWN = "document.body !== null && document.body.dataset.charts === '{}'"
MARKS = "document.querySelectorAll('[data-chart] svg .mark-line > path').length"
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
    assert page.evaluate("document.querySelectorAll('[data-chart] svg').length") == 9
    # 4 mean lines and 9 runs in both losses, batch and throughput, 1 and 2 in the noise scale, 2 fronts, 4 lines
    # each of projected time and GPU-hours
    assert page.evaluate(MARKS) == 4 * 13 + 3 + 2 + 8
    assert page.evaluate(SIDEWAYS) <= 0
    assert page.evaluate(OVERFLOWING) == []
    width_of_chart = page.evaluate(
        "Math.max(...[...document.querySelectorAll('[data-chart] svg')].map(e => e.clientWidth))"
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
    color = "document.querySelector('[data-chart=validation] .mark-line > path').getAttribute('stroke')"
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


def opened(page: Browser, path: Path, hash: str = "") -> None:
    page.emulate(1280, 800, "light")
    page.open(path)
    if hash:  # a page that is open already would only follow the address
        page.call("Page.navigate", url="about:blank")
        page.call("Page.navigate", url=f"{path.as_uri()}#{hash}")
    page.wait(DRAWN.format("light"))


def plot(page: Browser, chart: str) -> tuple[float, float, float, float]:
    """The frame of a chart in the window, which is scrolled to it: left, top, right, bottom."""
    page.evaluate(f"document.querySelector('[data-chart={chart}]').scrollIntoView({{block: 'center'}})")
    box = page.evaluate(f"""(() => {{
        const frame = document.querySelector('[data-chart={chart}] svg .background').getBoundingClientRect();
        return [frame.left, frame.top, frame.right, frame.bottom];
    }})()""")
    return box[0], box[1], box[2], box[3]


def ticks(page: Browser, chart: str, axis: str) -> list[str]:
    """The labels of an axis, the smallest first."""
    labels: list[str] = page.evaluate(f"""[...document.querySelectorAll(
        '[data-chart={chart}] svg .role-axis[aria-label^="{axis.upper()}-axis"] .role-axis-label text')]
        .filter(e => e.getAttribute('opacity') !== '0').map(e => e.textContent)""")
    return sorted(labels, key=amount)


def amount(label: str) -> float:
    units = {"k": 1e3, "M": 1e6}
    return float(label.rstrip("kM")) * units.get(label[-1], 1)


def drag(page: Browser, start: tuple[float, float], end: tuple[float, float]) -> None:
    mouse = {"button": "left", "clickCount": 1}
    page.call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], **mouse)
    for part in (0.5, 1.0):
        x, y = (a + part * (b - a) for a, b in zip(start, end, strict=True))
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
    page.call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], **mouse)


def press(page: Browser, key: str, text: str = "") -> None:
    """With a real key event, which the focused element gets."""
    codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
    text = text or {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
    more = {"windowsVirtualKeyCode": codes.get(key, 0), **({"text": text} if text else {})}
    page.call("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
    page.call("Input.dispatchKeyEvent", type="keyUp", key=key, **more)


def focus(page: Browser, selector: str) -> None:
    page.evaluate(f"document.querySelector({selector!r}).focus()")


def test_the_pointer_finds_the_numbers_of_a_mean(page: Browser, demo: Path) -> None:
    opened(page, demo / "report.html", "axis=step")
    left, top, right, bottom = plot(page, "validation")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=(left + right) / 4, y=(top + bottom) / 2)
    found = page.evaluate("""(() => {  // the middle of a mean line
        const line = [...document.querySelectorAll('[data-chart=validation] .mark-line > path')].at(-1);
        const middle = line.getPointAtLength(line.getTotalLength() / 2);
        const at = line.getScreenCTM();
        return [middle.x * at.a + at.e, middle.y * at.d + at.f];
    })()""")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=found[0], y=found[1])
    words = page.evaluate("document.querySelector('.tip').innerText")
    assert page.evaluate("getComputedStyle(document.querySelector('.tip')).display") != "none"
    assert "optimizer steps" in words and "validation loss" in words and "seeds" in words
    assert any(name in words for name in ("constant_16", "constant_64", "stages", "norm_test")), words
    assert "undefined" not in words and "NaN" not in words
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=left - 90, y=top)
    assert page.evaluate("document.querySelector('.tip').hidden")
    assert page.problems() == []


def test_one_choice_of_the_axis_governs_all_curves(page: Browser, demo: Path) -> None:
    opened(page, demo / "report.html")
    titles = """[...document.querySelectorAll('[data-chart]:not([data-chart^=projected]) svg .role-axis-title text')].map(e => e.textContent)
        .filter(text => /tokens$|steps$|time \\(s\\)$|FLOPs$/.test(text))"""
    fronts = ["optimizer steps", "training time (s)"]
    assert page.evaluate(titles) == [*fronts, *["tokens"] * 5]
    before = page.evaluate(MARKS)
    expected = {"step": "optimizer steps", "time": "training time (s)", "flops": "model FLOPs"}
    for value, title in expected.items():
        page.evaluate(f"document.querySelector('[name=axis][value={value}]').click()")
        page.wait(DRAWN.format("light"))
        assert page.evaluate(titles) == [*fronts, *[title] * 5] and page.evaluate(MARKS) == before
        assert page.evaluate("location.hash") == f"#axis={value}"
    page.scheme("dark")  # keeps it
    page.wait(DRAWN.format("dark"))
    assert page.evaluate(titles)[2:] == ["model FLOPs"] * 5
    assert "over model FLOPs" in page.evaluate("document.querySelector('[data-chart=batch]').ariaLabel")
    assert page.problems() == []


def test_the_address_brings_back_what_was_shown(page: Browser, demo: Path) -> None:
    opened(page, demo / "report.html", "axis=step&from=50&to=100&hide=stages&hide=nonsense")
    assert page.evaluate("document.querySelector('[name=axis]:checked').value") == "step"
    assert page.evaluate("document.querySelector('[data-schedule=stages]').ariaPressed") == "false"
    shown = [amount(label) for label in ticks(page, "batch", "x")]
    assert min(shown) >= 50 and max(shown) <= 100
    opened(page, demo / "report.html", "axis=moon&from=9&to=2")
    assert page.evaluate("document.querySelector('[name=axis]:checked').value") == "tokens"
    assert page.problems() == []


def test_a_drag_zooms_all_curves_and_a_double_click_ends_it(page: Browser, demo: Path) -> None:
    opened(page, demo / "report.html")
    whole = {axis: ticks(page, "training", axis) for axis in "xy"}
    left, top, right, bottom = plot(page, "validation")
    at = [(left + share * (right - left), (top + bottom) / 2) for share in (0.5, 1.0)]
    drag(page, at[0], at[1])
    curves = ("validation", "training", "batch", "noise", "throughput")
    for chart in curves:
        page.wait(f"Number(document.querySelector('[data-chart={chart}] svg').ariaHidden) === 0")
        shown = [amount(label) for label in ticks(page, chart, "x")]
        assert len(shown) >= 3 and min(shown) > 390_000 and max(shown) <= 800_000
    # The vertical axis fits what is there: of the means after half of the tokens.
    assert max(map(amount, ticks(page, "training", "y"))) < max(map(amount, whole["y"])) / 1.4
    assert "from=" in page.evaluate("location.hash")
    assert page.evaluate("document.querySelector('[data-zoom=whole]').ariaDisabled") == "false"
    left, top, right, bottom = plot(page, "training")
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": (left + right) / 2, "y": (top + bottom) / 2}
            page.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=count, **where)
    page.wait("document.querySelector('[data-zoom=whole]').ariaDisabled === 'true'")
    assert {axis: ticks(page, "training", axis) for axis in "xy"} == whole
    assert page.problems() == []


def test_a_front_zooms_by_itself(page: Browser, demo: Path) -> None:
    opened(page, demo / "report.html")
    others = {chart: ticks(page, chart, "x") for chart in ("front_time", "validation")}
    focus(page, ".frame:has([data-chart=front_step])")
    press(page, "+")
    shown = [amount(label) for label in ticks(page, "front_step", "x")]
    assert len(shown) >= 2 and min(shown) > 100 and max(shown) < 300
    assert {chart: ticks(page, chart, "x") for chart in others} == others
    assert page.problems() == []


def test_the_wheel_scrolls_the_page(page: Browser, demo: Path) -> None:
    opened(page, demo / "report.html")
    left, top, _, _ = plot(page, "validation")
    before = page.evaluate("scrollY")
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=left + 50, y=top + 50, deltaX=0, deltaY=200)
    page.wait(f"scrollY > {before} + 100")
    assert page.evaluate("document.querySelector('[data-zoom=whole]').ariaDisabled") == "true"


def swipe(page: Browser, start: tuple[int, int], end: tuple[int, int]) -> None:
    for step in range(11):
        x, y = (a + (b - a) * step / 10 for a, b in zip(start, end, strict=True))
        kind = "touchMove" if step else "touchStart"
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


def test_a_finger_scrolls_down_and_zooms_sideways(page: Browser, demo: Path) -> None:
    page.emulate(390, 844, "light", phone=True)
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        page.open(demo / "report.html")
        page.wait(DRAWN.format("light"))
        left, top, right, bottom = map(int, plot(page, "validation"))
        before, middle = page.evaluate("scrollY"), (top + bottom) // 2
        swipe(page, (left + 100, middle + 80), (left + 100, middle - 80))
        page.wait(f"scrollY > {before} + 60")
        assert page.evaluate("document.querySelector('[data-zoom=whole]').ariaDisabled") == "true"
        left, top, right, bottom = map(int, plot(page, "validation"))
        before = page.evaluate("scrollY")
        swipe(page, (left + 60, middle), (right - 40, middle))
        page.wait("document.querySelector('[data-zoom=whole]').ariaDisabled === 'false'")
        assert abs(page.evaluate("scrollY") - before) < 40  # what is left of the first swipe
    finally:
        page.call("Emulation.setTouchEmulationEnabled", enabled=False)
    assert page.problems() == []


def test_everything_is_done_with_keys(page: Browser, demo: Path) -> None:
    opened(page, demo / "report.html")
    page.evaluate("document.querySelector('#figures').scrollIntoView()")
    focus(page, "[name=axis]:checked")
    press(page, "ArrowRight")
    page.wait("document.querySelector('[name=axis]:checked').value === 'step'")
    page.wait(DRAWN.format("light"))

    focused = "document.activeElement"
    seen = []
    for _ in range(14):
        press(page, "Tab")
        outline = page.evaluate(f"getComputedStyle({focused}).outlineStyle")
        assert outline == "solid", page.evaluate(f"{focused}.outerHTML")
        seen.append(
            page.evaluate(f"{focused}.dataset.zoom ?? {focused}.dataset.schedule ?? {focused}.className")
        )
    assert seen[:5] == ["in", "out", "left", "right", "whole"]
    assert seen[7:12] == ["constant_16", "constant_64", "stages", "norm_test", "constant_6"]
    assert seen[12:] == ["frame", "frame"]

    focus(page, "[data-zoom=in]")
    before = ticks(page, "batch", "x")
    press(page, "Enter")
    zoomed = ticks(page, "batch", "x")
    assert zoomed != before
    focus(page, ".frame:has([data-chart=batch])")
    press(page, "ArrowRight")
    assert amount(ticks(page, "batch", "x")[-1]) > amount(zoomed[-1])
    press(page, "0")
    assert ticks(page, "batch", "x") == before
    focus(page, "[data-schedule=stages]")
    marks = page.evaluate(MARKS)
    press(page, " ")
    page.wait(f"{MARKS} < {marks}")
    assert page.problems() == []


COLUMN = """[...document.querySelectorAll('[aria-labelledby=schedules] tbody tr')]
    .map(row => row.cells[{}].textContent.trim())"""


def test_tables_sort_by_value_with_what_is_missing_last(page: Browser, demo: Path) -> None:
    """By text 98 steps would come after 391, and 1.8 M before 900 k."""
    opened(page, demo / "report.html")
    head = "[...document.querySelectorAll('[aria-labelledby=schedules] thead th')]"
    names = page.evaluate(f"{head}.map(e => e.innerText.replace(/\\s+/g, ' ').trim())")
    steps = names.index("steps")
    original = page.evaluate(COLUMN.format(0))
    button = f"{head}[{steps}].querySelector('button')"
    page.evaluate(f"{button}.focus()")
    for order, expected in (
        ("ascending", ["98", "148", "293", "391", "–"]),
        ("descending", ["391", "293", "148", "98", "–"]),
    ):
        press(page, "Enter")
        assert page.evaluate(COLUMN.format(steps)) == expected
        assert page.evaluate(f"{head}.map(e => e.getAttribute('aria-sort'))") == [
            order if i == steps else None for i in range(len(names))
        ]
    press(page, " ")
    assert page.evaluate(COLUMN.format(0)) == original
    assert page.evaluate(f"{head}.every(e => !e.hasAttribute('aria-sort'))")
    wide = "document.querySelector('.scroll').scrollWidth"
    width = page.evaluate(wide)
    page.evaluate(f"{head}[{len(names) - 1}].querySelector('button').click()")
    assert page.evaluate(wide) == width  # the arrow finds its place
    page.evaluate(f"{head}[0].querySelector('button').click()")
    names = ["constant_6", "constant_16", "constant_64", "norm_test", "stages"]
    assert page.evaluate(COLUMN.format(0)) == names  # 6 before 16
    assert page.problems() == []


def test_differences_sort_with_their_sign_and_size(page: Browser, home: Path) -> None:
    """As texts 0.0625 would come after 0.5."""
    losses = {"constant_16": [2.0], "constant_64": [2.5], "stages": [2.0625], "norm_test": [1.95]}
    write_sweep("s", pairs(losses))
    path = home / "report.html"
    path.write_text(render_html(build(load_sweep("s"), [], 0.0)))
    opened(page, path)
    page.evaluate("document.querySelectorAll('[aria-labelledby=schedules] thead button')[2].click()")
    assert page.evaluate(COLUMN.format(0)) == ["norm_test", "stages", "constant_64", "constant_16"]


def test_every_number_of_a_table_has_a_value_to_sort_by(page: Browser, demo: Path) -> None:
    """A cell that looks like a number but sorts as text would break its column."""
    opened(page, demo / "report.html")
    loose = page.evaluate("""[...document.querySelectorAll('tbody td:not(.text)')]
        .filter(cell => cell.dataset.value === undefined).map(cell => cell.outerHTML)""")
    assert loose == ["<td>2</td>", "<td>0</td>"]  # seeds are names


def test_sorting_is_stable(page: Browser, home: Path) -> None:
    write_sweep("s", pairs({name: [2.0, 2.1] for name in ("constant_64", "constant_16", "norm_test")}))
    path = home / "report.html"
    path.write_text(render_html(build(load_sweep("s"), [], 0.0)))
    opened(page, path)
    order = page.evaluate(COLUMN.format(0))
    page.evaluate("document.querySelectorAll('[aria-labelledby=schedules] thead button')[1].click()")
    assert page.evaluate(COLUMN.format(0)) == order  # all losses are equal
    assert page.problems() == []


def test_without_scripts_the_tables_and_the_way_to_the_images_are_there(page: Browser, demo: Path) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.emulate(1280, 800, "light")
        page.open(demo / "report.html")
        page.wait("document.readyState === 'complete'")
        words = page.evaluate("document.body.innerText")
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "norm_test" in words and "images in the folder figures" in words and "as an image" in words
    assert page.evaluate("getComputedStyle(document.querySelector('.controls')).display") == "none"


def test_a_chart_that_cannot_be_drawn_says_so(page: Browser, demo: Path, tmp_path: Path) -> None:
    start = '"batch":{"tokens":{"spec":{"height":230,"layer":['
    html = (demo / "report.html").read_text()
    assert html.count(start) == 1
    broken = tmp_path / "report.html"
    broken.write_text(html.replace(start, start + "null,"))
    opened(page, broken)
    assert "could not be drawn" in page.evaluate("document.querySelector('[data-chart=batch]').innerText")
    assert page.evaluate("document.querySelectorAll('[data-chart] svg').length") == 8
    assert page.evaluate("document.querySelectorAll('thead button').length") > 20
    page.evaluate("document.querySelector('[name=axis][value=step]').click()")
    page.wait(DRAWN.format("light"))
    assert page.evaluate("document.querySelectorAll('[data-chart] svg').length") == 9


@pytest.mark.parametrize("state", ["nothing finished", "one run", "diverged", "nothing recorded"])
def test_a_poor_sweep_is_still_a_page(page: Browser, home: Path, state: str) -> None:
    rows = realistic_run(lambda share: 16, 0, stop=0.3)
    if state == "diverged":
        for row in rows[20:]:
            row |= {key: math.nan for key in ("train/loss", "val/loss") if key in row}
    recorded = None if state == "nothing recorded" else rows[:2] if state == "one run" else rows
    finished = state in ("one run", "diverged")
    write_sweep(
        "s",
        [Point({"batch": "constant_16", "seed": "0"}, recorded, "DONE" if finished else "FAILED", "no disk")],
    )
    path = home / "report.html"
    path.write_text(render_html(build(load_sweep("s"), [], 0.0)))
    page.emulate(390, 844, "light", phone=True)
    page.open(path)
    page.wait("document.readyState === 'complete'")
    if state != "nothing recorded":
        page.wait(DRAWN.format("light"))
        assert page.evaluate("document.querySelectorAll('[data-chart] svg').length") >= 2
        page.evaluate("document.querySelector('[data-zoom=in]').click()")
    assert page.problems() == []
    assert page.evaluate(SIDEWAYS) <= 0 and page.evaluate(OVERFLOWING) == []
    assert "NaN" not in page.evaluate("document.body.innerText")


@pytest.mark.slow
def test_a_page_of_100_long_runs_is_small(page: Browser, home: Path) -> None:
    """25 schedules of 4 seeds, 10,000 rows each. How soon it is there: benchmarks.report."""
    path = home / "report.html"
    path.write_text(render_html(build(many_long_runs(25, 4, 10_000), [], 0.0)))
    assert path.stat().st_size < 5e6
    opened(page, path)
    assert page.evaluate("document.querySelectorAll('[data-chart] svg').length") == 7
    assert page.problems() == []
