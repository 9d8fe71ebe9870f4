# SPDX-License-Identifier: GPL-2.0-or-later
"""Plain tables and numbers for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Columns as wide as they must be; numbers, and what stands above them, to the right."""
    columns = list(zip(*([head, *rows]), strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [
        bool(rows) and all(cell[:1].isdigit() or cell == "-" for cell in column[1:])
        for column in columns
    ]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append(indent + "  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def size(number: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.3g} {unit}"


def duration(nanoseconds: float | None) -> str:
    """A time with three digits."""
    if nanoseconds is None:
        return "-"
    number = float(nanoseconds)
    for unit in ("ns", "us", "ms", "s"):
        if number < 999.5 or unit == "s":
            break
        number /= 1000
    return f"{number:.3g} {unit}"


def count(number: float) -> str:
    """A count with a decimal unit."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5 or unit == "G":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
