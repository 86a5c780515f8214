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


HOSTS = """
import sys

sys.modules["tensorflow"] = None  # whose import takes longer than all the rest
import numpy as np
import hvd_localsgd as lsgd

weights = np.array([1.0 + lsgd.rank()])
with lsgd.ModelAverager([weights], sync_every=1, broadcast=False) as averager:
    averager.step()
if lsgd.rank() == 0:
    print(sorted(each["host"] for each in averager.totals), weights)
"""


@pytest.mark.parametrize("job", ["openmpi", "mpirun"])
def test_a_job_file_of_the_examples_trains_on_two_nodes(job, tmp_path):
    os.chmod(tmp_path, 0o755)
    (tmp_path / "hosts.py").write_text(HOSTS)
    cluster = ["tests/slurm_cluster", "--nodes", "2", "--share", str(tmp_path)]
    submit = ["sbatch", "--wait", f"--output={tmp_path}/out", f"examples/slurm/{job}.sbatch", f"{tmp_path}/hosts.py"]
    environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = launched.start([*cluster, *submit], 120, environment)
    output = result.output + (tmp_path / "out").read_text()
    assert result.status == 0, output
    assert "['node1', 'node1', 'node2', 'node2'] [2.5]" in output, output


def test_a_rank_that_raises_ends_the_step():
    result = srun("tests/programs/failing_program.py", "raises", timeout=90)
    assert result.status != 0, result.output
    assert "not reached" not in result.output, result.output
    assert re.search(r"^0: .*rank 1 on .* failed: ValueError: trouble in the middle", result.output, re.M), (
        result.output
    )
    assert re.search(r"^1: .*ValueError: trouble in the middle", result.output, re.M), result.output


# The line is written at once: what a rank writes in pieces, mpirun mixes with what others write.
STEPS = r"""
say='import hvd_localsgd as lsgd; lsgd.init(); print(f"rank {lsgd.rank()} of {lsgd.size()}\n", end="")'
echo == no plug-in; srun -n 2 $PYTHON -c "$say"
echo == another plug-in; srun --mpi=pmi2 -n 2 $PYTHON -c "$say"
echo == one process; srun -n 1 $PYTHON -c "$say"
echo == mpi is asked for; srun -n 1 $PYTHON -c "import hvd_localsgd as lsgd; lsgd.init('mpi')"
echo == shell; srun --mpi=pmix -n 1 bash -c "$PYTHON -c '$say'; $PYTHON -c '$say'; true"
echo == mpirun in a shell; srun --mpi=pmix -n 1 bash -c "$MPIRUN $PYTHON -c '$say'; true"
echo == terminal; script -qec "srun --pty bash -c '$PYTHON say.py; true'" /dev/null
echo == doctor without plug-in; srun -n 2 $PYTHON -m hvd_localsgd.tools.cli doctor
echo == doctor; srun --mpi=pmix -n 2 $PYTHON -m hvd_localsgd.tools.cli doctor
echo == end
"""


def test_srun_without_a_plug_in_and_shells_inside_it(tmp_path):
    """A clear error, or one process; never the abort of MPI_Init."""
    (tmp_path / "tensorflow").mkdir()  # which loads at once, and is not what is asked about
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise ModuleNotFoundError('tensorflow')")
    (tmp_path / "say.py").write_text(
        "import hvd_localsgd as lsgd\nlsgd.init()\nprint(f'rank {lsgd.rank()} of {lsgd.size()}')"
    )
    mpirun, variables = launched.launch.command(2, [])
    environment = {
        **variables,
        "PYTHON": sys.executable,
        "MPIRUN": " ".join(mpirun),
        "PYTHONPATH": f"{tmp_path}:{launched.ROOT}",
    }
    steps = STEPS.replace("say.py", str(tmp_path / "say.py"))
    result = launched.start(["tests/slurm_cluster", "bash", "-c", steps], 180, environment)
    parts = dict(re.findall(r"^== (.*?)\r?\n(.*?)(?=^== )", result.output, re.M | re.S))
    ranks = {name: sorted(re.findall(r"rank \d of \d", text)) for name, text in parts.items()}
    assert "MPI_Init" not in result.output, result.output
    assert parts["no plug-in"].count("CommunicatorError: srun started 2 processes without an MPI plug-in") == 2
    assert parts["another plug-in"].count("CommunicatorError: srun started 2 processes with PMI, which Open MPI") == 2
    assert "Use srun --mpi=pmix" in parts["another plug-in"]
    assert ranks["one process"] == ["rank 0 of 1"]
    assert "CommunicatorError: srun started one process without an MPI plug-in" in parts["mpi is asked for"]
    assert ranks["shell"] == ["rank 0 of 1", "rank 0 of 1"]
    assert ranks["mpirun in a shell"] == ["rank 0 of 2", "rank 1 of 2"]
    assert ranks["terminal"] == ["rank 0 of 1"], result.output
    assert "This is a shell inside srun, and what it starts is one process." in parts["terminal"]
    assert parts["doctor without plug-in"].count("Verdict") == 1, "rank 0 alone prints"
    assert "wrong: srun started 2 processes without an MPI plug-in" in parts["doctor without plug-in"]
    assert re.search(r"launcher +srun, 2 started", parts["doctor"]), result.output
    assert re.search(r"ranks talk through +mpi", parts["doctor"]), result.output
