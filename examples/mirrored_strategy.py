"""Gradients averaged over a process' devices at every step, weights over processes every H steps.

mpirun -np 2 python examples/mirrored_strategy.py (on a machine without GPUs each rank uses two logical CPUs).
"""

import hvd_localsgd as lsgd

lsgd.init()

import keras
import tensorflow as tf
from datasets import load

if not tf.config.list_physical_devices("GPU"):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy()

(x_train, y_train), (x_test, y_test) = load("digits")
with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input(x_train.shape[1:]),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), sync_every=8)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])

x, y = lsgd.shard((x_train, y_train))
model.fit(x, y, batch_size=32, epochs=20, verbose=2 if lsgd.rank() == 0 else 0)

if lsgd.rank() == 0:
    loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"{strategy.num_replicas_in_sync} devices in each of {lsgd.size()} ranks")
    print(f"test accuracy {accuracy:.3f}")
