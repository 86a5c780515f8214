"""Run programs on real MPI ranks, with a limit on time and every rank's output in the failure."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from hvd_localsgd.tools import launch

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
    result = start(line, timeout, {**defaults, **(environment or {})})
    return Result(result.status, whole_lines(result.output))


_TAG = re.compile(r"(\[1,\d+\]<std(?:out|err)>:)")


def whole_lines(output: str) -> str:
    """What mpirun tagged, one rank's stream after the other: what a rank writes in pieces others come between."""
    before, *pieces = _TAG.split(output)
    streams: dict[str, str] = {}
    for tag, piece in zip(pieces[::2], pieces[1::2], strict=True):
        streams[tag] = streams.get(tag, "") + piece
    return before + "".join(f"{tag}{line}\n" for tag, text in streams.items() for line in text.splitlines())


def assert_all_pass(launcher: Callable[..., Result], ranks: int, folder: Path, *selection: str, **arguments) -> None:
    """Every rank passes or skips each test that pytest collects for a selection. Ranks write their results to ``folder``."""
    collection = start([sys.executable, "-m", "pytest", "--collect-only", "-q", *selection], 120)
    collected = re.search(r"^(\d+)(?:/\d+)? tests? collected", collection.output, re.M)
    assert collected, collection.output
    own_file = f"--junitxml={folder}/$OMPI_COMM_WORLD_RANK.xml"  # which pytest expands, on each rank
    result = launcher(ranks, "-m", "pytest", "-q", "--color=no", own_file, *selection, **arguments)
    assert result.status == 0, _with_failures(result, folder, ranks)
    for rank in range(ranks):
        (suite,) = ElementTree.parse(folder / f"{rank}.xml").getroot()
        numbers = [int(suite.attrib[key]) for key in ("tests", "failures", "errors")]
        assert numbers == [int(collected[1]), 0, 0], f"rank {rank} of {ranks}\n{_with_failures(result, folder, ranks)}"


def _with_failures(result: Result, folder: Path, ranks: int) -> str:
    """The output; last, where a long log is not cut, each rank's tests that failed, with the end of what pytest shows of them."""
    found = [result.output]
    for rank in range(ranks):
        try:
            results = ElementTree.parse(folder / f"{rank}.xml")
        except (OSError, ElementTree.ParseError):
            found.append(f"rank {rank} has not come to the end of its tests")
            continue
        for case in results.iter("testcase"):
            found += [
                f"rank {rank}: {case.attrib['name']}\n{(part.text or '')[-1500:]}"
                for part in case
                if part.tag in ("failure", "error")
            ]
    return "\n".join(found)
