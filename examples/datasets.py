"""Image data sets for the examples and benchmarks: images in [0, 1] with a channel axis, integer labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

Split = tuple[np.ndarray, np.ndarray]


def load(name: str, path: str | None = None) -> tuple[Split, Split]:
    """Train and test split.

    Args:
        name: ``digits`` ships with scikit-learn; ``mnist``, ``fashion_mnist`` and ``cifar10`` are downloaded by Keras.
        path: read this .npz file with Keras' keys instead.

    Raises:
        SystemExit: the file cannot be used; says why.
    """
    if path is not None:
        train, test = _from_file(Path(path))
    elif name == "digits":
        train, test = _digits()
    else:
        import keras

        train, test = getattr(keras.datasets, name).load_data()
    return _prepare(*train), _prepare(*test)


def _from_file(path: Path) -> tuple[Split, Split]:
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise SystemExit(f"{path} lacks {missing}; it has {sorted(file)}. Keras' keys are {keys}.")
            return (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data: {path} cannot be read as an .npz file: {error}") from error


def _digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order] / 16 * 255, digits.target[order]
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def _prepare(images: np.ndarray, labels: np.ndarray) -> Split:
    images = images.astype("float32") / 255
    return (images[..., None] if images.ndim == 3 else images), labels.reshape(-1).astype("int32")
