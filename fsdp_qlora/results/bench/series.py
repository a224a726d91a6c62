"""Measure the rows of a table, each a run of train.py, and hold them against an earlier bench.

    python -m fsdp_qlora bench 7b --out recipes
    python -m fsdp_qlora bench 70b --rows '*x2048-*' --steps 12 --out recipes

Random weights of the real shape, unless --model_name names real ones or the hub's cache has them;
random tokens, LoRA r 16 on all linears. Leaves bench-7b.json, .md and .svg in
--out, written after every row; rows that are not run again stay as they were. Without a
GPU a scaled model trains on CPU ranks instead: bench-small.
"""

import argparse
import datetime
import json
import os
import shlex
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fsdp_qlora import arch
from fsdp_qlora.arch import files
from fsdp_qlora.config import RECIPES_DIR
from fsdp_qlora.errors import DONE, RUN_FAILED, UserError
from fsdp_qlora.hardware import count_gpus
from fsdp_qlora.planning import rows as names
from fsdp_qlora.results.bench import series_page as page
from fsdp_qlora.results.bench.arms import COMMON, Arm, Workload, launch_ours, read_ours
from fsdp_qlora.results.bench.attempt import attempt, environment
from fsdp_qlora.results.bench.cases import KINDS, PLACES, SMALL_SHAPE, Case, pick, scaled
from fsdp_qlora.results.bench.machine import commit, machine, versions
from fsdp_qlora.results.bench.report import NUM_WARMUP_STEPS, spread, steady

SMALL = "small"
CPU_NOTE = (
    "A scaled model on CPU ranks: shows that the bench works, says nothing about the real one"
)
GPU_NOTE = "A scaled model: shows that the bench works, says nothing about the real one"


@dataclass(frozen=True)
class Series:
    """What a bench does.

    Args:
        kind: row of KINDS.
        cases: rows that are run.
        model: what train.py gets as --model_name.
        weights: "random", or where the real ones come from.
        num_ranks: cards, or CPU ranks.
        num_steps: steps that are measured, after those that warm up.
        gpu_budget_gib: cap of each card's allocator.
        has_gpu: False on a CPU.
        p2p: "on" as it comes, "off" without peer access.
        timeout_s: of each row.
        out: directory of all results.
        baseline: rows of an earlier bench of such a machine, by name.
        former: rows that are in `out` already, by name.
        command: what was typed.
    """

    kind: str
    cases: tuple[Case, ...]
    model: str
    weights: str
    num_ranks: int
    num_steps: int
    gpu_budget_gib: float
    has_gpu: bool
    p2p: str
    timeout_s: float
    out: Path
    baseline: dict[str, dict[str, Any]]
    former: dict[str, dict[str, Any]]
    command: str


def main(argv: list[str]) -> int:
    """The verbs `bench 7b`, `bench 70b` and `bench small`.

    Args:
        argv: the kind and its options.

    Returns:
        Exit code: 0 when every row was measured or there was none to run.

    Raises:
        UserError: the arguments cannot be used, or no such model.
    """
    args = _parser().parse_args(argv)
    if args.redraw:
        return _redraw(args)
    series = _series(args, argv)
    began_s = time.perf_counter()
    rows = dict(series.former)
    for case in series.cases:
        rows[case.name] = measure(series, case)
        print(page.line(rows[case.name]), flush=True)
        write(series, rows)
    minutes = (time.perf_counter() - began_s) / 60
    stem = series.out / f"bench-{series.kind}"
    print(f"\n{stem.with_suffix('.md').read_text(encoding='utf-8')}")
    print(f"{minutes:.1f} minutes; {stem}.json .md .svg")
    states = {rows[case.name]["state"] for case in series.cases}
    return DONE if states <= {"measured", "left out"} else RUN_FAILED


def measure(series: Series, case: Case) -> dict[str, Any]:
    """Run a row.

    Args:
        series: the bench.
        case: the row.

    Returns:
        The row as the JSON file holds it; one that failed has a reason.
    """
    place = PLACES[case.place]
    num_ranks = min(series.num_ranks, place.most_ranks or series.num_ranks)
    row: dict[str, Any] = {"name": case.name, "what": place.what, **asdict(case)}
    row |= {"shape": case.shape, "num_ranks": num_ranks, "weights": series.weights}
    row |= {"p2p": series.p2p, "num_steps": series.num_steps, "command": "", **_place_and_time()}
    if num_ranks < place.least_ranks:
        return {**row, "state": "left out", "reason": f"needs {place.least_ranks} cards"}
    work = Workload(
        model=Path(series.model),
        batch_size=case.batch_size,
        context_length=case.context_length,
        max_steps=series.num_steps + NUM_WARMUP_STEPS,
        num_ranks=num_ranks,
        gpu_budget_gib=series.gpu_budget_gib,
        has_gpu=series.has_gpu,
        extra=("--weights=random",) if series.weights == "random" else (),
        accumulation=case.accumulation,
    )
    flags = (*COMMON, *place.flags)
    launch = partial(launch_ours, flags)
    arm = Arm(case.name, place.what, launch, read_ours, milestone="run/metrics.jsonl")
    out = series.out / "runs" / f"{case.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    env = environment(os.environ, series.p2p, num_ranks)
    row |= attempt(arm, work, out, env, series.timeout_s)
    if row["state"] == "measured" and not row["has_same_rows"]:
        row |= {"state": "failed", "reason": "it ran other rows than it was asked for"}
    if row["state"] != "measured":
        return row
    row["steps_s"] = row["step_s"]
    row["step_s"] = spread(steady({"step_s": row["steps_s"]}))
    row["tokens_per_s"] = work.tokens_per_step / row["step_s"]["median"]
    return row | _of_record(out / "run" / "summary.json", series.has_gpu)


def _of_record(path: Path, has_gpu: bool) -> dict[str, Any]:
    """What the run itself predicted and found: peaks, the table of rows, what the plan chose."""
    summary = json.loads(path.read_text(encoding="utf-8"))
    plan, ledger = summary.get("plan", {}), summary.get("ledger", {})
    return {
        "peaks": names.peaks(plan, ledger, has_gpu),
        "table": names.comparison(plan, ledger, has_gpu),
        "plan_note": plan.get("note", ""),
        "predicted_step_s": plan.get("step_s"),
        "placement": summary.get("placement", ""),
    }


def _place_and_time() -> dict[str, Any]:
    here = machine()
    where = here["cards"] if count_gpus(os.environ) else here["cpu"]
    return {"date": datetime.date.today().isoformat(), "commit": commit(), "where": where}


def write(series: Series, rows: dict[str, dict[str, Any]]) -> None:
    """Write the JSON file, the page and the bars of the rows so far.

    Args:
        series: the bench.
        rows: by name, in any order.
    """
    every = KINDS[series.kind].cases if series.kind != SMALL else scaled(KINDS[SMALL].cases)
    names = [*dict.fromkeys([*(case.name for case in every), *rows])]
    bench = {
        "kind": series.kind,
        "title": KINDS[series.kind].title,
        "date": datetime.date.today().isoformat(),
        "notes": _notes(series),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": series.command,
        "model": series.model,
        "weights": series.weights,
        "gpu_budget_gib": series.gpu_budget_gib if series.has_gpu else None,
        "least_gain": KINDS[series.kind].least_gain if series.has_gpu else None,
        "rows": [rows[name] for name in names if name in rows],
        "moved": page.moved(series.baseline, rows),
    }
    page.write(series.out / f"bench-{series.kind}", bench)


def _notes(series: Series) -> list[str]:
    notes = [] if series.kind != SMALL else [GPU_NOTE if series.has_gpu else CPU_NOTE]
    if series.num_steps < page.MIN_STEPS:
        notes.append(f"{series.num_steps} steps counted a row: a trial, no measurement")
    return notes


def _series(args: argparse.Namespace, argv: list[str]) -> Series:
    """Check the command line; whatever is wrong with it is told before anything runs."""
    num_gpus = count_gpus(os.environ)
    kind = args.kind if num_gpus else SMALL
    cases = KINDS[args.kind].cases
    cases = pick(scaled(cases) if kind == SMALL else cases, args.rows)
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}", "must be >= 1", "use 8 or more")
    if args.kind != kind:
        print(f"no GPU: a scaled model on CPU ranks instead of {args.kind} (bench-small)")
    out = (args.out or Path(f"output/bench-{kind}")).resolve()
    former = _rows_of(out / f"bench-{kind}.json")
    here = page.kind_of(_place_and_time()["where"])
    others = {row["where"] for row in former.values() if page.kind_of(row["where"]) != here}
    if others:
        got = f"--out {out}: bench-{kind}.json"
        raise UserError(got, f"is of {others.pop()}, this is {here}", "give another directory")
    baseline = _rows_of(args.baseline or RECIPES_DIR / f"bench-{kind}.json") | former
    out.mkdir(parents=True, exist_ok=True)
    model, weights = _model(args.model_name, kind, out)
    return Series(
        kind=kind,
        cases=cases,
        model=model,
        weights=weights,
        num_ranks=args.world_size or num_gpus or 2,
        num_steps=args.steps,
        gpu_budget_gib=args.gpu_budget_gib,
        has_gpu=num_gpus > 0,
        p2p=args.p2p,
        timeout_s=args.timeout_s,
        out=out,
        baseline={n: r for n, r in baseline.items() if page.kind_of(r["where"]) == here},
        former=former,
        command=shlex.join(["python", "-m", "fsdp_qlora", "bench", *argv]),
    )


def _model(model_name: str | None, kind: str, out: Path) -> tuple[str, str]:
    """Which model is trained, and where its weights come from."""
    if kind == SMALL:
        directory = out / "model"
        directory.mkdir(exist_ok=True)
        shape = files.SHAPES_DIRECTORY / f"{KINDS[SMALL].model}.json"
        config = json.loads(shape.read_text(encoding="utf-8")) | SMALL_SHAPE
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        return str(directory), "random"
    if model_name is None:
        cached = _cached(KINDS[kind].hub_name)
        name = KINDS[kind].model
        return (name, "random") if cached is None else (str(cached), f"real, from {cached}")
    if model_name.lower() in files.known_shapes():
        return model_name, "random"
    return model_name, f"real, from {arch.read(model_name, need_weights=True).path}"


def _cached(hub_name: str) -> Path | None:
    """The files of a model in the hub's cache, all of them; nothing is asked of the hub."""
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(hub_name, local_files_only=True))
        arch.read(str(found), need_weights=True)
    except (OSError, ValueError, UserError):
        return None
    return found


def _rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier bench by name; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(path), f"is no bench ({error!r})", "remove it") from error


def _redraw(args: argparse.Namespace) -> int:
    """Draw the page and the pictures again from the JSON file."""
    stem = (args.out or Path(f"output/bench-{args.kind}")).resolve() / f"bench-{args.kind}"
    path = stem.with_suffix(".json")
    if not path.is_file():
        raise UserError(str(path), "is not there", "run the bench first, or give --out")
    page.write(stem, json.loads(path.read_text(encoding="utf-8")))
    print(f"{stem}.md .svg")
    return DONE


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m fsdp_qlora bench", description=__doc__, formatter_class=form
    )
    parser.add_argument("kind", choices=[*KINDS], help="which table")
    add = parser.add_argument
    add("--rows", help="names or patterns of rows, separated by commas [all]")
    add("--steps", type=int, default=8, help="steps that count, after 3 that warm up [8]")
    add("--model_name", help="directory or hub name of real weights, or a known shape")
    add("--gpu_budget_gib", type=float, default=24.0, help="cap of each card's allocator [24]")
    add("--world_size", type=int, help="ranks [one per GPU; 2 on a CPU]")
    add("--p2p", choices=["on", "off"], default="on", help="peer access of NCCL [on]")
    add("--timeout_s", type=float, default=150.0, help="longest a row may take [150]")
    add("--baseline", type=Path, help="JSON file of an earlier bench [recipes/bench-KIND.json]")
    add("--out", type=Path, help="directory of the results [output/bench-KIND]")
    add("--redraw", action="store_true", help="run nothing: page and pictures of what is there")
    return parser
