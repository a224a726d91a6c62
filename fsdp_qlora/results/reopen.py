"""A finished run, opened again: its base with the adapter on top, on cards or a CPU."""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora import arch, config
from fsdp_qlora.arch import trained
from fsdp_qlora.config import Config
from fsdp_qlora.distributed.env import child_env, find_port, is_rank, plan_ranks, rank_env
from fsdp_qlora.errors import DONE
from fsdp_qlora.results import adapter_files

POLL_S = 0.1


@dataclass(frozen=True)
class Opened:
    """A model that answers.

    Attributes:
        cfg: of the run.
        info: the base.
        world: this process among the ranks.
        model: a PackedModel in evaluation mode, its adapter not loaded yet: it computes the base.
        adapter: file with the adapter, or None.
    """

    cfg: Config
    info: arch.ModelInfo
    world: Any
    model: Any
    adapter: Path | None

    @property
    def is_writer(self) -> bool:
        """Whether this rank speaks and writes."""
        return self.world.rank == 0

    def load_adapter(self) -> None:
        """Put the adapter on top of the base; nothing without one."""
        from fsdp_qlora.model import adapters

        if self.adapter is not None:
            device = self.world.device
            adapters.load(self.model, self.adapter, self.info.layers_prefix, device)


def config_of(adapter: Path | None, flags: list[str]) -> Config:
    """The run that made an adapter, or what is known of it.

    Args:
        adapter: directory with adapter_config.json, and run_config.json if train.py made it; None
            for a model by itself, which is computed in 16 bit, as it is stored.
        flags: of train.py; they stand above what the directory says.

    Returns:
        The configuration, for one rank if the flags do not say more.

    Raises:
        UserError: the directory holds no LoRA adapter (code 2), or wrong flags.
    """
    known: dict[str, Any] = {"train_type": "lora"}
    if adapter is not None:
        known = adapter_files.options(adapter_files.read(adapter))
    given = config.parse(flags)
    known |= {name: getattr(given, name) for name in config.given(flags)}
    known |= {"output_dir": str(adapter or "output"), "fit": "off"}
    known["world_size"] = max(given.world_size, 1)
    return dataclasses.replace(config.parse([]), **known)


def is_parent(cfg: Config) -> bool:
    """Return whether this process has to start ranks, and is none itself.

    Args:
        cfg: world_size.
    """
    return cfg.world_size > 1 and not is_rank(os.environ)


def spread(verb: str, argv: list[str], cfg: Config) -> int:
    """Run a verb on several ranks of this machine; rank 0 has the terminal.

    Args:
        verb: its name.
        argv: its arguments.
        cfg: world_size.

    Returns:
        Exit code: of the first rank that failed, whose words are printed.

    Raises:
        UserError: more ranks than GPUs.
    """
    num_ranks, port = plan_ranks(cfg), find_port(None)
    command = [sys.executable, "-m", "fsdp_qlora", verb, *argv]
    ranks: list[subprocess.Popen] = []
    with tempfile.TemporaryFile("w+") as words:
        try:
            for rank in range(num_ranks):
                env = child_env(os.environ, rank, num_ranks, port)
                stdin, out = (subprocess.DEVNULL, words) if rank else (None, None)
                process = subprocess.Popen(command, env=env, stdin=stdin, stdout=out, stderr=out)
                ranks.append(process)
            while None in [rank.poll() for rank in ranks] and not any(r.returncode for r in ranks):
                time.sleep(POLL_S)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if ranks[0].returncode in (DONE, -9) and any(rank.returncode for rank in ranks):
            words.seek(0)
            print("".join(words.readlines()[-1:]), end="", file=sys.stderr)
    return next((rank.returncode for rank in ranks if rank.returncode > 0), DONE)


def open_run(adapter: Path | None, cfg: Config) -> Opened:
    """Build the base of a run on this rank, without its adapter.

    Args:
        adapter: directory of the adapter; None for a bare base.
        cfg: see `config_of`.

    Returns:
        The model.

    Raises:
        UserError: see arch.read and model.build.
    """
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    cfg = trained.adopt_format(cfg, info.stored_format, frozenset())
    if is_rank(os.environ):
        os.environ.update(rank_env(os.environ, cfg))
    else:
        os.environ.update(child_env({}, 0, 1, find_port(None)))
    from fsdp_qlora.distributed import world as worlds
    from fsdp_qlora.model.load import build

    world = worlds.join(cfg.gpu_budget_gib, cfg.seed)
    model = build(cfg, info, world).model.eval()
    file = None if adapter is None else adapter / adapter_files.WEIGHTS_NAME
    return Opened(cfg, info, world, model, file)
