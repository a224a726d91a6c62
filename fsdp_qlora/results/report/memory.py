"""Memory over time: of every rank stacked by row, of the host, with the plan and the limit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fsdp_qlora.planning import rows as names
from fsdp_qlora.results import chart
from fsdp_qlora.results.chart import Panel, Points, Series
from fsdp_qlora.results.report import plan
from fsdp_qlora.results.report.parts import Beside, Grid, Part, Plot, Plots, Words, digits_for, gib
from fsdp_qlora.results.report.record import Run, highest

MAX_DRAWN = 4  # ranks; of more only the highest and the lowest are drawn
MAX_POINTS = 300
MAX_HEADROOM = 4.0  # a limit further above the rest than this would press it to the floor
LIMIT, PLAN, MEASURED = "#8c959f", "#bf3989", "#1f883d"

# One row, one colour, on every chart; they are read on a light and on a dark ground.
COLOURS = {
    names.PACKED: "#0072b2",
    names.CONSTANTS: "#56a0d3",
    names.UNQUANTISED: "#2b5f9e",
    names.ADAPTERS: "#00795a",
    names.GRADIENTS: "#5fb08f",
    names.OPTIMIZER: "#8a9a2b",
    names.KEPT: "#c44e00",
    names.LAYER: "#e69a3c",
    names.BUFFERS: "#8250df",
    names.SCRATCH: "#b79af0",
    names.LOSS: "#bf3989",
    names.LOADING: "#d88ab8",
    names.LIBRARIES: "#7d8590",
    names.SLACK: "#b0b7bf",
    names.CONTEXT: "#6e7781",
    names.HOSTED: "#0072b2",
    names.FILES: "#56a0d3",
    names.PROCESSES: "#6e7781",
    names.DATA: "#00795a",
    names.SAVING: "#8a9a2b",
    names.RANKS: "#c44e00",
    names.SYSTEM: "#b0b7bf",
    names.REST: "#d0d7de",
}
OTHERS = ("#0072b2", "#00795a", "#c44e00", "#8250df", "#bf3989", "#8a9a2b")
TENSORS, FREE, OUTSIDE = "tensors, peak", "reserved by torch, free", "outside torch, all programs"
COARSE = {TENSORS: "#0072b2", FREE: "#b0b7bf", OUTSIDE: "#6e7781"}

Rows = dict[str, float]


def parts(runs: list[Run]) -> list[Part]:
    """The charts and peaks of some runs.

    Args:
        runs: the records.

    Returns:
        A chart per card (few of many), one of each host, tables of peaks, and what is not there.
    """
    groups = [_plots(run, len(runs) > 1) for run in runs]
    if max(map(len, groups)) == 1:
        groups = [[plot for group in groups for plot in group]]
    notes: dict[str, list[str]] = {}
    for run in runs:
        for note in _notes(run):
            notes.setdefault(note, []).append(run.name)
    words = []
    for note, names_of in notes.items():
        is_all = len(names_of) == len(runs)
        words.append(Words(note if is_all else f"{', '.join(names_of)}: {note}"))
    peaks = [_peaks(run, len(runs) > 1) for run in runs]
    return [*map(Plots, groups), *words, Beside(peaks) if len(runs) > 1 else peaks[0]]


def _plots(run: Run, has_name: bool) -> list[Plot]:
    plots = [_card(run, rank) for rank in _drawn(run)] if run.has_cards else []
    name = f"{run.name}: " * has_name
    return [
        replace(plot, panel=replace(plot.panel, title=name + plot.panel.title))
        for plot in [*plots, _host(run)]
        if plot is not None
    ]


def _notes(run: Run) -> list[str]:
    """What the charts of a run do not show."""
    words = []
    if not run.has_cards:
        words.append("The ranks computed on the CPU: there is no memory of cards to show.")
    elif not _has(run, "device_rows"):
        words.append(
            "The memory of the cards was not recorded by row: the areas are what torch's allocator "
            "and the driver counted."
        )
    if run.has_cards and run.num_ranks > MAX_DRAWN:
        drawn = " and ".join(str(rank) for rank in _drawn(run))
        words.append(f"Of {run.num_ranks} ranks, the highest and the lowest are drawn: {drawn}.")
    if not run.steps[-1]["host"].get("host_rows"):
        words.append("The memory of the host was not recorded by row.")
    return words


def _has(run: Run, name: str) -> bool:
    return all(rank.get(name) for rank in run.steps[-1]["ranks"])


def _drawn(run: Run) -> list[int]:
    """The ranks that are drawn."""
    if run.num_ranks <= MAX_DRAWN:
        return list(range(run.num_ranks))
    peaks = [
        highest(step["ranks"][rank].get("device_peak_reserved_gib") for step in run.steps) or 0.0
        for rank in range(run.num_ranks)
    ]
    return [peaks.index(max(peaks)), peaks.index(min(peaks))]


def _card(run: Run, rank: int) -> Plot | None:
    """One card: by the ledger's rows, or by what the allocator and the driver say."""
    is_fine = bool(run.steps[-1]["ranks"][rank].get("device_rows"))
    order = names.DEVICE_ROWS if is_fine else tuple(COARSE)
    areas = _areas(run, lambda step: _device_rows(step["ranks"][rank], is_fine), order)
    lines = []
    if is_fine:
        values = [
            (step["step"], step["ranks"][rank].get("device_peak_reserved_gib"))
            for step in run.steps
        ]
        lines = _line("torch reserved, peak", MEASURED, values)
    total_gib = run.steps[-1]["ranks"][rank].get("device_total_gib")
    budget_gib = run.config.get("gpu_budget_gib")
    limit = ("budget", budget_gib) if budget_gib else ("card has", total_gib)
    return _plot(run, f"Card of rank {rank}", areas, lines, limit, "device")


def _device_rows(rank: dict[str, Any], is_fine: bool) -> Rows:
    if is_fine:
        return rank.get("device_rows") or {}
    reserved = rank.get("device_peak_reserved_gib") or 0.0
    tensors = min(rank.get("device_peak_allocated_gib") or reserved, reserved)
    outside = (rank.get("device_used_gib") or 0.0) - (rank.get("device_reserved_gib") or 0.0)
    return {TENSORS: tensors, FREE: reserved - tensors, OUTSIDE: max(outside, 0.0)}


def _host(run: Run) -> Plot | None:
    """The machine: by the ledger's rows, or by rank and the rest."""
    is_fine = bool(run.steps[-1]["host"].get("host_rows"))
    order = names.HOST_ROWS if is_fine else ()
    areas = _areas(run, lambda step: _host_rows(step, is_fine), order)
    lines = []
    if is_fine or not areas:
        values = [(step["step"], step["host"].get("host_used_gib")) for step in run.steps]
        lines = _line("in use, all programs", MEASURED, values)
    if not areas:
        values = [(step["step"], _sum_of(step, "host_rss_gib")) for step in run.steps]
        lines += _line("ranks, resident", OTHERS[0], values)
    total_gib = run.steps[-1]["host"].get("host_total_gib")
    budget_gib = run.config.get("host_budget_gib")
    limit = ("budget", budget_gib) if budget_gib else ("machine has", total_gib)
    return _plot(run, "Host, all programs", areas, lines, limit, "host")


def _host_rows(step: dict[str, Any], is_fine: bool) -> Rows:
    if is_fine:
        return step["host"].get("host_rows") or {}
    used, ranks = step["host"].get("host_used_gib"), step["ranks"]
    sizes = [rank.get("host_pss_gib") for rank in ranks]
    if used is None or None in sizes:
        return {}
    rows = {f"rank {i}": size for i, size in enumerate(sizes)}
    if len(ranks) > MAX_DRAWN:
        rows = {f"{len(ranks)} ranks": sum(sizes)}
    return rows | {names.SYSTEM: max(used - sum(sizes), 0.0)}


def _sum_of(step: dict[str, Any], name: str) -> float | None:
    values = [rank.get(name) for rank in step["ranks"]]
    return None if None in values else sum(values)


def _line(label: str, colour: str, values: Points) -> list[Series]:
    peak = highest(y for _, y in values)
    if not peak:
        return []
    return [Series(label, colour, chart.thin(values, True, MAX_POINTS), 1.8, figure=f"{peak:.2f}")]


def _areas(run: Run, rows_of: Callable[[dict], Rows], order: tuple[str, ...]) -> list[Series]:
    """Stacked rows; of neighbouring steps the one that held most stands for all."""
    size = -(-len(run.steps) // MAX_POINTS)
    points: list[tuple[float, Rows]] = []
    for i in range(0, len(run.steps), size):
        group = [(step["step"], rows_of(step)) for step in run.steps[i : i + size]]
        points.append((group[-1][0], max((rows for _, rows in group), key=_total)))
    known = list(dict.fromkeys(row for _, rows in points for row in rows))
    known = [row for row in order if row in known] + [row for row in known if row not in order]
    top = max((rows for _, rows in points), key=_total)
    digits = digits_for(_total(top))
    areas = []
    for i, row in enumerate(known):
        values: Points = [(x, rows.get(row, 0.0)) for x, rows in points]
        if max(y or 0.0 for _, y in values) < 0.5 * 10**-digits:
            continue
        colour = COLOURS.get(row) or COARSE.get(row) or OTHERS[i % len(OTHERS)]
        areas.append(Series(row, colour, values, figure=f"{top.get(row, 0.0):.{digits}f}"))
    return areas


def _total(rows: Rows) -> float:
    return sum(rows.values())


def _plot(
    run: Run,
    title: str,
    areas: list[Series],
    lines: list[Series],
    limit: tuple[str, float | None],
    place: str,
) -> Plot | None:
    """Draw the plan's line and the limit over what was held."""
    if not areas and not lines:
        return None
    tops = [sum(ys) for ys in zip(*([y or 0.0 for _, y in s.points] for s in areas), strict=True)]
    peak_gib = highest([*tops, *(y for s in lines for _, y in s.points)]) or 0.0
    last, notes = run.steps[-1]["step"], []
    marks = (("plan: peak", plan.peak_gib(run, place), PLAN), (*limit, LIMIT))
    for word, level, colour in marks:
        if not level:
            continue
        if level > MAX_HEADROOM * peak_gib:
            notes.append(f"{word} {level:,.1f} GiB, far above")
            continue
        points: Points = [(0, level), (last, level)]
        lines.append(Series(word, colour, points, 1.6, is_dashed=True, figure=f"{level:,.2f}"))
    unit = f"GiB; {peak_gib:,.2f} in all at the highest step"
    note = f"Not in the picture: {'; '.join(notes)}." if notes else ""
    return Plot(Panel(title, unit, lines, has_zero=True), areas=areas, note=note)


def _peaks(run: Run, has_name: bool) -> Grid:
    """The largest figures of every rank."""
    fields = {
        "card allocated": "device_peak_allocated_gib",
        "card reserved": "device_peak_reserved_gib",
        "card in use": "device_used_gib",
        "host RSS": "host_rss_gib",
        "host PSS": "host_pss_gib",
        "pinned": "host_pinned_gib",
        "swapped": "host_swap_gib",
        "CPU cores busy": "cpu_cores",
    }
    peaks = {
        head: [
            highest(step["ranks"][rank].get(field) for step in run.steps)
            for rank in range(run.num_ranks)
        ]
        for head, field in fields.items()
    }
    kept = {head: values for head, values in peaks.items() if any(values)}
    rows = [
        (f"rank {rank}", [gib(values[rank]) for values in kept.values()])
        for rank in range(run.num_ranks)
    ]
    title = "Peaks of every rank, GiB and cores" + f": {run.name}" * has_name
    is_folded = run.num_ranks > MAX_DRAWN
    return Grid(title, ["", *kept], rows, is_folded=is_folded, is_tight=True)
