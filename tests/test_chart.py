"""Line charts: values stand where the axis says."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from fsdp_qlora.results import chart
from fsdp_qlora.results.chart import Bar, Bars, Panel, Series

SVG = "{http://www.w3.org/2000/svg}"


def draw(*series, **options):
    panel = Panel("Loss", "nats", list(series), **options)
    return ElementTree.fromstring(chart.draw("run", ["line"], [panel], "step"))


def polylines(svg):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        for line in svg.iter(SVG + "polyline")
    ]


def axis_heights(svg):
    """Height of each number that stands left of the plot."""
    marks = [t for t in svg.iter(SVG + "text") if t.get("text-anchor") == "end"]
    return {float(t.text): float(t.get("y")) - 4.5 for t in marks}


def test_a_line_runs_through_the_heights_that_the_axis_gives_its_values():
    svg = draw(Series("a", "#000000", [(0, 1.0), (5, 3.0), (10, 2.0)]))
    heights = axis_heights(svg)
    (line,) = polylines(svg)
    assert [y for _, y in line] == pytest.approx([heights[v] for v in (1, 3, 2)], abs=0.11)
    left, middle, right = (x for x, _ in line)
    assert middle == pytest.approx((left + right) / 2, abs=0.11)


def test_an_axis_with_zero_begins_there():
    heights = axis_heights(draw(Series("a", "#000000", [(0, 7.0), (1, 9.0)]), has_zero=True))
    assert min(heights) == 0 and max(heights) >= 9


def test_one_point_is_drawn_as_a_dot():
    svg = draw(Series("a", "#000000", [(1, 2.0)]))
    assert polylines(svg) == [] and len(list(svg.iter(SVG + "circle"))) == 1


def test_a_missing_value_breaks_the_line():
    svg = draw(Series("a", "#000000", [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0)]))
    assert [len(line) for line in polylines(svg)] == [2, 2]


def test_labels_of_equal_lines_do_not_touch_and_stay_within_the_plot():
    svg = draw(*(Series(f"rank {i}", "#000000", [(0, 1.0), (1, 1.0)]) for i in range(4)))
    heights = [float(t.get("y")) for t in svg.iter(SVG + "text") if (t.text or "")[:4] == "rank"]
    gaps = [b - a for a, b in itertools.pairwise(heights)]
    assert len(heights) == 4 and min(gaps) >= chart.LABEL_GAP


def test_a_figure_stands_behind_its_label():
    svg = draw(Series("loss", "#000000", [(0, 1.0), (1, 2.0)], figure="2.000"))
    assert "loss 2.000" in [t.text for t in svg.iter(SVG + "text")]


def test_names_are_escaped():
    svg = chart.draw("<a & b>", [], [Panel("t", "u", [Series("l", "#000000", [(0, 1)])])], "x")
    texts = [t.text for t in ElementTree.fromstring(svg).iter(SVG + "text")]
    assert "<a & b>" in texts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (2.1, 4.9, [2, 3, 4, 5]),
    ],
)
def test_ticks_are_round_and_span_the_range(low, high, expected):
    assert chart.ticks(low, high, 5) == pytest.approx(expected)


def test_a_long_line_is_thinned_and_keeps_its_peak_or_its_mean():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4321] = (4321.0, 9.0)
    peak, mean = chart.thin(points, is_peak=True), chart.thin(points, is_peak=False)
    assert len(peak) == len(mean) <= chart.MAX_POINTS
    assert max(y for _, y in peak) == 9.0 and 1.0 < max(y for _, y in mean) < 2.0
    assert peak[-1][0] == 9_999.0
    assert len(chart.thin(points, is_peak=True, limit=90)) <= 90


def test_smoothing_keeps_a_constant_and_fills_gaps_and_damps_noise():
    flat = [(float(i), None if i == 7 else 2.0) for i in range(60)]
    assert [y for _, y in chart.smooth(flat)] == pytest.approx([2.0] * 60)
    noisy = [(float(i), (-1.0) ** i) for i in range(90)]
    assert max(abs(y) for _, y in chart.smooth(noisy)[9:-9]) < 0.01


def test_the_picture_is_plain_svg_without_scripts_or_links():
    text = chart.draw("run", [], [Panel("t", "u", [Series("l", "#000", [(0, 1), (1, 2)])])], "x")
    assert not re.search(r"<script|href|<image|@import", text)


def test_bars_are_as_long_as_their_values_and_begin_at_one_line():
    bars = [Bar("a", "#000000", 4.0, "4.0", ends=(3.0, 5.0)), Bar("b", "#000000", 1.0, "1.0")]
    text = chart.draw_bars(
        "bench", ["line"], [Bars("t", "u", [*bars, Bar("c", "#f00", None, "-")])]
    )
    svg = ElementTree.fromstring(text)
    ground, *rects = svg.iter(SVG + "rect")
    widths = [float(rect.get("width")) for rect in rects]
    assert widths == pytest.approx([4 * widths[1], widths[1], 0.0], abs=0.2)
    assert len({rect.get("x") for rect in rects}) == 1
    (line,) = svg.iter(SVG + "line")
    ends = [float(line.get(name)) - float(rects[0].get("x")) for name in ("x1", "x2")]
    assert ends == pytest.approx([3 * widths[1], 5 * widths[1]], abs=0.2)
    assert max(float(rect.get("y")) for rect in rects) < float(ground.get("height")) - 20
