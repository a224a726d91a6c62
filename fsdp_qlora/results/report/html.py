"""A report as one HTML page that needs nothing else: no network, no other file."""

import re
from collections.abc import Sequence
from html import escape

from fsdp_qlora.results.report import chart_web
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
from fsdp_qlora.results.report.style import CSS, SCRIPT

# The browser itself refuses whatever would be fetched.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(title: str, lines: Sequence[str], sections: Sequence[Section]) -> str:
    """Write the page.

    Args:
        title: heading.
        lines: below it.
        sections: chapters; those without parts are left out.

    Returns:
        A whole HTML document.
    """
    kept = [section for section in sections if section.parts]
    links = "".join(f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in kept if s.title)
    body = "\n".join(_section(section) for section in kept)
    head = "".join(f'<p class="sub">{escape(line)}</p>' for line in lines)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{CSS}</style></head>\n<body><main>\n<header><h1>{escape(title)}</h1>{head}"
        f"<nav>{links}</nav></header>\n{body}\n</main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def _anchor(section: Section) -> str:
    return "".join(c if c.isalnum() else "-" for c in section.title.lower())


def _section(section: Section) -> str:
    title = f'<h2 id="{_anchor(section)}">{escape(section.title)}</h2>' if section.title else ""
    parts = "\n".join(_part(part) for part in section.parts)
    return f"<section>{title}\n{parts}\n</section>"


def _part(part: Part) -> str:
    match part:
        case Words():
            return f"<p>{escape(part.text)}</p>"
        case Title():
            return f"<h3>{escape(part.text)}</h3>"
        case Grid():
            return _grid(part)
        case Beside():
            return _fold(part.fold, f'<div class="beside">{"".join(map(_grid, part.grids))}</div>')
        case Plots():
            return f'<div class="plots">{"".join(map(chart_web.draw, part.plots))}</div>'
        case Tiles():
            return f'<dl class="tiles">{"".join(_tile(*tile) for tile in part.tiles)}</dl>'
        case Code():
            # A browser would break a line after the hyphens of a flag.
            words = re.sub(r"\S+", lambda word: f"<span>{escape(word[0])}</span>", part.text)
            return f"<h3>{escape(part.title)}</h3><pre>{words}</pre>"


def _tile(name: str, cell: Cell) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{_words(cell)}</dd></div>"


def _grid(grid: Grid) -> str:
    """A table in a box of its own, which scrolls where the table is wider than the screen."""
    is_number = grid.is_number
    kinds = ["", *(' class="n"' if number else "" for number in is_number)]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(head)}</th>'
        for head, kind in zip(grid.heads, kinds, strict=True)
    )
    rows = "".join(_row(grid, name, cells, is_number) for name, cells in grid.rows)
    title = escape(grid.title)
    caption = f"<caption>{title}</caption>" if title and not grid.is_folded else ""
    head = f"<thead><tr>{heads}</tr></thead>" if any(grid.heads) else ""
    kind = ' class="tight"' if grid.is_tight else ""
    table = f'<div class="table"><table{kind}>{caption}{head}<tbody>{rows}</tbody></table></div>'
    return _fold(grid.title if grid.is_folded else "", table)


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if title else body


def _row(grid: Grid, name: str, cells: list[Cell], is_number: list[bool]) -> str:
    if not cells:
        blanks = "<td></td>" * len(is_number)
        return f'<tr class="group"><th scope="rowgroup">{escape(name)}</th>{blanks}</tr>'
    kind = ' class="total"' if grid.total == name else ""
    words = "".join(_cell(cell, number) for cell, number in zip(cells, is_number, strict=True))
    return f'<tr{kind}><th scope="row">{escape(name)}</th>{words}</tr>'


def _cell(cell: Cell, is_number: bool) -> str:
    kind = ("n" if is_number else "w") + " off" * cell.is_off
    return f'<td class="{kind}">{_words(cell)}</td>'


def _words(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.value is not None:
        text = f'<data value="{cell.value!r}">{text}</data>'
    return text + (f" <small>{escape(cell.note)}</small>" if cell.note else "")
