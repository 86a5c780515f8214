"""What a sync costs, beside what it cannot cost less than: raw allreduces of the same bytes in the same processes.

python benchmarks/sync_cost.py --ranks 2 4 --models resnet50 transformer tiny --json runs/sync_cost.json

Not under a launcher, it starts its own ranks. A sync is measured as a user pays for it: header, copying out, allreduce,
copying back, and what it adds to the next training step (a step here updates every variable in place).
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import report
import shapes

_CHUNKS = (512, 1024, 2048, 4096)  # KiB


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row per model; with ``--gbit`` beside what the line rate allows."""
    from hvd_localsgd.backends.tensorflow import kernel

    if arguments.without_kernel:
        kernel.load = lambda: None  # type: ignore[assignment]
    import tensorflow as tf

    from hvd_localsgd import devices

    devices.get()  # before TensorFlow's first operation: each rank its own GPU, which several may share
    with tf.device(f"{arguments.device}:0"):
        rows = [measure_model(name, arguments.repeats, arguments.memory == "tensors") for name in arguments.models]
    if arguments.gbit:
        for row in rows:
            # A ring's bytes on every link, in full packets: 1448 of 1538 bytes are ours, the others headers and gaps.
            row["gbit"] = arguments.gbit
            row["line_s"] = 2 * (1 - 1 / row["ranks"]) * row["bytes"] * 8 / (arguments.gbit * 1e9) * 1538 / 1448
            row["ratio_line"] = (row["sync_s"] + row["next_step_extra_s"]) / row["line_s"]
    return rows


def measure_model(name: str, repeats: int, tensors: bool = False) -> dict[str, Any]:
    """One model on this job's ranks; medians over repeats, of the slowest rank, all ways in turn."""
    import numpy as np
    import tensorflow as tf
    from mpi4py import MPI

    import hvd_localsgd as lsgd
    from hvd_localsgd import devices
    from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory
    from hvd_localsgd.core import reducers, timing

    communicator = devices.get()
    world = MPI.COMM_WORLD
    dimensions = shapes.MODELS[name]()
    own = [tf.Variable(tf.random.stateless_normal(s, [1, i])) for i, s in enumerate(dimensions)]
    updates = [tf.zeros(s) for s in dimensions]

    @tf.function(autograph=False)
    def step() -> None:
        for variable, update in zip(own, updates, strict=True):
            tf.raw_ops.AssignSubVariableOp(resource=variable.handle, value=update)

    step()
    before = _peak_memory()
    memory = TensorFlowMemory(own, tensors=tensors)
    memory.prepare(own, lambda: None)
    averager = lsgd.ModelAverager(memory, sync_every=1)
    world.Barrier()  # whose variables took longer is no part of it
    began = time.perf_counter()
    averager.begin()
    begin = time.perf_counter() - began
    began = time.perf_counter()
    averager.step()
    first = time.perf_counter() - began
    more_memory = _peak_memory() - before

    flat = np.ones(sum(v.shape.num_elements() for v in own), np.float32)

    def raw() -> None:
        world.Allreduce(MPI.IN_PLACE, flat)

    def chunked(size: int) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, flat.size, size):
                world.Allreduce(MPI.IN_PLACE, flat[start : start + size])

        return run

    ways: dict[str, Callable[[], object]] = {"raw": raw}
    ways |= {f"chunk {kb} KiB": chunked(kb << 8) for kb in _CHUNKS}
    ways |= {"step": step, "sync": averager.step, "next step": step}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 2):
        for way, run in ways.items():
            world.Barrier()
            began = time.perf_counter()
            run()
            elapsed = report.slowest(time.perf_counter() - began)
            if repeat >= 2:
                seconds[way].append(elapsed)
    median = {way: float(np.median(values)) for way, values in seconds.items()}
    best = min(value for way, value in median.items() if way.startswith("chunk"))
    extra = median["next step"] - median["step"]
    parts = {p: float(np.median([getattr(r, p) for r in averager.timings[3:]])) for p in timing.PARTS}
    parts.pop("wait")  # since the sync before: the other ways' turns
    averager.finish()
    reducer = reducers.fastest(communicator, flat.nbytes)  # as measured when training began
    return {
        "model": name,
        "ranks": communicator.size,
        "transport": report.transport(),
        "variables": len(own),
        "bytes": flat.nbytes,
        "sync_s": median["sync"],
        "begin_s": begin,
        "first_sync_s": first,
        "next_step_extra_s": extra,
        "raw_allreduce_s": median["raw"],
        "chunked_allreduce_s": best,
        "ratio_raw": (median["sync"] + extra) / median["raw"],
        "ratio_chunked": (median["sync"] + extra) / best,
        "chunk_bytes": reducer.chunk_bytes,
        "ring": isinstance(reducer, reducers.Ring),
        "kernel": memory.uses_kernel,
        "memory": "tensors" if tensors or "GPU" in own[0].device else "in place",
        "extra_memory_bytes": more_memory,
        "parts_s": parts,
    }


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def draw(figure: object, rows: report.Rows) -> None:
    """Sync and floors, side by side."""
    names = {"sync_s": "sync", "raw_allreduce_s": "one raw allreduce", "chunked_allreduce_s": "best chunks"}
    report.bars(figure, rows, lambda row: f"{row['model']}\n{row['ranks']} ranks", names, "seconds")


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=15)
    parser.add_argument("--models", nargs="+", choices=sorted(shapes.MODELS), default=sorted(shapes.MODELS))
    parser.add_argument(
        "--memory", choices=("in place", "tensors"), default="in place",
        help="tensors: by way of one flat tensor, as variables on a GPU are",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where the variables lie")
    parser.add_argument("--without-kernel", action="store_true", help="as if build_kernel had not been run")
    parser.add_argument("--gbit", type=float, help="the network's Gbit/s, with one rank per host: what would it allow?")
    arguments = parser.parse_args()
    columns = ["model", "ranks", "kernel", "sync_s", "next_step_extra_s", "raw_allreduce_s", "chunked_allreduce_s", "ratio_raw",
               "ratio_chunked"]  # fmt: skip
    columns += ["line_s", "ratio_line"] if arguments.gbit else []
    return report.run(arguments, measure, "A sync beside raw allreduces of the same bytes", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
