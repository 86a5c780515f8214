"""The same tests over real Horovod, and the same weights as over MPI. `make test` builds Horovod before."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from . import launched

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed: make horovod"
)
IN_PLACE = ("-m", "not layouts")  # Horovod takes tensors, not their memory
METHODS = [
    f"tests/collective/test_methods.py::test_{test}"
    for test in (
        "two_models_whose_averages_are_on_their_way_at_once",
        "each_method_and_each_pair_is_numpys[compression=int8, overlap=1]",
        "each_method_and_each_pair_is_numpys[compression=bf16, groups=halves]",
        "each_method_and_each_pair_is_numpys[overlap=1, fragments=3]",
        "each_method_and_each_pair_is_numpys[overlap=1, groups=halves]",
    )
]
METHODS_IN_FIT = [
    f"tests/collective/test_methods.py::test_each_method_in_fit[{test}]"
    for test in (
        "compression=int8-optimizer",
        "overlap=1-callback",
        "overlap=1, outer=diloco, fragments=2-optimizer",
        "groups=halves-callback",
    )
]
CHOSEN = {"HVD_LOCALSGD_COMMUNICATOR": "horovod"}


def horovodrun(ranks, *program, timeout=300, environment=None):
    line = [str(Path(sys.executable).parent / "horovodrun"), "-np", str(ranks), sys.executable, *program]
    path = {"PATH": f"{Path(sys.executable).parent}:{launched.os.environ['PATH']}"}
    return launched.start(line, timeout, {**path, **(environment or {})})


@needs_horovod
def test_parts_under_horovodrun(tmp_path):
    selection = (*IN_PLACE, "tests/collective/test_parts.py")
    launched.assert_all_pass(horovodrun, 2, tmp_path, *selection, timeout=300, environment=CHOSEN)


@needs_horovod
def test_front_ends_over_horovod_under_mpirun(tmp_path):
    front_ends = ("tests/collective/test_callback.py", "tests/collective/test_optimizer.py")
    selection = (*IN_PLACE, *front_ends, *METHODS, *METHODS_IN_FIT)
    launched.assert_all_pass(launched.mpirun, 2, tmp_path, *selection, timeout=900, environment=CHOSEN)


@needs_horovod
def test_parts_over_horovod_on_four_ranks(tmp_path):
    selection = (*IN_PLACE, "tests/collective/test_parts.py", *METHODS)
    launched.assert_all_pass(launched.mpirun, 4, tmp_path, *selection, timeout=600, environment=CHOSEN)


@needs_horovod
@pytest.mark.parametrize("communicator", ["horovod", "mpi"])
def test_the_example_under_horovodrun(communicator):
    result = horovodrun(2, "examples/keras_fit.py", environment={"HVD_LOCALSGD_COMMUNICATOR": communicator})
    assert result.status == 0, result.output
    accuracy = re.search(r"test accuracy (\d\.\d+)", result.output)
    assert accuracy is not None, result.output
    assert float(accuracy[1]) >= 0.95


@needs_horovod
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_weights_over_mpi_and_horovod(ranks, tmp_path):
    results = {}
    for communicator in ("mpi", "horovod"):
        path = tmp_path / f"{communicator}.npz"
        chosen = {"HVD_LOCALSGD_COMMUNICATOR": communicator}
        # On two ranks the script says so itself, otherwise the environment does.
        program = ("-m", "tests.programs.same_training", str(path), *([communicator] if ranks == 2 else []))
        result = launched.mpirun(ranks, *program, timeout=300, environment={} if ranks == 2 else chosen)
        assert result.status == 0, result.output
        results[communicator] = dict(np.load(path))
        assert results[communicator].pop("communicator") == communicator
        assert results[communicator].pop("size") == ranks
    assert len(results["mpi"]) == 2 * 2 * 8
    for key, weight in results["mpi"].items():
        np.testing.assert_allclose(weight, results["horovod"][key], rtol=2e-5, atol=2e-6, err_msg=key)


@needs_horovod
@pytest.mark.parametrize("first", ["horovod", "package"])
def test_both_in_one_process_in_either_order(first):
    chosen = {"horovod": "horovod", "package": "mpi"}[first]
    refuses = """
def refuses(communicator):  # what mode="async" asks for
    import numpy, hvd_localsgd
    try:
        communicator.share(numpy.zeros(2))
    except hvd_localsgd.CommunicatorError as error:
        return "needs one-sided MPI" in str(error)

"""
    program = (
        refuses
        + {
            "horovod": "import horovod.tensorflow as hvd; hvd.init(); import hvd_localsgd as lsgd; lsgd.init(); ",
            "package": "import hvd_localsgd as lsgd; lsgd.init(); import horovod.tensorflow as hvd; hvd.init(); ",
        }[first]
    ) + (
        "from hvd_localsgd import devices; import tensorflow as tf; from mpi4py import MPI; "
        "c = devices.get(); ours = c.gather(b'x'); theirs = float(hvd.allreduce(tf.constant(1.0), op=hvd.Sum)); "
        f"assert c.name != 'horovod' or refuses(c); seen = (c.name, len(ours), theirs, MPI.COMM_WORLD.allreduce(1)); c.gather(b''); "
        f"assert seen == ({chosen!r}, 2, 2.0, 2), seen"
    )
    result = launched.mpirun(2, "-c", program)
    assert result.status == 0, result.output


@needs_horovod
@pytest.mark.parametrize("what", ["raises", "shape"])
def test_a_failure_reaches_every_rank_over_horovod(what):
    result = launched.mpirun(2, "tests/programs/failing_program.py", what, timeout=90, environment=CHOSEN)
    assert result.status != 0
    assert "not reached" not in result.output
    words = {"raises": "rank 1 on .* failed: ValueError: trouble", "shape": "Ranks hold different models"}[what]
    assert re.search(rf"\[1,0\]<stderr>:.*{words}", result.output), result.output


def test_without_horovod_asking_for_it_says_how_to_get_it():
    program = "import sys; sys.modules['horovod'] = None; import hvd_localsgd; hvd_localsgd.init('horovod')"
    result = launched.start([sys.executable, "-c", program], 60)
    assert result.status != 0
    assert "Horovod for TensorFlow cannot be loaded" in result.output, result.output
    assert "make horovod" in result.output


def test_without_horovod_nothing_mentions_it():
    program = (
        "import sys; sys.modules['horovod'] = None; import numpy as np; import hvd_localsgd as lsgd; import keras; "
        "model = keras.Sequential([keras.layers.Dense(1)]); model.compile('sgd', 'mse'); "
        "model.fit(np.ones((8, 2)), np.ones((8, 1)), callbacks=[lsgd.LocalSGDCallback(2)])"
    )
    result = launched.mpirun(2, "-c", program)
    assert result.status == 0, result.output
    assert "horovod" not in result.output.lower(), result.output


def test_another_communicator_than_the_one_in_use_is_an_error():
    program = "import hvd_localsgd as lsgd; lsgd.init('serial'); lsgd.init(); lsgd.init('mpi')"
    result = launched.start([sys.executable, "-c", program], 60)
    assert result.status != 0
    assert "'serial' is in use already" in result.output
    result = launched.start([sys.executable, "-c", "import hvd_localsgd as lsgd; lsgd.init('tcp')"], 60)
    assert "Received: 'tcp'" in result.output


@needs_horovod
def test_the_baseline_of_the_benchmarks_is_parallel_sgd():
    result = launched.mpirun(2, "-m", "tests.programs.baseline_program")
    assert result.status == 0, result.output
