"""Images per second of a CNN on synthetic data: Local SGD, Horovod's gradients at every step, and no communication at all.

python benchmarks/throughput.py --ranks 2 --json runs/throughput.json
benchmarks/cluster/run --rate 1gbit --hosts 4 -- python benchmarks/throughput.py

The ways take turns on the same ranks; the slowest rank's time counts, the median of the turns is shown. Horovod comes last, because
its thread keeps a core busy once it is initialised; without Horovod its row is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import report


def cnn(filters: int) -> Any:
    """Three convolutions and a dense layer for 32 x 32 colour images; about 390,000 weights for 32 filters."""
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            *[layers.Conv2D(filters << i, 3, strides=2, padding="same", activation="relu") for i in range(3)],
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each way."""
    import keras
    import numpy as np
    import tensorflow as tf

    import hvd_localsgd as lsgd
    from hvd_localsgd import devices
    from hvd_localsgd.core import timing

    communicator = devices.get("mpi")
    random = np.random.default_rng(communicator.rank)
    images = random.random((arguments.batch, 32, 32, 3), np.float32)
    labels = random.integers(0, 10, arguments.batch)
    data = tf.data.Dataset.from_tensors((images, labels)).repeat(arguments.steps).prefetch(1)

    def model(optimizer: Any) -> keras.Model:
        built = cnn(arguments.filters)
        built.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return built

    def sgd() -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(0.01, momentum=0.9)

    ways: dict[str, tuple[Any, Any, list[Any]]] = {"no communication": (model(sgd()), data, [])}
    for interval in arguments.sync_every:
        ways[f"Local SGD, H = {interval}"] = (model(sgd()), data, [lsgd.LocalSGDCallback(interval)])
    seconds = time_ways(ways, arguments.repeats)
    try:
        import horovod.tensorflow as hvd
        from horovod_baseline import average_gradients
    except ImportError:
        pass
    else:
        hvd.init()  # only now: its thread keeps a core busy from here on
        ways["Horovod, every step"] = (model(average_gradients(sgd())), data, [])
        seconds |= time_ways({"Horovod, every step": ways["Horovod, every step"]}, arguments.repeats)
    rows: report.Rows = []
    for way, (built, _, callbacks) in ways.items():
        elapsed = float(np.median(seconds[way]))
        row: dict[str, Any] = {
            "way": way,
            "ranks": communicator.size,
            "transport": report.transport(),
            "batch": arguments.batch,
            "weights": built.count_params(),
            "images/s": communicator.size * arguments.batch * arguments.steps / elapsed,
        }
        for callback in callbacks:
            average = timing.mean(callback.totals)
            for part in ("compute", "wait", "communicate"):
                row[f"{part} %"] = 100 * average[part] / average["wall"]
        rows.append(row)
    for row in rows:
        row["of the limit"] = row["images/s"] / rows[0]["images/s"]
    return rows


def time_ways(ways: dict[str, tuple[Any, Any, list[Any]]], repeats: int) -> dict[str, list[float]]:
    """Seconds of the slowest rank, for each way and turn."""
    import keras

    class Clock(keras.callbacks.Callback):
        """From train begin to train end: tf.data can take seconds to end its threads after that."""

        def on_train_begin(self, logs: Any = None) -> None:
            self.began = time.perf_counter()

        def on_train_end(self, logs: Any = None) -> None:
            self.seconds = time.perf_counter() - self.began

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):  # the first traces and compiles
        for way, (built, data, callbacks) in ways.items():
            for callback in callbacks:
                callback.timings.clear()
            clock = Clock()
            report.slowest(0.0)
            built.fit(data, epochs=1, verbose=0, shuffle=False, callbacks=[*callbacks, clock])
            elapsed = report.slowest(clock.seconds)
            if turn:
                seconds[way].append(elapsed)
    return seconds


def draw(figure: Any, rows: report.Rows) -> None:
    """A bar for each way."""
    report.bars(figure, rows, lambda row: f"{row['way']}\n{row['ranks']} ranks", {"images/s": "images/s"}, "images/s")


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=5)
    parser.add_argument("--sync-every", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=128, help="of each turn")
    parser.add_argument("--filters", type=int, default=32, help="of the first convolution; doubled twice")
    columns = ("way", "ranks", "images/s", "of the limit", "compute %", "wait %", "communicate %")
    return report.run(parser.parse_args(), measure, "Images per second", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
