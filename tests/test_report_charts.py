"""Charts of the page: values stand where its axes say, whatever the shape of the record."""

import re

import pytest

from fsdp_qlora.results.chart import Panel, Series
from fsdp_qlora.results.report import chart_web
from fsdp_qlora.results.report.parts import Plot


def draw(*lines, areas=(), **options):
    return chart_web.draw(Plot(Panel("t", "u", list(lines), **options), areas=list(areas)))


def polylines(html, tag="polyline"):
    return [
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(rf'<{tag} points="([^"]*)"', html)
    ]


def marks(html):
    """Number on the vertical axis -> its distance from the top, 0 to 1000."""
    found = re.findall(r'<span style="top:([\d.]+)%">([^<]*)</span>', html)
    return {float(text.replace(",", "")): float(top) * 10 for top, text in found}


def test_a_line_runs_through_the_marks_of_its_values():
    html = draw(Series("a", "#000", [(0, 1.0), (5, 3.0), (10, 2.0)]))
    (line,), heights = polylines(html), marks(html)
    assert [x for x, _ in line] == [0, 500, 1000]
    assert [y for _, y in line] == pytest.approx([heights[v] for v in (1, 3, 2)], abs=0.2)


def test_a_missing_value_breaks_the_line_and_one_point_is_a_dot():
    html = draw(Series("a", "#000", [(0, 1.0), (1, 2.0), (2, None), (3, 1.5)]))
    assert [len(line) for line in polylines(html)] == [2]
    assert len(re.findall(r'class="dots"', html)) == 1


def test_only_the_ends_of_a_level_stretch_are_kept():
    values = [1.0] * 50 + [2.0] * 50
    (line,) = polylines(draw(Series("a", "#000", list(enumerate(values)))))
    assert [round(x * 0.099) for x, _ in line] == [0, 49, 50, 99]


def test_areas_lie_on_each_other_and_begin_at_zero():
    areas = [
        Series("low", "#000", [(1, 1.0), (2, 2.0)]),
        Series("high", "#111", [(1, 3.0), (2, 2.0)]),
    ]
    html = draw(areas=areas)
    high, low = polylines(html, "polygon")
    heights = marks(html)
    assert high[0] == (0, pytest.approx(heights[4], abs=0.2)) and high[-1] == (0, 1000)
    assert low[0][1] == pytest.approx(heights[1], abs=0.2)
    assert low[-3] == (1000, pytest.approx(heights[2], abs=0.2))


def test_one_step_fills_the_width():
    ((first, second, *_),) = polylines(draw(areas=[Series("a", "#000", [(1, 2.0)])]), "polygon")
    assert (first[0], second[0]) == (0, 1000) and first[1] == second[1]


def test_an_area_that_begins_late_does_not_claim_what_was_before():
    points = [(500.0, 1.0), (501.0, 1.0), (502.0, 1.0)]
    (edge,) = polylines(draw(areas=[Series("a", "#000", points)]), "polygon")
    assert edge[0][0] > 990


def test_a_constant_line_and_a_line_of_zeros_have_an_axis():
    for value in (5.0, 0.0):
        html = draw(Series("a", "#000", [(0, value), (1, value)]))
        heights = marks(html)
        assert min(heights) <= value <= max(heights) and len(heights) > 1


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.0002, "0.0002"), (5e-5, "5e-05"), (12000, "12,000")]
)
def test_marks_are_short(value, text):
    assert chart_web.number(value) == text
