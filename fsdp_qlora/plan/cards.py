"""Cards: what they hold and how fast they are, from a small table or as `doctor` measured them."""

import dataclasses
import difflib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fsdp_qlora.errors import ENVIRONMENT, UserError


@dataclasses.dataclass(frozen=True)
class Card:
    """One card.

    Args:
        name: as in the table, or as the driver calls it.
        memory_gib: that torch can use.
        bf16_tflops: sustained over a whole training step, well below the data sheet.
        memory_gbs: bandwidth of its memory, GB/s.
        host_link_gbs: from the host, GB/s, all cards at once.
        card_link_gbs: from another card, GB/s; 0: through the host.
        is_measured: the speeds are from MACHINE_FILE.
        has_bf16: products of bfloat16 run on its tensor cores.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    memory_gbs: float
    host_link_gbs: float
    card_link_gbs: float = 0.0
    is_measured: bool = False
    has_bf16: bool = True


# Memory as torch reports it. Products: H200 measured (recipes/llama-2-7b.md: 3.2e14 operations in
# 0.65 s); 3090, 4090, 5090 estimates of limits.md, the others in the same ratio to their data
# sheet. Bandwidths: data sheets; links: PCIe 3, 4, 5 as they are measured in practice.
_TABLE = (
    Card("3060-12G", 11.6, 18, 360, 24),
    Card("3080-20G", 19.6, 42, 760, 24),
    Card("3090", 23.6, 50, 936, 24),
    Card("4060Ti-16G", 15.6, 30, 288, 12),
    Card("4090", 23.6, 120, 1008, 25),
    Card("5090", 31.4, 160, 1792, 52),
    Card("A6000", 47.4, 100, 768, 24),
    Card("A100-40", 39.4, 200, 1555, 24, 200),
    Card("A100-80", 79.2, 210, 2039, 24, 200),
    Card("H100", 79.1, 450, 3350, 55, 350),
    Card("H200", 139.8, 490, 4800, 55, 475),
    Card("T4", 14.6, 15, 320, 12, has_bf16=False),
    Card("V100", 15.8, 40, 900, 12, 100, has_bf16=False),
    Card("V100-32", 31.7, 40, 900, 12, 100, has_bf16=False),
)
CARDS = {card.name: card for card in _TABLE}
# What "24" means: the slower of the common cards of that size; smaller ones as the smallest.
_BY_SIZE = {12: "3060-12G", 16: "4060Ti-16G", 20: "3080-20G", 24: "3090", 32: "5090"}
_BY_SIZE |= {40: "A100-40", 48: "A6000", 80: "A100-80", 141: "H200"}
MIN_GB, MAX_GB = 4, 512
USABLE = 0.975  # of a card's nominal GB, as torch reports it
CPU = Card("CPU", 0.0, 0.1, 20, 20)  # two cores; SmolLM2-135M: 5.5 s a step of 1,024 tokens
ENTRY = re.compile(r"(?:(?P<count>\d+)\s*x\s*)?(?P<name>[\w .-]+)", re.IGNORECASE)
FIRST_WITH_BF16 = 8.0  # Ampere; torch emulates it on older cards, slowly, and does not say so
QUERY = "name,memory.total,memory.used,uuid"
SPEEDS = ("bf16_tflops", "memory_gbs", "host_link_gbs", "card_link_gbs")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run may use.

    Args:
        cards: one entry a rank; none: CPU ranks.
        host_gib: of memory; None: not known, and then no limit.
        num_cpu_ranks: ranks where there is no card.
        system_gib: of host memory in use without the run; None: as measured elsewhere.
        cpu: speeds of a CPU rank.
    """

    cards: tuple[Card, ...]
    host_gib: float | None = None
    num_cpu_ranks: int = 1
    system_gib: float | None = None
    cpu: Card = CPU

    @property
    def num_ranks(self) -> int:
        """Ranks of the run."""
        return len(self.cards) or self.num_cpu_ranks

    @property
    def kind(self) -> str:
        """Where the ranks compute: "cuda" or "cpu"."""
        return "cuda" if self.cards else "cpu"

    @property
    def has_peer(self) -> bool:
        """Whether the cards read each other's memory."""
        return all(card.card_link_gbs > 0 for card in self.cards)


def machine_file() -> Path:
    """Where `doctor` leaves what it measured.

    Its content: {"cards": {name as the driver calls it: {some of SPEEDS: number}}}.
    """
    root = os.environ.get("FSDP_QLORA_CACHE", Path.home() / ".cache" / "fsdp_qlora")
    return Path(root).expanduser() / "machine.json"


def parse(text: str) -> list[Card]:
    """Read a list of cards.

    Args:
        text: "2x24", "2x3090", "3090,4060Ti-16G", or "none" for CPU ranks.

    Returns:
        One entry a card, with the speeds of the table; none for "none".

    Raises:
        UserError: an unknown card.
    """
    if text.strip().lower() in ("none", "cpu"):
        return []
    cards = []
    for entry in text.split(","):
        found = ENTRY.fullmatch(entry.strip())
        if found is None or not 1 <= int(found["count"] or 1) <= 64:
            raise UserError(f"--cards {text}", "is no list of cards", "write 2x24 or 2x3090,1x4090")
        cards += [_named(found["name"].strip())] * int(found["count"] or 1)
    return cards


def _named(name: str) -> Card:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB?|GiB)?", name, re.IGNORECASE)
    if size and name not in CARDS and MIN_GB <= float(size[1]) <= MAX_GB:
        nominal = float(size[1])
        like = CARDS[_BY_SIZE[max((n for n in _BY_SIZE if n <= nominal), default=12)]]
        label = f"{nominal:g} GB (speed of a {like.name})"
        return dataclasses.replace(like, name=label, memory_gib=round(nominal * USABLE, 1))
    plain = {_plain(known): card for known, card in CARDS.items()}
    if card := plain.get(_plain(name)):
        return card
    near = difflib.get_close_matches(_plain(name), plain, 1, 0.5)
    words = f"did you mean {plain[near[0]].name}?" if near else f"known: {', '.join(CARDS)}"
    raise UserError(f"--cards {name}", "no such card", f"{words}; or its GB, as in 2x24")


def _plain(name: str) -> str:
    """A name without maker, series and signs: "NVIDIA GeForce RTX 4060 Ti" is 4060ti."""
    words = r"nvidia|geforce|rtx|tesla|quadro|gpu|sxm\d?|pcie|nvl|hbm\de?|\W|_"
    return re.sub(words, "", name.lower())


def here(visible: str | None = None) -> list[Card]:
    """The cards of this machine, asked of the driver, less what other programs hold of them.

    Args:
        visible: as CUDA_VISIBLE_DEVICES names them; None: all. A part of a card (MIG) is unknown
            here, and ends the list as a wrong number does.

    Returns:
        The cards in the order of the ranks; none without a driver.

    Raises:
        UserError: the driver does not answer (code 3).
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "repair the driver, or say --cards 2x24"
        raise UserError(
            "nvidia-smi", f"gives no list of cards ({error})", remedy, ENVIRONMENT
        ) from error
    return listed(listing.stdout, visible, _capabilities(tool))


def _capabilities(tool: str) -> dict[str, float]:
    """Compute capability of each card by its UUID; none where the driver is too old to tell."""
    query = [tool, "--query-gpu=uuid,compute_cap", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = re.findall(r"^(GPU-\S+), *(\d+\.\d+)$", listing.stdout, re.MULTILINE)
    return {uuid: float(number) for uuid, number in rows}


def listed(
    listing: str, visible: str | None, capabilities: Mapping[str, float] = MappingProxyType({})
) -> list[Card]:
    """Read the driver's list.

    Args:
        listing: a line a card, the values of QUERY between commas.
        visible: see `here`.
        capabilities: of cards by UUID, as far as they are known.

    Returns:
        The visible cards; none where the driver does not know their memory.
    """
    rows = [line.rsplit(",", 3) for line in listing.splitlines() if line.strip()]
    if not all(total.strip().isdigit() and used.strip().isdigit() for _, total, used, _ in rows):
        return []  # a card that shares the host's memory has none of its own to tell of
    found: dict[str, Card] = {}
    for name, total_mib, used_mib, uuid in rows:
        card = from_driver(name.strip(), float(total_mib) / 1024)
        free_gib = round(card.memory_gib - float(used_mib) / 1024, 1)
        number = capabilities.get(uuid.strip())
        has_bf16 = card.has_bf16 if number is None else number >= FIRST_WITH_BF16
        found[uuid.strip()] = dataclasses.replace(card, memory_gib=free_gib, has_bf16=has_bf16)
    if visible is None:
        return list(found.values())
    seen: list[Card] = []
    for entry in (word.strip() for word in visible.split(",")):
        by_number = list(found)[int(entry) : int(entry) + 1] if entry.isdigit() else []
        by_name = [uuid for uuid in found if entry.startswith("GPU-") and uuid.startswith(entry)]
        if not by_number + by_name:
            break
        seen.append(found[(by_number + by_name)[0]])
    return seen


def from_driver(name: str, memory_gib: float) -> Card:
    """A card by the driver's name: the nearest of the table, its memory as it is.

    Args:
        name: "NVIDIA GeForce RTX 3090".
        memory_gib: in all.
    """
    plain = _plain(name)
    alike = [card for card in CARDS.values() if plain.startswith(_plain(card.name.split("-")[0]))]
    sized = alike or [card for card in CARDS.values() if card.memory_gib <= memory_gib] or [*_TABLE]
    near = min(sized, key=lambda card: abs(card.memory_gib - memory_gib))
    return dataclasses.replace(near, name=name, memory_gib=round(memory_gib * 0.985, 1))


def measured_cpu() -> Card:
    """The processor as `doctor` has measured it, else as in the table."""
    return with_measured([CPU], machine_file(), None)[0]


def with_measured(cards: list[Card], path: Path, link_gbs: float | None) -> list[Card]:
    """Put measured speeds in the place of those of the table.

    Args:
        cards: from `parse` or `here`.
        path: of `machine_file`; absent: nothing is known.
        link_gbs: speed of the link to the host, given by the user; stands above both.

    Returns:
        The cards.

    Raises:
        UserError: the file is not what `doctor` writes (code 3).
    """
    measured: dict[str, dict[str, float]] = {}
    if path.is_file():
        try:
            table = json.loads(path.read_text(encoding="utf-8"))["cards"]
            measured = {
                _plain(name): {key: float(row[key]) for key in SPEEDS if key in row}
                for name, row in table.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            rule = f"is not what doctor writes ({type(error).__name__}: {error})"
            remedy = "delete it, or run python -m fsdp_qlora doctor"
            raise UserError(str(path), rule, remedy, ENVIRONMENT) from error
    given = {} if link_gbs is None else {"host_link_gbs": link_gbs}
    found = []
    for card in cards:
        speeds = measured.get(_plain(card.name), {})
        changes: dict[str, Any] = {**speeds, **given, "is_measured": bool(speeds)}
        found.append(dataclasses.replace(card, **changes))
    return found
