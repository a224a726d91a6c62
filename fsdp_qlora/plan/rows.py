"""The rows and phases of a plan, by name, and the products that rows are sums of."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fsdp_qlora.plan.limits import GIB

PHASES = ("load", "forward", "backward", "optimizer", "save")

PACKED = "packed weights"
CONSTANTS = "quantisation constants"
UNQUANTISED = "unquantised weights"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
KEPT = "kept activations"
LAYER = "activations of one layer"
BUFFERS = "gathered or streamed layers"
SCRATCH = "dequantised weight"
LOSS = "loss chunk"
LOADING = "load working set"
LIBRARIES = "library workspaces"
SLACK = "allocator slack"
CONTEXT = "CUDA context, collectives"
DEVICE_ROWS: tuple[str, ...] = (
    PACKED,
    CONSTANTS,
    UNQUANTISED,
    ADAPTERS,
    GRADIENTS,
    OPTIMIZER,
    KEPT,
    LAYER,
)
DEVICE_ROWS += (BUFFERS, SCRATCH, LOSS, LOADING, LIBRARIES, SLACK, CONTEXT)

HOSTED = "packed layers"
FILES = "model files in memory"
SYSTEM = "other programs, system"
PROCESSES = "processes"
DATA = "data"
SAVING = "adapters being saved"
WAITING = "kept activations, pinned"
RANKS = "models of the CPU ranks"
HOST_ROWS: tuple[str, ...] = (HOSTED, FILES, SYSTEM, PROCESSES, LOADING, DATA, WAITING)
HOST_ROWS += (SAVING, RANKS)
REST = "not told apart"  # measured only: what comes and goes where nobody looked closer


class Term(NamedTuple):
    """One product of a row.

    Args:
        what: it stands for.
        factors: (unit, number) of each factor; a unit "per_x" divides.
        nbytes: the product.
    """

    what: str
    factors: tuple[tuple[str, float], ...]
    nbytes: float


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


Rows = dict[str, list[Term]]


@dataclass(frozen=True)
class Table:
    """The terms of every row in every phase.

    Args:
        phases: phase -> row -> terms.
    """

    phases: dict[str, Rows]

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

    def to_dict(self) -> dict[str, dict[str, float]]:
        """GiB by phase and row, as JSON and the ledger have them."""
        return {
            phase: {row: self.gib(phase, row) for row, terms in rows.items() if terms}
            for phase, rows in self.phases.items()
        }

    @property
    def reserved_gib(self) -> float:
        """What torch's allocator holds at the peak: all but context and collectives."""
        return self.total_gib(self.peak_phase, CONTEXT)

    @property
    def allocated_gib(self) -> float:
        """What tensors take at the peak."""
        return self.total_gib(self.peak_phase, CONTEXT, SLACK)


def merged(parts: list[Rows]) -> Rows:
    """Put rows of several tables together; terms of the same row stand side by side."""
    found: Rows = {}
    for part in parts:
        for row, terms in part.items():
            found.setdefault(row, []).extend(terms)
    return found


def total_bytes(rows: Rows) -> float:
    """Sum all terms."""
    return sum(item.nbytes for terms in rows.values() for item in terms)
