"""Measure ours against TRL + PEFT + accelerate: the same work for every arm, in turn.

    make bench-peers ARGS="--arms ours,trl_fsdp2"
    python recipes/peers/bench_peers.py --model_name llama-2-7b --out output/peers -- --attn sdpa

Every arm is a process of its own; round 1 runs all arms, then round 2, and so on, with NCCL as it
comes and with NCCL_P2P_DISABLE=1. All train the same random token ids, per rank and per step, from
the same weights and adapters: NF4 with double quantization, LoRA r 16 on the seven projections,
AdamW at 1e-4, no decay, no clipping. Writes peers.json, peers.md and every log into
--out. Words behind -- are flags of train.py for our arms.
"""

import argparse
import datetime
import importlib.util
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from fsdp_qlora import arch, bench
from fsdp_qlora.arch import files
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed.launch import find_port, wishes
from fsdp_qlora.errors import DONE, RUN_FAILED, UserError
from fsdp_qlora.hardware import count_gpus

HERE = Path(__file__).resolve().parent
SHARED_MEMORY = Path("/dev/shm")
MAX_CPU_PARAMS = 1e9
MAX_LOSS_DIFFERENCE = 0.005  # bfloat16 shows a loss of 11.2 to 0.3 %
RESIDENT = ("--use_gradient_checkpointing=true", "--use_cpu_offload=false")
STREAMED = (*RESIDENT[:1], "--use_cpu_offload=true", "--offload_impl=stream")
OURS = {"ours": RESIDENT, "ours_streamed": STREAMED, "ours_best": RESIDENT}
TRL = {  # arm -> modules that it needs
    "trl_fsdp2": ("trl", "peft", "accelerate", "datasets"),
    "trl_fsdp2_liger": ("trl", "peft", "accelerate", "datasets", "liger_kernel"),
}
P2P = {"on": "NCCL as it comes", "off": "NCCL_P2P_DISABLE=1", "cpu": "CPU, gloo"}
CPU_NOTE = (
    "CPU: shows that the bench works, says nothing about GPUs; trl_fsdp2 is plain DDP here, for "
    "accelerate has no FSDP on a CPU"
)
TERMS = (
    "Median (least - most) of the steps after the third of all rounds; x: speed as a multiple of "
    "a peer's in the same round, median (least - most). Ours counts whole steps, fetching and "
    "recording included; TRL's seconds leave out fetching and logging. GPU memory: torch's "
    "allocator in training, largest rank. Host memory: all programs, what the arm added at its "
    "peak. A row is not comparable when its first or mean loss is more than 0.5 % from ours, or "
    "its rows are not the same."
)


def launch(args, arm, out):
    """The command line of an arm."""
    if arm in OURS:
        case = bench.Case(arm, args.batch_size, args.context_length)
        best = shlex.split(args.best) if arm == "ours_best" else []
        flags = [*bench.COMMON, *OURS[arm], *best, f"--gpu_budget_gib={args.gpu_budget_gib}"]
        shape = (case, args.max_steps, args.world_size)
        return bench.train_command(str(args.model), [*flags, *args.extra], *shape, out / "run")
    num_ranks, port = str(args.world_size), str(find_port(None))
    settings = str(HERE / "accelerate_fsdp2.yaml")
    fsdp2 = ("accelerate.commands.launch", "--config_file", settings, "--num_processes", num_ranks)
    ddp = ("torch.distributed.run", "--nproc-per-node", num_ranks, "--master-port", port)
    return [
        *(sys.executable, "-m", *((*fsdp2, "--main_process_port", port) if args.num_gpus else ddp)),
        *(str(HERE / "trl_fsdp2.py"), f"--model={args.model}", f"--liger={'liger' in arm:d}"),
        *(f"--batch_size={args.batch_size}", f"--context_length={args.context_length}"),
        *(f"--max_steps={args.max_steps}", f"--gpu_budget_gib={args.gpu_budget_gib}"),
        f"--out={out / 'result.json'}",
    ]


def obstacle(args, arm):
    """What keeps an arm from running here, or None."""
    if "liger" in arm and not args.num_gpus:
        return "its kernels need a GPU"
    missing = [name for name in TRL.get(arm, ()) if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed: pip install 'fsdp_qlora[peers]'" if missing else None


def environment(p2p, num_ranks):
    """Threads and allocator alike for every arm, our modules at hand."""
    env = {name: text for name, text in os.environ.items() if name != "NCCL_P2P_DISABLE"}
    env |= wishes(env, num_ranks) | {"PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_DIR), env.get("PYTHONPATH")]))
    return env | ({"NCCL_P2P_DISABLE": "1"} if p2p == "off" else {})


def measure(args, arm, p2p, number):
    """Run an arm once; one that fails has a reason."""
    run = {"arm": arm, "p2p": p2p, "round": number, "state": "failed"}
    out = args.out / "runs" / f"{p2p}-{number}-{arm}"
    out.mkdir(parents=True)
    reason = obstacle(args, arm)
    if reason:
        return {**run, "reason": reason, "command": ""}
    env, log = environment(p2p, args.world_size), out / "log.txt"
    run |= bench.run_program(launch(args, arm, out), env, log, args.timeout_s)
    if run["reason"]:
        return run
    try:
        is_ours = arm in OURS
        found = (
            bench.read_run(out / "run")
            if is_ours
            else json.loads((out / "result.json").read_text())
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {**run, "reason": f"its record cannot be read: {error!r} (log: {log})"}
    return {"has_same_rows": True, **run, **found, "state": "measured"}


def disagreement(run, base):
    """Why a run cannot be compared with another: other rows or other losses; or None."""
    if not run["has_same_rows"]:
        return "trains on other rows"
    mine, theirs = run["losses"], base["losses"]
    if None in mine or None in theirs or len(mine) != len(theirs):
        counts = [sum(loss is not None for loss in losses) for losses in (mine, theirs)]
        return f"{counts[0]} losses against {counts[1]} of {base['arm']}"
    pairs = {
        "first": (mine[0], theirs[0]),
        "mean": (statistics.fmean(mine), statistics.fmean(theirs)),
    }
    apart = {name: abs(a - b) / abs(b) for name, (a, b) in pairs.items()}
    if max(apart.values()) <= MAX_LOSS_DIFFERENCE:
        return None
    words = [f"{n} loss {a:.4f} against {b:.4f} ({apart[n]:.1%})" for n, (a, b) in pairs.items()]
    return f"{', '.join(words)} of {base['arm']}"


def compared(runs):
    """The same runs; those that disagree with the first good one of their round say why."""
    bases, found = {}, []
    for run in runs:
        reason, place = None, (run["p2p"], run["round"])
        if run["state"] == "measured":
            if run["has_same_rows"]:
                bases.setdefault(place, run)
            reason = disagreement(run, bases.get(place, run))
        found.append({**run, "state": "not comparable", "reason": reason} if reason else run)
    return found


def rows_of(runs, tokens_per_step):
    """A row for each arm under each setting, in the order of the runs (from `compared`)."""
    rows = []
    for p2p, arm in dict.fromkeys((run["p2p"], run["arm"]) for run in runs):
        group = [run for run in runs if (run["p2p"], run["arm"]) == (p2p, arm)]
        states = [run["state"] for run in group]
        state = next(name for name in ("not comparable", "measured", "failed") if name in states)
        reasons = dict.fromkeys(run["reason"] for run in group if run["reason"])
        row = {"arm": arm, "p2p": p2p, "state": state, "reason": "; ".join(reasons)}
        good = [run for run in group if run["state"] != "failed"]
        if good:
            steps_s = [
                second for run in good for second in run["steps_s"][bench.record.NUM_WARMUP_STEPS :]
            ]
            row["step_s"] = bench.spread_of([0.0] * bench.record.NUM_WARMUP_STEPS + steps_s)
            row["tokens_per_s"] = tokens_per_step / row["step_s"]["median"]
            for name in ("peak_allocated_gib", "peak_reserved_gib", "host_added_gib"):
                row[name] = max(run[name] for run in good)
            row["losses"], row["ratios"] = good[0]["losses"], _ratios(group, runs)
        rows.append(row)
    return rows


def _ratios(group, runs):
    """Speed as a multiple of each peer's, round by round: the machine's drift cancels out."""
    found = {}
    for run in (run for run in group if run["state"] == "measured"):
        for peer in (peer for peer in runs if peer["state"] == "measured" and peer["arm"] in TRL):
            if (peer["p2p"], peer["round"]) == (run["p2p"], run["round"]) and peer is not run:
                medians = [bench.spread_of(each["steps_s"])["median"] for each in (peer, run)]
                found.setdefault(peer["arm"], []).append(medians[0] / medians[1])
    return found


def markdown(facts):
    """The page: where, a table per setting, what failed or cannot be compared, the commands."""
    here = facts["machine"]
    parts = [f"# {facts['title']}", *(f"**{note}**" for note in facts["notes"])]
    parts += [
        f"{facts['date']}. Machine: {here['cards']}; {here['cpu']}, {here['num_cores']} cores, "
        f"{here['host_total_gib']:.0f} GiB; {here['platform']}. "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        + f"; fsdp_qlora at {facts['commit']}.",
        TERMS,
    ]
    for p2p in dict.fromkeys(row["p2p"] for row in facts["rows"]):
        parts += [f"## {P2P[p2p]}", table([row for row in facts["rows"] if row["p2p"] == p2p])]
    faults = [
        f"- {r['arm']} ({P2P[r['p2p']]}): {r['reason']}" for r in facts["rows"] if r["reason"]
    ]
    parts += ["## Failed or not comparable", "\n".join(faults)] if faults else []
    firsts = {run["arm"]: run["command"] for run in reversed(facts["runs"]) if run["command"]}
    lines = [facts["command"], *(f"# {arm}\n{command}" for arm, command in firsts.items())]
    return "\n\n".join([*parts, "## Commands", "```text\n" + "\n".join(lines) + "\n```"]) + "\n"


def table(rows):
    """A table of one setting."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.get("ratios", ())))
    heads = ["arm", "step s", "tokens/s", "GiB allocated / reserved", "host GiB added", "loss"]
    lines = [[*heads, *(f"x {peer}" for peer in peers)], ["---"] * (len(heads) + len(peers))]
    for row in rows:
        cells, step = [f"{row['arm']}: {row['state']}"], row.get("step_s")
        if step:
            losses = [loss for loss in row["losses"] if loss is not None]
            ratios = [row["ratios"].get(peer) for peer in peers]
            cells += [
                f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f})",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['peak_allocated_gib']:.2f} / {row['peak_reserved_gib']:.2f}",
                f"{row['host_added_gib']:.1f}",
                f"{losses[0]:.4f} - {losses[-1]:.4f}" if losses else "none",
                *(
                    f"{statistics.median(r):.2f} ({min(r):.2f} - {max(r):.2f})" if r else ""
                    for r in ratios
                ),
            ]
        lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def checkpoint(model_name, out):
    """A directory with 16-bit weights: the one given, or random ones of a known shape.

    Those lie in shared memory where it has room, and are used again.
    """
    path = Path(model_name).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    if model_name not in files.known_shapes():
        remedy = f"give a directory, or one of {', '.join(files.known_shapes())}"
        raise UserError(f"--model_name {model_name}", "is no model directory or shape", remedy)
    need_bytes = 2 * arch.num_params(arch.read(model_name, need_weights=False))
    kept = SHARED_MEMORY / "fsdp_qlora-bench" / model_name
    if kept.is_dir():
        return kept
    has_place = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free if has_place else 0
    has_room = min(free_bytes, psutil.virtual_memory().available) > 2 * need_bytes
    place = kept if has_room else out / model_name
    draft = place.with_name(place.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    print(f"writing random weights ({need_bytes / 2**30:.1f} GiB) to {place}", flush=True)
    script = [sys.executable, str(HERE / "random_checkpoint.py"), "--model_name", model_name]
    subprocess.run([*script, "--out", str(draft)], env=environment("on", 1), check=True)
    draft.rename(place)
    return place


def parse(argv):
    """The command line; whatever is wrong with it is reported before anything runs."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--model_name", default="llama-2-7b", help="known shape (random weights) or directory")
    add("--batch_size", type=int, default=4, help="rows per rank and step [4]")
    add("--context_length", type=int, default=2048, help="tokens of a row [2048]")
    add("--max_steps", type=int, default=13, help="steps of a run, the first 3 warm up [13]")
    add("--rounds", type=int, default=2, help="runs of each arm and setting [2]")
    add("--gpu_budget_gib", type=float, default=24.0, help="cap of each GPU's allocator [24]")
    add("--world_size", type=int, help="ranks [one per GPU; 2 on a CPU]")
    add("--arms", default=",".join([*OURS, *TRL]), help="some of %(default)s [all]")
    add("--p2p", choices=["both", "on", "off"], default="both", help="peer access of NCCL [both]")
    add("--best", default="--selective_layers 24", help='flags of ours_best: --best="--x 1"')
    add("--timeout_s", type=float, default=600.0, help="longest a run may take [600]")
    add("--out", type=Path, help="new directory of the results [output/bench-peers-TIME]")
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    args.extra, args.arms = argv[at + 1 :], args.arms.split(",")
    unknown = [name for name in args.arms if name not in {**OURS, **TRL}]
    if unknown:
        raise UserError(
            f"--arms {','.join(unknown)}", "no such arm", f"use {' '.join([*OURS, *TRL])}"
        )
    if args.max_steps <= bench.record.NUM_WARMUP_STEPS:
        raise UserError(
            f"--max_steps {args.max_steps}", "the first 3 steps warm up", "use 13 or more"
        )
    args.num_gpus = count_gpus(os.environ)
    args.world_size = args.world_size or args.num_gpus or 2
    args.settings = ("on", "off") if args.p2p == "both" else (args.p2p,)
    args.settings = args.settings if args.num_gpus else ("cpu",)
    args.out = (args.out or Path(f"output/bench-peers-{time.strftime('%Y%m%d-%H%M%S')}")).resolve()
    if args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(f"--out {args.out}", "holds files already", "give another directory")
    is_known = Path(args.model_name).exists() or args.model_name in files.known_shapes()
    if is_known and not args.num_gpus:
        num_params = arch.num_params(arch.read(args.model_name, need_weights=False))
        if num_params > MAX_CPU_PARAMS:
            rule = f"{num_params / 1e9:.1f} billion parameters are too many without a GPU"
            remedy = "--model_name smollm2-135m --batch_size 1 --context_length 64 --max_steps 5"
            raise UserError(f"--model_name {args.model_name}", rule, remedy)
    args.model = checkpoint(args.model_name, args.out)
    return args


def write(args, runs, command):
    """Write page and JSON file of the runs so far; return the rows."""
    runs = compared(runs)
    rows = rows_of(runs, args.batch_size * args.context_length * args.world_size)
    versions = [run["versions"] for run in runs if "versions" in run]
    is_trial = args.max_steps - bench.record.NUM_WARMUP_STEPS < 10
    title = f"{Path(args.model_name).name}, {args.batch_size} x {args.context_length}"
    facts = {
        "title": f"{title}, {args.world_size} ranks: ours against its peers",
        "date": str(datetime.date.today()),
        "notes": [CPU_NOTE] * (not args.num_gpus)
        + ["few steps: a trial, no measurement"] * is_trial,
        "machine": bench.machine(),
        "versions": versions[-1] if versions else {},
        "commit": bench.commit(),
        **{"command": command, "rows": rows, "runs": runs},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "peers.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (args.out / "peers.md").write_text(markdown(facts), encoding="utf-8")
    return rows


def main(argv):
    """Run all arms in turn; 0 when at least one row counts."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop ends the running arm too
    args, runs, rows = parse(argv), [], []
    command = shlex.join(["python", "recipes/peers/bench_peers.py", *argv])
    for p2p in args.settings:
        broken = set()
        for number in range(1, args.rounds + 1):
            for arm in (arm for arm in args.arms if arm not in broken):
                run = measure(args, arm, p2p, number)
                broken |= {arm} if run["state"] == "failed" else set()
                runs.append(run)
                rows = write(args, runs, command)
                seconds = run["reason"] or f"step {bench.spread_of(run['steps_s'])['median']:.3f} s"
                print(f"round {number}, p2p {p2p}: {arm}: {seconds}", flush=True)
    print(f"\n{(args.out / 'peers.md').read_text(encoding='utf-8')}\n{args.out}: peers.json .md")
    return DONE if any(row["state"] == "measured" for row in rows) else RUN_FAILED


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
