"""What a local step that ends without a sync costs more than a plain one: fit alone, with the callback, with the optimizer.

python benchmarks/step_overhead.py --json runs/step_overhead.json

Rounds are longer than the run, so that nothing is synchronised; by default one rank, so that nothing but our own code is measured.
The fits run at the same time, each in its thread, but take turns: a step of one, a step of the next. Whatever slows the
machine down for a moment is the same for all; a second plain fit shows what remains. Reported is the median over steps of the
difference to the plain step of the same turn.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from typing import Any

import report

_WARM_UP = 20  # steps: the first is traced


def measure(arguments: argparse.Namespace) -> report.Rows:
    """Rows for each width: plain, callback, optimizer."""
    return [row for width in arguments.widths for row in measure_width(width, arguments.repeats)]


def measure_width(width: int, steps: int) -> report.Rows:
    """Seconds of a step, each way, for a dense model of this width."""
    import keras
    import numpy as np
    import tensorflow as tf

    import hvd_localsgd as lsgd

    never = 1 << 40
    data = tf.data.Dataset.from_tensors((tf.random.normal((32, width)), tf.zeros((32, 1)))).repeat(steps + _WARM_UP)

    def model(optimizer: keras.optimizers.Optimizer) -> keras.Model:
        layers = [keras.layers.Dense(width, activation="relu") for _ in range(3)]
        result = keras.Sequential([keras.Input((width,)), *layers, keras.layers.Dense(1)])
        result.compile(optimizer, "mse")
        return result

    ways = {
        "plain": (model(keras.optimizers.SGD(1e-3)), []),
        "callback": (model(keras.optimizers.SGD(1e-3)), [lsgd.LocalSGDCallback(never)]),
        "plain again": (model(keras.optimizers.SGD(1e-3)), []),  # shows what the measurement itself adds
        "optimizer": (model(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(1e-3), never)), []),
    }

    turns = [threading.Semaphore(0) for _ in ways]

    class Turns(keras.callbacks.Callback):
        """The last callback: times a step, and lets the next fit have its own."""

        def __init__(self, place: int) -> None:
            super().__init__()
            self.place, self.seconds = place, list[float]()

        def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
            self.wait()

        def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            turns[(self.place + 1) % len(turns)].release()
            self.wait()

        def wait(self) -> None:
            turns[self.place].acquire()
            self.began = time.perf_counter()

    def fit_in_turns(model: keras.Model, callbacks: list[keras.callbacks.Callback]) -> None:
        try:
            model.fit(data, verbose=0, shuffle=False, callbacks=callbacks)
        finally:  # all have taken their last step, or this one has failed and nobody may wait for it
            for turn in turns:
                turn.release(steps + _WARM_UP)

    clocks = [Turns(place) for place in range(len(ways))]
    fits = [
        threading.Thread(target=fit_in_turns, args=(built, [*callbacks, clock]))
        for (built, callbacks), clock in zip(ways.values(), clocks, strict=True)
    ]
    turns[0].release()
    for fit in fits:
        fit.start()
    for fit in fits:
        fit.join()
    seconds = np.array([clock.seconds[_WARM_UP:] for clock in clocks])
    plain = seconds[0]
    rows = []
    for way, values in zip(ways, seconds, strict=True):
        added = values - plain
        rows.append(
            {
                "width": width,
                "way": way,
                "step_s": float(np.median(values)),
                "added us": 1e6 * float(np.median(added)),
                "added %": 100 * float(np.median(added) / np.median(plain)),
                # 95 % of a median, from the quartiles
                "± %": 100 * float(1.57 * np.ptp(np.percentile(added, [25, 75])) / np.sqrt(steps) / np.median(plain)),
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
    parser = report.parser(__doc__, repeats=3000)
    parser.set_defaults(ranks=[1])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256], help="of a dense model, batch 32")
    columns = ("width", "way", "step_s", "added us", "added %", "± %")
    return report.run(parser.parse_args(), measure, "A step without a sync", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
