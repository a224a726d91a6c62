"""The plan of a run on its ranks: all of them go by the plan that rank 0 has made."""

import os
from typing import TYPE_CHECKING

from fsdp_qlora import arch
from fsdp_qlora.arch import ModelInfo, trained
from fsdp_qlora.config import Config
from fsdp_qlora.plan import run as plans
from fsdp_qlora.plan.run import RunPlan
from fsdp_qlora.train.ranks import count_gpus, is_supervised, plan_ranks

if TYPE_CHECKING:
    from fsdp_qlora.train.world import World


def plan(cfg: Config, given: frozenset[str]) -> RunPlan:
    """Make the plan of a run on this machine, and say it; no torch.

    Args:
        cfg: the run as the user gave it.
        given: names of the options that the user wrote.

    Returns:
        The plan, of which the ranks will be told.

    Raises:
        UserError: no such model, more ranks than cards, or it does not fit (code 3).
    """
    info = _read(cfg)
    cfg = trained.adopt_format(cfg, info.stored_format, given)
    num_cards = count_gpus(os.environ)
    machine = plans.find_machine(os.environ, plan_ranks(cfg, num_cards), num_cards)
    found = plans.make(info, cfg, given, machine)
    plans.tell(found, lambda line: print(line, flush=True))
    return found


def _read(cfg: Config) -> ModelInfo:
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    arch.select_linears(info, cfg.lora_target_modules)
    return info


def agree(cfg: Config, given: frozenset[str], world: "World") -> RunPlan:
    """Make the plan of a run on one of its ranks: that of the supervisor, or of rank 0.

    Args:
        cfg: the run as the user gave it, its output directory agreed on.
        given: names of the options that the user wrote.
        world: the ranks; all of them must call.

    Returns:
        The plan, the same on every rank.

    Raises:
        UserError: it does not fit, or there is no such model; raised on every rank.
    """
    info = _read(cfg)
    cfg = trained.adopt_format(cfg, info.stored_format, given)
    if world.size != world.local_size:
        note = "off: a plan is made for one machine, and these ranks are on several"
        return plans.unplanned(info, cfg, note)
    num_cards = world.local_size if world.device.type == "cuda" else 0
    machine = plans.find_machine(os.environ, world.size, num_cards)
    machine = world.gather_objects(machine)[0]  # they have looked one after the other
    found = plans.make(info, cfg, given, machine, plans.notch_of(os.environ))
    if not is_supervised(os.environ):
        is_speaker = world.rank == 0
        plans.tell(found, lambda line: print(line, flush=True) if is_speaker else None)
    return found
