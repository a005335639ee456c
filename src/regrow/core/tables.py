"""Tables of results as plain text and as HTML, for ``print`` and for notebooks."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# The largest number of rows that are shown of all tables together; the rest are counted
MAX_ROWS = 22


@dataclass(frozen=True)
class Table:
    """A table of results; ``numbers``: the indices of the columns that are aligned right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: Sequence[int] = ()


def format_text(tables: Sequence[Table], note: str) -> str:
    """Format tables as text, one below the other, and ``note`` as the last line; tables without rows are left out.

    >>> print(format_text([Table("Axes", ("key", "units"), [("a", 8), ("long", 16)], (1,))], "2 axes"))
    Axes
    key   units
    a         8
    long     16
    2 axes
    """
    lines: list[str] = []
    for table, rows, hidden in _limit_rows(tables):
        cells = [[str(cell) for cell in row] for row in (table.columns, *rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += [table.title] if table.title else []
        for row in cells:
            shown = [
                cell.rjust(width) if i in table.numbers else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(shown).rstrip())
        lines += [f"… and {hidden:,} more"] if hidden else []
    return "\n".join([*lines, note])


def format_html(tables: Sequence[Table], note: str = "") -> str:
    """Format tables and a note as HTML; every text is escaped, and tables without rows are left out.

    >>> format_html([Table("", ("key",), [("<a>",)])])
    '<table><thead><tr><th>key</th></tr></thead><tbody><tr><td>&lt;a&gt;</td></tr></tbody></table>'
    """
    parts: list[str] = []
    for table, rows, hidden in _limit_rows(tables):
        caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
        head = _html_row(table.columns, "th", table.numbers)
        body = "".join(_html_row(row, "td", table.numbers) for row in rows)
        parts.append(f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>")
        parts += [f"<p>… and {hidden:,} more</p>"] if hidden else []
    return "".join([*parts, f"<p>{escape(note)}</p>"] if note else parts)


def _html_row(cells: Sequence[object], tag: str, numbers: Sequence[int]) -> str:
    """Return an HTML table row; ``tag``: of its cells, ``th`` or ``td``; ``numbers``: columns aligned right."""
    right = ' style="text-align: right"'
    shown = (f"<{tag}{right * (i in numbers)}>{escape(str(cell))}</{tag}>" for i, cell in enumerate(cells))
    return f"<tr>{''.join(shown)}</tr>"


def _limit_rows(tables: Sequence[Table]) -> list[tuple[Table, Sequence[Sequence[object]], int]]:
    """Return (table, rows to show, number of hidden rows) per table with rows; each shows at least one."""
    result, room = [], MAX_ROWS
    for table in tables:
        if table.rows:
            rows = table.rows[: max(1, room)]
            room -= len(rows)
            result.append((table, rows, len(table.rows) - len(rows)))
    return result
