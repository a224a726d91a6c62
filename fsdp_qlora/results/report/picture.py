"""The picture of a run, report.svg: loss, and memory of the cards and the host."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fsdp_qlora.results import chart
from fsdp_qlora.results.chart import Panel, Series
from fsdp_qlora.results.report import curves
from fsdp_qlora.results.report.parts import duration
from fsdp_qlora.results.report.record import Run

# Colours that also the colour-blind tell apart; one kind of thing, one hue.
LOSS, HELD_OUT, HOST, LIMIT = "#0072b2", "#c44e00", "#57606a", "#8c959f"
MAX_TITLE, MAX_LABEL = 80, 22
RANKS = ("#00795a", "#8250df", "#b35900", "#bf3989")


def draw(runs: list[Run]) -> str:
    """Draw one run with its ranks, or the curves of several over each other.

    Args:
        runs: at least one.

    Returns:
        An SVG document.
    """
    if len(runs) == 1:
        return chart.draw(runs[0].name, headlines(runs[0]), _panels(runs[0]), "optimizer step")
    plots = curves.plots(runs)
    panels = [_short(plot.panel) for plot in plots if plot.x_title == "optimizer step"]
    lines = [f"{run.name}: {headlines(run)[-1]}" for run in runs] if len(runs) == 2 else []
    title = f"{len(runs)} runs: {'  ·  '.join(run.name for run in runs)}"
    return chart.draw(_cut(title, MAX_TITLE), lines, panels, "optimizer step")


def _short(panel: Panel) -> Panel:
    """With labels that fit beside the plot."""
    series = [replace(line, label=_cut(line.label, MAX_LABEL)) for line in panel.series]
    return replace(panel, series=series)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def headlines(run: Run) -> list[str]:
    """What ran, then how fast and how far.

    Args:
        run: the record.

    Returns:
        Two lines.
    """
    config, last = run.config, run.steps[-1]
    num_ranks = len(last["ranks"])
    what = [
        Path(str(config["model_name"])).name if "model_name" in config else None,
        config.get("train_type"),
        f"{num_ranks} rank{'s' * (num_ranks > 1)}",
        f"batch {config['batch_size']}" if "batch_size" in config else None,
        f"context {config['context_length']}" if "context_length" in config else None,
    ]
    seconds = sum(step["step_s"] for step in run.steps)
    speeds = sorted(step["tokens_per_s"] for step in run.steps)
    num_bad = sum(step["loss"] is None for step in run.steps)
    how = [
        f"{len(run.steps):,} step{'s' * (len(run.steps) > 1)} in {duration(seconds)}",
        f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median)",
        f"{last['epoch']:.2f} epochs",
        f"losses that are not a number: {num_bad}" if num_bad else None,
    ]
    return ["  ·  ".join(part for part in parts if part) for parts in (what, how)]


def _panels(run: Run) -> list[Panel]:
    return [panel for panel in (_loss(run), _device(run), _host(run)) if panel is not None]


def _loss(run: Run) -> Panel | None:
    points = chart.thin([(step["step"], step["loss"]) for step in run.steps], is_peak=False)
    has_trend = len(points) >= 10
    label = f"training {run.steps[-1]['loss'] or float('nan'):.3f}"
    series = [Series("" if has_trend else label, LOSS, points, 1.2, 0.35 if has_trend else 1.0)]
    if has_trend:
        trend = chart.smooth(points)
        series.append(Series(f"training, smoothed {trend[-1][1] or 0:.3f}", LOSS, trend, 2.6))
    known = [loss for _, loss in run.evals if loss is not None]
    if known:
        label = f"held out {known[-1]:.3f}"
        series.append(Series(label, HELD_OUT, run.evals, 1.6, has_dots=True, is_dashed=True))
    has_values = any(y is not None for s in series for _, y in s.points)
    return Panel("Loss", "nats per trained token", series) if has_values else None


def _device(run: Run) -> Panel | None:
    series = _per_rank(run, "device_peak_reserved_gib", "card")
    peak_gib = max(y or 0.0 for s in series for _, y in s.points)
    if peak_gib == 0:
        return None
    budget_gib = run.config.get("gpu_budget_gib")
    card_gib = min(rank["device_total_gib"] for rank in run.steps[-1]["ranks"])
    limit = (
        _limit(run, budget_gib, peak_gib, "budget")
        if budget_gib
        else _limit(run, card_gib, peak_gib, "card has")
    )
    unit = "GiB reserved, peak of each step; figures at the right are the highest"
    return Panel("Memory of each card", unit, [*limit, *series], has_zero=True)


def _host(run: Run) -> Panel:
    used = [(step["step"], step["host"].get("host_used_gib")) for step in run.steps]
    series = _per_rank(run, "host_rss_gib", "rank")
    used_gib = max((y for _, y in used if y is not None), default=0.0)
    if used_gib:
        label = f"whole machine: {used_gib:.1f}"
        series.append(Series(label, HOST, chart.thin(used, is_peak=True)))
    total_gib = run.steps[-1]["host"].get("host_total_gib") or 0.0
    limit = _limit(run, total_gib, used_gib, "machine has")
    unit = "GiB in use (of a rank: its resident set); figures at the right are peaks"
    return Panel("Memory of the host", unit, [*limit, *series], has_zero=True)


def _per_rank(run: Run, field: str, word: str) -> list[Series]:
    """One line a rank; many ranks share one colour and one label, at the highest of them."""
    num_ranks = len(run.steps[-1]["ranks"])
    peaks_gib = [max(step["ranks"][rank][field] for step in run.steps) for rank in range(num_ranks)]
    highest = peaks_gib.index(max(peaks_gib))
    series = []
    for rank, peak_gib in enumerate(peaks_gib):
        colour, label, width = RANKS[rank % len(RANKS)], f"{word} {rank}: {peak_gib:.1f}", 2.0
        if num_ranks > len(RANKS):
            colour, width = RANKS[0], 1.0
            label = f"{num_ranks} {word}s, at most {peak_gib:.1f}" if rank == highest else ""
        values: chart.Points = [(step["step"], step["ranks"][rank][field]) for step in run.steps]
        series.append(Series(label, colour, chart.thin(values, is_peak=True), width))
    return series


def _limit(run: Run, total_gib: float, peak_gib: float, word: str) -> list[Series]:
    """A dashed line at what there is, unless it would press the rest to the floor."""
    if not 0 < total_gib <= 2.5 * peak_gib:
        return []
    points: Any = [(0, total_gib), (run.steps[-1]["step"], total_gib)]
    return [Series(f"{word} {total_gib:.1f}", LIMIT, points, 1.5, is_dashed=True)]
