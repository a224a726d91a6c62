"""Measure the rows of a table, each a run of train.py, beside its plan.

    python -m fsdp_qlora bench 7b --out recipes
    python -m fsdp_qlora bench 70b --rows '*x2048-*' --steps 12 --out recipes

Random weights of the real shape, unless --model_name names real ones; random tokens, LoRA r 16 on
all linears. Writes bench-7b.json and .md into --out after every row; rows that are not run again
stay as they were. NCCL_P2P_DISABLE=1 measures without peer access. Without a GPU a scaled
model trains on CPU ranks instead: bench-small. recipes/peers/bench_peers.py measures other trainers
on the same work.
"""

import argparse
import datetime
import fnmatch
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from fsdp_qlora import __version__, arch, atomic, cli, config, errors, hardware, record
from fsdp_qlora.planning import rows as names
from fsdp_qlora.report import page

POLL_S, GRACE_S = 0.1, 15.0
MIN_STEPS = 8
LAUNCHER = r"[\w.]*(ChildFailed|CalledProcess|ProcessRaised)"  # only repeats that a rank failed
FAULT = re.compile(rf"(\[rank\d+\]: ?)?(?!{LAUNCHER})([\w.]*(Error|Exception)|error): ")
SMALL = "small"
BenchRow = dict[str, Any]


class Case(NamedTuple):
    """One row of a bench.

    Args:
        place: row of PLACES, which says where the base lies.
        batch_size: rows per rank and micro-batch.
        context_length: tokens of a row.
        accumulation: micro-batches of a step.
    """

    place: str
    batch_size: int
    context_length: int
    accumulation: int = 1

    @classmethod
    def named(cls, name: str) -> "Case":
        """Return the row of a name."""
        shape, _, place = name.partition("-")
        batch_size, *accumulation, context_length = map(int, shape.split("x"))
        return cls(place, batch_size, context_length, *accumulation)

    @property
    def name(self) -> str:
        """Batch, accumulation, context and place: "4x2048-ddp", "8x2x512-offload"."""
        batch = [self.batch_size, *[self.accumulation] * (self.accumulation > 1)]
        return "x".join(map(str, [*batch, self.context_length])) + f"-{self.place}"


TABLES = errors.read_table(__file__)
COMMON = tuple(TABLES["common"])
PLACES: dict[str, dict[str, Any]] = TABLES["places"]
KINDS = {}  # title, shape, rows in the order in which they run
for kind, row in TABLES["kinds"].items():
    shape = row["shape"].format(recipes=config.RECIPES_DIR)
    KINDS[kind] = row["title"], shape, tuple(map(Case.named, row["rows"]))


def train_command(
    model: str, flags: Sequence[str], case: Case, num_steps: int, num_ranks: int, run_dir: Path
) -> list[str]:
    """Return the command line of a run of ours.

    Args:
        model: as --model_name.
        flags: of train.py besides those of the other arguments.
        case: its shape; as many random rows are made as the steps take.
        num_steps: optimizer steps.
        num_ranks: ranks.
        run_dir: its output directory.
    """
    shown: dict[str, Any] = {"steps": num_steps, "ranks": num_ranks, "run_dir": run_dir}
    shown |= {"rows": num_steps * case.accumulation * case.batch_size * num_ranks}
    own = [text.format_map(shown | case._asdict()) for text in TABLES["of_case"]]
    return [sys.executable, "-m", "fsdp_qlora", "train", f"--model_name={model}", *flags, *own]


def run_program(argv: list[str], env: Mapping[str, str], log: Path, timeout_s: float) -> BenchRow:
    """Run a program to its end; end it when its time is over or this process is stopped.

    Args:
        argv: program and arguments.
        env: its environment.
        log: gets all its output.
        timeout_s: after which it is ended, with all processes it has started.

    Returns:
        command, log, wall_s, host_peak_gib, host_added_gib, and reason: why it failed, or None.
    """
    before_gib = peak_gib = hardware.host_used_gib()
    began_s = time.perf_counter()
    with log.open("wb") as file:
        # A session of its own: Ctrl-C reaches this process only, which ends that one.
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = psutil.Popen(argv, env=env, start_new_session=True, **streams)
        try:
            while process.poll() is None and time.perf_counter() - began_s < timeout_s:
                peak_gib = max(peak_gib, hardware.host_used_gib())
                time.sleep(POLL_S)
            code = process.poll()
        finally:
            _end(process)
    how = f"no end after {timeout_s:.0f} s" if code is None else f"code {code}"
    return {
        **{"command": shlex.join(argv), "log": str(log), "wall_s": time.perf_counter() - began_s},
        **{"host_peak_gib": peak_gib, "host_added_gib": peak_gib - before_gib},
        "reason": None if code == errors.DONE else f"{how}: {last_error(log)} (log: {log})",
    }


def _end(process: psutil.Popen) -> None:
    """End a program and what it has started, if it still runs: SIGTERM, then SIGKILL."""
    if process.poll() is None:
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        with suppress(psutil.TimeoutExpired):
            process.wait(GRACE_S)
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def last_error(log: Path) -> str:
    """Return the last line of a log that names an error, else the last line; 200 characters."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    faults = [line for line in lines if FAULT.match(line)]
    return errors.one_line([*lines, *faults][-1])[:200] if lines else "it printed nothing"


def read_run(run_dir: Path) -> BenchRow:
    """Read the record of a run of train.py.

    Args:
        run_dir: its output directory.

    Returns:
        steps_s and losses of each step; step_s: their spread; tokens_per_s; peak_allocated_gib,
        peak_reserved_gib (training, largest rank); versions; and beside the plan: peaks (GiB,
        predicted and measured), table (its lines), plan_note.

    Raises:
        UserError, KeyError: the record is not whole.
    """
    run = record.read(run_dir)
    plan, ledger = run.table("plan"), run.table("ledger")
    ranks, steps_s = run.table("peaks")["ranks"], run.values("step_s")
    has_gpu = any(rank["device_peak_reserved_gib"] for rank in ranks)
    spread = spread_of(steps_s)
    speed = run.facts["num_tokens"] / run.facts["num_steps"] / spread["median"]
    row = {"steps_s": steps_s, "losses": run.values("loss"), "step_s": spread}
    row |= {"tokens_per_s": speed, "versions": run.table("versions")}
    for name in ("peak_allocated_gib", "peak_reserved_gib"):
        row[name] = max(rank[f"device_{name}"] for rank in ranks)
    row |= {"peaks": names.peaks(plan, ledger, has_gpu), "plan_note": plan.get("note", "")}
    return row | {"table": names.comparison(plan, ledger, has_gpu)}


def spread_of(steps_s: Sequence[float]) -> dict[str, float]:
    """Return median, min, max and num of the seconds of steps after those that warm up."""
    steady = steps_s[record.NUM_WARMUP_STEPS :] or steps_s[-1:]
    ends = {"min": min(steady), "max": max(steady), "num": len(steady)}
    return {"median": statistics.median(steady), **ends}


def machine() -> dict[str, Any]:
    """Return what the bench runs on: GPUs, processor, cores, host memory in GiB, system."""
    names = [gpu.name for gpu in hardware.find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))]
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "cards": "; ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)) or "no GPU",
        "cpu": cpu[1] if cpu else platform.processor(),
        "host_total_gib": hardware.host_limit_gib(),
        **{"num_cores": len(os.sched_getaffinity(0)), "platform": platform.platform()},
    }


def commit() -> str:
    """Return the commit of this project's own repository, or the version of a package."""
    git = ["git", f"--git-dir={config.PROJECT_DIR / '.git'}", f"--work-tree={config.PROJECT_DIR}"]
    argv = [*git, "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.SubprocessError):
        if config.own_project():
            return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    return __version__


def measure(args: argparse.Namespace, case: Case) -> BenchRow:
    """Run a row.

    Args:
        args: the command line, as `_parse` completes it.
        case: the row.

    Returns:
        The row as the JSON file holds it; one that failed or was left out has a reason.
    """
    place, out = PLACES[case.place], args.out / "runs" / f"{case.name}-{time.time():.0f}"
    num_ranks = min(args.world_size, place["max_ranks"])
    row: BenchRow = {"name": case.name, "what": place["what"], "command": "", **case._asdict()}
    row |= {"num_ranks": num_ranks, "weights": args.weights, "p2p": args.p2p}
    row |= {"num_steps": args.steps, "commit": commit(), "where": args.where}
    row["date"] = str(datetime.date.today())
    if num_ranks < place["min_ranks"]:
        return {**row, "state": "left out", "reason": f"needs {place['min_ranks']} GPUs"}
    out.mkdir(parents=True)
    flags = [*COMMON, *place["flags"], *["--weights=random"] * (args.weights == "random")]
    flags += [f"--gpu_budget_gib={args.gpu_budget_gib}"]
    shape = (case, args.steps + record.NUM_WARMUP_STEPS, num_ranks)
    argv = train_command(args.model_name, flags, *shape, out / "run")
    row |= {"state": "failed", **run_program(argv, os.environ, out / "log.txt", args.timeout_s)}
    if row["reason"]:
        return row
    try:
        return row | read_run(out / "run") | {"state": "measured"}
    except (errors.UserError, KeyError) as error:
        return {**row, "reason": f"its record cannot be read: {error} (log: {row['log']})"}


def markdown(bench: BenchRow) -> str:
    """Return the page: where, the table, each row beside its plan, the command lines.

    Args:
        bench: what the JSON file holds.
    """
    from jinja2 import Template

    named = [f"{name} {text}" for name, text in bench["versions"].items() if name != "platform"]
    parts = {"versions": ", ".join(named), "cells": map(_cells, bench["rows"])}
    template = Template(Path(__file__).with_suffix(".md.j2").read_text(encoding="utf-8"))
    return template.render(bench | parts) + "\n"


def _cells(row: BenchRow) -> list[str]:
    head = [f"{row['name']}: {PLACES[row['place']]['what']}", str(row["num_ranks"])]
    when = f"{row['date']} {row['commit']}"
    if row["state"] != "measured":
        return [*head, row["state"], *[""] * 4, when]
    step, losses = row["step_s"], [f"{loss:.3f}" for loss in row["losses"] if loss is not None]
    pairs = row["peaks"].items()
    total = {name: f"{got:.2f} ({got / plan - 1:+.1%})" for name, (plan, got) in pairs}
    gpu, host = total.get("card", ""), total.get("host", "")
    return [
        *(*head, f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f})"),
        f"{row['tokens_per_s']:,.0f}",
        f"{row['peak_allocated_gib']:.2f} / {row['peak_reserved_gib']:.2f} / {gpu}",
        f"{row['host_added_gib']:.1f} / {host}",
        *(" - ".join(losses[:: len(losses) - 1 or 1]) or "none", when),
    ]


def write(stem: Path, bench: BenchRow) -> None:
    """Write the JSON file, the page, and its pictures, each whole or not at all.

    Args:
        stem: path of the files without their endings.
        bench: what the JSON file holds.
    """
    atomic.write_json(stem.with_suffix(".json"), bench)
    atomic.write(stem.with_suffix(".md"), markdown(bench))
    measured, pictures = [row for row in bench["rows"] if row["state"] == "measured"], []
    for key, (title, unit) in TABLES["figures"].items():
        values = [(row["name"], row[key]) for row in measured if row[key] > 0]
        pictures += [{"title": title, "unit": unit, "values": values}] if values else []
    atomic.write(stem.with_suffix(".html"), page.render(bench["title"], [], bars=pictures))


def _facts(args: argparse.Namespace, rows: list[BenchRow]) -> BenchRow:
    """What the JSON file holds."""
    title, _, cases = KINDS[args.kind]
    order = [case.name for case in cases]
    versions = [row["versions"] for row in rows if "versions" in row]
    is_scaled, is_trial = args.kind == SMALL, args.steps < MIN_STEPS
    notes = ["A scaled model: the bench works, nothing is said about the real one"] * is_scaled
    notes += [f"{args.steps} steps counted a row: a trial, no measurement"] * is_trial
    return {
        **{"kind": args.kind, "title": title, "date": str(datetime.date.today()), "notes": notes},
        **{"machine": machine(), "versions": versions[-1] if versions else {}, "commit": commit()},
        **{"command": args.command, "model": args.model_name, "weights": args.weights},
        "gpu_budget_gib": args.gpu_budget_gib if args.num_gpus else None,
        "rows": sorted(rows, key=lambda row: order.index(row["name"])),
    }


def main(argv: list[str]) -> int:
    """Run the command `bench`.

    Args:
        argv: the kind and its options.

    Returns:
        Exit code: 0 when every row was measured or left out.

    Raises:
        UserError: the arguments cannot be used, or no such model.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop ends the running row too
    args = _parse(argv)
    stem = args.out / f"bench-{args.kind}"
    path, every = stem.with_suffix(".json"), {case.name: case for case in KINDS[args.kind][2]}
    former = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    names = [name for text in args.rows.split(",") for name in fnmatch.filter(every, text)]
    if not names:
        raise errors.UserError(f"--rows {args.rows}", "no such row", f"use {' '.join(every)}")
    if any(row["where"] != args.where for row in former):
        rule = f"is of {former[0]['where']}, this is {args.where}"
        raise errors.UserError(f"{stem}.json", rule, "give another directory with --out")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {row["name"]: row for row in former}
    for name in names:
        row = rows[name] = measure(args, every[name])
        print(row["name"], row["reason"] or " | ".join(_cells(row)[2:6]), sep=": ", flush=True)
        write(stem, _facts(args, [*rows.values()]))
    print(f"\n{stem.with_suffix('.md').read_text(encoding='utf-8')}\n{stem}.json .md .html")
    states = {rows[name]["state"] for name in names}
    return errors.DONE if states <= {"measured", "left out"} else errors.RUN_FAILED


def _parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line, and add what follows from it; a CPU takes kind small."""
    args = cli.arguments("bench", argv, __doc__, kind={"choices": [*KINDS]})
    args.num_gpus = hardware.count_gpus(os.environ)
    if not args.num_gpus and args.kind != SMALL:
        print(f"no GPU: a scaled model on CPU ranks instead of {args.kind} (bench-small)")
        args.kind = SMALL
    args.out = (args.out or Path(f"output/bench-{args.kind}")).resolve()
    args.where = machine()["cards" if args.num_gpus else "cpu"]
    args.p2p = "off" if os.environ.get("NCCL_P2P_DISABLE") == "1" else "on"
    args.world_size = args.world_size or args.num_gpus or 2
    args.model_name, args.weights = args.model_name or KINDS[args.kind][1], "random"
    if args.model_name.lower() not in (*arch.files.known_shapes(), KINDS[SMALL][1].lower()):
        args.weights = f"real, from {arch.read(args.model_name, need_weights=True).path}"
    args.command = shlex.join(["python", "-m", "fsdp_qlora", "bench", *argv])
    return args
