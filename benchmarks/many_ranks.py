"""Thousands of ranks, on one process: what each must hold, send and compute at a sync, and what is printed.

python benchmarks/many_ranks.py

The headers of K ranks are made up, and decided on as every rank would, with each option that looks at all of them; an epoch's
logs and the totals are those of a model with two metrics. Nothing is sent.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import report


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each K."""
    from hvd_localsgd import table
    from hvd_localsgd.core import protocol
    from hvd_localsgd.core.groups import Groups
    from hvd_localsgd.core.settings import Settings

    ways = {
        "equal": Settings(16),
        "samples, balanced": Settings(16, weighting="samples", interval="balanced"),
        "outliers": Settings(16, guard="outliers"),
        "norms": Settings(16, guard="norms"),
        "groups": Settings(16, groups=Groups("node", 4)),
    }
    rows = []
    for ranks in arguments.sizes:
        headers = made_up(ranks)
        row: dict[str, Any] = {"ranks": ranks, "header bytes": headers.nbytes}
        for way, settings in ways.items():
            last = protocol.decide(headers, settings).now
            row[f"{way}_s"] = seconds(partial(protocol.decide, headers, settings, last), arguments.repeats)
        message = json.dumps({"logs": {"loss": 1 / 3, "accuracy": 2 / 3}, "samples": 1e6, "validation_samples": 1e5})
        row["logs bytes"] = ranks * len(message)
        row["logs_s"] = seconds(partial(average, [message] * ranks), arguments.repeats)
        totals = [total(rank) for rank in range(ranks)]
        row["totals bytes"] = len(json.dumps(totals))
        with redirect_stdout(io.StringIO()) as printed:
            table.print_table(totals, f"{ranks} ranks")
        row["table lines"] = printed.getvalue().count("\n")
        rows.append(row)
    return rows


def made_up(ranks: int) -> Any:
    """The headers of ranks of unequal speed, eight on a host, at the end of a round."""
    import numpy as np

    from hvd_localsgd.core import header

    random, table = np.random.default_rng(0), np.zeros(ranks, header.HEADER)
    table["steps"] = table["recent"] = 16
    table["samples"] = table["recent_samples"] = random.integers(400, 512, ranks)
    table["finite"] = table["due"] = True
    table["group"] = np.arange(ranks) // 8
    for name in ("pace", "norm", "loss"):
        table[name] = random.uniform(1, 2, ranks)
    table["rate"] = table["remaining"] = np.nan
    return table


def total(rank: int) -> dict[str, Any]:
    """What one rank tells of its training."""
    from hvd_localsgd.core.timing import Sums

    return {**dict.fromkeys(Sums().numbers, 1 / 3 + rank), "rank": rank, "host": f"node{rank // 8:04}"}


def average(messages: list[str]) -> None:
    """What a rank does with the logs of all at an epoch's end."""
    from hvd_localsgd.frontends import logs

    entries = [json.loads(message) for message in messages]
    logs.average(entries)
    logs.spread(entries, 0.0)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median."""
    import numpy as np

    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def draw(figure: Any, rows: report.Rows) -> None:
    """Seconds of a decision against ranks, a line for each way; beside it bytes."""
    left, right = figure.subplots(1, 2)
    ranks = [row["ranks"] for row in rows]
    for key in rows[0]:
        if key.endswith("_s"):
            left.loglog(ranks, [1e3 * row[key] for row in rows], marker=".", label=key.removesuffix("_s"), base=2)
        elif key.endswith("bytes"):
            right.loglog(ranks, [row[key] / 1e6 for row in rows], marker=".", label=key.removesuffix(" bytes"), base=2)
    left.set_ylabel("ms")
    right.set_ylabel("MB on each rank")
    for panel in (left, right):
        panel.set_xlabel("ranks")
        panel.legend(frameon=False)


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=20)
    parser.set_defaults(ranks=[1])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 64, 512, 4096], help="numbers of ranks to make up")
    ways = ("equal_s", "samples, balanced_s", "outliers_s", "norms_s", "groups_s")
    columns = ("ranks", "header bytes", *ways, "logs bytes", "logs_s", "totals bytes", "table lines")
    return report.run(parser.parse_args(), measure, "What each of many ranks does at a sync", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
