"""Jobs that die, or are asked to end, and go on: real ranks, real signals."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from . import launched
from .test_slurm import pytestmark as needs_slurm

PROGRAM = "tests/programs/resumed_program.py"


def run(ranks, *arguments, timeout=120, **environment):
    return launched.mpirun(ranks, PROGRAM, *map(str, arguments), timeout=timeout, environment=environment)


def holds(result):
    """What the ranks say that they hold."""
    assert result.status == 0, result.output
    return sorted(re.findall(r"rank \d holds .*", result.output))


def test_a_loop_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    expected = holds(run(2, "averager", tmp_path / "whole"))
    assert len(expected) == 2
    killed = run(2, "averager", tmp_path / "killed", "kill=25", "pause=20")  # which give the thread time to write
    assert killed.status == 137, killed.output
    result = run(2, "averager", tmp_path / "killed")
    assert "goes on from round" in result.output, result.output
    assert holds(result) == expected


@pytest.mark.parametrize(("signal", "status"), [("by=term", 75), ("by=usr1", 3)])
def test_a_signal_on_one_rank_ends_all_with_a_status(signal, status, tmp_path):
    result = run(2, "averager", tmp_path, "signal=20", signal, f"status={status}")
    assert result.status == status, result.output
    assert re.search(r"rank 1 on \S+ is asked to end: SIG(TERM|USR1)", result.output), result.output
    assert result.output.count("all ranks end with exit status") == 1, result.output
    assert "holds" not in result.output
    pointer = json.loads((tmp_path / "latest").read_text())
    assert (tmp_path / f"round-{pointer['round']:08d}" / "manifest.json").exists()


def test_fit_with_the_optimizer_is_killed_and_other_ranks_go_on(tmp_path):
    """The callback's, and the same bits, are in tests/collective/test_checkpoints.py: here a process of its own each time."""
    killed = run(2, "optimizer", tmp_path, "kill=17", "pause=20")
    assert killed.status == 137, killed.output
    result = run(1, "optimizer", tmp_path)
    assert result.status == 0, result.output
    assert "which 2 ranks have written; not taken over: which samples of the epoch were seen" in result.output


@pytest.mark.parametrize(
    ("front", "data", "before", "now", "step", "steps"),
    [
        ("optimizer", "arrays", 2, 1, 5, 6 + 1),  # twice 6 batches are more than the 10 there are: the last is to come
        ("callback", "unknown", 1, 2, 5, 6 + 11),  # from its start; TensorFlow counts the step in which data end
        ("callback", "arrays", 2, 1, 10, 10),  # the epoch's data had ended
        ("callback", "arrays", 1, 2, 10, 10),
    ],
)
def test_other_ranks_come_to_the_end_of_an_epoch(front, data, before, now, step, steps, tmp_path):
    """``step`` of 10 is the one after which the last rank is asked to end."""
    arguments = ("rounds=1", "epochs=1", f"data={data}")
    stopped = run(before, front, tmp_path, f"signal={step}", *arguments)
    assert stopped.status == 75, stopped.output
    ranks = holds(run(now, front, tmp_path, *arguments))
    assert len(ranks) == now
    assert all(rank.endswith(f"iterations {steps}") for rank in ranks), ranks
    losses = {float(loss) for loss in re.findall(r"loss (\S+)", "\n".join(ranks))}
    assert len(losses) == 1
    assert 0 < losses.pop() < 100, ranks
    if before == 1 and step == 10:  # what one rank has seen is what both say
        whole = holds(run(1, front, tmp_path / "whole", *arguments))
        assert re.findall(r"loss (\S+)", whole[0]) == re.findall(r"loss (\S+)", ranks[0])


def test_time_runs_out(tmp_path):
    result = run(2, "averager", tmp_path, "pause=100", "steps=1000", "minutes=0.1", timeout=60)
    assert result.status == 75, result.output
    assert re.search(r"is asked to end: the time limit", result.output), result.output


def test_a_few_random_kills(tmp_path):
    """All 50, and of ``fit``: python benchmarks/faults/resume_kills.py."""
    line = [
        sys.executable,
        "benchmarks/faults/resume_kills.py",
        "--kills",
        "3",
        "--front",
        "averager",
        "--longest",
        "1",
    ]
    result = launched.start([*line, "--output", str(tmp_path / "kills.json"), "pause=10", "wide=200000"], 120)
    assert result.status == 0, result.output
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert kills["kills"] == 3
    assert kills["jobs that ended in the same bits"] == kills["jobs"] >= 1


COMMANDS = """
id=$(sbatch --parsable --ntasks-per-node=1 --output={folder}/out examples/slurm/requeued.sbatch {program} averager {folder}/checkpoints pause=150 steps=120)
for i in $(seq 100); do [ -e {folder}/checkpoints.begun ] && break; sleep 0.2; done
scancel --signal=USR1 $id
for i in $(seq 300); do
  state=$(scontrol show job $id | grep -o 'JobState=[A-Z]*')
  case $state in
    *COMPLETED) exit 0;;
    # SLURM waits two minutes, for what is left of the first life to end: some seconds are needed.
    *PENDING) grep -q "asked to end" {folder}/out && sleep 5 && scontrol update JobId=$id StartTime=now 2>/dev/null && sleep 5;;
    *FAILED) exit 3;;
  esac
  sleep 0.5
done
exit 2
"""


@needs_slurm
def test_sbatch_requeues_a_job_that_was_asked_to_end(tmp_path):
    """On two nodes, by the job file of the examples."""
    os.chmod(tmp_path, 0o755)
    commands = COMMANDS.format(folder=tmp_path, program=launched.ROOT / PROGRAM)
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    cluster = ["tests/slurm_cluster", "--nodes", "2", "--share", str(tmp_path)]
    result = launched.start([*cluster, "bash", "-c", commands], 240, path)
    output = result.output + (tmp_path / "out").read_text()
    assert result.status == 0, output
    assert "ended with 75" in output, output
    assert "life 1 ended with 0" in output, output
    assert re.search(r"rank \d on node[12] is asked to end", output), output
    assert "goes on from round" in output, output
    assert len(re.findall(r"rank \d holds", output)) == 2, output
