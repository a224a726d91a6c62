"""The record of a run in experiment trackers, several at once, beside metrics.jsonl.

A thread of rank 0 for each tracker reads metrics.jsonl as it grows and hands on what stands in the
lists below, through accelerate.tracking: figures and choices, no path, no text of the user's, no
secret. Training never waits for it, and when a tracker fails or is out of reach nothing is lost:
metrics.jsonl has it all.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.errors import DONE, one_line

FIGURES: tuple[str, ...] = ("loss", "learning_rate", "grad_norm", "epoch", "tokens_per_s", "step_s")
FIGURES += ("num_tokens", "num_trained_tokens")
HELD_OUT = ("loss", "perplexity")
SETTINGS = (
    *("train_type", "precision", "quant_type", "double_quant", "n_bits", "lora_rank", "lora_alpha"),
    *("lora_dropout", "use_rslora", "context_length", "packing", "batch_size", "num_epochs"),
    *("gradient_accumulation_steps", "max_steps", "lr", "lr_scheduler", "warmup_steps", "wd"),
    *("optimizer", "apply_gradient_clipping", "grad_norm", "seed", "world_size"),
    *("sharding_strategy", "use_cpu_offload", "use_gradient_checkpointing"),
)
# What trackers log of their own accord, switched off: the terminal, the system, git, packages.
WANDB_QUIET = {
    **{"console": "off", "silent": True, "disable_git": True, "disable_code": True},
    **{"x_disable_meta": True, "x_disable_stats": True, "disable_job_creation": True},
    **{"x_save_requirements": False, "x_disable_machine_info": True},
}
TRACKIO_QUIET = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
PROBES = ("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor")
POLL_S = 1.0
PATIENCE_S = 15.0  # for the trackers to take the rest, once the run is over
SHORT_S = 1.0  # the same, when the run has failed
Say = Callable[[str], None]


class _Quiet:
    """A stream that drops what some threads write: trackio and swanlab print, without a switch."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.muted = stream, set[int]()

    def write(self, text: str) -> int:
        is_muted = threading.get_ident() in self.muted
        return len(text) if is_muted else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _follow(
    name: str, cfg: TrainConfig, out_dir: Path, stop: threading.Event, tell: Say, quiet: _Quiet
) -> None:
    """Hand on every line of a record as it grows; a fault of the tracker ends this, not the run.

    Args:
        name: of the tracker.
        cfg: how the run is named there.
        out_dir: of the run.
        stop: set when no more lines will come.
        tell: shows a line to the user.
        quiet: the standard output.
    """
    quiet.muted.add(threading.get_ident())
    try:
        tracker, step = _open(name, cfg, out_dir), 0
        for line in _lines(out_dir / "metrics.jsonl", stop):
            step = int(line.get("step") or step)
            if values := figures(line):
                tracker.log(values, step=step)
        tracker.finish()
    except BaseException as error:  # wandb leaves by SystemExit too
        failure = one_line(str(error).partition("\n")[0]) or type(error).__name__
        quiet.muted.discard(threading.get_ident())
        tell(f"note      {name} failed ({failure}): metrics.jsonl goes on")


def _lines(path: Path, stop: threading.Event) -> Iterator[dict[str, Any]]:
    rest, is_over = "", False
    with path.open(encoding="utf-8") as file:
        while not is_over:
            is_over = stop.wait(POLL_S)  # before the look: what was written by then is read
            *whole, rest = (rest + file.read()).split("\n")
            yield from map(json.loads, whole)


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Return what a tracker gets of a line of metrics.jsonl.

    Args:
        line: a step or an event.

    Returns:
        Figures by name; none of a line that is not for trackers.
    """
    found: dict[str, Any] = {}
    if line.get("event") == "eval":
        found = {f"held_out/{name}": line.get(name) for name in HELD_OUT}
    elif "event" not in line:
        found = {f"train/{name}": line.get(name) for name in FIGURES}
        gpus = [rank.get("device_peak_reserved_gib") or 0.0 for rank in line.get("ranks", ())]
        found |= {"memory/card_gib": max(gpus, default=0.0) or None}
        found |= {"memory/host_gib": line.get("host", {}).get("host_used_gib")}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def attach(
    cfg: TrainConfig, out_dir: Path, is_writer: bool, tell: Say = tqdm.write
) -> Iterator[None]:
    """Hand the record on while the block runs; nothing where no tracker was asked for.

    The process group must exist: accelerate would make one of its own from the environment.

    Args:
        cfg: its trackers, and how the run is named there.
        out_dir: of the run; metrics.jsonl is there.
        is_writer: this rank writes the record.
        tell: shows a line to the user.
    """
    if not cfg.trackers or not is_writer:
        yield
        return
    quiet, stop, wait_s = _Quiet(sys.stdout), threading.Event(), SHORT_S
    rest = (cfg, out_dir, stop, tell, quiet)
    threads = [
        threading.Thread(target=_follow, args=(name, *rest), name=name, daemon=True)
        for name in cfg.trackers
    ]
    with contextlib.redirect_stdout(quiet):
        for thread in threads:
            thread.start()
        try:
            yield
            wait_s = PATIENCE_S
        finally:
            stop.set()
            for thread in threads:
                thread.join(wait_s)
            if slow := " and ".join(thread.name for thread in threads if thread.is_alive()):
                tell(f"note      {slow} has not taken all of it yet: metrics.jsonl has it")
                atexit.register(_end)  # before what the tracker wants to do at the end, and waits


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(DONE)


def _open(name: str, cfg: TrainConfig, out_dir: Path) -> Any:
    """Start a tracker, an accelerate.tracking.GeneralTracker; it may wait for a network."""
    import accelerate
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    accelerate.PartialState(cpu=True)  # a rank of the group that exists; no GPU is touched
    project = name if name == "tensorboard" else cfg.project_name
    tracker = LOGGER_TYPE_TO_CLASS[name](project, **_arguments(name, cfg, out_dir))
    tracker.start()
    tracker.store_init_configuration({key: getattr(cfg, key) for key in SETTINGS})
    return tracker


def _arguments(name: str, cfg: TrainConfig, out_dir: Path) -> dict[str, Any]:
    """What keeps a tracker inside the run directory, quiet, and names the run."""
    named = {"name": out_dir.name, **cfg.tracker_options}
    entity = named.pop("entity", None)
    if name == "wandb":
        import wandb

        known = getattr(wandb.Settings, "model_fields", WANDB_QUIET)  # they differ by release
        quiet = {key: value for key, value in WANDB_QUIET.items() if key in known}
        place = {"dir": str(out_dir), "settings": wandb.Settings(**quiet)}
        return {**named, **place, "entity": entity}
    if name == "trackio":
        os.environ.setdefault("TRACKIO_DIR", str(out_dir / "trackio"))  # read at import
        return {**named, **TRACKIO_QUIET}
    if name == "swanlab":
        import swanlab

        probe = swanlab.Settings.Probe(**dict.fromkeys(PROBES, False))
        terminal = swanlab.Settings.Terminal(proxy_type="none")
        settings = swanlab.Settings(interactive=False, probe=probe, terminal=terminal)
        place = {"log_dir": str(out_dir / "swanlab"), "settings": settings}
        return {**named, **place, "workspace": entity}
    simple: dict[str, dict[str, Any]] = {
        # A resumed run is told again from its first step: what an earlier file says is hidden.
        "tensorboard": {"logging_dir": str(out_dir), "purge_step": 0},
        "mlflow": {"run_name": named["name"]},
        "aim": {"logging_dir": str(out_dir)},
        "dvclive": {"dir": str(out_dir / "dvclive")},
    }
    return simple.get(name, {})
