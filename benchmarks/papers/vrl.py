"""Control variates on unequal shards: w8a in contiguous shards, K = 8, H = 64, with and without, after the same steps.

python benchmarks/papers/vrl.py --data w8a.bz2

VRL-SGD (Liang et al. 2019, arXiv 1912.12844). Samples are sorted by label, as w8a is, and cut into contiguous shards: one rank has all
positives, the others none. Logistic regression as in stich_w8a.py, a loop in numpy on MPI ranks with ModelAverager, the same draws for all;
reported is f of the average at the end, for several constant rates, since plain Local SGD wants a smaller one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report
from stich_w8a import Problem

WAYS = {"plain": False, "control variates": True}


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each rate, without and with control variates."""
    import hvd_localsgd as lsgd

    problem = Problem(arguments.data)
    optimum = problem.optimum()
    rows: report.Rows = []
    for rate in arguments.learning_rates:
        for way, control_variates in WAYS.items():
            history = train(problem, arguments, rate, control_variates)
            rows.append(
                {"way": way, "ranks": lsgd.size(), "sync_every": arguments.sync_every, "learning_rate": rate,
                 "steps": arguments.steps, "objective": history[-1][1], "suboptimality": history[-1][1] - optimum,
                 "history": [(step, value - optimum) for step, value in history]}
            )  # fmt: skip
    return rows


def train(
    problem: Problem, arguments: argparse.Namespace, rate: float, control_variates: bool
) -> list[tuple[int, float]]:
    """f of the average, at every tenth sync and at the end, with the step."""
    import hvd_localsgd as lsgd

    own = np.array_split(np.argsort(-problem.y, kind="stable"), lsgd.size())[lsgd.rank()]
    draws = np.random.default_rng([3, lsgd.rank()]).choice(own, (arguments.steps, arguments.batch))
    x = np.zeros(problem.dimension)
    averager = lsgd.ModelAverager([x], arguments.sync_every, control_variates=control_variates)
    averager.tell(rate=rate)
    history = []
    with averager:
        for step, rows in enumerate(draws, 1):
            a, y = problem.dense[rows], problem.y[rows]
            weight = -y / (1 + np.exp(y * (a @ x))) / arguments.batch
            gradient = a.T @ weight + x / problem.n
            for correction in averager.corrections:  # one, or none
                gradient -= correction
            x -= rate * gradient
            if averager.step() and step % (10 * arguments.sync_every) == 0 and step < arguments.steps:
                history.append((step, float(problem.value(x[:, None])[0])))
    return [*history, (arguments.steps, float(problem.value(x[:, None])[0]))]


def draw(figure: Any, rows: report.Rows) -> None:
    """Suboptimality against steps, a panel for each way, a line for each rate."""
    panels = figure.subplots(1, len(WAYS), sharey=True)
    for way, panel in zip(WAYS, panels, strict=True):
        for row in rows:
            if row["way"] == way:
                steps, values = zip(*row["history"], strict=True)
                panel.semilogy(steps, values, marker=".", label=f"rate {row['learning_rate']:g}")
        panel.set_xlabel("steps")
        panel.set_title(way, fontsize=10)
    panels[0].set_ylabel("f − f*")
    panels[0].legend(frameon=False, fontsize=8)


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=1)
    parser.set_defaults(ranks=[8])
    parser.add_argument("--data", type=Path, required=True, help="a LIBSVM file with two classes, .bz2 or not")
    parser.add_argument("--sync-every", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12_800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.3, 1.0, 3.0, 10.0])
    columns = ("way", "ranks", "sync_every", "learning_rate", "steps", "objective", "suboptimality")
    return report.run(parser.parse_args(), measure, "Local SGD on contiguous shards", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
