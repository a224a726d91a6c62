"""What a rank holds, in the rows of the plan: tensors by their size, the rest by peaks of phases.

What lies on a card from the load to the end is counted tensor by tensor, once. What comes and goes
is the peak of a phase less that; which rows it is made of is found in the dry run (tracing.py) and
taken over from there. What nobody has told apart stands in a row of its own.
"""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fsdp_qlora.distributed import exit_report
from fsdp_qlora.model.placement import Placed
from fsdp_qlora.model.shard import blocks
from fsdp_qlora.model.skeleton import PackedModel
from fsdp_qlora.planning import rows as names
from fsdp_qlora.planning.run import RunPlan
from fsdp_qlora.planning.sizes import sizes
from fsdp_qlora.train import optim
from fsdp_qlora.train.memory import GIB, HostSampler, Peak, PhasePeaks, process_peak

STEP_PHASES = ("forward", "backward", "optimizer")
DEVICE_ROWS = (*names.DEVICE_ROWS, names.REST)
Rows = dict[str, float]  # row -> GiB


@dataclass(frozen=True)
class Passing:
    """What comes and goes in a phase, as it was told apart in the dry run, GiB by row.

    Attributes:
        fixed: what a shorter batch needs as well.
        scaled: what grows with the tokens.
    """

    fixed: Rows = field(default_factory=dict)
    scaled: Rows = field(default_factory=dict)


@dataclass(frozen=True)
class HostShare:
    """What one rank has of the host, GiB; shared memory and files left out.

    Attributes:
        base_gib: before the model: Python, libraries, data.
        data_gib: of it the tokens.
        slices_gib: of the packed layers, in memory of its own.
        load_gib: at the end of the load; `load_peak_gib` at its peak.
        save_gib, save_peak_gib: before and in the save.
        waiting_gib: of inputs of layers, for the backward pass.
        peaks_gib: in STEP_PHASES.
    """

    base_gib: float = 0.0
    data_gib: float = 0.0
    slices_gib: float = 0.0
    load_gib: float = 0.0
    load_peak_gib: float = 0.0
    save_gib: float = 0.0
    save_peak_gib: float = 0.0
    waiting_gib: float = 0.0
    peaks_gib: tuple[float, ...] = (0.0,) * len(STEP_PHASES)


class Account:
    """The memory of this rank by row.

    Attributes:
        plan: what was predicted.
        peaks: of the phases; whoever begins or ends one marks it here.
        held: GiB that lie on the device of the rank, by row; filled by `hold`.
        passing: phase -> what comes and goes in it; filled by `learn`.
        phases: phase -> rows at its peak, of the phases that happen once.
        used_gib: phase -> most of the host in use by all programs, of the same phases.
        shared_gib: packed layers on the host, one copy for all ranks.
        files_gib: the model's own files, where they lie in memory.
    """

    def __init__(self, plan: RunPlan, device: torch.device, data_bytes: int = 0) -> None:
        """Look at this process before it has a model.

        Args:
            plan: of the run.
            device: of this rank.
            data_bytes: of the tokens that this process holds.
        """
        self.plan, self.is_cuda = plan, device.type == "cuda"
        self.peaks = PhasePeaks(device)
        self.held: Rows = {}
        self.passing: dict[str, Passing] = {}
        self.phases: dict[str, Rows] = {}
        self.used_gib: dict[str, float] = {}
        self.shared_gib = 0.0
        self.files_gib = sizes(plan.info, plan.cfg).file_bytes / GIB
        importlib.import_module("transformers.modeling_utils")  # a library, not the model
        self.share = HostShare(process_peak().left_gib, data_bytes / GIB)
        self._device = device
        self._params: list[nn.Parameter] = []
        self._model: PackedModel | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._moments_gib = 0.0  # of the optimizer, when the last step began
        self._context_gib = 0.0  # what the card holds beside torch's allocator, when last looked at
        self._taken: dict[str, Peak] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch a phase that happens once; an error for want of memory leaves it explained.

        Args:
            name: "load", "dry run" or "save".
        """
        self.peaks.take()
        self.peaks.mark("before")
        before, sampler = process_peak(), HostSampler()
        try:
            with sampler:
                yield
        except Exception as error:
            self.explain(error, name)
            raise
        self.peaks.mark(name)
        peak = self.peaks.take()[name]
        host = process_peak() if self.is_cuda else peak
        self._taken[name], self.used_gib[name] = peak, sampler.peak_used_gib
        self._look_outside()
        own = {"load": ("load_gib", host.left_gib), "save": ("save_gib", before.left_gib)}.get(name)
        if own is not None:
            changed = {own[0]: own[1], own[0].replace("_gib", "_peak_gib"): host.allocated_gib}
            self.share = _replace(self.share, **changed)
        if name == "save":
            self.phases[name] = self.device_rows(names.PHASES[-1], peak)

    def peak_of(self, name: str) -> Peak:
        """What `phase` has measured."""
        return self._taken[name]

    def hold(self, model: PackedModel, placed: Placed) -> None:
        """Count what the load has left on the device, tensor by tensor.

        Args:
            model: filled, and not run since.
            placed: where its packed layers lie.
        """
        self._model, layout = model, model.layout
        weights_share = layout.weights[-1][1] / layout.nbytes
        layers = {id(block.packed): number for number, block in enumerate(blocks(model))}
        on_host = 0.0
        self.held = dict.fromkeys(names.DEVICE_ROWS[:4], 0.0)
        for tensor, nbytes in _tensors(model):
            gib = nbytes / GIB
            if id(tensor) in layers:
                if placed.rows[layers[id(tensor)]].is_on_host:
                    on_host += gib
                    continue
                # A slice is whatever bytes fall to the rank: it counts as a part of both.
                self.held[names.PACKED] += gib * weights_share
                self.held[names.CONSTANTS] += gib * (1 - weights_share)
            else:
                row = names.ADAPTERS if tensor.requires_grad else names.UNQUANTISED
                self.held[row] += gib
        if placed.streamer is not None:
            self.held[names.BUFFERS] = sum(slot.nbytes for slot in placed.streamer.slots) / GIB
        if placed.memory is not None:
            self.shared_gib = placed.memory.bytes.nbytes / GIB
        self.share = _replace(self.share, slices_gib=on_host)
        peak = self._taken["load"]
        if self.is_cuda:  # what else stays, such as the workspace of a library
            rest = peak.left_gib - sum(self.held.values())
            self.held[names.LIBRARIES] = max(rest, 0.0)
        load = dict(self.held)
        if peak.allocated_gib > peak.left_gib:  # the packed layers come first, see plan/memory.py
            load |= {names.UNQUANTISED: 0.0, names.ADAPTERS: 0.0}
        load[names.LOADING] = max(self._own(peak) - sum(load.values()), 0.0)
        load |= self._beside(peak)
        self.phases["load"] = {row: gib for row, gib in load.items() if gib > 0}

    def learn(self, passing: dict[str, Passing], stays_gib: float) -> None:
        """Take over what the dry run has told apart.

        Args:
            passing: phase -> what comes and goes in it.
            stays_gib: of workspaces that libraries have made on first use.
        """
        self.passing = passing
        if stays_gib:
            self.held[names.LIBRARIES] = self.held.get(names.LIBRARIES, 0.0) + stays_gib

    def watch(self, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Say what is trained, so that gradients and moments are known.

        Args:
            params: this rank's slices of the trained parameters.
            optimizer: over them.
        """
        self._params, self._optimizer = params, optimizer

    def _own(self, peak: Peak) -> float:
        """What tensors took at a peak; of a CPU rank all but what it was before the model."""
        return peak.allocated_gib - (0.0 if self.is_cuda else self.share.base_gib)

    def _look_outside(self) -> None:
        """Ask the driver, once a step: it takes its time."""
        if self.is_cuda:
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
            reserved_bytes = torch.cuda.memory_reserved(self._device)
            outside_gib = (total_bytes - free_bytes - reserved_bytes) / GIB
            self._context_gib = max(
                outside_gib - optim.state_gib(self._optimizer, only_paged=True), 0.0
            )

    def _beside(self, peak: Peak) -> Rows:
        """What the card holds beside tensors."""
        if not self.is_cuda:
            return {}
        slack_gib = max(peak.reserved_gib - peak.allocated_gib, 0.0)
        return {names.SLACK: slack_gib, names.CONTEXT: self._context_gib}

    def device_rows(self, phase: str, peak: Peak, moments_gib: float | None = None) -> Rows:
        """What the device of the rank holds at the peak of a phase.

        Args:
            phase: row of plan.rows.PHASES.
            peak: of it.
            moments_gib: of the optimizer; None: as they are now.

        Returns:
            GiB by row, zeros left out; they sum up to the peak.
        """
        found = dict(self.held)
        found[names.OPTIMIZER] = (
            optim.state_gib(self._optimizer) if moments_gib is None else moments_gib
        )
        passing = self.passing.get(phase)
        has_all_gradients = passing is None and self.plan.cfg.gradient_accumulation_steps > 1
        if phase == "optimizer" or (has_all_gradients and phase in STEP_PHASES):
            found[names.GRADIENTS] = sum(p.nbytes for p in self._params) / GIB
        paged_gib = min(optim.state_gib(self._optimizer, only_paged=True), found[names.OPTIMIZER])
        rest = max(self._own(peak) + paged_gib - sum(found.values()), 0.0)
        for row, gib in _spread(rest, passing).items():
            found[row] = found.get(row, 0.0) + gib
        found |= self._beside(peak)
        return {row: gib for row, gib in found.items() if gib > 0}

    def step(self) -> tuple[dict[str, Rows], Peak]:
        """Account for an optimizer step that is over.

        Returns:
            Rows at the peak of each of STEP_PHASES, and the highest peak since the last step.
        """
        taken = self.peaks.take()
        now_gib = optim.state_gib(self._optimizer)
        self._look_outside()
        found = {}
        for phase in STEP_PHASES:
            if phase in taken:
                moments = now_gib if phase == "optimizer" else self._moments_gib
                found[phase] = self.device_rows(phase, taken[phase], moments)
        self._moments_gib = now_gib
        offload = next(blocks(self._model)).offload if self._model is not None else None
        waiting_gib = offload.nbytes / GIB if offload is not None else 0.0
        self.share = _replace(self.share, waiting_gib=waiting_gib)
        highest = Peak()
        for peak in taken.values():
            highest = highest.highest(peak)
        if self.is_cuda:
            self.share = _replace(self.share, peaks_gib=(process_peak().allocated_gib,) * 3)
        else:
            peaks = tuple(taken.get(phase, Peak()).allocated_gib for phase in STEP_PHASES)
            self.share = _replace(self.share, peaks_gib=peaks)
        return found, highest

    @property
    def running(self) -> str:
        """The phase of a step that has begun and has not ended; "" between two steps."""
        marks = self.peaks.marks
        num_left = self.plan.cfg.gradient_accumulation_steps - marks.count("backward")
        after_backward = "forward" if num_left > 0 else "optimizer"
        after = {"data": "forward", "forward": "backward", "backward": after_backward}
        return after.get(marks[-1], "") if marks else ""

    def explain(self, error: BaseException, phase: str) -> None:
        """Add to an error for want of memory what was predicted and what was there.

        Args:
            error: gets the lines as notes; any other error stays as it is.
            phase: that was under way, as people call it; its first word is looked up in the plan.
        """
        if not exit_report.is_memory(error):
            return
        known = phase.split()[0] if phase.split()[0] in names.PHASES else "backward"
        self._look_outside()
        peak = self.peaks.now()
        scene = exit_report.Scene(
            phase=phase,
            predicted=self.plan.to_dict().get("device" if self.is_cuda else "host", {}),
            known_phase=known,
            measured=self.device_rows(known, peak),
            is_cuda=self.is_cuda,
            there=_what_is_there(self._device, peak),
        )
        for line in scene.lines():
            error.add_note(line)


def _replace(share: HostShare, **changes: Any) -> HostShare:
    return HostShare(**{**vars(share), **changes})


def _tensors(model: nn.Module) -> Iterator[tuple[torch.Tensor, int]]:
    """(itself, bytes on this rank) of every parameter and buffer, shared ones once."""
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        local = tensor.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        if local.data_ptr() not in seen:
            yield tensor, local.nbytes
        seen.add(local.data_ptr())


def _spread(rest_gib: float, passing: Passing | None) -> Rows:
    """Deal what comes and goes to its rows."""
    if passing is None:
        return {names.REST: rest_gib}
    fixed, scaled = sum(passing.fixed.values()), sum(passing.scaled.values())
    if rest_gib < fixed or not scaled:  # less than the dry run saw: all rows in proportion
        share = rest_gib / (fixed + scaled) if fixed + scaled else 0.0
        pairs = [*passing.fixed.items(), *passing.scaled.items()]
        return {row: gib * share for row, gib in pairs}
    share = (rest_gib - fixed) / scaled
    return passing.fixed | {row: gib * share for row, gib in passing.scaled.items()}


def _what_is_there(device: torch.device, peak: Peak) -> str:
    """The memory of the device in words."""
    if device.type != "cuda":
        return f"this rank held {peak.allocated_gib:.2f} GiB of its own at its highest"
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    reserved_gib = torch.cuda.memory_reserved(device) / GIB
    outside_gib = (total_bytes - free_bytes) / GIB - reserved_gib
    return (
        f"{total_bytes / GIB:.1f} GiB on the card: {peak.left_gib:.2f} in tensors, "
        f"{reserved_gib - peak.left_gib:.2f} reserved beside them, {outside_gib:.2f} of context "
        f"and other programs, {free_bytes / GIB:.2f} free"
    )
