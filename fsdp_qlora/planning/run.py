"""The plan of a run of train.py: what the user left open is chosen, what cannot fit is refused."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fsdp_qlora import hardware
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.hardware import Device, Machine
from fsdp_qlora.planning import fit, show
from fsdp_qlora.planning.fit import Outcome
from fsdp_qlora.planning.sizes import applied, setting_for

ENV = "FSDP_QLORA_PLAN"  # what the ranks need of the supervisor to plan for the same machine
GROUPS = {"batch size": fit.BATCHING, "checkpointing": fit.KEEPING, "offload": fit.PLACING}
UNKNOWN = dataclasses.replace(hardware.GPUS["3090"], name="unknown GPU", memory_gib=math.inf)


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
    candidates: tuple[Outcome, ...]
    fallback: int
    note: str
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
        length = -(-most_tokens // cfg.batch_size)
        if found is None or length >= cfg.context_length:
            return self
        shorter = dataclasses.replace(cfg, context_length=length)
        outcome = fit.evaluate(self.info, shorter, found.setting, self.machine)
        candidates = list(self.candidates)
        candidates[self.fallback] = outcome
        words = f"predicted for the {most_tokens:,} tokens of the largest micro-batch"
        return dataclasses.replace(self, candidates=tuple(candidates), rows_note=words)

    @property
    def lines(self) -> list[str]:
        """What the user reads before the run: a few lines of at most 100 columns."""
        found, lines = self.found, [("fit", self.note)] if self.note else []
        if found is not None:
            lines = [*show.brief(self.machine, found), *lines]
        return show.wrapped(lines)

    @property
    def env(self) -> dict[str, str]:
        """What the ranks need to make the same plan."""
        found = {"machine": dataclasses.asdict(self.machine), "notch": self.fallback}
        return {ENV: json.dumps(found)}

    def to_dict(self) -> dict[str, Any]:
        """The prediction as the record has it; empty where nothing is planned."""
        found = self.found
        if found is None:
            return {}
        return {
            "device": found.device.to_dict(),
            "host": found.host.to_dict(),
            "peak_device_gib": found.device.peak_gib,
            "peak_host_gib": found.host.peak_gib,
            "device_limit_gib": _finite(found.gpu_limit_gib),
            "host_limit_gib": found.host_limit_gib,
            "step_s": found.speed.step_s,
            "notch": self.fallback,
            "note": "; ".join(filter(None, [self.note, self.rows_note])),
        }


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value


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
        found = hardware.with_measured(found, hardware.machine_file(), None)
        found = (found + [UNKNOWN] * num_ranks)[:num_ranks]
        if env.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
            found = [dataclasses.replace(gpu, peer_gbs=0.0) for gpu in found]
    cgroup = hardware.find_cgroup()
    limit_gib, used_gib = hardware.host_limit_gib(cgroup), hardware.host_used_gib(cgroup)
    return Machine(tuple(found), limit_gib, num_ranks, used_gib, hardware.measured_cpu())


def fallback_of(env: Mapping[str, str]) -> int:
    """How many fallbacks the supervisor has taken.

    Args:
        env: the environment of a rank.
    """
    return json.loads(env[ENV])["notch"] if ENV in env else 0


def make(
    info: ModelInfo, cfg: TrainConfig, given: frozenset[str], machine: Machine, fallback: int = 0
) -> RunPlan:
    """Plan a run, and choose what the user has left open.

    GPUs without bfloat16 compute in float16, unless the user says otherwise.

    Args:
        info: the model.
        cfg: the run as the user gave it.
        given: names of the options that the user wrote; they stay as they are.
        machine: what there is.
        fallback: how often it has run out of memory before its first step.

    Returns:
        The plan; a run that does not fit is planned as it is.
    """
    why, lacking = "", [gpu.name for gpu in machine.gpus if not gpu.has_bf16]
    if lacking and "precision" not in given and cfg.compute_dtype == "bfloat16":
        cfg = dataclasses.replace(cfg, precision="fp16_autocast")
        why = f"; precision fp16_autocast, as a {lacking[0]} has no bfloat16"
    own = fit.evaluate(info, cfg, setting_for(info, cfg, machine.num_ranks), machine)
    if refusal := _not_fitted(cfg, given, machine):
        return RunPlan(cfg, cfg, info, machine, (own,), 0, refusal + why)
    outcomes = fit.explore(info, cfg, machine, given)
    best = fit.choose(outcomes)
    if best is None:  # nothing fits with a margin: without one, as asked for if that fits
        fitting = [item for item in outcomes if item.fits]
        fastest = max(fitting, key=lambda item: item.speed.tokens_per_s, default=own)
        best = own if own.fits else fastest
    candidates = (best, *fit.fallbacks(outcomes, best))
    number = min(fallback, len(candidates) - 1)
    taken = candidates[number]
    chosen, note = applied(cfg, taken.setting), _note(taken, own, fallback)
    return RunPlan(chosen, cfg, info, machine, candidates, number, note + why)


def unplanned(info: ModelInfo, cfg: TrainConfig, note: str) -> RunPlan:
    """A run of which nothing is predicted.

    Args:
        info: the model.
        cfg: the run as the user gave it.
        note: why.
    """
    return RunPlan(cfg, cfg, info, Machine(()), (), 0, note)


def _not_fitted(cfg: TrainConfig, given: frozenset[str], machine: Machine) -> str:
    """Why nothing is chosen, or ""."""
    if cfg.fit == "off":
        return "off: everything as asked for"
    if not machine.gpus:
        return "CPU ranks run as asked for"
    if any(math.isinf(gpu.memory_gib) for gpu in machine.gpus):
        return "off: the driver does not report the memory of the GPUs"
    if all(given & names for names in GROUPS.values()):
        return f"as asked for: {', '.join(GROUPS)} are given"
    return ""


def _note(best: Outcome, own: Outcome, fallback: int) -> str:
    """What was chosen, and why."""
    if not best.fits:
        return "nothing that fits was found"
    setting = best.setting
    placed, kept = show.counts(setting.placements), show.counts(setting.levels)
    words = f"{setting.accumulation} x {setting.batch_size} rows, layers {placed}"
    why = f"fastest that fits, {best.speed.tokens_per_s / own.speed.tokens_per_s:.2f}x as asked"
    if fallback:
        why = f"fallback {fallback} from the fastest, which ran out of memory"
    elif setting == own.setting:
        why = "as asked for, nothing faster fits"
    elif not own.fits:
        why = "fastest that fits; what was asked for does not"
    return f"{words}, checkpointing {kept}: {why}"


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
    values = show.as_dict(plan.info, plan.cfg, plan.machine, found)
    for line in show.summary(plan.cfg, plan.machine, found, values):
        say(line)
    place, table, limit_gib = "the host", found.host, found.host_limit_gib
    if found.gpu_free_gib < 0:
        place, table, limit_gib = "a GPU", found.device, found.gpu_limit_gib
    remedies = [show.flags(item["flags"]) for item in values["to_fit"][:1]]
    raise UserError(
        f"{table.peak_gib:.1f} GiB on {place} ({table.peak_phase})",
        f"there are {limit_gib or 0:.1f}: it does not fit",
        " or ".join([*remedies, "--plan ignore to try all the same"]),
        ENVIRONMENT,
    )


def flags_of(old: TrainConfig, new: TrainConfig) -> str:
    """What to add to a command line to make one run of another.

    Args:
        old, new: the runs.
    """
    return show.flags(show.changes(old, new))


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
