"""The tests in tests/collective on 2 and 4 real MPI ranks; plain pytest runs them on one."""

import re

import pytest

from . import programs


@pytest.mark.parametrize("ranks", [2, 4])
def test_collective(ranks):
    layouts = ["-k", "not together"] if ranks > 2 else []  # how memory is laid out has nothing to do with their number
    result = programs.mpirun(ranks, "-m", "pytest", "-q", "--color=no", *layouts, "tests/collective", timeout=900)
    passed = [int(n) for n in re.findall(r"\b(\d+) passed", result.output)]
    assert result.status == 0, result.output
    assert len(passed) == ranks, result.output
    assert min(passed) > 80, result.output
    assert "failed" not in result.output, result.output


def test_mirrored_strategy_on_two_logical_devices():
    result = programs.mpirun(2, "-m", "tests.mirrored_program", timeout=180)
    assert result.status == 0, result.output
    assert result.output.count("mirrored program: all is well") == 2, result.output
