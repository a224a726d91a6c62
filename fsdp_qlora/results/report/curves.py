"""Curves of one run or of several over each other: loss, learning rate, gradient norm, speed."""

import itertools
from collections.abc import Callable
from dataclasses import replace

from fsdp_qlora.results import chart
from fsdp_qlora.results.chart import Panel, Points, Series
from fsdp_qlora.results.report.parts import Plot
from fsdp_qlora.results.report.record import Run, highest

# Colours that also the colour-blind tell apart.
COLOURS = ("#0072b2", "#c44e00", "#00795a", "#8250df", "#bf3989", "#8a9a2b")
HELD_OUT, CLIP = "#c44e00", "#8c959f"
MAX_POINTS = 400
MIN_TREND = 10  # points from which a smoothed line is drawn over the bare one

Axis = Callable[[Run], list[float]]


def by_step(run: Run) -> list[float]:
    """Number of every step."""
    return [step["step"] for step in run.steps]


def by_minute(run: Run) -> list[float]:
    """Minutes of training until the end of every step."""
    return [seconds / 60 for seconds in itertools.accumulate(s["step_s"] for s in run.steps)]


def plots(runs: list[Run]) -> list[Plot]:
    """The charts of some runs.

    Args:
        runs: one, or several drawn over each other.

    Returns:
        Those for which a run recorded something.
    """
    found = [_loss(runs, by_step, "optimizer step")]
    if len(runs) > 1:
        found.append(_loss(runs, by_minute, "minutes of training"))
    others = [
        _plot(runs, "Speed", "tokens/s of all ranks", "tokens_per_s", ",.0f"),
        _plot(runs, "Learning rate", "", "learning_rate", ".3g", is_noisy=False),
        _gradients(runs),
    ]
    found += [replace(plot, panel=replace(plot.panel, has_zero=True)) for plot in others]
    if len(runs) > 1:
        found += [_cards(runs), _host(runs)]
    return [plot for plot in found if any(series.points for series in plot.panel.series)]


def _loss(runs: list[Run], axis: Axis, x_title: str) -> Plot:
    """Training loss, and held-out loss as dots."""
    plot = _plot(runs, "Loss", "nats per trained token", "loss", ".3f", axis, x_title)
    held_out = []
    for i, run in enumerate(runs):
        place = {0.0: 0.0} | dict(zip(by_step(run), axis(run), strict=True))
        points = [(place.get(step, 0.0), loss) for step, loss in run.evals]
        known = [loss for _, loss in points if loss is not None]
        if known:
            label = "held out" if len(runs) == 1 else f"{run.name}, held out"
            colour = HELD_OUT if len(runs) == 1 else _colour(i)
            look = {"has_dots": True, "is_dashed": True, "figure": f"{known[-1]:.3f}"}
            held_out.append(Series(label, colour, points, 1.6, **look))  # type: ignore[arg-type]
    title = "Loss" if axis is by_step else "Loss over time"
    panel = replace(plot.panel, title=title, series=[*plot.panel.series, *held_out])
    return replace(plot, panel=panel)


def _gradients(runs: list[Run]) -> Plot:
    """The norm before clipping, and where it was clipped."""
    plot = _plot(runs, "Gradient norm", "of all adapters, before clipping", "grad_norm", ".3f")
    clips = {
        run.config.get("grad_norm") for run in runs if run.config.get("apply_gradient_clipping")
    }
    last = highest(x for run in runs for x in by_step(run)) or 1.0
    lines = [
        Series("clipped to", CLIP, [(0, clip), (last, clip)], 1.5, is_dashed=True, figure=f"{clip}")
        for clip in sorted(clip for clip in clips if clip)
    ]
    has_norms = bool(plot.panel.series)
    series = [*plot.panel.series, *(lines if has_norms else [])]
    return replace(plot, panel=replace(plot.panel, series=series))


def _cards(runs: list[Run]) -> Plot:
    return _peaks(runs, "Fullest card", "GiB reserved, peak of each step", _card_peaks)


def _host(runs: list[Run]) -> Plot:
    unit = "GiB in use by all programs"
    return _peaks(runs, "Host", unit, lambda run: run.host("host_used_gib"))


def _card_peaks(run: Run) -> list[float | None]:
    peaks = [highest(ranks) for ranks in run.ranks("device_peak_reserved_gib")]
    return peaks if run.has_cards else [None] * len(peaks)


def _peaks(
    runs: list[Run], title: str, unit: str, values: Callable[[Run], list[float | None]]
) -> Plot:
    series = []
    for i, run in enumerate(runs):
        points = list(zip(by_step(run), values(run), strict=True))
        top = highest(y for _, y in points)
        if top is not None:
            thinned = chart.thin(points, True, MAX_POINTS)
            series.append(Series(run.name, _colour(i), thinned, figure=f"{top:.2f}"))
    return Plot(Panel(title, unit, series, has_zero=True))


def _plot(
    runs: list[Run],
    title: str,
    unit: str,
    name: str,
    form: str,
    axis: Axis = by_step,
    x_title: str = "optimizer step",
    is_noisy: bool = True,
) -> Plot:
    """One field of the steps; what is noisy is drawn faint below its smoothed line."""
    series = []
    for i, run in enumerate(runs):
        values: Points = list(zip(axis(run), (s.get(name) for s in run.steps), strict=True))
        known = [y for _, y in values if y is not None]
        if not known:
            continue
        points = chart.thin(values, False, MAX_POINTS)
        has_trend = is_noisy and len(points) >= MIN_TREND
        label = run.name if len(runs) > 1 else title.lower()
        if has_trend:
            series.append(Series("", _colour(i), points, 1.0, opacity=0.4))
            points, label = chart.smooth(points), f"{label}, smoothed"
        figure = format(points[-1][1] if has_trend else known[-1], form)
        series.append(Series(label, _colour(i), points, 2.2, figure=figure))
    return Plot(Panel(title, unit, series), x_title)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
