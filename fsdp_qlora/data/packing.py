"""Several rows in one sequence: which rows share one, and on which rank."""

import bisect

import numpy as np

WINDOW_TOKENS = 256  # capacities; rows further apart in the shuffled order never meet


def pack(
    lengths: np.ndarray, capacity: int, num_ranks: int, seed: int, epoch: int
) -> list[list[int]]:
    """Pack rows into sequences for a number of ranks, about as many tokens for each.

    The rows are shuffled and cut into windows. In each, rows go longest first into the fullest
    sequence with room (best-fit decreasing); what stays less than half full is packed again with
    the next window. Then sequences of like fill are dealt to the ranks and the turns are shuffled.

    Args:
        lengths: int [rows], tokens of each, from 1 to `capacity`.
        capacity: most tokens of a sequence.
        num_ranks: ranks.
        seed: of the run.
        epoch: its number; another one gives another packing.

    Returns:
        Rows of every sequence, every row once. Sequence i is for rank i % num_ranks, so that
        each run of `num_ranks` is one turn of all ranks; their number is a multiple of it, and
        the last ones may be empty where there are fewer rows.
    """
    random = np.random.default_rng((seed, epoch))
    bins: list[list[int]] = []
    open_bins: list[list[int]] = []
    for window in _windows(random.permutation(len(lengths)), lengths, capacity * WINDOW_TOKENS):
        again = [row for rows in open_bins for row in rows]
        fills, made = _best_fit(window + again, lengths, capacity)
        bins += [rows for fill, rows in zip(fills, made, strict=True) if 2 * fill >= capacity]
        open_bins = [rows for fill, rows in zip(fills, made, strict=True) if 2 * fill < capacity]
    bins += open_bins
    _fill_up(bins, num_ranks)
    bins.sort(key=lambda rows: -sum(int(lengths[row]) for row in rows))
    turns = [bins[i : i + num_ranks] for i in range(0, len(bins), num_ranks)]
    return [
        rows
        for turn in random.permutation(len(turns))
        for rows in _turned(turns[turn], int(random.integers(num_ranks)))
    ]


def _windows(order: np.ndarray, lengths: np.ndarray, num_tokens: int) -> list[list[int]]:
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(num_tokens, total, num_tokens))
    return [part.tolist() for part in np.split(order, cuts)]


def _best_fit(
    rows: list[int], lengths: np.ndarray, capacity: int
) -> tuple[list[int], list[list[int]]]:
    """Tokens and rows of each sequence."""
    fills: list[int] = []
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), smallest room first
    for row in sorted(rows, key=lambda row: -lengths[row]):
        length = int(lengths[row])
        assert 1 <= length <= capacity, "a row does not fit a sequence"
        at = bisect.bisect_left(rooms, (length, -1))
        room, number = rooms.pop(at) if at < len(rooms) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
            fills.append(0)
        bins[number].append(row)
        fills[number] += length
        if room > length:
            bisect.insort(rooms, (room - length, number))
    return fills, bins


def _fill_up(bins: list[list[int]], num_ranks: int) -> None:
    """Make as many sequences for every rank: those of most rows are parted, else empty ones."""
    while len(bins) % num_ranks:
        largest = max(bins, key=len)
        half = len(largest) // 2
        bins.append(largest[:half])
        largest[:half] = []


def _turned(turn: list[list[int]], by: int) -> list[list[int]]:
    """No rank always has the fullest sequence."""
    return turn[by:] + turn[:by]
