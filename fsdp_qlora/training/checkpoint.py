"""Checkpoints of a run: taken while the training goes on, and loaded to resume it.

Everything trained is gathered whole, without padding, into rank 0's host memory: that is all the
training waits for. A thread writes it (checkpoint_store). Any number of ranks can resume from it.
No random state is saved: rows and dropout of a step follow from seed, step and rank (loop.fit).
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from fsdp_qlora import atomic, checkpoint_store, config, hardware, record
from fsdp_qlora.checkpoint_store import OPTIMIZER, WEIGHTS, Array, SavedCheckpoint
from fsdp_qlora.data import Data
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import INTEGRITY, Stopped, UserError
from fsdp_qlora.model import shard
from fsdp_qlora.model.weights import DTYPE_NAMES
from fsdp_qlora.planning import memory, sizes
from fsdp_qlora.planning.run import RunPlan
from fsdp_qlora.training import optim, preflight
from fsdp_qlora.training.metrics import Recorder, Resumed

HEARTBEAT_S = 2.0
Tensors = dict[str, dict[str, Array]]  # by file and name
BY_RANK = "@ranks"  # ends the name of what the ranks keep for blocks of their slices


class HostBuffer:
    """Host memory for a snapshot, touched before it is needed: the first touch takes longest.

    Attributes:
        memory: uint8, flat.
        end: of the copies so far; 0 forgets them.
    """

    def __init__(self, nbytes: int) -> None:
        """Reserve the memory.

        Args:
            nbytes: expected; what goes beyond gets memory of its own.
        """
        self.memory, self.end = torch.empty(nbytes, dtype=torch.uint8), 0

    def copy(self, tensor: Tensor) -> Array:
        """Copy a tensor.

        Args:
            tensor: of a dtype in DTYPE_NAMES, on any device.
        """
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        start, self.end = self.end, self.end + flat.numel()
        fits = self.end <= self.memory.numel()
        copy = self.memory[start : self.end] if fits else torch.empty_like(flat, device="cpu")
        copy.copy_(flat)
        return Array(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), copy.numpy().data)


def snapshot(trained: optim.Trained, buffer: HostBuffer) -> tuple[Tensors, dict[str, Any]]:
    """Copy everything that is trained; every rank must call.

    Args:
        trained: between two steps.
        buffer: where to, on rank 0, which writes; cleared first.

    Returns:
        (file -> tensors by name, on the host of the rank that writes, empty elsewhere; for the
        state: plain numbers of the optimizer by name of the parameter, whether the weights are
        finite and so on).
    """
    is_writer, buffer.end = trained.world.rank == 0, 0
    shard.settle(trained.model)
    weights, moments = dict[str, Array](), dict[str, Array]()
    numbers: dict[str, dict[str, float]] = {}
    sums: list[Tensor] = []
    for name, param, local, rows in _named(trained):
        whole = shard.whole(param, local.data)
        if is_writer:
            weights[name] = buffer.copy(whole[:rows])
            sums.append(whole.sum(dtype=torch.float64))
        state = trained.optimizer.state.get(local, {})
        if kept := {k: v for k, v in state.items() if isinstance(v, int | float)}:
            numbers[name] = kept
    for name, value, slice_of, rows in _states(trained):
        if slice_of is not None:
            value = shard.whole(slice_of, value)[:rows]
        elif name.endswith(BY_RANK):
            value = _of_all_ranks(value, trained.world)
        if is_writer:
            moments[name] = buffer.copy(value)
    is_finite = bool(torch.stack(sums).isfinite().all()) if sums else True
    found: dict[str, Any] = {"is_finite": is_finite, "optimizer": numbers}
    found |= {"num_ranks": trained.world.size, "num_scheduled": trained.schedule.last_epoch}
    return {WEIGHTS: weights, OPTIMIZER: moments}, found | {"guard": trained.guard.state()}


def _named(trained: optim.Trained) -> Iterator[tuple[str, Tensor, torch.nn.Parameter, int]]:
    """Name, parameter of the model, this rank's slice of it, rows that are no padding."""
    model = trained.model
    params, names = shard.trained_parameters(model), shard.trained_names(model)
    yield from zip(names, params, trained.params, shard.num_rows(model), strict=True)


def _states(trained: optim.Trained) -> Iterator[tuple[str, Tensor, Tensor | None, int]]:
    """Tensors of the optimizer: "NAME.KEY", the tensor, the parameter it is a slice like, rows."""
    for name, param, local, rows in _named(trained):
        for key, value in sorted(trained.optimizer.state.get(local, {}).items()):
            if isinstance(value, Tensor) and value.shape == local.shape:
                yield f"{name}.{key}", value, param, rows
            elif isinstance(value, Tensor):
                yield f"{name}.{key}{BY_RANK if value.ndim else ''}", value, None, 0


def _of_all_ranks(value: Tensor, world: World) -> Tensor:
    """[ranks, longest]: what belongs to blocks of a slice, and so to the number of ranks."""
    padded = value.new_zeros(max(world.gather_objects(value.numel())))
    padded[: value.numel()] = value.reshape(-1)
    return world.share(padded)


def restore(trained: optim.Trained, saved: SavedCheckpoint | None) -> None:
    """Put a checkpoint into a model and its optimizer: every rank reads its own slices.

    Args:
        trained: built as for a new run.
        saved: of any number of ranks; its fingerprint has been compared. None: nothing to do.

    Raises:
        UserError: it does not have the tensors of this model (code 5).
    """
    if saved is None:
        return
    shard.settle(trained.model)
    optimizer, schedule, state = trained.optimizer, trained.schedule, saved.state
    file, names = _open(saved.path / WEIGHTS, trained.world), [name for name, *_ in _named(trained)]
    if sorted(file.keys()) != sorted(names):
        other = sorted(set(file.keys()) ^ set(names))[:3]
        rule = f"does not have what this run trains ({', '.join(other)})"
        raise UserError(str(saved.path / WEIGHTS), rule, "start a new run", INTEGRITY)
    for name, param, local, rows in _named(trained):
        local.data.copy_(_slice(file.get_slice(name), name, param, local, rows))
    by_param, groups = dict(_read_states(trained, saved)), optimizer.state_dict()["param_groups"]
    order = [param for group in optimizer.param_groups for param in group["params"]]
    numbered = {i: by_param[param] for i, param in enumerate(order) if by_param[param]}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})
    trained.guard.restore(state["guard"])
    if state["num_scheduled"]:  # the rates follow from the step alone
        schedule.last_epoch, schedule._step_count = state["num_scheduled"] - 1, 2
        schedule.step()


def _read_states(
    trained: optim.Trained, saved: SavedCheckpoint
) -> Iterator[tuple[torch.nn.Parameter, dict[str, Any]]]:
    """What the optimizer keeps of each slice: all of `_states`, and the numbers."""
    world, num_ranks = trained.world, saved.state["num_ranks"]
    file, by_owner = _open(saved.path / OPTIMIZER, world), dict[str, list[str]]()
    for full_name in file.keys():  # noqa: SIM118 - it is no mapping
        by_owner.setdefault(full_name.rpartition(".")[0], []).append(full_name)
        if full_name.endswith(BY_RANK) and num_ranks != world.size:
            got = f"{type(trained.optimizer).__name__} on {world.size} ranks"
            raise UserError(got, f"was saved by {num_ranks}, blockwise", "start as many")
    for name, param, local, rows in _named(trained):
        own: dict[str, Any] = dict(saved.state["optimizer"].get(name, {}))
        for full_name in by_owner.get(name, ()):
            key, stored = full_name.rpartition(".")[2], file.get_slice(full_name)
            if key.endswith(BY_RANK):
                own[key.removesuffix(BY_RANK)] = stored[:][world.rank]
            elif stored.get_shape():
                own[key] = _slice(stored, full_name, param, local, rows)
            else:
                own[key] = file.get_tensor(full_name)
        yield local, own


class _FromFirst:
    """A file of a checkpoint that rank 0 reads for all: other machines need not have it."""

    def __init__(self, path: Path, world: World) -> None:
        self._world, self._whole = world, torch.empty(0)
        self._file: Any = safe_open(path, framework="pt") if world.rank == 0 else None
        self._names = world.first(lambda: list(self._file.keys()))

    def keys(self) -> list[str]:
        return self._names

    def get_slice(self, name: str) -> "_FromFirst":
        self._whole = self._world.from_first(self._file.get_tensor(name) if self._file else None)
        return self

    def get_tensor(self, name: str) -> Tensor:
        return self._whole  # its slice has been asked for

    def get_shape(self) -> list[int]:
        return list(self._whole.shape)

    def __getitem__(self, part: slice) -> Tensor:
        return self._whole[part]


def _open(path: Path, world: World) -> Any:
    is_here = world.size == world.local_size
    return safe_open(path, framework="pt") if is_here else _FromFirst(path, world)


def _slice(stored: Any, name: str, param: Tensor, local: Tensor, rows: int) -> Tensor:
    """This rank's slice of a saved tensor, padded with zeros."""
    start, stop = shard.local_range(param)
    if stored.get_shape() != [rows, *local.shape[1:]]:
        rule = f"is {stored.get_shape()}, and this run has {[rows, *local.shape[1:]]}"
        raise UserError(f"{name} of the checkpoint", rule, "start a new run", INTEGRITY)
    values = stored[start : min(stop, rows)] if start < rows else None
    padded = torch.zeros(local.shape, dtype=local.dtype if values is None else values.dtype)
    if values is not None:
        padded[: values.shape[0]] = values
    return padded


class ResumeState(NamedTuple):
    """Where a run starts: anew, or after a checkpoint.

    Attributes:
        facts: of the run, for every checkpoint.
        saved: the checkpoint; None: it starts anew.
        lines: for the user.
    """

    facts: dict[str, Any]
    saved: SavedCheckpoint | None = None
    lines: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps that were taken before."""
        return 0 if self.saved is None else self.saved.step

    def record(self, output_dir: Path, is_writer: bool) -> Resumed:
        """Cut what was recorded after the checkpoint, on the rank that writes.

        Args:
            output_dir: of the run.
            is_writer: this rank does.

        Returns:
            What the record goes on with.
        """
        if self.saved is None or not is_writer:
            return Resumed(step=self.step)
        checkpoint_store.go_back(output_dir, self.step)
        lines = checkpoint_store.cut_record(output_dir / checkpoint_store.METRICS, self.step)
        return Resumed(lines, self.saved.state.get("total_s", 0.0), self.step)


def load(
    plan: RunPlan, given: frozenset[str], saved: SavedCheckpoint | None, data: Data, world: World
) -> ResumeState:
    """Check that all ranks do the same, and go on with what it was; write its configuration.

    Args:
        plan: of the run, with what was chosen for it.
        given: names of the options that the user wrote.
        saved: the checkpoint that is resumed, the same on every rank; None: none is.
        data: what is learned.
        world: the ranks; all must call.

    Raises:
        UserError: base, data or steps of the ranks differ, or base, adapter or data are not those
            of the checkpoint (code 2).
    """
    cfg, lines = plan.cfg, list[str]()
    current = preflight.fingerprint(cfg, plan.info, plan.info.digest(1), world.size)
    current |= preflight.data_fingerprint(data)
    if cfg.verify_base == "full":  # one rank of each machine reads all of its files
        mine = plan.info.whole_digest if world.local_rank == 0 else None
        current["base_bytes"] = world.gather_objects(mine)[world.peers[0]]
    libraries, num_steps = hardware.versions(world.device), data.train.num_steps
    facts: dict[str, Any] = {name: current[name] for name in current if name != "template"}
    facts |= {"steps": num_steps, "held-out rows and prompts": data.digest}
    world.agree(facts)
    if saved is not None:
        lines = [f"resume    {saved.path}: {saved.step} of {num_steps} steps are done"]
        lines += preflight.check_same(saved.state["fingerprint"], current, cfg.allow_data_change)
        lines += _course_notes(saved, cfg, num_steps)
        lines += preflight.library_notes(saved.state.get("versions", {}), libraries)
        if saved.state["num_ranks"] != world.size:
            ranks = f"{saved.state['num_ranks']} ranks, now {world.size}"
            lines.append(f"resume    {ranks}: the same steps to rounding, not bit for bit")
    if world.rank == 0:
        config.save(cfg, cfg.resolved_output_dir / checkpoint_store.CONFIG, libraries)
    facts = {"run_format": record.RUN_FORMAT, "num_steps": num_steps}
    facts |= {"config": config.to_dict(cfg), "given": sorted(given)}
    facts |= {"fingerprint": current, "versions": libraries}
    return ResumeState(facts, saved, tuple(lines))


def _course_notes(saved: SavedCheckpoint, cfg: config.TrainConfig, num_steps: int) -> list[str]:
    """What this run does otherwise than the checkpoint's, and how the learning rate jumps."""
    step, path = saved.step, saved.path
    if step > num_steps:
        rule = f"is already after step {step}, and this run has {num_steps}"
        raise UserError(f"--resume {path}", rule, "ask for more steps, or resume an earlier one")
    stored, _ = config.from_record(saved.state["config"])
    before = functools.partial(optim.learning_rate, stored, saved.state.get("num_steps", num_steps))
    both = [(n, getattr(stored, n), getattr(cfg, n)) for n in preflight.TABLE["course"]]
    lines = [f"resume    --{name} was {old}, now {new}" for name, old, new in both if old != new]
    rate, planned = optim.learning_rate(cfg, num_steps, step), before(step)
    if step < num_steps and not math.isclose(rate, planned, abs_tol=1e-6 * cfg.base_lr):
        words = f"{before(max(step - 1, 0)):.3g} in step {step}, {rate:.3g} in the next"
        lines.append(f"resume    learning rate: {words} ({planned:.3g} without these changes)")
    return lines


def period(save_every: str) -> tuple[int, float]:
    """Read --save_every.

    Args:
        save_every: "50" steps, "30m" minutes, "0" for never.

    Returns:
        (steps, seconds) from checkpoint to checkpoint; 0 and infinity for the one not meant.
    """
    if save_every.endswith("m"):
        return 0, int(save_every[:-1]) * 60.0 or math.inf
    return int(save_every), math.inf


class Checkpointer:
    """Saves the checkpoints of a run; every rank has one and calls it in the same order.

    Attributes:
        step: of the latest checkpoint that was begun, or resumed.
        best: (step, held-out loss) of the best one, or None.
        stop: what signals leave.
    """

    def __init__(
        self, trained: optim.Trained, recorder: Recorder, resumed: ResumeState, stop: hooks.StopFlag
    ) -> None:
        """Prepare; nothing is written before the first checkpoint is due.

        Args:
            trained: what is saved.
            recorder: of the run, which must not lag behind a checkpoint; the configuration of its
                plan gives save_every, keep_checkpoints, save_model (at the end too), the directory.
            resumed: where the run starts; its facts go into every checkpoint.
            stop: installed already.
        """
        self.step, self._taken, self.stop = resumed.step, resumed.step, stop
        self._trained, self._recorder = trained, recorder
        self._cfg = cfg = recorder.tracker.plan.cfg
        self._facts, self._output_dir = resumed.facts, cfg.resolved_output_dir
        self._num_steps, self._seconds = period(cfg.save_every)
        self._is_on, self._is_writer = cfg.saves_checkpoints, trained.world.rank == 0
        self._saved_s, self._has_new_best = time.monotonic(), False
        self._thread, self._writing_step = futures.ThreadPoolExecutor(1, "checkpoint"), 0
        self._writing: futures.Future | None = None
        self.best = trained.world.gather_objects(self._read_best())[0]  # as rank 0 has read it
        params = shard.trained_parameters(trained.model)
        nbytes = sum(p.numel() * (p.element_size() + memory.moment_bytes(cfg)) for p in params)
        nbytes *= self._is_on and self._is_writer
        self._buffer = HostBuffer(nbytes)
        if nbytes <= sizes.MOST_TOUCHED_BYTES:
            self._start(self._buffer.memory.zero_)  # makes the system give it

    def _read_best(self) -> tuple[int, float] | None:
        """Step and loss of the best checkpoint as this rank reads them; None: there is none."""
        best = None
        try:
            best = checkpoint_store.best_of(self._output_dir)
            if best and best["step"] not in checkpoint_store.steps(self._output_dir):
                best = None  # the run has gone back behind it
        except UserError as error:
            self._recorder.say(f"warning   {error}")
        return (best["step"], float(best["loss"])) if best else None

    def mark_best(self, best: tuple[float, int] | None) -> None:
        """Keep the checkpoint of the best evaluation; every rank must call.

        Args:
            best: lowest held-out loss, the same on every rank, and the step it was measured after:
                at the latest the last one taken. If that has no checkpoint yet, it gets one.
        """
        if best is None or not self._is_on or not best[0] < (self.best or (0, math.inf))[1]:
            return
        loss, step = best
        if step != self._taken:
            return  # known from before a resume
        self.best, self._has_new_best = (step, loss), step != self.step
        if not self._has_new_best:
            self._join()
            self._start(functools.partial(self._tidy, self.best, checkpoint_store.ignore))

    def poll(self, step: int) -> list[float]:
        """What this rank asks for after a step; the highest of each number over the ranks counts.

        Args:
            step: that is being recorded, from 1.

        Returns:
            Number of the signal that has come, or 0; whether a checkpoint is due.
        """
        self._taken = step
        is_due = self._num_steps > 0 and step % self._num_steps == 0
        is_late = self._is_writer and time.monotonic() - self._saved_s >= self._seconds
        return [float(self.stop.number), float(is_due or is_late)]

    def should_save(self, polled: Sequence[float]) -> bool:
        """Whether `after_step` must be called after a step; also ends a write that is done.

        Args:
            polled: `poll` of all ranks.
        """
        if self._is_writer and self._writing is not None and self._writing.done():
            self._join()
        return any(polled) or self._has_new_best

    def after_step(self, step: int, polled: Sequence[float]) -> None:
        """Save; leave, if a signal has come.

        Args:
            step: that is over, from 1.
            polled: `poll` of all ranks.

        Raises:
            Stopped: after a signal; what was trained is saved.
        """
        self.save(step)
        if polled[0]:
            self.wait()
            raise Stopped(int(polled[0]), self._output_dir)

    def finish(self, step: int) -> None:
        """Save what a run has ended with, and wait until it is on the disk; every rank must call.

        Args:
            step: the last one.

        Raises:
            Stopped: a signal came meanwhile.
        """
        with self.stop.deferred():
            if self._cfg.save_model:
                self.save(step)
            self.wait()
        if self.stop.number:
            raise Stopped(self.stop.number, self._output_dir)

    def save(self, step: int) -> None:
        """Begin a checkpoint; returns when the training may go on. Every rank must call.

        Args:
            step: the last one taken.
        """
        if not self._is_on or step == self.step:
            return
        hooks.beat("save", self._trained.world.rank, step)
        self._recorder.flush()
        begin_s = time.monotonic()
        self.wait()
        tensors, found = snapshot(self._trained, self._buffer)
        best, self._has_new_best = self.best if self._has_new_best else None, False
        self.step, self._saved_s = step, time.monotonic()
        state = {**self._facts, **found, "total_s": self._recorder.total_s()}
        self._start(lambda: self._write(step, tensors, state, best))
        if not found["is_finite"]:  # the run is about to end: a restart must find it there
            self._join()
        if not self._is_writer:
            for point in hooks.SAVE_POINTS:  # only kills and the like matter to those that wait
                with contextlib.suppress(OSError):
                    hooks.reach(point, self._trained.world.rank, step)
        self._recorder.event("checkpoint", {"step": step, "blocked_s": time.monotonic() - begin_s})

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; every rank must call."""
        world, is_busy = self._trained.world, True
        while is_busy:
            if self._writing is not None:
                futures.wait([self._writing], HEARTBEAT_S)
            hooks.beat("save", world.rank, self.step)  # a slow disk is no hang
            is_busy = world.sum(self._writing is not None and not self._writing.done()) > 0
        self._join()

    def _write(
        self, step: int, tensors: Tensors, state: dict[str, Any], best: tuple[int, float] | None
    ) -> None:
        """Write one checkpoint and remove those that it makes needless; in the thread."""

        reach = functools.partial(hooks.reach, rank=0, step=step)
        with contextlib.suppress(FileNotFoundError):
            atomic.sync(self._output_dir / checkpoint_store.METRICS)
        root = self._output_dir / checkpoint_store.CHECKPOINTS
        checkpoint_store.write(root, step, tensors, state, reach)
        self._tidy(best, reach)

    def _tidy(self, best: tuple[int, float] | None, reach: checkpoint_store.Reach) -> None:
        """Mark the best checkpoint, if it is there, and remove those that nobody needs."""
        if best is not None and best[0] in checkpoint_store.steps(self._output_dir):
            checkpoint_store.set_best(self._output_dir, *best)
        checkpoint_store.prune(self._output_dir, self._cfg.keep_checkpoints, reach)

    def _start(self, work: Callable[[], object]) -> None:
        if self._is_writer:
            self._writing, self._writing_step = self._thread.submit(work), self.step

    def _join(self) -> None:
        """Wait for the thread, and report what went wrong; the training goes on."""
        if self._writing is None:
            return
        error, self._writing = self._writing.exception(), None
        if isinstance(error, OSError | UserError):
            last = checkpoint_store.last_step(self._output_dir)
            left = "none" if last is None else f"of step {last}"
            reason = getattr(error, "strerror", None) or str(error)
            words = f"the checkpoint of step {self._writing_step} could not be written ({reason}); "
            words += f"the training goes on; the last one there: {left}"
            self._recorder.say(f"warning   {words}")
        elif error is not None:
            raise error
