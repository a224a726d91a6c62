"""What a report is made of; HTML and Markdown are both written from these parts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fsdp_qlora.results.chart import Panel, Series

UNKNOWN = "–"


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Args:
        text: what is read.
        value: the exact number behind it, as the run's files have it; None for words.
        note: small print behind it.
        is_off: stands out, because it is further away than it should be.
    """

    text: str
    value: float | None = None
    note: str = ""
    is_off: bool = False


@dataclass(frozen=True)
class Grid:
    """A table.

    Args:
        title: above it.
        heads: of the columns, the first is that of the rows' names.
        rows: (name, cells), as many cells as there are heads less one; none for a heading
            between rows.
        total: name of the row that is the sum of the others.
        is_folded: the page shows the title only, until it is asked for.
        is_tight: small print stands behind a number, not below it.
    """

    title: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]]
    total: str = ""
    is_folded: bool = False
    is_tight: bool = False

    @property
    def is_number(self) -> list[bool]:
        """Of each column but the first, whether numbers stand in it."""
        return [
            any(cells[i].value is not None for _, cells in self.rows if cells)
            for i in range(len(self.heads) - 1)
        ]


@dataclass(frozen=True)
class Beside:
    """Tables that stand beside each other where there is room.

    Args:
        grids: the tables.
        fold: the page shows this only, until they are asked for; empty: it shows them.
    """

    grids: list[Grid]
    fold: str = ""


@dataclass(frozen=True)
class Plot:
    """One chart of the page.

    Args:
        panel: title, unit and lines.
        x_title: unit of the horizontal axis.
        areas: stacked, the first at the bottom; all with the same x, no value missing.
        note: below it.
    """

    panel: Panel
    x_title: str = "optimizer step"
    areas: list[Series] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Plots:
    """Charts that stand beside each other where there is room."""

    plots: list[Plot]


@dataclass(frozen=True)
class Tiles:
    """The few figures that are looked for first: (name, value)."""

    tiles: list[tuple[str, Cell]]


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Title:
    """A heading within a chapter."""

    text: str


@dataclass(frozen=True)
class Code:
    """What can be typed, or was printed, as it stands."""

    title: str
    text: str


Part = Grid | Beside | Plots | Tiles | Words | Title | Code


@dataclass(frozen=True)
class Section:
    """A chapter of the report; without parts it is left out.

    Args:
        title: heading.
        parts: in order.
    """

    title: str
    parts: Sequence[Part]


def gib(value: float | None, digits: int = 2) -> Cell:
    """A size.

    Args:
        value: GiB; None when it is not known.
        digits: behind the point.
    """
    return Cell(UNKNOWN) if value is None else Cell(f"{value:,.{digits}f}", value)


def digits_for(largest: float) -> int:
    """How many digits behind the point a table of GiB needs.

    Args:
        largest: its largest value.

    Returns:
        2 from 1 GiB on, else enough to tell a hundredth of it.
    """
    return 2 if largest >= 1 else 3 if largest >= 0.1 else 4


def duration(seconds: float) -> str:
    """Seconds as people say them: "24 s", "2 min 28 s", "3 h 05 min".

    Args:
        seconds: at least 0.
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
