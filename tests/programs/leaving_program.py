"""One way to leave or not to come: python tests/programs/leaving_program.py WHAT; rank 1 is the one that does it."""

import os
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

import keras
import numpy as np

x, y = np.ones((64, 2), "float32"), np.ones((64, 1), "float32")


class Leave(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if odd and batch == 3 and what.startswith("leaves"):
            sys.exit(0)
        if odd and batch == 3 and what == "catches its error":
            raise ValueError("mine")


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
    try:
        model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
    except ValueError:
        return
    if what == "fits once" and not odd:
        model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
    print("reached the end")


main()
