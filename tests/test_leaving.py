"""A rank that leaves, or never comes: the others hear of it, by name, and the job's status is not 0."""

import re

import pytest

from . import launched

WAYS = {
    "exits with words": "has ended .exit status 'no data'",
    "exits with 3": r"has ended .exit status 3\)",
    "exits with 0": "has ended, and others wait for it",
    "raises SystemExit": "has ended",
    "raises past another hook": "failed: KeyError: 'lost'",
    "fails in a thread": "has ended",
    "never fits": "has ended, and others wait for it",
    "has no callback": "has ended",
    "fits once": "has ended",
    "leaves fit": "the process ended in the middle of training",
    "leaves the optimizer's fit": "the process ended in the middle of training",
    "catches its error": "the process ended in the middle of training",
}


def run(what, **environment):
    return launched.mpirun(2, "tests/programs/leaving_program.py", what, timeout=120, environment=environment)


@pytest.mark.parametrize("what", WAYS)
def test_a_rank_that_leaves_is_missed(what):
    result = run(what)
    assert result.status == (3 if what == "exits with 3" else 1), result.output
    assert re.search(rf"(RankFailed|ends): rank 1 on .*{WAYS[what]}", result.output), result.output


def test_a_rank_that_comes_late_is_named_while_the_others_wait():
    result = run("comes late", HVD_LOCALSGD_STALL_WARNING="2")
    assert result.status == 0, result.output
    assert result.output.count("reached the end") == 2, result.output
    assert re.search(r"rank 0 on \S+ has waited for \d s; not here: rank 1 on ", result.output), result.output


@pytest.mark.parametrize("what", ["stops", "its data hang"])
def test_a_rank_that_stands_still_is_named_until_it_goes_on(what):
    result = run(what, HVD_LOCALSGD_STALL_WARNING="2")
    assert result.status == 0, result.output
    assert result.output.count("reached the end") == 2, result.output
    assert re.search(r"rank 0 on \S+ has waited for \d s; not here: rank 1 on ", result.output), result.output


def test_two_fits_in_two_threads_are_refused():
    result = run("fits in two threads")
    assert result.status != 0, result.output
    assert "reached the end" not in result.output, result.output
    assert re.search(r"RuntimeError: Two threads train at the same time \(rank \d on ", result.output), result.output


def test_nobody_is_named_where_all_is_well():
    result = run("nothing")
    assert result.status == 0, result.output
    assert "not here" not in result.output
    assert "has ended" not in result.output


def test_a_rank_that_does_not_come_is_given_up():
    result = run("comes late", HVD_LOCALSGD_STALL_WARNING="1", HVD_LOCALSGD_STALL_TIMEOUT="3")
    assert result.status != 0, result.output
    assert "reached the end" not in result.output, result.output
    assert re.search(r"rank 0 on \S+ has waited for \d s \(stall_timeout=3\) for rank 1 on ", result.output), (
        result.output
    )


@pytest.mark.parametrize("wrong", ["0", "-1"])
def test_patience_is_more_than_nothing(wrong):
    code = f"import hvd_localsgd as lsgd; lsgd.init(stall_timeout={wrong})"
    result = launched.start([launched.sys.executable, "-c", code], 60)
    assert (
        f"stall_warning must be seconds > 0, and stall_timeout too, or None. Received: 60.0, {wrong}" in result.output
    )
