"""The table of where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hvd_localsgd import devices
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.timing import Recorded, mean

_ROWS, _ENDS = 32, 4


class Tabled(Recorded):
    """A front end whose ``totals`` can be shown."""

    settings: Settings

    def print_table(self) -> None:
        """On rank 0, when a training has ended: where the time of each rank went, in seconds and in percent.

        Raises:
            RuntimeError: none has ended.
        """
        if not self.totals:
            raise RuntimeError("There is nothing to show: no training has ended yet.")
        if devices.rank() == 0:
            print_table(self.totals, f"Local SGD, {self.settings.schedule}, {len(self.totals)} ranks")


def print_table(totals: Sequence[dict[str, Any]], title: str) -> None:
    """Where the time went: a row per rank, their total and their mean; of more than 32 ranks the slowest and the fastest four."""
    average = mean(totals)
    total = {key: value * len(totals) for key, value in average.items()}
    shown = list(totals)
    if len(totals) > _ROWS:
        by_speed = sorted(totals, key=lambda t: t["compute"] + t["input"], reverse=True)
        shown = [*by_speed[:_ENDS], *by_speed[-_ENDS:]]
        title += f": the {_ENDS} slowest and the {_ENDS} fastest"
    rows = [(f"{t['rank']} {t['host']}", t) for t in shown] + [("total", total), ("mean", average)]
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    columns = {
        "compute": ("compute",),
        "input": ("input",),
        "wait": ("wait",),
        "communicate": ("communicate",),
        "pack+unpack": ("pack", "unpack"),
        "outer": ("outer",),
        "residual": ("residual",),
    }
    table.add_column("rank", no_wrap=True)
    for heading in (*columns, "wall", "syncs", "MB", "MB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, row in rows:
        if label == "total":
            table.add_section()
        cells = []
        for parts in columns.values():
            seconds = sum(row[part] for part in parts)
            cells.append(f"{seconds:.2f} s {100 * seconds / max(row['wall'], 1e-9):.1f}%")
        speed = row["bytes"] / 1e6 / row["communicate"] if row["communicate"] else 0.0
        cells += [f"{row['wall']:.2f} s", f"{row['syncs']:.0f}", f"{row['bytes'] / 1e6:.1f}", f"{speed:.0f}"]
        table.add_row(label, *cells)
    # In a file or a narrow terminal a long line is easier to read than a wrapped one.
    Console(color_system=None, highlight=False, width=max(Console().width, 160)).print(table)
