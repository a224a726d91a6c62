"""`python -m fsdp_qlora plan`: what a command line of train.py needs, before a weight is read."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from fsdp_qlora import arch, cli, config, hardware
from fsdp_qlora.arch import trained
from fsdp_qlora.cli import flag
from fsdp_qlora.config import Config
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError, join
from fsdp_qlora.hardware import Machine
from fsdp_qlora.plan import fit, show
from fsdp_qlora.plan.sizes import setting_for

USAGE = """usage: python -m fsdp_qlora plan --model_name NAME [options] [any option of train.py]

Says how many GiB a run needs on each card and on the host, whether it fits, how long it takes,
and what to change. Reads config.json only. Exit code 0: it fits, 3: it does not."""
IMAGINED = "2x24"


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that `plan` has besides those of train.py."""

    cards: str = flag("auto", "plan", "2x24, 2x3090, 3090,4060Ti-16G, none; auto: those here")
    host: float | None = flag(None, "plan", "GiB of host memory [this machine's]", rule="> 0")
    link: float | None = flag(None, "plan", "GB/s from host to each card", rule="> 0")
    explain: bool = flag(False, "plan", "show the formula of every row, numbers filled in")
    json: bool = flag(False, "plan", "print JSON")


def parse(argv: Sequence[str]) -> tuple[Options, Config, Machine]:
    """Read a command line.

    Args:
        argv: arguments without the verb.

    Returns:
        The plan's own options, the run, and the machine to plan for.

    Raises:
        UserError: every fault at once.
        SystemExit: code 0 after printing the help.
    """
    cli.show_help_if_asked(argv, Options, USAGE)
    own, rest = _split(argv, {field.name for field in dataclasses.fields(Options)})
    values, faults = cli.Reader(Options).read(own)
    options, cfg, machine = Options(**values), Config(), Machine(())
    try:
        cfg = config.parse(rest, say=lambda line: print(line, file=sys.stderr))
    except UserError as fault:
        faults.append(fault)
    try:
        machine = machine_of(options, cfg)
    except UserError as fault:
        faults.append(fault)
    if faults:
        raise join(faults)
    return options, cfg, machine


def _split(argv: Sequence[str], own_names: set[str]) -> tuple[list[str], list[str]]:
    """The words of the plan's own options, and all others."""
    parts: tuple[list[str], list[str]] = ([], [])
    is_own = False
    for word in argv:
        if word.startswith("--"):
            is_own = word[2:].partition("=")[0].replace("-", "_") in own_names
        parts[0 if is_own else 1].append(word)
    return parts


def machine_of(options: Options, cfg: Config) -> Machine:
    """The machine to plan for: as given, else this one, else an imagined one of two 24 GB cards.

    Args:
        options: cards, host, link.
        cfg: world_size, fewer ranks than there are cards.

    Raises:
        UserError: an unknown card, or more ranks than cards.
    """
    found, host_gib = [], options.host
    if options.cards == "auto":
        found = hardware.find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if found and host_gib is None:
            host_gib = hardware.host_limit_gib()
    if not found:
        found = hardware.parse_gpus(IMAGINED if options.cards == "auto" else options.cards)
    if found and cfg.world_size > len(found):
        rule = f"there are {len(found)} cards, and a rank needs one"
        raise UserError(f"--world_size {cfg.world_size}", rule, "name more with --cards")
    num = cfg.world_size if cfg.world_size > 0 else max(len(found), 1)
    measured = hardware.with_measured(found[:num], hardware.machine_file(), options.link)
    return Machine(tuple(measured), host_gib, num, cpu=hardware.measured_cpu())


def main(argv: list[str]) -> int:
    """Print the plan of a run.

    Args:
        argv: see USAGE.

    Returns:
        0 when it fits, 3 when not.

    Raises:
        UserError: a bad option, or no such model.
    """
    options, cfg, machine = parse(argv)
    info = arch.read(cfg.model_name, need_weights=False)
    cfg = trained.adopt_format(cfg, info.stored_format)
    setting = setting_for(info, cfg, machine.num_ranks)
    found = fit.evaluate(info, cfg, setting, machine)
    values = show.as_dict(info, cfg, machine, found)
    whole = show.text(cfg, machine, found, values, options.explain)
    print(json.dumps(values, indent=1) if options.json else whole)
    return DONE if found.fits else ENVIRONMENT
