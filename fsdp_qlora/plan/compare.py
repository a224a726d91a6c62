"""Predicted, measured, difference: the plan's rows beside the ledger's, for the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from fsdp_qlora.plan.rows import DEVICE_ROWS, HOST_ROWS, PHASES, REST

Rows = Mapping[str, float]
CARD_GIB, HOST_GIB = 0.5, 0.05  # smaller rows are put together
NAME, FIGURE = 46, 11


def lines(plan: Mapping[str, Any], ledger: Mapping[str, Any], is_cuda: bool) -> list[str]:
    """The table at the end of a run, of the phase in which most was held.

    Args:
        plan: of summary.json; empty: nothing was predicted.
        ledger: of summary.json.
        is_cuda: the ranks computed on cards: theirs is the table, and of the host the total.

    Returns:
        Lines of at most 100 columns; none where nothing was predicted or measured.
    """
    host = ledger.get("host") or {}
    if not plan or not host:
        return []
    phase = _peak(host)
    if not is_cuda:
        title = f"memory    GiB on the host, {phase}, all programs"
        return _table(title, plan["host"].get(phase, {}), host[phase], HOST_ROWS, HOST_GIB)
    devices = [rank["device"] for rank in ledger["ranks"]]
    rank = max(range(len(devices)), key=lambda i: _total(devices[i][_peak(devices[i])]))
    at = _peak(devices[rank])
    title = f"memory    GiB on the card of rank {rank}, {at}"
    found = _table(title, plan["device"].get(at, {}), devices[rank][at], DEVICE_ROWS, CARD_GIB)
    predicted = _total(plan["host"].get(phase, {}))
    return [*found, _line(f"host, {phase}, all programs", predicted, _total(host[phase]))]


def peaks(
    plan: Mapping[str, Any], ledger: Mapping[str, Any], is_cuda: bool
) -> dict[str, tuple[float, float]]:
    """Predicted and measured GiB, each in the phase in which most was held.

    Args:
        plan: of summary.json.
        ledger: of summary.json.
        is_cuda: the ranks computed on cards.

    Returns:
        "host" (all programs) and "card" (of the rank that held most); nothing where nothing was
        predicted or measured.
    """
    host = ledger.get("host") or {}
    if not plan or not host:
        return {}
    found = {"host": (_highest(plan["host"]), _highest(host))}
    if is_cuda:
        measured = max(_highest(rank["device"]) for rank in ledger["ranks"])
        found["card"] = (_highest(plan["device"]), measured)
    return found


def _highest(phases: Mapping[str, Rows]) -> float:
    return _total(phases[_peak(phases)])


def _peak(phases: Mapping[str, Rows]) -> str:
    return max((p for p in PHASES if p in phases), key=lambda p: _total(phases[p]))


def _total(rows: Rows) -> float:
    return sum(rows.values())


def _table(
    title: str, predicted: Rows, measured: Rows, order: Sequence[str], least_gib: float
) -> list[str]:
    known = [row for row in (*order, REST) if row in predicted or row in measured]
    large = [row for row in known if max(predicted.get(row, 0), measured.get(row, 0)) >= least_gib]
    heads = "".join(f"{head:>{FIGURE}}" for head in ("predicted", "measured", "difference"))
    found = [f"{title:<{NAME + 10}}{heads}"]
    found += [_line(row, predicted.get(row, 0.0), measured.get(row, 0.0)) for row in large]
    small = [row for row in known if row not in large]
    if small:
        sums = [sum(rows.get(row, 0.0) for row in small) for rows in (predicted, measured)]
        found.append(_line(f"{len(small)} rows below {least_gib}", *sums))
    return [*found, _line("total", _total(predicted), _total(measured))]


def _line(name: str, predicted: float, measured: float) -> str:
    share = f"{measured / predicted - 1:+.1%}" if predicted >= 0.01 else "-"
    return f"{'':10}{name:<{NAME}}{predicted:{FIGURE}.2f}{measured:{FIGURE}.2f}{share:>{FIGURE}}"
