"""Measure ours against its peers: the same work for every arm, in turn, in one run.

    python -m fsdp_qlora bench peers --model_name llama-2-7b --out output/peers

Every arm is a process of its own; round 1 runs all arms, then round 2, and so on, with NCCL as it
comes and with NCCL_P2P_DISABLE=1. All train the same random token ids, per rank and per step, from
the same weights and adapters: NF4 with double quantisation, LoRA r 16 on the seven projections,
AdamW at 1e-4, no decay, no clipping. Leaves peers.json, peers.md, peers.svg and every log in --out.
Words behind -- are flags of train.py for our arms.
"""

import argparse
import datetime
import json
import os
import shlex
import signal
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora import arch
from fsdp_qlora.errors import DONE, RUN_FAILED, UserError
from fsdp_qlora.hardware import count_gpus
from fsdp_qlora.results.bench import report, series
from fsdp_qlora.results.bench.arms import ARMS, Arm, Workload
from fsdp_qlora.results.bench.attempt import attempt, environment
from fsdp_qlora.results.bench.cases import KINDS
from fsdp_qlora.results.bench.machine import PLACE, checkpoint, commit, machine, versions

MAX_CPU_PARAMS = 1e9
CPU_NOTE = (
    "CPU: shows that the bench works, says nothing about GPUs; "
    "trl_fsdp2 is plain DDP here, for accelerate has no FSDP on a CPU"
)
TERMS = (
    "Medians and spread of the steps after the third of all rounds; x = speed as a multiple of a "
    "peer's in the same round, median (least - most). Ours counts whole steps, fetching and "
    "recording included; TRL's seconds leave out fetching and logging. Device memory: torch's "
    "allocator in training, largest rank. Host memory: all programs, peak while the arm ran, and "
    "what it added. A row is void when its first or mean loss is more than 0.5 % from ours, or its "
    "rows are not the same."
)


@dataclass(frozen=True)
class Plan:
    """What a bench does.

    Args:
        work: what all arms train.
        model: name of the model, as it was given.
        arms: in the order in which they run.
        p2p: settings of `report.SETTINGS`.
        num_rounds: rounds per setting.
        timeout_s: of each run.
        out: directory of all results.
        command: what was typed.
    """

    work: Workload
    model: str
    arms: tuple[Arm, ...]
    p2p: tuple[str, ...]
    num_rounds: int
    timeout_s: float
    out: Path
    command: str


def main(argv: list[str]) -> int:
    """The verb `bench`.

    Args:
        argv: its arguments.

    Returns:
        Exit code: 0 when at least one row counts.

    Raises:
        UserError: the arguments cannot be used, or the weights cannot be written.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop ends the running arm too
    if argv[:1] and argv[0] in KINDS:
        return series.main(argv)
    plan = _plan(argv)
    began_s = time.perf_counter()
    runs: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for p2p in plan.p2p:
        broken: set[str] = set()
        for number in range(1, plan.num_rounds + 1):
            for arm in (arm for arm in plan.arms if arm.name not in broken):
                run = measure(plan, arm, p2p, number)
                runs.append(run)
                broken |= {arm.name} if run["state"] == "failed" else set()
                print(_line(run, plan.work), flush=True)
                rows = write(plan, runs)
    minutes = (time.perf_counter() - began_s) / 60
    print(f"\n{(plan.out / 'peers.md').read_text(encoding='utf-8')}")
    print(f"{minutes:.1f} minutes; {plan.out}: peers.json, peers.md, peers.svg, logs")
    if PLACE in plan.work.model.parts:
        print(f"the random weights stay for the next bench: rm -r {plan.work.model.parent}")
    return DONE if any(row["state"] == "measured" for row in rows) else RUN_FAILED


def measure(plan: Plan, arm: Arm, p2p: str, number: int) -> dict[str, Any]:
    """Run an arm once.

    Args:
        plan: the bench.
        arm: the arm.
        p2p: setting.
        number: of the round, from 1.

    Returns:
        The run as peers.json holds it; an arm that fails is a run with a reason.
    """
    out = plan.out / "runs" / f"{p2p}-{number}-{arm.name}"
    record = {"arm": arm.name, "what": arm.what, "is_ours": arm.is_ours, "p2p": p2p}
    env = environment(os.environ, p2p, plan.work.num_ranks)
    return {**record, "round": number, **attempt(arm, plan.work, out, env, plan.timeout_s)}


def write(plan: Plan, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write peers.json, peers.md and peers.svg of the runs so far.

    Args:
        plan: the bench.
        runs: from `measure`, in order.

    Returns:
        The rows of the table.
    """
    judged = report.judge(runs)
    num_wanted = len(plan.p2p) * plan.num_rounds * len(plan.arms)
    rows = report.rows_of(judged, plan.work.tokens_per_step)
    bench = {
        "model": plan.model,
        "date": datetime.date.today().isoformat(),
        "notes": _notes(plan),
        "terms": TERMS,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": plan.command,
        "work": json.loads(json.dumps(asdict(plan.work), default=str)),
        "tokens_per_step": plan.work.tokens_per_step,
        "num_runs": len(runs),
        "num_runs_wanted": num_wanted,
        "rows": rows,
        "runs": judged,
    }
    (plan.out / "peers.json").write_text(json.dumps(bench, indent=1) + "\n", encoding="utf-8")
    (plan.out / "peers.md").write_text(report.markdown(bench), encoding="utf-8")
    (plan.out / "peers.svg").write_text(report.picture(bench), encoding="utf-8")
    return rows


def _notes(plan: Plan) -> list[str]:
    num_steps = (plan.work.max_steps - report.NUM_WARMUP_STEPS) * plan.num_rounds
    notes = [] if plan.work.has_gpu else [CPU_NOTE]
    if plan.work.max_steps - report.NUM_WARMUP_STEPS < report.MIN_STEPS:
        notes.append(f"only {num_steps} steps counted: a trial, no measurement")
    return notes


def _line(run: dict[str, Any], work: Workload) -> str:
    head = f"round {run['round']}, p2p {run['p2p']}: {run['arm']:<16}"
    if run["state"] == "failed":
        return f"{head} failed: {run['reason']}"
    step_s = statistics.median(report.steady(run))
    return (
        f"{head} step {step_s:.3f} s, {work.tokens_per_step / step_s:,.0f} tokens/s, "
        f"{run['peak_reserved_gib']:.2f} GiB ({run['wall_s']:.0f} s in all)"
    )


def _plan(argv: list[str]) -> Plan:
    """Read the command line; whatever is wrong with it is told before anything runs."""
    words, extra = argv, []
    if "--" in argv:
        words, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = _parser().parse_args(words)
    names = [arm.name for arm in ARMS]
    wanted = args.arms.split(",") if args.arms else names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UserError(f"--arms {','.join(unknown)}", "no such arm", f"use {' '.join(names)}")
    if args.max_steps <= report.NUM_WARMUP_STEPS:
        rule = f"the first {report.NUM_WARMUP_STEPS} steps warm up"
        raise UserError(f"--max_steps {args.max_steps}", rule, "use 13 or more")
    if args.reference and not (args.reference / "train.py").is_file():
        remedy = "give a checkout of AnswerDotAI/fsdp_qlora"
        raise UserError(f"--reference {args.reference}", "holds no train.py", remedy)
    if not args.reference and args.arms and "reference" in wanted:
        raise UserError("--arms reference", "needs its checkout", "add --reference DIR")
    wanted = [name for name in wanted if args.reference or name != "reference"]
    num_gpus = count_gpus(os.environ)
    if not num_gpus:
        _check_size(args.model_name)
    out = (args.out or Path(f"output/bench-peers-{time.strftime('%Y%m%d-%H%M%S')}")).resolve()
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}", "holds files already", "give another directory")
    work = Workload(
        model=checkpoint(args.model_name, out),
        batch_size=args.batch_size,
        context_length=args.context_length,
        max_steps=args.max_steps,
        num_ranks=args.world_size or num_gpus or 2,
        gpu_budget_gib=args.gpu_budget_gib,
        has_gpu=num_gpus > 0,
        extra=tuple(extra),
        best=tuple(shlex.split(args.best)),
        reference=args.reference.resolve() if args.reference else None,
    )
    out.mkdir(parents=True, exist_ok=True)
    return Plan(
        work=work,
        model=Path(args.model_name).name,
        arms=tuple(arm for arm in ARMS if arm.name in wanted),
        p2p=_settings(args.p2p, work),
        num_rounds=args.rounds,
        timeout_s=args.timeout_s,
        out=out,
        command=shlex.join(["python", "-m", "fsdp_qlora", "bench", *argv]),
    )


def _check_size(model_name: str) -> None:
    """Refuse what would take days without a GPU."""
    num_params = arch.num_params(arch.read(model_name, need_weights=False))
    if num_params > MAX_CPU_PARAMS:
        rule = f"{num_params / 1e9:.1f} billion parameters are too many without a GPU"
        remedy = "--model_name smollm2-135m --batch_size 1 --context_length 64 --max_steps 5"
        raise UserError(f"--model_name {model_name}", rule, remedy)


def _settings(p2p: str, work: Workload) -> tuple[str, ...]:
    if not work.has_gpu:
        return ("cpu",)
    return ("on", "off") if p2p == "both" else (p2p,)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m fsdp_qlora bench", description=__doc__, formatter_class=form
    )
    parser.add_argument("what", choices=["peers", *KINDS], help="7b --help tells of the others")
    add = parser.add_argument
    add("--model_name", default="llama-2-7b", help="known shape (random weights) or directory")
    add("--batch_size", type=int, default=4, help="rows per rank and step [4]")
    add("--context_length", type=int, default=2048, help="tokens of a row [2048]")
    add("--max_steps", type=int, default=13, help="steps of a run, the first 3 warm up [13]")
    add("--rounds", type=int, default=2, help="runs of each arm and setting [2]")
    add("--gpu_budget_gib", type=float, default=24.0, help="cap of each card's allocator [24]")
    add("--world_size", type=int, help="ranks [one per GPU; 2 on a CPU]")
    add("--arms", help=f"some of {','.join(arm.name for arm in ARMS)} [all]")
    add("--p2p", choices=["both", "on", "off"], default="both", help="peer access of NCCL [both]")
    add("--best", default="--selective_layers 24", help='flags of ours_best: --best="--x 1"')
    add("--reference", type=Path, help="checkout of AnswerDotAI/fsdp_qlora: one more arm")
    add("--timeout_s", type=float, default=600.0, help="longest a run may take [600]")
    add("--out", type=Path, help="new directory of the results [output/bench-peers-TIME]")
    return parser
