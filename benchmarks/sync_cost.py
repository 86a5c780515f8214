"""What a sync costs, beside what it cannot cost less than: raw allreduces of the same bytes in the same processes.

python benchmarks/sync_cost.py --ranks 2 --models resnet50 transformer tiny --json runs/sync_cost.json

Not under a launcher, it starts its own ranks. A sync is measured as a user pays for it: header, copying out, allreduce,
copying back, and what it adds to the next training step (a step here updates every variable in place).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import report
import shapes

from hvd_localsgd import launch
from hvd_localsgd.communicators import under_launcher

# Two cores are all there may be: one thread per rank. Before TensorFlow is imported, which happens below.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
for _variable in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


def measure(name: str, repeats: int) -> dict[str, object]:
    """One model on this job's ranks; medians over repeats, of the slowest rank, all ways in turn."""
    import time
    from collections.abc import Callable

    import numpy as np
    import tensorflow as tf
    from mpi4py import MPI

    from hvd_localsgd import averaging, devices, schedules, timing, variables

    communicator = devices.get()
    world = MPI.COMM_WORLD
    dimensions = shapes.MODELS[name]()
    own = [tf.Variable(tf.random.stateless_normal(s, [1, i])) for i, s in enumerate(dimensions)]
    updates = [tf.zeros(s) for s in dimensions]
    settings = averaging.Settings(schedules.Constant(1))
    engine = averaging.LocalSGD(communicator, own, variables.State(), settings, timing.Timings())
    engine.begin(own)
    flat = np.ones(engine.variables.elements, np.float32)

    @tf.function(autograph=False)
    def step() -> None:
        for variable, update in zip(own, updates, strict=True):
            tf.raw_ops.AssignSubVariableOp(resource=variable.handle, value=update)

    def raw() -> None:
        world.Allreduce(MPI.IN_PLACE, flat)

    def chunked(size: int) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, flat.size, size):
                world.Allreduce(MPI.IN_PLACE, flat[start : start + size])

        return run

    def sync() -> None:
        engine.local_steps(1)
        engine.synchronise()

    def once(what: Callable[[], object]) -> float:
        world.Barrier()
        began = time.perf_counter()
        what()
        elapsed = np.array([time.perf_counter() - began])
        world.Allreduce(MPI.IN_PLACE, elapsed, MPI.MAX)
        return float(elapsed[0])

    ways: dict[str, Callable[[], object]] = {"raw": raw}
    ways |= {f"chunk {kb} KiB": chunked(kb << 8) for kb in (512, 1024, 2048, 4096)}
    ways |= {"step": step, "sync": sync, "next step": step}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 2):
        for way, run in ways.items():
            elapsed = once(run)
            if repeat >= 2:
                seconds[way].append(elapsed)
    median = {way: float(np.median(values)) for way, values in seconds.items()}
    best = min(value for way, value in median.items() if way.startswith("chunk"))
    extra = median["next step"] - median["step"]
    parts = {p: float(np.median([getattr(r, p) for r in engine.timings.rounds[2:]])) for p in timing.PARTS}
    engine.finish()
    return {
        "model": name,
        "ranks": communicator.size,
        "transport": report.transport(),
        "variables": len(own),
        "bytes": flat.nbytes,
        "sync_s": median["sync"],
        "next_step_extra_s": extra,
        "raw_allreduce_s": median["raw"],
        "chunked_allreduce_s": best,
        "ratio_raw": (median["sync"] + extra) / median["raw"],
        "ratio_chunked": (median["sync"] + extra) / best,
        "chunk_bytes": communicator.chunk_bytes,
        "parts_s": parts,
    }


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=sorted(shapes.MODELS), default=sorted(shapes.MODELS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path("runs/sync_cost.json"))
    arguments = parser.parse_args()
    if not under_launcher():
        return launch.run(arguments.ranks, [sys.executable, *sys.argv])
    from hvd_localsgd import devices

    rows = [measure(name, arguments.repeats) for name in arguments.models]
    if devices.get().rank == 0:
        report.write(arguments.json, rows)
        columns = ("model", "ranks", "sync_s", "next_step_extra_s", "raw_allreduce_s", "chunked_allreduce_s",
                   "ratio_raw", "ratio_chunked")  # fmt: skip
        report.show("A sync beside raw allreduces of the same bytes", rows, columns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
