"""What is trained, copied to the host and put back: weights and what the optimizer keeps.

Every tensor is gathered whole, without what pads it to the ranks, so that any number of ranks may
go on from it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open

from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.model import shard
from fsdp_qlora.train.checkpoint_files import OPTIMIZER, WEIGHTS, Array, Saved

if TYPE_CHECKING:
    from fsdp_qlora.training.loop import Trained

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
BY_RANK = "@ranks"  # ends the name of what the ranks keep for blocks of their slices


class HostCopies:
    """Room for what is saved, in memory that has been touched: the first touch takes longest."""

    def __init__(self, nbytes: int) -> None:
        """Take the room.

        Args:
            nbytes: expected; what goes beyond gets room of its own.
        """
        self._room = torch.empty(nbytes, dtype=torch.uint8)
        self._end = 0

    def touch(self) -> None:
        """Make the system give the memory."""
        self._room.zero_()

    def clear(self) -> None:
        """Forget the copies."""
        self._end = 0

    def keep(self, tensor: torch.Tensor) -> Array:
        """Copy a tensor.

        Args:
            tensor: of a dtype in DTYPES, on any device.
        """
        plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        start, end = self._end, self._end + plain.numel()
        self._end = end
        is_room = end <= self._room.numel()
        copy = self._room[start:end] if is_room else torch.empty_like(plain, device="cpu")
        copy.copy_(plain)
        return Array(DTYPES[tensor.dtype], tuple(tensor.shape), copy.numpy().data)


class Snapshot(NamedTuple):
    """Everything that is trained.

    Attributes:
        tensors: file -> tensors by name, on the host of the rank that writes; empty elsewhere.
        numbers: plain numbers of the optimizer, by name of the parameter.
        is_finite: the weights are.
    """

    tensors: dict[str, dict[str, Array]]
    numbers: dict[str, dict[str, float]]
    is_finite: bool


def take(trained: "Trained", copies: HostCopies, is_writer: bool) -> Snapshot:
    """Copy everything that is trained; every rank must call.

    Args:
        trained: between two steps.
        copies: where to, on the rank that writes; cleared first.
        is_writer: this rank does.
    """
    copies.clear()
    shard.settle(trained.model)
    weights: dict[str, Array] = {}
    moments: dict[str, Array] = {}
    sums: list[torch.Tensor] = []
    for name, param, local, rows in _named(trained):
        whole = shard.whole(param, local.data)
        if is_writer:
            weights[name] = copies.keep(whole[:rows])
            sums.append(whole.sum(dtype=torch.float64))
    for name, part, slice_of, rows in _states(trained):
        if slice_of is not None:
            part = shard.whole(slice_of, part)[:rows]
        elif name.endswith(BY_RANK):
            part = _of_all_ranks(part, trained)
        if is_writer:
            moments[name] = copies.keep(part)
    is_finite = bool(torch.stack(sums).isfinite().all()) if sums else True
    return Snapshot({WEIGHTS: weights, OPTIMIZER: moments}, _numbers(trained), is_finite)


def _named(trained: "Trained") -> Iterator[tuple[str, torch.Tensor, torch.nn.Parameter, int]]:
    """Name, parameter of the model, this rank's slice of it, rows that are no padding."""
    model = trained.model
    params, names = shard.trained_parameters(model), shard.trained_names(model)
    yield from zip(names, params, trained.params, shard.num_rows(model), strict=True)


def _states(
    trained: "Trained",
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None, int]]:
    """Tensors of the optimizer: "NAME.KEY", the tensor, the parameter it is a slice like, rows."""
    for name, param, local, rows in _named(trained):
        for key, value in sorted(trained.optimizer.state.get(local, {}).items()):
            if not isinstance(value, torch.Tensor):
                continue
            if value.shape == local.shape:
                yield f"{name}.{key}", value, param, rows
            elif value.ndim == 0:
                yield f"{name}.{key}", value, None, 0
            else:
                yield f"{name}.{key}{BY_RANK}", value, None, 0


def _of_all_ranks(part: torch.Tensor, trained: "Trained") -> torch.Tensor:
    """[ranks, longest]: what belongs to blocks of a slice, and so to the number of ranks."""
    lengths = trained.world.gather([float(part.numel())])
    padded = part.new_zeros(int(max(length for (length,) in lengths)))
    padded[: part.numel()] = part.reshape(-1)
    return trained.world.share(padded)


def _numbers(trained: "Trained") -> dict[str, dict[str, float]]:
    """Plain numbers of the optimizer: name -> key -> number."""
    found = {}
    for name, _, local, _ in _named(trained):
        state = trained.optimizer.state.get(local, {})
        found[name] = {k: v for k, v in state.items() if isinstance(v, int | float)}
    return {name: numbers for name, numbers in found.items() if numbers}


def restore(trained: "Trained", saved: Saved) -> None:
    """Go on from a checkpoint: every rank reads its own slices.

    Args:
        trained: built as for a new run.
        saved: of any number of ranks; its fingerprint has been compared.

    Raises:
        UserError: it does not have the tensors of this model (code 5).
    """
    shard.settle(trained.model)
    optimizer, schedule, state = trained.optimizer, trained.schedule, saved.state
    with safe_open(saved.path / WEIGHTS, framework="pt") as file:
        names = [name for name, *_ in _named(trained)]
        if sorted(file.keys()) != sorted(names):
            other = sorted(set(file.keys()) ^ set(names))[:3]
            rule = f"does not have what this run trains ({', '.join(other)})"
            raise UserError(str(saved.path / WEIGHTS), rule, "start a new run", INTEGRITY)
        for name, param, local, rows in _named(trained):
            local.data.copy_(_slice(file, name, param, local, rows))
    by_param = dict(_read_states(trained, saved))
    groups = optimizer.state_dict()["param_groups"]
    order = [param for group in optimizer.param_groups for param in group["params"]]
    numbered = {i: by_param[param] for i, param in enumerate(order) if by_param[param]}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})
    trained.guard.restore(state["guard"])
    if state["num_scheduled"]:  # the rates follow from the step alone
        schedule.last_epoch, schedule._step_count = state["num_scheduled"] - 1, 2
        schedule.step()


def _read_states(
    trained: "Trained", saved: Saved
) -> Iterator[tuple[torch.nn.Parameter, dict[str, Any]]]:
    """What the optimizer keeps of each slice, with all of `_states` and `_numbers`."""
    world, num_ranks = trained.world, saved.state["num_ranks"]
    with safe_open(saved.path / OPTIMIZER, framework="pt") as file:
        by_owner: dict[str, list[str]] = {}
        for full_name in file.keys():  # noqa: SIM118 - it is no mapping
            by_owner.setdefault(full_name.rpartition(".")[0], []).append(full_name)
            if full_name.endswith(BY_RANK) and num_ranks != world.size:
                got = f"{type(trained.optimizer).__name__} on {world.size} ranks"
                raise UserError(got, f"was saved by {num_ranks}, blockwise", "start as many")
        for name, param, local, rows in _named(trained):
            own: dict[str, Any] = dict(saved.state["optimizer"].get(name, {}))
            for full_name in by_owner.get(name, ()):
                key = full_name.rpartition(".")[2].removesuffix(BY_RANK)
                own[key] = _state(file, full_name, param, local, rows, world.rank)
            yield local, own


def _state(
    file: Any, name: str, param: torch.Tensor, local: torch.Tensor, rows: int, rank: int
) -> torch.Tensor:
    if name.endswith(BY_RANK):
        return file.get_tensor(name)[rank]
    is_slice = bool(file.get_slice(name).get_shape())
    return _slice(file, name, param, local, rows) if is_slice else file.get_tensor(name)


def _slice(
    file: Any, name: str, param: torch.Tensor, local: torch.Tensor, rows: int
) -> torch.Tensor:
    """This rank's slice of a saved tensor, padded with zeros."""
    start, stop = shard.local_range(param)
    saved = file.get_slice(name)
    if saved.get_shape() != [rows, *local.shape[1:]]:
        rule = f"is {saved.get_shape()}, and this run has {[rows, *local.shape[1:]]}"
        raise UserError(f"{name} of the checkpoint", rule, "start a new run", INTEGRITY)
    found = saved[start : min(stop, rows)] if start < rows else None
    whole = torch.zeros(local.shape, dtype=local.dtype if found is None else found.dtype)
    if found is not None:
        whole[: found.shape[0]] = found
    return whole
