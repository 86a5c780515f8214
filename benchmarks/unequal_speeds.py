"""One rank slower than the others: plain Local SGD waits for it, balanced rounds give it fewer steps, asynchronous ones do not care.

python benchmarks/unequal_speeds.py --ranks 2 4 --slow 10

A step is a small one of a real Keras fit and a pause, --slow times as long on rank 0. Each way runs for --seconds; then all steps of
all ranks are counted, beside what the ranks do in that time without communication.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import report


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each way."""
    import keras
    import numpy as np
    import tensorflow as tf
    from mpi4py import MPI

    import hvd_localsgd as lsgd
    from hvd_localsgd.core import timing

    lsgd.init()
    world = MPI.COMM_WORLD
    data = tf.data.Dataset.from_tensors((tf.ones((8, 64)), tf.zeros((8, 1)))).repeat()

    class Pace(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.steps, self.began = 0, time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            time.sleep(arguments.step_ms / 1e3 * (arguments.slow if world.rank == 0 else 1))
            self.steps += 1
            self.seconds = time.perf_counter() - self.began
            if self.seconds > arguments.seconds:
                self.model.stop_training = True

    ways: dict[str, dict[str, Any] | None] = {
        "no communication": None,
        "plain": {},
        "balanced": {"interval": "balanced"},
        "async": {"mode": "async"},
    }
    rows: report.Rows = []
    for way, options in ways.items():
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e-4), "mse")
        callbacks = [] if options is None else [lsgd.LocalSGDCallback(arguments.sync_every, **options)]
        pace = Pace()
        model.fit(data, steps_per_epoch=5, verbose=0, shuffle=False, callbacks=callbacks)  # compiles
        model.fit(data, steps_per_epoch=10**6, verbose=0, shuffle=False, callbacks=[*callbacks, pace])
        row: dict[str, Any] = {"way": way, "ranks": world.size, "slow": arguments.slow, "H": arguments.sync_every}
        row["steps/s"] = world.allreduce(pace.steps / pace.seconds)
        row["of the ranks' own speeds"] = row["steps/s"] / rows[0]["steps/s"] if rows else 1.0
        for callback in callbacks:
            rounds = callback.timings[len(callback.timings) // 4 :]  # the first ones compile, and measure speeds
            shares = world.allgather(sum(r.wait for r in rounds) / sum(r.wall for r in rounds))
            row["wait %"] = 100 * float(np.max(shares))
            row["staleness"] = timing.mean(callback.totals)["staleness"]
        rows.append(row)
    return rows


def draw(figure: Any, rows: report.Rows) -> None:
    """Throughput of each way."""
    series = {"of the ranks' own speeds": "steps of all ranks, of what they do alone"}
    report.bars(figure, rows, lambda row: f"{row['way']}\n{row['ranks']} ranks", series, "share")


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=1)
    parser.add_argument("--slow", type=float, default=10, help="how many times slower rank 0 is")
    parser.add_argument("--step-ms", type=float, default=10, help="pause of each step")
    parser.add_argument("--sync-every", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=15, help="for each way")
    columns = ("way", "ranks", "slow", "H", "steps/s", "of the ranks' own speeds", "wait %", "staleness")
    return report.run(parser.parse_args(), measure, "Ranks of unequal speed", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
