"""Run programs on real MPI ranks, with a limit on time and every rank's output in the failure."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from hvd_localsgd import launch

ROOT = Path(__file__).resolve().parents[1]


class Result:
    def __init__(self, status: int | None, output: str) -> None:
        self.status = status
        self.output = output


def start(line: list[str], timeout: float, environment: dict[str, str] | None = None) -> Result:
    """Run a command line; if it takes too long kill it and everything it started, and fail."""
    process = subprocess.Popen(
        line,
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return Result(process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        raise AssertionError(f"not finished after {timeout} s: {' '.join(line)}\n{output}") from None


def mpirun(
    ranks: int, *program: str, timeout: float = 120, environment: dict[str, str] | None = None, options: list[str] = ()
) -> Result:
    """Run a Python program on so many ranks; each line of the output is tagged with its rank."""
    line, defaults = launch.command(ranks, [sys.executable, *program])
    line[1:1] = ["--tag-output", *options]
    return start(line, timeout, {**defaults, **(environment or {})})
