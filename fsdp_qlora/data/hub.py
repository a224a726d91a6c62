"""Data sets on the Hugging Face hub; the datasets library fetches them and keeps them on disk."""

import os
from dataclasses import dataclass
from typing import Any

from fsdp_qlora.data.rows import Place, Rows
from fsdp_qlora.errors import ENVIRONMENT, UserError


@dataclass(frozen=True)
class HubSet:
    """A data set: where it lies and which of its rows are used.

    Args:
        repo: name on the Hugging Face hub.
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


HUB_SETS = {
    "alpaca": HubSet("yahma/alpaca-cleaned"),
    "alpaca_sample": HubSet("yahma/alpaca-cleaned", is_limited=True),
    "guanaco": HubSet("timdettmers/openassistant-guanaco"),
    "sql": HubSet("knowrohit07/know_sql", split="validation", is_shuffled=True, first=1000),
    "orca_math": HubSet(
        "microsoft/orca-math-word-problems-200k", is_shuffled=True, is_limited=True
    ),
}


def load(entry: HubSet, name: str) -> Any:
    """Bring a data set into the cache of the datasets library, or find it there.

    Args:
        entry: which one.
        name: as the user called it.

    Returns:
        A `datasets.Dataset`; its rows stay on disk.

    Raises:
        UserError: the library or the data set cannot be had (code 3).
    """
    local = "or give a local file or directory"
    try:
        import datasets
    except ImportError as error:
        remedy = f"pip install datasets, {local}"
        raise UserError(f"dataset {name}", "needs datasets", remedy, ENVIRONMENT) from error
    try:
        return datasets.load_dataset(entry.repo, entry.config, split=entry.split)
    except Exception as error:  # hub, network, cache and Arrow each raise their own
        rule = f"{entry} cannot be had ({str(error)[:120]})"
        remedy = f"check the network and HF_HUB_OFFLINE, {local}"
        raise UserError(f"dataset {name}", rule, remedy, ENVIRONMENT) from error


def read(table: Any, entry: HubSet, num_samples: int, seed: int) -> Rows:
    """Read the rows of a data set that are used.

    Args:
        table: what `load` returned.
        entry: which rows.
        num_samples: how many, if it is limited.
        seed: of the shuffle.

    Yields:
        Place and row.
    """
    if entry.is_shuffled:
        table = table.shuffle(seed=seed)
    stop = min(num_samples, len(table)) if entry.is_limited else len(table)
    for index in range(entry.first, stop):
        yield Place(str(entry), -index - 1), table[index]


def fingerprint(table: Any, entry: HubSet, num_samples: int, seed: int) -> str | None:
    """Name the rows that `read` gives, for the cache of tokens.

    Args:
        table: what `load` returned.
        entry: which rows.
        num_samples: how many, if it is limited.
        seed: of the shuffle.

    Returns:
        A text that is another one for other rows; None if there is no telling.
    """
    files = [file["filename"] for file in table.cache_files]
    if not files:
        return None
    parts = [f"{path} {os.stat(path).st_size} {os.stat(path).st_mtime_ns}" for path in files]
    limits = f"{num_samples if entry.is_limited else ''} {seed if entry.is_shuffled else ''}"
    return f"{entry} {entry.first} {limits} {table.num_rows} {parts}"
