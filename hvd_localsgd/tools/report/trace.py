"""A run as Chrome's and Perfetto's trace viewers show it: a process for each rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hvd_localsgd.core.timing import PARTS
from hvd_localsgd.tools.report.condense import condense, together
from hvd_localsgd.tools.report.runs import Rank, Run

MOST = 100_000  # rounds: about 100 MB
_THREADS = ("rounds", "parts", "average on its way")


def write(runs: Sequence[Run], path: Path) -> int:
    """Write the file, in the trace event format (JSON); each run begins at 0. Returns how many rounds were taken together as one."""
    count = together(runs, MOST)
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        process = 0
        for run in runs:
            for rank in run.ranks:
                name = f"{run.name + ' ' if len(runs) > 1 else ''}rank {rank.number} on {rank.host}"
                for event in _events(rank, name, count, run.start):
                    file.write(separator + json.dumps({"pid": process, **event}))
                    separator = ",\n"
                process += 1
        file.write("\n]}\n")
    return count


def _events(rank: Rank, name: str, count: int, start: float) -> Iterator[dict[str, Any]]:
    """Times in microseconds. Inside a round the parts stand one after another: a record has their sums, not each step."""
    yield {"ph": "M", "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "args": {"sort_index": rank.number}}
    for thread, title in enumerate(_THREADS):
        yield {"ph": "M", "name": "thread_name", "tid": thread, "args": {"name": title}}
    for row in condense(rank.rounds, count):
        begin = 1e6 * (row["start"] - start)
        facts = {"H": row["interval"], **{key: row[key] for key in ("steps", "bytes", "loss", "drift")}}
        known = {key: float(value) for key, value in facts.items() if math.isfinite(value)}
        number = int(row["round"])
        title = f"round {number}" if count == 1 else f"rounds from {number}"
        yield {"ph": "X", "name": title, "tid": 0, "ts": begin, "dur": 1e6 * row["wall"], "args": known}
        if row["hidden"]:
            yield {"ph": "X", "name": "hidden", "tid": 2, "ts": begin, "dur": 1e6 * row["hidden"]}
        at = begin
        for part in (*PARTS, "residual"):
            if row[part] > 0:
                yield {"ph": "X", "name": part, "tid": 1, "ts": at, "dur": 1e6 * row[part]}
                at += 1e6 * row[part]
        for key in ("loss", "drift"):
            if key in known:
                yield {"ph": "C", "name": key, "ts": begin + 1e6 * row["wall"], "args": {key: known[key]}}
