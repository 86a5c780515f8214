"""Kill a job of all its ranks at random moments, go on until it is done, and compare the bits with a job that was never killed.

    python benchmarks/faults/resume_kills.py --kills 50 --output runs/resume_kills.json

Each life of the job is killed by SIGKILL, all its processes at once, after a time drawn from where its training goes on, in the middle of
writing as well: checkpoints are written at every average. A job that was killed too often goes on unharmed, and the next begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hvd_localsgd.tools import launch

PROGRAM = Path(__file__).resolve().parents[2] / "tests" / "programs" / "resumed_program.py"


def begin(ranks: int, arguments: list[str]) -> subprocess.Popen[str]:
    """A life of the job, in a process group of its own."""
    line, environment = launch.command(ranks, [sys.executable, str(PROGRAM), *arguments])
    return subprocess.Popen(
        line,
        env={**os.environ, **environment, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def family(process: int) -> list[int]:
    """A process and all that it has started."""
    own = Path(f"/proc/{process}/task/{process}/children")
    children = own.read_text().split() if own.exists() else []
    return [process, *(each for child in children for each in family(int(child)))]


def kill(process: subprocess.Popen[str]) -> None:
    """All of it at once: nobody can tell anybody."""
    for each in reversed(family(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.communicate()


def holds(output: str) -> list[str]:
    """What the ranks say that they hold, by rank; empty if they have not come to the end.

    mpirun may put what two of them say on one line.
    """
    return sorted(re.findall(r"rank \d+ holds .*?(?=rank \d+ holds|\n|$)", output))


def same(held: list[str], expected: list[str]) -> bool:
    """Whether these are the same bits. A life that begins when training is over has no loss to say."""
    without = [re.sub(r" loss \S+", " loss None", line) for line in expected]
    return len(held) == len(expected) and all(line in pair for line, *pair in zip(held, expected, without, strict=True))


def latest(folder: Path) -> int:
    """The round that would be gone on from; -1: none."""
    pointer = folder / "latest"
    return json.loads(pointer.read_text())["round"] if pointer.exists() else -1


def half_written(folder: Path) -> bool:
    """Whether a kill has left a checkpoint that does not count."""
    rounds = [path for path in folder.glob("round-*") if not (path / "manifest.json").exists()]
    return bool(rounds) or any(folder.rglob(".*"))


def main() -> None:
    """One job never killed, then jobs that are, until there were so many kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--front", choices=["callback", "optimizer", "averager"], default="callback")
    parser.add_argument(
        "--longest", type=float, default=4.0, help="seconds from where a life trains until it is killed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/resume_kills.json"))
    parser.add_argument("training", nargs="*", help="name=value, for tests/programs/resumed_program.py")
    chosen = parser.parse_args()
    draw, work = random.Random(chosen.seed), Path(tempfile.mkdtemp())
    training = ["rounds=1", *chosen.training]

    def life(folder: Path, seconds: float | None) -> dict[str, Any]:
        began = time.time()
        process = begin(chosen.ranks, [chosen.front, str(folder), *training])
        if seconds is not None:
            before, marks = latest(folder), Path(f"{folder}.begun")
            marks.unlink(missing_ok=True)
            while process.poll() is None and not marks.exists():
                time.sleep(0.02)
            time.sleep(seconds)
            if process.poll() is None:
                kill(process)
                after = latest(folder)
                return {
                    "killed": True,
                    "seconds": time.time() - began,
                    "from": before,
                    "to": after,
                    "half": half_written(folder),
                }
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"a life ended with status {process.returncode}:\n{output}")
        return {"killed": False, "seconds": time.time() - began, "holds": holds(output)}

    expected = life(work / "whole", None)["holds"]
    lives: list[dict[str, Any]] = []
    jobs, exact = 0, 0
    while sum(each["killed"] for each in lives) < chosen.kills:
        folder = work / f"job-{jobs}"
        jobs += 1
        while True:
            enough = sum(each["killed"] for each in lives) >= chosen.kills
            lives.append(life(folder, None if enough else draw.uniform(0, chosen.longest)))
            print(lives[-1], flush=True)
            if not lives[-1]["killed"]:
                break
        exact += same(lives[-1]["holds"], expected)
    kills = [each for each in lives if each["killed"]]
    result = {
        "kills": len(kills),
        "jobs": jobs,
        "jobs that ended in the same bits": exact,
        "kills that left a half checkpoint": sum(each["half"] for each in kills),
        "kills after new checkpoints": sum(each["to"] > each["from"] for each in kills),
        "ranks": chosen.ranks,
        "front": chosen.front,
        "training": training,
        "expected": expected,
        "lives": lives,
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1))
    shutil.rmtree(work)
    for name in list(result)[:7]:
        print(f"{name:36} {result[name]}")
    raise SystemExit(exact != jobs)


if __name__ == "__main__":
    main()
