"""Local SGD without Keras: logistic regression in plain numpy. mpirun -np 4 python examples/plain_numpy.py"""

import numpy as np
from sklearn.datasets import load_digits

import hvd_localsgd as lsgd

images, labels = load_digits(return_X_y=True)
x, y = np.c_[images / 16, np.ones(len(images))], np.eye(10)[labels]
order = np.random.default_rng(0).permutation(len(x))  # the same on all ranks
own, test = order[300:][lsgd.rank() :: lsgd.size()], order[:300]
random = np.random.default_rng(lsgd.rank())
weights = np.zeros((65, 10))

with lsgd.ModelAverager([weights], sync_every=16) as averager:
    for _ in range(2000):
        rows = random.choice(own, 32)
        likelihood = np.exp(x[rows] @ weights)
        likelihood /= likelihood.sum(axis=1, keepdims=True)
        weights -= 0.5 / 32 * x[rows].T @ (likelihood - y[rows])
        averager.step()

if lsgd.rank() == 0:
    accuracy = np.mean((x[test] @ weights).argmax(axis=1) == labels[test])
    print(f"test accuracy {accuracy:.3f}")
