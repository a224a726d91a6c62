"""Samples as one flat array, in memory or on disk once for all ranks and later runs, and splits.

A token that is learned is stored as its id, one that is only given as ~id, a negative number.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fsdp_qlora import atomic
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data.sources import RowPlace
from fsdp_qlora.errors import UserError

VERSION = 2  # of what the files mean; raise it when that or the way rows become tokens changes
CODES, TABLE, FACTS = "codes.bin", "table.bin", "facts.json"
START, FILE, NUMBER, HASH, NUM_TRAINED, NUM_UNCUT = range(6)


@dataclass(frozen=True, eq=False)
class Sample:
    """One row as ids.

    Args:
        input_ids: int32 [T].
        is_trained: bool [T], tokens that are learned; the very first never is.
    """

    input_ids: np.ndarray
    is_trained: np.ndarray

    @property
    def num_trained_tokens(self) -> int:
        """Ids that are the target of a prediction."""
        return int(np.count_nonzero(self.is_trained[1:]))


@dataclass(frozen=True, eq=False)
class TokenStore:
    """All samples of a data set.

    Args:
        codes: int32 [tokens of all samples].
        table: int64 [samples + 1, 6], of each sample: where it begins in `codes`, index into
            facts["files"] and number of its `RowPlace`, a hash of its codes, tokens that are the
            target of a prediction, tokens before the context cut them. The last row is the end.
        facts: what was counted while the rows were read, as JSON can hold it.
        note: one line for the user on where the tokens lie.
    """

    codes: np.ndarray
    table: np.ndarray
    facts: dict[str, Any]
    note: str = ""

    def __len__(self) -> int:
        return len(self.table) - 1

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [samples], the same for samples of the same tokens."""
        return self.table[:-1, HASH].view(np.uint64)

    @property
    def num_uncut(self) -> np.ndarray:
        """int64 [samples], tokens before the context cut them."""
        return self.table[:-1, NUM_UNCUT]


class TokenDataset(Sequence[Sample]):
    """Some samples of a store.

    Args:
        store: holds them.
        indices: int64, which ones, in order; None for all.
    """

    def __init__(self, store: TokenStore, indices: np.ndarray | None = None) -> None:
        self.store = store
        self.indices = np.arange(len(store)) if indices is None else indices
        self.lengths = np.diff(store.table[:, START])[self.indices]
        self.num_trained = store.table[self.indices, NUM_TRAINED]
        self.hashes = store.hashes[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        row = self.indices[index]
        start, stop = self.store.table[row : row + 2, START]
        codes = np.array(self.store.codes[start:stop])
        return Sample(np.where(codes < 0, ~codes, codes), codes >= 0)

    def place(self, index: int) -> RowPlace:
        """Return where the row of a sample stands."""
        row = self.store.table[self.indices[index]]
        return RowPlace(self.store.facts["files"][row[FILE]], int(row[NUMBER]))


def of_samples(samples: Sequence[Sample], name: str) -> TokenDataset:
    """Put samples into memory.

    Args:
        samples: any.
        name: what their places are called.

    Returns:
        All of them.
    """
    builder = StoreBuilder(None)
    for number, sample in enumerate(samples, 1):
        codes = np.where(sample.is_trained, sample.input_ids, ~sample.input_ids)
        builder.add(codes.astype(np.int32), RowPlace(name, -number))
    return TokenDataset(builder.finish({"num_rows": len(samples), "kinds": {name: len(samples)}}))


class StoreBuilder:
    """Collects samples.

    Args:
        directory: where the tokens are written; None for memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory, self.buffer = directory, io.BytesIO()
        self.file: BinaryIO = self.buffer
        if directory is not None:
            directory.mkdir(parents=True)
            self.file = (directory / CODES).open("wb")
        self.num_tokens, self.table, self.names = 0, array("q"), dict[str, int]()

    def add(self, codes: np.ndarray, place: RowPlace, num_uncut: int | None = None) -> None:
        """Add a sample.

        Args:
            codes: int32 [T].
            place: of its row.
            num_uncut: tokens before it was cut; None for T.
        """
        whole = codes.tobytes()
        self.file.write(whole)
        digest = hashlib.blake2b(whole, digest_size=8).digest()
        file = self.names.setdefault(place.name, len(self.names))
        num_trained = int(np.count_nonzero(codes[1:] >= 0))
        uncut = len(codes) if num_uncut is None else num_uncut
        number = int.from_bytes(digest, "little", signed=True)
        self.table.extend((self.num_tokens, file, place.number, number, num_trained, uncut))
        self.num_tokens += len(codes)

    def finish(self, facts: dict[str, Any]) -> TokenStore:
        """Return the samples; they are whole on disk if there is a directory.

        Args:
            facts: what was counted.
        """
        facts = facts | {"files": list(self.names)}
        self.table.extend((self.num_tokens, 0, 0, 0, 0, 0))
        if self.directory is None:
            codes = np.frombuffer(self.buffer.getbuffer(), np.int32)
            return TokenStore(codes, np.array(self.table).reshape(-1, 6), facts)
        self.file.close()
        (self.directory / TABLE).write_bytes(self.table.tobytes())
        sums = [_digest(self.directory / name) for name in (CODES, TABLE)]
        (self.directory / FACTS).write_text(json.dumps({"sums": sums, "facts": facts}))
        return _map(self.directory, facts)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _map(directory: Path, facts: dict[str, Any]) -> TokenStore:
    has_codes = (directory / CODES).stat().st_size > 0  # nothing of that size can be mapped
    codes = np.memmap(directory / CODES, np.int32, "r") if has_codes else np.zeros(0, np.int32)
    return TokenStore(codes, np.memmap(directory / TABLE, np.int64, "r").reshape(-1, 6), facts)


def read(directory: Path) -> TokenStore | None:
    """Map what is on disk.

    Args:
        directory: of a finished store.

    Returns:
        The store; None if there is none or a byte of it is wrong.
    """
    try:
        table = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        sums = [_digest(directory / name) for name in (CODES, TABLE)]
        return _map(directory, table["facts"]) if table["sums"] == sums else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cache_root(setting: str) -> Path | None:
    """Return where stores are kept.

    Args:
        setting: "off", "auto" (~/.cache/fsdp_qlora, or $FSDP_QLORA_CACHE) or a directory.
    """
    return None if setting == "off" else atomic.cache_dir(setting)


def cached(directory: Path, build: Callable[[StoreBuilder], TokenStore]) -> TokenStore:
    """Map a store, or build it while the other ranks wait.

    Args:
        directory: of the store; another one for other tokens.
        build: fills a builder; its errors are passed on.

    Returns:
        The store; in memory, with the reason in its note, if the disk does not take it.
    """
    draft = directory.with_name(f".tmp-{os.getpid()}-{directory.name}")
    lock = directory.with_name(f".{directory.name}.lock")
    is_new = not directory.parent.exists()
    try:
        with _locked(lock):
            found = read(directory)
            if found is not None:
                return replace(found, note=f"{directory} (made before)")
            for stale in (directory, *directory.parent.glob(f".tmp-*-{directory.name}")):
                shutil.rmtree(stale, ignore_errors=True)  # damaged, or of a run that was killed
            made = build(StoreBuilder(draft))
            if made.facts.get("num_bad"):  # mapped files live on until they are closed
                return replace(made, note="not kept: there are bad rows")
            atomic.commit(draft, directory)
            return replace(made, note=str(directory))
    except OSError as error:  # a full disk, or one that cannot be written or locked
        note = f"not kept: {directory.parent}: {error.strerror or error}"
        return replace(build(StoreBuilder(None)), note=note)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if is_new and not directory.exists():  # nothing is kept, so nothing is left
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                directory.parent.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def train_test_split(
    whole: TokenDataset, cfg: TrainConfig
) -> tuple[TokenDataset, TokenDataset, int]:
    """Split samples into those to learn, those held out, and those for a later test.

    What a sample holds decides, with the seed, not where it stands: rows that are added later
    change nothing for those that were there, and equal rows fall into one part.

    Args:
        whole: all samples.
        cfg: gives train_split and eval_split (shares), or eval_samples, and the seed.

    Returns:
        Train and held out, each in the order of the rows, and how many are left for a test.

    Raises:
        UserError: a part would be empty, or the shares are more than the whole.
    """
    learn = split_share(cfg.train_split)
    if cfg.eval_samples:
        if learn is not None:
            got = f"--eval_split {cfg.eval_split} with --train_split {cfg.train_split}"
            raise UserError(got, "both split the rows", "give a share (0.1) as --eval_split")
        return (*_hold_out(whole, cfg.eval_samples, cfg.seed), 0)
    hold = split_share(cfg.eval_split)
    if learn is None and hold is None:
        return whole, TokenDataset(whole.store, whole.indices[:0]), 0
    has_file = split_name(cfg.eval_split) is not None
    learn = 1.0 - hold if learn is None and hold is not None else learn or 0.0
    hold = (0.0 if has_file else 1.0 - learn) if hold is None else hold
    if learn + hold > 1.0 + 1e-9:
        got = f"--train_split {learn} --eval_split {hold}"
        raise UserError(got, "are more than all rows", "make them 1 or less together")
    at = spread(whole.hashes, cfg.seed)
    train = TokenDataset(whole.store, whole.indices[at < learn])
    held_out = TokenDataset(whole.store, whole.indices[(at >= learn) & (at < learn + hold + 1e-9)])
    for name, made, share in (("train", train, learn), ("eval", held_out, hold)):
        if not len(made) and share and len(whole):
            rule = f"{share:g} of {len(whole)} rows is none"
            raise UserError(f"--{name}_split", rule, "give more rows or another --seed")
    return train, held_out, len(whole) - len(train) - len(held_out)


def _hold_out(whole: TokenDataset, num: int, seed: int) -> tuple[TokenDataset, TokenDataset]:
    if len(whole) and num >= len(whole):
        rule = f"only {len(whole)} rows can be used, and some must be trained on"
        raise UserError(f"--eval_split {num}", rule, f"at most {len(whole) - 1}")
    chosen = np.argsort(spread(whole.hashes, seed), kind="stable")[:num]
    is_chosen = np.isin(np.arange(len(whole)), chosen)
    train, held_out = whole.indices[~is_chosen], whole.indices[is_chosen]
    return TokenDataset(whole.store, train), TokenDataset(whole.store, held_out)


def spread(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Spread samples evenly over [0, 1), equal ones at the same place.

    Args:
        hashes: uint64.
        seed: another one spreads them in another way.

    Returns:
        float64, one each.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    mixed = hashes ^ np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))).astype(np.float64) / 2.0**64


def split_share(setting: str | None) -> float | None:
    """Return a split as a number between 0 and 1, or None if it is a name.

    Args:
        setting: train_split or eval_split.

    Raises:
        UserError: it is another number.
    """
    try:
        share = float(setting) if setting is not None else None
    except ValueError:
        return None
    if share is not None and not 0 < share < 1:
        raise UserError(f"a split of {setting}", "must be between 0 and 1", "0.1 is a tenth")
    return share


def split_name(setting: str | None) -> str | None:
    """Return a split that is a name: of a file, or of a split of a hub set; else None.

    Args:
        setting: train_split or eval_split.
    """
    return setting if setting is not None and split_share(setting) is None else None
