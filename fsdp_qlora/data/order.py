"""Which rows meet in an optimizer step: a function of seed and step, the same on every rank."""

from dataclasses import dataclass

import numpy as np

WINDOW_STEPS = 64  # steps whose rows are sorted by length together


@dataclass(frozen=True)
class Dealing:
    """How rows are dealt to optimizer steps, micro-batches and ranks, and which rank this is.

    Args:
        batch_size: rows, or packed sequences, of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        world_size: ranks.
        rank: this rank.
        seed: of the orders or packings.
        num_epochs: passes over the rows, if `max_steps` is not positive.
        max_steps: optimizer steps in all, if positive.
        pad_multiple: tokens of a row, or of rows laid one after the other, are a multiple of this.
    """

    batch_size: int
    accumulation: int
    world_size: int
    rank: int
    seed: int
    num_epochs: int
    max_steps: int
    pad_multiple: int = 8

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the run."""
        return self.max_steps if self.max_steps > 0 else self.num_epochs * steps_per_epoch


def num_steps(num_rows: int, rows_per_step: int) -> int:
    """Return the optimizer steps of an epoch.

    Rows that do not fill a step join the others, one each: no step is much smaller than the rest,
    none of an epoch is left out. 10,748 rows in steps of 8 are 1,343 steps, and 671 of 16.

    Args:
        num_rows: rows of an epoch, at least one.
        rows_per_step: rows of a step over all ranks and micro-batches.
    """
    return max(num_rows // rows_per_step, 1)


def epoch(
    lengths: np.ndarray, rows_per_step: int, seed: int, number: int, by_length: bool = True
) -> list[np.ndarray]:
    """Deal the rows of an epoch to its steps.

    The rows are shuffled; then those of some steps in a row are sorted by length, so that rows of
    like length meet in a step and little is padded; then these steps are shuffled again.

    Args:
        lengths: int [rows], tokens of each.
        rows_per_step: rows of a step, or one more.
        seed: of the run.
        number: of the epoch, from 0; another one gives another order.
        by_length: rows of like length meet.

    Returns:
        Indices of the rows of every step, longest first; each row once.
    """
    random = np.random.default_rng((seed, number))
    order = random.permutation(len(lengths))
    steps = num_steps(len(lengths), rows_per_step)
    bounds = np.arange(steps + 1) * len(lengths) // steps
    window = min(WINDOW_STEPS, max(steps // 4, 1)) if by_length else 1
    dealt: list[np.ndarray] = []
    for first in range(0, steps, window):
        inside = bounds[first : first + window + 1]
        rows = order[inside[0] : inside[-1]]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        parts = np.split(rows, (inside - inside[0])[1:-1])
        dealt += [parts[i] for i in random.permutation(len(parts))]
    return dealt


def micro_batches(rows: np.ndarray, rows_per_micro: int, world_size: int) -> list[list[np.ndarray]]:
    """Deal the rows of a step to micro-batches and ranks.

    Args:
        rows: of the step, longest first.
        rows_per_micro: most rows of a micro-batch over all ranks.
        world_size: ranks.

    Returns:
        For every micro-batch the rows of each rank: of like length, as many or one fewer.
    """
    num_parts = max(-(-len(rows) // rows_per_micro), 1)
    parts = np.array_split(rows, num_parts)
    return [[part[rank::world_size] for rank in range(world_size)] for part in parts]


def padded_width(longest: int, multiple: int, most: int) -> int:
    """Return the tokens that rows are padded to.

    Args:
        longest: tokens of the longest row of the batch.
        multiple: the width is a multiple of this, if it fits.
        most: tokens of the longest row of all; the width goes no further than the multiple of 8
            that holds it.
    """
    ceiling = -(-max(most, 1) // 8) * 8
    return min(-(-max(longest, 1) // multiple) * multiple, ceiling)


def padded_tokens(
    lengths: np.ndarray,
    batch_size: int,
    accumulation: int,
    world_size: int,
    seed: int,
    multiple: int,
    num_steps: int | None = None,
) -> list[int]:
    """Return the tokens of every micro-batch of the first epoch with its padding, of all ranks.

    Args:
        lengths: int [rows], tokens of each.
        batch_size: rows of a micro-batch of a rank.
        accumulation: micro-batches of a step.
        world_size: ranks.
        seed: of the run.
        multiple: of the width of a batch.
        num_steps: steps to look at; None: all of the epoch.
    """
    per_micro, most, found = batch_size * world_size, int(lengths.max()), []
    for rows in epoch(lengths, per_micro * accumulation, seed, 0)[:num_steps]:
        for parts in micro_batches(rows, per_micro, world_size):
            for mine in parts:
                longest = int(lengths[mine].max()) if len(mine) else 1
                found.append(max(len(mine), 1) * padded_width(longest, multiple, most))
    return found
