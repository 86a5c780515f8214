"""How long until a model has learnt MNIST: Horovod's gradients at every step against Local SGD.

python benchmarks/time_to_accuracy.py --data mnist.npz --ranks 2
benchmarks/cluster/run --rate 100mbit --hosts 4 -- python benchmarks/time_to_accuracy.py --data mnist.npz

A way is 'horovod', or H and options of the callback: 16,overlap=8,compression=int8 or 64,outer=slowmo. Same model, data, batches and learning rate
for all. *Of the limit* is what the same steps take without any communication, of what they took. Every ``--evaluate-every`` steps the model (with Local SGD the average, for
which these are syncs) is tested on all test images; the clock stands still meanwhile, and during the first step, which compiles.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import report

_ALONE = 5  # evaluations
_WAYS = [
    "64",
    "64,outer=slowmo",
    "64,compression=int8",
    "16",
    "16,compression=int8",
    "16,overlap=8",
    "16,overlap=8,compression=int8",
    "4",
    "1",
    "horovod",
]


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each way."""
    import numpy as np

    from hvd_localsgd import devices

    communicator = devices.get("mpi")
    with np.load(arguments.data) as file:
        data = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    order = np.random.default_rng(0).permutation(len(data["x_train"]))[communicator.rank :: communicator.size]
    data["x_train"], data["y_train"] = data["x_train"][order], data["y_train"][order]
    for part in ("train", "test"):
        data[f"x_{part}"] = data[f"x_{part}"].reshape(-1, 784).astype("float32") / 255
    alone = run_one("alone", data, arguments)
    step = alone["history"][-1][0] / alone["steps"]
    rows = [run_one(way, data, arguments) for way in arguments.ways]
    reference = next((row["seconds"] for row in rows if row["way"].startswith("Horovod")), None)
    for row in rows:
        row["speed-up"] = reference / row["seconds"] if reference and row["seconds"] else None
        row["of the limit"] = row["steps"] * step / row["history"][-1][0]
    return rows


def options(way: str) -> dict[str, Any]:
    """Of the callback: ``16,overlap=8`` is ``{"sync_every": 16, "overlap": 8}``."""
    interval, *more = way.split(",")
    pairs = (each.split("=") for each in more)
    return {"sync_every": int(interval)} | {key: int(value) if value.isdigit() else value for key, value in pairs}


def named(way: str) -> str:
    """In words."""
    words = {"horovod": "Horovod, every step", "alone": "no communication"}
    return words.get(way) or "H = " + way.replace(",", ", ").replace("=", " ")


def run_one(way: str, data: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train until the accuracy or the time limit is reached; alone, for five evaluations."""
    import keras
    import numpy as np
    import tensorflow as tf
    from mpi4py import MPI

    import hvd_localsgd as lsgd

    world = MPI.COMM_WORLD
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(arguments.width, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    optimizer = keras.optimizers.SGD(arguments.learning_rate, momentum=0.9)
    callbacks: list[keras.callbacks.Callback]
    if way == "horovod":
        import horovod.tensorflow as hvd
        from horovod_baseline import BroadcastFromRank0, average_gradients

        hvd.init()
        optimizer, callbacks = average_gradients(optimizer), [BroadcastFromRank0()]
    else:
        callbacks = [] if way == "alone" else [lsgd.LocalSGDCallback(**options(way))]
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    test = slice(world.rank, None, world.size)
    history: list[tuple[float, float]] = []

    class Referee(keras.callbacks.Callback):
        """Times training, tests the model, stops."""

        seconds, steps, began = 0.0, 0, math.inf

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch:
                self.began = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.steps += 1
            if self.began == math.inf:
                world.Barrier()
                self.began = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.seconds += report.slowest(time.perf_counter() - self.began)
            guess = np.argmax(self.model(data["x_test"][test]), axis=1)
            right = world.allreduce(int((guess == data["y_test"][test]).sum()))
            history.append((self.seconds, right / len(data["y_test"])))
            if history[-1][1] >= arguments.accuracy or self.seconds > arguments.limit:
                self.model.stop_training = True
            if way == "alone":
                self.model.stop_training = len(history) == _ALONE

    referee = Referee()
    count = len(data["x_train"]) // world.size * world.size
    batches = tf.data.Dataset.from_tensor_slices((data["x_train"][:count], data["y_train"][:count]))
    batches = batches.shuffle(count, seed=1 + world.rank).repeat().batch(arguments.batch).prefetch(1)
    model.fit(
        batches,
        steps_per_epoch=arguments.evaluate_every,
        epochs=10**6,
        verbose=0,
        shuffle=False,
        callbacks=[*callbacks, referee],
    )
    reached = history[-1][1] >= arguments.accuracy
    return {
        "way": named(way),
        "ranks": world.size,
        "transport": report.transport(),
        "weights": model.count_params(),
        "steps": referee.steps,
        "accuracy": history[-1][1],
        "seconds": history[-1][0] if reached else None,
        "history": history,
    }


def draw(figure: Any, rows: report.Rows) -> None:
    """Test accuracy against time."""
    panel = figure.add_subplot()
    for row in rows:
        panel.plot(*zip(*row["history"], strict=True), label=row["way"])
    panel.set_xscale("log")
    panel.set_xlabel("seconds of training")
    panel.set_ylabel("test accuracy")
    panel.set_ylim(0.9, 1)
    panel.legend(frameon=False)


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz, with Keras' keys")
    parser.add_argument("--ways", nargs="+", default=_WAYS, help="horovod, or H with options of the callback")
    parser.add_argument("--accuracy", type=float, default=0.98)
    parser.add_argument("--limit", type=float, default=600, help="seconds of training for each way")
    parser.add_argument("--width", type=int, default=256, help="of the two hidden layers")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--evaluate-every", type=int, default=64, help="steps")
    columns = ("way", "ranks", "steps", "accuracy", "seconds", "speed-up", "of the limit")
    return report.run(parser.parse_args(), measure, "Time to accuracy on MNIST", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
