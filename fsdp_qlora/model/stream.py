"""Streamed layers: whole layers copied from the host into a few slots, ahead of their use.

Every layer has its slot (its number modulo the number of slots), so neighbours never share one.
Whoever reads a layer says by that where the computation is: forward, recomputation and backward,
with or without checkpointing, evaluation, generation alike. The layers that come next in the
direction of travel are fetched into the slots that have just become free, on a stream of their
own. The host waits for nothing. At the turn from forward to backward, and from a step to the next,
the slots hold what is needed first.
"""

from collections.abc import Sequence

import torch


class Streamer:
    """The slots of one GPU (or of a CPU rank, which copies too, but in line).

    Attributes:
        sources: uint8 [nbytes] of each streamed layer, on the host; given after the slots are made.
        slots: uint8 [nbytes] each, on the device.
        num_copies: layers copied so far.
    """

    def __init__(self, num_layers: int, nbytes: int, num_slots: int, device: torch.device) -> None:
        """Allocate the slots.

        Args:
            num_layers: that are streamed.
            nbytes: of a layer.
            num_slots: at least 2: one at work, the others being filled.
            device: of the rank.
        """
        self.sources: Sequence[torch.Tensor] = ()
        self.num_layers = num_layers
        self.slots = [
            torch.empty(nbytes, dtype=torch.uint8, device=device)
            for _ in range(min(num_slots, num_layers))
        ]
        self.num_copies = 0
        self._held = [-1] * len(self.slots)  # which layer lies, or is being copied, in a slot
        self._at = -1  # the layer read last
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            self._copies = torch.cuda.Stream(device)
            self._filled = [torch.cuda.Event() for _ in self.slots]

    def read(self, layer: int) -> torch.Tensor:
        """The bytes of a layer, valid for what is computed until another layer is read.

        Args:
            layer: index into `sources`.

        Returns:
            Its slot, uint8 [nbytes].
        """
        if layer != self._at:
            self._travel_to(layer)
        return self.slots[layer % len(self.slots)]

    def _travel_to(self, layer: int) -> None:
        step = 1 if layer == (self._at + 1) % self.num_layers else -1
        self._at = layer
        for ahead in range(len(self.slots)):
            self._fetch(layer + step * ahead)
        if self._is_cuda:
            torch.cuda.current_stream().wait_event(self._filled[layer % len(self.slots)])

    def _fetch(self, layer: int) -> None:
        slot = layer % len(self.slots)
        if not 0 <= layer < self.num_layers or self._held[slot] == layer:
            return
        self._held[slot] = layer
        self.num_copies += 1
        if not self._is_cuda:
            self.slots[slot].copy_(self.sources[layer])
            return
        # What used the slot so far has been enqueued: this layer is another, and it was read later.
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self.slots[slot].copy_(self.sources[layer], non_blocking=True)
            self._filled[slot].record()
