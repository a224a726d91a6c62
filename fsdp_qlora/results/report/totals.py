"""The figures of a run that people put side by side by hand."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from fsdp_qlora.results.report.parts import (
    UNKNOWN,
    Beside,
    Cell,
    Grid,
    Part,
    Tiles,
    Words,
    duration,
)
from fsdp_qlora.results.report.record import Run, highest

NUM_WARMUP_STEPS = 3  # as summary.json has it
LAST_SHARE = 0.1


@dataclass(frozen=True)
class Measure:
    """One figure of a run.

    Args:
        name: row of the table.
        read: finds it in the record; None where it is not recorded.
        form: format of the number.
        has_ratio: the other runs also show it as a multiple of the first run's.
        note: small print, made of the run.
    """

    name: str
    read: Callable[[Run], float | None]
    form: str = ",.2f"
    has_ratio: bool = False
    note: Callable[[Run, float], str] = lambda run, value: ""


def train_s(run: Run) -> float:
    """Seconds of all steps; loading, evaluations and saving are not among them."""
    return sum(step["step_s"] for step in run.steps)


def step_s(run: Run) -> float:
    """Median seconds of a step, the first ones left out, which warm up."""
    seconds = [step["step_s"] for step in run.steps]
    return statistics.median(seconds[NUM_WARMUP_STEPS:] or seconds)


def tokens_per_s(run: Run) -> float | None:
    """Median tokens/s of all ranks, the first steps left out, which warm up."""
    speeds = [step["tokens_per_s"] for step in run.steps if "tokens_per_s" in step]
    steady = speeds[NUM_WARMUP_STEPS:] or speeds
    return statistics.median(steady) if steady else None


def num_steps_planned(run: Run) -> float | None:
    """Steps the run was to take; None when the record does not tell.

    Returns:
        max_steps when it was given, else what all epochs take at the steps per epoch so far.
    """
    max_steps = run.config.get("max_steps") or -1
    return max_steps if max_steps > 0 else _num_steps_of_epochs(run)


def left_s(run: Run) -> float | None:
    """Seconds until the last step, at the median speed; None for a run that has finished."""
    planned = num_steps_planned(run)
    if planned is None or run.state == "finished":
        return None
    return max(planned - run.steps[-1]["step"], 0) * step_s(run)


def _num_steps_of_epochs(run: Run) -> float | None:
    last, num_epochs = run.steps[-1], run.config.get("num_epochs")
    if not last.get("epoch") or not num_epochs:
        return None
    return round(num_epochs * last["step"] / last["epoch"])


def _epochs_s(run: Run) -> float | None:
    num_steps = _num_steps_of_epochs(run)
    return None if num_steps is None else num_steps * step_s(run)


def _sum(run: Run, name: str) -> float | None:
    return sum(step[name] for step in run.steps) if name in run.steps[-1] else None


def _peak_of_ranks(run: Run, name: str) -> float | None:
    """Of the rank where it is largest; None for ranks on the CPU."""
    return highest(value for ranks in run.ranks(name) for value in ranks) if run.has_cards else None


def _loading(run: Run, name: str) -> float | None:
    return run.facts.get("load_peaks", {}).get(name) or None


def _host_peak(run: Run) -> float | None:
    recorded = run.facts.get("peaks", {}).get("host", {}).get("host_peak_used_gib")
    return highest([recorded, *run.host("host_peak_used_gib"), *run.host("host_used_gib")])


def _ranks_on_host(run: Run) -> float | None:
    """Pages shared by the ranks counted once; of the step where it was most."""
    known = [[v for v in ranks if v is not None] for ranks in run.ranks("host_pss_gib")]
    return highest(sum(ranks) for ranks in known if len(ranks) == run.num_ranks)


def _cpu_cores(run: Run) -> float | None:
    """Mean over time of the cores that all programs kept busy."""
    busy = [
        (step["host"]["cpu_cores"], step["step_s"])
        for step in run.steps
        if step["host"].get("cpu_cores") is not None
    ]
    total_s = sum(seconds for _, seconds in busy)
    return sum(cores * seconds for cores, seconds in busy) / total_s if total_s else None


def _last_losses(run: Run) -> list[float]:
    last = run.steps[-max(round(len(run.steps) * LAST_SHARE), 1) :]
    return [step["loss"] for step in last if step.get("loss") is not None]


def _mean_loss(run: Run) -> float | None:
    losses = _last_losses(run)
    return statistics.fmean(losses) if losses else None


def _num_bad(run: Run) -> float | None:
    return sum(step.get("loss") is None for step in run.steps) or None


def held_out(run: Run, when: str) -> float | None:
    """Held-out loss before the first step, or the latest after it.

    Args:
        run: the record.
        when: "before" or "after".
    """
    known = [(step, loss) for step, loss in run.evals if loss is not None]
    found = [loss for step, loss in known if (step == 0) == (when == "before")]
    return found[0 if when == "before" else -1] if found else None


def _perplexity(run: Run, loss: float) -> str:
    return f"perplexity {math.exp(loss):,.2f}" if loss < 100 else ""


def _long(run: Run, seconds: float) -> str:
    """Seconds that nobody reads as such, in minutes and hours."""
    return duration(seconds) if seconds >= 120 else ""


def _planned_s(run: Run) -> float | None:
    """Of runs on cards only: the plan knows no speed of processors."""
    return (run.facts.get("plan") or {}).get("step_s") if run.has_cards else None


def _cores_note(run: Run, cores: float) -> str:
    num_cores = run.steps[-1]["host"].get("num_cpu_cores")
    return f"of {num_cores:.0f}" if num_cores else ""


def _epochs_note(run: Run, seconds: float) -> str:
    words = f"{_num_steps_of_epochs(run):,} steps"
    return f"{words}, {duration(seconds)}" if seconds >= 120 else words


def _last_note(run: Run, loss: float) -> str:
    num_losses = len(_last_losses(run))
    return f"{num_losses:,} steps" if num_losses > 1 else "1 step"


STEPS = Measure("steps", lambda run: len(run.steps), ",d")
TRAIN = Measure("seconds of training", train_s, ",.1f", note=_long)
SPEED = Measure("tokens/s, median", tokens_per_s, ",.0f", has_ratio=True)
CARD = Measure(
    "GiB per card, peak reserved",
    lambda run: _peak_of_ranks(run, "device_peak_reserved_gib"),
    has_ratio=True,
)
HOST = Measure("GiB of the host, peak", _host_peak, has_ratio=True)
LAST = Measure("training loss, last step", lambda run: run.steps[-1].get("loss"), ".4f")
BEFORE = Measure(
    "held-out loss before", lambda run: held_out(run, "before"), ".4f", note=_perplexity
)
AFTER = Measure("held-out loss after", lambda run: held_out(run, "after"), ".4f", note=_perplexity)
MEASURES = {
    "Time": (
        STEPS,
        Measure("epochs", lambda run: run.steps[-1].get("epoch"), ".3f"),
        Measure("tokens", lambda run: _sum(run, "num_tokens"), ",d"),
        Measure("tokens trained", lambda run: _sum(run, "num_trained_tokens"), ",d"),
        TRAIN,
        Measure(
            "seconds in all, with evaluations",
            lambda run: run.facts.get("total_s"),
            ",.1f",
            note=_long,
        ),
        Measure("seconds of loading", lambda run: run.facts.get("load_s"), ",.1f", note=_long),
        Measure("steps/s", lambda run: len(run.steps) / train_s(run), ",.3f", has_ratio=True),
        Measure("seconds a step, median", step_s, ",.3f", has_ratio=True),
        Measure("seconds a step, predicted for full rows", _planned_s, ",.3f"),
        SPEED,
        Measure("ETA: seconds left", left_s, ",.0f", note=_long),
        Measure("ETA of all epochs from the start, s", _epochs_s, ",.0f", note=_epochs_note),
    ),
    "Memory and processors": (
        CARD,
        Measure(
            "GiB per card, peak allocated",
            lambda run: _peak_of_ranks(run, "device_peak_allocated_gib"),
            has_ratio=True,
        ),
        Measure(
            "GiB per card, reserved while loading",
            lambda run: _loading(run, "device_peak_reserved_gib"),
            has_ratio=True,
        ),
        HOST,
        Measure("GiB of the host, peak of the ranks alone", _ranks_on_host, has_ratio=True),
        Measure(
            "GiB of the host while loading",
            lambda run: _loading(run, "host_peak_used_gib"),
            has_ratio=True,
        ),
        Measure("CPU cores busy, mean", _cpu_cores, note=_cores_note),
    ),
    "Loss": (
        Measure("trained parameters", lambda run: run.facts.get("num_trainable_params"), ",d"),
        Measure("training loss, first step", lambda run: run.steps[0].get("loss"), ".4f"),
        LAST,
        Measure("training loss, mean of the last tenth", _mean_loss, ".4f", note=_last_note),
        BEFORE,
        AFTER,
        Measure("losses that are not a number", _num_bad, ",d"),
    ),
}
# Their absence says nothing about the record.
SILENT = (
    "losses that are not a number",
    "ETA: seconds left",
    "seconds a step, predicted for full rows",
)
OF_CARDS = "GiB per card"


def parts(runs: list[Run]) -> list[Part]:
    """The figures of the runs.

    Args:
        runs: with more than one, the first is what the others are held against.

    Returns:
        One table with a column a run, or three beside each other for one run; then which figures
        nobody recorded.
    """
    groups: dict[str, list[tuple[str, list[Cell]]]] = {}
    missing = []
    for group, measures in MEASURES.items():
        for measure in measures:
            values = [measure.read(run) for run in runs]
            if highest(values) is None:
                missing.append(measure.name)
                continue
            cells = [_cell(measure, *pair) for pair in zip(runs, values, strict=True)]
            groups.setdefault(group, []).append((measure.name, _with_ratios(measure, cells)))
    heads = ["", *(run.name for run in runs)]
    found: list[Part] = []
    if len(runs) == 1:
        found.append(Beside([Grid(name, ["", ""], rows) for name, rows in groups.items()]))
    else:
        rows = [row for name, own in groups.items() for row in [(name, []), *own]]
        found += [Grid("", heads, rows), Words(f"× is a multiple of the figure of {runs[0].name}.")]
    has_cards = any(run.has_cards for run in runs)
    missing = [name for name in missing if name not in SILENT]
    missing = [name for name in missing if has_cards or not name.startswith(OF_CARDS)]
    return found + ([Words(f"Not recorded: {'; '.join(missing)}.")] if missing else [])


def _cell(measure: Measure, run: Run, value: float | None) -> Cell:
    if value is None:
        return Cell(UNKNOWN)
    return Cell(format(value, measure.form), value, measure.note(run, value))


def _with_ratios(measure: Measure, cells: list[Cell]) -> list[Cell]:
    first = cells[0].value
    if not measure.has_ratio or not first:
        return cells
    return [cells[0]] + [
        cell if cell.value is None else replace(cell, note=f"{cell.value / first:.2f} ×")
        for cell in cells[1:]
    ]


def tiles(run: Run) -> Tiles:
    """The figures of one run that are looked for first.

    Args:
        run: the record.

    Returns:
        Those that the run recorded.
    """
    found = []
    for measure in (STEPS, TRAIN, SPEED, CARD, HOST, LAST, AFTER):
        value = measure.read(run)
        if value is not None:
            found.append((measure.name, _cell(measure, run, value)))
    before = held_out(run, "before")
    if before is not None and held_out(run, "after") is not None:
        found[-1] = ("held-out loss after", replace(found[-1][1], note=f"{before:.4f} before"))
    return Tiles(found)
