"""Tables of many trainings on the same samples: optimizer state, outer steps and H.

python benchmarks/grid.py momentum --ranks 4 --data cifar10.npz --work runs/momentum.jsonl      keep, average, reset; with and without SlowMo
python benchmarks/grid.py rates --ranks 4 --data cifar10.npz --work runs/rates.jsonl            the same at larger learning rates
python benchmarks/grid.py post-local --ranks 4 --data cifar10.npz --work runs/post_local.jsonl  local from the start or from the half on
python benchmarks/grid.py rounds --ranks 8 --data mnist.npz --work runs/rounds.jsonl            rounds and bytes to one accuracy

Every rank has its own part of the images; all trainings of a seed see the same batches, from the same start, at the same learning rate. The data
are CIFAR-10, which keras.datasets downloads, unless --data names a file with Keras' keys. With ``--work`` each training that has ended is a
line of that file: started again, the others follow.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report

import hvd_localsgd as lsgd

sys.path.insert(0, str(Path(__file__).parent / "papers"))
from prsgd_cifar10 import load

OUTER = {"mean": "mean", "SlowMo": lsgd.SlowMo(1.0, 0.5), "Nesterov": lsgd.Nesterov(0.7, 0.9)}
RATES = {"SGD, momentum 0.9": 0.05, "Adam": 0.002}
_TEST = 4096  # images
Case = dict[str, Any]


def momentum() -> list[Case]:
    """What becomes of the optimizer's state, and whether an outer momentum helps."""
    ways = itertools.product(
        ("SGD, momentum 0.9", "Adam"), ("keep", "average", "reset"), ("mean", "SlowMo"), (4, 16, 64)
    )
    return [{"optimizer": inner, "state": state, "outer": outer, "H": steps} for inner, state, outer, steps in ways]


def rates() -> list[Case]:
    """Whether a way is better, or only takes larger steps: learning rates of which all above are 1."""
    ways = itertools.product(("SGD, momentum 0.9", "Adam"), ("keep", "reset"), ("mean", "SlowMo"), (1, 2, 4))
    return [
        {"optimizer": inner, "state": state, "outer": outer, "H": 16, "rate": rate}
        for inner, state, outer, rate in ways
    ]


def post_local() -> list[Case]:
    """When local steps begin, and what the average becomes."""
    ways = itertools.product(("start", "half"), OUTER, (16, 64, 256))
    common = {"optimizer": "SGD, momentum 0.9", "state": "keep"}
    return [{**common, "local from": begin, "outer": outer, "H": steps} for begin, outer, steps in ways]


def rounds() -> list[Case]:
    """The same accuracy in fewer rounds."""
    ways = (("mean", 1), ("mean", 4), ("mean", 32), ("mean", 128), ("SlowMo", 32), ("Nesterov", 128))
    return [{"optimizer": "Adam", "state": "keep", "outer": outer, "H": steps} for outer, steps in ways]


TABLES = {"momentum": momentum, "rates": rates, "post-local": post_local, "rounds": rounds}
ACROSS = {"momentum": "H", "rates": "rate", "post-local": "H"}  # what makes columns of a table


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each case and seed."""
    from hvd_localsgd import devices

    lsgd.init()
    communicator = devices.get()
    x_train, y_train, x_test, y_test = load(arguments.data)
    train = slice(communicator.rank, arguments.subset // communicator.size * communicator.size, communicator.size)
    test = slice(communicator.rank, min(len(x_test), _TEST) // communicator.size * communicator.size, communicator.size)
    data = x_train[train], y_train[train], x_test[test], y_test[test]
    facts = {"table": arguments.table, "ranks": communicator.size, "steps": arguments.steps, "images": arguments.subset}
    rows = report.written(arguments.work)
    for seed, case in itertools.product(range(arguments.repeats), TABLES[arguments.table]()):
        wanted = {**facts, **case, "seed": seed}
        if any(wanted.items() <= row.items() for row in rows):
            continue
        row = {**wanted, **train_one(case, seed, data, arguments)}
        rows.append(row)
        if communicator.rank == 0 and arguments.work:
            report.keep(arguments.work, row)
    return [row for row in rows if facts.items() <= row.items()]


def train_one(case: Case, seed: int, data: tuple[Any, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """What one training came to; the same on every rank."""
    import keras
    import numpy as np

    from hvd_localsgd import devices

    communicator = devices.get()
    x_train, y_train, x_test, y_test = data
    make = dense if arguments.table == "rounds" else convolutional
    model, start = compiled(make, x_train.shape[1:], case["optimizer"])
    keras.utils.set_random_seed(seed)
    model.set_weights(make(x_train.shape[1:]).get_weights())
    for variable, value in zip(model.optimizer.variables, start, strict=True):
        variable.assign(value)
    model.optimizer.learning_rate.assign(RATES[case["optimizer"]] * case.get("rate", 1))
    interval = lsgd.PostLocal("0.5dur", case["H"]) if case.get("local from") == "half" else case["H"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of outer steps with rounds that grow, which is a question here
        callback = lsgd.LocalSGDCallback(interval, optimizer_state=case["state"], outer=OUTER[case["outer"]])
        reached = until(arguments.accuracy) if arguments.table == "rounds" else keras.callbacks.Callback()
        # An epoch is as long as the longest round: its end cuts none short.
        epoch = max(each["H"] for each in TABLES[arguments.table]())
        epochs = arguments.steps // epoch
        order = np.random.default_rng([seed, communicator.rank])
        draws = np.concatenate(
            [order.permutation(len(x_train)) for _ in range(-(-epochs * epoch * arguments.batch // len(x_train)))]
        )
        began = time.perf_counter()
        fit = model.fit(
            batches(x_train, y_train, draws, arguments.batch), steps_per_epoch=epoch, epochs=epochs, verbose=0,
            callbacks=[callback, reached], validation_data=(x_test, y_test), validation_batch_size=256,
        )  # fmt: skip
    history = {key: [round(float(value), 5) for value in values] for key, values in fit.history.items()}
    totals = callback.totals[0]
    return {
        "accuracy": history["val_accuracy"][-1],
        "loss": history["loss"][-1],
        "local steps": len(history["loss"]) * epoch,
        "syncs": totals["syncs"],
        "megabytes": totals["bytes"] / 1e6,
        "seconds": time.perf_counter() - began,
        "history": history["val_accuracy"],
    }


@functools.cache
def compiled(make: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...], inner: str) -> tuple[Any, list[Any]]:
    """A model whose steps are traced once for all trainings with this optimizer, and what the optimizer's variables begin with."""
    import keras

    model, rate = make(shape), RATES[inner]
    optimizer = keras.optimizers.Adam(rate) if inner == "Adam" else keras.optimizers.SGD(rate, momentum=0.9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    optimizer.build(model.trainable_variables)
    return model, [variable.numpy() for variable in optimizer.variables]


def batches(x: Any, y: Any, draws: Any, size: int) -> Any:
    """Of these images, in this order."""
    import tensorflow as tf

    def pick(chosen: Any) -> Any:
        return tf.gather(images, chosen), tf.gather(labels, chosen)

    images, labels = tf.constant(x), tf.constant(y)
    data = tf.data.Dataset.from_tensor_slices(draws).batch(size, drop_remainder=True).map(pick).prefetch(2)
    return report.without_autotune(data)


def until(accuracy: float) -> Any:
    """A callback that ends training at this test accuracy, the mean over ranks."""
    import keras

    class Reached(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if logs["val_accuracy"] >= accuracy:
                self.model.stop_training = True

    return Reached()


def convolutional(shape: tuple[int, ...]) -> Any:
    """Three convolutions; 24,000 weights."""
    import keras

    layers = [keras.layers.Conv2D(width, 3, 2, padding="same", activation="relu") for width in (16, 32, 64)]
    return keras.Sequential(
        [keras.Input(shape), *layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    )


def dense(shape: tuple[int, ...]) -> Any:
    """Two layers of 128."""
    import keras

    layers = [keras.layers.Dense(128, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input(shape), keras.layers.Flatten(), *layers, keras.layers.Dense(10)])


def summary(rows: report.Rows, across: str | None) -> report.Rows:
    """A row for each case: the mean over seeds, the least and the most; of each value of ``across`` in a column of its own."""
    result: dict[str, dict[str, Any]] = {}
    for name, seeds in by_case(rows).items():
        case, accuracies = json.loads(name), [row["accuracy"] for row in seeds]
        mean, least, most = sum(accuracies) / len(seeds), min(accuracies), max(accuracies)
        if across is None:
            whole = ("local steps", "syncs", "megabytes")
            means = {key: round(sum(row[key] for row in seeds) / len(seeds)) for key in whole}
            result[name] = case | {"seeds": len(seeds), **means, "accuracy": mean, "least": least, "most": most}
            continue
        value = case.pop(across)
        row = result.setdefault(json.dumps(case), {**case, "seeds": len(seeds), "accuracies": {}})
        row["accuracies"][value] = mean, least, most
        row[f"{across} = {value}"] = f"{mean:.3f} ({least:.3f} to {most:.3f})"
    return list(result.values())


_CASE = ("optimizer", "state", "local from", "outer", "H", "rate", "ranks")


def by_case(rows: report.Rows) -> dict[str, report.Rows]:
    """All seeds of each, under it as JSON."""
    found: dict[str, report.Rows] = {}
    for row in rows:
        found.setdefault(json.dumps({key: row[key] for key in _CASE if key in row}), []).append(row)
    return found


def draw(figure: Any, rows: report.Rows) -> None:
    """Accuracy against what is across, from the least to the most of the seeds; or syncs to one accuracy."""
    if "accuracies" not in rows[0]:
        report.bars(figure, rows, lambda row: f"{row['outer']}, H = {row['H']}", {"syncs": "syncs"}, "syncs")
        return
    panel = figure.add_subplot()
    for row in rows:
        name = ", ".join(str(row[key]) for key in ("optimizer", "state", "local from", "outer") if key in row)
        at, points = list(row["accuracies"]), list(row["accuracies"].values())
        spread = [[mean - least for mean, least, _ in points], [most - mean for mean, _, most in points]]
        panel.errorbar([float(x) for x in at], [mean for mean, *_ in points], spread, marker=".", label=name)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("rate" if "H" in rows[0] else "H")
    panel.set_ylabel("test accuracy")
    panel.legend(frameon=False, fontsize=7)


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=3)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, help="a file with x_train, y_train, x_test, y_test")
    parser.add_argument("--work", type=Path, help="a file of the trainings that have ended")
    parser.add_argument("--subset", type=int, default=16_384, help="images to train with, of all ranks together")
    parser.add_argument("--steps", type=int, default=1024, help="local steps; of rounds, at most")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--accuracy", type=float, default=0.93, help="of rounds: the test accuracy that ends a training"
    )
    arguments = parser.parse_args()
    across = ACROSS.get(arguments.table)
    found = {f"{across} = {case[across]}": None for case in TABLES[arguments.table]()} if across else {}
    means = ["local steps", "syncs", "megabytes", "accuracy", "least", "most"]
    columns = [*(key for key in _CASE if key not in (across, "ranks")), "seeds", *(found or means)]
    return report.run(arguments, lambda given: summary(measure(given), across), "The same samples", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
