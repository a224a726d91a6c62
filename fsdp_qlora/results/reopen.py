"""A finished run, opened again: its base with the adapter on top, on one card or a CPU."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora import arch
from fsdp_qlora.config import Config, parse
from fsdp_qlora.errors import UserError
from fsdp_qlora.train.ranks import find_port

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Opened:
    """A model that answers.

    Attributes:
        cfg: of the run.
        info: the base.
        world: this one process.
        model: a PackedModel in evaluation mode, its adapter not loaded yet: it computes the base.
        adapter: file with the adapter, or None.
    """

    cfg: Config
    info: arch.ModelInfo
    world: Any
    model: Any
    adapter: Path | None

    def load_adapter(self) -> None:
        """Put the adapter on top of the base; nothing without one."""
        from fsdp_qlora.model import adapters

        if self.adapter is not None:
            device = self.world.device
            adapters.load(self.model, self.adapter, self.info.layers_prefix, device)


def config_of(adapter: Path | None, flags: list[str]) -> Config:
    """The run that made an adapter, or what is known of it.

    Args:
        adapter: directory with adapter_config.json, and run_config.json if train.py made it.
        flags: of train.py; they stand above what the directory says.

    Returns:
        The configuration, for one process.

    Raises:
        UserError: the directory holds no LoRA adapter (code 2).
    """
    known: dict[str, Any] = {}
    if adapter is not None:
        lora = _read(adapter / "adapter_config.json")
        if lora.get("peft_type") != "LORA" or not (adapter / ADAPTER).is_file():
            raise UserError(
                f"--adapter {adapter}", "must hold a LoRA adapter of peft", f"look for {ADAPTER}"
            )
        if (adapter / "run_config.json").is_file():
            known |= _read(adapter / "run_config.json")
        targets = lora["target_modules"]
        known |= {
            "model_name": known.get("model_name") or lora["base_model_name_or_path"],
            "lora_rank": lora["r"],
            "lora_alpha": lora["lora_alpha"],
            "use_rslora": lora.get("use_rslora", False),
            "lora_target_modules": targets if isinstance(targets, str) else ",".join(targets),
        }
    fields = {field.name for field in dataclasses.fields(Config)}
    fixed = {"world_size": 1, "recipe": None, "output_dir": str(adapter or "output"), "fit": "off"}
    given = parse(flags)
    defaults = parse([])
    values = {name: value for name, value in {**known, **fixed}.items() if name in fields}
    values |= {
        name: getattr(given, name)
        for name in fields - set(fixed)
        if getattr(given, name) != getattr(defaults, name)
    }
    return dataclasses.replace(defaults, **values)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not JSON"
        raise UserError(
            str(path), f"cannot be read: {reason}", "give an adapter's directory"
        ) from None


def open_run(adapter: Path | None, flags: list[str]) -> Opened:
    """Build the base of a run in this process, without its adapter.

    Args:
        adapter: directory of the adapter; None for a bare base.
        flags: of train.py.

    Returns:
        The model.

    Raises:
        UserError: see `config_of`, arch.read and model.build.
    """
    cfg = config_of(adapter, flags)
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(ranks, MASTER_PORT=str(find_port(None)))
    from fsdp_qlora.model.build import build
    from fsdp_qlora.train import world as worlds

    world = worlds.join(cfg.gpu_budget_gib, cfg.seed)
    model = build(cfg, info, world).model.eval()
    return Opened(cfg, info, world, model, None if adapter is None else adapter / ADAPTER)
