"""Runs side by side from their records, as one page that needs nothing else: report.html."""

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from fsdp_qlora import atomic
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError
from fsdp_qlora.planning.rows import DEVICE_ROWS, HOST_ROWS
from fsdp_qlora.record import Run, distinct, highest, read
from fsdp_qlora.report import tables
from fsdp_qlora.report.charts import COLOURS, MAX_POINTS, Chart, Points, Series, draw, smooth, thin
from fsdp_qlora.report.tables import PageTable

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
NO_PLAN = "No plan was recorded, so nothing is predicted here."


class Section(NamedTuple):
    """A chapter of the page: its charts, sentences and tables, in this order."""

    title: str
    charts: list[Chart]
    words: list[str]
    tables: list[PageTable]


def write(run_dirs: list[Path], out: Path) -> Path:
    """Write the report of some runs.

    Args:
        run_dirs: output directories; the first is what the others are compared with.
        out: directory of report.html; made if needed.

    Returns:
        Path of the page.

    Raises:
        UserError: no record, a line that cannot be read, a directory that cannot be written.
    """
    page, path = text(distinct([read(run_dir) for run_dir in run_dirs])), out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic.write(path, page)
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "make room or check permissions"
        raise UserError(str(path), reason, remedy, code=ENVIRONMENT) from error
    return path


def text(runs: list[Run]) -> str:
    """Write the page.

    Args:
        runs: with different names.

    Returns:
        A whole HTML document.
    """
    loader, strict = jinja2.PackageLoader("fsdp_qlora", "report"), jinja2.StrictUndefined
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=strict)
    return env.get_template("page.html.j2").render(
        title="  ·  ".join(run.name for run in runs),
        lines=[headline(run) for run in runs],
        tiles=tables.tiles(runs[0]) if len(runs) == 1 else [],
        sections=sections(runs),
        draw=draw,
    )


def headline(run: Run) -> str:
    """Say what ran and how far, in a line.

    Args:
        run: the record.
    """
    words: dict[str, Any] = {
        "{}": run.name,
        "{} ": run.state,
        "model {}": Path(str(run.config.get("model_name") or "not recorded")).name,
        "type {}": run.config.get("train_type"),
        "ranks: {}": run.num_ranks,
        "batch {}": run.config.get("batch_size"),
        "context {}": run.config.get("context_length"),
        "{} steps were taken again after a resume": run.num_redone or None,
    }
    return "  ·  ".join(form.format(value) for form, value in words.items() if value is not None)


def sections(runs: list[Run]) -> list[Section]:
    """The chapters of the page.

    Args:
        runs: one or several.

    Returns:
        Those for which a run recorded something.
    """
    named = [(run, f"{run.name}: " * (len(runs) > 1)) for run in runs]
    compared = [tables.predicted(*pair) for pair in named]
    sentences = [line for _, lines in compared for line in lines] or [NO_PLAN]
    charts = [chart for pair in named for chart in memory(*pair)]
    chapters = [
        Section("Figures", [], [], tables.figures(runs)),
        Section("Curves", curves(runs), [], []),
        Section("Memory", charts, [], [tables.peaks(*pair) for pair in named]),
        Section("Predicted and measured", [], sentences, [t for part, _ in compared for t in part]),
        Section("Answers", [], [], [tables.answers(*pair) for pair in named]),
        Section("Data", [], *tables.data(runs)),
        Section("Settings", [], [], tables.settings(runs)),
        Section("Environment", [], [], tables.environment(runs)),
    ]
    return [s for s in chapters if s.charts or s.words or any(table.rows for table in s.tables)]


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


def main(argv: list[str]) -> int:
    """Write the report of the runs named on the command line and print its path.

    Args:
        argv: output directories, --out.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser("python -m fsdp_qlora report", description=__doc__)
    run_help = "output directory of a run"
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=run_help)
    out_help = "directory of report.html [of one run its own, else here]"
    parser.add_argument("--out", type=Path, help=out_help)
    args = parser.parse_args(argv)
    run_dirs = list({path.resolve(): path for path in args.runs}.values())
    print(write(run_dirs, args.out or (run_dirs[0] if len(run_dirs) == 1 else Path())))
    return DONE
