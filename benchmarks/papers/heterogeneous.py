"""What unequal shards do to Local SGD: w8a cut into contiguous shards against shuffled ones, H = 1 ... 64.

python benchmarks/papers/heterogeneous.py --data w8a.bz2 --ranks 4

Each rank draws from its own shard only. w8a is sorted in such a way that all its positives lie in the first contiguous shard: as unequal
as it gets. Real runs on MPI ranks: Keras, LocalSGDCallback, the same number of steps for all; reported are f of the average at
the end and the drift that the syncs measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report
from stich_w8a import Problem


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each way of cutting and each H."""
    import keras

    import hvd_localsgd as lsgd

    problem = Problem(arguments.data)
    rank, size = lsgd.rank(), lsgd.size()
    rows: report.Rows = []
    for cut in ("shuffled", "contiguous"):
        order = np.arange(problem.n) if cut == "contiguous" else np.random.default_rng(0).permutation(problem.n)
        own = np.array_split(order, size)[rank]
        for interval in arguments.sync_every:
            draws = np.random.default_rng([3, rank]).choice(own, (arguments.steps, arguments.batch))
            model = problem.keras_model(keras.optimizers.SGD(arguments.learning_rate))
            callback = lsgd.LocalSGDCallback(interval)
            flat = draws.reshape(-1)
            model.fit(
                problem.dense[flat].astype(np.float32), problem.y[flat, None].astype(np.float32),
                batch_size=arguments.batch, shuffle=False, verbose=0, callbacks=[callback],
            )  # fmt: skip
            value = float(problem.value(model.get_weights()[0].astype(float))[0])
            drift = [r.drift for r in callback.timings if r.steps]
            rows.append(
                {"shards": cut, "ranks": size, "sync_every": interval, "steps": arguments.steps, "objective": value,
                 "mean drift": float(np.mean(drift))}
            )  # fmt: skip
    optimum = problem.optimum()
    for row in rows:
        row["suboptimality"] = row["objective"] - optimum
    return rows


def draw(figure: Any, rows: report.Rows) -> None:
    """Suboptimality and drift against H."""
    for place, column in enumerate(("suboptimality", "mean drift"), 1):
        panel = figure.add_subplot(1, 2, place)
        for cut in ("shuffled", "contiguous"):
            line = [(row["sync_every"], row[column]) for row in rows if row["shards"] == cut]
            panel.loglog(*zip(*line, strict=True), base=2, marker=".", label=cut)
        panel.set_yscale("log", base=10)
        panel.set_xlabel("H")
        panel.set_title(column, fontsize=10)
        panel.legend(frameon=False)


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=1)
    parser.set_defaults(ranks=[4])
    parser.add_argument("--data", type=Path, required=True, help="a LIBSVM file with two classes, .bz2 or not")
    parser.add_argument("--sync-every", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.0)
    columns = ("shards", "ranks", "sync_every", "steps", "objective", "suboptimality", "mean drift")
    return report.run(parser.parse_args(), measure, "Local SGD on equal and unequal shards", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
