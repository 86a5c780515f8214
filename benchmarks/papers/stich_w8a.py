"""Stich (2018), section 4: logistic regression on w8a, speed-up against the number of ranks for each H.

python benchmarks/papers/stich_w8a.py --data w8a.bz2 --ranks 1 2 4 8 16 --sync-every 1 2 4 8 16 --batch 4 16 --epsilon 0.02 0.01
python benchmarks/papers/stich_w8a.py --data w8a.bz2 --epsilon 0.005 0.0001 --limit 4000000 --work runs/w8a.jsonl       in pieces
python benchmarks/papers/stich_w8a.py --data w8a.bz2 --quick

Any LIBSVM file with two classes will do. For every K, H and b the step size is tuned as in the paper, over min(32, c n/(t + 1)) and
32 c for powers of two c, and the local steps T are counted until f - f* <= epsilon holds for the last iterate or one of the uniform,
linear and quadratic averages of iterates, each averaged over ranks. Tuning is done by a simulation of Algorithm 1, compiled by numba; with
--mpi the tuned runs are then run again as Keras models on that many MPI ranks, through LocalSGDCallback, and must give the same
iterates to 1e-6. f* is found by SciPy's Newton-CG. With --work what was tuned is kept: started again, the others follow.

Speed-ups are against K = 1, H = 1 with the same b: in steps, and in time if sending a vector takes as long as rho = 25 gradients and
K ranks send 2 (K - 1) of them each round.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report

RHO = 25.0
LARGEST = 32.0
SMALLEST = -12  # of the powers of two
_DRAWN = 256  # steps at a time


@dataclass(frozen=True)
class Config:
    """One run: K, H, b and the step size."""

    ranks: int
    sync_every: int
    batch: int
    c: float
    decaying: bool

    def rate(self, step: int, n: int) -> float:
        """min(32, c n / (t + 1)), or 32 c; as float32, in which Keras keeps its rates."""
        return float(np.float32(min(LARGEST, self.c * n / (step + 1)) if self.decaying else LARGEST * self.c))


class Problem:
    """f(x) = 1/n sum log(1 + exp(-y <a, x>)) + 1/(2n) |x|^2."""

    def __init__(self, path: Path, contiguous: bool = False) -> None:
        from sklearn.datasets import load_svmlight_file

        self.sparse, labels = load_svmlight_file(str(path))
        classes = np.unique(labels)
        if len(classes) != 2:
            raise SystemExit(f"{path} must have two classes. Found: {classes}")
        self.y = np.where(labels == classes[1], 1.0, -1.0)
        self.dense = self.sparse.toarray()
        self.n, self.dimension = self.dense.shape

    def value(self, columns: np.ndarray) -> np.ndarray:
        """f of each column."""
        margins = self.y[:, None] * (self.sparse @ columns)
        return np.logaddexp(0, -margins).mean(0) + (columns**2).sum(0) / (2 * self.n)

    def optimum(self) -> float:
        """f*, by an independent solver."""
        from scipy.optimize import minimize

        def gradient(x: np.ndarray) -> np.ndarray:
            weight = -self.y / (1 + np.exp(self.y * (self.sparse @ x)))
            return self.sparse.T @ weight / self.n + x / self.n

        def hessian(x: np.ndarray, direction: np.ndarray) -> np.ndarray:
            p = 1 / (1 + np.exp(self.sparse @ x))
            return self.sparse.T @ (p * (1 - p) * (self.sparse @ direction)) / self.n + direction / self.n

        found = minimize(
            lambda x: float(self.value(x[:, None])[0]), np.zeros(self.dimension), jac=gradient, hessp=hessian,
            method="Newton-CG", options={"xtol": 1e-10, "maxiter": 1000},
        )  # fmt: skip
        return float(found.fun)

    def keras_model(self, optimizer: Any) -> Any:
        """The same f, from x = 0; labels are -1 and 1."""
        import keras
        import tensorflow as tf

        penalty = keras.regularizers.L2(1 / (2 * self.n))
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", kernel_regularizer=penalty)
        model = keras.Sequential([keras.Input((self.dimension,)), layer])
        model.compile(optimizer, lambda y, logits: tf.reduce_mean(tf.nn.softplus(-y * logits), axis=-1))
        return model

    def samples(self, rank: int, batch: int) -> Iterator[np.ndarray]:
        """A worker's draws for some steps, of shape (steps, b): uniform from all n, the same in simulation and on MPI ranks."""
        random = np.random.default_rng([7, rank])
        while True:
            yield random.integers(0, self.n, (_DRAWN, batch))


class Simulation:
    """Algorithm 1, all ranks at once.

    Attributes:
        step: so many are done.
        x: the ranks' iterates, (K, d).
        averages: uniform, linear and quadratic, of the iterates' means over ranks, (3, d).
    """

    def __init__(self, problem: Problem, config: Config) -> None:
        self._problem, self._config = problem, config
        self._draws = [problem.samples(rank, config.batch) for rank in range(config.ranks)]
        self.step = 0
        self.x = np.zeros((config.ranks, problem.dimension))
        self.averages, self._sums = np.zeros((3, problem.dimension)), np.zeros(3)

    def advance(self, step: int) -> None:
        """To this step."""
        sparse, n = self._problem.sparse, self._problem.n
        while self.step < step:
            if (at := self.step % _DRAWN) == 0:
                self._rows = np.stack([next(draw) for draw in self._draws], 1)
            rows = self._rows[at : at + step - self.step]
            rates = np.array([self._config.rate(self.step + i, n) for i in range(len(rows))])
            _algorithm_1(
                self.x, rows, rates, self._config.sync_every, self.step, self.averages, self._sums,
                sparse.indptr, sparse.indices, sparse.data, self._problem.y,
            )  # fmt: skip
            self.step += len(rows)

    def value(self) -> float:
        """The smallest f, of the last iterates' mean and of the averages."""
        return float(self._problem.value(np.vstack([self.x.mean(0), self.averages]).T).min())


@numba.njit
def _algorithm_1(
    x: np.ndarray, rows: np.ndarray, rates: np.ndarray, interval: int, first: int, averages: np.ndarray, sums: np.ndarray,
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, y: np.ndarray,
) -> None:  # fmt: skip
    steps, ranks, batch = rows.shape
    weight = np.empty(batch)
    for i in range(steps):
        for k in range(ranks):
            for b in range(batch):
                row, product = rows[i, k, b], 0.0
                for place in range(indptr[row], indptr[row + 1]):
                    product += values[place] * x[k, indices[place]]
                weight[b] = y[row] / (1 + np.exp(y[row] * product)) / batch
            x[k] -= rates[i] * x[k] / y.size
            for b in range(batch):
                row = rows[i, k, b]
                for place in range(indptr[row], indptr[row + 1]):
                    x[k, indices[place]] += rates[i] * weight[b] * values[place]
        step = first + i + 1
        mean = x.sum(0) / ranks
        if step % interval == 0:
            x[:] = mean
        for power in range(3):
            sums[power] += float(step) ** power
            averages[power] += float(step) ** power / sums[power] * (mean - averages[power])


def looks(limit: int) -> Iterator[int]:
    """The steps after which a simulation is looked at: every 3 %."""
    step = 10
    while step <= limit:
        yield step
        step = max(step + 10, int(step * 1.03))


Best = tuple[int, float, Config]  # steps, the value reached, the step size


def reach(problem: Problem, goal: float, config: Config, limit: int) -> tuple[int, float] | None:
    """The first step at which f is small enough, and f; None if there is none."""
    simulation = Simulation(problem, config)
    for step in looks(limit):
        simulation.advance(step)
        value = simulation.value()
        if value <= goal:
            return step, value
        if not math.isfinite(value):
            break
    return None


def tune(
    problem: Problem, optimum: float, run: tuple[int, int, int], epsilon: float, limit: int, near: Best | None
) -> Best | None:
    """The fewest steps over both kinds of step size and powers of two c: downhill from what was best for the run before."""
    best: Best | None = None
    for decaying in (False, True):
        start = round(math.log2(near[2].c)) if near and near[2].decaying == decaying else -4
        for powers in (range(start, SMALLEST - 1, -1), range(start + 1, 1)):
            misses = 0
            for power in powers:
                config = Config(*run, c=2.0**power, decaying=decaying)
                found = reach(problem, optimum + epsilon, config, best[0] - 1 if best else limit)
                best, misses = ((*found, config), 0) if found else (best, misses + 1)
                if misses == 2:
                    break
    return best


class Tuned:
    """Of each run the best; in a file, if there is one."""

    def __init__(self, problem: Problem, optimum: float, limit: int, path: Path | None) -> None:
        self._problem, self._optimum, self._limit, self._path = problem, optimum, limit, path
        self._known: dict[tuple[Any, ...], Best | None] = {}
        for *run, best in report.written(path):
            self._known[tuple(run)] = best and (best[0], best[1], Config(**best[2]))

    def best(self, run: tuple[int, int, int], epsilon: float, near: Best | None) -> Best | None:
        """As ``tune``."""
        key = (*run, epsilon, self._limit)
        if key not in self._known:
            best = tune(self._problem, self._optimum, run, epsilon, self._limit, near)
            self._known[key] = best
            if self._path:
                report.keep(self._path, [*key, best and [*best[:2], asdict(best[2])]])
        return self._known[key]


def result(
    ranks: int, interval: int, batch: int, epsilon: float, best: Any, alone: tuple[int, float, Config] | None
) -> dict[str, Any]:
    """A row, as yet without what the MPI ranks say."""
    steps, objective, config = best or (None, None, None)
    ratio = alone[0] / steps if alone and steps else None
    return {
        "ranks": ranks,
        "sync_every": interval,
        "batch": batch,
        "epsilon": epsilon,
        "steps": steps,
        "speedup_steps": ratio,
        "speedup_rho25": ratio / (1 + 2 * RHO * (ranks - 1) / interval) if ratio else None,
        "objective": objective,
        "config": config and asdict(config),
        "seconds": None,
        "difference": None,
    }


def run_real(arguments: argparse.Namespace, rows: report.Rows, ranks: int) -> int:
    """Run the rows' configurations again on MPI ranks, note seconds and the difference to the simulation; the status."""
    with tempfile.TemporaryDirectory() as folder:
        jobs, results = Path(folder) / "jobs.json", Path(folder) / "results.json"
        # Sync times are at multiples of H and at the end of training: whole rounds, to be the same as in the simulation.
        jobs.write_text(
            json.dumps(
                [{"config": r["config"], "steps": -(-r["steps"] // r["sync_every"]) * r["sync_every"]} for r in rows]
            )
        )
        line = [sys.executable, __file__, "--data", str(arguments.data), "--real", str(jobs), "--json", str(results)]
        if status := report.launch.run(ranks, line):
            return status
        for row, found in zip(rows, json.loads(results.read_text()), strict=True):
            row["seconds"], row["difference"] = found["seconds"], found["difference"]
    return 0


def real(arguments: argparse.Namespace) -> None:
    """On this job's ranks: each configuration, against the simulation; rank 0 writes the results."""
    import keras
    from mpi4py import MPI

    keras.config.set_floatx("float64")
    problem, world = Problem(arguments.data), MPI.COMM_WORLD
    results = []
    for entry in json.loads(arguments.real.read_text()):
        config, steps = Config(**entry["config"]), entry["steps"]
        iterates, seconds = train(problem, config, steps)
        everyone = world.gather(iterates)
        if everyone is not None:
            simulation, difference = Simulation(problem, config), 0.0
            for step in range(1, steps + 1):
                simulation.advance(step)
                difference = max(difference, float(np.abs(simulation.x - [own[step - 1] for own in everyone]).max()))
            results.append({"difference": difference, "seconds": seconds})
    if world.rank == 0:
        arguments.json.write_text(json.dumps(results))


def train(problem: Problem, config: Config, steps: int) -> tuple[np.ndarray, float]:
    """This rank's iterates after each step, through Keras and LocalSGDCallback, and the seconds of fit."""
    import keras
    import tensorflow as tf

    import hvd_localsgd as lsgd

    draws = problem.samples(lsgd.rank(), config.batch)
    rows = np.concatenate([next(draws) for _ in range(-(-steps // _DRAWN))])[:steps]
    rates = tf.constant([config.rate(t, problem.n) for t in range(steps)], tf.float32)

    class Rate(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            return tf.cast(rates[tf.cast(step, tf.int32)], tf.float64)

    class Iterates(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.kept: list[np.ndarray] = []

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.kept.append(np.array(self.model.trainable_variables[0].numpy())[:, 0])

    def pick(chosen: Any) -> Any:
        a, y = tf.numpy_function(
            lambda i: (problem.dense[i], problem.y[i][:, None]), [chosen], (tf.float64, tf.float64)
        )
        return tf.ensure_shape(a, (config.batch, problem.dimension)), tf.ensure_shape(y, (config.batch, 1))

    model = problem.keras_model(keras.optimizers.SGD(Rate()))
    batches = tf.data.Dataset.from_tensor_slices(rows).map(pick).prefetch(4)
    iterates = Iterates()
    callbacks = [lsgd.LocalSGDCallback(config.sync_every), iterates]
    began = time.perf_counter()
    model.fit(batches, verbose=0, shuffle=False, callbacks=callbacks)
    return np.stack(iterates.kept), report.slowest(time.perf_counter() - began)


def draw(figure: Any, rows: report.Rows, ranks: list[int]) -> None:
    """Speed-up against K, a line per H: in steps and in time (rho = 25), beside the formula S(K)."""
    from hvd_localsgd import speed_up

    cases = sorted({(row["batch"], row["epsilon"]) for row in rows})
    panels = figure.subplots(len(cases), 3, squeeze=False)
    for (batch, epsilon), (steps, timed, theory) in zip(cases, panels, strict=True):
        chosen = [row for row in rows if (row["batch"], row["epsilon"]) == (batch, epsilon)]
        for interval in sorted({row["sync_every"] for row in chosen}):
            for panel, column in ((steps, "speedup_steps"), (timed, "speedup_rho25")):
                line = [(row["ranks"], row[column]) for row in chosen if row["sync_every"] == interval and row[column]]
                if line:
                    panel.plot(*zip(*line, strict=True), marker=".", label=f"H = {interval}")
            theory.plot(ranks, [speed_up(k, interval, 0.0, RHO) for k in ranks], marker=".", label=f"H = {interval}")
        steps.plot(ranks, ranks, color="lightgray", zorder=0)
        steps.set_title(f"b = {batch}, ε = {epsilon:g}: in steps", fontsize=9)
        timed.set_title(f"in time, ρ = {RHO:g}", fontsize=9)
        theory.set_title("S(K) of the paper, ε → 0", fontsize=9)
        for panel in (steps, timed, theory):
            panel.set_xlabel("K")
        steps.legend(frameon=False, fontsize=7)
    figure.set_size_inches(11, 3.2 * len(cases))


def main() -> int:
    """Tune, count, compare; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a LIBSVM file, .bz2 or not")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--sync-every", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.005, 0.001])
    parser.add_argument(
        "--mpi", type=int, nargs="*", default=[2, 4], help="those of --ranks to run on real MPI ranks too"
    )
    parser.add_argument("--limit", type=int, default=100_000, help="steps")
    parser.add_argument("--work", type=Path, help="a file of what was tuned")
    parser.add_argument("--quick", action="store_true", help="K = 1, 2, 4; H = 1, 4, 16; b = 16; epsilon = 0.01")
    parser.add_argument("--json", type=Path, default=Path("runs/stich_w8a.json"))
    parser.add_argument("--real", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.real:
        real(arguments)
        return 0
    if arguments.quick:
        arguments.ranks, arguments.sync_every, arguments.batch, arguments.epsilon = [1, 2, 4], [1, 4, 16], [16], [0.01]
    problem = Problem(arguments.data)
    optimum = problem.optimum()
    print(f"{problem.n} samples, {problem.dimension} features, f* = {optimum:.12f}", flush=True)
    rows: report.Rows = []
    tuned = Tuned(problem, optimum, arguments.limit, arguments.work)
    for batch in arguments.batch:
        for epsilon in arguments.epsilon:
            alone = tuned.best((1, 1, batch), epsilon, None)
            for interval in arguments.sync_every:
                best = alone
                for ranks in sorted(arguments.ranks):
                    if ranks > 1:  # one rank has nothing to average
                        best = tuned.best((ranks, interval, batch), epsilon, best)
                    rows.append(result(ranks, interval, batch, epsilon, best, alone))
                    print(
                        f"b = {batch}, ε = {epsilon:g}, H = {interval}, K = {ranks}: T = {rows[-1]['steps']}",
                        flush=True,
                    )
    for row in rows:
        row["optimum"] = optimum
    for ranks in arguments.mpi:
        if status := run_real(arguments, [row for row in rows if row["ranks"] == ranks and row["steps"]], ranks):
            return status
    columns = ("ranks", "sync_every", "batch", "epsilon", "steps", "speedup_steps", "speedup_rho25", "objective",
               "seconds", "difference")  # fmt: skip
    report.finish(
        arguments.json, {"machine": report.machine(), "rows": rows}, "Local SGD on w8a", columns,
        lambda figure, all_rows: draw(figure, all_rows, sorted(arguments.ranks)),
    )  # fmt: skip
    worst = max((row["difference"] for row in rows if row["difference"] is not None), default=None)
    if worst is not None:
        print(f"largest difference between simulation and MPI ranks, over all iterates: {worst:.1e}")
    return 0 if worst is None or worst <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
