"""Kills ranks at random moments, job after job: do the others go on, alike, and how long does it take?

python benchmarks/faults/kills.py --kills 100 --json runs/kills.json

It needs an MPI with ULFM beside this Python: Open MPI 5. What ``dying.py`` trains, on 2 to 4 ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report

from hvd_localsgd.core.checkpoints import Folder
from hvd_localsgd.tools import launch

PLACES = (
    "begin",
    "steps",
    "header",
    "pack",
    "allreduce",
    "outer",
    "flight",
    "checkpoint",
    "epoch_end",
    "train_end",
    "after",
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"outer": "slowmo"},
    {"compression": "int8"},
    {"groups": [[0, 1], [2, 3]]},
    {"fragments": 2},
    {"guard": "outliers", "clip_change": 10.0},
)
HANGS = 100  # seconds after which something must be wrong
LIMIT = 180  # and nobody waits any more


def scenario(number: int) -> dict[str, Any]:
    """The how manieth job; its place goes round, all else is drawn."""
    draw = random.Random(number)
    place = PLACES[number % len(PLACES)]
    ranks = draw.choice((2, 3, 3, 4))
    dead = draw.sample(range(ranks), draw.choice((1, 1, 2)) if ranks > 2 else 1)
    places = [place] + [draw.choice((place, *PLACES[1:6]))] * (len(dead) - 1)  # at once, or one after another
    front_end = "callback" if place == "epoch_end" else draw.choice(("callback", "optimizer", "averager"))
    options = dict(draw.choice(OPTIONS))
    if place == "flight":
        options = {"overlap": 2}
    if ranks < 4:
        options.pop("groups", None)
    kills = [
        f"{rank}:{where}:{draw.choice((0, 0, draw.uniform(0, 0.01)))}" for rank, where in zip(dead, places, strict=True)
    ]
    return {"ranks": ranks, "place": place, "kills": kills, "front_end": front_end, "options": options}


def attempt(case: dict[str, Any]) -> dict[str, Any]:
    """One job; what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        return _attempt(case, folder if case["place"] == "checkpoint" else None)


def _attempt(case: dict[str, Any], folder: str | None) -> dict[str, Any]:
    arguments = [each for kill in case["kills"] for each in ("--kill", kill)]
    arguments += ["--front-end", case["front_end"], "--options", json.dumps(case["options"])]
    arguments += ["--checkpoints", folder] if folder is not None else []
    program = [sys.executable, str(Path(__file__).with_name("dying.py")), *arguments]
    line, environment = launch.command(case["ranks"], program)
    line[1:1] = ["--with-ft", "ulfm"]
    began = time.monotonic()
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # mpirun then ends the ranks
        output, _ = process.communicate()
    ends = re.findall(r"rank (\d) ended as \d of \d: same=True finite=True", output)
    dead = {kill.split(":")[0] for kill in case["kills"]}
    alive = set(map(str, range(case["ranks"]))) - dead
    killed = case["place"] == "after" or not dead & set(ends)  # who is killed as it ends may have said so before
    hung = time.monotonic() - began > HANGS
    ended = not hung and process.returncode == 0 and alive <= set(ends)
    good = killed and ended and (folder is None or is_whole(folder, len(alive)))
    seconds = [float(each) for each in re.findall(r"go on after ([\d.]+) s", output)]
    return {
        **case,
        "status": process.returncode,
        "survivors": len(alive),
        "good": good,
        "recovery_s": max(seconds, default=None),
        "wall_s": time.monotonic() - began,
        "output": "" if good else output[-8000:],
    }


def is_whole(path: str, ranks: int) -> bool:
    """Whether the latest checkpoint is of so many ranks, and all of it can be read."""
    folder = Folder(path, 0)
    number, _ = folder.found()["rounds"][-1]
    manifest = folder.manifest(number)
    return manifest["ranks"] == ranks and all(folder.read(manifest, rank) for rank in range(ranks))


def main() -> int:
    """0 if every job ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="jobs")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--json", type=Path, default=Path("runs/kills.json"))
    arguments = parser.parse_args()
    rows = []
    for number in range(arguments.first, arguments.first + arguments.kills):
        row = attempt(scenario(number))
        rows.append(row)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": report.software(), "rows": rows}, indent=1))
        took = "" if row["recovery_s"] is None else f"{1e3 * row['recovery_s']:.0f} ms"
        print(
            number,
            "good" if row["good"] else "BAD",
            row["ranks"],
            *row["kills"],
            row["front_end"],
            row["options"],
            took,
            flush=True,
        )
        if not row["good"]:
            print(row["output"], flush=True)
    report.show("Ranks killed", summary(rows), ("place", "jobs", "good", "recovery_median_s", "recovery_max_s"))
    return 0 if all(row["good"] for row in rows) else 1


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each place, and one for all."""
    by_place = {place: [row for row in rows if row["place"] == place] for place in PLACES} | {"all": rows}
    found = []
    for place, own in by_place.items():
        seconds = sorted(row["recovery_s"] for row in own if row["recovery_s"] is not None)
        if own:
            found.append(
                {
                    "place": place,
                    "jobs": len(own),
                    "good": sum(row["good"] for row in own),
                    "recovery_median_s": seconds[len(seconds) // 2] if seconds else None,
                    "recovery_max_s": max(seconds, default=None),
                }
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
