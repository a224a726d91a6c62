"""Samples to batches: which rows a rank sees at a step is a function of seed, step and rank.

Shapes: B rows of a micro-batch, T tokens of its longest row, padded to a multiple of 8 or 64.
torch is imported by the functions that make tensors, so that the audit can do without it.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fsdp_qlora.config import OBJECTIVES, TrainConfig
from fsdp_qlora.data import preferences, row_formats
from fsdp_qlora.data.tokens import Sample, TokenDataset

if TYPE_CHECKING:
    import torch

MOST_SIMULATED_STEPS = 10_000
SORT_WINDOW_STEPS = 64  # steps whose rows are sorted by length together
PACK_WINDOW_SEQUENCES = 256  # rows further apart in the shuffled order never share a sequence
# Any valid id would do: padding stands right of the text, where a causal model never looks from
# the text, and its labels are masked by length. So a row's own end-of-text keeps its label.
PAD_ID = 0
Bins = list[list[int]]  # rows of each sequence


@dataclass(frozen=True)
class SamplerConfig:
    """How rows are shared among optimizer steps, micro-batches and ranks, and which rank this is.

    Args:
        batch_size: rows, or packed sequences, of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        world_size: ranks.
        rank: this rank.
        seed: of the orders or packings.
        num_epochs: passes over the rows, if `max_steps` is not positive.
        max_steps: optimizer steps of the run, if positive.
        pad_multiple: tokens of a row, or of rows laid one after the other, are a multiple of this.
        objective: row of OBJECTIVES; of pairs both rows count as one.
        parts, part: ranks of a context group, which count as one rank above and see the same rows;
            which of them this is.
    """

    batch_size: int
    accumulation: int
    world_size: int
    rank: int
    seed: int
    num_epochs: int | float
    max_steps: int
    pad_multiple: int = 8
    objective: str = "sft"
    parts: int = 1
    part: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size

    @property
    def rows_per_micro(self) -> int:
        """Rows of a micro-batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all ranks."""
        return self.rows_per_micro * self.accumulation

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the run.

        Source: transformers, Trainer.set_initial_training_values (the last step is a whole one).
        """
        steps = self.max_steps if self.max_steps > 0 else self.num_epochs * steps_per_epoch
        return math.ceil(steps)


def sampler_config(cfg: TrainConfig, world_size: int, rank: int, multiple: int) -> SamplerConfig:
    """Return how the rows of a run are shared.

    Args:
        cfg: the run.
        world_size, rank, multiple: as for `SamplerConfig`, of padding.
    """
    shape = (cfg.batch_size, cfg.gradient_accumulation_steps, world_size, rank, cfg.seed)
    return SamplerConfig(*shape, cfg.num_epochs, cfg.max_steps, multiple, cfg.objective)


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank.

    Args:
        input_ids: int64 [B, T].
        labels: int64 [B, T], the ids themselves (not shifted), -100 where nothing is trained.
        num_trained_tokens: targets: labels other than -100 at positions 1 and later.
        num_tokens: ids that are not padding.
        row_lengths: when B is 1 and several rows lie in it, tokens of each, padding last; else ().
        sides: the answers in it that are compared; None: nothing is.
        branches: of pairs that share their prompt: what `branch` has laid; None: whole rows.
        mismatched: of KTO, the same prompts, each with the answer of another row of the step.
    """

    input_ids: "torch.Tensor"
    labels: "torch.Tensor"
    num_trained_tokens: int
    num_tokens: int
    row_lengths: tuple[int, ...] = ()
    sides: preferences.Sides | None = None
    mismatched: "Batch | None" = None
    branches: "Branched | None" = None


class Branched(NamedTuple):
    """Where tokens stand that do not follow one another.

    Answers of pairs that go on from prompts, which lie before all of them; or what `cut` has left.

    Args:
        prompts, answers: tokens of each prompt, and of all answers to it.
        position_ids: int64 [1, T].
        positions, tokens: int64 [N], what is predicted from where, row after row.
        chunks: which of equally long chunks of the sequence these are; None: it is whole.
        numbers: int64 [N], which of all targets of the whole sequence these are.
    """

    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    position_ids: "torch.Tensor"
    positions: "torch.Tensor"
    tokens: "torch.Tensor"
    chunks: tuple[int, int] | None = None
    numbers: "torch.Tensor | None" = None


class Batches:
    """The batches of one rank, by optimizer step.

    Each epoch is a fresh order of the rows, cut into global batches of
    `batch_size * accumulation * world_size` rows, some with one more so that none are left over.
    Within a global batch rows of like length meet in a micro-batch and go to the ranks in
    turn, longest first: little padding, ranks equally busy, and the same gradient, since every
    trained token of the global batch weighs the same.

    Args:
        rows: all training samples, the same on every rank.
        sampler: of the rows; T is a multiple of its `pad_multiple`, up to the longest row.
        is_flat: the rows of a micro-batch lie one after the other instead of being padded.

    Attributes:
        shares_prompts: the two rows of a pair have one prompt.
    """

    shares_prompts = False

    def __init__(self, rows: TokenDataset, sampler: SamplerConfig, is_flat: bool = False) -> None:
        assert len(rows)
        self.samples, self.sampler, self.is_flat = rows, sampler, is_flat or sampler.parts > 1
        self.longest = int(rows.lengths.max())
        self.steps_per_epoch = self._steps_per_epoch()
        self.num_steps = sampler.num_steps(self.steps_per_epoch)

    def _steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.samples), self.sampler.rows_per_step)

    @property
    def most_tokens(self) -> int:
        """Of a micro-batch of any rank, its padding counted; later steps may differ a little."""
        num_steps = min(self.num_steps, MOST_SIMULATED_STEPS)
        padded = padded_tokens(self.samples.lengths, self.sampler, num_steps)
        return max(padded) * self.samples.num_sides

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the run
    def _epoch_order(self, epoch: int) -> list[np.ndarray]:
        sampler = self.sampler
        return epoch_order(self.samples.lengths, sampler.rows_per_step, sampler.seed, epoch)

    def rows(self, step: int) -> np.ndarray:
        """Indices of the samples that all ranks together see at optimizer step `step`."""
        epoch, part = divmod(step, self.steps_per_epoch)
        return self._epoch_order(epoch)[part]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """Indices of the samples of each micro-batch of a rank."""
        sampler = self.sampler
        found = micro_batches(self.rows(step), sampler.rows_per_micro, sampler.world_size)
        return [by_rank[rank].tolist() for by_rank in found]

    def step(self, step: int) -> list[Batch]:
        """Make this rank's micro-batches of optimizer step `step`.

        Args:
            step: 0-based, over all epochs.

        Returns:
            As many batches on every rank; a rank left without a row gets a batch of one row of
            padding, in which nothing is trained.
        """
        micros = self.micro_batches(step, self.sampler.rank)
        found = [self._batch(micro) for micro in micros]
        if self.sampler.objective != "kto":
            return found
        every = [self.micro_batches(step, rank) for rank in range(self.sampler.world_size)]
        order = [row for by_rank in zip(*every, strict=True) for micro in by_rank for row in micro]
        before = dict(zip(order, [*order[-1:], *order[:-1]], strict=True))
        samples, pairs = self.samples, ([(row, before[row]) for row in micro] for micro in micros)
        others = [[samples[b].after(samples[a], self.longest) for a, b in micro] for micro in pairs]
        laid = [replace(self.lay(rows), sides=preferences.Sides.of(rows)) for rows in others]
        return [replace(batch, mismatched=own) for batch, own in zip(found, laid, strict=True)]

    def _batch(self, indices: Sequence[int]) -> Batch:
        """The batch of some samples."""
        row = OBJECTIVES[self.sampler.objective]
        samples = [self.samples[index] for index in indices]
        rows = [part for sample in samples for part in sample.rows(row.nll_on_prompt)]
        if not row.num_answers:
            return self.lay(rows)
        sides = preferences.Sides.of(rows, self.samples.hashes[list(indices)])
        if self.shares_prompts and samples and all(sample.prompt for sample in samples):
            made = branch(samples, self.sampler.pad_multiple, row.nll_on_prompt)
            return replace(made, sides=sides)
        return replace(self.lay(rows), sides=sides)

    def lay(self, rows: Sequence[Sample]) -> Batch:
        """Make one batch of rows, or this rank's part of it.

        Args:
            rows: one below the other, or one after the other if `is_flat`.
        """
        sampler = self.sampler
        if not self.is_flat:
            return collate(rows, sampler.pad_multiple, self.longest)
        return cut(flatten(rows, sampler.pad_multiple), sampler.parts, sampler.part)

    def places(self, step: int, rank: int) -> list[str]:
        """Where the rows stand that `rank` of all ranks sees at optimizer step `step`."""
        micros = self.micro_batches(step, rank // self.sampler.parts)
        return [str(self.samples.place(index)) for micro in micros for index in micro]

    def epoch(self, step: int) -> float:
        """Passes over the rows completed once optimizer step `step` is done."""
        number, part = divmod(step, self.steps_per_epoch)
        num_done = (part + 1) * len(self.samples) // self.steps_per_epoch
        return number + num_done / len(self.samples)


class PackedBatches(Batches):
    """The batches of one rank, by optimizer step, several rows in a sequence.

    A micro-batch is `batch_size` sequences of up to `context_length` tokens, laid one after the
    other too, [1, T]: nothing is padded but the end. See `pack` for which rows meet; all ranks get
    about as many tokens.

    Args:
        samples: all training samples, the same on every rank.
        context_length: most tokens of a sequence.
        sampler: of the sequences; T is a multiple of its `pad_multiple`.
    """

    def __init__(self, samples: TokenDataset, context_length: int, sampler: SamplerConfig) -> None:
        self.context_length = context_length
        super().__init__(samples, sampler, is_flat=True)

    def _steps_per_epoch(self) -> int:
        turns_per_step = self.sampler.batch_size * self.sampler.accumulation
        return steps_per_epoch(len(self._turns(0)), turns_per_step)

    @property
    def most_tokens(self) -> int:
        """Of a micro-batch of any rank."""
        return self.sampler.batch_size * self.context_length * self.samples.num_sides

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the run
    def _turns(self, epoch: int) -> list[list[list[int]]]:
        """Turns of all ranks: for each, the rows of every rank's sequence."""
        seed, size = self.sampler.seed, self.sampler.world_size
        capacity = self.context_length * self.samples.num_sides
        sequences = pack(self.samples.sizes, capacity, size, seed, epoch)
        return [sequences[i : i + size] for i in range(0, len(sequences), size)]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """Indices of the samples of each micro-batch of a rank."""
        number, part = divmod(step, self.steps_per_epoch)
        turns = self._turns(number)
        first, last = (np.array([part, part + 1]) * len(turns) // self.steps_per_epoch).tolist()
        sequences = [turn[rank] for turn in turns[first:last]]
        num_micro = max(-(-len(sequences) // self.sampler.batch_size), 1)
        parts = np.array_split(np.arange(len(sequences)), num_micro)
        return [[row for i in part for row in sequences[i]] for part in parts]

    def epoch(self, step: int) -> float:
        """Passes over the rows completed once optimizer step `step` is done."""
        return (step + 1) / self.steps_per_epoch


def make(
    cfg: TrainConfig, rows: TokenDataset, sampler: SamplerConfig, is_flat: bool = False
) -> Batches:
    """Return the training batches of a run, packed if it packs.

    Args:
        cfg: packing, context_length.
        rows, sampler, is_flat: see `Batches`.
    """
    if cfg.packing == "on":
        return PackedBatches(rows, cfg.context_length, sampler)
    return Batches(rows, sampler, is_flat)


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Return the optimizer steps of an epoch.

    Rows that do not fill a step join the others, one each: no step is much smaller than the rest,
    none of an epoch is left out. 10,748 rows in steps of 8 are 1,343 steps, and 671 of 16.

    Args:
        num_rows: rows of an epoch, at least one.
        rows_per_step: rows of a step over all ranks and micro-batches.
    """
    return max(num_rows // rows_per_step, 1)


def epoch_order(lengths: np.ndarray, rows_per_step: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Assign the rows of an epoch to its steps.

    The rows are shuffled; then those of some steps in a row are sorted by length, so that rows of
    like length meet in a step and little is padded; then these steps are shuffled again.

    Args:
        lengths: int [rows], tokens of each.
        rows_per_step: rows of a step, or one more.
        seed: of the run.
        epoch: its number from 0; another one gives another order.

    Returns:
        Indices of the rows of every step, longest first; each row once.
    """
    random = np.random.default_rng((seed, epoch))
    order, steps = random.permutation(len(lengths)), steps_per_epoch(len(lengths), rows_per_step)
    bounds = np.arange(steps + 1) * len(lengths) // steps
    window = min(SORT_WINDOW_STEPS, max(steps // 4, 1))
    found: list[np.ndarray] = []
    for first in range(0, steps, window):
        inside = bounds[first : first + window + 1]
        rows = order[inside[0] : inside[-1]]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        parts = np.split(rows, (inside - inside[0])[1:-1])
        found += [parts[i] for i in random.permutation(len(parts))]
    return found


def micro_batches(rows: np.ndarray, rows_per_micro: int, world_size: int) -> list[list[np.ndarray]]:
    """Share the rows of a step among micro-batches and ranks.

    Args:
        rows: of the step, longest first.
        rows_per_micro: most rows of a micro-batch over all ranks.
        world_size: ranks.

    Returns:
        For every micro-batch the rows of each rank: of like length, as many or one fewer.
    """
    parts = np.array_split(rows, max(-(-len(rows) // rows_per_micro), 1))
    return [[part[rank::world_size] for rank in range(world_size)] for part in parts]


def padded_width(longest: int, multiple: int, most: int) -> int:
    """Return the tokens that rows are padded to.

    Args:
        longest: tokens of the longest row of the batch.
        multiple: the width is a multiple of this, if it fits.
        most: tokens of the longest row of all; the width goes no further than the multiple of 8
            that holds it.
    """
    return min(-(-max(longest, 1) // multiple) * multiple, -(-max(most, 1) // 8) * 8)


def padded_tokens(lengths: np.ndarray, sampler: SamplerConfig, num_steps: int = 0) -> list[int]:
    """Return the tokens of every micro-batch of the first epoch with its padding, of all ranks.

    Args:
        lengths: int [rows], tokens of each.
        sampler: of the run; its rank does not matter.
        num_steps: steps to look at; 0: all of the epoch.
    """
    most, found = int(lengths.max()), []
    for rows in epoch_order(lengths, sampler.rows_per_step, sampler.seed, 0)[: num_steps or None]:
        micros = micro_batches(rows, sampler.rows_per_micro, sampler.world_size)
        for mine in (part for by_rank in micros for part in by_rank):
            longest = int(lengths[mine].max()) if len(mine) else 1
            found.append(max(len(mine), 1) * padded_width(longest, sampler.pad_multiple, most))
    return found


def pack(lengths: np.ndarray, capacity: int, num_ranks: int, seed: int, epoch: int) -> Bins:
    """Pack rows into sequences for a number of ranks, about as many tokens for each.

    The rows are shuffled and cut into windows. In each, rows go longest first into the fullest
    sequence with room (best-fit decreasing); what stays less than half full is packed again with
    the next window. Then sequences of like fill go to the ranks in turn; the turns are shuffled.

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
    order = random.permutation(len(lengths))
    window_tokens, ends = capacity * PACK_WINDOW_SEQUENCES, np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(window_tokens, total, window_tokens))
    bins, open_bins = Bins(), Bins()
    for window in np.split(order, cuts):
        again = [row for rows in open_bins for row in rows]
        fills, made = _best_fit(window.tolist() + again, lengths, capacity)
        bins += [rows for fill, rows in zip(fills, made, strict=True) if 2 * fill >= capacity]
        open_bins = [rows for fill, rows in zip(fills, made, strict=True) if 2 * fill < capacity]
    bins += open_bins
    while len(bins) % num_ranks:  # those of most rows are split, else empty ones are added
        largest = max(bins, key=len)
        half = len(largest) // 2
        bins.append(largest[:half])
        largest[:half] = []
    bins.sort(key=lambda rows: -sum(int(lengths[row]) for row in rows))
    turns = [bins[i : i + num_ranks] for i in range(0, len(bins), num_ranks)]
    found: list[list[int]] = []
    for number in random.permutation(len(turns)):
        by = int(random.integers(num_ranks))  # no rank always has the fullest sequence
        found += turns[number][by:] + turns[number][:by]
    return found


def _best_fit(rows: list[int], lengths: np.ndarray, capacity: int) -> tuple[list[int], Bins]:
    """Tokens and rows of each sequence."""
    fills, bins = list[int](), Bins()
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


def collate(samples: Sequence[Sample], pad_multiple: int = 8, most: int | None = None) -> Batch:
    """Pad samples on the right to a common length.

    Args:
        samples: rows of the batch; none gives one row of padding.
        pad_multiple: T is the smallest multiple of this that holds the longest row.
        most: T goes no further than the multiple of 8 that holds a row of so many
            tokens; None for no such bound.

    Returns:
        The batch, on the CPU.
    """
    longest = max((len(sample.input_ids) for sample in samples), default=1)
    width = padded_width(longest, pad_multiple, most or longest + pad_multiple)
    return _batch((max(len(samples), 1), width), samples, [(row, 0) for row in range(len(samples))])


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
    *firsts, end = itertools.accumulate(lengths, initial=0)
    batch = _batch((1, width), samples, [(0, first) for first in firsts])
    batch.labels[0, firsts] = row_formats.NOT_TRAINED
    return replace(batch, row_lengths=(*lengths, *[width - end] * (width > end)))


def cut(batch: Batch, num: int, part: int) -> Batch:
    """Keep one rank's part of rows that lie one after the other.

    That is the chunks `part` and 2 num - 1 - part of 2 num equally long ones: all ranks have the
    same work then, though later tokens look at more.

    Args:
        batch: of `flatten`; T is a multiple of 2 num.
        num: ranks that share it; 1: it stays whole.
        part: number of the rank among them.

    Returns:
        The batch, [1, T / num]; counts and targets are of this part, `row_lengths` of the whole.
    """
    import torch

    if num == 1:
        return batch
    chunks = part, 2 * num - 1 - part
    at = torch.arange(batch.input_ids.shape[1]).view(2 * num, -1)[[*chunks]].flatten()
    following = batch.labels[0].roll(-1)  # the first token is no target
    numbers, following = ((following != row_formats.NOT_TRAINED).cumsum(0) - 1)[at], following[at]
    positions = (following != row_formats.NOT_TRAINED).nonzero().squeeze(1)
    whole = torch.cat([torch.arange(length) for length in batch.row_lengths])
    targets = positions, following[positions], chunks, numbers[positions]
    laid = Branched((), (), whole[at][None], *targets)
    counts = len(positions), int((at < batch.num_tokens).sum())
    ids, labels = batch.input_ids[:, at], batch.labels[:, at]
    return replace(Batch(ids, labels, *counts, batch.row_lengths), branches=laid)


def join(batches: Sequence[Batch], most_tokens: int) -> list[Batch]:
    """Take neighbours of one kind as one: several padded rows, or rows one after the other.

    Args:
        batches: on the CPU, without answers that are compared.
        most_tokens: of one that is made, padding included.

    Returns:
        Fewer batches, or the same, with the rows in their order.
    """
    import torch

    found: list[Batch] = []
    for batch in batches:
        last = found[-1] if found else batch
        pairs = [(getattr(last, name), getattr(batch, name)) for name in ("input_ids", "labels")]
        (ids, new_ids), _ = pairs
        has_rows, shapes = bool(batch.row_lengths), {ids[0].shape, new_ids[0].shape}
        is_alike = has_rows == bool(last.row_lengths) and (has_rows or len(shapes) == 1)
        if not found or not is_alike or ids.numel() + new_ids.numel() > most_tokens:
            found.append(batch)
            continue
        ids, labels = (torch.cat(pair, int(has_rows)) for pair in pairs)
        num_trained = last.num_trained_tokens + batch.num_trained_tokens
        lengths = (*last.row_lengths, *batch.row_lengths)
        found[-1] = Batch(ids, labels, num_trained, last.num_tokens + batch.num_tokens, lengths)
    return found


def branch(samples: Sequence[Sample], pad_multiple: int, learns_prompt: bool) -> Batch:
    """Lay the prompts of pairs one after the other, then their answers.

    Args:
        samples: pairs with prompts, at least one.
        pad_multiple: T is a multiple of this.
        learns_prompt: see Sample.rows.

    Returns:
        The batch, [1, T], on the CPU, its `labels` empty.
    """
    import torch

    prompts = tuple(sample.prompt for sample in samples)
    sizes = [(s.second - s.prompt, len(s.input_ids) - s.second) for s in samples]
    lengths, answers = [*prompts, *itertools.chain(*sizes)], tuple(map(sum, sizes))
    width = -(-sum(lengths) // pad_multiple) * pad_multiple
    starts = [0, *itertools.accumulate(lengths)]
    rest, ids = width - starts[-1], np.full((1, width), PAD_ID, np.int64)
    parts = [s.input_ids[: s.prompt] for s in samples] + [s.input_ids[s.prompt :] for s in samples]
    ids[0, : starts[-1]] = np.concatenate(parts)
    firsts = [0] * len(prompts) + [p for p in prompts for _ in range(2)] + [0]
    at = [np.arange(n) + first for n, first in zip([*lengths, rest], firsts, strict=True)]
    positions, targets = [], []
    for i, row in enumerate(row for sample in samples for row in sample.rows(learns_prompt)):
        prompt, begin, start = prompts[i // 2], starts[i // 2], starts[len(prompts) + i]
        places = np.arange(len(row.input_ids))
        places = np.where(places < prompt, begin + places, start + places - prompt)
        learned = np.nonzero(row.is_trained[1:])[0]
        positions.append(places[learned])
        targets.append(row.input_ids[learned + 1].astype(np.int64))
    where, what = (torch.from_numpy(np.concatenate(t)) for t in (positions, targets))
    branches = Branched(prompts, answers, torch.from_numpy(np.concatenate(at))[None], where, what)
    labels, counts = torch.full((1, width), row_formats.NOT_TRAINED), (len(where), starts[-1])
    lengths += [rest] * (rest > 0)
    return Batch(torch.from_numpy(ids), labels, *counts, tuple(lengths), branches=branches)


def _batch(shape: tuple[int, int], rows: Sequence[Sample], starts: list[tuple[int, int]]) -> Batch:
    """Samples on padding, each from its row and column on."""
    import torch

    ids = np.full(shape, PAD_ID, np.int64)
    labels = np.full_like(ids, row_formats.NOT_TRAINED)
    for sample, (row, first) in zip(rows, starts, strict=True):
        place = slice(first, first + len(sample.input_ids))
        ids[row, place] = sample.input_ids
        labels[row, place] = np.where(sample.is_trained, sample.input_ids, row_formats.NOT_TRAINED)
    num_trained = sum(sample.num_trained_tokens for sample in rows)
    num_tokens = sum(len(sample.input_ids) for sample in rows)
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), num_trained, num_tokens)


def all_once(samples: TokenDataset, sampler: SamplerConfig) -> Iterator[Batch]:
    """Make a rank's share of held-out rows: every row once, as many batches on each rank.

    Args:
        samples: the same on every rank.
        sampler: of the run.

    Yields:
        Batches on the CPU; none if there are no samples.
    """
    if len(samples):
        once = replace(sampler, accumulation=1, seed=0, num_epochs=1, max_steps=0)
        batches = Batches(samples, once)
        for step in range(batches.num_steps):
            yield from batches.step(step)
