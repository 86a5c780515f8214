"""Local SGD in a GradientTape loop: mpirun -np 2 python examples/custom_loop.py."""

import hvd_localsgd as lsgd

lsgd.init()

import keras
import tensorflow as tf
from datasets import load

(x_train, y_train), (x_test, y_test) = load("digits")
model = keras.Sequential(
    [
        keras.Input(x_train.shape[1:]),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(10),
    ]
)
optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.Adam(3e-3), sync_every=8, statistics=model.non_trainable_variables)
loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@tf.function
def train_step(images, labels):
    """One local step; every eighth one ends with an average over the ranks."""
    with tf.GradientTape() as tape:
        loss = loss_function(labels, model(images, training=True))
    optimizer.apply_gradients(
        zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
    )
    return loss


samples = tf.data.Dataset.from_tensor_slices((x_train, y_train))
for _epoch in range(20):
    for images, labels in lsgd.shard(samples).shuffle(2000).batch(32):
        loss = train_step(images, labels)
optimizer.finalize_variable_values(model.trainable_variables)  # the last average; waits for slower ranks

if lsgd.rank() == 0:
    accuracy = (keras.ops.convert_to_numpy(model(x_test)).argmax(-1) == y_test).mean()
    print(f"test accuracy {accuracy:.3f}")
