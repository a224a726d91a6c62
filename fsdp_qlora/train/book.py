"""The ledger of all ranks: rows of every phase at its highest, on the cards and on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fsdp_qlora.planning import rows as names
from fsdp_qlora.planning.run import RunPlan
from fsdp_qlora.train.rows import DEVICE_ROWS, STEP_PHASES, Account, HostShare, Rows

Phases = dict[str, Rows]


def encode(phases: Phases, share: HostShare) -> list[float]:
    """One rank's account as numbers, as many on every rank, for a gather.

    Args:
        phases: GiB by phase and row.
        share: of the host.
    """
    values = [phases.get(p, {}).get(row, 0.0) for p in names.PHASES for row in DEVICE_ROWS]
    plain = [getattr(share, item.name) for item in fields(share)]
    return [*values, *plain[:-1], *plain[-1]]


NUM_VALUES = len(encode({}, HostShare()))


def decode(values: Sequence[float]) -> tuple[Phases, HostShare]:
    """What `encode` was given; rows of nothing are left out.

    Args:
        values: of one rank.
    """
    numbers = iter(values)
    found = {p: {row: next(numbers) for row in DEVICE_ROWS} for p in names.PHASES}
    phases = {p: {row: gib for row, gib in rows.items() if gib} for p, rows in found.items()}
    plain: dict[str, Any] = {item.name: next(numbers) for item in fields(HostShare)[:-1]}
    share = HostShare(**plain, peaks_gib=tuple(numbers))
    return {p: rows for p, rows in phases.items() if rows}, share


@dataclass
class Book:
    """The highest rows of each phase, kept on the rank that writes.

    Attributes:
        plan: what was predicted.
        is_cuda: the ranks compute on cards.
        shared_gib, files_gib: of the account of this rank: the same for all.
        ranks: of each rank, by phase.
        host: by phase.
    """

    plan: RunPlan
    is_cuda: bool
    shared_gib: float
    files_gib: float
    ranks: list[Phases] = field(default_factory=list)
    host: Phases = field(default_factory=dict)

    @classmethod
    def of(cls, account: Account) -> "Book":
        """An empty book for the run of an account whose model is loaded."""
        return cls(account.plan, account.is_cuda, account.shared_gib, account.files_gib)

    def enter(
        self, values: Sequence[Sequence[float]], used_gib: float | None, phases: Sequence[str]
    ) -> tuple[list[Rows], Rows]:
        """Keep what the ranks have gathered.

        Args:
            values: `encode` of every rank.
            used_gib: of the host by all programs; None: not known.
            phases: that the values tell of.

        Returns:
            The rows of each rank's device, and of the host, at the highest of these phases.
        """
        decoded = [decode(row) for row in values]
        self.ranks = self.ranks or [{} for _ in decoded]
        shares = [share for _, share in decoded]
        tops: list[Rows] = []
        for kept, (found, _) in zip(self.ranks, decoded, strict=True):
            found = {phase: rows for phase, rows in found.items() if phase in phases}
            _keep_highest(kept, found)
            tops.append(max(found.values(), key=_total, default={}))
        host = {phase: self.host_rows(phase, shares, used_gib) for phase in phases}
        _keep_highest(self.host, host)
        return tops, max(host.values(), key=_total)

    def host_rows(self, phase: str, shares: Sequence[HostShare], used_gib: float | None) -> Rows:
        """What the host holds in a phase.

        What other programs and the system use is as it was before the run. On a machine with cards
        all the rest that is in use belongs to the processes, drivers included; of CPU ranks
        their models are what they have beyond what they had before it.

        Args:
            phase: row of plan.rows.PHASES.
            shares: of the ranks.
            used_gib: in all; None: not known.

        Returns:
            GiB by row, zeros left out.
        """
        data_gib, base_gib = (sum(getattr(s, n) for s in shares) for n in ("data_gib", "base_gib"))
        system_gib = self.plan.machine.system_gib or 0.0
        found = {
            names.HOSTED: self.shared_gib + sum(share.slices_gib for share in shares),
            names.FILES: self.files_gib,
            names.SYSTEM: max(system_gib - self.files_gib, 0.0),
            names.DATA: data_gib,
            names.WAITING: sum(share.waiting_gib for share in shares),
        }
        if phase == "save":
            found[names.SAVING] = sum(max(s.save_peak_gib - s.save_gib, 0.0) for s in shares)
        if self.is_cuda and phase == "load":
            found[names.LOADING] = sum(max(s.load_peak_gib - s.load_gib, 0.0) for s in shares)
        if self.is_cuda:
            rest = (used_gib or 0.0) - sum(found.values())
            found[names.PROCESSES] = max(rest, 0.0)
        else:
            found[names.PROCESSES] = base_gib - data_gib
            own = sum(_own_gib(phase, share) - share.base_gib for share in shares)
            found[names.RANKS] = max(own - found[names.WAITING], 0.0)
        return {row: gib for row, gib in found.items() if gib > 0}

    def to_dict(self) -> dict[str, Any]:
        """As summary.json has it."""
        return {"ranks": [{"device": phases} for phases in self.ranks], "host": self.host}


def _own_gib(phase: str, share: HostShare) -> float:
    """What a CPU rank had for itself at the peak of a phase."""
    if phase in STEP_PHASES:
        return share.peaks_gib[STEP_PHASES.index(phase)]
    return share.load_peak_gib if phase == "load" else share.save_gib


def _keep_highest(kept: Phases, found: Phases) -> None:
    for phase, rows in found.items():
        if _total(rows) > _total(kept.get(phase, {})):
            kept[phase] = rows


def _total(rows: Rows) -> float:
    return sum(rows.values())
