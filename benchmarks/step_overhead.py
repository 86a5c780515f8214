"""What a local step that ends without a sync costs more than a plain one: fit alone, with the callback, with the optimizer.

python benchmarks/step_overhead.py --json runs/step_overhead.json

Rounds are longer than the run, so that nothing is synchronised; by default one rank, so that nothing but our own code is measured.
The three ways take turns, a short fit each, and what is reported is the median over turns of the difference to the plain fit of
the same turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import report


def measure(arguments: argparse.Namespace) -> report.Rows:
    """Rows for each width: plain, callback, optimizer."""
    return [row for width in arguments.widths for row in measure_width(width, arguments.steps, arguments.repeats)]


def measure_width(width: int, steps: int, repeats: int) -> report.Rows:
    """Seconds of a step, each way, for a dense model of this width."""
    import keras
    import numpy as np
    import tensorflow as tf

    import hvd_localsgd as lsgd

    never = 1 << 40
    data = tf.data.Dataset.from_tensors((tf.random.normal((32, width)), tf.zeros((32, 1)))).repeat(steps)

    def model(optimizer: keras.optimizers.Optimizer) -> keras.Model:
        layers = [keras.layers.Dense(width, activation="relu") for _ in range(3)]
        result = keras.Sequential([keras.Input((width,)), *layers, keras.layers.Dense(1)])
        result.compile(optimizer, "mse")
        return result

    ways = {
        "plain": (model(keras.optimizers.SGD(1e-3)), []),
        "callback": (model(keras.optimizers.SGD(1e-3)), [lsgd.LocalSGDCallback(never)]),
        "optimizer": (model(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(1e-3), never)), []),
    }

    class Clock(keras.callbacks.Callback):
        """From the first step's end to the last one's."""

        def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
            if batch == 0:
                self.began = time.perf_counter()
            self.ended = time.perf_counter()

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, (built, callbacks) in ways.items():
            clock = Clock()
            built.fit(data, epochs=1, verbose=0, shuffle=False, callbacks=[*callbacks, clock])
            if turn:
                seconds[way].append((clock.ended - clock.began) / (steps - 1))
    plain = np.array(seconds["plain"])
    rows = []
    for way, values in seconds.items():
        added = float(np.median(np.array(values) - plain))
        rows.append(
            {
                "width": width,
                "way": way,
                "step_s": float(np.median(values)),
                "added_s": added,
                "added %": 100 * added / float(np.median(plain)),
            }
        )
    return rows


def draw(figure: Any, rows: report.Rows) -> None:
    """Three bars per width."""
    report.bars(
        figure, rows, lambda row: f"{row['width']}: {row['way']}", {"step_s": "a step without a sync"}, "seconds"
    )


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=25)
    parser.set_defaults(ranks=[1])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256], help="of a dense model, batch 32")
    parser.add_argument("--steps", type=int, default=100, help="of each short fit")
    columns = ("width", "way", "step_s", "added_s", "added %")
    return report.run(parser.parse_args(), measure, "A step without a sync", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
