"""Runs side by side from their records, as one page that needs nothing else: report.html."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from fsdp_qlora import atomic
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError
from fsdp_qlora.record import Run, distinct, read
from fsdp_qlora.report import tables
from fsdp_qlora.report.charts import Chart, draw
from fsdp_qlora.report.curves import curves, memory
from fsdp_qlora.report.tables import Table

NO_PLAN = "No plan was recorded, so nothing is predicted here."


class Section(NamedTuple):
    """A chapter of the page: its charts, sentences and tables, in this order."""

    title: str
    charts: list[Chart]
    words: list[str]
    tables: list[Table]


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
    verdicts = [line for _, lines in compared for line in lines] or [NO_PLAN]
    charts = [chart for pair in named for chart in memory(*pair)]
    found = [
        Section("Figures", [], [], tables.figures(runs)),
        Section("Curves", curves(runs), [], []),
        Section("Memory", charts, [], [tables.peaks(*pair) for pair in named]),
        Section("Predicted and measured", [], verdicts, [t for part, _ in compared for t in part]),
        Section("Answers", [], [], [tables.answers(*pair) for pair in named]),
        Section("Data", [], *tables.data(runs)),
        Section("Settings", [], [], tables.settings(runs)),
        Section("Environment", [], [], tables.environment(runs)),
    ]
    return [s for s in found if s.charts or s.words or any(table.rows for table in s.tables)]


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
