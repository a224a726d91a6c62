"""The charts of the page: curves of runs over each other, and memory over time by row."""

import itertools
from typing import Any

from fsdp_qlora.planning.rows import DEVICE_ROWS, HOST_ROWS
from fsdp_qlora.record import Run, highest
from fsdp_qlora.report.charts import COLOURS, MAX_POINTS, Chart, Points, Series, smooth, thin

MIN_TREND = 10  # points from which a smoothed line is drawn over the bare one
MAX_DRAWN = 4  # GPUs; of more only the fullest and the emptiest are drawn
MAX_HEADROOM = 4.0  # a limit further above the rest than this would press it to the floor
LEAST_SHARE = 0.002  # of the peak; smaller rows would not be seen
LIMIT, PLAN, MEASURED = "#8c959f", "#bf3989", "#1f883d"
# One row, one colour on every chart.
ROWS = dict.fromkeys((*DEVICE_ROWS, *HOST_ROWS))
ROW_COLOURS = dict(zip(ROWS, itertools.cycle(COLOURS), strict=False))
# Field of the steps: title, unit, format, and whether it is drawn smoothed.
FIELDS = {
    "loss": ("Loss", "nats per trained token", ".3f", True),
    "tokens_per_s": ("Speed", "tokens/s of all ranks", ",.0f", True),
    "learning_rate": ("Learning rate", "", ".3g", False),
    "grad_norm": ("Gradient norm", "before clipping", ".3f", True),
}


def curves(runs: list[Run]) -> list[Chart]:
    """Loss, speed, learning rate and gradient norm over steps.

    Args:
        runs: one, or several drawn over each other.

    Returns:
        Charts of what at least one run recorded.
    """
    charts = []
    for field, (title, unit, form, is_noisy) in FIELDS.items():
        series = []
        for run, colour in zip(runs, itertools.cycle(COLOURS[:6]), strict=False):
            label = run.name if len(runs) > 1 else title.lower()
            series += _curve(run, field, Series(label, colour, []), form, is_noisy)
            if field == "loss":
                series += _held_out(run, label, colour if len(runs) > 1 else COLOURS[1])
            series += _clip(run) if field == "grad_norm" and series else []
        charts.append(Chart(title, unit, series, has_zero=field != "loss"))
    return [chart for chart in charts if chart.series]


def _curve(run: Run, field: str, look: Series, form: str, is_noisy: bool) -> list[Series]:
    """A line; what is noisy is drawn faint below its smoothed line."""
    points: Points = [(step["step"], step.get(field)) for step in run.steps if field in step]
    series, label, points = [], look.label, thin(points)
    if is_noisy and len(points) >= MIN_TREND:
        series.append(Series("", look.colour, points, "faint"))
        points, label = smooth(points), f"{label}, smoothed"
    figures = [format(y, form) for _, y in points if y is not None] or [""]
    return series + [Series(label, look.colour, points, figure=figures[-1])] * bool(points)


def _held_out(run: Run, label: str, colour: str) -> list[Series]:
    figures = [f"{loss:.3f}" for _, loss in run.evals if loss is not None]
    line = Series(f"{label}, held out", colour, run.evals, "dots", figures[-1] if figures else "")
    return [line] if figures else []


def _clip(run: Run) -> list[Series]:
    norm, last = run.config.get("grad_norm"), run.steps[-1]["step"]
    line = Series("clipped to", LIMIT, [(0, norm), (last, norm)], "dash", f"{norm}")
    return [line] if norm and run.config.get("apply_gradient_clipping") else []


def memory(run: Run, prefix: str) -> list[Chart]:
    """Memory over time, by row where the record has rows, below the plan and the limit.

    Args:
        run: the record.
        prefix: of the titles.

    Returns:
        A chart a GPU (of many, the fullest and the emptiest), then one of the host.
    """
    peaks = [peak or 0.0 for peak in run.peaks("device_peak_reserved_gib")]
    drawn = [*range(run.num_ranks)] if run.has_gpus else []
    if len(drawn) > MAX_DRAWN:
        drawn = [peaks.index(max(peaks)), peaks.index(min(peaks))]
    charts = [_memory(run, f"{prefix}GPU of rank {i}", "device", run.rank(i)) for i in drawn]
    host = _memory(run, f"{prefix}Host, all programs", "host", [s["host"] for s in run.steps])
    return [chart for chart in (*charts, host) if chart.series]


def _memory(run: Run, title: str, place: str, parts: list[dict[str, Any]]) -> Chart:
    """One GPU or the host: areas by row, a line of what was held, dashes of plan and limit."""
    field, rows = "host_used_gib", f"{place}_rows"
    budget, owner, label = "host_budget_gib", "machine has", "in use by all programs"
    if place == "device":
        field, label = "device_peak_reserved_gib", "reserved by torch, peak"
        budget, owner = "gpu_budget_gib", "GPU has"

    def total(part: dict[str, Any]) -> float:
        return sum((part.get(rows) or {}).values()) or part.get(field) or 0.0

    size = -(-len(parts) // MAX_POINTS)  # of neighbouring steps the one that held most is drawn
    groups = [range(i, min(i + size, len(parts))) for i in range(0, len(parts), size)]
    tops = [(run.steps[g[-1]]["step"], max((parts[i] for i in g), key=total)) for g in groups]
    top = max((part for _, part in tops), key=total)
    peak_gib, held_gib = total(top), highest(part.get(field) for part in parts)
    series = []
    for row in dict.fromkeys([*ROWS, *(row for _, part in tops for row in part.get(rows) or {})]):
        points: Points = [(x, (part.get(rows) or {}).get(row, 0.0)) for x, part in tops]
        if max(y or 0.0 for _, y in points) > LEAST_SHARE * peak_gib:
            figure = f"{(top.get(rows) or {}).get(row, 0.0):,.2f}"
            series.append(Series(row, ROW_COLOURS.get(row, LIMIT), points, "area", figure))
    if held_gib:
        points = [(x, part.get(field)) for x, part in tops]
        series.append(Series(label, MEASURED, points, figure=f"{held_gib:,.2f}"))
    planned_gib = run.table("plan").get(f"peak_{place}_gib")
    levels = {"plan: peak": planned_gib, "budget": run.config.get(budget)}
    levels |= {} if levels["budget"] else {owner: parts[-1].get(f"{place}_total_gib")}
    unit = "GiB"
    for name, level in levels.items():
        if level and level <= MAX_HEADROOM * peak_gib:
            ends: Points = [(0, level), (run.steps[-1]["step"], level)]
            colour = PLAN if name.startswith("plan") else LIMIT
            series.append(Series(name, colour, ends, "dash", f"{level:,.2f}"))
        elif level:
            unit += f"; {name} {level:,.1f}, far above"
    return Chart(title, unit, series if peak_gib else [], has_zero=True)
