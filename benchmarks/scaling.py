"""What more ranks would bring: a latency-bandwidth model fitted to syncs measured on few ranks, tried out on all of them.

benchmarks/cluster/run --rate 1gbit --hosts 8 -- python benchmarks/scaling.py --compute-ms 20 --spread 0.1

A round of H steps on K ranks takes

    E max_k (sum of H step times)  +  a L(K)  +  b n 2 (K - 1)/K

for n bytes: every rank sends and receives 2 (K - 1)/K of them in L(K) messages, L = 2 (K - 1) in a ring, 2 log2 K in the
library's trees. a and b are fitted on 2 to --fit-ranks ranks. Step times are taken as
normal with the measured mean and spread (or those given); the largest of K sums gives the wait for stragglers. Validation: rounds
on all ranks of the job, whose steps are pauses of such lengths, since the hosts of an emulated cluster share their cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from statistics import NormalDist
from typing import Any

import numpy as np
import report

_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of --bytes; not less, because TCP is not linear over decades of sizes


def regressors(ranks: int, size: int, ring: bool) -> list[float]:
    """What a and b are multiplied by."""
    latency = 2 * (ranks - 1) if ring else 2 * math.ceil(math.log2(ranks))
    return [latency, 2 * (ranks - 1) / ranks * size]


def slowest_of(ranks: int, steps: int, mean: float, spread: float) -> float:
    """E max over ranks of a sum of normal step times (Blom's approximation of the largest of K normals)."""
    largest = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0
    return steps * mean + math.sqrt(steps) * spread * mean * largest


def measure(arguments: argparse.Namespace) -> report.Rows:
    """Rows of three kinds: fit, validation, prediction."""
    from hvd_localsgd import devices
    from hvd_localsgd.core import reducers

    communicator = devices.get("mpi")
    fastest = reducers.fastest(communicator, arguments.bytes)
    ring = isinstance(fastest, reducers.Ring)
    mean, spread = step_times(arguments)
    rows: report.Rows = []
    for ranks in range(2, min(arguments.fit_ranks, communicator.size) + 1):
        for size in (int(share * arguments.bytes) // 4 for share in _SHARES):
            seconds = time_syncs(communicator, fastest, ranks, size, arguments.repeats)
            rows.append({"kind": "fit", "ranks": ranks, "bytes": 4 * size, "measured_s": seconds})
    matrix = np.array([regressors(row["ranks"], row["bytes"], ring) for row in rows])
    target = np.array([row["measured_s"] for row in rows])
    constants = non_negative(matrix / target[:, None])

    def sync(ranks: int, size: int) -> float:
        return float(np.dot(constants, regressors(ranks, size, ring)))

    for row in rows:
        row["predicted_s"] = sync(row["ranks"], row["bytes"])
    if communicator.size > arguments.fit_ranks:
        for interval in (1, 4, 16):
            row = {"kind": "validation", "ranks": communicator.size, "H": interval, "bytes": arguments.bytes}
            row["measured_s"] = time_rounds(interval, mean, spread, arguments)
            row["predicted_s"] = slowest_of(communicator.size, interval, mean, spread) + sync(
                communicator.size, arguments.bytes
            )
            rows.append(row)
    for row in rows:
        row["error %"] = 100 * (row["predicted_s"] / row["measured_s"] - 1)
    for interval in (1, 4, 16, 64, 256):
        for ranks in (2**i for i in range(1, 13)):
            seconds = slowest_of(ranks, interval, mean, spread) + sync(ranks, arguments.bytes)
            speed_up = ranks * interval * mean / seconds
            rows.append(
                {"kind": "prediction", "ranks": ranks, "H": interval, "bytes": arguments.bytes, "predicted_s": seconds,
                 "speed-up": speed_up, "efficiency": speed_up / ranks}
            )  # fmt: skip
    names = dict(zip(("latency_s", "seconds_per_byte"), map(float, constants), strict=True))
    return [{"kind": "model", "ring": ring, "step_s": mean, "spread": spread, **names}, *rows]


def non_negative(matrix: np.ndarray) -> np.ndarray:
    """Least squares of matrix @ x = 1, x >= 0: relative errors count, whatever the size."""
    from scipy.optimize import nnls

    return nnls(matrix, np.ones(len(matrix)))[0]


def step_times(arguments: argparse.Namespace) -> tuple[float, float]:
    """Mean seconds of a training step and its relative spread: as given, or measured, one rank after the other."""
    if arguments.compute_ms is not None:
        return arguments.compute_ms / 1e3, arguments.spread
    from mpi4py import MPI
    from throughput import cnn

    world = MPI.COMM_WORLD
    model = cnn(32)
    model.compile("sgd", "mse")
    images, labels = np.zeros((32, 32, 32, 3), np.float32), np.zeros((32, 10), np.float32)
    times = []
    for turn in range(world.size):
        world.Barrier()
        for step in range(60 if turn == world.rank else 0):
            began = time.perf_counter()
            model.train_on_batch(images, labels)
            if step >= 10:
                times.append(time.perf_counter() - began)
    everyone = np.concatenate(world.allgather(times))
    return float(everyone.mean()), float(everyone.std() / everyone.mean())


def time_syncs(communicator: Any, fastest: Any, ranks: int, size: int, repeats: int) -> float:
    """Median seconds of a sync of the first ``ranks`` ranks; the others wait."""
    from mpi4py import MPI

    part = communicator.subgroup([range(ranks), range(ranks, communicator.size)])
    times = []
    if communicator.rank < ranks:
        with make_averager(size, part, lambda own: type(fastest)(own, fastest.chunk_bytes)) as averager:
            for turn in range(repeats + 2):
                part.allreduce(np.zeros(1))  # a barrier
                began = time.perf_counter()
                averager.step()
                slowest = part.exchange(np.array(time.perf_counter() - began)).max()
                if turn >= 2:
                    times.append(float(slowest))
    communicator.exchange(np.zeros((), np.uint8))  # waits without burning the cores that emulated hosts share
    return float(np.median(MPI.COMM_WORLD.bcast(times)))


def time_rounds(interval: int, mean: float, spread: float, arguments: argparse.Namespace) -> float:
    """Mean seconds of a round on all ranks, whose steps are pauses."""
    import hvd_localsgd as lsgd

    random = np.random.default_rng(lsgd.rank())
    rounds = max(4, arguments.repeats)
    with make_averager(arguments.bytes // 4) as averager:
        for turn in range(rounds + 1):
            if turn == 1:
                report.slowest(0.0)
                began = time.perf_counter()
            time.sleep(max(0.0, float(random.normal(mean, spread * mean, interval).sum())))
            averager.step(interval)
        return report.slowest(time.perf_counter() - began) / rounds


def make_averager(size: int, communicator: Any = None, reducer: Any = None) -> Any:
    """Averages one variable of ``size`` float32 at each call of ``step``."""
    import tensorflow as tf

    import hvd_localsgd as lsgd

    return lsgd.ModelAverager([tf.Variable(tf.zeros(size))], 1, communicator=communicator, reducer=reducer)


def draw(figure: Any, rows: report.Rows) -> None:
    """Efficiency against ranks, a line per H; beside it measured against predicted."""
    left, right = figure.subplots(1, 2)
    predicted = [row for row in rows if row["kind"] == "prediction"]
    for interval in sorted({row["H"] for row in predicted}):
        line = [(row["ranks"], row["efficiency"]) for row in predicted if row["H"] == interval]
        left.semilogx(*zip(*line, strict=True), base=2, marker=".", label=f"H = {interval}")
    left.set_xlabel("ranks")
    left.set_ylabel("efficiency")
    left.set_ylim(0, 1.02)
    left.legend(frameon=False)
    for kind in ("fit", "validation"):
        points = [(row["measured_s"], row["predicted_s"]) for row in rows if row["kind"] == kind]
        if points:
            right.loglog(*zip(*points, strict=True), "o", label=kind)
    right.axline((0.1, 0.1), (1, 1), color="gray", linewidth=0.8)
    right.set_xlabel("seconds measured")
    right.set_ylabel("seconds predicted")
    right.legend(frameon=False)


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=9)
    parser.set_defaults(ranks=[4])
    parser.add_argument("--fit-ranks", type=int, default=4, help="the model is fitted on 2 to this many ranks")
    parser.add_argument("--bytes", type=int, default=16 << 20, help="of the model in the predictions")
    parser.add_argument("--compute-ms", type=float, help="of a step; measured on a small CNN by default")
    parser.add_argument("--spread", type=float, default=0.05, help="standard deviation of a step over its mean")
    columns = ("kind", "ranks", "H", "bytes", "measured_s", "predicted_s", "error %", "speed-up", "efficiency")
    return report.run(parser.parse_args(), measure, "Scaling", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
