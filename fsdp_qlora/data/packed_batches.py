"""Samples to packed sequences: rows one after the other, filled up to the context length."""

import functools

import numpy as np

from fsdp_qlora.data import packing
from fsdp_qlora.data.batches import Batch, flatten
from fsdp_qlora.data.store import Part


class PackedBatches:
    """The batches of one rank, by optimizer step, several rows in a sequence.

    A micro-batch is `batch_size` sequences of up to `context_length` tokens, laid one after the
    other too: nothing is padded but the end. See packing.pack for which rows meet; all ranks get
    about as many tokens.

    Args:
        samples: all training samples, the same on every rank.
        context_length: most tokens of a sequence.
        batch_size: sequences of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        world_size: ranks.
        rank: this rank.
        seed: seed of the packings.
        num_epochs: passes over the rows, if `max_steps` is not positive.
        max_steps: optimizer steps in all, if positive.
        pad_multiple: tokens of a micro-batch are a multiple of this.
    """

    def __init__(
        self,
        samples: Part,
        context_length: int,
        batch_size: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        num_epochs: int,
        max_steps: int,
        pad_multiple: int = 8,
    ) -> None:
        assert len(samples) and 0 <= rank < world_size
        self.samples, self.world_size, self.rank = samples, world_size, rank
        self.batch_size, self.pad_multiple = batch_size, pad_multiple
        self._pack = functools.partial(packing.pack, samples.lengths, context_length, world_size)
        self.seed = seed
        self.turns_per_step = batch_size * accumulation
        num_turns = len(self._turns(0))
        self.steps_per_epoch = max(num_turns // self.turns_per_step, 1)
        self.num_steps = max_steps if max_steps > 0 else num_epochs * self.steps_per_epoch

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the run
    def _turns(self, epoch: int) -> list[list[list[int]]]:
        """Turns of all ranks: for each, the rows of every rank's sequence."""
        sequences, size = self._pack(self.seed, epoch), self.world_size
        return [sequences[i : i + size] for i in range(0, len(sequences), size)]

    def _mine(self, step: int, rank: int) -> list[list[int]]:
        number, part = divmod(step, self.steps_per_epoch)
        turns = self._turns(number)
        first, last = (np.array([part, part + 1]) * len(turns) // self.steps_per_epoch).tolist()
        return [turn[rank] for turn in turns[first:last]]

    def places(self, step: int, rank: int) -> list[str]:
        """Where the rows stand that `rank` sees at optimizer step `step`."""
        return [str(self.samples.place(row)) for rows in self._mine(step, rank) for row in rows]

    def step(self, step: int) -> list[Batch]:
        """Make this rank's micro-batches of optimizer step `step`.

        Args:
            step: 0-based, over all epochs.

        Returns:
            As many batches on every rank, [1, T] each; a rank without rows gets one of padding.
        """
        mine = self._mine(step, self.rank)
        num_micro = max(-(-len(mine) // self.batch_size), 1)
        parts = np.array_split(np.arange(len(mine)), num_micro)
        rows = [[row for i in indices for row in mine[i]] for indices in parts]
        return [flatten([self.samples[row] for row in some], self.pad_multiple) for some in rows]

    def epoch(self, step: int) -> float:
        """Passes over the rows completed once optimizer step `step` is done."""
        return (step + 1) / self.steps_per_epoch
