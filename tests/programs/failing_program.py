"""One thing goes wrong on one rank: python tests/programs/failing_program.py WHAT."""

import os
import signal
import sys
import threading
import time

os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
what = sys.argv[1].removeprefix("async_").removeprefix("overlap_")
mode = "async" if sys.argv[1].startswith("async_") else "sync"
overlap = (
    3 if sys.argv[1].startswith("overlap_") else 0
)  # from step 4, which is batch 3, to step 7 an average is on its way

import hvd_localsgd as lsgd

lsgd.init()

import keras
import numpy as np

odd = lsgd.rank() == 1


class Trouble(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if odd and batch == 3 and what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if odd and batch == 5:
            if what == "raises":
                raise ValueError("trouble in the middle of an epoch")
            if what == "exits":
                sys.exit(3)
            if what == "interrupts":
                raise KeyboardInterrupt
            if what == "dies":
                os._exit(9)
            if what == "nan_row":  # which no batch looks up: neither the loss nor a gradient shows it
                embedding = self.model.layers[0]
                embedding.embeddings.assign(np.where(np.arange(500)[:, None] == 333, np.nan, embedding.embeddings))


def batches():
    for number in range(100):
        if odd and number == 20:
            sys.exit(3)
        yield np.ones((4, 2)), np.ones((4, 1))


def schedule(step):
    if odd and step == 8:
        sys.exit(3)
    return 4


def loop():
    """Of the user's, compiled: rank 1 fails between two steps."""
    import tensorflow as tf

    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.001), sync_every=4)
    weight = keras.Variable(np.ones((2, 1), "float32"))

    @tf.function
    def step():
        optimizer.apply([tf.ones((2, 1))], [weight])

    for number in range(20):
        step()
        if odd and number == 5:
            raise ValueError("trouble in the middle of an epoch")


if what == "loop_raises":
    loop()
if what.startswith("raises_before_training") and odd:
    raise KeyError("trouble before training")
if what == "raises_before_training_unheard":
    time.sleep(60)
units = 4 if odd and what == "shape" else 3
sync_every = {"zero": 0, "optimizer_schedule_exits": schedule}.get(what, 4)
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(units), keras.layers.Dense(1)])
if what in ("nan_row", "killed"):
    rows = 500 if what == "nan_row" else 500_000  # the average of so many takes a while
    layers = [keras.layers.Embedding(rows, 8), keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((2,)), *layers])
x, y = np.ones((400, 2), "float32"), np.ones((400, 1), "float32")
if what == "empty_shard":
    x, y = lsgd.shard((x[:1], y[:1]))
if what == "nan" and odd:
    x = x * np.nan
optimizer = keras.optimizers.SGD(0.001)
if what == "optimizer_shape" or what.startswith("optimizer"):
    units = 4 if odd and what == "optimizer_shape" else 3
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(units), keras.layers.Dense(1)])
    model.compile(lsgd.LocalSGDOptimizer(optimizer, sync_every=sync_every), "mse")
    if what == "optimizer_raises":
        what = "raises"
    try:
        model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[Trouble()])
    except (lsgd.RankFailed, ValueError) as error:
        print("caught", type(error).__name__, flush=True)
        raise
else:
    model.compile(optimizer, "mse")
    callback = lsgd.LocalSGDCallback(sync_every=sync_every, mode=mode, overlap=overlap)
    arguments = {"x": batches()} if what == "generator_exits" else {"x": x, "y": y, "batch_size": 4}
    if what == "thread_raises":
        what = "raises"
        run = {"target": model.fit, "kwargs": {**arguments, "verbose": 0, "callbacks": [callback, Trouble()]}}
        threading.Thread(**run, daemon=True).start()
        time.sleep(60)
    more = [keras.callbacks.ModelCheckpoint("/dev/null/model.keras")] if what == "rank_0_cannot_write" else []
    if what == "backup_on_one_rank" and odd:
        more = [keras.callbacks.BackupAndRestore("/dev/null/backup")]
    try:
        model.fit(**arguments, epochs=3, verbose=0, callbacks=[callback, Trouble(), *more])
    except lsgd.RankFailed:
        print("finite here:", all(np.isfinite(w).all() for w in model.get_weights()), flush=True)
        raise
print("not reached")
