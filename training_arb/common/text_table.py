"""Formats rows of figures as a text table."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "-"


def format_table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """The rows' fields as text; columns: key -> format, such as 'shape': '' or 'us_p50': '.1f'. None becomes a dash."""
    cells = [list(columns)]
    for row in rows:
        values = (row.get(key) for key in columns)
        shown = zip(values, columns.values(), strict=True)
        cells.append([MISSING if value is None else format(value, form) for value, form in shown])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    texts = [not form for form in columns.values()]
    aligned = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, texts, strict=True)
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in aligned)
