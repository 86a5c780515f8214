"""What options save: seconds of a sync, and what crosses the network, beside the plain mean in the same processes.

benchmarks/cluster/run --rate 1gbit --hosts 2 -- python benchmarks/traffic.py --model resnet50
benchmarks/cluster/run --rate 1gbit --hosts 2 --ranks-per-host 2 -- python benchmarks/traffic.py --ways plain groups

A local step here takes as long as it is told to (``--step``, in seconds), of work of the processor, and changes all weights at random.
Averages that go on meanwhile (overlap) are paid for in what the round takes longer than its local steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import report
import shapes

_WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"compression": "bf16"},
    "fp16": {"compression": "fp16"},
    "int8": {"compression": "int8"},
    "overlap": {"overlap": -1},
    "overlap, int8": {"overlap": -1, "compression": "int8"},
    "fragments": {"fragments": 4},
    "groups": {"groups": "node"},
}


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row per way, one way after another."""
    import numpy as np

    import hvd_localsgd as lsgd

    random = np.random.default_rng(lsgd.rank())
    noise = random.normal(size=1 << 16).astype(np.float32) * 1e-3
    own = [np.zeros(shape, np.float32) for shape in shapes.MODELS[arguments.model]()]
    interval = arguments.sync_every
    averagers = {}
    for way in arguments.ways:
        options = dict(_WAYS[way])
        if "overlap" in options:
            options["overlap"] = interval - 1
        if "groups" in options:
            options["groups"] = lsgd.Groups("node", every=2)
        averagers[way] = lsgd.ModelAverager(own, interval, **options)
    rows = {way: {"way": way, "seconds": [], "sent": []} for way in averagers}
    for way, averager in averagers.items():
        row = rows[way]
        per_average = averager.settings.syncs_per_average
        averager.begin()
        for _ in range((arguments.repeats + 3) * per_average):  # the first are never encoded
            report.slowest(0.0)  # a barrier
            before, start, work = _sent_bytes(), time.perf_counter(), 0.0
            for _ in range(interval // min(averager.settings.fragments, per_average)):
                began = time.perf_counter()
                _local_step(own, noise, arguments.step)
                work += time.perf_counter() - began
                averager.step()
            row["seconds"].append(report.slowest(time.perf_counter() - start - work))
            row["sent"].append(_sent_bytes() - before)
        _summarise(row, averager, per_average, arguments.repeats, lsgd)
        averager.finish()
    for row in rows.values():
        row["ratio"] = row["sync_s"] / rows["plain"]["sync_s"] if "plain" in rows else None
    return list(rows.values())


def _summarise(row: dict[str, Any], averager: Any, per_average: int, repeats: int, lsgd: Any) -> None:
    """Medians of all but the first averages of the whole model; a group's or a fragment's syncs are added up."""
    import numpy as np

    def of_wholes(values: list[float]) -> np.ndarray:
        return np.array(values[3 * per_average :]).reshape(-1, per_average).sum(1)

    row["sync_s"] = float(np.median(of_wholes(row.pop("seconds"))))
    row["sent MB"] = float(np.median(of_wholes(row.pop("sent")))) / 1e6
    rounds = [each for each in averager.timings if each.interval][-repeats * per_average :]
    row["given MB"] = sum(each.bytes for each in rounds) / repeats / 1e6
    row["lost %"] = 100 * float(np.median([each.error for each in rounds]))
    row["hidden_s"] = float(np.median([each.hidden for each in rounds]))
    row["ranks"], row["transport"] = lsgd.size(), report.transport()


def _local_step(own: list[Any], noise: Any, seconds: float) -> None:
    """Changes every weight, then works on until so many seconds are over."""
    began = time.perf_counter()
    for array in own:
        flat = array.reshape(-1)
        for start in range(0, flat.size, noise.size):
            stretch = flat[start : start + noise.size]
            stretch += noise[: stretch.size]
    while time.perf_counter() - began < seconds:
        noise.dot(noise)


def _sent_bytes() -> int:
    """What this host has sent over its network so far; 0 where there is none of its own."""
    lines = [line.split() for line in Path("/proc/self/net/dev").read_text().splitlines()]
    return sum(int(fields[9]) for fields in lines if fields[0].startswith("eth"))


def draw(figure: object, rows: report.Rows) -> None:
    """Seconds of each way."""
    report.bars(figure, rows, lambda row: row["way"].replace(", ", "\n"), {"sync_s": "a sync"}, "seconds")


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=7)
    parser.add_argument("--model", choices=sorted(shapes.MODELS), default="resnet50")
    parser.add_argument("--ways", nargs="+", choices=sorted(_WAYS), default=list(_WAYS))
    parser.add_argument("--sync-every", type=int, default=8)
    parser.add_argument("--step", type=float, default=0.0, help="seconds of a local step, at least")
    columns = ["way", "ranks", "sync_s", "ratio", "hidden_s", "given MB", "sent MB", "lost %"]
    return report.run(parser.parse_args(), measure, "Options beside the plain mean", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
