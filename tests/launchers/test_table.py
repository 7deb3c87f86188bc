from __future__ import annotations

import pytest

from launchers.table import Column, axis_columns, count, duration, fit, name_points, table, tally

COUNTS = {
    0: "0",
    999: "999",
    1000: "1k",
    412_160: "412k",
    800_000: "800k",
    999_499: "999k",
    999_500: "1M",
    1_250_000: "1.25M",
    2e9: "2B",
    1.5e12: "1.5T",
    24.13: "24.1",
}


@pytest.mark.parametrize(("number", "shown"), COUNTS.items())
def test_count(number: float, shown: str) -> None:
    assert count(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0:00"), (42, "0:42"), (59.6, "1:00"), (725, "12:05"), (12_000, "3:20:00"), (363_600, "4d 05h")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


COLUMNS = [
    Column("run", ["abc", "def"], "left"),
    Column("state", ["done", "new"], "left"),
    Column("steps", ["5", "1234"], optional=1),
    Column("time", ["0:42", ""], optional=2),
]


def test_numbers_are_aligned_to_the_right_and_no_line_ends_in_blanks() -> None:
    assert table(COLUMNS, 80).plain == (
        "run  state  steps  time\n"  #
        "abc  done       5  0:42\n"
        "def  new     1234"
    )


@pytest.mark.parametrize(("width", "titles"), [(23, 4), (22, 3), (17, 3), (16, 2), (5, 2)])
def test_a_narrow_screen_loses_optional_columns_from_the_highest_number(width: int, titles: int) -> None:
    assert fit(COLUMNS, width) == COLUMNS[:titles]
    assert max(len(line) for line in table(COLUMNS, width).plain.splitlines()) <= width


def test_states_are_coloured_in_their_own_column() -> None:
    text = table([Column("batch", ["done"], "left"), Column("state", ["failed"], "left")], 80)
    assert [text.plain[span.start : span.end] for span in text.spans if "red" in str(span.style)] == [
        "failed"
    ]


def test_axis_titles_are_short_where_that_is_clear() -> None:
    def titles(*axes: str) -> list[str]:
        return [column.title for column in axis_columns(axes, [])]

    assert titles("batch", "data.micro_batch", "seed") == ["batch", "micro_batch", "seed"]
    assert titles("data.seed", "seed") == ["data.seed", "seed"]


def test_points_are_named_together_where_they_are_a_product() -> None:
    points = [{"batch": batch, "seed": seed} for batch in ("a", "b") for seed in ("0", "1")]
    assert name_points(points) == "batch=a,b seed=0,1"
    assert name_points(points[:3]) == "batch=a seed=0; batch=a seed=1; batch=b seed=0"
    assert name_points([points[0]]) == "batch=a seed=0"
    assert name_points([{}]) == ""


def test_tally() -> None:
    assert tally(["new", "done", "new"], {"done": "skipped"}) == "2 new, 1 done (skipped)"
