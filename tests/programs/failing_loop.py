"""One thing goes wrong on rank 1, in a loop without fit: python tests/programs/failing_loop.py averager|optimizer WHAT."""

import os
import sys

os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import numpy as np

import hvd_localsgd as lsgd

front, what = sys.argv[1:]
if front == "averager":
    sys.modules["tensorflow"] = None  # whose import takes longer than all the rest


def fail():
    if what == "raises":
        raise ValueError("trouble in a loop")
    if what == "exits":
        sys.exit(3)
    raise KeyboardInterrupt


def schedule(step):
    if what == "schedule_raises" and step == 8 and lsgd.rank() == 1:
        raise ValueError("trouble in a schedule")
    return 4


def averager():
    weights = np.zeros(3)
    with lsgd.ModelAverager([weights], schedule) as training:
        for step in range(40):
            weights += 1
            training.step()
            yield step


def optimizer():
    """Eagerly."""
    import keras
    import tensorflow as tf

    training = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.001), sync_every=schedule)
    weight = keras.Variable(np.ones((2, 1), "float32"))
    for step in range(40):
        training.apply([tf.ones((2, 1))], [weight])
        yield step


lsgd.init()
try:
    for step in {"averager": averager, "optimizer": optimizer}[front]():
        if lsgd.rank() == 1 and step == 5 and what != "schedule_raises":
            fail()
except Exception as error:
    print(f"caught {type(error).__name__}", flush=True)
    raise
print("not reached")
