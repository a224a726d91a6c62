"""Predicted, measured, difference: the plan's rows beside the ledger's, by phase."""

from dataclasses import dataclass
from typing import Any

from fsdp_qlora.planning.rows import DEVICE_ROWS, HOST_ROWS, PHASES, REST
from fsdp_qlora.results.report.parts import (
    UNKNOWN,
    Beside,
    Cell,
    Grid,
    Part,
    Title,
    Words,
    digits_for,
    gib,
)
from fsdp_qlora.results.report.record import Run, highest

# How far measured figures may lie from the plan's, as a share of them.
ROW_AIM, PEAK_AIM, CPU_HOST_AIM = 0.10, 0.05, 0.15
LARGE_GIB = 0.5  # the aim for rows holds from here on
HEADS = ["", "predicted", "measured", "difference"]

Phases = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Place:
    """The cards or the host of one run.

    Args:
        name: "card", "host", or "rank" for what a rank on the CPU holds besides its process.
        rows: its row names in order.
        plan: GiB by phase and row, as the plan predicted them; empty without a plan.
        ranks: the same as measured, one a rank (for the host: one in all); empty without a ledger.
        peak_gib: as the plan predicted it, or None.
        row_aim, peak_aim: shares that the difference should stay within.
    """

    name: str
    rows: tuple[str, ...]
    plan: Phases
    ranks: list[Phases]
    peak_gib: float | None
    row_aim: float = ROW_AIM
    peak_aim: float = PEAK_AIM


def peak_gib(run: Run, place: str) -> float | None:
    """The peak that the plan of a run predicted.

    Args:
        run: the record.
        place: "device" or "host".

    Returns:
        GiB, or None when the run recorded no plan.
    """
    return (run.facts.get("plan") or {}).get(f"peak_{place}_gib")


def places(run: Run) -> list[Place]:
    """What the plan and the ledger of a run say of its cards and its host.

    Args:
        run: the record.

    Returns:
        Those of card and host that either speaks of.
    """
    plan: dict[str, Any] = run.facts.get("plan") or {}
    ledger: dict[str, Any] = run.facts.get("ledger") or {}
    ranks = [rank.get("device", {}) for rank in ledger.get("ranks", [])]
    host = [ledger["host"]] if ledger.get("host") else []
    peaks = [peak_gib(run, "device"), peak_gib(run, "host")]
    aims = (ROW_AIM, PEAK_AIM) if run.has_cards else (CPU_HOST_AIM, CPU_HOST_AIM)
    ranks = [rank for rank in ranks if rank]
    name = "card" if run.has_cards else "rank"
    found = [
        Place(name, DEVICE_ROWS, plan.get("device", {}), ranks, peaks[0], *aims),
        Place("host", HOST_ROWS, plan.get("host", {}), host, peaks[1], *aims),
    ]
    found = found if run.has_cards or ranks else found[1:]
    return [place for place in found if place.plan or place.ranks]


def chapter(runs: list[Run]) -> list[Part]:
    """The tables of all runs, under their names where there are several.

    Args:
        runs: the records.

    Returns:
        See `parts`; one sentence where no run recorded a plan or a ledger.
    """
    if not any(places(run) for run in runs):
        return [Words("No plan was recorded, so nothing is predicted here.")]
    if len(runs) == 1:
        return parts(runs[0])
    return [part for run in runs for part in (Title(run.name), *parts(run, is_folded=True))]


def parts(run: Run, is_folded: bool = False) -> list[Part]:
    """The tables of one run.

    Args:
        run: the record.
        is_folded: the page shows the tables only when they are asked for.

    Returns:
        What is off, then a table per phase, for the cards and for the host.
    """
    found: list[Part] = []
    for place in places(run):
        found.append(Words(verdict(place)))
        grids = [_grid(place, phase) for phase in _phases(place)]
        grids += [_totals(place)] if len(place.ranks) > 1 else []
        fold = f"Rows of the {place.name} by phase, {run.name}" if is_folded else ""
        found.append(Beside([grid for grid in grids if grid.rows], fold))
    note = (run.facts.get("plan") or {}).get("note")
    if note:
        found.insert(0, Words(f"Chosen by the plan: {note}."))
    if not run.facts.get("plan"):
        found.insert(0, Words("No plan was recorded, so nothing is predicted here."))
    elif not run.facts.get("ledger"):
        rule = "The ledger of rows is written when a run ends: nothing is measured by row here."
        found.insert(0, Words(rule))
    return found


def _phases(place: Place) -> list[str]:
    """Phases in the plan's order; others that the ledger knows come last."""
    known = [*place.plan, *(phase for rank in place.ranks for phase in rank)]
    others = [phase for phase in dict.fromkeys(known) if phase not in PHASES]
    return [phase for phase in PHASES if phase in known] + others


def _highest(place: Place, phase: str) -> int | None:
    """The rank that holds most in a phase."""
    sums = {i: sum(rank[phase].values()) for i, rank in enumerate(place.ranks) if phase in rank}
    return max(sums, key=lambda i: sums[i]) if sums else None


def _measured(place: Place, phase: str) -> dict[str, float]:
    rank = _highest(place, phase)
    return {} if rank is None else place.ranks[rank][phase]


def _pair(place: Place, phase: str, row: str) -> tuple[float | None, float | None]:
    """Predicted and measured; both leave out rows of nothing in a phase that they tell of.

    Where some was not told apart, it is not known how much of a row that was not measured there is.
    """
    predicted, measured = place.plan.get(phase), _measured(place, phase)
    return (
        predicted.get(row, None if row == REST else 0.0) if predicted is not None else None,
        measured.get(row, None if REST in measured else 0.0) if measured else None,
    )


def _row_names(place: Place, phase: str) -> list[str]:
    known = {**place.plan.get(phase, {}), **_measured(place, phase)}
    return [row for row in place.rows if row in known] + [r for r in known if r not in place.rows]


def verdict(place: Place) -> str:
    """How well the plan predicted, in a sentence or two.

    Args:
        place: cards or host.

    Returns:
        The peaks, and how many of the large rows are within the aim.
    """
    sums = [sum(rows.values()) for rank in place.ranks for rows in rank.values()]
    peak, planned = highest(sums), place.peak_gib
    name = place.name.capitalize()
    if peak is None or not planned:
        word, value = ("predicted", planned) if planned else ("measured", peak)
        return f"{name}: peak {word} {value or 0:,.2f} GiB."
    off = peak / planned - 1
    text = f"{name}: peak predicted {planned:,.2f} GiB, measured {peak:,.2f} GiB, {off:+.1%}"
    if max(peak, planned) <= LARGE_GIB:
        return f"{text}; aims are set for more than {LARGE_GIB} GiB."
    words = "within" if abs(off) <= place.peak_aim else "NOT within"
    text += f": {words} the aim of {place.peak_aim:.0%}."
    pairs = [
        _pair(place, phase, row) for phase in _phases(place) for row in _row_names(place, phase)
    ]
    large = [(p, m) for p, m in pairs if p is not None and m is not None and max(p, m) > LARGE_GIB]
    good = [pair for pair in large if not _is_off(*pair, place.row_aim)]
    if large:
        text += f" Of {len(large)} rows over {LARGE_GIB} GiB, counted in every phase, {len(good)} "
        text += f"{'is' if len(good) == 1 else 'are'} within {place.row_aim:.0%}."
    if any(REST in _measured(place, phase) for phase in _phases(place)):
        text += " A dry run (--dry_run on) would have told its rows apart."
    return text


def _is_off(predicted: float, measured: float, aim: float) -> bool:
    return abs(measured - predicted) > aim * max(predicted, 1e-9)


def _grid(place: Place, phase: str) -> Grid:
    """A phase of the rank that holds most in it; rows too small to be read are put together."""
    pairs = {row: _pair(place, phase, row) for row in _row_names(place, phase)}
    digits = digits_for(highest(gib for pair in pairs.values() for gib in pair) or 0.0)
    least_gib = 0.5 * 10**-digits
    small = [row for row, pair in pairs.items() if (highest(pair) or 0.0) < least_gib]
    sums = _sums(list(pairs.values()))
    if small:
        name = f"{len(small)} row{'s' * (len(small) > 1)} below {2 * least_gib:.{digits}f}"
        pairs[name] = _sums([pairs[row] for row in small])
    rows = [
        (row, _cells(*pair, digits, place.row_aim))
        for row, pair in pairs.items()
        if row not in small
    ]
    rank = _highest(place, phase)
    whose = f" (rank {rank}, the highest)" if len(place.ranks) > 1 and rank is not None else ""
    if rows:
        rows.append(("total", _cells(*sums, digits, place.peak_aim)))
    title = f"{place.name}, {phase}{whose}"
    return Grid(title, HEADS, rows, total="total", is_tight=True)


def _sums(pairs: list[tuple[float | None, float | None]]) -> tuple[float | None, float | None]:
    """Of what was predicted, and of what was measured; None where nothing is known."""
    found = [[pair[i] for pair in pairs if pair[i] is not None] for i in (0, 1)]
    predicted, measured = (sum(v or 0.0 for v in values) if values else None for values in found)
    return predicted, measured


def _cells(p: float | None, m: float | None, digits: int, aim: float) -> list[Cell]:
    """Predicted, measured, difference; what is large and further off than the aim stands out."""
    if p is None or m is None:
        return [gib(p, digits), gib(m, digits), Cell(UNKNOWN)]
    is_off = max(p, m) > LARGE_GIB and _is_off(p, m, aim)
    text = f"{m - p:+,.{digits}f}"
    is_nothing = not any(sign in text for sign in "123456789")
    text = text[1:] if is_nothing else text
    share = f"{m / p - 1:+.0%}" if p >= 10**-digits and not is_nothing else ""
    difference = Cell(text, m - p, share, is_off)
    return [gib(p, digits), gib(m, digits), difference]


def _totals(place: Place) -> Grid:
    """What each rank held in all, by phase."""
    phases = _phases(place)
    sums = [
        [sum(rank[phase].values()) if phase in rank else None for phase in phases]
        for rank in place.ranks
    ]
    digits = digits_for(highest(value for row in sums for value in row) or 0.0)
    rows = [(f"rank {i}", [gib(v, digits) for v in row]) for i, row in enumerate(sums)]
    planned = [sum(place.plan[phase].values()) if phase in place.plan else None for phase in phases]
    rows.append(("plan", [gib(value, digits) for value in planned]))
    title = f"{place.name}, measured total of every rank"
    return Grid(title, ["", *phases], rows, is_tight=True)
