"""Local SGD written a second time, slowly, with plain Keras and numpy, to check the package against.

One process plays all ranks: a model and an optimizer for each. Nothing here imports hvd_localsgd.
"""

import keras
import numpy as np

FEATURES = 6


def data(rank: int, batches: int, batch: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A rank's own samples: regression with a little noise, differently distributed on each rank."""
    random = np.random.default_rng([seed, rank])
    x = (random.normal(size=(batches * batch, FEATURES)) + 0.3 * rank).astype("float32")
    y = (x @ np.linspace(-1, 1, FEATURES) + 0.5 + 0.1 * random.normal(size=len(x))).astype("float32")
    return x, y[:, None]


def make_model(batch_normalization: bool = True, seed: int = 3) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((FEATURES,)), keras.layers.Dense(5, activation="tanh")]
    if batch_normalization:
        layers.append(keras.layers.BatchNormalization(momentum=0.8))
    return keras.Sequential([*layers, keras.layers.Dense(1)])


def compiled(optimizer, batch_normalization: bool = True, **arguments) -> keras.Model:
    model = make_model(batch_normalization)
    model.compile(optimizer, "mse", **arguments)
    return model


def averaged(models) -> None:
    """Every model gets the mean of all, in float64, rounded once."""
    means = [np.mean(np.array(v, "float64"), axis=0) for v in zip(*(m.get_weights() for m in models), strict=True)]
    for model in models:
        model.set_weights([mean.astype("float32") for mean in means])


def slots(optimizer) -> list:
    return [v for v in optimizer.variables if len(v.shape)]


def local_sgd(
    make_optimizer, interval, batches, *, epochs=1, batch=8, state="keep", weighting="equal", norm=True, flush=True
):
    """Algorithm 1 of Stich (2018) on ``len(batches)`` ranks; rank k has batches[k] batches an epoch.

    A round gives each rank up to ``interval`` steps; ranks that took none have weight zero.
    ``batch``: samples in a batch, of all ranks or of each. ``weighting``: "equal", or by the "samples" of the round.
    ``flush``: a shorter round ends each epoch (the callback does that; the optimizer knows no epochs).
    Returns the models (equal after the last round) and the optimizers.
    """
    size = len(batches)
    batch = np.broadcast_to(batch, size)
    models = [compiled(make_optimizer(), norm) for _ in range(size)]
    for model in models:
        model.optimizer.build(model.trainable_variables)
    parts = [data(k, batches[k], batch[k]) for k in range(size)]
    pending = np.zeros(size, int)

    def sync():
        share = pending * batch if weighting == "samples" else pending > 0
        if not share.any():
            return
        share = share / share.sum()
        for variables in zip(*(m.variables for m in models), strict=True):
            if "seed" not in variables[0].path:
                mean = sum(w * v.numpy().astype("float64") for w, v in zip(share, variables, strict=True))
                for variable in variables:
                    variable.assign(mean.astype("float32"))
        if state == "average":
            for variables in zip(*(slots(m.optimizer) for m in models), strict=True):
                mean = sum(w * v.numpy().astype("float64") for w, v in zip(share, variables, strict=True))
                for variable in variables:
                    variable.assign(mean.astype("float32"))
        elif state == "reset":
            for model in models:
                for variable in slots(model.optimizer):
                    variable.assign(np.zeros(variable.shape, "float32"))
        pending[:] = 0

    stretches = [batches] * epochs if flush else [[epochs * own for own in batches]]
    for stretch in stretches:
        for step in range(max(stretch)):
            for k, model in enumerate(models):
                if step < stretch[k]:
                    start = step % batches[k] * batch[k]
                    model.train_on_batch(*(part[start : start + batch[k]] for part in parts[k]))
                    pending[k] += 1
            if pending.max() == interval:
                sync()
        sync()
    return models, [m.optimizer for m in models]


def assert_same_everywhere(gather, model) -> None:
    """Bit-identical on all ranks."""
    own = [v.numpy().tobytes() for v in model.variables if "seed" not in v.path]
    everyone = gather(own)
    for rank, other in enumerate(everyone):
        assert other == everyone[0], f"rank {rank} ended with other weights than rank 0"


def assert_close(model, expected, tolerance=2e-5) -> None:
    for variable, other in zip(model.variables, expected.variables, strict=True):
        if "seed" not in variable.path:
            np.testing.assert_allclose(
                variable.numpy(), other.numpy(), rtol=tolerance, atol=tolerance, err_msg=variable.path
            )
