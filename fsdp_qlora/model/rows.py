"""Several rows one after the other in a sequence, as transformers' layers are told of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Rows(NamedTuple):
    """Where the rows of a sequence of T tokens begin and end.

    Attributes:
        bounds: int32 [rows + 1], first token of each row, and T.
        position_ids: int64 [1, T], counted from 0 in each row.
        longest: tokens of the longest row.
    """

    bounds: torch.Tensor
    position_ids: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Rows | None":
        """Find the bounds on the host, so that the device never waits.

        Args:
            lengths: tokens of each row; empty when a sequence is one row.
            device: where they go.
        """
        if not lengths:
            return None
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        if device.type == "cuda":
            bounds = bounds.pin_memory().to(device, non_blocking=True)
            position_ids = position_ids.pin_memory().to(device, non_blocking=True)
        return cls(bounds, position_ids, max(lengths))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a transformers decoder; those of its flash attention, too."""
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }
