"""Trains while ranks are killed, and says what became of it.

mpirun --with-ft ulfm -np 4 python benchmarks/faults/dying.py --kill 1:allreduce:0 --kill 2:steps:0.003 --front-end optimizer

Each ``--kill RANK:PLACE:SECONDS`` sends that rank SIGKILL so many seconds after it has come to a place in the middle of training.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import hvd_localsgd as lsgd
from hvd_localsgd import devices
from hvd_localsgd.communicators.mpi import MPICommunicator
from hvd_localsgd.core import engine, keeper, overlap, pipeline
from hvd_localsgd.core.survivors import Survivors

SECONDS = 100  # for the whole training

# The call in which, and the how manieth of them.
PLACES: dict[str, tuple[Any, str, int]] = {
    "begin": (pipeline.Pipeline, "start", 1),
    "steps": (engine.LocalSGD, "step", 10),
    "header": (MPICommunicator, "exchange", 25),
    "pack": (pipeline.Pipeline, "_out", 12),
    "allreduce": (MPICommunicator, "allreduce", 20),
    "outer": (pipeline.Pipeline, "_close", 8),
    "flight": (overlap._Flight, "run", 5),
    "checkpoint": (keeper._Writing, "run", 3),
    "epoch_end": (engine.LocalSGD, "meet", 4),
    "train_end": (engine.LocalSGD, "finish", 1),
    "stop": (engine.LocalSGD, "step", 10),
    "node": (engine.LocalSGD, "step", 10),
    "after": (engine.LocalSGD, "finish", 1),
}


def die(place: str) -> None:
    """At once, and without a word; ``node``: with MPI's daemon on this host; ``stop``: only stand still."""
    if place == "node":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGSTOP if place == "stop" else signal.SIGKILL)


def die_at(place: str, seconds: float) -> None:
    """So many seconds after the call has begun, or, ``after``, when it has ended."""
    holder, name, count = PLACES[place]
    plain, calls = getattr(holder, name), [0]

    def call(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] != count:
            return plain(*arguments, **named)
        result = plain(*arguments, **named) if place == "after" else None
        if seconds == 0:
            die(place)
        threading.Timer(seconds, die, [place]).start()
        return result if place == "after" else plain(*arguments, **named)

    setattr(holder, name, call)


def main() -> None:
    """Prints a line for each rank that is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill", action="append", default=[], metavar="RANK:PLACE:SECONDS", help=", ".join(PLACES))
    parser.add_argument("--front-end", choices=("callback", "optimizer", "averager"), default="callback")
    parser.add_argument("--shard", action="store_true", help="train on shard() of a Dataset, the same on all ranks")
    parser.add_argument("--checkpoints", help="a folder, for one after every average")
    parser.add_argument("--options", type=json.loads, default={}, help="of Local SGD, as JSON")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # what hangs says where
    signal.alarm(SECONDS + 20)  # and if it is in MPI_Finalize ends by that signal
    if arguments.front_end == "averager":
        sys.modules["tensorflow"] = None  # type: ignore[assignment]  # whose import takes longer than all the rest
    lsgd.init()
    communicator = devices.get()
    me = communicator.rank
    for rank, place, seconds in (kill.split(":") for kill in arguments.kill):
        if int(rank) == me:
            die_at(place, float(seconds))
    data = np.random.default_rng(me)
    x = data.normal(size=(640, 16)).astype("f4")
    y = x.sum(1, keepdims=True)
    settings = {"sync_every": 4, "on_failure": "continue", **arguments.options}
    if arguments.front_end == "averager":
        weights, loss = averager(x, y, settings, arguments.checkpoints)
    else:
        weights, loss = keras_fit(arguments.front_end, x, y, settings, arguments.shard, arguments.checkpoints)
    same = len(set(Survivors(communicator, True).gather(hashlib.sha256(weights.tobytes()).digest()))) == 1
    finite = bool(np.isfinite(weights).all() and np.isfinite(loss))
    print(f"rank {me} ended as {lsgd.rank()} of {lsgd.size()}: same={same} finite={finite} loss={loss:.5f}", flush=True)


def averager(x: np.ndarray, y: np.ndarray, settings: dict[str, Any], folder: str | None) -> tuple[np.ndarray, float]:
    """Weights and loss of least squares."""
    weights = np.zeros((16, 1), np.float32)
    checkpoint = None if folder is None else keeper.Checkpoints(folder, 1)
    training = lsgd.ModelAverager([weights], checkpoint=checkpoint, **settings)
    training.tell(rate=0.01)
    with training:
        for step in range(160):
            batch = slice(16 * step % 640, 16 * step % 640 + 16)
            weights -= 0.01 * x[batch].T @ (x[batch] @ weights - y[batch]) / 16
            time.sleep(0.005)
            training.step()
    return weights, float(np.mean((x @ weights - y) ** 2))


def keras_fit(
    front_end: str, x: np.ndarray, y: np.ndarray, settings: dict[str, Any], shard: bool, folder: str | None
) -> tuple[np.ndarray, float]:
    """Weights and loss of a small network."""
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(16, "relu"), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((16,)), *layers])
    inner = keras.optimizers.SGD(0.01, momentum=0.9)
    callbacks: list[Any] = []
    if front_end == "optimizer":
        model.compile(lsgd.LocalSGDOptimizer(inner, statistics=model.non_trainable_variables, **settings), "mse")
    else:
        model.compile(inner, "mse")
        callbacks = [lsgd.LocalSGDCallback(**settings)]
    batches = []
    count = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: batches.append(0),
        on_train_batch_end=lambda batch, logs: batches.append(batches.pop() + 1),
    )
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    if shard:
        rows = np.random.default_rng(0).normal(size=(960, 16)).astype("f4")
        data = lsgd.shard(tf.data.Dataset.from_tensor_slices((rows, rows.sum(1, keepdims=True)))).batch(16)
    if folder is not None:
        callbacks.append(lsgd.LocalSGDCheckpoint(folder, 1))
    history = model.fit(data, epochs=4, verbose=0, callbacks=[*callbacks, count])
    print(f"batches in each epoch: {batches}", flush=True)
    return np.concatenate([v.ravel() for v in model.get_weights()]), history.history["loss"][-1]


if __name__ == "__main__":
    main()
