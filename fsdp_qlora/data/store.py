"""Samples as one flat array: in memory, or on disk once for all ranks and later runs.

A token that is learned is kept as its id, one that is only given as ~id, a negative number.
"""

import contextlib
import fcntl
import hashlib
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
from fsdp_qlora.data.rows import Place

VERSION = 1  # of what the files mean; raise it when that or the way rows become tokens changes
FILES: dict[str, np.dtype] = {
    "codes": np.dtype(np.int32),
    "starts": np.dtype(np.int64),
    "files": np.dtype(np.int32),
    "numbers": np.dtype(np.int64),
    "hashes": np.dtype(np.uint64),
    "num_trained": np.dtype(np.int32),
    "num_uncut": np.dtype(np.int32),
}
FACTS = "facts.json"


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
class Store:
    """All samples of a data set.

    Args:
        codes: int32 [tokens of all samples].
        starts: int64 [samples + 1], where each begins in `codes`.
        files: int32 [samples], index into facts["files"]: where its row stands.
        numbers: int64 [samples], number of a `Place`.
        hashes: uint64 [samples], the same for samples of the same tokens.
        num_trained: int32 [samples], tokens that are the target of a prediction.
        num_uncut: int32 [samples], tokens before the context cut them.
        facts: what was counted while the rows were read, as JSON can hold it.
        note: one line for the user on where the tokens lie.
    """

    codes: np.ndarray
    starts: np.ndarray
    files: np.ndarray
    numbers: np.ndarray
    hashes: np.ndarray
    num_trained: np.ndarray
    num_uncut: np.ndarray
    facts: dict[str, Any]
    note: str = ""

    def place(self, index: int) -> Place:
        """Return where the row of a sample stands."""
        return Place(self.facts["files"][self.files[index]], int(self.numbers[index]))


class Part(Sequence[Sample]):
    """Some samples of a store.

    Args:
        store: holds them.
        indices: int64, which ones, in order; None for all.
    """

    def __init__(self, store: Store, indices: np.ndarray | None = None) -> None:
        self.store = store
        self.indices = np.arange(len(store.starts) - 1) if indices is None else indices
        self.lengths = np.diff(store.starts)[self.indices]
        self.num_trained = store.num_trained[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        start, stop = self.store.starts[self.indices[index] : self.indices[index] + 2]
        codes = np.array(self.store.codes[start:stop])
        return Sample(np.where(codes < 0, ~codes, codes), codes >= 0)

    def place(self, index: int) -> Place:
        """Return where the row of a sample stands."""
        return self.store.place(int(self.indices[index]))


def of_samples(samples: Sequence[Sample], name: str) -> Part:
    """Put samples into memory.

    Args:
        samples: any.
        name: what their places are called.

    Returns:
        All of them.
    """
    builder = Builder(None)
    for number, sample in enumerate(samples, 1):
        codes = np.where(sample.is_trained, sample.input_ids, ~sample.input_ids)
        builder.add(codes.astype(np.int32), Place(name, -number))
    return Part(builder.finish({"num_rows": len(samples), "kinds": {name: len(samples)}}))


class Builder:
    """Collects samples.

    Args:
        directory: where the tokens are written; None for memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.file: BinaryIO | None = None
        if directory is not None:
            directory.mkdir(parents=True)
            self.file = (directory / "codes.bin").open("wb")
        self.parts: list[np.ndarray] = []
        self.columns = {name: array(FILES[name].char) for name in FILES if name != "codes"}
        self.columns["starts"].append(0)
        self.names: dict[str, int] = {}

    def add(self, codes: np.ndarray, place: Place, num_uncut: int | None = None) -> None:
        """Add a sample.

        Args:
            codes: int32 [T].
            place: of its row.
            num_uncut: tokens before it was cut; None for T.
        """
        whole = codes.tobytes()
        if self.file is None:
            self.parts.append(codes)
        else:
            self.file.write(whole)
        digest = hashlib.blake2b(whole, digest_size=8).digest()
        values = {
            "starts": self.columns["starts"][-1] + len(codes),
            "files": self.names.setdefault(place.name, len(self.names)),
            "numbers": place.number,
            "hashes": int.from_bytes(digest, "little"),
            "num_trained": int(np.count_nonzero(codes[1:] >= 0)),
            "num_uncut": len(codes) if num_uncut is None else num_uncut,
        }
        for name, value in values.items():
            self.columns[name].append(value)

    def finish(self, facts: dict[str, Any]) -> Store:
        """Return the samples; they are whole on disk if there is a directory.

        Args:
            facts: what was counted.
        """
        facts = facts | {"files": list(self.names)}
        arrays: dict[str, Any] = {
            name: np.array(values, FILES[name]) for name, values in self.columns.items()
        }
        if self.directory is None:
            codes = np.concatenate([np.zeros(0, np.int32), *self.parts])
            return Store(codes, facts=facts, **arrays)
        assert self.file is not None
        self.file.close()
        for name, values in arrays.items():
            (self.directory / f"{name}.bin").write_bytes(values.tobytes())
        sums = {name: _digest(self.directory / f"{name}.bin") for name in FILES}
        (self.directory / FACTS).write_text(json.dumps({"sums": sums, "facts": facts}))
        return _map(self.directory, facts)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _map(directory: Path, facts: dict[str, Any]) -> Store:
    arrays: dict[str, Any] = {}
    for name, dtype in FILES.items():
        path = directory / f"{name}.bin"
        is_empty = path.stat().st_size == 0  # nothing of that size can be mapped
        arrays[name] = np.zeros(0, dtype) if is_empty else np.memmap(path, dtype, "r")
    return Store(**arrays, facts=facts)


def read(directory: Path) -> Store | None:
    """Map what is on disk.

    Args:
        directory: of a finished store.

    Returns:
        The store; None if there is none or a byte of it is wrong.
    """
    try:
        table = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        sums = {name: _digest(directory / f"{name}.bin") for name in FILES}
        return _map(directory, table["facts"]) if table["sums"] == sums else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def root(setting: str) -> Path | None:
    """Return where stores are kept.

    Args:
        setting: "off", "auto" (~/.cache/fsdp_qlora, or $FSDP_QLORA_CACHE) or a directory.
    """
    if setting == "off":
        return None
    usual = os.environ.get("FSDP_QLORA_CACHE", Path.home() / ".cache" / "fsdp_qlora")
    return Path(usual if setting == "auto" else setting).expanduser()


def keep(directory: Path, build: Callable[[Builder], Store]) -> Store:
    """Map a store, or build it while the other ranks wait.

    Args:
        directory: of the store; another one for other tokens.
        build: fills a builder; its errors are passed on.

    Returns:
        The store; in memory, with the reason in its note, if the disk does not take it.
    """
    draft = directory.with_name(f".tmp-{os.getpid()}-{directory.name}")
    is_new = not directory.parent.exists()
    try:
        with _locked(directory):
            found = read(directory)
            if found is not None:
                return _with_note(found, f"{directory} (made before)")
            for rest in (directory, *directory.parent.glob(f".tmp-*-{directory.name}")):
                shutil.rmtree(rest, ignore_errors=True)  # damaged, or of a run that was killed
            made = build(Builder(draft))
            if made.facts.get("num_bad"):  # mapped files live on until they are closed
                return _with_note(made, "not kept: there are bad rows")
            atomic.commit(draft, directory)
            return _with_note(made, str(directory))
    except OSError as error:  # a full disk, or one that cannot be written or locked
        store = build(Builder(None))
        return _with_note(store, f"not kept: {directory.parent}: {error.strerror or error}")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if is_new and not directory.exists():  # nothing is kept, so nothing is left
            _lock_of(directory).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                directory.parent.rmdir()


def _with_note(store: Store, note: str) -> Store:
    return replace(store, note=note)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(directory).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_of(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.lock")
