"""Samples to packed sequences: rows one after the other, filled up to the context length."""

import functools

import numpy as np

from fsdp_qlora.data import packing
from fsdp_qlora.data.batches import Batch, flatten
from fsdp_qlora.data.order import Dealing
from fsdp_qlora.data.store import Part


class PackedBatches:
    """The batches of one rank, by optimizer step, several rows in a sequence.

    A micro-batch is `batch_size` sequences of up to `context_length` tokens, laid one after the
    other too: nothing is padded but the end. See packing.pack for which rows meet; all ranks get
    about as many tokens.

    Args:
        samples: all training samples, the same on every rank.
        context_length: most tokens of a sequence.
        dealing: of the sequences; T is a multiple of its `pad_multiple`.
    """

    def __init__(self, samples: Part, context_length: int, dealing: Dealing) -> None:
        assert len(samples)
        self.samples, self.context_length, self.dealing = samples, context_length, dealing
        turns_per_step = dealing.batch_size * dealing.accumulation
        self.steps_per_epoch = max(len(self._turns(0)) // turns_per_step, 1)
        self.num_steps = dealing.num_steps(self.steps_per_epoch)

    @property
    def most_tokens(self) -> int:
        """Of a micro-batch of any rank."""
        return self.dealing.batch_size * self.context_length

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the run
    def _turns(self, epoch: int) -> list[list[list[int]]]:
        """Turns of all ranks: for each, the rows of every rank's sequence."""
        seed, size = self.dealing.seed, self.dealing.world_size
        sequences = packing.pack(self.samples.lengths, self.context_length, size, seed, epoch)
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
        mine = self._mine(step, self.dealing.rank)
        num_micro = max(-(-len(mine) // self.dealing.batch_size), 1)
        parts = np.array_split(np.arange(len(mine)), num_micro)
        rows = [[row for i in indices for row in mine[i]] for indices in parts]
        multiple = self.dealing.pad_multiple
        return [flatten([self.samples[row] for row in some], multiple) for some in rows]

    def epoch(self, step: int) -> float:
        """Passes over the rows completed once optimizer step `step` is done."""
        return (step + 1) / self.steps_per_epoch
