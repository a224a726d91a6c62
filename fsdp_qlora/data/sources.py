"""Where rows come from: files, directories, the hub, or a function of the user's own."""

import difflib
import functools
import hashlib
import importlib.util
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from fsdp_qlora.config import OWN_CODE
from fsdp_qlora.data import readers
from fsdp_qlora.data.readers import PlacedRows, RowPlace
from fsdp_qlora.errors import ENVIRONMENT, UserError

DUMMY = "dummy"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([^:]*))?(?::(.+))?")
OWN_FUNCTION = "get_custom_dataset"
MOST_HASHED_BYTES = 2**28  # larger files are known by size and time: a hash would take long
MOST_NAMES = 50_000  # in a directory of rows and below it; `/` holds millions
FORMATS = "a .jsonl, .json, .csv, .parquet or .txt file (or .gz, .zst), a directory of them"
# What the datasets library leaves beside the rows it saves.
LEFTOVERS = ("dataset_info.json", "state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Args:
        name: as the user is shown it.
        read: gives the rows, with their places, from the first on.
        fingerprint: a text that is another one for other rows; None if there is no telling.
        num_bytes: of its files, as far as known.
        is_file: it is one file, without splits.
    """

    name: str
    read: Callable[[], PlacedRows]
    fingerprint: Callable[[], str | None]
    num_bytes: int = 0
    is_file: bool = False


@dataclass(frozen=True)
class SourceOptions:
    """What some sources must know besides their name.

    Args:
        num_samples: rows to use of alpaca_sample and orca_math; all else is used whole.
        seed: seed of the shuffle of sql and orca_math.
        split: split of hub sets and own functions, whatever their name says; None for that one,
            or the usual one.
        load_tokenizer: gives the transformers tokenizer for a function of the user's own.
    """

    num_samples: int = 0
    seed: int = 0
    split: str | None = None
    load_tokenizer: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hugging Face hub, and which of its rows are used.

    Args:
        repo: name on the hub.
        split: split that is read; a slice such as "train[:1%]" is one too.
        config: one of its configurations, where it has several.
        is_shuffled: rows are shuffled with the run's seed before any are chosen.
        first: index of the first row used.
        is_limited: only `dataset_samples` rows are used.
    """

    repo: str
    split: str = "train"
    config: str | None = None
    is_shuffled: bool = False
    first: int = 0
    is_limited: bool = False

    def __str__(self) -> str:
        return ":".join([self.repo, *([self.config] if self.config else []), self.split])


ORCA_MATH = "microsoft/orca-math-word-problems-200k"
HUB_SETS = {
    "alpaca": HubSet("yahma/alpaca-cleaned"),
    "alpaca_sample": HubSet("yahma/alpaca-cleaned", is_limited=True),
    "guanaco": HubSet("timdettmers/openassistant-guanaco"),
    "sql": HubSet("knowrohit07/know_sql", split="validation", is_shuffled=True, first=1000),
    "orca_math": HubSet(ORCA_MATH, is_shuffled=True, is_limited=True),
}


def find(dataset: str, options: SourceOptions) -> list[Source]:
    """Find what --dataset names.

    Args:
        dataset: path of a file or directory, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub, a name in
            `HUB_SETS`, `file.py[:function]`, or several of them with commas between.
        options: what some sources must know besides.

    Returns:
        At least one source, in the order given; the files of a directory by name.

    Raises:
        UserError: no such data set; the hub cannot be reached (code 3).
    """
    is_one = "," not in dataset or os.path.lexists(dataset)
    names = [dataset] if is_one else [name.strip() for name in dataset.split(",") if name.strip()]
    if not names:
        _refuse_name(dataset)
    return [source for name in names for source in _find_one(name, options)]


def read(sources: list[Source]) -> PlacedRows:
    """Read all rows of some sources, one at a time.

    Args:
        sources: from `find`.

    Yields:
        RowPlace and row; a `BadRow` where a row cannot be read.

    Raises:
        UserError: one that cannot be read.
    """
    return (pair for source in sources for pair in source.read())


def _find_one(name: str, options: SourceOptions) -> list[Source]:
    if name in HUB_SETS:
        entry = HUB_SETS[name]
        return [_hub_source(replace(entry, split=options.split or entry.split), name, options)]
    if match := OWN_CODE.fullmatch(name):
        return [_own_source(Path(match[1]), match[2] or OWN_FUNCTION, options)]
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        _refuse_name(name)
    if os.path.isdir(path):
        return _directory(path)
    if os.path.lexists(path) or readers.can_read(path):
        return [_file(path)]
    match = HUB_NAME.fullmatch(name)
    if match is None or name.startswith("."):
        _refuse_name(name)
    entry = HubSet(match[1], options.split or match[3] or "train", match[2] or None)
    return [_hub_source(entry, name, options)]


def _refuse_name(dataset: str) -> NoReturn:
    names = [*HUB_SETS, DUMMY]
    close = difflib.get_close_matches(dataset, names, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"or ORG/NAME of the hub, {' '.join(names)}"
    raise UserError(f"dataset {dataset}", f"want {FORMATS}", remedy)


def _directory(path: Path) -> list[Source]:
    try:
        names = list(itertools.islice(path.rglob("*"), MOST_NAMES))
    except OSError as error:
        reason = f"cannot be listed ({error.strerror})"
        raise UserError(f"dataset {path}", reason, "check its permissions", ENVIRONMENT) from error
    if len(names) == MOST_NAMES:
        rule, remedy = f"holds {MOST_NAMES:,} names or more", "give the directory of the rows"
        raise UserError(f"dataset {path}", rule, remedy)
    inside = (p for p in sorted(names) if not _is_hidden(p.relative_to(path)))
    files = [file for file in inside if readers.can_read(file) and file.is_file()]
    if not files:
        raise UserError(f"dataset {path}", "holds no file that can be read", f"want {FORMATS}")
    return [_file(file) for file in files]


def _is_hidden(path: Path) -> bool:
    is_leftover = path.name in LEFTOVERS or path.name.startswith("cache-")
    return is_leftover or any(part.startswith(".") for part in path.parts)


def _file(path: Path) -> Source:
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"dataset {path}", what, f"give {FORMATS}")
    if not readers.can_read(path):
        raise UserError(f"dataset {path}", "its name tells no format we read", f"want {FORMATS}")
    read = functools.partial(readers.read_file, path)
    fingerprint = functools.partial(_file_fingerprint, path)
    return Source(str(path), read, fingerprint, os.stat(path).st_size, is_file=True)


def _file_fingerprint(path: Path) -> str | None:
    status = os.stat(path)
    if status.st_size > MOST_HASHED_BYTES:
        return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # reading it will say so
        return None
    return f"{path.name} {digest}"


def _hub_source(entry: HubSet, name: str, options: SourceOptions) -> Source:
    """The datasets library brings a set into its cache, or finds it there; rows stay on disk."""
    import datasets

    try:
        table = datasets.load_dataset(entry.repo, entry.config, split=entry.split)
    except Exception as error:  # hub, network, cache and Arrow each raise their own
        rule = f"{entry} cannot be had ({str(error)[:120]})"
        remedy = "check the network and HF_HUB_OFFLINE, or give a local file or directory"
        raise UserError(f"dataset {name}", rule, remedy, ENVIRONMENT) from error
    how = (table, entry, options)
    read = functools.partial(_read_hub, *how)
    fingerprint = functools.partial(_hub_fingerprint, *how)
    return Source(str(entry), read, fingerprint, table.data.nbytes)


def _read_hub(table: Any, entry: HubSet, options: SourceOptions) -> PlacedRows:
    if entry.is_shuffled:
        table = table.shuffle(seed=options.seed)
    stop = min(options.num_samples, len(table)) if entry.is_limited else len(table)
    for index in range(entry.first, stop):
        yield RowPlace(str(entry), -index - 1), table[index]


def _hub_fingerprint(table: Any, entry: HubSet, options: SourceOptions) -> str | None:
    files = [file["filename"] for file in table.cache_files]
    if not files:
        return None
    parts = [f"{path} {os.stat(path).st_size} {os.stat(path).st_mtime_ns}" for path in files]
    limit = options.num_samples if entry.is_limited else ""
    seed = options.seed if entry.is_shuffled else ""
    return f"{entry} {entry.first} {limit} {seed} {table.num_rows} {parts}"


def _own_source(path: Path, function: str, options: SourceOptions) -> Source:
    """The user's own local file is run; nothing fetched ever is."""
    if not path.is_file():
        raise UserError(f"dataset {path}", "does not exist", "give FILE.py:FUNCTION")
    read = functools.partial(_read_own, path, function, options)
    return Source(f"{path}:{function}", read, lambda: None)


def _read_own(path: Path, name: str, options: SourceOptions) -> PlacedRows:
    """Source: llama-recipes' custom data sets, `get_custom_dataset(config, tokenizer, split)`."""
    settings = SimpleNamespace(
        dataset="custom_dataset", file=str(path), train_split="train", test_split="validation"
    )
    split = options.split or settings.train_split
    try:
        table = _own_function(path, name)(settings, options.load_tokenizer(), split)
        for number, row in enumerate(table, 1):
            yield RowPlace(f"{path}:{name}", -number), _plain(row)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        trace, line = error.__traceback__, 0
        while trace is not None:
            is_theirs = trace.tb_frame.f_code.co_filename == str(path)
            line, trace = trace.tb_lineno if is_theirs else line, trace.tb_next
        what = f"{type(error).__name__}: {error}"[:160]
        remedy = f"correct it; {name} must return rows"
        raise UserError(f"{path}:{line or name}", what, remedy) from error


def _own_function(path: Path, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path}:{name}", "is no function there", f"define {name} in {path}")
    return function


def _plain(row: Any) -> Any:
    """A row with lists in place of tensors and arrays."""
    if not isinstance(row, dict):
        return row
    return {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()
    }
