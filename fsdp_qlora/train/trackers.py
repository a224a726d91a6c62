"""The record of a run in TensorBoard or Weights & Biases, beside metrics.jsonl.

A thread of rank 0 reads metrics.jsonl as it grows and hands on what stands in the lists below:
figures and choices, no path, no text of the user's, no secret. Training never waits for it, and
when the tracker fails or is out of reach nothing is lost: metrics.jsonl has it all.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fsdp_qlora.config import TRACKERS, Config
from fsdp_qlora.errors import DONE, one_line

FIGURES = (
    *("loss", "learning_rate", "grad_norm", "epoch", "tokens_per_s", "step_s"),
    *("num_tokens", "num_trained_tokens"),
)
HELD_OUT = ("loss", "perplexity")
SETTINGS = (
    *("train_type", "precision", "quant_type", "double_quant", "n_bits", "lora_rank", "lora_alpha"),
    *("lora_dropout", "use_rslora", "context_length", "packing", "batch_size", "num_epochs"),
    *("gradient_accumulation_steps", "max_steps", "lr", "lr_scheduler", "warmup_steps", "wd"),
    *("optimizer", "apply_gradient_clipping", "grad_norm", "seed", "world_size"),
    *("sharding_strategy", "use_cpu_offload", "use_gradient_checkpointing"),
)
# Of wandb: nothing but what we hand on, and nothing on the terminal.
QUIET = {
    **{"console": "off", "silent": True, "disable_git": True, "disable_code": True},
    **{"x_disable_meta": True, "x_disable_stats": True, "disable_job_creation": True},
    **{"x_save_requirements": False, "x_disable_machine_info": True},
}
POLL_S = 1.0
PATIENCE_S = 15.0  # for the tracker to take the rest, once the run is over
SHORT_S = 1.0  # the same, when the run has failed
Put = Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class Sink:
    """A tracker that is open.

    Args:
        put: takes figures by name, and the optimizer step.
        close: ends it, when all has been taken.
    """

    put: Put
    close: Callable[[], None]


@dataclass
class Follower:
    """Reads a record as it grows.

    Attributes:
        path: metrics.jsonl.
        open_sink: opens the tracker; called in the thread, for it may wait for a network.
        stop: set when no more lines will come.
        failure: why the tracker is not used any more, or "".
    """

    path: Path
    open_sink: Callable[[], Sink]
    stop: threading.Event = field(default_factory=threading.Event)
    failure: str = ""

    def run(self, tell: Callable[[str], None]) -> None:
        """Hand on every line until the end; a fault of the tracker ends this, not the run.

        Args:
            tell: says a line to the user.
        """
        try:
            sink, step = self.open_sink(), 0
            for line in self._lines():
                step = int(line.get("step") or step)
                if values := figures(line):
                    sink.put(values, step)
            sink.close()
        except BaseException as error:  # wandb leaves by SystemExit too
            self.failure = one_line(str(error).partition("\n")[0]) or type(error).__name__
            tell(f"note      the tracker failed ({self.failure}): metrics.jsonl goes on")

    def _lines(self) -> Iterator[dict[str, Any]]:
        rest, is_over = "", False
        with self.path.open(encoding="utf-8") as file:
            while not is_over:
                is_over = self.stop.wait(POLL_S)  # before the look: what was written then is read
                *whole, rest = (rest + file.read()).split("\n")
                yield from map(json.loads, whole)


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker gets of a line of metrics.jsonl.

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
        cards = [rank.get("device_peak_reserved_gib") or 0.0 for rank in line.get("ranks", ())]
        found |= {"memory/card_gib": max(cards, default=0.0) or None}
        found |= {"memory/host_gib": line.get("host", {}).get("host_used_gib")}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def followed(
    cfg: Config,
    out_dir: Path,
    is_writer: bool,
    tell: Callable[[str], None] = tqdm.write,
    patience_s: float = PATIENCE_S,
) -> Iterator[None]:
    """Hand the record on while the block runs; nothing where no tracker was asked for.

    Args:
        cfg: log_to, and how the run is named there.
        out_dir: of the run; metrics.jsonl is there.
        is_writer: this rank writes the record.
        tell: says a line to the user.
        patience_s: how long to wait for the tracker at the end.
    """
    if cfg.log_to not in TRACKERS or not is_writer:
        yield
        return
    follower = Follower(out_dir / "metrics.jsonl", lambda: OPENERS[cfg.log_to](cfg, out_dir))
    thread = threading.Thread(target=follower.run, args=(tell,), name="tracker", daemon=True)
    thread.start()
    wait_s = SHORT_S
    try:
        yield
        wait_s = patience_s
    finally:
        follower.stop.set()
        thread.join(wait_s)
        if thread.is_alive():
            tell(f"note      {cfg.log_to} has not taken all of it yet: metrics.jsonl has it")
            atexit.register(_end)  # before what the tracker wants to do at the end: it would wait


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(DONE)


def settings(cfg: Config) -> dict[str, Any]:
    """What a tracker gets of the configuration."""
    return {name: getattr(cfg, name) for name in SETTINGS}


def _tensorboard(cfg: Config, out_dir: Path) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    # A resumed run is told again from its first step: what an earlier file says is hidden.
    writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=0)
    rows = [f"| {name} | {value} |" for name, value in settings(cfg).items()]
    writer.add_text("settings", "\n".join(["| option | value |", "|---|---|", *rows]))

    def put(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Sink(put, writer.close)


def _wandb(cfg: Config, out_dir: Path) -> Sink:
    import wandb

    known = getattr(wandb.Settings, "model_fields", QUIET)  # they differ between releases
    quiet = wandb.Settings(**{name: value for name, value in QUIET.items() if name in known})
    run = wandb.init(
        project=cfg.project_name,
        **{"name": out_dir.name, **cfg.tracker_options},
        dir=str(out_dir),
        config=settings(cfg),
        settings=quiet,
    )
    return Sink(lambda values, step: run.log(values, step=step), run.finish)


OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb}
