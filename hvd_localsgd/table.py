"""The table of where the time went: rank 0 prints it when training ends, ``hvd-localsgd report`` from files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hvd_localsgd.core.timing import mean

_ROWS, _ENDS = 32, 4
_COLUMNS = {
    "compute": ("compute",),
    "input": ("input",),
    "wait": ("wait",),
    "communicate": ("communicate",),
    "pack+unpack": ("pack", "unpack"),
    "outer": ("outer",),
    "residual": ("residual",),
}


def print_table(totals: Sequence[dict[str, Any]], title: str) -> None:
    """A row per rank, their total and their mean; of more than 32 ranks the slowest and the fastest four.

    Args:
        totals: of each rank what ``core.timing.Timings.sums`` gives.
        title: stands above the table.
    """
    average = mean(totals)
    total = {key: value * len(totals) for key, value in average.items()}
    shown = list(totals)
    if len(totals) > _ROWS:
        by_speed = sorted(totals, key=lambda t: t["compute"] + t["input"], reverse=True)
        shown = [*by_speed[:_ENDS], *by_speed[-_ENDS:]]
        title += f": the {_ENDS} slowest and the {_ENDS} fastest"
    rows = [(f"{t['rank']} {t['host']}", t) for t in shown]
    show(title, ("rank", *HEADINGS), [map(cells, rows), map(cells, [("total", total), ("mean", average)])])


HEADINGS = (*_COLUMNS, "wall", "syncs", "MB", "MB/s")


def cells(row: tuple[str, dict[str, Any]]) -> list[str]:
    """Of a label and sums (seconds, bytes): the label, and what stands below each of the headings."""
    label, sums = row
    shown = [label]
    for parts in _COLUMNS.values():
        seconds = sum(sums[part] for part in parts)
        shown.append(f"{seconds:.2f} s {100 * seconds / max(sums['wall'], 1e-9):.1f}%")
    speed = sums["bytes"] / 1e6 / sums["communicate"] if sums["communicate"] else 0.0
    return [*shown, f"{sums['wall']:.2f} s", f"{sums['syncs']:.0f}", f"{sums['bytes'] / 1e6:.1f}", f"{speed:.0f}"]


def show(title: str, headings: Sequence[str], sections: Iterable[Iterable[Sequence[str]]]) -> None:
    """Print rows of cells, with a rule between sections."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for section in sections:
        table.add_section()
        for row in section:
            table.add_row(*row)
    # In a file or a narrow terminal a long line is easier to read than a wrapped one.
    Console(color_system=None, highlight=False, width=max(Console().width, 160)).print(table)
