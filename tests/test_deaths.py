"""Ranks are killed while they train, under an MPI with ULFM (Open MPI 5, in an environment of its own): the others go on."""

import json
import re

import numpy as np
import pytest

from hvd_localsgd.core.checkpoints import Folder

from . import launched
from .programs import dying_sequence, steps

PYTHON = launched.ROOT / ".venv-ulfm" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="there is no Open MPI 5: make .venv-ulfm/ready")
ENVIRONMENT = {f"{prefix}_ALLOW_RUN_AS_ROOT{end}": "1" for prefix in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
ENVIRONMENT |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}


def start(ranks, program, *arguments, environment=None):
    mpirun = f"{PYTHON.with_name('mpirun')} --with-ft ulfm --oversubscribe --bind-to none".split()
    return launched.start(
        [*mpirun, "-np", str(ranks), str(PYTHON), program, *arguments], 150, {**ENVIRONMENT, **(environment or {})}
    )


def train(ranks, *kills, front_end="averager", options=None, more=(), environment=None):
    arguments = ["--front-end", front_end, "--options", json.dumps(options or {})]
    arguments += [part for kill in kills for part in ("--kill", kill)]
    return start(ranks, "benchmarks/faults/dying.py", *arguments, *more, environment=environment)


def assert_survived(result, ranks, size):
    assert result.status == 0, result.output
    ends = re.findall(r"rank (\d) ended as (\d) of (\d): same=True finite=True", result.output)
    expected = [(str(rank), str(place), str(size)) for place, rank in enumerate(ranks)]
    assert sorted(ends) == expected, result.output


CASES = {
    "rank 0 in an allreduce": (("0:allreduce:0",), {"options": {"outer": "slowmo"}}),
    "in an outer step, of groups": (("1:outer:0.0005",), {"options": {"groups": [[0, 1], [2]], "guard": None}}),
    "an average in flight": (("1:flight:0",), {"options": {"overlap": 2}}),
    "compressed": (("1:allreduce:0.001",), {"options": {"compression": "int8"}}),
    "at train begin": (("2:begin:0",), {}),
    "at train end": (("1:train_end:0",), {}),
    "after its training": (("0:after:0",), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_others_go_on_with_the_same_weights(case):
    kills, more = CASES[case]
    result = train(3, *kills, **more)
    assert_survived(result, sorted({0, 1, 2} - {int(kill[0]) for kill in kills}), 2)


@pytest.mark.parametrize("number", range(4))
def test_what_is_left_is_what_numpy_says(number):
    """Any steps and sync times, two models, one to three of four ranks that die in any step."""
    result = start(dying_sequence.RANKS, "tests/programs/dying_sequence.py", str(number))
    assert result.status == 0, result.output
    counts, times, kills = dying_sequence.drawn(number)
    held = {int(rank): json.loads(text) for rank, text in re.findall(r"rank (\d) holds (\{.*?\}) \.", result.output)}
    assert sorted(held) == sorted(set(range(len(counts))) - {rank for rank, _ in kills}), result.output
    for model, every in enumerate(times):
        expected = steps.simulated(counts, model, dying_sequence.SHAPES, "float64", every, died=kills)
        for found in held.values():
            assert found["size"] == len(held)
            for array, value in zip(found["values"][model], expected, strict=True):
                np.testing.assert_allclose(np.reshape(array, value.shape), value, rtol=1e-12, atol=1e-12)
    assert len({json.dumps(found["values"]) for found in held.values()}) == 1


def test_two_die_one_after_another_and_the_optimizer_goes_on():
    result = train(3, "0:header:0", "1:allreduce:0.01", front_end="optimizer")
    assert_survived(result, [2], 1)
    assert "rank 0 on" in result.output, result.output


def test_what_the_dead_rank_had_of_a_dataset_is_dealt_out_anew():
    result = train(3, "1:steps:0", front_end="callback", more=["--shard"])
    assert_survived(result, [0, 2], 2)
    assert result.output.count("batches in each epoch: [20, 30, 30, 30]") == 2, result.output  # of 960 samples, by 16


def test_on_failure_abort_ends_the_job():
    result = train(3, "1:allreduce:0", options={"on_failure": "abort"})
    assert result.status != 0, result.output
    assert "ended as" not in result.output
    assert re.search(r"rank 1 on \S+ has died\. Under on_failure", result.output), result.output


def test_a_rank_that_hangs_is_given_up_and_killed():
    environment = {"HVD_LOCALSGD_STALL_WARNING": "2", "HVD_LOCALSGD_STALL_TIMEOUT": "5"}
    result = train(3, "2:stop:0", environment=environment)
    assert_survived(result, [0, 1], 2)
    assert re.search(
        r"rank 0 on \S+ has waited for \d s; not here: rank 2 on \S+ \(last seen at local step \d+\)", result.output
    )
    assert re.search(r"rank \d on \S+ has waited for \d s, and has killed rank 2 on", result.output), result.output


def test_while_a_checkpoint_is_written(tmp_path):
    result = train(3, "1:checkpoint:0", more=["--checkpoints", str(tmp_path)])
    assert_survived(result, [0, 2], 2)
    folder = Folder(tmp_path, 0)
    number, _ = folder.found()["rounds"][-1]
    manifest = folder.manifest(number)
    assert manifest["ranks"] == 2
    assert all(folder.read(manifest, rank) for rank in range(2))
