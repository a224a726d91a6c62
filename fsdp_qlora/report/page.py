"""Runs side by side from their records, as one page that needs nothing else: report.html."""

import base64
import hashlib
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from fsdp_qlora import atomic, cli, config
from fsdp_qlora.errors import DONE, ENVIRONMENT, one_line_of
from fsdp_qlora.planning.rows import DEVICE_ROWS, HOST_ROWS, PHASES, REST, GibByRow
from fsdp_qlora.record import OWN_FLAGS, Run, command, distinct, highest, read, word
from fsdp_qlora.report.charts import LOOK, TABLE, Tape, planned_steps

# A value of another type than a run records; a record is not checked value by value.
NO_RECORD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
NO_PLAN = "No plan was recorded, so nothing is predicted here."
UNKNOWN = "–"
# How far measured memory may be from the plan, as a share of it, from LARGE_GIB on.
ROW_AIM, PEAK_AIM, CPU_AIM, LARGE_GIB = 0.10, 0.05, 0.15, 0.5
LEAST_GIB = 0.0005  # smaller rows are counted in the total only
COMPARED = ["predicted", "measured", "difference"]


class Cell(NamedTuple):
    """One entry of a table.

    Args:
        text: what is read.
        value: the exact number behind it, as the run's files have it; None for words.
        note: small print behind it.
        is_off: stands out, because it is further away than it should be.
    """

    text: str
    value: float | None = None
    note: str = ""
    is_off: bool = False


class PageTable(NamedTuple):
    """A table of the page.

    Args:
        title: above it.
        heads: of the columns behind the first, which holds the names of the rows.
        rows: (name, cells), as many cells as there are heads.
        kind: classes: numbers or words; wide; fold: shown when it is asked for.
    """

    title: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]]
    kind: str = "numbers"


class Section(NamedTuple):
    """A chapter of the page: sentences, then tables."""

    title: str
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
    path = out / "report.html"
    got, rule = ", ".join(map(str, run_dirs)), "cannot be shown ({kind}: {})"
    remedy = "give directories whose record nobody has changed"
    with one_line_of(got, remedy, rule=rule, kinds=NO_RECORD):
        runs = distinct([read(run_dir) for run_dir in run_dirs])
        data = [{"name": run.name, "state": run.state} | Tape.of(run).since() for run in runs]
        page = render("  ·  ".join(run.name for run in runs), sections(runs), data)
    with one_line_of(path, "make room or check permissions", ENVIRONMENT):
        out.mkdir(parents=True, exist_ok=True)
        return atomic.write(path, page)


def render(
    title: str, chapters: Sequence[Section], runs: Any = (), bars: Any = (), live: bool = False
) -> str:
    """Write a page; charts.js draws it.

    Args:
        title: of the page.
        chapters: its tables.
        runs: name, state and `Tape.since` of each.
        bars: title, unit and values, (name, length), of each chart of bars.
        live: the page asks for what is new.

    Returns:
        HTML that needs nothing else, but for the server of a live page.
    """
    loader = jinja2.PackageLoader("fsdp_qlora", "report")
    rules: dict[str, Any] = {"autoescape": True, "trim_blocks": True}
    env = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **rules)
    env.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # the order of rows is theirs
    script = Path(__file__).with_name("charts.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {"runs": runs, "bars": bars, "live": live, "look": LOOK}
    page = env.get_template("page.html.j2")
    return page.render(title=title, sections=chapters, data=data, script=script, digest=digest)


def sections(runs: list[Run]) -> list[Section]:
    """The chapters of the page.

    Args:
        runs: one or several.

    Returns:
        Those for which a run recorded something.
    """
    named = [(run, f"{run.name}: " * (len(runs) > 1)) for run in runs]
    compared = [table for pair in named for table in predicted(*pair)]
    tables = [*compared, *(peaks(*pair) for pair in named)]
    words = "steps were taken again after a resume"
    redone = [f"{run.name}: {run.num_redone} {words}" for run in runs if run.num_redone]
    chapters = [
        Section("Answers", [], [answers(*pair) for pair in named]),
        Section("Figures", redone, figures(runs)),
        Section("Memory", [] if compared else [NO_PLAN], tables),
        Section("Data", *data(runs)),
        Section("Settings", [], settings(runs)),
        Section("Environment", [], [environment(runs)]),
    ]
    return [s for s in chapters if s.words or any(table.rows for table in s.tables)]


def cell(value: float | None, form: str = ",.3f", note: str = "") -> Cell:
    """Write a number.

    Args:
        value: None when it is not known.
        form: format.
        note: small print.
    """
    return Cell(UNKNOWN) if value is None else Cell(format(value, form), value, note)


def _measures(run: Run) -> dict[str, list[tuple[str, str, float | None]]]:
    """Table -> rows: name, format, and the figure; None where the record has none."""
    known: dict[str, Any] = dict(run.facts)
    for when, step in (("first", run.steps[0]), ("last", run.steps[-1])):
        known |= {f"{when} {name}": value for name, value in step.items()}
    for name in ("num_tokens", "num_trained_tokens", "step_s", "tokens_per_s"):
        known[f"sum {name}"] = sum(value or 0 for value in run.values(name)) or None
        known[f"median {name}"] = run.median(name)
    host_gib = [run.table("peaks").get("host", {}).get("host_peak_used_gib")]
    host_gib += run.host("host_peak_used_gib") + run.host("host_used_gib")
    cores = [busy for busy in run.host("cpu_cores") if busy is not None]
    known |= {"steps": len(run.steps), "host_gib": highest(host_gib)}
    planned = planned_steps(run.config, run.steps[-1])
    if planned and run.state != "finished":  # at the median speed
        known["left_s"] = max(planned - run.steps[-1]["step"], 0) * (run.median("step_s") or 0.0)
    known["cores"] = statistics.fmean(cores) if cores else None
    known["loading_gib"] = run.table("load_peaks").get("host_peak_used_gib")
    known["lost"] = run.values("loss").count(None) or None
    known["before"] = next((e["loss"] for e in run.evals if not e["step"]), None)
    later = [e["loss"] for e in run.evals if e["step"] and e["loss"] is not None]
    known["after"] = later[-1] if later else None
    if run.has_gpus:
        known["gpu_gib"] = highest(run.peaks("device_peak_reserved_gib"))
        known["plan_s"] = run.table("plan").get("step_s")
    rows = {group: table.items() for group, table in TABLE["figures"].items()}
    return {g: [(n, form, known.get(key)) for n, (key, form) in rows[g]] for g in rows}


def figures(runs: list[Run]) -> list[PageTable]:
    """The figures that people put side by side.

    Args:
        runs: one column each; times and memory also as a multiple of the first run's.

    Returns:
        Tables of what at least one run recorded.
    """
    columns, tables = [_measures(run) for run in runs], []
    for group in columns[0]:
        rows = []
        for same in zip(*(column[group] for column in columns), strict=True):
            (name, form, _), values = same[0], [value for _, _, value in same]
            if highest(values) is not None:
                rows.append((name, _figure(name, form, values, runs)))
        tables.append(PageTable(group, _heads(runs), rows))
    return tables


def _figure(name: str, form: str, values: list[float | None], runs: list[Run]) -> list[Cell]:
    one, has_ratio, cells = values[0], "median" in name or "GiB" in name, []
    for i, value in enumerate(values):
        note = f"{value / one:.2f} ×" if i and one and value is not None and has_ratio else ""
        if value is not None and value < 100 and name.startswith("held-out"):
            known = [line["accuracy"] for line in runs[i].evals if "accuracy" in line]
            right = known[-1 if name.endswith("after") else 0] if known else 0.0
            note = f"accuracy {right:.1%}" if known else f"perplexity {math.exp(value):,.2f}"
        cells.append(cell(value, form, note))
    return cells


def _heads(runs: list[Run]) -> list[str]:
    return [run.name for run in runs] if len(runs) > 1 else [""]


def peaks(run: Run, prefix: str) -> PageTable:
    """The largest figures of every rank.

    Args:
        run: the record.
        prefix: of the title.
    """
    known = {name: run.peaks(name) for name in TABLE["peaks"] if any(run.peaks(name))}
    rows = [(f"rank {i}", [cell(known[name][i]) for name in known]) for i in range(run.num_ranks)]
    heads = [_plain(name) for name in known]
    return PageTable(f"{prefix}Peaks of every rank", heads, rows, "wide numbers fold")


def predicted(run: Run, prefix: str) -> list[PageTable]:
    """Predicted, measured, difference by row, a table a phase.

    Args:
        run: the record.
        prefix: of titles.

    Returns:
        A table of the peaks, then those of its GPUs and its host (of many ranks the one that holds
        most in a phase); none without a plan and a ledger.
    """
    plan, ledger, tables, peaks = run.table("plan"), run.table("ledger"), [], []
    gpu, aim = ("GPU", PEAK_AIM) if run.has_gpus else ("Rank", CPU_AIM)
    ranks = [rank["device"] for rank in ledger.get("ranks", []) if rank.get("device")]
    hosts = [host for host in ledger.get("hosts") or [ledger.get("host")] if host]
    places = (gpu, "device", DEVICE_ROWS, ranks), ("Host", "host", HOST_ROWS, hosts)
    for name, place, order, held in places:
        planned = plan.get(place, {}) if run.has_gpus or held else {}
        known = [phase for phase in PHASES if any(phase in part for part in (planned, *held))]
        for phase in known:
            sums = [sum(rank.get(phase, {}).values()) for rank in held] or [0.0]
            who, kind = sums.index(max(sums)), "host" if held is hosts else "rank"
            title = f"{prefix}{name}, {phase}" + f" ({kind} {who}, the highest)" * (len(sums) > 1)
            measured = held[who].get(phase, {}) if held else {}
            tables.append(_compared(title, order, planned.get(phase, {}), measured, aim))
        top = highest(_total(rows) for rank in held for rows in rank.values())
        peak_gib = plan.get(f"peak_{place}_gib") if planned else None
        peaks += [(name, _difference(peak_gib, top, aim))] if known else []
    peak_table = PageTable(f"{prefix}Peaks, to be within {aim:.0%}", COMPARED, peaks)
    return [peak_table, *tables] if peaks else []


def _total(rows: GibByRow) -> float | None:
    return sum(rows.values()) if rows else None


def _compared(
    title: str, order: tuple[str, ...], plan: GibByRow, measured: GibByRow, aim: float
) -> PageTable:
    """A phase; where some memory was not told apart, it is not known how much of a row there is."""
    known, rows = {**plan, **measured}, []
    for row in dict.fromkeys([*order, *known]):
        p = plan.get(row, 0.0) if plan and row != REST else None
        m = measured.get(row, None if REST in measured else 0.0) if measured else None
        if (highest([p, m]) or 0.0) >= LEAST_GIB:
            rows.append((row, _difference(p, m, max(aim, ROW_AIM))))
    rows.append(("total", _difference(_total(plan), _total(measured), aim)))
    return PageTable(title, COMPARED, rows, "numbers fold")


def _difference(p: float | None, m: float | None, aim: float) -> list[Cell]:
    """Predicted, measured, difference; what is large and further off than the aim stands out."""
    if p is None or m is None:
        return [cell(p), cell(m), Cell(UNKNOWN)]
    share = f"{m / p - 1:+.1%}" if p >= LEAST_GIB else ""
    is_off = max(p, m) > LARGE_GIB and abs(m - p) > aim * p
    return [cell(p), cell(m), Cell(f"{m - p:+,.3f}", m - p, share, is_off)]


def data(runs: list[Run]) -> tuple[list[str], list[PageTable]]:
    """What became of the rows: the audit that runs keep in their record.

    Args:
        runs: the records.

    Returns:
        What the user should look at, and a table for all runs that have an audit.
    """
    known, columns, notes = [run for run in runs if run.table("data")], [], []
    for run in known:
        audit = run.table("data")
        counts = {_plain(n): cell(v, ",") for n, v in audit.items() if isinstance(v, int) and v}
        column = {"sources": Cell(", ".join(map(str, audit.get("sources", ()))))} | counts
        shares = audit.get("padding_share", {}).items()
        columns.append(column | {f"padding, {name}": cell(share, ".1%") for name, share in shares})
        notes += [f"{run.name}: {note}" for note in audit.get("notes", ())]
        for name, places in audit.get("examples", {}).items():
            notes += [f"{run.name}: {name}: {', '.join(map(str, places))}"] if places else []
    return notes, [_beside("", _heads(known), columns, "numbers")]


def _plain(name: str) -> str:
    plain = name.removeprefix("num_").replace("_gib", ", GiB").replace("_", " ")
    return TABLE["audit"].get(plain, plain)


def _beside(title: str, heads: list[str], columns: list[dict[str, Cell]], kind: str) -> PageTable:
    """A column a head, a row for each name that any of them has."""
    names = dict.fromkeys(itertools.chain(*columns))
    rows = [(name, [column.get(name, Cell(UNKNOWN)) for column in columns]) for name in names]
    return PageTable(title, heads, rows, kind)


def answers(run: Run, prefix: str) -> PageTable:
    """The prompts of a run, a row each, answered before and after.

    Args:
        run: the record.
        prefix: of the title.
    """
    columns, expected = dict[str, dict[str, Cell]](), {}
    for sample in run.samples:
        prompt, when = str(sample.get("prompt", "")), str(sample.get("when"))
        columns.setdefault(when, {})[prompt] = Cell(str(sample.get("answer", "")))
        if sample.get("expected"):
            expected[prompt] = Cell(str(sample["expected"]))
    columns |= {"the data": expected} if expected else {}
    return _beside(prefix.removesuffix(": "), [*columns], [*columns.values()], "words")


def settings(runs: list[Run]) -> list[PageTable]:
    """The flags in which runs differ, or one run from the defaults; then all flags.

    Args:
        runs: the records.

    Returns:
        Two tables, the second folded.
    """
    columns = {run.name: run.config for run in runs}
    if len(runs) == 1:
        columns = {"default": config.to_dict(config.TrainConfig())} | columns
    flags = dict.fromkeys(flag for run in runs for flag in run.config)
    rows = [(f, [Cell(word(c.get(f, UNKNOWN))) for c in columns.values()]) for f in flags]
    differ = [row for row in rows if row[0] not in OWN_FLAGS and len(set(row[1])) > 1]
    title = f"Flags that differ {'from the defaults' if len(runs) == 1 else 'between the runs'}"
    every = PageTable("All flags", [*columns], rows, "flags fold")
    return [PageTable(title, [*columns], differ, "words"), every]


def environment(runs: list[Run]) -> PageTable:
    """What ran, on what: the console's lines from the start; command and versions.

    Args:
        runs: the records, one column each.
    """
    columns = []
    for run in runs:
        facts = {"command": command(run.config)} | run.table("versions")
        columns.append(_console(run) | {name: Cell(str(value)) for name, value in facts.items()})
    return _beside("", _heads(runs), columns, "words")


def _console(run: Run) -> dict[str, Cell]:
    """The console's lines by their first word; a line that goes on below is joined."""
    cells, name = dict[str, Cell](), ""
    for line in "\n".join(run.facts.get("lines") or []).splitlines():
        name, words = line[:10].strip() or name, line[10:].strip()
        cells[name] = Cell(f"{cells[name].text}; {words}" if name in cells else words)
    return cells


def main(argv: list[str]) -> int:
    """Write the report of the runs named on the command line and print its path.

    Args:
        argv: output directories, --out.

    Returns:
        Exit code.
    """
    args = cli.arguments("report", argv, __doc__)
    run_dirs = list({path.resolve(): path for path in args.runs}.values())
    print(write(run_dirs, args.out or (run_dirs[0] if len(run_dirs) == 1 else Path())))
    return DONE
