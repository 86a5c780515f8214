"""Control variates on unequal shards: w8a in contiguous shards, K = 8, H = 64, with and without, after the same steps.

python benchmarks/papers/vrl.py --data w8a.bz2
python benchmarks/papers/vrl.py --data w8a.bz2 --ranks 4 --mixed --sync-every 16 --ways plain bf16 fp16 int8

VRL-SGD (Liang et al. 2019, arXiv 1912.12844). Samples are sorted by label, as w8a is, and cut into contiguous shards: one rank has all
positives, the others none. Logistic regression as in stich_w8a.py, a loop in numpy on MPI ranks with ModelAverager, the same draws for all;
reported is f of the average at the end, for several constant rates, since plain Local SGD wants a smaller one. With ``--mixed`` ranks draw
from all samples; changes that are sent in fewer bits are those of float32, where the others compute in float64.
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

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "control variates": {"control_variates": True},
    **{name: {"compression": name} for name in ("bf16", "fp16", "int8")},
}


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each rate, without and with control variates."""
    import hvd_localsgd as lsgd

    problem = Problem(arguments.data)
    optimum = problem.optimum()
    rows: report.Rows = []
    for rate in arguments.learning_rates:
        for way in arguments.ways:
            history = train(problem, arguments, rate, WAYS[way])
            rows.append(
                {"way": way, "ranks": lsgd.size(), "sync_every": arguments.sync_every, "learning_rate": rate,
                 "steps": arguments.steps, "objective": history[-1][1], "suboptimality": history[-1][1] - optimum,
                 "history": [(step, value - optimum) for step, value in history]}
            )  # fmt: skip
    return rows


def train(
    problem: Problem, arguments: argparse.Namespace, rate: float, options: dict[str, Any]
) -> list[tuple[int, float]]:
    """f of the average, at every tenth sync and at the end, with the step."""
    import hvd_localsgd as lsgd

    own = np.array_split(np.argsort(-problem.y, kind="stable"), lsgd.size())[lsgd.rank()]
    own = np.arange(problem.n) if arguments.mixed else own
    draws = np.random.default_rng([3, lsgd.rank()]).choice(own, (arguments.steps, arguments.batch))
    x = np.zeros(problem.dimension, np.float32 if "compression" in options else np.float64)
    averager = lsgd.ModelAverager([x], arguments.sync_every, **options)
    averager.tell(rate=rate)
    history = []
    with averager:
        for step, rows in enumerate(draws, 1):
            a, y = problem.dense[rows], problem.y[rows]
            weight = -y / (1 + np.exp(y * (a @ x))) / arguments.batch
            gradient = a.T @ weight + x / problem.n
            for correction in averager.corrections:  # one, or none
                gradient -= correction
            x -= (rate * gradient).astype(x.dtype)
            if averager.step() and step % (10 * arguments.sync_every) == 0 and step < arguments.steps:
                history.append((step, float(problem.value(x[:, None])[0])))
    return [*history, (arguments.steps, float(problem.value(x[:, None])[0]))]


def draw(figure: Any, rows: report.Rows) -> None:
    """Suboptimality against steps, a panel for each way, a line for each rate."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for way, panel in zip(ways, panels, strict=True):
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
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS)[:2])
    parser.add_argument("--mixed", action="store_true", help="each rank draws from all samples")
    parser.add_argument("--sync-every", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12_800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.3, 1.0, 3.0, 10.0])
    columns = ("way", "ranks", "sync_every", "learning_rate", "steps", "objective", "suboptimality")
    return report.run(parser.parse_args(), measure, "Local SGD on contiguous shards", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
