"""A training that is interrupted, and goes on: ``resumed_program.py front folder [name=value ...]``. At the end each rank prints what it holds.

``kill=N``: all ranks kill themselves with SIGKILL after N batches of this life. ``signal=N``: rank 1 gets a SIGTERM then.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
front, folder = sys.argv[1:3]
given = dict(each.split("=") for each in sys.argv[3:])
number = {name: int(value) for name, value in given.items() if value.lstrip("-").isdigit()}

if front == "averager":
    sys.modules["tensorflow"] = None  # as if it were not installed: a life is short

import hvd_localsgd as lsgd

lsgd.init()
import numpy as np

from hvd_localsgd.core.keeper import Checkpoints

if front != "averager":
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(3 + lsgd.rank())
    tf.config.experimental.enable_op_determinism()


class Interrupt(keras.callbacks.Callback if front != "averager" else object):
    """After so many batches of this life. ``pause=N``: each takes N ms longer."""

    batches = 0

    def on_train_batch_begin(self, batch, logs=None):
        time.sleep(number.get("pause", 0) / 1000)

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.batches == 1:
            Path(folder + ".begun").touch()
        if self.batches == number.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.batches == number.get("signal") and lsgd.rank() == lsgd.size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1 if given.get("by") == "usr1" else signal.SIGTERM)

    def on_test_batch_end(self, batch, logs=None):
        if number.get("signal") == 0 and lsgd.rank() == lsgd.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


OPTIONS = {"plain": {}, "diloco": {"outer": "diloco"}, "int8": {"compression": "int8"}, "overlap": {"overlap": 1}}
options = {"sync_every": number.get("every", 3)} | OPTIONS[given.get("options", "plain")]


def data():
    generator = np.random.default_rng(7 + lsgd.rank())
    samples = number.get("samples", 40) + 8 * number.get("more", 0) * lsgd.rank()
    x = generator.normal(size=(samples, 6)).astype("float32")
    y = (x @ np.arange(6) + generator.normal(size=samples)).astype("float32")[:, None]
    kind = given.get("data", "arrays")
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": 4}
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(samples)
    if kind == "dataset":
        return {"x": dataset.batch(4)}
    if kind == "unknown":
        return {"x": dataset.batch(4).filter(lambda x, y: True)}
    return {"x": dataset.repeat().batch(4), "steps_per_epoch": samples // 4 - 1}


def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays)).hexdigest()[:16]


def fit():
    wide = number.get("wide", 8)
    layers = [keras.layers.Dense(wide), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    callbacks = [lsgd.LocalSGDCallback(**options)] if front == "callback" else []
    if front == "optimizer":
        optimizer = lsgd.LocalSGDOptimizer(optimizer, **options)
    model.compile(optimizer, "mse", metrics=["mae"])
    history = keras.callbacks.History()
    checkpoint = lsgd.LocalSGDCheckpoint(folder, number.get("rounds", 2), exit_status=number.get("status", 75))
    model.fit(
        **data(),
        epochs=number.get("epochs", 3),
        verbose=0,
        callbacks=[*callbacks, checkpoint, Interrupt(), history],
        validation_data=(np.ones((8, 6), "float32"), np.ones((8, 1), "float32")),
    )
    kept = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
    loss = history.history["loss"][-1] if history.epoch else None
    print(f"rank {lsgd.rank()} holds {digest(kept)} loss {loss} iterations {int(model.optimizer.iterations.numpy())}")


def loop():
    np.random.seed(3 + lsgd.rank())
    size, steps = number.get("wide", 100), number.get("steps", 60)
    x, moment = np.zeros(size, np.float32), np.zeros(size, np.float32)
    targets = np.random.normal(size=steps)
    minutes = float(given["minutes"]) if "minutes" in given else None
    checkpoint = Checkpoints(folder, number.get("rounds", 2), exit_status=number.get("status", 75), max_minutes=minutes)
    averager = lsgd.ModelAverager([x], checkpoint=checkpoint, state=[moment], **options)
    interrupt = Interrupt()
    averager.begin()
    for step in range(averager.steps, steps):
        interrupt.on_train_batch_begin(step)
        moment[:] = 0.9 * moment + (x - targets[step]) + np.random.normal(size=size).astype("float32")
        x -= 0.05 * moment
        averager.step()
        interrupt.on_train_batch_end(step)
    averager.finish()
    print(f"rank {lsgd.rank()} holds {digest([x, moment])} steps {averager.steps}")


if __name__ == "__main__":
    loop() if front == "averager" else fit()
