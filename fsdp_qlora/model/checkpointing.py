"""Gradient checkpointing of a decoder layer: recomputation, and where its inputs wait for it.

Saved inputs may wait in host memory. On a GPU the copies run on a stream of their own: out while
the next layers compute, back one layer ahead of the backward pass. The host waits for nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fsdp_qlora.model import streaming


class SavedActivations:
    """Results of a layer's forward pass that its recomputation takes over instead of making them.

    The first run over the layer stores them in order, the second takes them in the same order.

    Attributes:
        is_replay: the second run is under way.
    """

    def __init__(self) -> None:
        self.is_replay = False
        self._results: list[tuple[torch.Tensor, ...]] = []

    def store(self, *tensors: torch.Tensor) -> None:
        """Keep the next results; they must not be written to afterwards."""
        self._results.append(tensors)

    def take(self) -> tuple[torch.Tensor, ...]:
        """The next results, forgotten here."""
        return self._results.pop(0)


class Recomputed(torch.autograd.Function):
    """run(hidden, *trained), whose backward runs it once more and keeps only its inputs till then.

    As torch's reentrant checkpoint, but it hands back the gradients of what is trained instead of
    accumulating them inside, needs no input that requires one, and is several times cheaper for the
    host than the non-reentrant one, which sees every saved tensor.

    Args:
        run: (hidden, *trained) -> tensor or tuple of tensors; called twice.
        has_dropout: give the second call the random numbers of the first.
        hidden: [B, T, H].
        trained: the adapters, or the layer's own parameters; or None.

    Returns:
        What `run` returns.
    """

    @staticmethod
    def forward(ctx, run, has_dropout, hidden, *trained):
        ctx.run, ctx.random_state = run, _random_state(hidden.device) if has_dropout else None
        ctx.save_for_backward(hidden, *trained)
        return run(hidden, *trained)

    @staticmethod
    def backward(ctx, *grads_out):
        saved = ctx.saved_tensors  # asked for once: an input may come from the host
        hidden = saved[0]
        needed = ctx.needs_input_grad[2:]
        inputs = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(saved, needed, strict=True)
        ]
        devices = [hidden.device] if hidden.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=ctx.random_state is not None):
            _set_random_state(ctx.random_state, hidden.device)
            with torch.enable_grad():
                outs = ctx.run(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        pairs = [(o, g) for o, g in zip(outs, grads_out, strict=True) if g is not None]
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        grads = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs]))
        return None, None, *[next(grads) if need else None for need in needed]


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[torch.Tensor] | None, device: torch.device) -> None:
    if states is not None:
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)


@dataclass
class Waiting:
    """A tensor on the host.

    Attributes:
        copy: there.
        fetched: on its way back, or None.
        arrived: event of the copies' stream, or None on a CPU.
    """

    copy: torch.Tensor
    fetched: torch.Tensor | None = None
    arrived: Any = None


class Offload:
    """The last tensor put away is the first to come back.

    Attributes:
        num_copies: tensors put away so far.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        """Make room as it is needed.

        Args:
            device: of the rank.
            nbytes: of the largest tensor that is expected.
        """
        self.num_copies = 0
        self._device, self._nbytes = device, nbytes
        self._rooms: list[streaming.HostBytes] = []
        self._stack: list[Waiting] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Host memory that it holds."""
        return sum(room.bytes.nbytes for room in self._rooms)

    def saving(self, hidden: torch.Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """Context in which autograd keeps `hidden` on the host; other tensors stay where they are.

        Args:
            hidden: [B, T, H], the input of a layer that keeps it for its backward, and that alone.
        """
        where = hidden.data_ptr(), hidden.shape

        def pack(tensor: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
            if (tensor.data_ptr(), tensor.shape) != where:
                return tensor
            depth = self._put(tensor.detach())
            return lambda: self._take(depth)

        def unpack(packed: Any) -> torch.Tensor:
            return packed if isinstance(packed, torch.Tensor) else packed()

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _put(self, tensor: torch.Tensor) -> int:
        depth = len(self._stack)
        copy = self._room(depth, tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        if self._copies is None:
            copy.copy_(tensor)
        else:
            self._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copies):
                copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._copies)
        self._stack.append(Waiting(copy))
        self.num_copies += 1
        return depth

    def _room(self, depth: int, nbytes: int) -> torch.Tensor:
        if depth < len(self._rooms) and self._rooms[depth].bytes.numel() < nbytes:
            if self._copies is not None:
                self._copies.synchronize()  # the last step may still be reading
            del self._rooms[depth:]
        if depth == len(self._rooms):
            room = streaming.private(max(nbytes, self._nbytes), self._copies is not None)
            self._rooms.append(room)
        return self._rooms[depth].bytes[:nbytes]

    def _take(self, depth: int) -> torch.Tensor:
        assert depth == len(self._stack) - 1, "saved inputs are asked for in another order"
        found = self._fetch(self._stack.pop())
        if self._stack:
            self._fetch(self._stack[-1])
        if found.arrived is not None:
            torch.cuda.current_stream().wait_event(found.arrived)
        assert found.fetched is not None
        return found.fetched

    def _fetch(self, waiting: Waiting) -> Waiting:
        if waiting.fetched is not None:
            return waiting
        # Made in the stream that computes: its memory is free once what uses it has run there.
        waiting.fetched = torch.empty_like(waiting.copy, device=self._device)
        if self._copies is None:
            waiting.fetched.copy_(waiting.copy)
            return waiting
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            waiting.fetched.copy_(waiting.copy, non_blocking=True)
            waiting.arrived = torch.cuda.Event()
            waiting.arrived.record()
        return waiting
