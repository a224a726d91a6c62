"""Samples to padded tensors: which rows a rank sees at which step is a function, not a state.

Shapes: B rows of a micro-batch, T tokens of its longest row, padded to a multiple of 8 or 64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fsdp_qlora.data import order
from fsdp_qlora.data.order import Dealing
from fsdp_qlora.data.store import Part, Sample

NOT_TRAINED = -100
MOST_SIMULATED_STEPS = 10_000
# Any valid id would do: padding stands right of the text, where a causal model never looks from
# the text, and its labels are masked by length. So a row's own end-of-text keeps its label.
PAD_ID = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank.

    Args:
        input_ids: int64 [B, T].
        labels: int64 [B, T], the ids themselves (not shifted), -100 where nothing is trained.
        num_trained_tokens: targets: labels other than -100 at positions 1 and later.
        num_tokens: ids that are not padding.
        row_lengths: when B is 1 and several rows lie in it, tokens of each, padding last; else ().
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    num_trained_tokens: int
    num_tokens: int
    row_lengths: tuple[int, ...] = ()


class Batches:
    """The batches of one rank, by optimizer step.

    Each epoch is a fresh order of the rows, cut into global batches of
    `batch_size * accumulation * world_size` rows, some with one more so that none are left over.
    Within a global batch rows of like length meet in a micro-batch and are dealt to the ranks in
    turn, longest first: little padding, ranks equally busy, and the same gradient, since every
    trained token of the global batch weighs the same.

    Args:
        samples: all training samples, the same on every rank.
        dealing: of the rows; T is a multiple of its `pad_multiple`, up to the longest row.
        is_flat: the rows of a micro-batch lie one after the other instead of being padded.
    """

    def __init__(self, samples: Part, dealing: Dealing, is_flat: bool = False) -> None:
        assert len(samples)
        self.samples, self.dealing, self.is_flat = samples, dealing, is_flat
        self.rows_per_micro = dealing.batch_size * dealing.world_size
        self.rows_per_step = self.rows_per_micro * dealing.accumulation
        self.longest = int(samples.lengths.max())
        self.steps_per_epoch = order.num_steps(len(samples), self.rows_per_step)
        self.num_steps = dealing.num_steps(self.steps_per_epoch)
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])  # the order last used

    @property
    def most_tokens(self) -> int:
        """Of a micro-batch of any rank, its padding counted; later steps may differ a little."""
        deal = self.dealing
        shape = (deal.batch_size, deal.accumulation, deal.world_size, deal.seed, deal.pad_multiple)
        num_steps = min(self.num_steps, MOST_SIMULATED_STEPS)
        return max(order.padded_tokens(self.samples.lengths, *shape, num_steps))

    def rows(self, step: int) -> np.ndarray:
        """Indices of the samples that all ranks together see at optimizer step `step`."""
        number, part = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != number:
            dealt = order.epoch(self.samples.lengths, self.rows_per_step, self.dealing.seed, number)
            self._epoch = (number, dealt)
        return self._epoch[1][part]

    def step(self, step: int) -> list[Batch]:
        """Make this rank's micro-batches of optimizer step `step`.

        Args:
            step: 0-based, over all epochs.

        Returns:
            As many batches on every rank; a rank left without a row gets a batch of one row of
            padding, in which nothing is trained.
        """
        dealt = order.micro_batches(self.rows(step), self.rows_per_micro, self.dealing.world_size)
        mine = ([self.samples[int(i)] for i in parts[self.dealing.rank]] for parts in dealt)
        if self.is_flat:
            return [flatten(samples, self.dealing.pad_multiple) for samples in mine]
        return [collate(samples, self.dealing.pad_multiple, self.longest) for samples in mine]

    def places(self, step: int, rank: int) -> list[str]:
        """Where the rows stand that `rank` sees at optimizer step `step`."""
        dealt = order.micro_batches(self.rows(step), self.rows_per_micro, self.dealing.world_size)
        return [str(self.samples.place(int(i))) for parts in dealt for i in parts[rank]]

    def epoch(self, step: int) -> float:
        """Passes over the rows completed once optimizer step `step` is done."""
        number, part = divmod(step, self.steps_per_epoch)
        num_done = (part + 1) * len(self.samples) // self.steps_per_epoch
        return number + num_done / len(self.samples)


def collate(
    samples: Sequence[Sample], pad_multiple: int = 8, longest_of_all: int | None = None
) -> Batch:
    """Pad samples on the right to a common length.

    Args:
        samples: rows of the batch; none gives one row of padding.
        pad_multiple: T is the smallest multiple of this that holds the longest row.
        longest_of_all: T goes no further than the multiple of 8 that holds a row of so many
            tokens; None for no such bound.

    Returns:
        The batch, on the CPU.
    """
    longest = max((len(sample.input_ids) for sample in samples), default=1)
    width = order.padded_width(longest, pad_multiple, longest_of_all or longest + pad_multiple)
    shape = (max(len(samples), 1), width)
    input_ids = torch.full(shape, PAD_ID, dtype=torch.int64)
    labels = torch.full(shape, NOT_TRAINED, dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.input_ids).long()
        input_ids[row, : len(ids)] = ids
        is_trained = torch.from_numpy(sample.is_trained)
        labels[row, : len(ids)] = ids.masked_fill(~is_trained, NOT_TRAINED)
    num_trained = sum(sample.num_trained_tokens for sample in samples)
    return Batch(input_ids, labels, num_trained, sum(len(s.input_ids) for s in samples))


def flatten(samples: Sequence[Sample], pad_multiple: int = 8) -> Batch:
    """Lay samples one after the other.

    Args:
        samples: rows of the batch; none gives padding.
        pad_multiple: T is a multiple of this.

    Returns:
        The batch, [1, T], on the CPU. No row's last token is trained to predict the next row.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    width = -(-max(sum(lengths), 1) // pad_multiple) * pad_multiple
    ids = np.full(width, PAD_ID, np.int64)
    labels = np.full(width, NOT_TRAINED, np.int64)
    start = 0
    for sample, length in zip(samples, lengths, strict=True):
        place = slice(start, start + length)
        ids[place] = sample.input_ids
        labels[place] = np.where(sample.is_trained, sample.input_ids, NOT_TRAINED)
        labels[start] = NOT_TRAINED
        start += length
    padding = [width - start] * (width > start)
    num_trained = sum(sample.num_trained_tokens for sample in samples)
    input_ids, labels_1T = (torch.from_numpy(row).unsqueeze(0) for row in (ids, labels))
    return Batch(input_ids, labels_1T, num_trained, sum(lengths), (*lengths, *padding))


def held_out(
    samples: Part, batch_size: int, world_size: int, rank: int, pad_multiple: int = 8
) -> list[Batch]:
    """Make this rank's share of the held-out rows: every row once, as many batches on each rank.

    Args:
        samples: held-out samples, the same on every rank.
        batch_size: rows of a batch.
        world_size: ranks.
        rank: this rank.
        pad_multiple: T is a multiple of this, up to the longest row.

    Returns:
        Batches on the CPU; none if there are no samples.
    """
    if not len(samples):
        return []
    once = Dealing(
        batch_size,
        1,
        world_size,
        rank,
        seed=0,
        num_epochs=1,
        max_steps=0,
        pad_multiple=pad_multiple,
    )
    batches = Batches(samples, once)
    return [batch for step in range(batches.num_steps) for batch in batches.step(step)]
