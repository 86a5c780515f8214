"""Two logical CPU devices on each rank: gradients averaged inside at every step, weights outside every H steps."""

import contextlib
import os

os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import hvd_localsgd as lsgd

lsgd.init()

import keras
import numpy as np
import tensorflow as tf
from mpi4py import MPI

from tests.collective import reference

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
gather = MPI.COMM_WORLD.allgather
INTERVAL, BATCHES, BATCH = 3, 8, 8


def make():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def assert_like_reference(model, **arguments):
    models, _ = reference.local_sgd(make, INTERVAL, [BATCHES] * lsgd.size(), batch=BATCH, norm=False, **arguments)
    reference.assert_close(model, models[0])
    for variable in model.trainable_variables:
        first, second = (c.numpy() for c in strategy.experimental_local_results(variable.value))
        np.testing.assert_array_equal(first, second, err_msg="the devices of a rank must agree")
    everyone = gather([w.tobytes() for w in model.get_weights()])
    assert all(other == everyone[0] for other in everyone)


x, y = reference.data(lsgd.rank(), BATCHES, BATCH)
fit = {"batch_size": BATCH, "shuffle": False, "verbose": 0}

with strategy.scope():
    model = reference.compiled(lsgd.LocalSGDOptimizer(make(), sync_every=INTERVAL), batch_normalization=False)
model.fit(x, y, **fit)
assert_like_reference(model)
assert [r.last_step for r in model.optimizer.timings if r.interval] == [3, 6, 8]

with strategy.scope():
    model = reference.compiled(make(), batch_normalization=False)
model.fit(x, y, callbacks=[lsgd.LocalSGDCallback(sync_every=INTERVAL)], **fit)
assert_like_reference(model)

# A custom loop: strategy.run around apply_gradients.
with strategy.scope():
    model = reference.make_model(batch_normalization=False)
    optimizer = lsgd.LocalSGDOptimizer(make(), sync_every=INTERVAL)
    optimizer.build(model.trainable_variables)


@tf.function
def train_step(xs, ys):
    def replica(xs, ys):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(xs, training=True) - ys) ** 2) / BATCH
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    strategy.run(replica, args=(xs, ys))


dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
for batch in strategy.experimental_distribute_dataset(dataset):
    train_step(*batch)
optimizer.finalize_variable_values(model.trainable_variables)
assert_like_reference(model)


# Control variates: the same on replicas, whose gradients are summed, as on a rank of one device (which its own tests look at).
ends = []
for scope in (strategy.scope(), contextlib.nullcontext()):
    with scope:
        inner = keras.optimizers.SGD(0.05)
        model = reference.compiled(
            lsgd.LocalSGDOptimizer(inner, INTERVAL, control_variates=True), batch_normalization=False
        )
    model.fit(x, y, **fit)
    ends.append(model.get_weights())
for replicated, alone in zip(*ends, strict=True):
    np.testing.assert_allclose(replicated, alone, rtol=1e-5, atol=1e-6)


class Replicas(keras.callbacks.Callback):
    """Each replica's values at each batch end, as this place in the list of callbacks sees them."""

    def on_train_begin(self, logs=None):
        self.taken = []

    def on_train_batch_end(self, batch, logs=None):
        values = [strategy.experimental_local_results(v.value) for v in self.model.variables if "seed" not in v.path]
        self.taken.append([[np.array(replica.numpy(), "float64") for replica in value] for value in values])


# BatchNormalization under the strategy: each replica's statistics count.
with strategy.scope():
    model = reference.compiled(make())
before, after = Replicas(), Replicas()
model.fit(x, y, callbacks=[before, lsgd.LocalSGDCallback(sync_every=INTERVAL), after], **fit)
for batch in (INTERVAL - 1, 2 * INTERVAL - 1):
    local = gather(before.taken[batch])
    assert any((one != other).any() for one, other in before.taken[batch]), "replicas hold statistics of their own"
    for i, result in enumerate(after.taken[batch]):
        mean = np.mean([replica for own in local for replica in own[i]], axis=0)
        for replica in result:
            np.testing.assert_allclose(replica, mean, rtol=1e-5, atol=1e-6)
everyone = gather([c.numpy().tobytes() for v in model.variables for c in strategy.experimental_local_results(v.value)
                   if "seed" not in v.path])  # fmt: skip
assert all(other == everyone[0] for other in everyone)
print("mirrored program: all is well")
