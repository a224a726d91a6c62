"""What became of the rows, in the report: the audit that the run kept in its record."""

from typing import Any

from fsdp_qlora.results.report.parts import UNKNOWN, Cell, Grid, Part, Words
from fsdp_qlora.results.report.record import Run

COUNTS = {
    "rows": "num_rows",
    "learned": "num_train",
    "held out": "num_held_out",
    "left for a test": "num_test",
    "rows cut at the context": "num_cut",
    "tokens lost by that": "num_tokens_cut",
    "rows with nothing to learn": "num_empty",
    "rows with nothing to learn within the context": "num_beyond",
    "rows that repeat another": "num_repeated",
    "held-out rows that are also learned": "num_leaked",
    "rows whose end is learned": "num_learning_end",
    "tokens of an epoch": "epoch_tokens",
    "of them learned": "epoch_trained_tokens",
    "longest row, tokens": "longest_uncut_tokens",
    "median row, tokens": "median_tokens",
}
PADDING = {"padding in batches of like length": "batches", "padding if packed": "packed"}


def parts(runs: list[Run]) -> list[Part]:
    """Tables of what was counted, and what the user should look at.

    Args:
        runs: the records.

    Returns:
        A table for all runs that have an audit, and their notes; nothing without one.
    """
    known = [run for run in runs if isinstance(run.facts.get("data"), dict)]
    if not known:
        return []
    audits = [run.facts["data"] for run in known]
    rows = [("sources", [Cell(", ".join(map(str, a.get("sources", ())))) for a in audits])]
    for name, key in COUNTS.items():
        values = [audit.get(key) for audit in audits]
        if any(values):
            rows.append((name, [_count(value) for value in values]))
    for name, key in PADDING.items():
        shares = [audit.get("padding_share", {}).get(key, 0.0) for audit in audits]
        rows.append((name, [Cell(f"{share:.1%}") for share in shares]))
    found: list[Part] = [Grid("", ["", *(run.name for run in known)], rows)]
    return found + [Words(f"{run.name}: {note}") for run in known for note in _notes(run)]


def _count(value: Any) -> Cell:
    return Cell(UNKNOWN) if value is None else Cell(f"{value:,}", value)


def _notes(run: Run) -> list[str]:
    """Notes, and places of the first rows that lose something."""
    audit = run.facts["data"]
    places = [
        f"{what}: {', '.join(map(str, found))}"
        for what, found in audit.get("examples", {}).items()
        if found
    ]
    return [*map(str, audit.get("notes", ())), *places]
