"""``hvd-localsgd run``: what it starts, where, for how long; on real ranks."""

import sys
import time

import psutil
import pytest

from hvd_localsgd.tools import launch

from . import launched

# In one piece: between two, the other rank's would come.
SAY = "import sys; from mpi4py import MPI; print(' '.join(['rank', str(MPI.COMM_WORLD.rank), sys.executable, *sys.argv]) + '\\n', end='')"


def run(*words, timeout=60, environment=None):
    line = [sys.executable, "-m", "hvd_localsgd.tools.cli", "run", *words]
    return launched.start(line, timeout, environment)


def lines(result):
    assert result.status == 0, result.output
    return sorted(line.split("rank ", 1)[1] for line in result.output.splitlines() if "rank " in line)


def test_a_script_and_its_arguments(tmp_path):
    script = tmp_path / "x.py"
    script.write_text(SAY)
    result = run("-np", "2", str(script), "-m", "--hosts", "x")
    assert lines(result) == [f"{rank} {sys.executable} {script} -m --hosts x" for rank in (0, 1)]


@pytest.mark.parametrize("name", ["python", sys.executable])
def test_python_itself_is_a_program_and_no_script(name, tmp_path):
    """It used to be read as a script: source code cannot contain null bytes."""
    script = tmp_path / "x.py"
    script.write_text(SAY)
    result = run("-np", "2", name, str(script), "--flag", environment={"PATH": "/usr/bin:/bin"})
    assert lines(result) == [f"{rank} {sys.executable} {script} --flag" for rank in (0, 1)]


def test_a_module_with_options_of_its_own_on_named_hosts_labelled(tmp_path):
    (tmp_path / "module.py").write_text(SAY)
    environment = {"PYTHONPATH": f"{tmp_path}:{launched.ROOT}"}
    words = ["--label", "--hosts", "localhost:2", "-np", "2", "-m", "module", "--flag", "word"]
    result = run(*words, environment=environment)
    assert lines(result) == [f"{rank} {sys.executable} {tmp_path / 'module.py'} --flag word" for rank in (0, 1)]
    for line in result.output.splitlines():
        if "rank " in line:
            label, rank = line.split("rank ", 1)
            assert rank[0] in label, "the rank that wrote it"


def test_ranks_that_are_not_through_are_stopped(tmp_path):
    script = tmp_path / "x.py"
    script.write_text(f"import os, time; open(f'{tmp_path}/{{os.getpid()}}', 'w').close(); time.sleep(300)")
    began = time.monotonic()
    result = run("-np", "2", "--timeout", "6", str(script))
    assert result.status == 124, result.output
    assert "stopped, because it was not through after 6 s" in result.output
    assert time.monotonic() - began < 40
    ranks = [int(file.name) for file in tmp_path.iterdir() if file.name.isdigit()]
    assert len(ranks) == 2
    while alive := [rank for rank in ranks if psutil.pid_exists(rank) and psutil.Process(rank).status() != "zombie"]:
        assert time.monotonic() - began < 60, alive
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-np", "2", "none.py"], "there is no file 'none.py', and no such program on PATH"),
        (["-np", "2"], "what is to be run?"),
        (["-np", "0", "-m", "this"], "ranks must be >= 1. Received: 0"),
        (
            ["-np", "1", "--hosts", "a b", "-m", "this"],
            "--hosts must be like node1:4,node2:4 (name:ranks). Received: 'a b'",
        ),
        (["-np", "1", "--timeout", "nan", "-m", "this"], "--timeout must be seconds > 0. Received: nan"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(words, said):
    result = run(*words)
    assert result.status == 2
    assert f"hvd-localsgd: {said}" in result.output
    assert "Traceback" not in result.output


def test_hosts_as_intel_mpi_wants_them(tmp_path, monkeypatch):
    """Which is not here: a program that gives its name."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'Intel(R) MPI Library for Linux* OS, Version 2021.18.1'\n")
    mpirun.chmod(0o755)
    monkeypatch.setattr(launch, "find_mpirun", lambda: str(mpirun))
    assert launch.command(4, ["x"], "a:2,b:2")[0] == [str(mpirun), "-hosts", "a,b", "-perhost", "2", "-np", "4", "x"]
    assert launch.command(2, ["x"], "a,b")[0] == [str(mpirun), "-hosts", "a,b", "-np", "2", "x"]
    with pytest.raises(ValueError, match="the same number of ranks on every host"):
        launch.command(2, ["x"], "a:1,b:2")
