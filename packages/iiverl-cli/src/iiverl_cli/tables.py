"""Tables of plain text, the same on a terminal and in a file."""

from collections.abc import Sequence


def format_table(rows: Sequence[tuple[str, ...]], *, align: str = "<", rule: bool = False) -> str:
    """Lay out rows of cells in columns as wide as their widest cell.

    `align` gives `<` or `>` per column, and its last character holds for all further ones. With `rule`, a line is
    drawn below the first row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = align + align[-1] * len(widths)
    lines = [
        "  ".join(
            f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=False)
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
