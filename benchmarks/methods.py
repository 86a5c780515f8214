"""What each method makes of the same samples: test accuracy, loss, syncs, bytes.

python benchmarks/methods.py --ranks 4
python benchmarks/methods.py --ranks 4 --data mnist.npz --epochs 4

Every rank has its own part of the images; all methods see the same batches, from the same start. Without ``--data`` the images are
scikit-learn's 1,797 digits. The best of ``--learning-rates`` counts for each method; ``--repeats`` seeds give the spread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report

import hvd_localsgd as lsgd

METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "H = 1": lambda: {"sync_every": 1},
    "H = 4": lambda: {"sync_every": 4},
    "H = 16": lambda: {"sync_every": 16},
    "H = 16, bf16": lambda: {"sync_every": 16, "compression": "bf16"},
    "H = 16, fp16": lambda: {"sync_every": 16, "compression": "fp16"},
    "H = 16, int8": lambda: {"sync_every": 16, "compression": "int8"},
    "H = 16, overlap 4": lambda: {"sync_every": 16, "overlap": 4},
    "H = 16, overlap 8": lambda: {"sync_every": 16, "overlap": 8},
    "H = 16, overlap 4, thrown away": lambda: {"sync_every": 16, "overlap": 4},
    "H = 16, overlap 8, thrown away": lambda: {"sync_every": 16, "overlap": 8},
    "H = 16, 4 fragments": lambda: {"sync_every": 16, "fragments": 4},
    "H = 16, groups": lambda: {"sync_every": 16, "groups": lsgd.Groups(pairs(), every=4)},
    "H = 32": lambda: {"sync_every": 32},
    "H = 32, SlowMo": lambda: {"sync_every": 32, "outer": lsgd.SlowMo(0.5, 0.8)},
    "H = 32, Nesterov": lambda: {"sync_every": 32, "outer": lsgd.Nesterov(0.7, 0.7)},
    "H = 1, then 32": lambda: {"sync_every": lsgd.PostLocal("0.5dur", 32)},
    "auto": lambda: {"sync_every": "auto"},
}


def pairs() -> list[list[int]]:
    """Groups of two ranks."""
    return [list(range(first, min(first + 2, lsgd.size()))) for first in range(0, lsgd.size(), 2)]


class ThrownAway(lsgd.LocalSGDCallback):
    """Overlap as others have it: what was learned while the average was on its way is thrown away."""

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """x <- average + (x - x_s), of which x - x_s is taken off again."""
        before = self.model.get_weights()
        super().on_train_batch_end(batch, logs)
        interval, overlap, step = self.settings.schedule.interval(lsgd.Now(0)), self.settings.overlap, batch + 1
        if step % interval == 0:
            self.sent = before
        elif step % interval == overlap and step > interval:
            weights = zip(self.model.get_weights(), before, self.sent, strict=True)
            self.model.set_weights([new - (own - sent) for new, own, sent in weights])


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each method."""
    data = load(arguments.data)
    unknown = set(arguments.methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"There is no method {sorted(unknown)}. There are: {', '.join(METHODS)}")
    return [best(name, data, arguments) for name in arguments.methods]


def load(path: Path | None) -> dict[str, Any]:
    """Images flat, from 0 to 1; this rank's part of those to train with."""
    import numpy as np

    from hvd_localsgd import devices

    communicator = devices.get()
    if path is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        x, y = digits.data[order] / 16, digits.target[order]
        data = {"x_train": x[:1500], "y_train": y[:1500], "x_test": x[1500:], "y_test": y[1500:]}
    else:
        with np.load(path) as file:
            data = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
        for part in ("train", "test"):
            data[f"x_{part}"] = data[f"x_{part}"].reshape(len(data[f"x_{part}"]), -1) / 255
    own = slice(communicator.rank, len(data["y_train"]) // communicator.size * communicator.size, communicator.size)
    return data | {key: data[key][own] for key in ("x_train", "y_train")}


def best(name: str, data: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """At its best learning rate, the median of the seeds."""
    import numpy as np

    rows = []
    for rate in arguments.learning_rates:
        seeds = [run_one(name, rate, seed, data, arguments) for seed in range(arguments.repeats)]
        accuracies = [row["accuracy"] for row in seeds]
        histories = np.median([row.pop("history") for row in seeds], axis=0).tolist()
        middle = {key: float(np.median([row[key] for row in seeds])) for key in seeds[0]} | {"history": histories}
        rows.append(middle | {"least": min(accuracies), "most": max(accuracies), "rate": rate, "way": name})
    from hvd_localsgd import devices

    return max(rows, key=lambda row: row["accuracy"]) | {"ranks": devices.get().size, "repeats": arguments.repeats}


def run_one(name: str, rate: float, seed: int, data: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once."""
    import warnings

    import keras

    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(arguments.width, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((data["x_train"].shape[1],)), *layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss, metrics=["accuracy"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rounds that grow, which are the point
        kind = ThrownAway if "thrown away" in name else lsgd.LocalSGDCallback
        callback = kind(**METHODS[name]())
    fit = model.fit(
        data["x_train"],
        data["y_train"],
        batch_size=arguments.batch,
        epochs=arguments.epochs,
        verbose=0,
        callbacks=[callback],
    )
    tested = model.evaluate(data["x_test"], data["y_test"], verbose=0, return_dict=True)
    return {
        "accuracy": tested["accuracy"],
        "test loss": tested["loss"],
        "train loss": fit.history["loss"][-1],
        "history": fit.history["loss"],
        "syncs": callback.totals[0]["syncs"],
        "megabytes": callback.totals[0]["bytes"] / 1e6,
        "steps": callback.totals[0]["steps"],
    }


def draw(figure: Any, rows: report.Rows) -> None:
    """Test accuracy against syncs, and the training loss of each epoch."""
    panel, losses = figure.subplots(1, 2)
    for row in rows:
        losses.semilogy(range(1, len(row["history"]) + 1), row["history"], label=row["way"])
        spread = [[row["accuracy"] - row["least"]], [row["most"] - row["accuracy"]]]
        panel.errorbar([row["syncs"]], [row["accuracy"]], spread, fmt="o", label=row["way"])
    panel.set_xscale("log")
    panel.set_xlabel("syncs")
    panel.set_ylabel("test accuracy, least to most of the seeds")
    losses.set_xlabel("epoch")
    losses.set_ylabel("training loss")
    losses.legend(frameon=False, fontsize=7)


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=3)
    parser.add_argument("--data", type=Path, help="mnist.npz, or another file with Keras' keys")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=128, help="of the two hidden layers")
    columns = ("way", "rate", "steps", "syncs", "megabytes", "train loss", "test loss", "accuracy", "least", "most")
    return report.run(parser.parse_args(), measure, "The same samples, other methods", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
