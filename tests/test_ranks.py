"""The tests in tests/collective on 2 and 4 real MPI ranks; plain pytest runs them on one."""

import pytest

from . import launched


@pytest.mark.parametrize("ranks", [2, 4])
def test_collective(ranks, tmp_path):
    selection = ["-m", "not alone and not layouts and not pairs" if ranks > 2 else "not alone"]
    launched.assert_all_pass(launched.mpirun, ranks, tmp_path, *selection, "tests/collective", timeout=1800)


def test_what_failed_on_which_rank_is_said_last(tmp_path):
    """The end of a long log is what is kept of it."""
    file = tmp_path / "test_odd.py"
    file.write_text(
        "import os\ndef test_rank():\n    assert os.environ['OMPI_COMM_WORLD_RANK'] == '0', 'an odd rank'\n"
    )
    with pytest.raises(AssertionError) as failure:
        launched.assert_all_pass(launched.mpirun, 2, tmp_path, str(file))
    said = str(failure.value).splitlines()
    assert "rank 1: test_rank" in said
    assert any("an odd rank" in line for line in said[said.index("rank 1: test_rank") :])


def test_a_mirrored_strategy_of_one_device_is_the_first_thing_that_a_process_does():
    alone = "tests/collective/test_saving.py::test_under_a_mirrored_strategy"
    result = launched.mpirun(2, "-m", "pytest", "-q", "--color=no", alone, timeout=120)
    assert result.status == 0, result.output
    assert result.output.count("1 passed") == 2, result.output


def test_mirrored_strategy_on_two_logical_devices():
    result = launched.mpirun(2, "-m", "tests.programs.mirrored_program", timeout=180)
    assert result.status == 0, result.output
    assert result.output.count("mirrored program: all is well") == 2, result.output
