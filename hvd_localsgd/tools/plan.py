"""``hvd-localsgd plan``: how often to communicate, before the cluster is booked."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from hvd_localsgd.core import theory

# The least and the most that makes sense, and what it is.
NUMBERS: dict[str, tuple[float, float, str]] = {
    "samples": (1, 10**15, "in the training data"),
    "epochs": (1e-6, 1e9, "times that all of them are seen"),
    "ranks": (1, 10**7, "K"),
    "batch": (1, 10**9, "b, samples per local step and rank"),
    "compute_ms": (1e-6, 1e9, "of one local step"),
    "model_mb": (1e-6, 1e9, "weights, in 10^6 bytes: 4 per weight"),
    "bandwidth": (1e-6, 1e6, "of each rank's link, Gbit/s"),
    "latency": (0.0, 1e9, "of a message, microseconds; 50 unless it is given"),
}
_CONSTANTS = {
    "mu": "strong convexity",
    "smoothness": "L, of the gradient",
    "variance": "sigma^2, of one sample's gradient",
    "gradient": "G^2, its second moment",
}


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
    sure = "theory, with your constants" if given else "theory up to a constant (1)"
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
        (cheap, "communication takes 5 % of the time", "arithmetic, not accuracy"),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for name, (low, _, what) in NUMBERS.items():
        default = {"default": 50.0} if name == "latency" else {"required": True}
        parser.add_argument(option(name), type=type(low), help=what, **default)
    for name, what in _CONSTANTS.items():
        parser.add_argument(option(name), type=float, help=f"{what}, if known")


def option(name: str) -> str:
    """As it is typed."""
    return f"--{name.replace('_', '-')}"


def _check(arguments: argparse.Namespace) -> None:
    for name, (low, high, what) in NUMBERS.items():
        if not low <= getattr(arguments, name) <= high:  # which NaN is not, either
            raise ValueError(
                f"{option(name)} must be from {low:g} to {high:g} ({what}). Received: {getattr(arguments, name)}"
            )
    for name, what in _CONSTANTS.items():
        value = getattr(arguments, name)
        if value is not None and not 1e-30 <= value <= 1e30:
            raise ValueError(f"{option(name)} must be from 1e-30 to 1e+30 ({what}). Received: {value}")


def show(arguments: argparse.Namespace) -> None:
    """Print the table, 80 columns wide.

    Raises:
        ValueError: a number is out of range.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    _check(arguments)
    job = Job(
        arguments.samples, arguments.epochs, arguments.ranks, arguments.batch, arguments.compute_ms / 1e3,
        arguments.model_mb * 1e6, arguments.bandwidth * 1e9 / 8, arguments.latency / 1e6,
    )  # fmt: skip
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), leading=1)
    for heading in ("H", "rounds", "GB sent\nper rank", "time", "times faster\nthan H = 1"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("because")
    for interval, why, kind in choices(job, {name: getattr(arguments, name) for name in _CONSTANTS}):
        rounds, seconds = job.rounds(interval), job.seconds(interval)
        table.add_row(
            _short(interval), _short(rounds), _short(rounds * job.traffic / 1e9), _duration(seconds),
            _short(job.seconds(1) / seconds), f"{why}\n{kind}",
        )  # fmt: skip
    console = Console(color_system=None, highlight=False, width=80)
    console.print(
        f"T = {_short(job.steps)} local steps on each of {job.ranks} ranks; one averaging takes about {_short(job.sync * 1e3)} ms, "
        f"a local step {_short(job.compute * 1e3)} ms. Not counted: ranks that wait for slower ones."
    )
    console.print(table)


def _short(number: float) -> str:
    return f"{number:.0f}" if (isinstance(number, int) and number < 1e9) or 1e3 <= number < 1e9 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 1e6 else f"{seconds / 86400:.3g} days"
