"""Where the GiB are: what this process and its machine hold, in the rows of the plan.

All sizes are GiB (1024**3 bytes). Everything that is read at each step costs well under a
millisecond; what is slow (PSS) or must be watched between steps (the machine's peak) is read by
`HostSampler` in the background.

What lies on a GPU from the load to the end is counted tensor by tensor, once. What comes and goes
is the peak of a phase less that; which rows it is made of is found by the memory probe and taken
over from there. What nobody has told apart stands in a row of its own.
"""

import collections
import contextlib
import mmap
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from fsdp_qlora import errors
from fsdp_qlora.data import Data
from fsdp_qlora.distributed import exit_report
from fsdp_qlora.hardware import GIB, find_cgroup, host_used_gib, pss_gib, read_kib
from fsdp_qlora.model import shard, skeleton
from fsdp_qlora.model.load import Built
from fsdp_qlora.planning import rows as names
from fsdp_qlora.planning.rows import GibByRow
from fsdp_qlora.planning.run import RunPlan
from fsdp_qlora.planning.sizes import Sizes
from fsdp_qlora.training import optim

FIXED = (names.BUFFERS, names.SCRATCH, names.GRADIENTS)  # what a shorter batch needs as well
STEP_PHASES = ("forward", "backward", "optimizer")
Phases = dict[str, GibByRow]
TABLE = errors.read_table(__file__, "metrics.toml")
PROCESS_FIELDS: tuple[str, ...] = tuple(TABLE["of_process"])
PSS_SHARE = 0.005  # most of the time that measuring PSS may take, as a share of one core
PROC = Path("/proc/self")
PROCESS_KEYS = ("VmHWM", "RssAnon", "RssFile", "RssShmem")  # of /proc/self/status


def gpu_memory(device: torch.device) -> tuple[float, ...]:
    """GiB of a GPU now: in torch's tensors, in its allocator, in use by all programs, in total.

    Args:
        device: of this rank; a CPU has no memory of its own: zeros.
    """
    if device.type != "cuda":
        return (0.0,) * 4
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return tuple(nbytes / GIB for nbytes in (*own, total_bytes - free_bytes, total_bytes))


class Peak(NamedTuple):
    """What was held in one phase, GiB; of a CPU rank what its process has for itself alone.

    Attributes:
        allocated_gib: the most that tensors took.
        reserved_gib: the most that torch's allocator held; on a CPU the same as allocated.
        left_gib: what tensors took at its end.
    """

    allocated_gib: float = 0.0
    reserved_gib: float = 0.0
    left_gib: float = 0.0


class PhasePeaks:
    """The most that was held in each phase, from mark to mark, exactly: nothing is sampled.

    Attributes:
        marks: the phases that have ended since the last `take`.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin the first phase.

        Args:
            device: of this rank; of a CPU rank the process's own memory is watched.
        """
        self.marks, self._device, self._peaks = list[str](), device, dict[str, Peak]()
        self.now()

    def mark(self, phase: str) -> None:
        """End `phase`: what was held since the last mark belongs to it."""
        peak = self.now()
        self.marks.append(phase)
        self._peaks[phase] = Peak(*map(max, peak, self._peaks.get(phase, peak)))

    def take(self) -> dict[str, Peak]:
        """The peaks by phase since the last call."""
        peaks, self._peaks = self._peaks, {}
        self.marks.clear()
        return peaks

    def now(self) -> Peak:
        """Of the phase that has not ended; a peak that is read here is not in its mark."""
        if self._device.type != "cuda":
            return process_peak()
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        if "allocated_bytes" not in stats:  # nothing was allocated yet
            return Peak()
        allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
        return Peak(allocated["peak"] / GIB, reserved["peak"] / GIB, allocated["current"] / GIB)


def process_peak() -> Peak:
    """Of this process's own pages since the last call, libraries and shared memory left out."""
    highest, own, files, shared = (read_kib(PROC / "status", name) for name in PROCESS_KEYS)
    if not own:  # old kernels do not tell pages of files from others
        return Peak()
    peak = own
    with contextlib.suppress(OSError):
        (PROC / "clear_refs").write_text("5")  # the highest mark starts anew
        peak = max(own, highest - files - shared)
    return Peak(peak / 1024**2, peak / 1024**2, own / 1024**2)


def pinned_gib(device: torch.device) -> float:
    """GiB of page-locked host memory that torch's own pinned allocator holds in this process."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / GIB


def process_memory(device: torch.device, peak: Peak, sampler: "HostSampler") -> dict[str, float]:
    """Device and host memory of this process.

    Args:
        device: of this rank.
        peak: on the device, since the last call; a CPU rank's stands elsewhere.
        sampler: where PSS was measured last.

    Returns:
        PROCESS_FIELDS in GiB.
    """
    peaks = (peak.allocated_gib, peak.reserved_gib) if device.type == "cuda" else (0.0, 0.0)
    rss_gib = psutil.Process().memory_info().rss / GIB
    swap_gib = read_kib(PROC / "status", "VmSwap") * 1024 / GIB
    host = (rss_gib, sampler.pss_gib, pinned_gib(device), swap_gib)
    return dict(zip(PROCESS_FIELDS, (*peaks, *gpu_memory(device), *host), strict=True))


class HostSampler:
    """Watches host memory from a thread: this process's PSS, and the peak use of all processes.

    Use as a context manager, around the load and around the training, so that no peak between
    two steps is missed.

    Attributes:
        cgroup: what bounds this process, besides the machine.
        pss_gib: PSS of this process when it was measured last.
        peak_used_gib: the most host memory that all processes used together since the start.
    """

    def __init__(self, interval_s: float = 0.5) -> None:
        """Prepare.

        Args:
            interval_s: seconds between two looks at the machine.
        """
        self.cgroup = find_cgroup()
        self.pss_gib = self.peak_used_gib = self._next_pss_s = 0.0
        self._interval_s, self._stop = interval_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-memory", daemon=True)

    def __enter__(self) -> "HostSampler":
        """Take the first sample, then go on in the background."""
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the last sample and end the thread."""
        self._stop.set()
        self._thread.join()
        self._next_pss_s = 0.0
        self.sample()

    def sample(self) -> None:
        """Look once: the machine always, PSS when its share of the time allows it."""
        self.peak_used_gib = max(self.peak_used_gib, host_used_gib(self.cgroup))
        began_s = time.monotonic()
        if began_s < self._next_pss_s:
            return
        self.pss_gib = pss_gib()
        ended_s = time.monotonic()
        self._next_pss_s = ended_s + max(4.0, (ended_s - began_s) / PSS_SHARE)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()


_SHARES = collections.namedtuple(
    "_SHARES",
    "base_gib data_gib slices_gib load_gib load_peak_gib save_gib save_peak_gib waiting_gib "
    "forward_gib backward_gib optimizer_gib shared_gib files_gib system_gib used_gib",
    defaults=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
)


class HostShare(_SHARES):
    """What one rank has of its host, GiB; the last four are the whole host's.

    Attributes:
        base_gib: before the model: Python, libraries, data.
        data_gib: of it the tokens.
        slices_gib: of the quantized layers, in memory of its own.
        load_gib: at the end of the load; `load_peak_gib` at its peak.
        save_gib, save_peak_gib: before and in the save.
        waiting_gib: of inputs of layers, for the backward pass.
        forward_gib, backward_gib, optimizer_gib: peaks of these phases.
        shared_gib: quantized layers, one copy for all ranks.
        files_gib: the model's own files, where they lie in memory.
        system_gib: in use before the run.
        used_gib: in use by all programs.
    """


class MemoryTracker:
    """The memory of this rank by row.

    Attributes:
        plan: what was predicted.
        peaks: of the phases; whoever begins or ends one marks it here.
        held: GiB that lie on the device of the rank, by row; filled by `record_model`.
        transients: phase -> what comes and goes in it, GiB by row, as the memory probe told it
            apart; filled by `set_transients`.
        phases: phase -> rows at its peak, of the phases that happen once.
        used_gib: phase -> most of the host in use by all programs, of the same phases.
        taken: phase -> what `phase` has measured.
        pinned_gib: page-locked by this rank itself, unknown to torch's pinned allocator.
    """

    def __init__(self, plan: RunPlan, device: torch.device, data: Data | None = None) -> None:
        """Look at this process before it has a model.

        Args:
            plan: of the run.
            device: of this rank.
            data: of the run, whose tokens this process holds; None: nothing.
        """
        self.plan, self.is_cuda = plan, device.type == "cuda"
        self.peaks, self.held, self.used_gib = PhasePeaks(device), GibByRow(), GibByRow()
        self.transients, self.phases = Phases(), Phases()
        self.pinned_gib = 0.0
        data_gib = _token_bytes(data) / GIB if data else 0.0
        files_gib = Sizes(plan.info, plan.cfg).file_bytes / GIB
        whole = {"files_gib": files_gib, "system_gib": plan.machine.system_gib or 0.0}
        self.share = HostShare(process_peak().left_gib, data_gib, **whole)
        self._device = device
        self._params: list[torch.nn.Parameter] = []
        self._model: skeleton.QuantizedModel | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._moments_gib = 0.0  # of the optimizer, when the last step began
        self._context_gib = 0.0  # what the GPU holds beside torch's allocator, when last looked at
        self.taken: dict[str, Peak] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch a phase that happens once; an error for want of memory leaves it explained.

        Args:
            name: "load", "memory probe", "evaluation" or "save".
        """
        self.peaks.take()
        self.peaks.mark("before")
        before, sampler = process_peak(), HostSampler()
        try:
            with sampler:
                yield
        except Exception as error:
            self.annotate_oom(error, name)
            raise
        self.peaks.mark(name)
        peak = self.peaks.take()[name]
        host = process_peak() if self.is_cuda else peak
        self.taken[name], self.used_gib[name] = peak, sampler.peak_used_gib
        self._look_outside()
        if name in ("load", "save"):
            figures = {f"{name}_peak_gib": host.allocated_gib}
            figures[f"{name}_gib"] = (host if name == "load" else before).left_gib
            self.share = self.share._replace(**figures)
        if name == "save":
            self.phases[name] = self.device_rows(names.PHASES[-1], peak)

    def record_model(self, built: Built) -> None:
        """Count what the load has left on the device, tensor by tensor.

        Args:
            built: the model, filled and not run since, and where its quantized layers lie.
        """
        self._model = model = built.model
        layouts, placed = model.layouts, built.placed
        self.pinned_gib = built.loaded.pinned_bytes / GIB
        layers = {id(block.quantized): number for number, block in enumerate(shard.blocks(model))}
        on_host = 0.0
        self.held = dict.fromkeys(names.DEVICE_ROWS[:4], 0.0)
        for tensor, gib in _tensors(model):
            number = layers.get(id(tensor))
            if number is None:
                self.held[names.ADAPTERS if tensor.requires_grad else names.UNQUANTISED] += gib
            elif placed.names[number] == "offloaded":
                on_host += gib
            else:  # a slice is whatever bytes fall to the rank: it counts as a part of both
                share = layouts[number].weights[-1][1] / layouts[number].nbytes
                self.held[names.PACKED] += gib * share
                self.held[names.CONSTANTS] += gib * (1 - share)
        if placed.streamer is not None:
            self.held[names.BUFFERS] = sum(slot.nbytes for slot in placed.streamer.slots) / GIB
        shared_gib = placed.memory.bytes.nbytes / GIB if placed.memory is not None else 0.0
        self.share = self.share._replace(slices_gib=on_host, shared_gib=shared_gib)
        peak = self.taken["load"]
        if self.is_cuda:  # what else stays, such as the workspace of a library
            self.held[names.LIBRARIES] = max(peak.left_gib - sum(self.held.values()), 0.0)
        load = dict(self.held)
        if peak.allocated_gib > peak.left_gib:  # quantized layers come first, see planning/memory
            load |= {names.UNQUANTISED: 0.0, names.ADAPTERS: 0.0}
        load[names.LOADING] = max(self._own(peak) - sum(load.values()), 0.0)
        self.phases["load"] = _present(load | self._beside(peak))

    def set_transients(self, transients: dict[str, GibByRow], stays_gib: float) -> None:
        """Take over what the memory probe has told apart.

        Args:
            transients: phase -> what comes and goes in it.
            stays_gib: of workspaces that libraries have made on first use.
        """
        self.transients = transients
        if stays_gib:
            self.held[names.LIBRARIES] = self.held.get(names.LIBRARIES, 0.0) + stays_gib

    def record_optimizer(self, trained: optim.Trained) -> None:
        """Say what is trained, so that gradients and moments are known.

        Args:
            trained: this rank's slices of the trained parameters, and the optimizer over them.
        """
        self._params, self._optimizer = trained.params, trained.optimizer

    def _own(self, peak: Peak) -> float:
        """What tensors took at a peak; of a CPU rank all but what it was before the model."""
        return peak.allocated_gib - (0.0 if self.is_cuda else self.share.base_gib)

    def _look_outside(self) -> None:
        """Ask the driver, once a step: it takes its time."""
        if self.is_cuda:
            _, reserved_gib, used_gib, _ = gpu_memory(self._device)
            paged_gib = optim.state_gib(self._optimizer, only_paged=True)
            self._context_gib = max(used_gib - reserved_gib - paged_gib, 0.0)

    def _beside(self, peak: Peak) -> GibByRow:
        """What the GPU holds beside tensors."""
        if not self.is_cuda:
            return {}
        slack_gib = max(peak.reserved_gib - peak.allocated_gib, 0.0)
        return {names.SLACK: slack_gib, names.CONTEXT: self._context_gib}

    def device_rows(self, phase: str, peak: Peak, moments_gib: float | None = None) -> GibByRow:
        """What the device of the rank holds at the peak of a phase.

        Args:
            phase: row of plan.rows.PHASES.
            peak: of it.
            moments_gib: of the optimizer; None: as they are now.

        Returns:
            GiB by row, zeros left out; they sum up to the peak.
        """
        if moments_gib is None:
            moments_gib = optim.state_gib(self._optimizer)
        found, transients = self.held | {names.OPTIMIZER: moments_gib}, self.transients.get(phase)
        has_all_gradients = transients is None and self._num_visits > 1
        if phase == "optimizer" or (has_all_gradients and phase in STEP_PHASES):
            found[names.GRADIENTS] = sum(p.nbytes for p in self._params) / GIB
        paged_gib = min(optim.state_gib(self._optimizer, only_paged=True), moments_gib)
        rest = max(self._own(peak) + paged_gib - sum(found.values()), 0.0)
        for row, gib in _spread(rest, transients).items():
            found[row] = found.get(row, 0.0) + gib
        return _present(found | self._beside(peak))

    def step(self) -> tuple[dict[str, GibByRow], Peak]:
        """Account for an optimizer step that is over.

        Returns:
            Rows at the peak of each of STEP_PHASES, and the highest peak since the last step.
        """
        taken, now_gib = self.peaks.take(), optim.state_gib(self._optimizer)
        self._look_outside()
        moments_gib = dict.fromkeys(STEP_PHASES, self._moments_gib) | {"optimizer": now_gib}
        self._moments_gib = now_gib
        phases = [phase for phase in STEP_PHASES if phase in taken]
        found = {p: self.device_rows(p, taken[p], moments_gib[p]) for p in phases}
        offload = next(shard.blocks(self._model)).offload if self._model is not None else None
        waiting_gib = offload.nbytes / GIB if offload is not None else 0.0
        own = dict.fromkeys(STEP_PHASES, process_peak()) if self.is_cuda else taken
        peaks = {f"{phase}_gib": own.get(phase, Peak()).allocated_gib for phase in STEP_PHASES}
        self.share = self.share._replace(waiting_gib=waiting_gib, **peaks)
        return found, Peak(*map(max, Peak(), Peak(), *taken.values()))

    @property
    def _num_visits(self) -> int:
        """Passes of a step over the layers."""
        cfg = self.plan.cfg
        return -(-cfg.gradient_accumulation_steps // cfg.per_visit)

    @property
    def running(self) -> str:
        """The phase of a step that has begun and has not ended; "" between two steps."""
        marks = self.peaks.marks
        num_left = self._num_visits - marks.count("backward")
        after_backward = "forward" if num_left > 0 else "optimizer"
        after = {"data": "forward", "forward": "backward", "backward": after_backward}
        return after.get(marks[-1], "") if marks else ""

    def annotate_oom(self, error: BaseException, phase: str) -> None:
        """Add to an error for want of memory what was predicted and what was there.

        Args:
            error: gets the lines as notes; any other error stays as it is.
            phase: that was under way, as people call it; its first word is looked up in the plan.
        """
        if not errors.is_memory(error):
            return
        known = phase.split()[0] if phase.split()[0] in names.PHASES else "backward"
        self._look_outside()
        peak = self.peaks.now()
        place, kind = ("a GPU", "device") if self.is_cuda else ("the host, all ranks", "host")
        predicted, measured = self.plan.to_dict().get(kind, {}), self.device_rows(known, peak)
        there = _what_is_there(self._device, peak)
        lines = exit_report.compare_memory(place, known, predicted, measured, there)
        for line in (f"out of memory in the {phase}", *lines):
            error.add_note(line)


def _token_bytes(data: Data) -> int:
    """Bytes of tokens that this process holds for itself; mapped files are not counted."""
    arrays = [value for value in vars(data.train.samples.store).values() if hasattr(value, "base")]
    own = [array for array in arrays if not isinstance(array, np.memmap)]
    return sum(array.nbytes for array in own if not isinstance(array.base, np.memmap | mmap.mmap))


def _tensors(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, float]]:
    """(itself, GiB on this rank) of every parameter and buffer, shared ones once."""
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        local = tensor.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        if local.data_ptr() not in seen:
            yield tensor, local.nbytes / GIB
        seen.add(local.data_ptr())


def _spread(rest_gib: float, transients: GibByRow | None) -> GibByRow:
    """Deal what comes and goes to its rows: what is not FIXED grows with the tokens."""
    if transients is None:
        return {names.REST: rest_gib}
    total = sum(transients.values())
    fixed = sum(gib for row, gib in transients.items() if row in FIXED)
    if rest_gib < fixed or fixed == total:  # less than the probe saw: all rows in proportion
        share = rest_gib / total if total else 0.0
        return {row: gib * share for row, gib in transients.items()}
    share = (rest_gib - fixed) / (total - fixed)
    return {row: gib if row in FIXED else gib * share for row, gib in transients.items()}


def _what_is_there(device: torch.device, peak: Peak) -> str:
    """The memory of the device in words."""
    if device.type != "cuda":
        return f"this rank held {peak.allocated_gib:.2f} GiB of its own at its highest"
    _, reserved_gib, used_gib, total_gib = gpu_memory(device)
    parts = peak.left_gib, reserved_gib - peak.left_gib, used_gib - reserved_gib
    return TABLE["on_gpu"].format(total_gib, *parts, total_gib - used_gib)


@dataclass
class MemoryLedger:
    """The highest rows of each phase, kept on the rank that writes.

    Attributes:
        is_cuda: the ranks compute on GPUs.
        machines: the ranks of each; the first is that of rank 0.
        ranks: of each rank, by phase.
        hosts: of each machine, by phase.
    """

    is_cuda: bool
    machines: Sequence[Sequence[int]]
    ranks: list[Phases] = field(default_factory=list)
    hosts: list[Phases] = field(default_factory=list)

    def update(
        self, told: Sequence[tuple[Phases, HostShare]], phases: Sequence[str]
    ) -> tuple[list[GibByRow], list[GibByRow]]:
        """Keep what the ranks have gathered.

        Args:
            told: of every rank, GiB by phase and row, and of the host.
            phases: that they tell of.

        Returns:
            The rows of each rank's device, and of each host, at the highest of these phases.
        """
        self.ranks = self.ranks or [{} for _ in told]
        self.hosts = self.hosts or [{} for _ in self.machines]
        ranks = [{p: rows for p, rows in found.items() if p in phases} for found, _ in told]
        shares = [[told[rank][1] for rank in machine] for machine in self.machines]
        hosts = [{phase: self.host_rows(phase, own) for phase in phases} for own in shares]
        return _keep_highest(self.ranks, ranks), _keep_highest(self.hosts, hosts)

    def host_rows(self, phase: str, shares: list[HostShare]) -> GibByRow:
        """What a host holds in a phase.

        What other programs and the system use is as it was before the run. On a machine with GPUs
        all the rest that is in use belongs to the processes, drivers included; of CPU ranks
        their models are what they have beyond what they had before it.

        Args:
            phase: row of plan.rows.PHASES.
            shares: of its ranks.

        Returns:
            GiB by row, zeros left out.
        """
        data_gib, base_gib = (sum(getattr(s, n) for s in shares) for n in ("data_gib", "base_gib"))
        whole = shares[0]
        hosted_gib = whole.shared_gib + sum(share.slices_gib for share in shares)
        found = {names.HOSTED: hosted_gib, names.FILES: whole.files_gib}
        found[names.SYSTEM] = max(whole.system_gib - whole.files_gib, 0.0)
        found[names.DATA] = data_gib
        found[names.WAITING] = sum(share.waiting_gib for share in shares)
        if phase == "save":
            found[names.SAVING] = sum(max(s.save_peak_gib - s.save_gib, 0.0) for s in shares)
        if self.is_cuda and phase == "load":
            found[names.LOADING] = sum(max(s.load_peak_gib - s.load_gib, 0.0) for s in shares)
        if self.is_cuda:
            found[names.PROCESSES] = max(whole.used_gib - sum(found.values()), 0.0)
        else:
            found[names.PROCESSES] = base_gib - data_gib
            name = "load_peak_gib" if phase == "load" else f"{phase}_gib"
            own = sum(getattr(share, name) - share.base_gib for share in shares)
            found[names.RANKS] = max(own - found[names.WAITING], 0.0)
        return _present(found)

    def to_dict(self) -> dict[str, Any]:
        """As summary.json has it: `host` is that of rank 0, `hosts` are all of several."""
        ranks, hosts = [{"device": phases} for phases in self.ranks], self.hosts or [{}]
        return {"ranks": ranks, "host": hosts[0]} | ({"hosts": hosts} if len(hosts) > 1 else {})


def _present(rows: GibByRow) -> GibByRow:
    return {row: gib for row, gib in rows.items() if gib > 0}


def _keep_highest(kept: list[Phases], found: list[Phases]) -> list[GibByRow]:
    """Keep the higher rows of each phase; the highest of those that were found."""
    for old, new in zip(kept, found, strict=True):
        old |= {p: rows for p, rows in new.items() if _total(rows) > _total(old.get(p, {}))}
    return [max(new.values(), key=_total, default={}) for new in found]


def _total(rows: GibByRow) -> float:
    return sum(rows.values())
