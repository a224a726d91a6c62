"""The rows of a plan by phase, what they are sums of, and predicted beside measured.

The ledger measures the same rows; their names are part of the format of a run's record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from fsdp_qlora.errors import read_table
from fsdp_qlora.hardware import GIB

PHASES = ("load", "forward", "backward", "optimizer", "save")

WORDS = read_table(__file__, "run.toml")
# The table has their names too, and a test compares them.
DEVICE_ROWS: tuple[str, ...] = tuple(WORDS["device_rows"].values())
PACKED, CONSTANTS, UNQUANTISED, ADAPTERS, GRADIENTS = DEVICE_ROWS[:5]
OPTIMIZER, KEPT, LAYER, BUFFERS, SCRATCH = DEVICE_ROWS[5:10]
LOSS, LOADING, LIBRARIES, SLACK, CONTEXT = DEVICE_ROWS[10:]
HOST_ROWS: tuple[str, ...] = tuple(WORDS["host_rows"].values())
HOSTED, FILES, SYSTEM, PROCESSES = HOST_ROWS[:4]
DATA, WAITING, SAVING, RANKS = HOST_ROWS[5:]
REST = "not told apart"  # measured only: what comes and goes where nobody looked closer

GPU_LEAST_GIB, HOST_LEAST_GIB = 0.5, 0.05  # smaller rows are added up in one line
NAME, FIGURE = 46, 11  # columns


class Term(NamedTuple):
    """One summand of a row: a product.

    Args:
        what: it stands for.
        factors: (unit, number) of each factor; a unit "per_x" divides.
        nbytes: the product.
    """

    what: str
    factors: tuple[tuple[str, float], ...]
    nbytes: float


Rows = dict[str, list[Term]]
GibByRow = dict[str, float]


def term(what: str, **factors: float) -> Term:
    """Make a product.

    Args:
        what: it stands for.
        factors: unit=number; units that begin with per_ divide.
    """
    nbytes = 1.0
    for unit, number in factors.items():
        nbytes = nbytes / number if unit.startswith("per_") else nbytes * number
    return Term(what, tuple(factors.items()), nbytes)


@dataclass(frozen=True)
class Table:
    """The terms of every row in every phase.

    Args:
        phases: phase -> row -> terms.
        limit_gib: what there is for it, or None.
    """

    phases: dict[str, Rows]
    limit_gib: float | None = None

    def gib(self, phase: str, row: str) -> float:
        """GiB of one row in one phase."""
        return sum(item.nbytes for item in self.phases[phase].get(row, ())) / GIB

    def total_gib(self, phase: str, *without: str) -> float:
        """GiB of a phase, some rows left out."""
        return sum(self.gib(phase, row) for row in self.phases[phase] if row not in without)

    @cached_property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total_gib)

    @cached_property
    def peak_gib(self) -> float:
        """GiB of that phase."""
        return self.total_gib(self.peak_phase)

    @property
    def free_gib(self) -> float:
        """What stays free at the peak, negative: what is missing; 0 without a limit."""
        return 0.0 if self.limit_gib is None else self.limit_gib - self.peak_gib

    def to_dict(self) -> dict[str, dict[str, float]]:
        """GiB by phase and row, as JSON and the ledger have them."""
        phases = self.phases.items()
        return {phase: {row: self.gib(phase, row) for row in of if of[row]} for phase, of in phases}

    @property
    def reserved_gib(self) -> float:
        """What torch's allocator holds at the peak: all but context and collectives."""
        return self.total_gib(self.peak_phase, CONTEXT)

    @property
    def allocated_gib(self) -> float:
        """What tensors take at the peak."""
        return self.total_gib(self.peak_phase, CONTEXT, SLACK)


def present(*terms: Term) -> list[Term]:
    """Leave out the terms that are 0."""
    return [item for item in terms if item.nbytes]


def merged(parts: list[Rows]) -> Rows:
    """Put rows of several tables together; terms of the same row stand side by side."""
    names = dict.fromkeys(row for part in parts for row in part)
    return {row: [item for part in parts for item in part.get(row, ())] for row in names}


def total_bytes(rows: Rows) -> float:
    """Sum all terms."""
    return sum(item.nbytes for terms in rows.values() for item in terms)


Gib = Mapping[str, float]  # row -> GiB
Facts = Mapping[str, Any]  # of summary.json


def comparison(plan: Facts, ledger: Facts, is_cuda: bool) -> list[str]:
    """The table at the end of a run, of the phase in which most was held.

    Args:
        plan: of summary.json; empty: nothing was predicted.
        ledger: of summary.json.
        is_cuda: the ranks computed on GPUs: theirs is the table, and of the host the total.

    Returns:
        Lines of at most 100 columns; none where nothing was predicted or measured.
    """
    host = _fullest(ledger)
    if not plan or not host:
        return []
    phase = _peak(host)
    if not is_cuda:
        title = f"memory    GiB on the host, {phase}, all programs"
        return _compared(title, plan["host"].get(phase, {}), host[phase], HOST_ROWS, HOST_LEAST_GIB)
    devices = [rank["device"] for rank in ledger["ranks"]]
    rank = max(range(len(devices)), key=lambda i: _highest(devices[i]))
    measured, at = devices[rank], _peak(devices[rank])
    title = f"memory    GiB on the GPU of rank {rank}, {at}"
    lines = _compared(title, plan["device"].get(at, {}), measured[at], DEVICE_ROWS, GPU_LEAST_GIB)
    totals = sum(plan["host"].get(phase, {}).values()), sum(host[phase].values())
    return [*lines, _line(f"host, {phase}, all programs", *totals)]


def peaks(plan: Facts, ledger: Facts, is_cuda: bool) -> dict[str, tuple[float, float]]:
    """Predicted and measured GiB, each in the phase in which most was held.

    Args:
        plan: of summary.json.
        ledger: of summary.json.
        is_cuda: the ranks computed on GPUs.

    Returns:
        "host" (all programs) and "card" (the GPU that held most); nothing where nothing was
        predicted or measured.
    """
    host = _fullest(ledger)
    if not plan or not host:
        return {}
    found = {"host": (_highest(plan["host"]), _highest(host))}
    if is_cuda:
        measured = max(_highest(rank["device"]) for rank in ledger["ranks"])
        found["card"] = (_highest(plan["device"]), measured)
    return found


def _fullest(ledger: Facts) -> Mapping[str, Gib]:
    """The host that held most; nothing where nothing was measured."""
    hosts = [host for host in ledger.get("hosts") or [ledger.get("host")] if host]
    return max(hosts, key=_highest, default={})


def _peak(phases: Mapping[str, Gib]) -> str:
    return max((p for p in PHASES if p in phases), key=lambda p: sum(phases[p].values()))


def _highest(phases: Mapping[str, Gib]) -> float:
    return sum(phases[_peak(phases)].values())


def _compared(
    title: str, predicted: Gib, measured: Gib, order: Sequence[str], least_gib: float
) -> list[str]:
    known = [row for row in (*order, REST) if row in predicted or row in measured]
    pairs = {row: (predicted.get(row, 0.0), measured.get(row, 0.0)) for row in known}
    heads = "".join(f"{head:>{FIGURE}}" for head in ("predicted", "measured", "difference"))
    small = [row for row, pair in pairs.items() if max(pair) < least_gib]
    large = [row for row in pairs if row not in small or len(small) == 1]
    lines = [f"{title:<{NAME + 10}}{heads}", *(_line(row, *pairs[row]) for row in large)]
    if len(small) > 1:
        sums = [sum(pairs[row][i] for row in small) for i in (0, 1)]
        lines.append(_line(f"{len(small)} rows below {least_gib}", *sums))
    return [*lines, _line("total", sum(predicted.values()), sum(measured.values()))]


def _line(name: str, predicted: float, measured: float) -> str:
    share = f"{measured / predicted - 1:+.1%}" if predicted >= 0.01 else "-"
    return f"{'':10}{name:<{NAME}}{predicted:{FIGURE}.2f}{measured:{FIGURE}.2f}{share:>{FIGURE}}"
