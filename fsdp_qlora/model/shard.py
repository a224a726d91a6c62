"""Applying FSDP2: which parameters form a group, where they lie, in which dtype they are gathered.

Groups, from the inside out: of each decoder layer its adapters, norms and biases (`TrainedLayer`,
mixed precision), and its quantized bytes (`DecoderBlock`, no cast ever: a cast would rewrite bits);
input embedding; output head; the rest. Only this module knows FSDP.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fsdp_qlora.config import STRATEGIES
from fsdp_qlora.distributed.world import World
from fsdp_qlora.model.layer import DecoderBlock
from fsdp_qlora.model.placement import GROUPS, Placed
from fsdp_qlora.model.skeleton import QuantizedModel
from fsdp_qlora.planning.sizes import ONE_GROUP_BYTES, STREAMED


def num_shares(strategy: str, world: World) -> int:
    """Ranks that share what is sharded: `world.size` is a multiple of it.

    Args:
        strategy: row of STRATEGIES.
        world: the ranks; they are numbered machine by machine.
    """
    row = STRATEGIES[strategy]
    return 1 if row.replicates else world.local_size if row.is_hybrid else world.size


def apply(model: QuantizedModel, strategy: str, placed: Placed, world: World) -> None:
    """Shard a model on the meta device, in place; no bytes exist yet.

    Args:
        model: from skeleton.build, its adapters attached; adapters and norms are gathered in the
            dtype of its kernels, gradients are reduced in float32.
        strategy: row of STRATEGIES.
        placed: where the quantized bytes of each decoder layer lie.
        world: the ranks.
    """
    row, shares, dtype = STRATEGIES[strategy], num_shares(strategy, world), model.kernels.dtype
    has_copies = row.replicates or shares < world.size
    shape = (world.size // shares, shares) if has_copies else (world.size,)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    layers = list(zip(blocks(model), placed.names, strict=True))
    streamed = [block for block, name in layers if name in STREAMED]
    for number, block in enumerate(streamed):  # they read their slots: no parameter any more
        assert placed.streamer is not None
        block.quantized = None  # type: ignore[assignment]
        block.layer_store.read = partial(placed.streamer.read, number)
    frozen = {param for param in model.parameters() if not param.requires_grad}
    # What nobody else has FSDP would copy at each use.
    in_groups = ("offloaded",) if shares == 1 else GROUPS
    ignored = {block.quantized for block, name in layers if name not in in_groups}
    ends = [] if row.replicates or model.is_tied else [model.embedding, model.head]
    if row.replicates:
        ignored = frozen
    elif shares == 1:
        ignored |= frozen & {*model.embedding.parameters(), *model.head.parameters()}
        ends = [module for module in ends if not {*module.parameters()} <= ignored]
    common: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": row.reshards}
    common["ignored_params"] = ignored - {None}
    mixed = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    pinned = fsdp.CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    bodies: list[Any] = [block.body for block, _ in layers]
    bodies = [body for body in bodies if body.is_trained or not row.replicates]
    light = [body for body in bodies if not body.is_whole]
    lora_bytes = sum(body.lora.numel() for body in light if body.slots) * dtype.itemsize
    if light and lora_bytes <= ONE_GROUP_BYTES:  # gathered once a pass, reduced once
        fsdp.fully_shard(light, mp_policy=mixed, **{**common, "reshard_after_forward": False})
        bodies = [body for body in bodies if body.is_whole]
    for body in bodies:
        fsdp.fully_shard(body, mp_policy=mixed, **common)
    for block, name in layers:
        if name in in_groups:
            policy = pinned if name == "offloaded" else fsdp.OffloadPolicy()
            fsdp.fully_shard(block, offload_policy=policy, **common)
    for module in ends:
        fsdp.fully_shard(module, mp_policy=mixed, **common)
    # A tied embedding is needed at both ends of forward and backward: gather it once.
    fsdp.fully_shard(model, mp_policy=mixed, **{**common, "reshard_after_forward": False})
    for module in _only_run_forward(model):
        if isinstance(module, fsdp.FSDPModule):
            module.set_unshard_in_backward(False)


def _only_run_forward(model: QuantizedModel) -> Iterator[nn.Module]:
    """What no backward pass reads: the input embedding, and layers before all that is trained.

    FSDP would gather one of them for nothing at the end of each backward pass, and on a GPU give
    its memory away while it still arrives (finalize_backward of torch 2.11 and 2.13): where no
    reduction of gradients follows, the next pass would read overwritten weights.
    """
    if not model.is_tied:
        yield model.embedding
    if not any(p.requires_grad for p in model.embedding.parameters()):
        yield from itertools.takewhile(lambda block: not block.body.is_trained, blocks(model))


def blocks(model: nn.Module) -> Iterator[DecoderBlock]:
    """The decoder blocks in order."""
    return (module for module in model.modules() if isinstance(module, DecoderBlock))


def local_range(param: torch.Tensor) -> tuple[int, int]:
    """Where this rank's slice of a parameter lies.

    Args:
        param: sharded, or whole.

    Returns:
        (start, stop) in its first dimension.
    """
    if not isinstance(param, DTensor):
        return 0, param.shape[0]
    dim = next(i for i, place in enumerate(param.placements) if isinstance(place, Shard))
    rows = -(-param.shape[0] // param.device_mesh.size(dim))
    start = min(rows * param.device_mesh.get_local_rank(dim), param.shape[0])
    return start, min(start + rows, param.shape[0])


def set_local(module: nn.Module, name: str, local: torch.Tensor) -> None:
    """Give a parameter its bytes.

    Args:
        module: that holds the parameter.
        name: of the parameter in the module.
        local: this rank's slice of it, see `local_range`.
    """
    old = getattr(module, name)
    if isinstance(old, DTensor):
        # Not DTensor.from_local: that moves an offloaded slice to the device of the mesh.
        local = DTensor(local, old._spec, requires_grad=False)
    setattr(module, name, nn.Parameter(local, requires_grad=old.requires_grad))


def set_slice(module: nn.Module, name: str, whole: torch.Tensor, device: torch.device) -> None:
    """Give a parameter its slice of what it is on all ranks together, in its own dtype.

    Args:
        module, name: see `set_local`.
        whole: values, on the host.
        device: where this rank keeps its slice.
    """
    param = getattr(module, name)
    start, stop = local_range(param)
    set_local(module, name, whole[start:stop].to(device, param.dtype))


def local_parameters(model: nn.Module) -> list[nn.Parameter]:
    """This rank's slices of the trained parameters as plain tensors that share their memory."""
    return [nn.Parameter(_local(p.detach())) for p in trained_parameters(model)]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters, in a fixed order."""
    return [p for p in model.parameters() if p.requires_grad]


def trained_names(model: nn.Module) -> list[str]:
    """Names of `trained_parameters`, as FSDP leaves them: those of the model."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def reduce_gradients(model: nn.Module, is_wanted: bool) -> None:
    """Let the next backward pass reduce gradients over ranks, or keep them whole on each rank.

    Args:
        model: sharded.
        is_wanted: False: they are summed up until a pass reduces them all.
    """
    assert isinstance(model, fsdp.FSDPModule)
    model.set_requires_gradient_sync(is_wanted)


def collect_gradients(model: nn.Module, local_params: list[nn.Parameter]) -> int:
    """Hand the reduced gradients of the model over to plain parameters.

    Args:
        model: after the backward pass; its gradients are cleared.
        local_params: of `local_parameters`.

    Returns:
        Ranks that hold the same slices of them: 1 when every rank has its own.
    """
    trained = trained_parameters(model)
    for param, local in zip(trained, local_params, strict=True):
        assert param.grad is not None, "a trained parameter took no part in the loss"
        local.grad, param.grad = _local(param.grad), None
    first = trained[0]
    if not isinstance(first, DTensor):
        return 1
    pairs = zip(first.placements, first.device_mesh.shape, strict=True)
    return math.prod(size for place, size in pairs if not isinstance(place, Shard))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def gathered(block: DecoderBlock) -> torch.Tensor:
    """The quantized bytes of a block as its linears read them; call `release` afterwards.

    Args:
        block: of a filled model; all ranks must call.

    Returns:
        uint8 [layout.nbytes, or more] on the device of the rank.
    """
    if isinstance(block, fsdp.FSDPModule):
        block.unshard()
    return block.layer_store.read().detach().view(torch.uint8)


def release(block: DecoderBlock) -> None:
    """Free what `gathered` gathered."""
    if isinstance(block, fsdp.FSDPModule):
        block.reshard()


def whole_parameters(
    model: QuantizedModel, names: Iterable[str], is_kept: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather parameters one after the other.

    Args:
        model: all ranks must call, and go through to the end.
        names: in the model's files.
        is_kept: this rank wants them.

    Yields:
        Name and the whole parameter on the host; empty where it is not wanted.
    """
    settle(model)
    for name in names:
        module, attribute = model.tensors[name]
        param = _full(getattr(module, attribute))
        yield name, param.cpu() if is_kept else torch.empty(0)


def whole_lora(model: nn.Module, is_kept: bool = True) -> list[torch.Tensor]:
    """Gather the adapters.

    Args:
        model: all ranks must call.
        is_kept: this rank wants them.

    Returns:
        The whole flat float32 LoRA parameter of every layer that has one, in order, on the host; or
        nothing.
    """
    settle(model)
    flats = (_full(block.body.lora) for block in blocks(model) if block.body.slots)
    return [flat.float().cpu() for flat in flats if is_kept]


def _full(param: torch.Tensor) -> torch.Tensor:
    param = param.detach()
    return param.full_tensor() if isinstance(param, DTensor) else param


def settle(model: nn.Module) -> None:
    """Let every rank have its own slices again; an evaluation may have left some gathered."""
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def whole(param: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Gather what belongs to a trained parameter: its values, or a moment of the optimizer.

    Args:
        param: of a model that is settled; all ranks must call.
        local: this rank's slice, as long as that of the parameter.

    Returns:
        The whole tensor, padding included, on the device of the slice.
    """
    if not isinstance(param, DTensor):
        return local
    rest: dict[str, Any] = {"run_check": False, "shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(local, param.device_mesh, param.placements, **rest).full_tensor()


def num_rows(model: nn.Module) -> list[int]:
    """Length of `trained_parameters` in their first dimension, less what pads them to the ranks."""
    adapters = {id(b.body.lora): b.body.num_lora for b in blocks(model) if b.body.slots}
    return [adapters.get(id(p), p.shape[0]) for p in trained_parameters(model)]
