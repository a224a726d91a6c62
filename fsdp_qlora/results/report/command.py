"""Runs side by side from their records: a page, the same as Markdown, and pictures."""

import argparse
from pathlib import Path

from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError
from fsdp_qlora.results.report import (
    browser,
    curves,
    data,
    html,
    markdown,
    memory,
    picture,
    plan,
    settings,
    totals,
)
from fsdp_qlora.results.report.parts import Plots, Section, Words
from fsdp_qlora.results.report.record import Run, name_apart, read

WIDTH = 1280  # of report.png, in CSS pixels
TERMS = (
    "Seconds of training are those of optimizer steps: loading, evaluations and saving are not in "
    "them. Medians leave out the first three steps. Tokens count padding, trained tokens do not.",
    "Reserved is what torch's allocator took from the card, allocated what tensors used of it; the "
    "driver counts the CUDA context besides. GiB of the host count all programs, page cache not. "
    "RSS counts every page a process uses, PSS a page that n processes share as an n-th of it.",
)


def write(run_dirs: list[Path], out: Path, has_png: bool = True) -> tuple[list[Path], str]:
    """Write the report of some runs.

    Args:
        run_dirs: output directories; with more than one, the first is what the others are held
            against.
        out: directory of report.html, report.md, report.svg and report.png; made if needed.
        has_png: draw report.png too, where there is a browser.

    Returns:
        The paths that were written, and why there is no report.png ("" when there is).

    Raises:
        UserError: no record, a line that cannot be read, a directory that cannot be written.
    """
    runs = name_apart([read(path) for path in run_dirs])
    title = "  ·  ".join(run.name for run in runs)
    lines = headlines(runs)
    parts = sections(runs)
    paths = [
        _write(out / "report.html", html.page(title, lines, parts).encode()),
        _write(out / "report.svg", picture.draw(runs).encode()),
    ]
    missing = _shoot(out) if has_png else "no report.png: not asked for"
    paths += [] if missing else [out / "report.png"]
    chart = "report.svg" if missing else "report.png"
    text = markdown.text(title, lines, parts, chart)
    return [paths[0], _write(out / "report.md", text.encode()), *paths[1:]], missing


def headlines(runs: list[Run]) -> list[str]:
    """What stands below the title.

    Args:
        runs: one or several.

    Returns:
        A line or two a run.
    """
    if len(runs) > 1:
        return [f"{run.name} ({run.state}): {picture.headlines(run)[0]}" for run in runs]
    words = picture.headlines(runs[0])
    return [f"{words[0]}  ·  {runs[0].state}", *words[1:], str(runs[0].directory)]


def sections(runs: list[Run]) -> list[Section]:
    """The chapters of a report.

    Args:
        runs: one or several.

    Returns:
        Figures, curves, memory, plan against measured, settings, environment.
    """
    figures = totals.parts(runs)
    figures += [
        Words(f"{run.name}: {run.num_redone} steps were taken again after a resume.")
        for run in runs
        if run.num_redone
    ]
    chapters = [
        Section("", [totals.tiles(runs[0])] if len(runs) == 1 else []),
        Section("Figures", figures),
        Section("Curves", [Plots(curves.plots(runs))]),
        Section("Memory", memory.parts(runs)),
        Section("Predicted and measured", plan.chapter(runs)),
        Section("Answers", settings.answers(runs)),
        Section("Data", data.parts(runs)),
        Section("Settings", settings.settings(runs)),
        Section("What ran", settings.facts(runs)),
        Section("Environment", settings.machine(runs)),
        Section("Terms", [Words(text) for text in TERMS]),
    ]
    return [section for section in chapters if section.parts]


def _shoot(out: Path) -> str:
    """Draw report.png by a browser; return why not, or nothing."""
    found = browser.find()
    (out / "report.png").unlink(missing_ok=True)  # of a former report
    if found is None:
        return "no report.png: no Chromium or Chrome found (apt-get install chromium)"
    try:
        with browser.opened(found, out / "report.html") as page:
            _write(out / "report.png", page.shoot(WIDTH))
    except UserError as error:
        return f"no report.png: {error}"
    return ""


def _write(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "make room or check permissions"
        raise UserError(str(path), reason, remedy, code=ENVIRONMENT) from error
    return path


def main(argv: list[str]) -> int:
    """Write the report of the runs named on the command line and print what was written.

    Args:
        argv: output directories, --out, --png.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser("python -m fsdp_qlora report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="output directory of a run"
    )
    place = "directory of report.html, .md, .svg and .png [of one run its own, else here]"
    parser.add_argument("--out", type=Path, help=place)
    words = "report.png by a headless Chromium, where there is one [auto]"
    parser.add_argument("--png", choices=("auto", "off"), default="auto", help=words)
    args = parser.parse_args(argv)
    run_dirs = list({path.resolve(): path for path in args.runs}.values())
    out = args.out or (run_dirs[0] if len(run_dirs) == 1 else Path())
    paths, missing = write(run_dirs, out, has_png=args.png == "auto")
    print("\n".join([*map(str, paths), *([missing] if missing and args.png == "auto" else [])]))
    return DONE
