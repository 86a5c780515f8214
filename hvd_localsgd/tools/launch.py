"""Start ranks with whatever mpirun belongs to this Python, with the flags that it needs here."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hvd_localsgd.errors import INSTALL_MPI, CommunicatorError

# As root Open MPI wants to be asked twice. On fewer cores than ranks, a rank that waits must give way.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
_ENDING = 15.0  # seconds that mpirun has to end its ranks
_TIMED_OUT = 124  # as of timeout(1)


def find_mpirun() -> str:
    """The mpirun beside this Python, else the one on PATH.

    Raises:
        CommunicatorError: there is none.
    """
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise CommunicatorError(f"mpirun was not found, neither beside this Python nor on PATH. {INSTALL_MPI}")
    return found


def program(script: str, arguments: Sequence[str]) -> list[str]:
    """The command line of one rank: a Python script by this Python; a program, such as ``python`` or a compiled one, by itself.

    Raises:
        ValueError: there is no such file, and no such program on PATH.
    """
    if script in ("python", "python3"):
        return [sys.executable, *arguments]
    if Path(script).exists():
        if Path(script).is_dir():
            return [sys.executable, script, *arguments]  # Python runs its __main__.py
        with open(script, "rb") as file:
            return [script, *arguments] if file.read(4) == b"\x7fELF" else [sys.executable, script, *arguments]
    if os.sep not in script and (found := shutil.which(script)):
        return [found, *arguments]
    raise ValueError(
        f"there is no file {script!r}, and no such program on PATH. A module: hvd-localsgd run -np 2 -m module"
    )


def command(
    ranks: int, program: Sequence[str], hosts: str | None = None, label: bool = False
) -> tuple[list[str], dict[str, str]]:
    """What starts ``program`` on ``ranks`` processes: the command line and its environment.

    Args:
        ranks: how many.
        program: the command line of each.
        hosts: where, as in ``"node1:4,node2:4"``; None: on this machine, or where a scheduler says.
        label: whether lines of output are to begin with the rank that wrote them.

    Raises:
        CommunicatorError: there is no mpirun, or it does not run.
        ValueError: ``ranks`` is below 1, or ``hosts`` is no list of hosts.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be >= 1. Received: {ranks}")
    if hosts is not None and not re.fullmatch(r"[\w.-]+(:[1-9]\d*)?(,[\w.-]+(:[1-9]\d*)?)*", hosts):
        raise ValueError(f"--hosts must be like node1:4,node2:4 (name:ranks). Received: {hosts!r}")
    mpirun = find_mpirun()
    try:
        said = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, env=_environment())
    except OSError as error:
        raise CommunicatorError(f"{mpirun} does not run: {error}") from error
    if open_mpi := re.search(r"Open MPI\)? v?(\d+)", said.stdout + said.stderr):
        flags = ["--oversubscribe", "--bind-to", "none"]
        flags += ["--host", hosts] if hosts else []
        flags += (["--tag-output"] if int(open_mpi[1]) < 5 else ["--output", "tag"]) if label else []
    else:
        flags = _hydra_hosts(hosts, said.stdout) if hosts else []
        flags += ["-prepend-rank"] if label else []
    return [mpirun, *flags, "-np", str(ranks), *program], _environment()


def _hydra_hosts(hosts: str, version: str) -> list[str]:
    """MPICH takes the number of ranks with each host, Intel MPI one for all hosts."""
    if "Intel" not in version:
        return ["-hosts", hosts]
    names, counts = zip(*(host.partition(":")[::2] for host in hosts.split(",")), strict=True)
    if len(set(counts)) > 1:
        raise ValueError(f"--hosts: Intel MPI wants the same number of ranks on every host. Received: {hosts!r}")
    return ["-hosts", ",".join(names), *(["-perhost", counts[0]] if counts[0] else [])]


def _environment() -> dict[str, str]:
    return {**os.environ, **{key: os.environ.get(key, value) for key, value in _OPEN_MPI.items()}}


def run(
    ranks: int, program: Sequence[str], hosts: str | None = None, label: bool = False, timeout: float | None = None
) -> int:
    """Run ``program`` as ``command`` says; its exit status, or 124 if it was stopped after ``timeout`` seconds.

    Raises:
        CommunicatorError, ValueError: as ``command``; ``timeout`` is not a number of seconds > 0.
    """
    if timeout is not None and not 0 < timeout < math.inf:
        raise ValueError(f"--timeout must be seconds > 0. Received: {timeout}")
    line, environment = command(ranks, program, hosts, label)
    with subprocess.Popen(line, env=environment) as process:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            print(f"hvd-localsgd: stopped, because it was not through after {timeout:g} s", file=sys.stderr, flush=True)
            process.terminate()  # mpirun then ends its ranks
            try:
                process.wait(_ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
            return _TIMED_OUT
