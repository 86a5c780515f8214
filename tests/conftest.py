import os

# Before TensorFlow is imported: 2 cores are all there is, and ranks share them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import pytest
import tensorflow as tf
from hypothesis import settings
from tensorflow.python.data.ops import dataset_ops

# All ranks must draw the same examples, and a slow machine is no failure.
settings.register_profile("ranks", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("ranks")


# tf.data's tuning thread sleeps ever longer, up to a minute, and whoever frees an iterator waits for it to wake up.
_iterate = dataset_ops.DatasetV2._apply_debug_options


def _iterate_untuned(dataset):
    options = tf.data.Options()
    options.autotune.enabled = False
    return _iterate(dataset.with_options(options))


dataset_ops.DatasetV2._apply_debug_options = _iterate_untuned


@pytest.fixture(scope="session")
def lsgd():
    import hvd_localsgd

    hvd_localsgd.init()
    return hvd_localsgd


@pytest.fixture(scope="session")
def gather(lsgd):
    """gather(value) -> list of every rank's value. Independent of the package: plain mpi4py."""
    if lsgd.size() == 1:
        return lambda value: [value]
    from mpi4py import MPI

    return MPI.COMM_WORLD.allgather


@pytest.fixture(params=["in place", "together", "together by the kernel"])
def layout(request, monkeypatch):
    """Small variables averaged where they are, or copied into one array, as if there were many of them."""
    from hvd_localsgd import build_kernel, variables

    if request.param != "in place":
        monkeypatch.setattr(variables, "MANY", 1)
    if request.param == "together":
        monkeypatch.setattr(build_kernel, "load", lambda: None)
    elif "kernel" in request.param and build_kernel.load() is None:
        pytest.skip("the kernel is not built: python -m hvd_localsgd.build_kernel")
