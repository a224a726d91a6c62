"""Which setting is the fastest that fits, what to step down to, and what would make a run fit."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.hardware import Machine
from fsdp_qlora.planning import memory, speed
from fsdp_qlora.planning.rows import CONTEXT, FILES, SYSTEM, Table
from fsdp_qlora.planning.sizes import Setting, Sizes, place, setting_for, with_trained
from fsdp_qlora.planning.speed import Speed

MARGIN = 0.03  # of a GPU and of the host stays free: predictions are off by that much
STEPS = 8  # selective and unchecked layers are tried in eighths of the layers, resident ones
RESIDENT_STEPS = 16  # in sixteenths
TIE = 0.01  # settings this close in speed: the one that needs least
FALLBACK_SHARE = 0.93  # a fallback needs at most this share of the one before
PLACING = {"use_cpu_offload", "offload_impl", "resident_layers", "sharding_strategy"}
KEEPING = {"use_gradient_checkpointing", "selective_layers", "uncheckpointed_layers"}
BATCHING = {"batch_size", "gradient_accumulation_steps"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What becomes of a setting on a machine.

    Args:
        setting: that was planned.
        device: memory of a GPU; on CPU ranks, of a rank.
        host: memory of the machine.
        speed: estimate of an optimizer step.
        gpu_limit_gib: what `device` may need on the smallest GPU, its rows all counted.
        host_limit_gib: what `host` may need, or None.
    """

    setting: Setting
    device: Table
    host: Table
    speed: Speed
    gpu_limit_gib: float | None
    host_limit_gib: float | None

    @property
    def gpu_free_gib(self) -> float:
        """What stays free on the smallest GPU; negative: what is missing."""
        return 0.0 if self.gpu_limit_gib is None else self.gpu_limit_gib - self.device.peak_gib

    @property
    def host_free_gib(self) -> float:
        """What stays free on the host; 0 where its size is not known."""
        return 0.0 if self.host_limit_gib is None else self.host_limit_gib - self.host.peak_gib

    @property
    def fits(self) -> bool:
        """Whether GPU and host hold it, by prediction."""
        return self.gpu_free_gib >= 0 and self.host_free_gib >= 0

    @property
    def fits_safely(self) -> bool:
        """The same with MARGIN."""
        gpu, machine = self.gpu_limit_gib or 0.0, self.host_limit_gib or 0.0
        return self.gpu_free_gib >= MARGIN * gpu and self.host_free_gib >= MARGIN * machine


def evaluate(info: ModelInfo, cfg: TrainConfig, setting: Setting, machine: Machine) -> Outcome:
    """Plan one setting.

    Args:
        info: the model.
        cfg: everything that the setting leaves open; gpu_budget_gib caps torch's allocator,
            host_budget_gib what all ranks have of the host.
        setting: see Setting.
        machine: what there is.
    """
    return _evaluate(Sizes(info, cfg), cfg, setting, machine, speed.num_rows(cfg))


def _evaluate(
    s: Sizes, cfg: TrainConfig, setting: Setting, machine: Machine, num_rows: int | None
) -> Outcome:
    device = memory.device(s, cfg, setting, machine.kind, machine.has_peer)
    gpu_limits = [gpu.memory_gib for gpu in machine.gpus]
    if machine.gpus and cfg.gpu_budget_gib is not None:
        outside_gib = device.gib(device.peak_phase, CONTEXT)
        gpu_limits.append(cfg.gpu_budget_gib + outside_gib)
    memory_of_host = memory.host(s, cfg, setting, machine.kind, num_rows, machine.system_gib)
    host_limits = [] if machine.host_gib is None else [machine.host_gib]
    if cfg.host_budget_gib is not None:  # of all ranks, as model/placement.py counts it
        outside = (memory_of_host.gib(memory_of_host.peak_phase, row) for row in (SYSTEM, FILES))
        host_limits.append(cfg.host_budget_gib + sum(outside))
    return Outcome(
        setting,
        device,
        memory_of_host,
        speed.estimate(s, cfg, setting, machine.gpus or (machine.cpu,)),
        min(gpu_limits, default=None),
        min(host_limits, default=None),
    )


def explore(
    info: ModelInfo, cfg: TrainConfig, machine: Machine, fixed: frozenset[str] = frozenset()
) -> list[Outcome]:
    """Plan every setting worth trying.

    Args:
        info: the model.
        cfg: the run; its batch_size x gradient_accumulation_steps stays as it is.
        machine: what there is.
        fixed: options that the user gave; what they say is not changed.

    Returns:
        The outcomes, some that do not fit included.
    """
    own = setting_for(info, cfg, machine.num_ranks)
    s, num_rows = Sizes(info, cfg), speed.num_rows(cfg)
    outcomes: list[Outcome] = []
    hidden_batches = set()  # whose copies cost no time: to keep layers on the GPUs gains nothing
    for rising in _settings(own, fixed, bool(machine.gpus)):
        batch = rising[0].batch_size
        if batch in hidden_batches and rising[0].count("resident"):
            continue
        for setting in rising:
            found = _evaluate(s, cfg, setting, machine, num_rows)
            outcomes.append(found)
            if not found.fits_safely:  # nor will what keeps more
                break
            parts = found.speed.parts_s
            is_hidden = parts[speed.HOST_LINK] < 0.8 * parts[speed.MATMULS]
            if found.setting.count("streamed") and is_hidden:
                hidden_batches.add(batch)
    return outcomes


def _settings(own: Setting, fixed: frozenset[str], has_gpus: bool) -> Iterator[tuple[Setting, ...]]:
    """Of every batch and placement the settings that keep more and more activations."""
    num_layers = len(own.levels)
    per_step = own.batch_size * own.accumulation
    batches = [own.batch_size]
    if not fixed & BATCHING:
        batches = [n for n in range(1, per_step + 1) if per_step % n == 0]
    counts = [num_layers * i // STEPS for i in range(STEPS + 1)]
    whole = [i for i, name in enumerate(own.placements) if name == "trained"]
    num_frozen = num_layers - len(whole)
    frozen = [place(num_frozen, "sharded", 0)]
    for i in range(RESIDENT_STEPS + 1 if has_gpus else 0):
        frozen.append(place(num_frozen, "streamed", num_frozen * i // RESIDENT_STEPS))
    placements = [with_trained(names, whole) for names in dict.fromkeys(frozen)]
    strategy = "full_shard"
    if fixed & PLACING:
        placements, strategy = [own.placements], own.strategy
    levels = [_keep(num_layers, num, 0) for num in counts]
    levels += [_keep(num_layers, num_layers - num, num) for num in counts[1:]]
    levels = [own.levels] if fixed & KEEPING else levels
    for batch, where in itertools.product(batches, placements):
        rest = (own.num_ranks, batch, per_step // batch, where)
        yield tuple(Setting(*rest, kept, strategy) for kept in levels)


def _keep(num_layers: int, num_selective: int, num_none: int) -> tuple[str, ...]:
    num_full = num_layers - num_selective - num_none
    return ("full",) * num_full + ("selective",) * num_selective + ("none",) * num_none


def choose(outcomes: Sequence[Outcome], limit_gib: float | None = None) -> Outcome | None:
    """The fastest outcome that fits; of equally fast ones that which asks least of the machine.

    Args:
        outcomes: from `explore`.
        limit_gib: further limit of a GPU.

    Returns:
        The best one, or None when nothing fits.
    """
    most_gib = math.inf if limit_gib is None else limit_gib
    fitting = [it for it in outcomes if it.fits_safely and it.device.peak_gib <= most_gib]
    if not fitting:
        return None
    fastest = max(item.speed.tokens_per_s for item in fitting)
    equal = [item for item in fitting if item.speed.tokens_per_s >= fastest * (1 - TIE)]
    return min(equal, key=_demand)


def least(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome that comes nearest to fitting, or fits best.

    Args:
        outcomes: from `explore`.
    """
    return max(outcomes, key=lambda item: min(item.gpu_free_gib, item.host_free_gib))


def _demand(item: Outcome) -> tuple[int, float]:
    return item.setting.count("streamed", "offloaded", "resident"), item.device.peak_gib


def fallbacks(outcomes: Sequence[Outcome], start: Outcome) -> list[Outcome]:
    """What to step down to after an out-of-memory, one after the other.

    Args:
        outcomes: from `explore`.
        start: the setting that ran out.

    Returns:
        Each the fastest that needs at most FALLBACK_SHARE of the one before; none: no way down.
    """
    found = [start]
    while (lower := choose(outcomes, found[-1].device.peak_gib * FALLBACK_SHARE)) is not None:
        found.append(lower)
    return found[1:]


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that would make a run fit.

    Args:
        words: what to do.
        lost: besides time; "" for nothing.
        cfg: the run with it.
        outcome: what becomes of it.
    """

    words: str
    lost: str
    cfg: TrainConfig
    outcome: Outcome


Row = tuple[str, str, int, dict[str, object]]  # words, what is lost, how much, changed options


def _single_changes(cfg: TrainConfig, num_layers: int, own: Setting) -> list[Row]:
    """What could be tried, as far as it changes anything."""
    per_step = cfg.batch_size * cfg.gradient_accumulation_steps
    rows: list[Row] = []
    for size in (n for n in range(1, cfg.batch_size) if per_step % n == 0):
        values = {"batch_size": size, "gradient_accumulation_steps": per_step // size}
        rows.append((f"micro-batches of {size}", "", 0, dict(values)))
    hosted = {"use_cpu_offload": True, "offload_impl": "auto", "sharding_strategy": "full_shard"}
    for num in (num_layers * i // STEPS for i in range(1, STEPS)):
        words = f"{num} layers whole on each GPU"
        rows.append((words, "", 0, {**hosted, "resident_layers": num}))
    sharded = {"use_cpu_offload": False, "sharding_strategy": "full_shard", "resident_layers": 0}
    recompute = {"selective_layers": 0, "uncheckpointed_layers": 0}
    rows += [
        ("the base on the host", "", 0, {**hosted, "resident_layers": 0}),
        ("recompute every layer", "", 0, {**recompute, "use_gradient_checkpointing": True}),
        ("constants quantised too", "", 0, {"double_quant": True}),
        ("rank 16", f"rank {cfg.lora_rank}", 1, {"lora_rank": min(cfg.lora_rank, 16)}),
    ]
    if cfg.lora_dropout:
        rows.append(("no dropout", "the adapters' dropout", 1, {"lora_dropout": 0.0}))
    if own.num_ranks > 1:
        rows.append(("the base sharded over the GPUs", "", 0, dict(sharded)))
    if cfg.format_name == "bf16":
        rows.append(("a 4-bit base", "a 16-bit base", 1, {"train_type": "qlora"}))
    length, halvings = cfg.context_length // 2, 1
    while length >= 256:
        lost = f"rows longer than {length} tokens"
        rows.append((f"context {length}", lost, halvings, {"context_length": length}))
        length, halvings = length // 2, halvings + 1
    return [row for row in rows if any(getattr(cfg, k) != v for k, v in row[3].items())]


def changes(info: ModelInfo, cfg: TrainConfig, machine: Machine, most: int = 3) -> list[Change]:
    """Find what would make a run fit, by planning again with each change.

    Args:
        info: the model.
        cfg: a run that does not fit.
        machine: what there is.
        most: how many.

    Returns:
        The changes, those that lose least first, then the cheapest in time; pairs of changes too
        where single ones lose something; none when not even pairs are enough.
    """
    own = setting_for(info, cfg, machine.num_ranks)
    singles = _single_changes(cfg, info.num_layers, own)
    tried: list[tuple[tuple[Row, ...], Change]]
    tried = [((row,), _change(info, cfg, machine, (row,))) for row in singles]
    fitting = [(rows, item) for rows, item in tried if item.outcome.fits_safely]
    if not any(not item.lost for _, item in fitting):
        enough = [rows[0] for rows, _ in fitting]
        others = [row for row in singles if row not in enough]
        for pair in itertools.combinations(others, 2):
            item = _change(info, cfg, machine, pair)
            if item.outcome.fits_safely:
                fitting.append((pair, item))
    fitting.sort(key=lambda it: (sum(r[2] for r in it[0]), -it[1].outcome.speed.tokens_per_s))
    kinds: dict[frozenset[str], Change] = {}
    for rows, item in fitting:  # of each kind of change the best
        kinds.setdefault(frozenset(name for row in rows for name in row[3]), item)
    return list(kinds.values())[:most]


def _change(info: ModelInfo, cfg: TrainConfig, machine: Machine, rows: tuple[Row, ...]) -> Change:
    values: dict[str, Any] = {}
    for row in rows:
        values |= row[3]
    changed = dataclasses.replace(cfg, **values)
    setting = setting_for(info, changed, machine.num_ranks)
    outcome = evaluate(info, changed, setting, machine)
    lost = ", ".join(row[1] for row in rows if row[1])
    return Change(" and ".join(row[0] for row in rows), lost, changed, outcome)
