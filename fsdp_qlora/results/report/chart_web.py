"""Charts for a web page: SVG stretches to the width there is, text in HTML keeps its size."""

import itertools
from dataclasses import dataclass
from html import escape

from fsdp_qlora.results import chart
from fsdp_qlora.results.chart import Points, Series
from fsdp_qlora.results.report.parts import Plot

SIDE = 1000  # of the square that is stretched


@dataclass(frozen=True)
class Scale:
    """From values to the square.

    Args:
        x_max: at its right side; 0 stands at the left.
        ticks: round numbers of the vertical axis, the first at the bottom, the last on top.
    """

    x_max: float
    ticks: list[float]

    def x(self, value: float) -> float:
        """Distance from the left."""
        return value / self.x_max * SIDE

    def y(self, value: float) -> float:
        """Distance from the top."""
        low, high = self.ticks[0], self.ticks[-1]
        return SIDE - (value - low) / (high - low) * SIDE


def draw(plot: Plot) -> str:
    """Draw a chart.

    Args:
        plot: with at least one known value.

    Returns:
        A <figure>: caption, axes, lines and areas, a legend, the note.
    """
    stacked = _stacked(plot.areas)
    scale = _scale(plot, stacked)
    shapes = [*_grid(scale), *_areas(plot.areas, stacked, scale), '<g class="ink">']
    for series in plot.panel.series:
        shapes += _halo(series, scale) if plot.areas and series.is_dashed else []
        shapes += _line(series, scale)
    title, unit = escape(plot.panel.title), escape(plot.panel.unit)
    note = f'<p class="note">{escape(plot.note)}</p>' if plot.note else ""
    x_max, (low, *_, high) = scale.x_max, scale.ticks
    return (
        f'<figure class="plot{" tall" * bool(plot.areas)}">'
        f"<figcaption><b>{title}</b> <span>{unit}</span></figcaption>"
        f'<div class="frame"><div class="ys">{_marks_y(scale)}</div><div class="area">'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{title}: {escape(_summary(plot))}" data-x="{x_max:g}" data-low="{low:g}" '
        f'data-high="{high:g}">{"".join(shapes)}</g></svg></div>'
        f'<div class="xs">{_marks_x(scale)}</div></div>'
        f'<p class="axis">{escape(plot.x_title)}</p>'
        f'<ul class="key{" rows" * bool(plot.areas)}">{_key(plot)}</ul>{note}'
        "</figure>"
    )


def _stacked(areas: list[Series]) -> list[Points]:
    """The upper edge of each area on top of those below it."""
    edges: list[Points] = []
    below = [0.0] * len(areas[0].points) if areas else []
    for area in areas:
        below = [low + (y or 0.0) for low, (_, y) in zip(below, area.points, strict=True)]
        edges.append([(x, y) for (x, _), y in zip(area.points, below, strict=True)])
    return edges


def _scale(plot: Plot, stacked: list[Points]) -> Scale:
    edges = [*stacked, *(series.points for series in plot.panel.series)]
    values = [y for edge in edges for _, y in edge if y is not None]
    has_zero = plot.panel.has_zero or bool(stacked)
    low, high = min(values), max(values)
    low = min(low, 0.0) if has_zero else low
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    ticks = chart.ticks(low if has_zero else low - margin, high + margin, 5)
    return Scale(max((x for edge in edges for x, _ in edge), default=0) or 1.0, ticks)


def _grid(scale: Scale) -> list[str]:
    lines = [f'<path class="grid" d="M0 {scale.y(v):.1f}h{SIDE}"/>' for v in scale.ticks[1:]]
    return [*lines, f'<path class="base" d="M0 {SIDE}h{SIDE}"/>']


def _areas(areas: list[Series], stacked: list[Points], scale: Scale) -> list[str]:
    """From the highest edge down, so that each area is only its upper edge."""
    shapes = []
    for area, edge in reversed(list(zip(areas, stacked, strict=True))):
        # The first figure holds from the step before on: the area begins at 0 when that was first.
        begins_late = len(edge) > 1 and edge[0][0] > 2 * (edge[1][0] - edge[0][0])
        places = _places(edge if begins_late else [(0.0, edge[0][1]), *edge], scale)
        left, right = places[0].split(",")[0], places[-1].split(",")[0]
        path = " ".join([*places, f"{right},{SIDE}", f"{left},{SIDE}"])
        name = escape(area.label)
        shapes.append(f'<polygon points="{path}" fill="{area.colour}" data-name="{name}"/>')
    return shapes


def _line(series: Series, scale: Scale) -> list[str]:
    """A line with its gaps; dots are lines of no length, since circles would be stretched."""
    name = f' data-name="{escape(series.label)}"' if series.label else ""
    look = f'stroke="{series.colour}" stroke-width="{series.width}"'
    look += f' opacity="{series.opacity}"' if series.opacity < 1 else ""
    look += ' stroke-dasharray="6 5"' if series.is_dashed else ""
    shapes = []
    for is_known, group in itertools.groupby(series.points, lambda point: point[1] is not None):
        points = list(group)
        if is_known and len(points) > 1:
            path = " ".join(_places(points, scale))
            shapes.append(f'<polyline points="{path}" {look}{name}/>')
        if is_known and (series.has_dots or len(points) == 1):
            dots = "".join(f"M{place.replace(',', ' ')}h0" for place in _places(points, scale))
            shapes.append(f'<path class="dots" d="{dots}" stroke="{series.colour}"/>')
    return shapes


def _halo(series: Series, scale: Scale) -> list[str]:
    """The ground's colour below a line, so that it is seen on every area."""
    known: Points = [(x, y) for x, y in series.points if y is not None]
    path = " ".join(_places(known, scale))
    return [f'<polyline class="halo" points="{path}" stroke-width="{series.width + 3}"/>']


def _places(points: Points, scale: Scale) -> list[str]:
    """Points of the square; of a level stretch only both ends."""
    pairs = [(f"{scale.x(x):.1f}", f"{scale.y(y or 0.0):.1f}") for x, y in points]
    kept = [
        (x, y)
        for i, (x, y) in enumerate(pairs)
        if i in (0, len(pairs) - 1) or not pairs[i - 1][1] == y == pairs[i + 1][1]
    ]
    return [f"{x.removesuffix('.0')},{y.removesuffix('.0')}" for x, y in kept]


def _marks_y(scale: Scale) -> str:
    return "".join(
        f'<span style="top:{scale.y(value) / SIDE:.2%}">{number(value)}</span>'
        for value in scale.ticks
    )


def _marks_x(scale: Scale) -> str:
    values = [v for v in chart.ticks(0, scale.x_max, 5) if v <= scale.x_max * 1.001]
    if scale.x_max >= 5:
        values = [value for value in values if value == int(value)]
    places = [(scale.x(value) / SIDE, number(value)) for value in values]
    return "".join(
        f'<span{" class=end" * (place > 0.96)} style="left:{place:.2%}">{text}</span>'
        for place, text in places
    )


def number(value: float) -> str:
    """A mark of an axis.

    Args:
        value: a round number.

    Returns:
        Short text: thousands parted, very small and very large ones by power of ten.
    """
    size = abs(value)
    return f"{value:g}" if size < 1000 or size >= 1e7 else f"{value:,.0f}"


def _key(plot: Plot) -> str:
    """Lines, then areas from the top of the stack down."""
    items = []
    for series in plot.panel.series:
        if series.label:
            kind = "dot" if series.has_dots else "dash" if series.is_dashed else "line"
            items.append((kind, series))
    items += [("box", area) for area in reversed(plot.areas)]
    return "".join(
        f'<li><i class="{kind}" style="color:{series.colour}"></i>{escape(series.label)}'
        f"{f' <b>{escape(series.figure)}</b>' if series.figure else ''}</li>"
        for kind, series in items
    )


def _summary(plot: Plot) -> str:
    """The chart in words, for those who cannot see it."""
    series = [*plot.panel.series, *reversed(plot.areas)]
    return ", ".join(f"{s.label} {s.figure}".strip() for s in series if s.label)
