"""``hvd-localsgd plan``: how often to communicate, before the cluster is booked."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from hvd_localsgd.core import theory


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained, and on what. ``latency`` and ``compute`` in seconds, ``bandwidth`` in bytes a second."""

    samples: int
    epochs: float
    ranks: int
    batch: int
    compute: float
    model_bytes: float
    bandwidth: float
    latency: float

    @property
    def steps(self) -> int:
        """T, local steps per rank."""
        return max(1, math.ceil(self.samples * self.epochs / (self.ranks * self.batch)))

    @property
    def traffic(self) -> float:
        """Bytes that a rank sends in one averaging."""
        return 2 * (self.ranks - 1) / self.ranks * self.model_bytes

    @property
    def sync(self) -> float:
        """Seconds of one averaging: 2 log2 K messages, each byte once over the wire in each direction."""
        return 2 * math.ceil(math.log2(self.ranks)) * self.latency + self.traffic / self.bandwidth

    def rounds(self, interval: int) -> int:
        """Averagings with H local steps each."""
        return math.ceil(self.steps / interval)

    def seconds(self, interval: int) -> float:
        """Of the whole training, with H local steps a round."""
        return self.steps * self.compute + self.rounds(interval) * self.sync


def choices(job: Job, constants: dict[str, Any]) -> list[tuple[int, str, str]]:
    """H, what says so, and whether that is theory or a rule of thumb."""
    given = all(value is not None for value in constants.values())
    sure = "theory, with your constants" if given else "theory up to a constant, here 1"
    convex = theory.convex_interval(job.steps, job.ranks, job.batch, **constants)
    nonconvex = theory.nonconvex_interval(
        job.steps, job.ranks, variance=constants["variance"], gradient=constants["gradient"]
    )
    cheap = min(job.steps, max(1, math.ceil(19 * job.sync / job.compute)))
    return [
        (1, "parallel SGD, every step", "theory"),
        (nonconvex, "T^(1/4) / K^(3/4), non-convex (Yu et al. 2018)", sure),
        (convex, "sqrt(T / (K b)), strongly convex (Stich 2018)", sure),
        (min(job.steps, 16), "plain averaging tolerates 8 to 32 in deep learning", "rule of thumb"),
        (cheap, "communication takes 5 % of the time", "arithmetic: says nothing about accuracy"),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--samples", type=int, required=True, help="in the training data")
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="K")
    parser.add_argument("--batch", type=int, required=True, help="b, samples per local step and rank")
    parser.add_argument("--compute-ms", type=float, required=True, help="of one local step")
    parser.add_argument("--model-mb", type=float, required=True, help="weights, in 10^6 bytes (4 per weight)")
    parser.add_argument("--bandwidth", type=float, required=True, help="of each rank's link, Gbit/s")
    parser.add_argument("--latency", type=float, default=50.0, help="of a message, microseconds (default 50)")
    for name, what in (
        ("mu", "strong convexity"), ("smoothness", "L, of the gradient"),
        ("variance", "sigma^2, of one sample's gradient"), ("gradient", "G^2, its second moment"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=float, help=f"{what}, if known")


def show(arguments: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ValueError: a number is out of range.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    for name in ("samples", "epochs", "ranks", "batch", "compute_ms", "model_mb", "bandwidth"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be > 0. Received: {getattr(arguments, name)}")
    if arguments.latency < 0:
        raise ValueError(f"--latency must be >= 0. Received: {arguments.latency}")
    job = Job(
        arguments.samples, arguments.epochs, arguments.ranks, arguments.batch, arguments.compute_ms / 1e3,
        arguments.model_mb * 1e6, arguments.bandwidth * 1e9 / 8, arguments.latency / 1e6,
    )  # fmt: skip
    constants = {name: getattr(arguments, name) for name in ("mu", "smoothness", "variance", "gradient")}
    table = Table(box=box.SIMPLE)
    for heading in ("H", "rounds", "GB sent per rank", "time", "times faster than H = 1"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("because", no_wrap=True)
    table.add_column("which is", no_wrap=True)
    for interval, why, kind in choices(job, constants):
        rounds, seconds = job.rounds(interval), job.seconds(interval)
        table.add_row(
            str(interval), str(rounds), f"{rounds * job.traffic / 1e9:.3g}", _duration(seconds),
            f"{job.seconds(1) / seconds:.2f}", why, kind,
        )  # fmt: skip
    print(
        f"T = {job.steps} local steps on each of {job.ranks} ranks; one averaging takes about {job.sync * 1e3:.3g} ms,"
    )
    print(f"a local step {job.compute * 1e3:.3g} ms. Not counted: ranks that wait for slower ones.")
    Console(color_system=None, highlight=False, width=170).print(table)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
