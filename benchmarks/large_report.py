"""What ``hvd-localsgd report`` takes for a large run: its files are made up, and written by the package's own writer.

    python benchmarks/large_report.py --sizes 16x1000 256x10000

The largest writes 1.2 GB into a folder that is taken away again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report

from hvd_localsgd.core.timing import PARTS, Round, Timings

WAYS: dict[str, Sequence[str]] = {"table": (), "page": ("--html", "page.html"), "trace": ("--trace", "trace.json")}


def write(folder: Path, ranks: int, rounds: int, rank: int) -> None:
    """One rank's file: H = 16, every eighth rank slower by a quarter, and all wait for the slowest."""
    random, timings = np.random.default_rng(rank), Timings(folder)
    timings.begin(rank)
    compute = 0.1 * (1.25 if rank % 8 == 5 else 1.0) * random.uniform(0.9, 1.1, rounds)
    seconds, noise = compute.tolist(), random.normal(0, 0.01, rounds).tolist()
    for number in range(rounds):
        parts = dict.fromkeys(PARTS, 0.001) | {
            "compute": seconds[number],
            "wait": 0.14 - seconds[number],
            "communicate": 0.01,
        }
        wall = sum(parts.values())
        timings.keep(
            Round(
                round=number, first_step=16 * number + 1, last_step=16 * number + 16, interval=16, steps=16,
                start=1.8e9 + number * wall, wall=wall, residual=0.0, bytes=100_000_000, drift=1 / (1 + number), staleness=0,
                error=0.0, hidden=0.005, loss=2 / (1 + number) ** 0.2 + noise[number], rank=rank, size=ranks,
                host=f"node{rank // 8:03}", **parts,
            )
        )  # fmt: skip


def measure(ranks: int, rounds: int) -> dict[str, Any]:
    """Seconds and megabytes."""
    row: dict[str, Any] = {"ranks": ranks, "rounds": rounds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor(os.cpu_count()) as processes:
            list(processes.map(partial(write, folder / "run", ranks, rounds), range(ranks)))
        row["files MB"] = sum(file.stat().st_size for file in (folder / "run").iterdir()) / 1e6
        for way, options in WAYS.items():
            began = time.perf_counter()
            command = [sys.executable, "-m", "hvd_localsgd.tools.cli", "report", "run", *options]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            row[f"{way}_s"] = time.perf_counter() - began
            if options:
                row[f"{way} MB"] = (folder / options[1]).stat().st_size / 1e6
    return row


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["16x1000", "256x10000"], help="ranks x rounds")
    parser.add_argument("--json", type=Path, default=Path("runs/large_report.json"))
    arguments = parser.parse_args()
    rows = [measure(*map(int, size.split("x"))) for size in arguments.sizes]
    report.show("hvd-localsgd report", rows, tuple(rows[0]))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": report.software(), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
