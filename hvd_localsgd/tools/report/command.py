"""``hvd-localsgd report``: tables, a page, pictures and a trace of runs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hvd_localsgd import table
from hvd_localsgd.core.timing import mean
from hvd_localsgd.errors import LocalSGDError, listed
from hvd_localsgd.tools.report import condense, trace
from hvd_localsgd.tools.report.runs import Run, read_all

_TRAINED = ("run", "began", "ranks", "local steps", "H", "loss", "drift", "hidden")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder that was given as timings=")
    parser.add_argument("--ranks", action="store_true", help="a table with a row per rank, too")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with plots, which needs no network")
    parser.add_argument("--png", metavar="FILE", type=Path, help="write the plots as a picture")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="likewise")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="write a trace for Perfetto or chrome://tracing")


def show(arguments: argparse.Namespace) -> None:
    """Print the tables, write the files.

    Raises:
        ValueError: there is no run, its files are damaged, or a file cannot be written.
        LocalSGDError: a library for the plots is missing.
    """
    plotted = arguments.html or arguments.png or arguments.svg
    if plotted:
        _check_libraries()  # before minutes are spent on reading
    try:
        runs = read_all(arguments.runs)
        tables = _tables(runs)
        for headings, rows in tables:
            table.show("", headings, [rows])
        if arguments.ranks:
            for run in runs:
                table.print_table([condense.totals(rank) for rank in run.ranks], run.name)
        for note in (notes := [f"{run.name}: {note}" for run in runs for note in run.notes]):
            print(note)
        if plotted:
            _plot(arguments, runs, tables, notes)
        if arguments.trace:
            count = trace.write(runs, arguments.trace)
            print(f"Written: {arguments.trace}" + (f" ({count} rounds as one)" if count > 1 else ""))
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error


def _tables(runs: Sequence[Run]) -> list[tuple[Sequence[str], list[list[str]]]]:
    """What was trained, and where the time went: a row per run."""
    trained, went = [], []
    for run in runs:
        sums = mean([condense.totals(rank) for rank in run.ranks])
        course = condense.over_ranks(run, 10)
        trained.append(
            [
                run.name,
                time.strftime("%Y-%m-%d %H:%M", time.localtime(run.start)),
                *(f"{number:.0f}" for number in (len(run.ranks), sums["steps"])),
                *(_change(course[name]) for name in ("interval", "loss", "drift")),
                f"{sums['hidden']:.2f} s",
            ]
        )
        went.append(table.cells((run.name, sums)))
    return [(_TRAINED, trained), (("run, mean over ranks", *table.HEADINGS), went)]


def _change(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "-"
    first, last = f"{known[0]:.4g}", f"{known[-1]:.4g}"
    return first if first == last else f"{first} → {last}"


def _plot(
    arguments: argparse.Namespace,
    runs: Sequence[Run],
    tables: Sequence[tuple[Sequence[str], list[list[str]]]],
    notes: Sequence[str],
) -> None:
    from hvd_localsgd.tools.report import page, plots

    figure = plots.figure(runs)
    if arguments.html:
        title = "Local SGD: " + ", ".join(run.name for run in runs)
        page.write(arguments.html, title, tables, notes, condense.together(runs, plots.CELLS), figure)
    for path, kind in ((arguments.png, "png"), (arguments.svg, "svg")):
        if path:
            figure.save(path, format=kind, scale_factor=2 if kind == "png" else 1)
    for path in filter(None, (arguments.html, arguments.png, arguments.svg)):
        print(f"Written: {path}")


def _check_libraries() -> None:
    if missing := [name for name in ("altair", "vl_convert") if find_spec(name) is None]:
        raise LocalSGDError(
            f"Plots need libraries that are not installed: {listed(missing)}. pip install 'hvd-localsgd[report]', or altair and "
            "vl-convert-python; the tables and the trace need none."
        )
