"""One way to leave or not to come: python tests/programs/leaving_program.py WHAT; rank 1 is the one that does it."""

import multiprocessing
import os
import signal
import sys
import threading
import time

os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
what = sys.argv[1]

import hvd_localsgd as lsgd

lsgd.init()
odd = lsgd.rank() == 1
if odd and what == "exits with words":
    sys.exit("no data")
if odd and what == "exits with 3":
    sys.exit(3)
if odd and what == "exits with 0":
    sys.exit()
if odd and what == "raises SystemExit":
    raise SystemExit(4)
if odd and what == "raises past another hook":
    sys.excepthook = lambda *error: print("somebody else's hook", file=sys.stderr)
    raise KeyError("lost")
if odd and what == "fails in a thread":
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    sys.exit()
if odd and what == "comes late":
    time.sleep(8)

if odd and what.startswith("stops"):

    def go_on():
        time.sleep(6)
        os.kill(os.getppid(), signal.SIGCONT)

    watcher = multiprocessing.get_context("fork").Process(target=go_on)
    watcher.start()

import keras
import numpy as np

x, y = np.ones((64, 2), "float32"), np.ones((64, 1), "float32")


class Leave(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if odd and batch == 3 and what.startswith("leaves"):
            sys.exit(0)
        if odd and batch == 3 and what == "catches its error":
            raise ValueError("mine")
        if odd and batch == 3 and what == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)


class Hangs(keras.utils.PyDataset):
    """Whose worker, a process of its own, hangs for a while on rank 1."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if odd and index == 5:
            time.sleep(8)
        return x[:4], y[:4]


def main():
    """In a function, whose callbacks are gone when the process ends."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    callbacks = [lsgd.LocalSGDCallback(2), Leave()]
    if what == "leaves the optimizer's fit":
        model.compile(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.01), 2), "mse")
        callbacks = [Leave()]
    else:
        model.compile("sgd", "mse")
    if odd and what == "has no callback":
        callbacks = []
    if odd and what == "never fits":
        return
    if what == "its data hang":
        model.fit(Hangs(workers=1, use_multiprocessing=True), verbose=0, callbacks=callbacks)
        print("reached the end")
        return
    try:
        model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
    except ValueError:
        return
    if what == "fits once" and not odd:
        model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
    print("reached the end")


def in_threads():
    """Twins, whose fits the ranks begin in another order; one waits in its first step for the other to begin."""
    begun, over = threading.Event(), threading.Event()

    class Wait(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            begun.set()
            over.wait(30)

    def fit(model, callbacks):
        try:
            model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
            print("reached the end")
        finally:
            over.set()

    models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in range(2)]
    for model in models:
        model.compile("sgd", "mse")
    first, second = models if odd else models[::-1]
    threads = [threading.Thread(target=fit, args=(first, [lsgd.LocalSGDCallback(2), Wait()]))]
    threads.append(threading.Thread(target=fit, args=(second, [lsgd.LocalSGDCallback(2)])))
    threads[0].start()
    begun.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    in_threads() if what == "fits in two threads" else main()
