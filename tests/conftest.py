import os

# Before TensorFlow is imported: 2 cores are all there is, and ranks share them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import pytest
from hypothesis import settings

# All ranks must draw the same examples, and a slow machine is no failure.
settings.register_profile("ranks", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("ranks")


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


@pytest.fixture
def several_ranks(lsgd):
    """For what one rank alone cannot show."""
    if lsgd.size() == 1:
        pytest.skip("there is one rank only")


IN_ONE_ARRAY = [pytest.param(way, marks=pytest.mark.layouts) for way in ("together", "together by the kernel")]


@pytest.fixture(params=["in place", *IN_ONE_ARRAY])
def layout(request, monkeypatch, lsgd):
    """Small variables averaged where they are, or copied into one array, as if there were many of them."""
    from hvd_localsgd.backends.tensorflow import kernel, together

    if request.param == "in place":
        return
    if lsgd.size() == 1:
        pytest.skip("one rank alone averages nothing")
    monkeypatch.setattr(together, "MANY", 1)
    if request.param == "together":
        monkeypatch.setattr(kernel, "load", lambda: None)
    elif kernel.load() is None:
        pytest.skip("the kernel is not built: python -m hvd_localsgd.tools.build_kernel")
