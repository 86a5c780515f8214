"""A training that is interrupted, and goes on: ``resumed_program.py front folder [name=value ...]``. At the end each rank prints what it holds.

``kill=N``: all ranks kill themselves with SIGKILL after N batches of this life. ``signal=N``: rank 1 gets a SIGTERM then.
"""

import hashlib
import os
import signal
import sys

os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
front, folder = sys.argv[1:3]
given = dict(each.split("=") for each in sys.argv[3:])
number = {name: int(value) for name, value in given.items() if value.lstrip("-").isdigit()}

import hvd_localsgd as lsgd

lsgd.init()
import keras
import numpy as np
import tensorflow as tf

keras.utils.set_random_seed(3 + lsgd.rank())
tf.config.experimental.enable_op_determinism()


class Interrupt(keras.callbacks.Callback):
    """After so many batches; ``kill_after`` waits a moment first, for a file that is being written."""

    batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.batches == number.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.batches == number.get("signal") and lsgd.rank() == lsgd.size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1 if given.get("by") == "usr1" else signal.SIGTERM)

    def on_test_batch_end(self, batch, logs=None):
        if number.get("signal") == 0 and lsgd.rank() == lsgd.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


OPTIONS = {
    "plain": {},
    "growing": {"sync_every": lsgd.Growing()},
    "slowmo": {"outer": "slowmo"},
    "diloco": {"outer": "diloco", "clip_change": 5.0, "guard": "outliers"},
    "int8": {"compression": "int8"},
    "overlap": {"overlap": 1},
    "adam outside": {"outer": keras.optimizers.Adam(0.01)},
    "fragments": {"fragments": 3},
    "variates": {"control_variates": True},
    "groups": {"groups": lsgd.Groups([[0], [1]], every=2)},
    "average": {"optimizer_state": "average"},
}
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
    return {"x": dataset.repeat().batch(4), "steps_per_epoch": samples // 4 - 1}


def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays)).hexdigest()[:16]


def fit():
    wide = number.get("wide", 8)
    layers = [keras.layers.Dense(wide), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(1)])
    sgd = given.get("options") == "variates"
    optimizer = keras.optimizers.SGD(0.01) if sgd else keras.optimizers.SGD(0.01, momentum=0.9)
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
    generator = np.random.default_rng(7 + lsgd.rank())
    x, moment = np.zeros(100, np.float32), np.zeros(100, np.float32)
    checkpoint = lsgd.LocalSGDCheckpoint(folder, number.get("rounds", 2))
    averager = lsgd.ModelAverager([x], checkpoint=checkpoint, state=[moment], **options)
    interrupt = Interrupt()
    averager.begin()
    targets = generator.normal(size=(200, 100)).astype("float32")
    for step in range(averager.steps, 60):
        moment[:] = 0.9 * moment + (x - targets[step]) + np.random.normal(size=100).astype("float32")
        x -= 0.05 * moment
        averager.step()
        interrupt.on_train_batch_end(step)
    averager.finish()
    print(f"rank {lsgd.rank()} holds {digest([x, moment])} steps {averager.steps}")


if __name__ == "__main__":
    loop() if front == "averager" else fit()
