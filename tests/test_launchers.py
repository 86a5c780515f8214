"""Who started this process, from what launchers tell; those that run here are asked for real elsewhere (test_doctor.py, test_slurm.py)."""

from pathlib import Path

import pytest

from hvd_localsgd.communicators import launchers
from hvd_localsgd.communicators.launchers import base, slurm

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_UNIVERSE_SIZE": "8", "PMIX_RANK": "3"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "PMI_FD": "9", "MPI_LOCALNRANKS": "2"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "2"}
PMI2 = {"PMI_SIZE": "5", "PMI_RANK": "2", "PMI_JOBID": "1.0"}
ALL = [
    ({}, ("no launcher", 1, 0)),
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, ("no launcher", 1, 0)),  # a shell of salloc or sbatch
    (OPEN_MPI, ("mpirun of Open MPI", 4, 3)),
    (HYDRA, ("mpirun of MPICH (Hydra)", 4, 3)),
    (HYDRA | {"I_MPI_HYDRA_UUID": "1-2"}, ("mpirun of Intel MPI", 4, 3)),
    (STEP, ("srun", 5, 2)),
    (STEP | {"PMIX_RANK": "2"}, ("srun", 5, 2)),
    (STEP | PMI2, ("srun", 5, 2)),
    (STEP | OPEN_MPI, ("mpirun of Open MPI", 4, 3)),  # started in the step
    (STEP | PMI2 | HYDRA, ("mpirun of MPICH (Hydra)", 4, 3)),
    ({"PALS_RANKID": "1", "PMI_SIZE": "6", "PMI_RANK": "1"}, ("mpiexec of PALS", 6, 1)),
    ({"JSM_NAMESPACE_SIZE": "7", "JSM_NAMESPACE_RANK": "6", "PMIX_RANK": "6"}, ("jsrun of LSF", 7, 6)),
    (
        {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"},
        ("horovodrun --gloo", 2, 1),
    ),
    ({"PMIX_RANK": "1"}, ("a launcher that is not known here", 1, 1)),
    ({"OMPI_COMM_WORLD_SIZE": "no number"}, ("mpirun of Open MPI", 1, 0)),
]


@pytest.mark.parametrize(("environment", "expected"), ALL)
def test_launchers_are_told_apart(environment, expected):
    found = launchers.detect(environment)
    assert (found.launcher, found.size, found.rank) == expected
    assert found.slots == (8 if "OMPI_UNIVERSE_SIZE" in environment else None)


def test_one_process_of_srun_needs_nobody_and_one_of_mpirun_joins():
    assert not launchers.detect(STEP | {"SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"}).joins
    assert launchers.detect({"OMPI_COMM_WORLD_SIZE": "1"}).joins


OPEN_MPI_4, OPEN_MPI_5 = "Open MPI v4.1.8, package: x, ident: 4.1.8", "Open MPI v5.0.11, package: x"
MPICH = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ofi\n"


@pytest.mark.parametrize(
    ("told", "library", "use"),
    [
        ({}, OPEN_MPI_4, "--mpi=pmix"),
        (PMI2, OPEN_MPI_4, "--mpi=pmix"),
        (PMI2, OPEN_MPI_5, "--mpi=pmix"),
        ({"PMIX_RANK": "0"}, OPEN_MPI_4, None),
        ({"PMIX_RANK": "0"}, MPICH, "--mpi=pmi2"),
        ({"PMIX_RANK": "0"}, MPICH + " --with-pmix=/usr", None),
        (PMI2, MPICH, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, OPEN_MPI_4, "--mpi=pmix"),  # asked for MPI: it gives up even alone
        ({"SLURM_STEP_NUM_TASKS": "1"}, OPEN_MPI_5, None),
        ({}, "Intel(R) MPI Library 2021.13", None),
    ],
)
def test_a_plug_in_that_does_not_fit_is_refused(told, library, use):
    environment = STEP | told
    refusal = slurm.refusal(launchers.detect(environment), environment, library, Path("/nowhere"))
    assert (f"Use srun {use}" in refusal) if use else refusal == ""


def test_an_open_mpi_that_was_built_with_slurms_pmi_is_not_refused(tmp_path):
    (tmp_path / "openmpi").mkdir()
    (tmp_path / "openmpi" / "mca_pmix_s2.so").touch()
    assert slurm.refusal(launchers.detect(STEP | PMI2), STEP | PMI2, OPEN_MPI_4, tmp_path) == ""


def test_an_mpirun_inside_srun_is_not_refused():
    environment = STEP | OPEN_MPI
    assert slurm.refusal(launchers.detect(environment), environment, OPEN_MPI_4, None) == ""


def test_the_first_number_counts():
    assert base.number({"A": "", "B": "7"}, "A", "B", default=1) == 7
    assert base.number({"A": "-1"}, "A", default=1) == 1
