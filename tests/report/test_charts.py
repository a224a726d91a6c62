"""Charts: values stand where the axes say, whatever the values are."""

import math
import re
from xml.etree import ElementTree

import pytest

from fsdp_qlora.report import charts


def draw(*series, has_zero=False):
    """The figure, which must be well-formed XML."""
    html = charts.draw(charts.Chart("<a & b>", "u", list(series), has_zero))
    assert "<a & b>" in ElementTree.fromstring(html).itertext()
    return html


def line(*points):
    return charts.Series("a", "#000", list(points))


def shapes(html, tag="polyline"):
    found = re.findall(rf'<{tag} points="([^"]*)" (?:class="line"|fill)', html)
    return [[tuple(map(float, p.split(","))) for p in points.split()] for points in found]


def marks(html):
    """Number on the vertical axis -> its distance from the top, 0 to 1000."""
    found = re.findall(r'<span style="top:([\d.]+)%">([^<]*)</span>', html)
    return {float(text.replace(",", "")): float(top) * 10 for top, text in found}


def test_a_line_runs_through_the_marks_of_its_values():
    html = draw(line((0, 1.0), (5, 3.0), (10, 2.0)))
    (points,), heights = shapes(html), marks(html)
    assert [x for x, _ in points] == [0, 500, 1000]
    assert [y for _, y in points] == pytest.approx([heights[v] for v in (1, 3, 2)], abs=0.2)
    assert min(marks(draw(line((0, 7.0), (1, 9.0)), has_zero=True))) == 0


def test_a_missing_value_breaks_the_line_and_one_point_is_a_dot():
    for missing in (None, math.nan, math.inf, 1e308):
        html = draw(line((0, 1.0), (1, 2.0), (2, missing), (3, 1.5)))
        assert [len(points) for points in shapes(html)] == [2]
        assert html.count('class="dot"') == 1
    assert draw(line((1, 2.0))).count('class="dot"') == 1


@pytest.mark.parametrize("has_zero", (False, True))
@pytest.mark.parametrize(
    "values",
    [
        *([v, v] for v in (5.0, 0.0, -3.0, 1e-14, 1e12, 1e200, 5e-324)),
        *([v, v * (1 + 1e-15)] for v in (1.0, 1e9)),
        *([2.0, 2.0 + d] for d in (1e-12, 1e-6, 2e-4)),
        [1e-20, 3e-20],
        [-1e299, 1e299],
        [0.0, 5e-324],
    ],
)
def test_constant_tiny_and_huge_ranges_have_an_axis_that_holds_them(values, has_zero):
    html = draw(line(*enumerate(values)), has_zero=has_zero)
    heights = marks(html)
    size = max(map(abs, values))
    assert len(heights) > 1 and min(heights) - 1e-5 * size <= min(values)
    assert max(values) <= max(heights) + 1e-5 * size
    assert all(0 <= y <= 1000 for points in shapes(html) for _, y in points)
    if has_zero:
        assert min(heights) <= 0


@pytest.mark.parametrize("style", ("line", "dots", "area"))
@pytest.mark.parametrize("points", [[], [(1, None)], [(1, math.nan), (2, math.inf)]])
def test_a_chart_without_a_finite_value_says_so(points, style):
    html = draw(charts.Series("a", "#000", points, style))
    assert "no finite value was recorded" in html and len(marks(html)) > 1


def test_areas_lie_on_each_other_and_begin_at_zero():
    def area(name, *points):
        return charts.Series(name, "#000", list(points), "area")

    html = draw(area("low", (1, 1.0), (2, 2.0)), area("high", (1, 3.0), (2, 2.0)), has_zero=True)
    high, low = shapes(html, "polygon")
    heights = marks(html)
    assert high[0] == (0, pytest.approx(heights[4], abs=0.2)) and high[-1] == (0, 1000)
    assert low[0][1] == pytest.approx(heights[1], abs=0.2)
    assert low[-3] == (1000, pytest.approx(heights[2], abs=0.2))
    ((first, second, *_),) = shapes(draw(area("a", (1, 2.0))), "polygon")
    assert (first[0], second[0]) == (0, 1000) and first[1] == second[1]  # one step: the whole width
    (edge,) = shapes(draw(area("a", (500, 1.0), (501, 1.0), (502, math.nan))), "polygon")
    assert edge[0][0] > 990  # what was before is not claimed


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (2.1, 4.9, [2, 3, 4, 5]),
    ],
)
def test_ticks_are_round_and_span_the_range(low, high, expected):
    assert charts.ticks(low, high) == expected


def test_marks_are_short():
    found = {value: charts.mark(value) for value in (0.0, 0.0002, 5e-5, 12000, 2e7)}
    assert [*found.values()] == ["0", "0.0002", "5e-05", "12,000", "2e+07"]


def test_a_long_line_is_thinned_by_means_and_smoothing_damps_noise_only():
    points = [(float(i), 1.0 if i % 7 else math.nan) for i in range(10_000)]
    points[4321] = (4321.0, 9.0)
    thin = charts.thin(points)
    assert len(thin) <= charts.MAX_POINTS and thin[-1][0] == 9_999.0
    assert 1.0 < max(y for _, y in thin) < 2.0 and min(y for _, y in thin) == 1.0
    flat = [(float(i), None if i == 7 else 2.0) for i in range(60)]
    assert [y for _, y in charts.smooth(flat)] == [2.0] * 60
    noisy = [(float(i), (-1.0) ** i) for i in range(90)]
    assert max(abs(y) for _, y in charts.smooth(noisy)[9:-9]) <= 0.2
