"""Train with every front end and optimizer, and save the weights: python -m tests.programs.same_training FILE [COMMUNICATOR]."""

import os
import sys

os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import hvd_localsgd as lsgd

lsgd.init(*sys.argv[2:])

import keras
import numpy as np

from hvd_localsgd import devices
from tests.collective import reference

saved = {}
for front_end in ("callback", "optimizer"):
    for name in ("sgd", "adam"):
        optimizer = {"sgd": keras.optimizers.SGD(0.05, momentum=0.9), "adam": keras.optimizers.Adam(0.02)}[name]
        model = reference.make_model()
        callbacks = []
        if front_end == "optimizer":
            optimizer = lsgd.LocalSGDOptimizer(optimizer, sync_every=3, statistics=model.non_trainable_variables)
        else:
            callbacks.append(lsgd.LocalSGDCallback(sync_every=3))
        model.compile(optimizer, "mse")
        x, y = reference.data(lsgd.rank(), 7 + lsgd.rank())
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        saved |= {f"{front_end} {name} {i}": weight for i, weight in enumerate(model.get_weights())}
if lsgd.rank() == 0:
    np.savez(sys.argv[1], **saved, communicator=devices.get().name, size=lsgd.size())
