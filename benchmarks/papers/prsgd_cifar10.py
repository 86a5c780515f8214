"""Yu, Yang & Zhu (2018), section 5: ResNet-20 on CIFAR-10, parallel restarted SGD with I local steps a round.

python benchmarks/papers/prsgd_cifar10.py --ranks 2 --subset 512 --epochs 2          a laptop
python benchmarks/papers/prsgd_cifar10.py --ranks 2 4 --epochs 15 --data cifar10.npz --work runs/cifar10     hours, in pieces
srun -n 8 python benchmarks/papers/prsgd_cifar10.py --full                           the paper's setting
python benchmarks/papers/prsgd_cifar10.py --data mnist.npz --subset 512              any file with Keras' keys

Loss and accuracy against epochs and against time, for each I; with ``--gradients`` also for gradients averaged at every step, by
Horovod. An epoch is one pass over all training images by all ranks together. CIFAR-10 comes from keras.datasets, which downloads it,
unless --data names a file with x_train, y_train, x_test, y_test (grey images get three channels, small ones a border). The rate is
divided by ten at a half and at three quarters of the epochs, or where --falls says.

With ``--work`` every epoch that has ended is kept: started again, it goes on where it was. A curve whose epochs are all there, as those in
docs/figures/cifar10, is not trained again; one of other settings or images is refused. To train on, ask for more epochs, with the same --falls
and the checkpoints that lie beside the record.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report


def resnet20(classes: int) -> Any:
    """He et al. (2016), section 4.2: 20 layers for 32 x 32 images; 0.27 million weights."""
    import keras

    layers = keras.layers
    decay = keras.regularizers.L2(1e-4 / 2)

    def convolution(x: Any, filters: int, stride: int = 1) -> Any:
        x = layers.Conv2D(
            filters,
            3,
            stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            kernel_regularizer=decay,
        )(x)
        return layers.BatchNormalization()(x)

    images = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolution(images, 16))
    for stage in range(3):
        for block in range(3):
            filters, stride = 16 << stage, 2 if stage and block == 0 else 1
            y = convolution(layers.ReLU()(convolution(x, filters, stride)), filters)
            if stride > 1:  # option A of the paper: no weights in the shortcut
                x = layers.AveragePooling2D(2)(x)
                x = layers.Concatenate()([x, layers.Lambda(keras.ops.zeros_like)(x)])
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(classes, kernel_regularizer=decay)(x))


def load(path: Path | None) -> tuple[np.ndarray, ...]:
    """Images in [-0.5, 0.5], 32 x 32 x 3, and labels: train, then test."""
    import keras

    if path is None:
        (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
    else:
        with np.load(path) as file:
            x_train, y_train, x_test, y_test = (file[key] for key in ("x_train", "y_train", "x_test", "y_test"))

    def prepare(x: np.ndarray) -> np.ndarray:
        if x.ndim == 3:
            x = np.repeat(x[..., None], 3, axis=-1)
        border = [(32 - side) // 2 for side in x.shape[1:3]]
        x = np.pad(x, [(0, 0), *[(b, 32 - side - b) for b, side in zip(border, x.shape[1:3], strict=True)], (0, 0)])
        return x.astype(np.float32) / 255 - 0.5

    return prepare(x_train), y_train.reshape(-1), prepare(x_test), y_test.reshape(-1)


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each curve and epoch."""
    import hvd_localsgd as lsgd

    lsgd.init()
    data = load(arguments.data)
    if arguments.subset:
        data = tuple(array[: arguments.subset] for array in data)
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        curves = [*arguments.interval, *(["gradients"] if arguments.gradients else [])]
        return [row for curve in curves for row in train(arguments, curve, data, work / f"{lsgd.size()}-ranks-{curve}")]


def train(arguments: argparse.Namespace, curve: int | str, data: tuple[np.ndarray, ...], work: Path) -> report.Rows:
    """The epochs of one curve, those of earlier lives too."""
    import keras
    import tensorflow as tf

    import hvd_localsgd as lsgd
    from hvd_localsgd import devices

    x_train, y_train, x_test, y_test = data
    count = len(x_train) // (lsgd.size() * arguments.batch) * arguments.batch
    if not count:
        raise SystemExit(f"{len(x_train)} images are less than a batch of {arguments.batch} for {lsgd.size()} ranks")
    own = np.random.default_rng(0).permutation(len(x_train))[lsgd.rank() :: lsgd.size()][:count]
    test = slice(lsgd.rank(), None, lsgd.size())

    def augment(image: Any, label: Any) -> Any:
        image = tf.image.random_crop(tf.pad(image, [[4, 4], [4, 4], [0, 0]]), (32, 32, 3))
        return tf.image.random_flip_left_right(image), label

    falls = arguments.falls or [arguments.epochs / 2, arguments.epochs * 3 / 4]
    rates = [arguments.learning_rate / 10**fall for fall in range(len(falls) + 1)]
    facts = {
        "I": curve,
        "ranks": lsgd.size(),
        "images": count * lsgd.size(),
        "pixels": zlib.crc32(x_train[:64].tobytes()),  # which images
        "batch": arguments.batch,
        "rates": rates,
        "falls": falls,
        "momentum": arguments.momentum,
        "augmentation": not arguments.no_augmentation,
    }
    path = work.with_suffix(".jsonl")
    kept = json.loads(devices.get().gather(json.dumps(report.written(path)).encode())[0])
    if other := {name: row.get(name) for row in kept for name in facts if row.get(name) != facts[name]}:
        raise SystemExit(f"{path} has a curve of {other}; this one is of {facts}. Give it another --work.")
    if len(kept) >= arguments.epochs:
        return kept[: arguments.epochs]
    if kept and not work.exists():
        raise SystemExit(f"{path} has {len(kept)} epochs, and there are no checkpoints in {work} to go on from.")

    keras.utils.set_random_seed(1)
    model = resnet20(int(y_train.max()) + 1)
    steps = count // arguments.batch
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([int(steps * epoch) for epoch in falls], rates)
    optimizer, callbacks = keras.optimizers.SGD(rate, momentum=arguments.momentum), []
    record = recorder(path, facts, kept)
    if curve == "gradients":
        import horovod.tensorflow as hvd
        from horovod_baseline import BroadcastFromRank0, average_gradients

        hvd.init()
        optimizer = average_gradients(optimizer)
        backup = keras.callbacks.BackupAndRestore(work / f"rank-{lsgd.rank()}", delete_checkpoint=False)
        callbacks = [backup, BroadcastFromRank0(), record]
    else:
        callbacks = [lsgd.LocalSGDCallback(curve), lsgd.LocalSGDCheckpoint(work, max(1, steps // int(curve))), record]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    images = tf.data.Dataset.from_tensor_slices((x_train[own], y_train[own])).shuffle(count, seed=lsgd.rank())
    if not arguments.no_augmentation:
        images = images.map(augment)
    model.fit(
        report.without_autotune(images.batch(arguments.batch).prefetch(2)), epochs=arguments.epochs, verbose=0, shuffle=False, callbacks=callbacks,
        validation_data=(x_test[test], y_test[test]), validation_batch_size=256,
    )  # fmt: skip
    return report.written(path)


def recorder(path: Path, facts: dict[str, Any], kept: report.Rows) -> Any:
    """A callback: what each epoch has shown, the mean over ranks, becomes a line of rank 0's file, after what earlier lives have kept."""
    import keras

    from hvd_localsgd import devices

    communicator = devices.get()

    class Recorder(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if not hasattr(self, "before"):
                rows = kept[:epoch]  # of an epoch that is begun again there is no line
                self.before = rows[-1]["seconds"] if rows else 0.0
                if communicator.rank == 0:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if not hasattr(self, "began"):  # the first step of each life compiles
                self.began = time.perf_counter() - self.before

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            names = ("loss", "accuracy", "val_accuracy", "averaging")
            own = {name: float((logs or {}).get(name, np.nan)) for name in names}
            everybody = [json.loads(each) for each in communicator.gather(json.dumps(own).encode())]
            mean = {name: float(np.mean([each[name] for each in everybody])) for name in names}
            row = {**facts, "epoch": epoch + 1, "seconds": time.perf_counter() - self.began, "loss": mean["loss"]}
            row |= {"accuracy": mean["accuracy"], "test accuracy": mean["val_accuracy"]}
            row["averaging %"] = None if np.isnan(mean["averaging"]) else 100 * mean["averaging"]
            if communicator.rank == 0:
                report.keep(path, row)

    return Recorder()


def _in_order(curve: tuple[int, int | str]) -> tuple[int, int]:
    """Of ranks and I: gradients first."""
    ranks, interval = curve
    return ranks, interval if isinstance(interval, int) else 0


def draw(figure: Any, rows: report.Rows) -> None:
    """The paper's figures: loss and accuracy, against epochs and against time."""
    panels = figure.subplots(2, 2)
    for line, column in zip(panels, ("loss", "test accuracy"), strict=True):
        for panel, axis in zip(line, ("epoch", "seconds"), strict=True):
            for ranks, curve in sorted({(row["ranks"], row["I"]) for row in rows}, key=_in_order):
                points = [(row[axis], row[column]) for row in rows if (row["ranks"], row["I"]) == (ranks, curve)]
                name = curve if curve == "gradients" else f"I = {curve}"
                panel.plot(*zip(*points, strict=True), marker=".", label=f"{ranks} ranks, {name}")
            panel.set_xlabel(axis)
            panel.set_ylabel(column)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.set_size_inches(9, 6)


def main() -> int:
    """Train, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, help="npz file with Keras' keys; CIFAR-10 by default")
    parser.add_argument("--interval", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="I, local steps a round")
    parser.add_argument("--subset", type=int, help="only so many images of each set")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--no-augmentation", action="store_true", help="no crops and flips")
    parser.add_argument("--falls", type=int, nargs="+", metavar="EPOCH", help="after which the rate is divided by ten")
    parser.add_argument("--gradients", action="store_true", help="also gradients averaged at every step, by Horovod")
    parser.add_argument("--work", type=Path, help="a folder in which every epoch is kept, to go on from")
    parser.add_argument("--full", action="store_true", help="all images, 200 epochs")
    arguments = parser.parse_args()
    if arguments.full:
        arguments.subset, arguments.epochs = None, 200
    columns = ("I", "ranks", "epoch", "seconds", "loss", "accuracy", "test accuracy", "averaging %")
    return report.run(arguments, measure, "ResNet-20, parallel restarted SGD", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
