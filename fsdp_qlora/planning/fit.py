"""How fast a setting is, which is the fastest that fits, and what would make a run fit.

Source of the estimate of time: the project's limits.md, section 2 (operations and bytes of a step);
its three shares were measured on two H200 (recipes/*.md).
"""

import bisect
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import DISK, IN_8_BIT, TrainConfig
from fsdp_qlora.errors import UserError
from fsdp_qlora.hardware import GIB, Device, Machine
from fsdp_qlora.planning import memory, sizes
from fsdp_qlora.planning.rows import CONTEXT, FILES, SYSTEM, WORDS, Table
from fsdp_qlora.planning.sizes import MIN_TOKENS_8_BIT, STREAMED, Setting, Sizes, place, setting_for

MARGIN = 0.03  # of a GPU and of the host stays free: predictions are off by that much
STEPS = 8  # selective and unchecked layers are tried in eighths of the layers, resident ones
RESIDENT_STEPS = 16  # in sixteenths
VISITS = (2, 4, 8, 16)  # micro-batches that may pass each layer together
TIE = 0.01  # settings this close in speed: the one that needs least
LENGTH_STEP, MOST_TOKENS = 256, 2**17  # of the longest rows that are looked for
FALLBACK_SHARE = 0.93  # a fallback needs at most this share of the one before
HOSTED = ("use_cpu_offload", "use_activation_cpu_offload")
PLACING = {"use_cpu_offload", "offload_impl", "resident_layers", "sharding_strategy"}
KEEPING = {"use_gradient_checkpointing", "selective_layers", "uncheckpointed_layers"}
BATCHING = {"batch_size", "gradient_accumulation_steps"}
BOUNDS: tuple[str, ...] = ("compute", "dequantisation", "host link", "GPU-to-GPU link")
BOUNDS += ("link between machines", "launch overhead", "disk")
MATMULS, DEQUANTISE, HOST_LINK, PEER_LINK, NETWORK, LAUNCHES, READS = BOUNDS

UNPACK_SHARE = 0.4  # of memory bandwidth: 6.5e9 weights took 8.3 ms a pass
GATHER_SHARE = 0.55  # of the links, by FSDP's gathers: 70B, 2 x 512, no peer access: 2.35 s a step
STREAM_SHARE = 0.95  # of the host link, by weight streaming: 70B, 2 x 512: 1.36 s a step
NETWORK_SHARE = 0.8  # of the link between machines; an assumption, not measured
ELEMENTWISE_SHARE = 0.75  # of memory bandwidth
ATTENTION_SHARE = 0.85  # of the matmuls' rate: 8B, rows of 65,536 and 131,072: 13.8 and 46.5 s
GRAPHS_SHARE = 0.26  # of the launches, where CUDA graphs do them: 7B, 1 x 512: 64 to 72 ms
QUANTIZING = 1.25  # as many launches in 8 bit: 7B, 4 x 2048: 0.46 s
LAUNCH_S = 0.004  # a layer and pass: 7B, 1 x 512: 0.41 s for 96 of them


class Speed(NamedTuple):
    """An estimate.

    Args:
        step_s: seconds of an optimizer step.
        tokens_per_s: of all ranks.
        bound: the bottleneck of most of the step, one of BOUNDS.
        parts_s: what each of BOUNDS would take alone.
    """

    step_s: float
    tokens_per_s: float
    bound: str
    parts_s: dict[str, float]


def estimate(s: Sizes, setting: Setting, gpus: Sequence[Device]) -> Speed:
    """Estimate the time of an optimizer step; the slowest GPU sets the pace.

    Args:
        s: numbers of the run.
        setting: batch, placements, levels.
        gpus: of all ranks, at least one.

    Returns:
        The estimate; copies are hidden behind computing where they are shorter, pass by pass.
    """
    return max((_estimate(s, setting, gpu) for gpu in set(gpus)), key=lambda speed: speed.step_s)


def _estimate(s: Sizes, setting: Setting, gpu: Device) -> Speed:
    s, setting = (s.visiting, s.joined(setting)) if s.groups(setting) > 1 else (s, setting)
    ruled, alone = dict.fromkeys(BOUNDS, 0.0), dict.fromkeys(BOUNDS, 0.0)
    for parts in _passes(s, setting, gpu):
        gpu_s = parts[MATMULS] + parts[DEQUANTISE]
        worst = max(BOUNDS[2:], key=lambda name: parts[name])
        inside = max((MATMULS, DEQUANTISE), key=lambda name: parts[name])
        ruled[inside if gpu_s >= parts[worst] else worst] += max(gpu_s, parts[worst])
        alone = {name: alone[name] + parts[name] for name in BOUNDS}
    # AdamW reads and writes weights, gradients and two moments once.
    optimizer_bytes = 28.0 * s.num_trained(setting) / setting.shares
    optimizer_s = optimizer_bytes / (ELEMENTWISE_SHARE * gpu.memory_gbs * 1e9)
    num_visits = setting.accumulation / setting.per_visit
    step_s = sum(ruled.values()) * num_visits + optimizer_s
    num_tokens = s.tokens(setting) * setting.accumulation * setting.num_ranks
    parts_s = {name: seconds * num_visits for name, seconds in alone.items()}
    return Speed(step_s, num_tokens / step_s, max(BOUNDS, key=lambda name: ruled[name]), parts_s)


def _passes(s: Sizes, setting: Setting, gpu: Device) -> list[dict[str, float]]:
    """Seconds of forward and backward of a visit of all layers, by what they are spent on."""
    tokens = s.tokens(setting) * setting.per_visit
    matmuls = 2.0 * s.active * s.layers * tokens
    gain = gpu.gain(s.cfg.matmul) if s.tokens(setting) >= MIN_TOKENS_8_BIT else 1.0
    matmuls, is_8_bit = matmuls / (gain or 1.0), s.cfg.matmul in IN_8_BIT and gain not in (0, 1)
    attention = 2.0 * s.layers * s.attention * s.cfg.context_length * tokens / ATTENTION_SHARE
    head, lora = 2.0 * s.head * tokens, 2.0 * s.lora_passed * s.layers * tokens
    weight_grads = 2.0 * (s.num_trained(setting) - s.lora * s.layers) * tokens  # of whole weights
    num_full, num_selective = setting.count("full"), setting.count("selective")
    # A non-reentrant recomputation stops before the last matmul.
    left_out = 0 if s.cfg.reentrant_checkpointing else s.last / s.active
    again = (matmuls * (1 - left_out) + attention + lora) * num_full / s.layers
    again += 2.0 * s.redone * tokens * num_selective
    item, flops = s.item / 2, gpu.bf16_tflops * 1e12
    forward_s = (matmuls + attention + 2 * head + lora) * item / flops
    backward_s = (matmuls + 2.5 * attention + 2 * lora + weight_grads + again) * item / flops
    # Keys and values of the ranks that share rows are gathered, their gradients summed in float32.
    peer_s = 1 / (gpu.peer_gbs or gpu.host_link_gbs) / 1e9 / GATHER_SHARE
    others_s = tokens * (s.cfg.context_parallel - 1) * memory.keys_values(s) * s.layers * peer_s
    forward_s += others_s * s.item
    backward_s += others_s * (s.item * (1 + num_full / s.layers) + 4)
    # Norms, rotary embedding, activation, LoRA's additions: what selective layers recompute.
    features = 6 * s.hidden + s.gates + s.product
    elementwise_s = tokens * features * s.item / (ELEMENTWISE_SHARE * gpu.memory_gbs * 1e9)
    forward_s += 2 * s.layers * elementwise_s
    backward_s += (3 * s.layers + num_full + num_selective) * elementwise_s
    touched = s.format.weight_bits / 8 + (1 if is_8_bit else s.item)
    touched *= s.weights * (s.format.scratch_bytes > 0)
    num_unpacked = 1 if s.is_kept_whole else setting.per_visit
    unpack_s = touched * s.layers * num_unpacked / (UNPACK_SHARE * gpu.memory_gbs * 1e9)
    is_graphed = memory.uses_graphs(s, setting)  # recomputation and backward are one graph
    num_launched = s.layers - (1 - GRAPHS_SHARE) * (num_full + num_selective) * is_graphed
    launch_s = LAUNCH_S * num_launched * setting.per_visit * (gpu.memory_gib > 0)
    launch_s *= QUANTIZING if is_8_bit else 1.0
    inputs = memory.num_offloaded(s, setting) * s.tokens(setting) * s.hidden * s.item
    inputs_s, disk_s = inputs / gpu.host_link_gbs / 1e9, 0.0
    if setting.hosts_inputs == DISK:
        inputs_s, disk_s = 0.0, inputs / gpu.disk_gbs / 1e9
    disk_s += setting.count(DISK) * s.layer_bytes / gpu.disk_gbs / 1e9
    rows, passes = [], [(False, forward_s * s.cfg.passes), (True, backward_s)]
    passes += [(False, 2 * forward_s)] * (s.cfg.objective == "kto")  # other pairs, for its KL
    for is_backward, matmul_s in passes:
        is_twice = not is_backward and not s.is_kept_whole and s.cfg.passes > 1
        num = 1 + num_full / s.layers if is_backward else 1.0 + is_twice
        host_s, *links_s = _copies(s, setting, gpu, is_backward)
        launched_s = launch_s if is_graphed else launch_s * num
        parts = (matmul_s, unpack_s * num, host_s + inputs_s, *links_s, launched_s, disk_s)
        rows.append(dict(zip(BOUNDS, parts, strict=True)))
    return rows


def _copies(s: Sizes, setting: Setting, gpu: Device, is_backward: bool) -> tuple[float, ...]:
    """Seconds of one pass on the links to the host, between GPUs, and between machines.

    Between machines what is sharded over all ranks is gathered and reduced in a ring, which leaves
    and enters each machine once; of copies, a machine's gradients are summed with the others'.
    """
    host_bytes_s, ranks = gpu.host_link_gbs * 1e9, setting.shares
    peer_bytes_s, others = (gpu.peer_gbs or gpu.host_link_gbs) * 1e9, 1 - 1 / ranks
    is_kept = is_backward and setting.keeps_gathered
    grouped = 0 if is_kept else setting.count("sharded", "offloaded")
    sliced = 0 if is_kept else setting.count("offloaded")
    gathered = grouped * s.layer_bytes * others
    if setting.shares > 1:
        adapters = s.num_trained(setting) * (2 + 4 * is_backward)  # 16 bit gathered, 32 reduced
        ends = (1 if is_backward else 2) * s.head * s.item  # the embedding takes no part backwards
        gathered += (adapters + ends) * others
    host_s = setting.count(*STREAMED) * s.layer_bytes / (STREAM_SHARE * host_bytes_s)
    slice_s = sliced * s.layer_bytes / ranks / host_bytes_s / GATHER_SHARE
    peer_s = gathered / peer_bytes_s / GATHER_SHARE
    summed = 2 * (1 - 1 / setting.machines) * 4 * s.num_trained(setting) * is_backward
    crossing = gathered if ranks > setting.local_ranks else summed
    network_s = crossing / (NETWORK_SHARE * gpu.network_gbs * 1e9) * (setting.machines > 1)
    host_s += slice_s + (peer_s if sliced else 0.0)  # a layer's slices come before its gather
    if gpu.peer_gbs:
        return host_s, peer_s, network_s
    total_s = host_s + (0.0 if sliced else peer_s)  # all cross the one link
    return (total_s, 0.0, network_s) if host_s > peer_s else (0.0, total_s, network_s)


def num_steps(s: Sizes, setting: Setting) -> int | None:
    """Optimizer steps of the run; None where they depend on rows that are not known."""
    cfg, num_readers = s.cfg, setting.num_ranks // s.cfg.context_parallel
    rows_per_step = setting.batch_size * setting.accumulation * num_readers
    if cfg.max_steps > 0 or s.num_rows is None:
        return cfg.max_steps if cfg.max_steps > 0 else None
    num_rows = s.num_rows - cfg.num_held_out(s.num_rows)  # the last ones join the other steps
    return math.ceil(max(num_rows // rows_per_step, 1) * cfg.num_epochs)


class Outcome(NamedTuple):
    """What becomes of a setting on a machine.

    Args:
        setting: that was planned.
        device: memory of the smallest GPU, its rows all counted; on CPU ranks, of a rank.
        host: memory of the machine.
        speed: estimate of an optimizer step.
    """

    setting: Setting
    device: Table
    host: Table
    speed: Speed

    @property
    def fits(self) -> bool:
        """Whether GPU and host hold it, by prediction."""
        return self.device.free_gib >= 0 and self.host.free_gib >= 0

    @property
    def fits_safely(self) -> bool:
        """The same with MARGIN."""
        tables = (self.device, self.host)
        return all(table.free_gib >= MARGIN * (table.limit_gib or 0.0) for table in tables)


def evaluate(info: ModelInfo, cfg: TrainConfig, setting: Setting, machine: Machine) -> Outcome:
    """Plan one setting.

    Args:
        info: the model.
        cfg: everything that the setting leaves open; gpu_budget_gib caps torch's allocator,
            host_budget_gib what all ranks have of the host.
        setting: see Setting.
        machine: what there is.
    """
    return _evaluate(Sizes(info, cfg, machine.kind, machine.tflops), setting, machine)


def _evaluate(s: Sizes, setting: Setting, machine: Machine) -> Outcome:
    setting, host = _tiered(s, setting, machine)
    device = memory.device(s, setting, all(gpu.peer_gbs > 0 for gpu in machine.gpus))
    gpu_limits = [gpu.memory_gib for gpu in machine.gpus]
    if machine.gpus and s.cfg.gpu_budget_gib is not None:
        gpu_limits.append(s.cfg.gpu_budget_gib + device.gib(device.peak_phase, CONTEXT))
    speed = estimate(s, setting, machine.gpus or (machine.cpu,))
    device = dataclasses.replace(device, limit_gib=min(gpu_limits, default=None))
    return Outcome(setting, device, host, speed)


def _tiered(s: Sizes, setting: Setting, machine: Machine) -> tuple[Setting, Table]:
    """Put streamed layers on disk for which the host has no room, or all; and its memory."""
    host, num = _host(s, setting, machine), setting.count(*STREAMED)
    is_file = s.cfg.offload_impl == "file"
    if not num or (host.free_gib >= 0 and not is_file):
        return setting, host
    setting = setting.tiered(0)
    host = _host(s, setting, machine)
    if is_file and s.cfg.host_budget_gib is None:
        return setting, host
    free_gib = host.free_gib - MARGIN * (host.limit_gib or 0.0)
    setting = setting.tiered(max(0, min(num, int(free_gib * GIB / s.layer_bytes))))
    return setting, _host(s, setting, machine)


def _host(s: Sizes, setting: Setting, machine: Machine) -> Table:
    host = memory.host(s, setting, machine.system_gib)
    limits = [] if machine.host_gib is None else [machine.host_gib]
    if s.cfg.host_budget_gib is not None:  # of all ranks, as model/placement.py counts it
        outside = (host.gib(host.peak_phase, row) for row in (SYSTEM, FILES))
        limits.append(s.cfg.host_budget_gib + sum(outside))
    return dataclasses.replace(host, limit_gib=min(limits, default=None))


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
    own = setting_for(info, cfg, machine)
    s = Sizes(info, cfg, machine.kind, machine.tflops)
    outcomes: list[Outcome] = []
    hidden_batches = set()  # whose copies cost no time: to keep layers on the GPUs gains nothing
    for rising in _settings(own, fixed, bool(machine.gpus)):
        batch = rising[0].batch_size
        if batch in hidden_batches and rising[0].count("resident"):
            continue
        number = len(outcomes)
        for setting in rising:
            found = _evaluate(s, setting, machine)
            outcomes.append(found)
            if not found.fits_safely:  # nor will what keeps more
                break
            parts, count = found.speed.parts_s, found.setting.count
            if parts[HOST_LINK] < 0.8 * parts[MATMULS] and count("streamed") and not count(DISK):
                hidden_batches.add(batch)
        is_open = "use_activation_cpu_offload" not in fixed and "full" in rising[0].levels
        if is_open and not outcomes[number].fits_safely:
            for where in (True, DISK):
                hosting = dataclasses.replace(rising[0], hosts_inputs=where)
                outcomes.append(_evaluate(s, hosting, machine))
    return outcomes


def _settings(own: Setting, fixed: frozenset[str], has_gpus: bool) -> Iterator[tuple[Setting, ...]]:
    """Of every batch and placement the settings that keep more and more activations."""
    num_layers, per_step = len(own.levels), own.batch_size * own.accumulation
    batches = [own.batch_size] if fixed & BATCHING else _divisors(per_step)
    counts = [num_layers * i // STEPS for i in range(STEPS + 1)]
    whole = [i for i, name in enumerate(own.placements) if name == "trained"]
    num_frozen, places = num_layers - len(whole), [place(num_layers, "sharded", 0, whole)]
    for i in range(RESIDENT_STEPS + 1 if has_gpus else 0):
        places.append(place(num_layers, "streamed", num_frozen * i // RESIDENT_STEPS, whole))
    placements = list(dict.fromkeys(places))
    strategies = ["full_shard", "hybrid_full_shard"][: own.machines]  # of one they are the same
    if own.count(DISK) and fixed & PLACING <= {*HOSTED, "offload_impl"}:
        placements = [where for where in placements if "sharded" not in where]
    elif fixed & PLACING:
        placements, strategies = [own.placements], [own.strategy]
    levels = [_keep(num_layers, num, 0) for num in counts]
    levels += [_keep(num_layers, num_layers - num, num) for num in counts[1:]]
    levels = [own.levels] if fixed & KEEPING else levels
    for batch, where, strategy in itertools.product(batches, placements, strategies):
        num, travelling = per_step // batch, {*STREAMED, "offloaded"}
        travelling |= {"sharded"} if own.num_ranks > 1 else set()
        visits = {1, *(n for n in (*VISITS, num) if num % n == 0 and travelling & {*where})}
        visits = {min(own.per_visit, num)} if "accumulate_by_layer" in fixed else visits
        for per_visit in sorted(visits) if has_gpus else [own.per_visit]:
            rest = (strategy, own.machines, per_visit)
            yield tuple(Setting(own.num_ranks, batch, num, where, kept, *rest) for kept in levels)


def _divisors(number: int) -> list[int]:
    """The smallest ones: a micro-batch of more rows than 65,536 is the user's own choice."""
    return [n for n in range(1, min(number, 2**16) + 1) if number % n == 0][:32]


def _keep(num_layers: int, num_selective: int, num_none: int) -> tuple[str, ...]:
    num_full = num_layers - num_selective - num_none
    return ("full",) * num_full + ("selective",) * num_selective + ("none",) * num_none


def choose(outcomes: Sequence[Outcome], limit_gib: float = math.inf) -> Outcome | None:
    """The fastest outcome that fits; of equally fast ones that which asks least of the machine.

    Args:
        outcomes: from `explore`.
        limit_gib: further limit of a GPU.

    Returns:
        The best one, or None when nothing fits.
    """
    fitting = [it for it in outcomes if it.fits_safely and it.device.peak_gib <= limit_gib]
    # A disk is slower than most take theirs for: only what fits in no other way comes from there.
    fitting = [item for item in fitting if not item.setting.count(DISK)] or fitting
    fastest = max((item.speed.tokens_per_s for item in fitting), default=0.0)
    equal = [item for item in fitting if item.speed.tokens_per_s >= fastest * (1 - TIE)]

    def asks(item: Outcome) -> tuple[int, float]:
        return item.setting.count(*STREAMED, "offloaded", "resident"), item.device.peak_gib

    return min(equal, key=asks, default=None)


def least(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome that comes nearest to fitting, or fits best.

    Args:
        outcomes: from `explore`.
    """
    return max(outcomes, key=lambda item: min(item.device.free_gib, item.host.free_gib))


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


def longest(info: ModelInfo, cfg: TrainConfig, machine: Machine, is_lean: bool = True) -> int:
    """The longest rows that fit, one at a time, every layer recomputed, the base where it fits.

    Args:
        info: the model.
        cfg: the run, but for its context_length and memory settings.
        machine: what there is.
        is_lean: False: with its memory settings.

    Returns:
        Tokens, a multiple of LENGTH_STEP, at most what the model knows positions for; 0: none.
    """
    lean: dict[str, Any] = {"batch_size": 1, "use_gradient_checkpointing": True}
    lean |= dict.fromkeys(("selective_layers", "uncheckpointed_layers", "resident_layers"), 0)
    lean |= {"offload_impl": "auto", "sharding_strategy": "full_shard"}

    pairs = itertools.product((False, True), repeat=2)
    chances = [lean | dict(zip(HOSTED, pair, strict=True)) for pair in pairs] if is_lean else [{}]

    def is_too_long(length: int) -> bool:
        runs = [dataclasses.replace(cfg, context_length=length, **own) for own in chances]
        tried = [evaluate(info, run, setting_for(info, run, machine), machine) for run in runs]
        return not any(item.fits for item in tried)  # a margin would refuse rows that run

    most = info.num_positions or info.config.get("max_position_embeddings") or MOST_TOKENS
    lengths = range(LENGTH_STEP, most + 1, LENGTH_STEP)
    return bisect.bisect_left(lengths, True, key=is_too_long) * LENGTH_STEP


class Change(NamedTuple):
    """Something that would make a run fit.

    Args:
        words: what to do.
        lost: besides time; "" for nothing.
        cost: how much is lost, to compare.
        options: names of those that it changes.
        cfg: the run with it.
        outcome: what becomes of it.
    """

    words: str
    lost: str
    cost: int
    options: frozenset[str]
    cfg: TrainConfig
    outcome: Outcome


Row = tuple[str, str, int, dict[str, Any]]  # words, what is lost, how much, changed options


def _single_changes(info: ModelInfo, cfg: TrainConfig, num_ranks: int) -> list[Row]:
    """What could be tried, as far as it changes anything."""
    num_layers, per_step = info.num_layers, cfg.batch_size * cfg.gradient_accumulation_steps
    hosted = {"use_cpu_offload": True, "offload_impl": "auto", "sharding_strategy": "full_shard"}
    rows: list[Row] = []
    for size in (n for n in _divisors(per_step) if n < cfg.batch_size):
        values = {"batch_size": size, "gradient_accumulation_steps": per_step // size}
        rows.append((f"micro-batches of {size}", "", 0, values))
    for num in (num_layers * i // STEPS for i in range(1, STEPS)):
        rows.append((f"{num} layers whole on each GPU", "", 0, {**hosted, "resident_layers": num}))
    due = {"ranks": num_ranks > 1, "rank": cfg.lora_rank > 16, "16bit": cfg.format_name == "bf16"}
    for row in (row for row in WORDS["changes"] if due.get(row.get("when"), True)):
        lost = row.get("lost", "").format_map(vars(cfg))
        rows.append((row["words"], lost, int(lost != ""), row["options"]))
    for num in (n for n in (2, 4) if n > cfg.context_parallel):
        more = cfg.gradient_accumulation_steps * num // cfg.context_parallel
        shared: dict[str, Any] = {"context_parallel": num, "gradient_accumulation_steps": more}
        with contextlib.suppress(UserError):
            sizes.check_context(info, dataclasses.replace(cfg, **shared), num_ranks)
            rows.append((f"each row over {num} GPUs", "", 0, shared))
    for halvings in range(1, (cfg.context_length // 256).bit_length()):
        length = cfg.context_length >> halvings
        lost = f"rows longer than {length} tokens"
        rows.append((f"context {length}", lost, halvings, {"context_length": length}))
    return [row for row in rows if any(getattr(cfg, k) != v for k, v in row[3].items())]


def changes(info: ModelInfo, cfg: TrainConfig, machine: Machine) -> list[Change]:
    """Find what would make a run fit, by planning again with each change.

    Args:
        info: the model.
        cfg: a run that does not fit.
        machine: what there is.

    Returns:
        Three changes at most, those that lose least first, then the cheapest in time; pairs of
        changes too where single ones lose something; none when not even pairs are enough.
    """

    def tried(*rows: Row) -> Change:
        values = {name: value for row in rows for name, value in row[3].items()}
        changed = dataclasses.replace(cfg, **values)
        outcome = evaluate(info, changed, setting_for(info, changed, machine), machine)
        words, lost = " and ".join(row[0] for row in rows), ", ".join(r[1] for r in rows if r[1])
        return Change(words, lost, sum(row[2] for row in rows), frozenset(values), changed, outcome)

    singles = _single_changes(info, cfg, machine.num_ranks)
    fitting = [item for item in map(tried, singles) if item.outcome.fits_safely]
    if all(item.lost for item in fitting):
        enough = {item.words for item in fitting}
        pairs = itertools.combinations([row for row in singles if row[0] not in enough], 2)
        fitting += [it for it in itertools.starmap(tried, pairs) if it.outcome.fits_safely]
    fitting.sort(key=lambda item: (item.cost, -item.outcome.speed.tokens_per_s))
    best: dict[frozenset[str], Change] = {}
    for item in fitting:  # of each kind of change the best
        best.setdefault(item.options, item)
    return list(best.values())[:3]
