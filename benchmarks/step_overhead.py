"""What a local step that ends without a sync costs more than a plain one: fit alone, with the callback, with the optimizer.

python benchmarks/step_overhead.py --json runs/step_overhead.json

One process, so that nothing but our own code is measured; rounds are longer than the run, so that nothing is synchronised. The
three ways take turns, and each step's time is the median over epochs of an epoch's mean.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import report

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
for _variable in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


def measure(width: int, steps: int, epochs: int) -> list[dict[str, Any]]:
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
    for epoch in range(epochs + 1):
        for way, (built, callbacks) in ways.items():
            clock = Clock()
            built.fit(data, epochs=1, verbose=0, callbacks=[*callbacks, clock])
            if epoch:
                seconds[way].append((clock.ended - clock.began) / (steps - 1))
    median = {way: float(np.median(values)) for way, values in seconds.items()}
    return [
        {"width": width, "way": way, "step_s": value, "added": value / median["plain"] - 1}
        for way, value in median.items()
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("runs/step_overhead.json"))
    arguments = parser.parse_args()
    rows = [row for width in arguments.widths for row in measure(width, arguments.steps, arguments.repeats)]
    for row in rows:
        row["added %"] = f"{100 * row['added']:+.1f}"
    report.write(arguments.json, rows)
    report.show("A step without a sync", rows, ("width", "way", "step_s", "added %"))


if __name__ == "__main__":
    main()
