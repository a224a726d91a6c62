"""Charts of a page as SVG: lines and stacked areas.

The drawing stretches to the width there is, while its text is HTML and keeps its size;
page.html.j2 holds the styles and shows values under the pointer.
"""

import itertools
import math
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

SIDE = 1000  # of the square that is stretched
MAX_POINTS = 400
LEAST, MOST = 1e-300, 1e300  # smaller values are drawn as 0, larger ones as gaps
FLAT = 1e-4  # a range below this share of its values is drawn as a constant
# Also the colour-blind tell the first six apart; seen on a light and on a dark ground.
COLOURS = ["#0072b2", "#c44e00", "#00795a", "#8250df", "#bf3989", "#8a9a2b", "#56a0d3", "#e69a3c"]
COLOURS += ["#5fb08f", "#b79af0", "#d88ab8", "#2b5f9e", "#7d8590", "#b0b7bf", "#6e7781"]

Points = list[tuple[float, float | None]]


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one area.

    Args:
        label: its name; "" for a line that is not named.
        colour: CSS colour.
        points: (x, y) with rising x; a gap where y is None or not finite.
        style: "line", "faint", "dash", "dots" (dashes with dots), or "area": areas are stacked, the
            first at the bottom, and all have the same x.
        figure: a number shown behind the label.
    """

    label: str
    colour: str
    points: Points
    style: str = "line"
    figure: str = ""


@dataclass(frozen=True)
class Chart:
    """One chart of a page.

    Args:
        title: what is shown.
        unit: of the vertical axis.
        series: later ones lie on top of earlier ones.
        has_zero: the vertical axis begins at 0; the horizontal one always does.
    """

    title: str
    unit: str
    series: list[Series]
    has_zero: bool = False


class _Scale(NamedTuple):
    """From values to the square: 0 stands at its left, the first tick at its bottom."""

    x_max: float
    ticks: list[float]

    def x(self, value: float) -> float:
        return value / self.x_max * SIDE

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return SIDE - (value - low) / (high - low) * SIDE

    def places(self, points: Points) -> list[str]:
        return [f"{self.x(x):.1f},{self.y(y or 0.0):.1f}" for x, y in points]


def draw(chart: Chart) -> str:
    """Draw lines and areas.

    Args:
        chart: any values, none at all too.

    Returns:
        An HTML <figure>: caption, axes, SVG, legend, note.
    """
    series = [replace(s, points=[(x, _known(y)) for x, y in s.points]) for s in chart.series]
    areas = _stack([s for s in series if s.style == "area" and s.points])
    lines = [s for s in series if s.style != "area"]
    points = [point for s in (*areas, *lines) for point in s.points]
    scale = _scale(points, chart.has_zero)
    shapes = [f'<path class="grid" d="M0 {scale.y(v):.1f}h{SIDE}"/>' for v in scale.ticks]
    shapes += [_area(area, scale) for area in reversed(areas)]
    shapes += [_line(line, scale) for line in lines]
    ys = [f'<span style="top:{scale.y(v) / SIDE:.2%}">{mark(v)}</span>' for v in scale.ticks]
    steps = [v for v in ticks(0.0, scale.x_max) if v <= scale.x_max * 1.001 and v == int(v)]
    xs = [
        f'<span class="{"end" * (v > 0.96 * scale.x_max)}" style="left:{v / scale.x_max:.2%}">'
        f"{mark(v)}</span>"
        for v in steps
    ]
    named = [s for s in (*lines, *reversed(areas)) if s.label]
    keys = [
        f'<li><i class="{s.style}" style="color:{s.colour}"></i>{escape(s.label)} '
        f"<b>{escape(s.figure)}</b></li>"
        for s in named
    ]
    words = escape(", ".join(f"{s.label} {s.figure}".strip() for s in named))
    title, tall = escape(chart.title), " tall" * bool(areas)
    is_known = any(y is not None for s in series for _, y in s.points)
    unit = chart.unit if is_known else "no finite value was recorded"
    return (
        f'<figure class="plot{tall}"><figcaption><b>{title}</b> <span>{escape(unit)}</span>'
        f'</figcaption><div class="frame"><div class="ys">{"".join(ys)}</div>'
        f'<div class="view"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" '
        f'role="img" aria-label="{title}: {words}" data-x="{scale.x_max:g}" '
        f'data-low="{scale.ticks[0]:g}" data-high="{scale.ticks[-1]:g}">{"".join(shapes)}</svg>'
        f'</div><div class="xs">{"".join(xs)}</div></div><p class="axis">optimizer step</p>'
        f'<ul class="key">{"".join(keys)}</ul></figure>'
    )


def _known(y: float | None) -> float | None:
    if y is None or not abs(y) < MOST:  # NaN compares as false
        return None
    return y if abs(y) > LEAST else 0.0


def _stack(areas: list[Series]) -> list[Series]:
    """Each area as its upper edge, on top of those below it."""
    below, stacked = [0.0] * max((len(area.points) for area in areas), default=0), []
    for area in areas:
        below = [low + (y or 0.0) for low, (_, y) in zip(below, area.points, strict=True)]
        edge: Points = [(x, y) for (x, _), y in zip(area.points, below, strict=True)]
        # Its first value holds from 0 on, unless the record begins late.
        if edge and (len(edge) == 1 or edge[0][0] <= 2 * (edge[1][0] - edge[0][0])):
            edge.insert(0, (0.0, edge[0][1]))
        stacked.append(replace(area, points=edge))
    return stacked


def _scale(points: Points, has_zero: bool) -> _Scale:
    values = [y for _, y in points if y is not None] or [0.0]
    low, high = min(values), max(values)
    margin = (high - low) * 0.04
    low = min(low, 0.0) if has_zero else low - margin
    return _Scale(max((x for x, _ in points), default=0) or 1.0, ticks(low, high + margin))


def ticks(low: float, high: float) -> list[float]:
    """Choose round numbers (1, 2 or 5 times a power of ten apart) that span a range.

    Args:
        low: least value.
        high: greatest value; where it is hardly above `low`, the range is widened.

    Returns:
        At least two rising numbers; the first is at most `low`, the last at least `high`.
    """
    if not high - low > FLAT * max(abs(low), abs(high)):
        half = 0.1 * abs(high)
        low, high = (low - half, high + half) if half else (0.0, 1.0)
    raw = (high - low) / 5
    power = math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 5, 10) if m * 10.0**power >= raw * 0.999)
    unit = step * 10.0**power
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [float(f"{i * step}e{power}") for i in range(first, last + 1)]


def _area(area: Series, scale: _Scale) -> str:
    """From its upper edge down to the ground; what lies below is drawn over it."""
    (left, _), (right, _) = area.points[0], area.points[-1]
    ground = f"{scale.x(right):.1f},{SIDE} {scale.x(left):.1f},{SIDE}"
    path = " ".join([*scale.places(area.points), ground])
    return f'<polygon points="{path}" fill="{area.colour}" data-name="{escape(area.label)}"/>'


def _line(line: Series, scale: _Scale) -> str:
    """A line with its gaps; dots are lines of no length, since circles would be stretched."""
    name = f' data-name="{escape(line.label)}"' if line.label else ""
    shapes = []
    for is_known, group in itertools.groupby(line.points, lambda point: point[1] is not None):
        places = scale.places(list(group)) if is_known else []
        path, look = " ".join(places), f'class="{line.style}" stroke="{line.colour}"'
        if len(places) > 1:
            shapes.append(f'<polyline class="halo" points="{path}"/>')
            shapes.append(f'<polyline points="{path}" {look}{name}/>')
        if len(places) == 1 or line.style == "dots":
            dots = "".join(f"M{place.replace(',', ' ')}h0" for place in places)
            shapes.append(f'<path class="dot" d="{dots}" stroke="{line.colour}"/>')
    return "".join(shapes)


def mark(value: float) -> str:
    """Write a number of an axis.

    Args:
        value: a round number.

    Returns:
        Short text: thousands separated, very small and very large values by power of ten.
    """
    size = abs(value)
    return f"{value:g}" if size < 1000 or size >= 1e7 else f"{value:,.0f}"


def thin(points: Points) -> Points:
    """Bring a long line to MAX_POINTS at most, each the mean of neighbours.

    Args:
        points: (x, y).

    Returns:
        The points themselves if they are few enough; x is that of the last of the neighbours.
    """
    size = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], _mean(group)) for group in groups]


def smooth(points: Points) -> Points:
    """Average each point with its neighbours, over 1/20 of the line or three points at least.

    Args:
        points: (x, y) at even distances.

    Returns:
        As many points; a gap only where no neighbour is known.
    """
    reach = max(len(points) // 40, 1)
    near = [points[max(i - reach, 0) : i + reach + 1] for i in range(len(points))]
    return [(x, _mean(part)) for (x, _), part in zip(points, near, strict=True)]


def _mean(points: Points) -> float | None:
    known = [value for _, y in points if (value := _known(y)) is not None]
    return sum(known) / len(known) if known else None
