"""What tests of several front ends share."""

import keras
import numpy as np

from . import reference


class Snapshots(keras.callbacks.Callback):
    """Copies of all averaged variables at each batch end, as this place in the list of callbacks sees them."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def on_train_batch_end(self, batch, logs=None):
        self.taken.append([np.array(v.numpy()) for v in self.model.variables if "seed" not in v.path])


class Epochs(keras.callbacks.Callback):
    """The logs of each epoch, as this place in the list of callbacks sees them, without what is each rank's own."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append({k: v for k, v in logs.items() if "seconds" not in k and k != "averaging"})


def fit(lsgd, model, rank_batches, callback, *, epochs=1, batch=8, callbacks=(), **arguments):
    x, y = reference.data(lsgd.rank(), rank_batches, batch)
    return model.fit(
        x, y, batch_size=batch, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback, *callbacks], **arguments
    )
