"""Samples to padded tensors: which rows a rank sees at which step is a function, not a state.

Shapes: B rows of a micro-batch, T tokens of its longest row, padded to a multiple of 8.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from fsdp_qlora.data.tokens import Sample

NOT_TRAINED = -100
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
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    num_trained_tokens: int
    num_tokens: int


class Batches:
    """The batches of one rank, by optimizer step.

    Each epoch is a fresh permutation of the rows, cut into global batches of
    `batch_size * accumulation * world_size` rows (the last may be smaller). Within a global batch
    rows of like length meet in a micro-batch and are dealt to the ranks in turn, longest first:
    little padding, ranks equally busy, and the same gradient, since every trained token of the
    global batch weighs the same.

    Args:
        samples: all training samples, the same on every rank.
        batch_size: rows of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        world_size: ranks.
        rank: this rank.
        seed: seed of the permutations.
        num_epochs: passes over the rows, if `max_steps` is not positive.
        max_steps: optimizer steps in all, if positive.
        pad_multiple: T is a multiple of this.
    """

    def __init__(
        self,
        samples: list[Sample],
        batch_size: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        num_epochs: int,
        max_steps: int,
        pad_multiple: int = 8,
    ) -> None:
        assert samples and 0 <= rank < world_size
        self.samples = samples
        self.rows_per_micro = batch_size * world_size
        self.rows_per_step = self.rows_per_micro * accumulation
        self.world_size, self.rank = world_size, rank
        self.seed, self.pad_multiple = seed, pad_multiple
        self.steps_per_epoch = math.ceil(len(samples) / self.rows_per_step)
        self.num_steps = max_steps if max_steps > 0 else num_epochs * self.steps_per_epoch

    def rows(self, step: int) -> list[int]:
        """Indices of the samples that all ranks together see at optimizer step `step`."""
        epoch, part = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.samples))
        chosen = order[part * self.rows_per_step : (part + 1) * self.rows_per_step].tolist()
        return sorted(chosen, key=lambda i: len(self.samples[i].input_ids), reverse=True)

    def step(self, step: int) -> list[Batch]:
        """Make this rank's micro-batches of optimizer step `step`.

        Args:
            step: 0-based, over all epochs.

        Returns:
            As many batches on every rank; a rank left without a row gets a batch of one row of
            padding, in which nothing is trained.
        """
        rows = self.rows(step)
        starts = range(0, len(rows), self.rows_per_micro)
        micro = (rows[i : i + self.rows_per_micro][self.rank :: self.world_size] for i in starts)
        return [collate([self.samples[i] for i in mine], self.pad_multiple) for mine in micro]

    def epoch(self, step: int) -> float:
        """Passes over the rows completed once optimizer step `step` is done."""
        epoch, part = divmod(step, self.steps_per_epoch)
        return epoch + min((part + 1) * self.rows_per_step / len(self.samples), 1.0)


def collate(samples: list[Sample], pad_multiple: int = 8) -> Batch:
    """Pad samples on the right to a common length.

    Args:
        samples: rows of the batch; none gives one row of padding.
        pad_multiple: T is the smallest multiple of this that holds the longest row.

    Returns:
        The batch, on the CPU.
    """
    longest = max((len(sample.input_ids) for sample in samples), default=1)
    shape = (max(len(samples), 1), math.ceil(longest / pad_multiple) * pad_multiple)
    input_ids = torch.full(shape, PAD_ID, dtype=torch.int64)
    labels = torch.full(shape, NOT_TRAINED, dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids, start = torch.from_numpy(sample.input_ids), sample.num_prompt_tokens
        input_ids[row, : len(ids)] = ids
        labels[row, start : len(ids)] = ids[start:]
    num_trained = sum(sample.num_trained_tokens for sample in samples)
    return Batch(input_ids, labels, num_trained, sum(len(s.input_ids) for s in samples))


def held_out(samples: list[Sample], batch_size: int, world_size: int, rank: int) -> list[Batch]:
    """Make this rank's share of the held-out rows: every row once, as many batches on each rank.

    Args:
        samples: held-out samples, the same on every rank.
        batch_size: rows of a batch.
        world_size: ranks.
        rank: this rank.

    Returns:
        Batches on the CPU; none if there are no samples.
    """
    if not samples:
        return []
    batches = Batches(samples, batch_size, 1, world_size, rank, seed=0, num_epochs=1, max_steps=0)
    return [batch for step in range(batches.num_steps) for batch in batches.step(step)]
