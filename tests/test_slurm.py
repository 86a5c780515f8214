"""Under a real SLURM: a cluster of this machine alone, which tests/slurm_cluster starts and ends."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from . import launched

PROGRAMS = all(shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") for name in ("slurmctld", "slurmd", "munged"))
pytestmark = pytest.mark.skipif(
    not (PROGRAMS and os.geteuid() == 0 and list(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so"))),
    reason="needs root, and what .ci/run installs: slurmctld slurmd slurm-client munge libpmix-dev",
)


def srun(*program, timeout):
    line = ["tests/slurm_cluster", "srun", "--mpi=pmix", "--label", "-n", "2", sys.executable, *program]
    return launched.start(line, timeout)


def test_srun_starts_ranks_that_average():
    result = srun("examples/keras_fit.py", timeout=180)
    assert result.status == 0, result.output
    assert "2 ranks" in result.output, result.output
    assert float(re.findall(r"test accuracy ([\d.]+)", result.output)[0]) > 0.95, result.output


def test_a_rank_that_raises_ends_the_step():
    result = srun("tests/programs/failing_program.py", "raises", timeout=90)
    assert result.status != 0, result.output
    assert "not reached" not in result.output, result.output
    assert re.search(r"^0: .*rank 1 on .* failed: ValueError: trouble in the middle", result.output, re.M), (
        result.output
    )
    assert re.search(r"^1: .*ValueError: trouble in the middle", result.output, re.M), result.output
