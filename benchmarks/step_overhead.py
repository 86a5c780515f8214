"""What a local step that ends without a sync costs more than a plain one: fit alone, with the callback, with the optimizer.

python benchmarks/step_overhead.py --json runs/step_overhead.json

Rounds are longer than the run, so that nothing is synchronised; by default one rank, so that nothing but our own code is measured.
The fits run at the same time, each in its thread, but take turns: a step of each, in an order that is drawn anew for every
round of turns. Whatever slows the machine down for a moment is the same for all, and what ran just before a step is any of
the others; a second plain fit shows what remains. All is done with several models made anew, because where one lies in memory
matters by tens of microseconds: for each the median over rounds of the difference to the plain step; of these the median, the
smallest and the largest.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import report

_WARM_UP = 20  # steps: the first is traced


def measure(arguments: argparse.Namespace) -> report.Rows:
    """Rows for each width: plain, callback, optimizer."""
    import numpy as np

    rows = []
    for width in arguments.widths:
        measured = [measure_steps(width, arguments.repeats) for _ in range(arguments.models)]
        for way in measured[0]:
            step = np.median([seconds[way] for seconds in measured])
            added = [np.median(seconds[way] - seconds["plain"]) for seconds in measured]
            rows.append(
                {
                    "width": width,
                    "way": way,
                    "step_s": float(step),
                    "added us": 1e6 * float(np.median(added)),
                    "least us": 1e6 * float(min(added)),
                    "most us": 1e6 * float(max(added)),
                    "added %": 100 * float(np.median(added) / step),
                }
            )
    return rows


def measure_steps(width: int, steps: int) -> dict[str, Any]:
    """Seconds of every step, each way, for a dense model of this width."""
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
    order = draw_turns(len(ways))

    class Turns(keras.callbacks.Callback):
        """The last callback: times a step, and lets the next fit have its own."""

        def __init__(self, place: int) -> None:
            super().__init__()
            self.place, self.seconds = place, list[float]()

        def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
            self.wait()

        def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            turns[next(order)].release()
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
    turns[next(order)].release()
    for fit in fits:
        fit.start()
    for fit in fits:
        fit.join()
    return {way: np.array(clock.seconds[_WARM_UP:]) for way, clock in zip(ways, clocks, strict=True)}


def draw_turns(fits: int) -> Iterator[int]:
    """Everyone once in any order, and again, for ever; nobody twice in a row."""
    last, chance = -1, random.Random(0)
    while True:
        order = chance.sample(range(fits), fits)
        if order[0] != last:
            yield from order
            last = order[-1]


def draw(figure: Any, rows: report.Rows) -> None:
    """Three bars per width."""
    report.bars(
        figure, rows, lambda row: f"{row['width']}: {row['way']}", {"step_s": "a step without a sync"}, "seconds"
    )


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=1500)
    parser.set_defaults(ranks=[1])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256], help="of a dense model, batch 32")
    parser.add_argument("--models", type=int, default=7, help="how often all is done, each time with new models")
    columns = ("width", "way", "step_s", "added us", "least us", "most us", "added %")
    return report.run(parser.parse_args(), measure, "A step without a sync", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
