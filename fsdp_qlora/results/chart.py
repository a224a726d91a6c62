"""Charts as SVG text, one panel below the other: lines labelled at their ends, and bars."""

import math
from dataclasses import dataclass
from html import escape

WIDTH = 1000
LEFT, RIGHT = 72, 216
PLOT_WIDTH = WIDTH - LEFT - RIGHT
HEAD_HEIGHT = 94
PLOT_HEIGHT = 210
PANEL_HEIGHT = PLOT_HEIGHT + 76
LABEL_GAP = 17
BAR_LEFT, BAR_WIDTH, BAR_HEIGHT, BAR_GAP = 190, 480, 18, 8
MAX_POINTS = 800
INK, FAINT, GRID = "#1f2328", "#656d76", "#e4e7eb"

Points = list[tuple[float, float | None]]


@dataclass(frozen=True)
class Series:
    """One line of a panel.

    Args:
        label: text at the line's end, in the line's colour; empty for a line without a label.
        colour: CSS colour.
        points: (x, y) with rising x; y None breaks the line.
        width: stroke width in pixels.
        opacity: of the line.
        has_dots: draw a dot at each point, with its value except at the last, for the label.
        is_dashed: draw the line dashed.
        figure: a number that stands behind the label.
    """

    label: str
    colour: str
    points: Points
    width: float = 2.0
    opacity: float = 1.0
    has_dots: bool = False
    is_dashed: bool = False
    figure: str = ""


@dataclass(frozen=True)
class Panel:
    """One plot.

    Args:
        title: what is shown.
        unit: unit of the vertical axis, shown beside the title.
        series: the lines; the later ones lie on top.
        has_zero: the vertical axis begins at zero.
    """

    title: str
    unit: str
    series: list[Series]
    has_zero: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar that lies.

    Args:
        label: in front of it.
        colour: CSS colour.
        value: its length; None for no bar.
        text: behind it.
        ends: least and greatest value that were seen, drawn as a thin line, or None.
    """

    label: str
    colour: str
    value: float | None
    text: str
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """Bars with one scale.

    Args:
        title: what is shown.
        unit: of the values, shown beside the title.
        bars: from top to bottom.
    """

    title: str
    unit: str
    bars: list[Bar]


def draw(title: str, lines: list[str], panels: list[Panel], x_title: str) -> str:
    """Draw panels that share their horizontal axis, which begins at zero.

    Args:
        title: heading of the picture.
        lines: one or two lines of text below it.
        panels: at least one, each with at least one finite value.
        x_title: name of the horizontal axis.

    Returns:
        A whole SVG document on a white ground.
    """
    height = HEAD_HEIGHT + len(panels) * PANEL_HEIGHT + 18
    x_max = max([1.0, *(x for panel in panels for s in panel.series for x, _ in s.points)])
    parts = []
    for index, panel in enumerate(panels):
        top = HEAD_HEIGHT + index * PANEL_HEIGHT + 34
        parts += _panel(panel, top, x_max)
    middle = LEFT + PLOT_WIDTH / 2
    parts.append(_text(middle, height - 16, x_title, anchor="middle", fill=FAINT))
    return _sheet(title, lines, height, parts)


def draw_bars(title: str, lines: list[str], groups: list[Bars]) -> str:
    """Draw groups of bars that lie, each group with a scale of its own that begins at zero.

    Args:
        title: heading of the picture.
        lines: one or two lines of text below it.
        groups: each with at least one bar.

    Returns:
        A whole SVG document on a white ground.
    """
    top = float(HEAD_HEIGHT)
    parts = []
    for group in groups:
        parts.append(_text(LEFT, top + 16, group.title, weight=600, after=f"  {group.unit}"))
        top += 28
        ends = [max(bar.value or 0.0, *(bar.ends or (0.0,))) for bar in group.bars]
        scale = BAR_WIDTH / (max(ends) or 1.0)
        for bar in group.bars:
            parts += _bar(bar, top, scale)
            top += BAR_HEIGHT + BAR_GAP
        top += 22
    return _sheet(title, lines, math.ceil(top), parts)


def _sheet(title: str, lines: list[str], height: int, parts: list[str]) -> str:
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="system-ui, \'Segoe UI\', Helvetica, '
        f'\'DejaVu Sans\', Arial, sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 34, title, size=20, weight=600),
        *(_text(LEFT, 58 + 19 * i, line, fill=FAINT) for i, line in enumerate(lines)),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def ticks(low: float, high: float, count: int) -> list[float]:
    """Choose round numbers (1, 2 or 5 times a power of ten apart) that span a range.

    Args:
        low: least value.
        high: greatest value, above `low`.
        count: about how many steps to make.

    Returns:
        Rising numbers; the first is at most `low`, the last at least `high`.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Points, is_peak: bool, limit: int = MAX_POINTS) -> Points:
    """Bring a long line to few points, by the mean or the peak of neighbours.

    Args:
        points: (x, y).
        is_peak: keep the largest of neighbours instead of their mean.
        limit: most points that are kept.

    Returns:
        The points themselves if they are few enough; x is that of the last of the neighbours.
    """
    size = math.ceil(len(points) / limit) or 1
    if size == 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    merged: Points = []
    for group in groups:
        known = [y for _, y in group if y is not None]
        value = max(known) if is_peak else sum(known) / max(len(known), 1)
        merged.append((group[-1][0], value if known else None))
    return merged


def smooth(points: Points) -> Points:
    """Average each point with its neighbours under a bell curve 1/30 of the line wide.

    Args:
        points: (x, y) at even distances.

    Returns:
        As many points, without the gaps.
    """
    sigma = max(len(points) / 30, 1.0)
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(reach + 1)]
    smoothed: Points = []
    for centre, (x, _) in enumerate(points):
        near = range(max(centre - reach, 0), min(centre + reach + 1, len(points)))
        pairs = [(weights[abs(i - centre)], y) for i in near if (y := points[i][1]) is not None]
        total = sum(weight for weight, _ in pairs)
        smoothed.append((x, sum(w * y for w, y in pairs) / total if total else None))
    return smoothed


def _panel(panel: Panel, top: float, x_max: float) -> list[str]:
    values = [y for s in panel.series for _, y in s.points if y is not None]
    low, high = min(values), max(values)
    low = min(low, 0.0) if panel.has_zero else low
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    y_ticks = ticks(low if panel.has_zero else low - margin, high + margin, 5)
    low, high = y_ticks[0], y_ticks[-1]
    bottom = top + PLOT_HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / x_max * PLOT_WIDTH, bottom - (y - low) / (high - low) * PLOT_HEIGHT

    right = LEFT + PLOT_WIDTH
    parts = [_text(LEFT, top - 14, panel.title, weight=600, after=f"  {panel.unit}")]
    for value in y_ticks:
        _, y = place(0, value)
        parts.append(_line(LEFT, y, right, y, GRID))
        parts.append(_text(LEFT - 10, y + 4.5, f"{value:g}", anchor="end", fill=FAINT))
    for value in ticks(0, x_max, 8):
        if value > x_max or value != int(value):
            continue
        x, _ = place(value, low)
        parts.append(_line(x, bottom, x, bottom + 5, FAINT))
        parts.append(_text(x, bottom + 20, f"{value:,.0f}", anchor="middle", fill=FAINT))
    parts.append(_line(LEFT, bottom, right, bottom, FAINT))
    ends = []
    for series in panel.series:
        placed = [None if y is None else place(x, y) for x, y in series.points]
        parts += _series(series, placed)
        known = [point for point in placed if point is not None]
        if series.label and known:
            ends.append((known[-1][1], series))
    return parts + _labels(ends, top, bottom)


def _series(series: Series, placed: list[tuple[float, float] | None]) -> list[str]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in placed:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    look = f'stroke="{series.colour}" stroke-width="{series.width}" opacity="{series.opacity}"'
    dash = ' stroke-dasharray="6 5"' if series.is_dashed else ""
    parts = []
    for run in runs:
        if len(run) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke-linejoin="round" {look}{dash}/>'
            )
        elif run and not series.has_dots:
            parts.append(_dot(*run[0], series.colour, 3.5))
    if not series.has_dots:
        return parts
    last = len(placed) - 1
    for i, (point, (_, value)) in enumerate(zip(placed, series.points, strict=True)):
        if point is None:
            continue
        x, y = point
        parts.append(_dot(x, y, series.colour, 5))
        if i != last:
            anchor = "start" if x < LEFT + 30 else "middle"
            text = f"{value:.3f}"
            parts.append(_text(x, y - 11, text, anchor=anchor, fill=series.colour, weight=600))
    return parts


def _labels(ends: list[tuple[float, Series]], top: float, bottom: float) -> list[str]:
    """Write each label beside its line's end, moved apart where they would touch."""
    ends = sorted(ends, key=lambda end: end[0])
    heights: list[float] = []
    for y, _ in ends:
        heights.append(max(y, heights[-1] + LABEL_GAP if heights else top + 4))
    limit = bottom
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - LABEL_GAP
    x = LEFT + PLOT_WIDTH + 12
    return [
        _text(x, y + 4.5, f"{series.label} {series.figure}".strip(), fill=series.colour, weight=600)
        for y, (_, series) in zip(heights, ends, strict=True)
    ]


def _bar(bar: Bar, top: float, scale: float) -> list[str]:
    middle = top + BAR_HEIGHT / 2
    length = (bar.value or 0.0) * scale
    parts = [
        _text(BAR_LEFT - 10, middle + 4.5, bar.label, anchor="end"),
        f'<rect x="{BAR_LEFT}" y="{top:.1f}" width="{length:.1f}" height="{BAR_HEIGHT}" '
        f'fill="{bar.colour}"/>',
    ]
    right = BAR_LEFT + length
    if bar.ends is not None:
        low, high = (BAR_LEFT + end * scale for end in bar.ends)
        parts.append(_line(low, middle, high, middle, INK))
        right = max(right, high)
    return [*parts, _text(right + 10, middle + 4.5, bar.text, fill=bar.colour, weight=600)]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _dot(x: float, y: float, colour: str, radius: float) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" '
        'stroke="#ffffff" stroke-width="1.5"/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    size: int = 13,
    weight: int = 400,
    anchor: str = "start",
    fill: str = INK,
    after: str = "",
) -> str:
    tail = f'<tspan font-weight="400" fill="{FAINT}" xml:space="preserve">{escape(after)}</tspan>'
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{fill}" stroke="#ffffff" stroke-width="3" '
        f'paint-order="stroke">{escape(text)}{tail if after else ""}</text>'
    )
