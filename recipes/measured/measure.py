"""Measure rows of ../measured.md again, one after the other, each a run of train.py.

    python recipes/measured/measure.py '7b-*' a3b-one --seconds 600

Prints a line of the table for each row that has run, beside its plan; logs lie in --out. A row that
needs more GPUs than there are is left out; none is begun after --seconds.
"""

import argparse
import fnmatch
import os
import shlex
import sys
import time
import tomllib
from pathlib import Path

from fsdp_qlora import bench, config, hardware, record
from fsdp_qlora.planning import rows as names

TABLE = tomllib.loads(Path(__file__).with_name("rows.toml").read_text(encoding="utf-8"))


def command(name: str, out: Path) -> list[str]:
    """The command line of a row: what all have, what its group has, its own; the last wins."""
    group = next((text for key, text in TABLE["groups"].items() if name.startswith(key)), "")
    flags = shlex.split(f"{TABLE['common']} {group} {TABLE['rows'][name]}")
    given = dict(zip(flags[::2], flags[1::2], strict=True))  # a row's own stand for the group's
    cfg = config.parse([f"{key}={value}" for key, value in given.items()])
    per_step = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.world_size
    given |= {"--dataset_samples": str(per_step * cfg.max_steps), "--output_dir": str(out / name)}
    return ["train", *(f"{key}={value}" for key, value in given.items())]


def needed(run: record.Run) -> float:
    """GiB of a GPU that tensors take by the plan, at their most."""
    beside = names.SLACK, names.CONTEXT
    phases = run.table("plan")["device"].values()
    return max(sum(gib for row, gib in rows.items() if row not in beside) for rows in phases)


def line(name: str, row: dict, run: record.Run) -> str:
    """A row of the table: seconds, tokens/s, GiB of the GPU, GiB beside the plan."""
    step, plan_gib = row["step_s"], needed(run)
    taken, pss = row["peak_allocated_gib"], run.table("peaks")["ranks"]
    pairs = (f"{at} {got:.2f} ({got / plan - 1:+.1%})" for at, (plan, got) in row["peaks"].items())
    seconds = f"{step['median']:.3f} s ({step['min']:.3f} to {step['max']:.3f})"
    speed = f"{row['tokens_per_s']:,.0f} tokens/s | {row['peak_reserved_gib']:.2f} GiB reserved"
    own = f"{taken:.2f} allocated ({taken / plan_gib - 1:+.1%})"
    host = f"{sum(rank['host_pss_gib'] for rank in pss):.1f} PSS of the ranks"
    cells = name, seconds, speed, own, ", ".join(pairs), host, row["plan_note"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", help=f"rows or patterns of {' '.join(TABLE['rows'])}")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all of them")
    parser.add_argument("--out", type=Path, default=Path("output/measured"))
    args = parser.parse_args()
    end_s, out = time.monotonic() + args.seconds, args.out.resolve()
    os.environ.setdefault("NCCL_P2P_DISABLE", "1")
    num_gpus = hardware.count_gpus(os.environ)
    out.mkdir(parents=True, exist_ok=True)
    wanted = [n for n in TABLE["rows"] if any(fnmatch.fnmatch(n, own) for own in args.names)]
    for name in wanted:
        argv, log = command(name, out), out / f"{name}.log"
        left_s = end_s - time.monotonic()
        if int(dict(text.split("=", 1) for text in argv[1:])["--world_size"]) > num_gpus:
            print(f"| {name} | left out: needs more GPUs |", flush=True)
        elif left_s > 30:
            full = [sys.executable, "-m", "fsdp_qlora", *argv]
            row = bench.run_program(full, os.environ, log, left_s)
            made = row["reason"] or line(name, bench.read_run(out / name), record.read(out / name))
            print(made, f"{row['wall_s']:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
