"""Train a small CNN with Keras and Local SGD: mpirun -np 2 python examples/keras_fit.py --sync-every 16."""

import argparse

import hvd_localsgd as lsgd

lsgd.init()  # before TensorFlow is used, so that each rank gets its own GPU or share of the cores

import keras
from datasets import load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--dataset", choices=["digits", "mnist", "fashion_mnist", "cifar10"], default="digits")
parser.add_argument("--data", help="an .npz file with Keras' keys x_train, y_train, x_test, y_test")
parser.add_argument("--sync-every", type=int, default=16, help="H, local steps between two averages")
parser.add_argument("--epochs", type=int, default=None, help="default: 20 for digits, else 1")
parser.add_argument("--batch-size", type=int, default=32, help="per rank")
parser.add_argument("--timings", help="folder for one JSON-lines file per rank")
args = parser.parse_args()

(x_train, y_train), (x_test, y_test) = load(args.dataset, args.data)
keras.utils.set_random_seed(1 + lsgd.rank())
model = keras.Sequential(
    [
        keras.Input(x_train.shape[1:]),
        keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])

x, y = lsgd.shard((x_train, y_train))
callback = lsgd.LocalSGDCallback(sync_every=args.sync_every, timings=args.timings)
epochs = args.epochs or (20 if len(x_train) < 10_000 else 1)
model.fit(x, y, batch_size=args.batch_size, epochs=epochs, callbacks=[callback], verbose=2)

if lsgd.rank() == 0:
    loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"test accuracy {accuracy:.3f}")
