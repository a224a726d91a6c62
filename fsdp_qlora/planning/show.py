"""`python -m fsdp_qlora plan`: what a command line needs, as text of 100 columns or as JSON."""

import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from fsdp_qlora import arch, cli, config, hardware
from fsdp_qlora.arch import ModelInfo, trained
from fsdp_qlora.cli import flag
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig, cfg_notes, to_dict
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError, join
from fsdp_qlora.hardware import GIB, Machine
from fsdp_qlora.planning import fit, rows
from fsdp_qlora.planning.fit import Outcome
from fsdp_qlora.planning.rows import Table, Term
from fsdp_qlora.planning.sizes import Sizes, applied, setting_for

WIDTH = 100
WORTH = 1.03  # another setting is worth telling when it is this much faster
TRAINED = {"lora": "adapter   LoRA r {}", "dora": "adapter   DoRA r {}"}
TRAINED |= {"llama_pro": "trained   new layers", "full": "trained   all weights"}
USAGE = """usage: python -m fsdp_qlora plan --model_name NAME [options] [any option of train.py]

Says how many GiB a run needs on each GPU and on the host, whether it fits, how long it takes,
and what to change. Reads config.json only. Exit code 0: it fits, 3: it does not."""
IMAGINED = "2x24"
ALIASES = {"gpus": cli.Alias("cards")}


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The options that `plan` has besides those of train.py."""

    cards: str = flag("auto", "plan", "2x24, 2x3090, 3090,4060Ti-16G, none; auto: those here")
    host: float | None = flag(None, "plan", "GiB of host memory [this machine's]", rule="> 0")
    link: float | None = flag(None, "plan", "GB/s from host to each GPU", rule="> 0")
    explain: bool = flag(False, "plan", "show the formula of every row, numbers filled in")
    json: bool = flag(False, "plan", "print JSON")


def parse(argv: Sequence[str]) -> tuple[PlanOptions, TrainConfig, Machine]:
    """Read a command line.

    Args:
        argv: arguments without the command.

    Returns:
        The plan's own options, the run, and the machine to plan for.

    Raises:
        UserError: every fault at once.
        SystemExit: code 0 after printing the help.
    """
    cli.show_help_if_asked(argv, PlanOptions, USAGE)
    own, rest = _split(argv, {*cli.options(PlanOptions), *ALIASES})
    values, faults = cli.Reader(PlanOptions, ALIASES).read(own)
    options, cfg, machine = PlanOptions(**values), TrainConfig(), Machine(())
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


def machine_of(options: PlanOptions, cfg: TrainConfig) -> Machine:
    """The machine to plan for: as given, else this one, else an imagined one of two 24 GB GPUs.

    Args:
        options: GPUs, host, link.
        cfg: world_size, fewer ranks than there are GPUs.

    Raises:
        UserError: an unknown GPU, or more ranks than GPUs.
    """
    found, host_gib = [], options.host
    if options.cards == "auto":
        found = hardware.find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if found and host_gib is None:
            host_gib = hardware.host_limit_gib()
    if not found:
        found = hardware.parse_gpus(IMAGINED if options.cards == "auto" else options.cards)
    if found and cfg.world_size > len(found):
        rule = f"there are {len(found)} GPUs, and a rank needs one"
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
    values = as_dict(info, cfg, machine, found)
    whole = text(cfg, machine, found, values, options.explain)
    print(json.dumps(values, indent=1) if options.json else whole)
    return DONE if found.fits else ENVIRONMENT


def as_dict(info: ModelInfo, cfg: TrainConfig, machine: Machine, found: Outcome) -> dict[str, Any]:
    """The whole plan as JSON knows it.

    Args:
        info: the model.
        cfg: the run.
        machine: what there is.
        found: what becomes of the run there.

    Returns:
        GiB by phase and row, limits, speed, and what to do: `better` where something is faster,
        `to_fit` where the run does not fit, `nearest` for the setting that asks least.
    """
    setting, num_steps = found.setting, fit.num_steps(Sizes(info, cfg), found.setting)
    outcomes = fit.explore(info, cfg, machine)
    best, nearest = fit.choose(outcomes), fit.least(outcomes)
    if best is not None and found.fits and best.speed.step_s * WORTH > found.speed.step_s:
        best = None
    to_fit = [] if found.fits else fit.changes(info, cfg, machine)
    return {
        "model": cfg.model_name,
        "format": cfg.format_name,
        "num_params": arch.num_params(info),
        "num_trained": trained.count(info, cfg),
        "cards": [gpu.name for gpu in machine.gpus],
        "num_ranks": machine.num_ranks,
        "batch_size": setting.batch_size,
        "accumulation": setting.accumulation,
        "context_length": cfg.context_length,
        "placements": {name: setting.count(name) for name in setting.placements},
        "levels": {name: setting.count(name) for name in setting.levels},
        "fits": found.fits,
        "card": _memory(found.device, found.gpu_limit_gib),
        "host": _memory(found.host, found.host_limit_gib),
        **dataclasses.asdict(found.speed),
        "num_steps": num_steps,
        "eta_s": None if num_steps is None else num_steps * found.speed.step_s,
        "better": best and _brief(cfg, applied(cfg, best.setting), best, found),
        "nearest": _brief(cfg, applied(cfg, nearest.setting), nearest, found),
        "to_fit": [
            {"words": item.words, "lost": item.lost, **_brief(cfg, item.cfg, item.outcome, found)}
            for item in to_fit
        ],
    }


def _memory(table: Table, limit_gib: float | None) -> dict[str, Any]:
    return {
        "limit_gib": limit_gib,
        "peak_gib": table.peak_gib,
        "peak_phase": table.peak_phase,
        "reserved_gib": table.reserved_gib,
        "allocated_gib": table.allocated_gib,
        "phases_gib": table.to_dict(),
        "totals_gib": {phase: table.total_gib(phase) for phase in rows.PHASES},
    }


def _brief(
    cfg: TrainConfig, changed: TrainConfig, outcome: Outcome, found: Outcome
) -> dict[str, Any]:
    """Another way to run it: what to add to the command line, and what that gives."""
    return {
        "flags": changes(cfg, changed),
        "speed": outcome.speed.tokens_per_s / found.speed.tokens_per_s,
        "card_gib": outcome.device.peak_gib,
        "host_gib": outcome.host.peak_gib,
    }


def changes(old: TrainConfig, new: TrainConfig) -> dict[str, str]:
    """The options that make one run of another, as a command line has them.

    Args:
        old, new: the runs.
    """
    before, after = to_dict(old), to_dict(new)
    return {name: str(after[name]).lower() for name in after if after[name] != before[name]}


def text(
    cfg: TrainConfig, machine: Machine, found: Outcome, values: dict[str, Any], full: bool
) -> str:
    """The plan for a terminal.

    Args:
        cfg, machine, found: see as_dict.
        values: of as_dict.
        full: also what every row is made of.

    Returns:
        Lines of at most 100 columns.
    """
    kind, setting = TRAIN_TYPES[cfg.train_type].adapter, found.setting
    lines = [
        f"model     {values['model']}: {values['num_params']:,} parameters, "
        f"{len(setting.levels)} layers in {values['format']}",
        f"{TRAINED[kind].format(cfg.lora_rank)}: {values['num_trained']:,} trained parameters",
        f"step      ranks {values['num_ranks']} x micro-batches {values['accumulation']} x rows "
        f"{values['batch_size']} x tokens {values['context_length']}",
        f"layers    {counts(setting.placements)}; checkpointing {counts(setting.levels)}",
    ]
    place = "GPU" if machine.gpus else "CPU rank"
    for title, names, table in (
        (f"GiB on each {place}", rows.DEVICE_ROWS, found.device),
        ("GiB on the host, all programs", rows.HOST_ROWS, found.host),
    ):
        lines += ["", *_table(title, names, table), *(_terms(names, table) if full else [])]
    return "\n".join([*lines, "", *summary(cfg, machine, found, values)])


def counts(names: Sequence[str]) -> str:
    """Numbers of layers in words.

    Args:
        names: placement or level of each layer.
    """
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _table(title: str, names: Sequence[str], table: Table) -> list[str]:
    lines = [f"{title:<48}" + "".join(f"{phase:>10}" for phase in rows.PHASES)]
    found = {name: [table.gib(phase, name) for phase in rows.PHASES] for name in names}
    found["total"] = [table.total_gib(phase) for phase in rows.PHASES]
    for name, values in found.items():
        cells = (f"{value:10.2f}" if value >= 0.005 else f"{'-':>10}" for value in values)
        if max(values) >= 0.005:
            lines.append(f"  {name:<46}" + "".join(cells))
    return lines


def _terms(names: Sequence[str], table: Table) -> list[str]:
    """Every row in the phase where it is largest, with the products it is the sum of."""
    lines = [""]
    for name in names:
        phase = max(rows.PHASES, key=lambda item: table.gib(item, name))
        if table.gib(phase, name):
            lines.append(f"  {name} ({phase}): {table.gib(phase, name):.2f} GiB")
            lines += [line for item in table.phases[phase][name] for line in _term(item)]
    return lines


def _term(item: Term) -> list[str]:
    product = ""
    for unit, number in item.factors:
        sign = " / " if unit.startswith("per_") else " x "
        if number != 1 or len(item.factors) == 1:
            product += f"{sign}{_number(number)} {unit.removeprefix('per_')}"
    line = f"{item.what}: {product[3:]} = {item.nbytes / GIB:.3f} GiB"
    return textwrap.wrap(line, WIDTH, initial_indent="      ", subsequent_indent="        ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def brief(machine: Machine, found: Outcome) -> list[tuple[str, str]]:
    """What train.py says before a run.

    Args:
        machine, found: see as_dict.

    Returns:
        (name, words) of each line: does it fit, and on GPUs how long a step takes.
    """
    lines = [_fit_line(machine, found)]
    if machine.gpus:
        guess = found.speed
        words = f"{_pace(guess.step_s, guess.tokens_per_s)}, were every row full length"
        lines.append(("time", f"{words}; bottleneck: {guess.bound}"))
    return lines


def _pace(step_s: float, tokens_per_s: float) -> str:
    return f"about {_number(step_s)} s a step, {tokens_per_s:,.0f} tokens/s total"


def summary(
    cfg: TrainConfig, machine: Machine, found: Outcome, values: dict[str, Any]
) -> list[str]:
    """What a plan comes to; train.py prints it too.

    Args:
        cfg, machine, found: see as_dict.
        values: of as_dict.

    Returns:
        A few lines of at most 100 columns.
    """
    lines = [_fit_line(machine, found), *_time(machine, values)]
    better, nearest = values["better"], values["nearest"]
    for number, item in enumerate(values["to_fit"], 1):
        lost = f"; without {item['lost']}" * bool(item["lost"])
        cost = f"({item['speed']:.2f}x its speed{lost})"
        lines.append(("to fit", f"{number}. {item['words']}: {flags(item['flags'])} {cost}"))
    if better:
        cost = f"{better['speed']:.2f}x its speed in {better['card_gib']:.1f} GiB"
        lines.append(("best" if found.fits else "or best", f"{cost}: {flags(better['flags'])}"))
    elif found.fits:
        lines.append(("best", "nothing faster fits: room for longer rows or a larger batch_size"))
    elif not values["to_fit"]:
        words = "no two changes are enough: take other GPUs, more memory or a smaller model; "
        words += f"nearest: {nearest['card_gib']:.1f} GiB a GPU, {nearest['host_gib']:.1f} on the "
        lines.append(
            ("to fit", f"{words}host by {flags(nearest['flags']) or 'what was asked for'}")
        )
    lines += [
        ("note", f"a {gpu.name} has no bfloat16 matmuls: several times slower than in float16")
        for gpu in dict.fromkeys(machine.gpus)
        if not gpu.has_bf16 and cfg.compute_dtype == "bfloat16"
    ]
    lines += [("note", note) for note in cfg_notes(cfg)]
    return wrapped(lines)


def wrapped(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of (name, words), the names in a column of their own, at most WIDTH columns wide."""
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False)
    return [line for name, words in lines for line in wrap.wrap(f"{name:<10}{words}")]


def flags(changed: dict[str, str]) -> str:
    """The options of `changes` as a command line has them."""
    return " ".join(f"--{name} {value}" for name, value in changed.items())


def _fit_line(machine: Machine, found: Outcome) -> tuple[str, str]:
    places = [("the host", found.host, found.host_limit_gib, found.host_free_gib)]
    if machine.gpus:
        smallest = min(machine.gpus, key=lambda gpu: gpu.memory_gib).name
        place = (f"a {smallest}", found.device, found.gpu_limit_gib, found.gpu_free_gib)
        places.insert(0, place)
    parts = []
    for name, table, limit_gib, free_gib in places:
        size, left = "", ""
        if limit_gib is not None:
            size = f" of {limit_gib:.1f}"
            left = f": {free_gib:.1f} free" if free_gib >= 0 else f": {-free_gib:.1f} MISSING"
        parts.append(f"{table.peak_gib:.1f}{size} GiB on {name} ({table.peak_phase}){left}")
    is_tight = found.fits and not found.fits_safely
    tight = "; predictions err by as much as is left" if is_tight else ""
    return "fits" if found.fits else "NO FIT", "; ".join(parts) + tight


def _time(machine: Machine, values: dict[str, Any]) -> list[tuple[str, str]]:
    parts = sorted(values["parts_s"].items(), key=lambda item: -item[1])
    alone = ", ".join(f"{name} {_number(seconds)} s" for name, seconds in parts if seconds > 0.01)
    is_measured = machine.gpus and all(gpu.is_measured for gpu in machine.gpus)
    words = f"{_pace(values['step_s'], values['tokens_per_s'])}; bottleneck: {values['bound']} "
    words += f"(alone: {alone}; by {'measured' if is_measured else 'tabled'} speeds)"
    lines = [("time", words)]
    if values["eta_s"] is not None:
        minutes = max(round(values["eta_s"] / 60), 1)
        words = f"at most {minutes // 60} h {minutes % 60:02} min for {values['num_steps']:,} steps"
        lines.append(("ETA", f"{words}, were every row full length"))
    return lines
