"""One averaging of the same variables on the same ranks: ours, Horovod's allreduce, PyTorch's and Accelerate's Local SGD.

python benchmarks/peers/compare.py --ranks 2 --models resnet50 --json runs/peers.json

PyTorch and Accelerate are installed once, into runs/peers-environment, unless --python names a Python that has them. Without
Horovod its row is left out. Every rank starts a process of the peers' environment; ours and theirs never run at once.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report
import shapes
import sync_cost

HERE = Path(__file__).resolve().parent


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each model and way."""
    rows: report.Rows = []
    for name in arguments.models:
        ours = sync_cost.measure_model(name, arguments.repeats)
        seconds = {"hvd_localsgd": ours["sync_s"] + ours["next_step_extra_s"]}
        seconds |= {way: float(np.median(times)) for way, times in horovod(name, arguments.repeats).items()}
        seconds |= {way: float(np.median(times)) for way, times in torch(name, arguments).items()}
        for way, value in seconds.items():
            row = {
                "model": name,
                "ranks": ours["ranks"],
                "transport": ours["transport"],
                "way": way,
                "average_s": value,
            }
            rows.append(row | {"ours ÷ theirs": seconds["hvd_localsgd"] / value})
    return rows


def horovod(name: str, repeats: int) -> dict[str, list[float]]:
    """Horovod's grouped allreduce of all weights, assigned, in a compiled function: as fast as its users get it."""
    try:
        import horovod.tensorflow as hvd
    except ImportError:
        return {}
    import tensorflow as tf

    hvd.init()
    own = [tf.Variable(tf.zeros(shape)) for shape in shapes.MODELS[name]()]

    @tf.function(autograph=False)
    def average() -> None:
        values = hvd.grouped_allreduce([v.read_value() for v in own], op=hvd.Average, name=f"weights.{name}")
        for variable, value in zip(own, values, strict=True):
            variable.assign(value)

    times = []
    for turn in range(repeats + 2):
        report.slowest(0.0)
        began = time.perf_counter()
        average()
        elapsed = report.slowest(time.perf_counter() - began)
        if turn >= 2:
            times.append(elapsed)
    return {f"Horovod {_version('horovod')} allreduce of the weights": times}


def torch(name: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """A process of the peers' environment per rank; rank 0's results."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    with socket.socket() as probe:
        probe.bind(("", 0))
        mine = (socket.gethostbyname(socket.gethostname()) if _several_hosts() else "127.0.0.1", probe.getsockname()[1])
    host, port = world.bcast(mine)
    own = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PMI_"))}
    own |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    own |= {"LOCAL_RANK": os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(world.rank)), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [arguments.python, str(HERE / "torch_peers.py")],
        input=json.dumps({"shapes": shapes.MODELS[name](), "repeats": arguments.repeats}),
        env=own,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    return world.bcast(json.loads(process.stdout) if world.rank == 0 else None)


def environment(folder: Path) -> str:
    """The Python of the peers' environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-r", str(HERE / "requirements.txt")], check=True)
        (folder / "ready").touch()
    return str(python)


def _several_hosts() -> bool:
    return report.transport() == "network"


def _version(package: str) -> str:
    from importlib import metadata

    return metadata.version(package)


def draw(figure: Any, rows: report.Rows) -> None:
    """A bar for each way."""
    label = {"average_s": "one averaging"}
    report.bars(figure, rows, lambda row: f"{row['way']}\n{row['model']}, {row['ranks']} ranks", label, "seconds")


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=7)
    parser.add_argument("--models", nargs="+", choices=sorted(shapes.MODELS), default=["resnet50", "transformer"])
    parser.add_argument("--python", help="of an environment with torch and accelerate")
    arguments = parser.parse_args()
    if arguments.python is None and not report.under_launcher():
        arguments.python = environment(Path("runs/peers-environment"))
        sys.argv += ["--python", arguments.python]
    if arguments.python is None:
        parser.error("--python is needed under a launcher")
    columns = ("model", "ranks", "way", "average_s", "ours ÷ theirs")
    return report.run(arguments, measure, "One averaging", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
