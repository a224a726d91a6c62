"""The plan of a run: what the user left open is chosen, what cannot fit is refused, all is shown.

`python -m fsdp_qlora plan` prints it as text of 100 columns or as JSON, train.py a summary of it.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fsdp_qlora import arch, cli, config, hardware
from fsdp_qlora.arch import ModelInfo, targets
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig, cfg_notes, to_dict
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError, refuse
from fsdp_qlora.hardware import GIB, Device, Machine
from fsdp_qlora.planning import fit, memory, rows, sizes
from fsdp_qlora.planning.fit import Outcome, Speed
from fsdp_qlora.planning.sizes import Sizes, adopt_format, applied, count_trained, setting_for

ENV = "FSDP_QLORA_PLAN"  # what the ranks need of the supervisor to plan for the same machine
GROUPS = (fit.BATCHING, fit.KEEPING, fit.PLACING)
UNKNOWN = dataclasses.replace(hardware.GPUS["3090"], name="unknown GPU", memory_gib=math.inf)
WIDTH = 100
WORTH = 1.03  # another setting is worth telling when it is this much faster
WORDS = rows.WORDS
IMAGINED = "2x24"
Values = dict[str, Any]  # as JSON has them
ALIASES = {"cards": cli.Alias("gpus", lambda text: text.replace(",", "+"))}  # a machine of both
ALIASES |= {"gpu": cli.Alias("gpus")}


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run of train.py will do, and what it will need.

    Args:
        cfg: the run, with what was chosen.
        asked: the run as the user gave it.
        info: the model.
        machine: what there is.
        candidates: the setting that was chosen and what to step down to, one after the other; empty
            where nothing is planned.
        fallback: number of the candidate that is taken.
        note: what was chosen, and why.
        rows_note: for which rows it was predicted, if not for full ones.
    """

    cfg: TrainConfig
    asked: TrainConfig
    info: ModelInfo
    machine: Machine
    candidates: tuple[Outcome, ...] = ()
    fallback: int = 0
    note: str = ""
    rows_note: str = ""

    @property
    def found(self) -> Outcome | None:
        """The setting that is taken; None where nothing is planned."""
        return self.candidates[self.fallback] if self.candidates else None

    @property
    def lower(self) -> "RunPlan | None":
        """The run with the next fallback; None: there is none."""
        fallback = self.fallback + 1
        if fallback >= len(self.candidates):
            return None
        taken = self.candidates[fallback]
        cfg, note = applied(self.asked, taken.setting), _note(taken, taken, fallback)
        return dataclasses.replace(self, cfg=cfg, fallback=fallback, note=note)

    def for_rows(self, most_tokens: int) -> "RunPlan":
        """The same run, predicted for its rows, which may be shorter than the context.

        Args:
            most_tokens: of a micro-batch of a rank.
        """
        found, cfg = self.found, self.cfg
        length = -(-most_tokens // (cfg.batch_size * (1 + (cfg.num_answers == 2))))
        if found is None or length >= cfg.context_length:
            return self
        shorter, candidates = dataclasses.replace(cfg, context_length=length), list(self.candidates)
        candidates[self.fallback] = fit.evaluate(self.info, shorter, found.setting, self.machine)
        words = f"predicted for the {most_tokens:,} tokens of the largest micro-batch"
        return dataclasses.replace(self, candidates=tuple(candidates), rows_note=words)

    @property
    def lines(self) -> list[str]:
        """What the user reads before the run: a few lines of at most 100 columns."""
        found, lines = self.found, [("fit", self.note)]
        if found is not None and self.machine.gpus:
            words = f"{_pace(found.speed)}, were every row full length"
            lines.insert(0, ("time", f"{words}; bottleneck: {found.speed.bound}"))
        lines += _experts(self)
        return _wrapped([_fit_line(self.machine, found), *lines] if found else lines)

    @property
    def env(self) -> dict[str, str]:
        """What the ranks need to make the same plan."""
        machine = dataclasses.asdict(self.machine)
        return {ENV: json.dumps({"machine": machine, "notch": self.fallback})}

    def to_dict(self) -> dict[str, Any]:
        """The prediction as the record has it; empty where nothing is planned."""
        found = self.found
        if found is None:
            return {}
        gpu, host, step_s = found.device, found.host, found.speed.step_s
        limit_gib = None if gpu.limit_gib == math.inf else gpu.limit_gib
        values: dict[str, Any] = {"device": gpu.to_dict(), "host": host.to_dict()}
        values |= {"peak_device_gib": gpu.peak_gib, "peak_host_gib": host.peak_gib}
        values |= {"device_limit_gib": limit_gib, "host_limit_gib": host.limit_gib}
        note = "; ".join(filter(None, [self.note, self.rows_note]))
        return values | {"step_s": step_s, "notch": self.fallback, "note": note}


def find_machine(env: Mapping[str, str], num_ranks: int, num_gpus: int) -> Machine:
    """What this machine has, or what the supervisor has found.

    Args:
        env: the environment.
        num_ranks: of the run.
        num_gpus: that the ranks will compute on, 0: on the CPU.

    Returns:
        One GPU a rank; where the driver does not report their memory, GPUs without a limit.

    Raises:
        UserError: the driver does not answer (code 3).
    """
    if ENV in env:
        given = json.loads(env[ENV])["machine"]
        found = [Device(**gpu) for gpu in given["gpus"]]
        return Machine(**given | {"gpus": tuple(found), "cpu": Device(**given["cpu"])})
    found = []
    if num_gpus:
        found = hardware.find_gpus(env.get("CUDA_VISIBLE_DEVICES"))
        found = (hardware.with_measured(found) + [UNKNOWN] * num_ranks)[:num_ranks]
        if env.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
            found = [dataclasses.replace(gpu, peer_gbs=0.0) for gpu in found]
    cgroup = hardware.find_cgroup()
    limit_gib, used_gib = hardware.host_limit_gib(cgroup), hardware.host_used_gib(cgroup)
    (cpu,) = hardware.with_measured([hardware.own_cpu()])
    return Machine(tuple(found), limit_gib, num_ranks, used_gib, cpu)


def fallback_of(env: Mapping[str, str]) -> int:
    """How many fallbacks the supervisor has taken.

    Args:
        env: the environment of a rank.
    """
    return json.loads(env[ENV])["notch"] if ENV in env else 0


def learning_rate(cfg: TrainConfig, info: ModelInfo) -> float:
    """Return the learning rate of a run: the user's, or one for the width of the model.

    Args:
        cfg: lr, train_type, optimizer.
        info: the model.

    Returns:
        For LoRA by Adam 5e-4 * (2000 / hidden_size) ** 0.781, in the range that is published for
        7B to 65B, a tenth of it for preferences (TRL: 1e-6 without LoRA); else 1e-5.

    Source: Schulman et al., LoRA Without Regret, 2025 (the law; alpha 32, LoRA on all linears);
        QLoRA, arXiv 2305.14314 (1e-4 to 2e-4). Measured: recipes/defaults.md.
    """
    has_lora = TRAIN_TYPES[cfg.train_type].adapter in ("lora", "dora")
    if cfg.lr is not None or not has_lora or "adam" not in cfg.optimizer:
        return cfg.base_lr
    lr = min(max(float(f"{5e-4 * (2000 / info.hidden_size) ** 0.781:.1e}"), 1e-4), 5e-4)
    return float(f"{lr / 10:.2g}") if cfg.num_answers else lr


def settle(
    info: ModelInfo, cfg: TrainConfig, given: frozenset[str], machine: Machine
) -> tuple[TrainConfig, str]:
    """Choose what the model and the kind of machine decide, unless the user says otherwise.

    GPUs without bfloat16 compute in float16, CPUs in float32, the learning rate follows the width
    of the model, and frozen matmuls are in 8 bit where that is faster by what was measured: fp8 on
    GPUs as an H200, either on those that `doctor` has seen.

    Args:
        info, cfg, given, machine: see `make`.

    Returns:
        The run, and why its precision or matmuls are others: the end of a line, or "".
    """
    cfg, why = dataclasses.replace(cfg, lr=learning_rate(cfg, info)), ""
    lacking = [d.name for d in machine.gpus or (machine.cpu,) if not d.has_bf16]
    if lacking and "precision" not in given and cfg.compute_dtype == "bfloat16":
        precision, who = ("fp16_autocast", "a") if machine.gpus else ("fp32", "this")
        with contextlib.suppress(UserError):  # raised by options that need bfloat16
            cfg = dataclasses.replace(cfg, precision=precision)
            why = f"; precision {precision}, as {who} {lacking[0]} has no bfloat16"
    if cfg.matmul == "auto":
        gains = {"bf16": 1.0}
        for way in config.IN_8_BIT:
            gains[way] = min((gpu.known_gain(way) for gpu in machine.gpus), default=0.0)
        cfg = dataclasses.replace(cfg, matmul="bf16")
        with contextlib.suppress(UserError):  # raised by bases and precisions without 8 bit
            cfg = dataclasses.replace(cfg, matmul=max(gains, key=gains.__getitem__))
        why += f"; matmul {cfg.matmul}"
    return cfg, why


def make(
    info: ModelInfo, cfg: TrainConfig, given: frozenset[str], machine: Machine, fallback: int = 0
) -> RunPlan:
    """Plan a run, and choose what the user has left open: `settle`, then what fits.

    Args:
        info: the model.
        cfg: the run as the user gave it.
        given: names of the options that the user wrote; they stay as they are.
        machine: what there is.
        fallback: how often it has run out of memory before its first step.

    Returns:
        The plan; a run that does not fit is planned as it is.

    Raises:
        UserError: see check_context.
    """
    sizes.check_context(info, cfg, machine.num_ranks)
    cfg, why = settle(info, cfg, given, machine)
    own = fit.evaluate(info, cfg, setting_for(info, cfg, machine), machine)
    if refusal := _not_fitted(cfg, given, machine):
        return RunPlan(cfg, cfg, info, machine, (own,), 0, refusal + why)
    outcomes = fit.explore(info, cfg, machine, given)
    best = fit.choose(outcomes)
    if best is None:  # nothing fits with a margin: without one, as asked for if that fits
        fitting = [own] if own.fits else [item for item in outcomes if item.fits]
        best = max(fitting, key=lambda item: item.speed.tokens_per_s, default=own)
    candidates = (best, *fit.fallbacks(outcomes, best))
    number = min(fallback, len(candidates) - 1)
    taken = candidates[number]
    chosen, note = applied(cfg, taken.setting), _note(taken, own, fallback)
    return RunPlan(chosen, cfg, info, machine, candidates, number, note + why)


def _not_fitted(cfg: TrainConfig, given: frozenset[str], machine: Machine) -> str:
    """Why nothing is chosen, or ""."""
    due = {"off": cfg.fit == "off", "cpu": not machine.gpus}
    due["unknown"] = any(math.isinf(gpu.memory_gib) for gpu in machine.gpus)
    due["given"] = all(given & names for names in GROUPS)
    return next((WORDS["not_fitted"][name] for name in due if due[name]), "")


def _note(best: Outcome, own: Outcome, fallback: int) -> str:
    """What was chosen, and why."""
    if not best.fits:
        return "nothing that fits was found"
    setting = best.setting
    placed, kept = _counts(setting.placements), _counts(setting.levels)
    words = f"{setting.accumulation} x {setting.batch_size} rows, layers {placed}"
    due = {"fallback": fallback, "asked": setting == own.setting, "other": not own.fits}
    why = next((name for name in due if due[name]), "faster")
    gain = best.speed.tokens_per_s / own.speed.tokens_per_s
    return f"{words}, checkpointing {kept}: {WORDS['why'][why].format(number=fallback, gain=gain)}"


def announce(plan: RunPlan, say: Callable[[str], None]) -> None:
    """Say what the plan is; refuse what cannot fit.

    Args:
        plan: of the run.
        say: prints a line.

    Raises:
        UserError: it does not fit, and --plan is check (code 3).
    """
    found = plan.found
    if found is None or found.fits or plan.cfg.plan == "ignore":
        for line in plan.lines:
            say(line)
        return
    values = as_dict(plan, found)
    for line in _summary(plan, found, values):
        say(line)
    is_device = found.device.free_gib < 0
    place, table = ("a GPU", found.device) if is_device else ("the host", found.host)
    remedies = [_words(item["flags"]) for item in values["to_fit"][:1]]
    remedy = " or ".join([*remedies, "--plan ignore to try all the same"])
    got = f"{table.peak_gib:.1f} GiB on {place} ({table.peak_phase})"
    rule = f"there are {table.limit_gib or 0:.1f}: it does not fit"
    raise UserError(got, rule, remedy, ENVIRONMENT)


def flags_of(old: TrainConfig, new: TrainConfig) -> str:
    """What to add to a command line to make one run of another.

    Args:
        old, new: the runs.
    """
    return _words(_flags(old, new))


def _flags(old: TrainConfig, new: TrainConfig) -> dict[str, str]:
    before, after = to_dict(old), to_dict(new)
    return {name: str(after[name]).lower() for name in after if after[name] != before[name]}


def _words(flags: Mapping[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in flags.items())


def next_change(plan: RunPlan) -> str:
    """What to change after a run has run out of memory on a GPU.

    Args:
        plan: of the run.

    Returns:
        Options to add and what they give; the next fallback, were everything left to the plan.
    """
    found = plan.found
    if found is None:
        return ""
    outcomes: Sequence[Outcome] = plan.candidates[plan.fallback + 1 :]
    if not outcomes and plan.machine.gpus:
        outcomes = fit.fallbacks(fit.explore(plan.info, plan.cfg, plan.machine), found)
    if not outcomes:
        return "a smaller --context_length or --lora_rank: no other setting needs less"
    best = outcomes[0]
    flags = flags_of(plan.asked, applied(plan.asked, best.setting))
    flags = f"{flags} --fit off".strip() if plan.asked.fit == "auto" else flags
    gain = best.speed.tokens_per_s / found.speed.tokens_per_s
    return f"{flags} ({best.device.peak_gib:.1f} GiB a GPU by the plan, {gain:.2f}x the speed)"


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Says how many GiB a run needs on each GPU and on the host, and how long it takes.

    Whether it fits, and what to change where it does not. Reads config.json only. --gpus 24 are
    24 GiB, 2x4090 two of a name, 3090+T4 two in one machine, and 12,16,2x24 three machines in one
    table. Exit code 0: it fits (on one of them), 3: it does not.
    """

    gpus: str = cli.flag("auto", "plan", "24, 2x4090, 12,16,2x24, none; auto: those here")
    host: float | None = cli.flag(None, "plan", "GiB of host memory [this machine's]", rule="> 0")
    link: float | None = cli.flag(None, "plan", "GB/s from host to each GPU", rule="> 0")
    machines: int = cli.flag(1, "plan", "machines, of these GPUs each", rule=">= 1")
    link_gbps: float = cli.flag(10.0, "plan", "Gbit/s from a machine to the others", rule="> 0")
    explain: bool = cli.flag(False, "plan", "show the GiB of every row and phase, with formulas")
    json: bool = cli.flag(False, "plan", "print JSON")


Asked = tuple[PlanOptions, TrainConfig, frozenset[str], dict[str, Machine]]


def parse(argv: Sequence[str]) -> Asked:
    """Read a command line.

    Args:
        argv: arguments without the command.

    Returns:
        The plan's own options; the run; its options that the user wrote; and what `gpus` names ->
        the machine to plan for.

    Raises:
        UserError: every fault at once.
        SystemExit: code 0 after printing the help.
    """
    cli.show_help_if_asked(argv, PlanOptions, WORDS["usage"])
    own, rest = cli.split(argv, {*cli.options(PlanOptions), *ALIASES})
    values, faults = cli.Reader(PlanOptions, ALIASES).read(own)
    options, cfg, machines = PlanOptions(**values), TrainConfig(), dict[str, Machine]()
    try:
        cfg = config.parse(
            rest, lambda line: print(line, file=sys.stderr), {*cli.options(PlanOptions)}
        )
    except UserError as fault:
        faults.append(fault)
    try:
        for name in map(str.strip, options.gpus.split(",")):
            machines[name] = machine_of(name, options, cfg)
    except UserError as fault:
        faults.append(fault)
    if options.explain and len(machines) > 1:
        rule = "explains the plan of one machine"
        faults.append(UserError(f"--explain with --gpus {options.gpus}", rule, "name one of them"))
    refuse(faults)
    return options, cfg, config.given(rest), machines


def machine_of(gpus: str, options: PlanOptions, cfg: TrainConfig) -> Machine:
    """The machine to plan for: as given, else this one, else an imagined one of two 24 GB GPUs.

    Args:
        gpus: of one machine, see `hardware.parse_gpus`; "auto": those here.
        options: host, link.
        cfg: world_size, fewer ranks than there are GPUs.

    Raises:
        UserError: an unknown GPU, or more ranks than GPUs.
    """
    found, host_gib = [], options.host
    if gpus == "auto":
        found = hardware.find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        host_gib = hardware.host_limit_gib() if found and host_gib is None else host_gib
    found = found or hardware.parse_gpus(IMAGINED if gpus == "auto" else gpus)
    if found and cfg.world_size > len(found):
        rule = f"there are {len(found)} GPUs, and a rank needs one"
        raise UserError(f"--world_size {cfg.world_size}", rule, "name more with --gpus")
    num = cfg.world_size if cfg.world_size > 0 else max(len(found), 1)
    network: dict[str, Any] = {"network_gbs": options.link_gbps / 8}
    named = [dataclasses.replace(gpu, **network) for gpu in found[:num]]
    named = hardware.with_measured(named, options.link)
    (cpu,) = hardware.with_measured([dataclasses.replace(hardware.own_cpu(), **network)])
    return Machine(tuple(named), host_gib, num, cpu=cpu, num_machines=options.machines)


def main(argv: list[str]) -> int:
    """Print the plan of a run, or a table of what each of several machines makes of it.

    Args:
        argv: see `parse`.

    Returns:
        0 when it fits (on one of them), 3 when not.

    Raises:
        UserError: a bad option, or no such model.
    """
    options, cfg, given, machines = parse(argv)
    info = arch.read(cfg.model_name, need_weights=False)
    cfg = adopt_format(cfg, info.stored.whole, given)
    if len(machines) > 1:
        table = {name: survey(info, cfg, given, at) for name, at in machines.items()}
        print(json.dumps(table, indent=1) if options.json else "\n".join(_survey_lines(table)))
        return DONE if any(row["fits"] for row in table.values()) else ENVIRONMENT
    (machine,) = machines.values()
    sizes.check_context(info, cfg, machine.num_ranks)
    cfg, why = settle(info, cfg, given, machine)
    found = fit.evaluate(info, cfg, setting_for(info, cfg, machine), machine)
    plan = RunPlan(cfg, cfg, info, machine, (found,), 0, why)
    values = as_dict(plan, found)
    whole = "\n".join(_text(plan, found, values, options.explain))
    print(json.dumps(values, indent=1) if options.json else whole)
    return DONE if found.fits else ENVIRONMENT


def survey(info: ModelInfo, cfg: TrainConfig, given: frozenset[str], machine: Machine) -> Values:
    """What a machine makes of a run, with what train.py would choose for it, in a few figures.

    Args:
        info, cfg, given, machine: see `make`.

    Returns:
        fits, longest (rows in tokens, one at a time), gpu_gib and gpu_limit_gib of the fullest GPU,
        host_gib, step_s, tokens_per_s, setting in words, gpu: whose speeds were taken.
    """
    plan = make(info, cfg, given, machine)
    found = plan.candidates[plan.fallback]
    setting, device, speed = found.setting, found.device, found.speed
    words = f"{setting.batch_size} x {setting.accumulation}, {_counts(setting.placements)}"
    values: dict[str, Any] = {"fits": found.fits, "longest": fit.longest(info, cfg, machine)}
    values |= {"gpu_gib": device.peak_gib, "gpu_limit_gib": device.limit_gib}
    values |= {"host_gib": found.host.peak_gib, "step_s": speed.step_s}
    values |= {"tokens_per_s": speed.tokens_per_s, "setting": f"{words}; {_counts(setting.levels)}"}
    return values | {"gpu": machine.gpus[0].name if machine.gpus else machine.cpu.name}


def _survey_lines(table: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = [WORDS["survey_head"]]
    for name, row in table.items():
        limit = "" if row["gpu_limit_gib"] is None else f" of {row['gpu_limit_gib']:.1f}"
        size, verdict = f"{row['gpu_gib']:.1f}{limit}", "yes" if row["fits"] else "NO"
        own = {"name": name, "verdict": verdict, "size": size, "step": _number(row["step_s"])}
        line = WORDS["survey"].format_map(row | own)
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=" " * 68)
    speeds = "; ".join(f"{name}: {row['gpu']}" for name, row in table.items() if row["gpu"] != name)
    notes = [("longest", WORDS["longest"]), *[("speeds", speeds)] * bool(speeds)]
    return [*lines, *_wrapped(notes)]


def as_dict(plan: RunPlan, found: Outcome) -> dict[str, Any]:
    """The whole plan as JSON knows it.

    Args:
        plan: of the run.
        found: what becomes of it.

    Returns:
        GiB by phase and row, limits, speed, and what to do: `better` where something is faster,
        `to_fit` where the run does not fit, `nearest` for the setting that asks least.
    """
    info, cfg, machine = plan.info, plan.cfg, plan.machine
    setting, num_steps = found.setting, fit.num_steps(Sizes(info, cfg), found.setting)
    outcomes = fit.explore(info, cfg, machine)
    best, nearest = fit.choose(outcomes), fit.least(outcomes)
    if best is not None and found.fits and best.speed.step_s * WORTH > found.speed.step_s:
        best = None
    to_fit = [] if found.fits else fit.changes(info, cfg, machine)
    values: dict[str, Any] = {"model": cfg.model_name, "format": info.formats(cfg.format_name)}
    values |= {"num_params": arch.num_params(info), "num_trained": count_trained(info, cfg).total}
    values |= {"cards": [gpu.name for gpu in machine.gpus], "num_ranks": machine.num_ranks}
    values["num_machines"] = machine.num_machines
    values |= {"batch_size": setting.batch_size, "accumulation": setting.accumulation}
    values["context_length"] = cfg.context_length
    lengths = [fit.longest(info, cfg, machine, is_lean) for is_lean in (False, True)]
    values["longest"] = dict(zip(("asked", "best"), lengths, strict=True))
    values["placements"] = {name: setting.count(name) for name in setting.placements}
    values["levels"] = {name: setting.count(name) for name in setting.levels}
    values |= {"fits": found.fits, "card": _memory(found.device), "host": _memory(found.host)}
    eta_s = None if num_steps is None else num_steps * found.speed.step_s
    values |= found.speed._asdict() | {"num_steps": num_steps, "eta_s": eta_s}
    values["better"] = best and _brief(cfg, applied(cfg, best.setting), best, found)
    values |= {"nearest": _brief(cfg, applied(cfg, nearest.setting), nearest, found), "to_fit": []}
    for item in to_fit:
        brief = _brief(cfg, item.cfg, item.outcome, found)
        values["to_fit"].append({"words": item.words, "lost": item.lost, **brief})
    return values


def _memory(table: rows.Table) -> dict[str, Any]:
    names = ("limit_gib", "peak_gib", "peak_phase", "reserved_gib", "allocated_gib")
    figures = {name: getattr(table, name) for name in names}
    totals = {phase: table.total_gib(phase) for phase in rows.PHASES}
    return figures | {"phases_gib": table.to_dict(), "totals_gib": totals}


def _brief(cfg: TrainConfig, changed: TrainConfig, outcome: Outcome, found: Outcome) -> Values:
    """Another way to run it: what to add to the command line, and what that gives."""
    speed = outcome.speed.tokens_per_s / found.speed.tokens_per_s
    peaks = {"card_gib": outcome.device.peak_gib, "host_gib": outcome.host.peak_gib}
    return {"flags": _flags(cfg, changed), "speed": speed, **peaks}


def _text(plan: RunPlan, found: Outcome, values: dict[str, Any], full: bool) -> list[str]:
    """The plan for a terminal, what matters first; `full`: every row and what it is made of too."""
    kind, setting = TRAIN_TYPES[plan.cfg.train_type].adapter, found.setting
    shown = values | {"trained": WORDS["trained"][kind].format(plan.cfg.lora_rank)}
    shown |= {"on_machines": f" on {setting.machines} machines" * (setting.machines > 1)}
    num_shared = plan.cfg.context_parallel
    shown["shared"] = f", each row over {num_shared} ranks" * (num_shared > 1)
    shown |= {"num_layers": len(setting.levels), "placed": _counts(setting.placements)}
    shown["kept"] = _counts(setting.levels)
    lines = [*_summary(plan, found, values), *(text.format_map(shown) for text in WORDS["text"])]
    place = "GPU" if plan.machine.gpus else "CPU rank"
    tables = [(f"GiB on each {place}", rows.DEVICE_ROWS, found.device)]
    tables += [("GiB on the host, all programs", rows.HOST_ROWS, found.host)]
    for title, names, table in tables if full else ():
        lines += ["", *_table(title, names, table), *_terms(names, table)]
    return lines


def _counts(names: Sequence[str]) -> str:
    """Numbers of layers in words."""
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _table(title: str, names: Sequence[str], table: rows.Table) -> list[str]:
    lines = [f"{title:<48}" + "".join(f"{phase:>10}" for phase in rows.PHASES)]
    found = {name: [table.gib(phase, name) for phase in rows.PHASES] for name in names}
    found["total"] = [table.total_gib(phase) for phase in rows.PHASES]
    for name, values in found.items():
        cells = (f"{value:10.2f}" if value >= 0.005 else f"{'-':>10}" for value in values)
        lines += [f"  {name:<46}" + "".join(cells)] if max(values) >= 0.005 else []
    return lines


def _terms(names: Sequence[str], table: rows.Table) -> list[str]:
    """Every row in the phase where it is largest, with the products it is the sum of."""
    lines = [""]
    for name in names:
        phase = max(rows.PHASES, key=lambda item: table.gib(item, name))
        if table.gib(phase, name):
            lines.append(f"  {name} ({phase}): {table.gib(phase, name):.2f} GiB")
            lines += [line for item in table.phases[phase][name] for line in _term(item)]
    return lines


def _term(item: rows.Term) -> list[str]:
    product = "".join(
        f"{' / ' if unit.startswith('per_') else ' x '}{_number(num)} {unit.removeprefix('per_')}"
        for unit, num in item.factors
        if num != 1 or len(item.factors) == 1
    )
    line = f"{item.what}: {product[3:]} = {item.nbytes / GIB:.3f} GiB"
    return textwrap.wrap(line, WIDTH, initial_indent="      ", subsequent_indent="        ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def _pace(speed: Speed) -> str:
    return f"about {_number(speed.step_s)} s a step, {speed.tokens_per_s:,.0f} tokens/s total"


def _summary(plan: RunPlan, found: Outcome, values: dict[str, Any]) -> list[str]:
    """What a plan comes to; train.py prints it too."""
    lines = [_fit_line(plan.machine, found), *_time(plan, found, values)]
    better, nearest = values["better"], values["nearest"]
    for number, item in enumerate(values["to_fit"], 1):
        lost = f"; without {item['lost']}" * bool(item["lost"])
        cost = f"({item['speed']:.2f}x its speed{lost})"
        lines.append(("to fit", f"{number}. {item['words']}: {_words(item['flags'])} {cost}"))
    if better:
        cost = f"{better['speed']:.2f}x its speed in {better['card_gib']:.1f} GiB"
        lines.append(("best" if found.fits else "or best", f"{cost}: {_words(better['flags'])}"))
    elif found.fits:
        lines.append(("best", "nothing faster fits: room for longer rows or a larger batch_size"))
    elif not values["to_fit"]:
        shown = nearest | {"by": _words(nearest["flags"]) or "what was asked for"}
        lines.append(("to fit", WORDS["nearest"].format_map(shown)))
    notes = [plan.note.removeprefix("; ")] * bool(plan.note)
    for gpu in dict.fromkeys(plan.machine.gpus):
        way, gain = plan.cfg.matmul, gpu.gain(plan.cfg.matmul)
        due = {"slow": plan.cfg.compute_dtype == "bfloat16" and not gpu.has_bf16}
        due |= {"idle": not gain, "predicted": bool(gain) and not gpu.known_gain(way)}
        texts = [WORDS["of_gpus"][name] for name in due if due[name]]
        notes += [text.format(gpu=gpu.name, way=way, gain=gain) for text in texts]
    lines += _experts(plan)
    return _wrapped(lines + [("note", note) for note in [*notes, *cfg_notes(plan.cfg)]])


def _experts(plan: RunPlan) -> list[tuple[str, str]]:
    """What becomes of the experts of a mixture under adapters, and what theirs cost."""
    info, cfg = plan.info, plan.cfg
    sides = [side for index in range(info.num_layers) for side in targets.expert_sides(info, index)]
    if not sides or not sizes.has_adapters(cfg):
        return []
    rank, usual = targets.expert_rank(info, cfg), targets.usual_expert_rank(info, cfg)
    num_params = sum(sum(linear.shape) * num for linear, num in sides)
    num_params *= rank or usual
    own, copy = (sizes.DTYPE_BYTES[dtype] for dtype in (cfg.master_dtype, cfg.compute_dtype))
    gib = num_params * (2 * own + memory.moment_bytes(cfg) + copy) / GIB
    trains = f"LoRA r {rank}" if rank else f"frozen; --expert_lora_rank {usual} trains them"
    return [("experts", WORDS["experts"].format(trains, num_params, gib))]


def _wrapped(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of (name, words), the names in a column of their own, at most WIDTH columns wide."""
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False)
    return [line for name, words in lines for line in wrap.wrap(f"{name:<10}{words}")]


def _fit_line(machine: Machine, found: Outcome) -> tuple[str, str]:
    tables = {"each host" if machine.num_machines > 1 else "the host": found.host}
    if machine.gpus:
        smallest = min(machine.gpus, key=lambda gpu: gpu.memory_gib).name
        tables = {f"a {smallest}": found.device, **tables}
    parts = []
    for name, table in tables.items():
        size, left, free_gib = "", "", table.free_gib
        if table.limit_gib is not None:
            size = f" of {table.limit_gib:.1f}"
            left = f": {free_gib:.1f} free" if free_gib >= 0 else f": {-free_gib:.1f} MISSING"
        parts.append(f"{table.peak_gib:.1f}{size} GiB on {name} ({table.peak_phase}){left}")
    tight = "; predictions err by as much as is left" * (found.fits and not found.fits_safely)
    return "fits" if found.fits else "NO FIT", "; ".join(parts) + tight


def _time(plan: RunPlan, found: Outcome, values: dict[str, Any]) -> list[tuple[str, str]]:
    parts = sorted(found.speed.parts_s.items(), key=lambda item: -item[1])
    least = min(0.01, parts[0][1])
    alone = ", ".join(f"{name} {_number(seconds)} s" for name, seconds in parts if seconds >= least)
    is_measured = plan.machine.gpus and all(gpu.is_measured for gpu in plan.machine.gpus)
    words = f"{_pace(found.speed)}; bottleneck: {found.speed.bound} "
    words += f"(alone: {alone}; {'by measured speeds' if is_measured else 'speeds from a table'})"
    if found.speed.parts_s[fit.READS]:
        gbs = (*plan.machine.gpus, plan.machine.cpu)[0].disk_gbs
        words += f"; disk {gbs:g} GB/s" + ", assumed: doctor measures it" * (gbs == Device.disk_gbs)
    lines = [("time", words)]
    if values["eta_s"] is not None:
        minutes = max(round(values["eta_s"] / 60), 1)
        words = f"at most {minutes // 60} h {minutes % 60:02} min for {values['num_steps']:,} steps"
        lines.append(("ETA", f"{words}, were every row full length"))
    return lines
