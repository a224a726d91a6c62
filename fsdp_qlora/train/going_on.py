"""Where a run starts: anew, or after a checkpoint that belongs to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora import config
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import Config
from fsdp_qlora.data import Data
from fsdp_qlora.distributed.world import World
from fsdp_qlora.train import fingerprint, resume, snapshot
from fsdp_qlora.train.checkpoint_files import Saved
from fsdp_qlora.train.totals import Resumed
from fsdp_qlora.train.versions import versions
from fsdp_qlora.training.loop import Trained


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        facts: of the run, for every checkpoint.
        saved: what it goes on from; None: it starts anew.
        lines: for the user.
    """

    facts: dict[str, Any]
    saved: Saved | None = None
    lines: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps that were taken before."""
        return 0 if self.saved is None else self.saved.step

    def restore(self, trained: Trained) -> None:
        """Put what was saved into a model and its optimizer, built as for a new run."""
        if self.saved is not None:
            snapshot.restore(trained, self.saved)

    def record(self, output_dir: Path, is_writer: bool) -> Resumed:
        """Cut what was recorded and saved after the checkpoint, on the rank that writes.

        Args:
            output_dir: of the run.
            is_writer: this rank does.

        Returns:
            What the record goes on with.
        """
        if self.saved is None or not is_writer:
            return Resumed()
        resume.settle(output_dir, self.step)
        lines = resume.cut_record(output_dir / resume.METRICS, self.step)
        return Resumed(lines, self.saved.state.get("total_s", 0.0))


def find(
    cfg: Config, given: frozenset[str], info: ModelInfo, base: str | None, data: Data, world: World
) -> Start:
    """Find where a run starts, and see that it is the same run; then write its configuration.

    Args:
        cfg: the run, with what was chosen for it.
        given: names of the options that the user wrote.
        info: the model.
        base: digest of its files.
        data: what is learned.
        world: the ranks.

    Raises:
        UserError: base, adapter or data are not those of the checkpoint (code 2).
    """
    mine = fingerprint.of_config(cfg, info, base, world.size) | fingerprint.of_data(data)
    libraries, num_steps = versions(world.device), data.train.num_steps
    saved, lines = resume.saved_of(cfg), []
    if saved is not None:
        lines = [f"resume    {saved.path}: {saved.step} of {num_steps} steps are done"]
        lines += fingerprint.check(saved.state["fingerprint"], mine, cfg.allow_data_change)
        lines += fingerprint.library_notes(saved.state.get("versions", {}), libraries)
        if saved.state["num_ranks"] != world.size:
            ranks = f"{saved.state['num_ranks']} ranks, now {world.size}"
            lines.append(f"resume    {ranks}: the same steps to rounding, not bit for bit")
    if world.rank == 0:
        config.save(cfg, cfg.resolved_output_dir / "run_config.json", libraries)
    facts = {
        "num_steps": num_steps,
        "config": config.to_dict(cfg),
        "given": sorted(given),
        "fingerprint": mine,
        "versions": libraries,
    }
    return Start(facts, saved, tuple(lines))
