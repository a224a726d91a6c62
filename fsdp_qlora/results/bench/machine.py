"""What a bench runs on, and the weights it runs with."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from fsdp_qlora import arch
from fsdp_qlora.arch import files
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.errors import RUN_FAILED, UserError
from fsdp_qlora.hardware import driver_version, find_gpus
from fsdp_qlora.results.bench.process import GIB, last_word

SHARED_MEMORY = Path("/dev/shm")
PLACE = "fsdp_qlora-bench"
RANDOM = PROJECT_DIR / "recipes" / "peers" / "random_checkpoint.py"
PACKAGES = (
    *("torch", "transformers", "bitsandbytes", "peft", "accelerate", "trl"),
    *("liger-kernel", "flash-attn", "datasets"),
)


def machine() -> dict[str, Any]:
    """What the bench runs on: GPUs with their driver, processor, cores, host memory, system."""
    gpus = [gpu.name for gpu in find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))]
    driver = driver_version() or "unknown driver"
    names = [f"{gpus.count(gpu)} x {gpu}, {driver}" for gpu in dict.fromkeys(gpus)]
    return {
        "cards": "; ".join(names) or "no GPU",
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "host_total_gib": psutil.virtual_memory().total / GIB,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the arms use; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """The commit of this project; "unknown" where git does not know it."""
    return _output_of("git", "-C", str(PROJECT_DIR), "describe", "--always", "--dirty")


def checkpoint(model_name: str, out: Path) -> Path:
    """Find a 16-bit checkpoint, or write one of a known shape with random weights.

    Args:
        model_name: a directory, or the name of a known shape.
        out: where to write when shared memory has no room for it.

    Returns:
        Its directory. One in shared memory is used again.

    Raises:
        UserError: no such model, or it could not be written.
    """
    path = Path(model_name).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    if model_name not in files.known_shapes():
        remedy = f"give a directory, or one of {', '.join(files.known_shapes())}"
        raise UserError(f"--model_name {model_name}", "is no model directory or shape", remedy)
    need_bytes = 2 * arch.num_params(arch.read(model_name, need_weights=False))
    kept = SHARED_MEMORY / PLACE / model_name
    if kept.is_dir():
        return kept
    place = kept if _has_room(SHARED_MEMORY, need_bytes) else out / PLACE / model_name
    draft = place.with_name(place.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    print(f"writing random weights ({need_bytes / GIB:.1f} GiB) to {place}", flush=True)
    argv = [sys.executable, str(RANDOM), "--model_name", model_name]
    argv += ["--out", str(draft)]
    done = subprocess.run(argv, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [(0.0, line) for line in done.stderr.splitlines()]
        remedy = "make room, or give --model_name DIR"
        raise UserError(shlex.join(argv), last_word(said), remedy, RUN_FAILED)
    draft.rename(place)
    return place


def _has_room(place: Path, need_bytes: int) -> bool:
    """Whether a directory in memory holds a checkpoint, and the host as much again."""
    if not place.is_dir() or not os.access(place, os.W_OK):
        return False
    free_bytes = min(shutil.disk_usage(place).free, psutil.virtual_memory().available)
    return free_bytes > 2 * need_bytes


def _output_of(*argv: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return "unknown"


def _cpu_name() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return platform.processor() or "unknown processor"
