"""Kept inputs of recomputed layers wait for the backward pass in host memory.

On a card the copies run on a stream of their own: out while the next layers compute, back one layer
ahead of the backward pass. The host waits for nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fsdp_qlora.model import host


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
        self._rooms: list[host.HostBytes] = []
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
            room = host.private(max(nbytes, self._nbytes), self._copies is not None)
            self._rooms.append(room)
        return self._rooms[depth].bytes[:nbytes]

    def _take(self, depth: int) -> torch.Tensor:
        assert depth == len(self._stack) - 1, "kept inputs are asked for in another order"
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
