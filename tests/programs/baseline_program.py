"""The Horovod baseline on real ranks equals one process with the big batch."""

import os

os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import horovod.tensorflow as hvd

hvd.init()

import keras
import numpy as np

from benchmarks.horovod_baseline import BroadcastFromRank0, average_gradients
from tests.collective import reference

model = reference.make_model(batch_normalization=False, seed=3 + hvd.rank())
model.compile(average_gradients(keras.optimizers.SGD(0.1, momentum=0.9)), "mse")
x, y = reference.data(hvd.rank(), 6)
model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[BroadcastFromRank0()])

big = reference.compiled(keras.optimizers.SGD(0.1, momentum=0.9), batch_normalization=False)
parts = [reference.data(k, 6) for k in range(hvd.size())]
for start in range(0, 48, 8):
    big.train_on_batch(*(np.concatenate([p[i][start : start + 8] for p in parts]) for i in (0, 1)))
reference.assert_close(model, big)
