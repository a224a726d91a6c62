"""Held-out loss after training with each kind of frozen matmul: models x tasks x seeds.

    python recipes/measured/quality.py --models quickstart/SmolLM2-135M-Instruct \
        --tasks quickstart/docstrings.jsonl,quickstart/alpaca.jsonl --steps 300

Each is a run of train.py on one GPU; several run at once. Prints for each model and task the loss
in bf16 (mean and standard deviation over the seeds), and how far each seed's loss with another
matmul lies from that of its bf16 run: mean and standard deviation.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from fsdp_qlora import hardware, record

FLAGS = (
    "--world_size=1 --use_cpu_offload=false --fit=off --quant_cache=off --dry_run=off --packing=on"
)
FLAGS += (
    " --batch_size=4 --context_length=512 --eval_split=0.1 --sample_prompts=off --save_model=false"
)
Run = tuple[str, str, int, str]  # model, task, seed, matmul


def loss(args: argparse.Namespace, number: int, run: Run) -> float:
    """The held-out loss at the end of a run."""
    model, task, seed, matmul = run
    out = args.out / f"{Path(model).name}-{Path(task).stem}-{seed}-{matmul}"
    own = [f"--model_name={model}", f"--dataset={task}", f"--seed={seed}", f"--matmul={matmul}"]
    own += [f"--max_steps={args.steps}", "--num_epochs=1000", f"--output_dir={out}", *FLAGS.split()]
    num_gpus = max(hardware.count_gpus(os.environ), 1)
    env = os.environ | {"CUDA_VISIBLE_DEVICES": str(number % num_gpus), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "fsdp_qlora", "train", *own, "--log_to=stdout", "--overwrite"]
    out.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{out.name}.log").open("wb") as log:
        subprocess.run(argv, env=env, stdout=log, stderr=log, check=True)
    found = record.read(out).evals[-1]["loss"]
    print(*run, f"{found:.4f}", flush=True)
    return found


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"


def main() -> None:
    """Run all of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", required=True, help="directories, separated by commas")
    parser.add_argument("--tasks", required=True, help="files of rows, separated by commas")
    parser.add_argument("--matmuls", default="bf16,fp8,int8", help="the first is compared with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--at_once", type=int, default=8, help="runs")
    parser.add_argument("--out", type=Path, default=Path("output/quality"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    models, tasks, matmuls = (getattr(args, n).split(",") for n in ("models", "tasks", "matmuls"))
    runs = [*itertools.product(models, tasks, range(1, args.seeds + 1), matmuls)]
    with ThreadPoolExecutor(args.at_once) as pool:
        losses = pool.map(partial(loss, args), range(len(runs)), runs)
        found = dict(zip(runs, losses, strict=True))
    for model, task in itertools.product(models, tasks):
        of = {m: [found[model, task, s + 1, m] for s in range(args.seeds)] for m in matmuls}
        first, *others = matmuls
        cells = [Path(model).name, Path(task).stem, f"{first} {spread(of[first])}"]
        for other in others:
            apart = [a - b for a, b in zip(of[other], of[first], strict=True)]
            cells.append(f"{other} {spread(apart)}")
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
