"""A report as Markdown: the same tables and words as the page, the charts as one picture."""

from collections.abc import Sequence

from fsdp_qlora.results.report.parts import (
    Beside,
    Cell,
    Code,
    Grid,
    Part,
    Plots,
    Section,
    Tiles,
    Title,
    Words,
)


def text(title: str, lines: Sequence[str], sections: Sequence[Section], picture: str) -> str:
    """Write the report.

    Args:
        title: heading.
        lines: below it.
        sections: chapters; those without parts are left out.
        picture: file name of the charts, which stands where the first of them would.

    Returns:
        Markdown.
    """
    blocks = [f"# {_escape(title)}", *map(_escape, lines)]
    has_picture = False
    for section in sections:
        blocks += [f"## {section.title}"] if section.title and section.parts else []
        for part in section.parts:
            if not isinstance(part, Plots):
                blocks += _part(part)
            elif not has_picture:
                blocks.append(f"![curves and memory]({picture})")
                has_picture = True
    return "\n\n".join(blocks) + "\n"


def _part(part: Part) -> list[str]:
    match part:
        case Words():
            return [_escape(part.text)]
        case Title():
            return [f"### {_escape(part.text)}"]
        case Grid():
            return _grid(part)
        case Beside():
            title = [f"### {_escape(part.fold)}"] if part.fold else []
            return [*title, *(block for grid in part.grids for block in _grid(grid))]
        case Tiles():
            return ["\n".join(f"- {name}: {_cell(cell)}" for name, cell in part.tiles)]
        case Code():
            return [f"### {_escape(part.title)}", f"```text\n{part.text}\n```"]
    return []


def _grid(grid: Grid) -> list[str]:
    rules = ["---", *("---:" if number else "---" for number in grid.is_number)]
    rows = [_row(map(_escape, grid.heads)), _row(rules)]
    for name, cells in grid.rows:
        is_bold = name == grid.total or not cells
        name = f"**{_escape(name)}**" if is_bold else _escape(name)
        rows.append(_row([name, *(map(_cell, cells) if cells else [""] * (len(grid.heads) - 1))]))
    title = [f"### {_escape(grid.title)}"] if grid.title else []
    return [*title, "\n".join(rows)]


def _row(cells: Sequence[str] | map) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    words = _escape(cell.text) + (f" ({_escape(cell.note)})" if cell.note else "")
    return f"**{words}**" if cell.is_off else words


def _escape(words: str) -> str:
    """Signs that Markdown would read, and line breaks, which would end a table's row."""
    for sign in "\\`*_<>|[]":
        words = words.replace(sign, f"\\{sign}")
    return " ".join(words.split())
