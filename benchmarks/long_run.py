"""Does anything grow? Memory, file handles, threads and the time of a round, over many rounds of a tiny model (H = 1).

python benchmarks/long_run.py --ranks 4 --ways callback --rounds 20000

The slope over the second half of a run is what each further round costs; over the first half caches and windows fill. The
most of all ranks counts. Time is the processor's, which other work on the machine disturbs less. IterateAverage runs alone, without
syncs: a round of it is a step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report

_SAMPLES = 50  # in a run
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Sampler:
    """Looks at this process every so many rounds.

    Args:
        every: rounds from sample to sample.
    """

    def __init__(self, every: int) -> None:
        self._every, self._rounds, self._began = every, 0, time.process_time()
        self.samples: list[dict[str, float]] = []

    def round(self) -> None:
        """One more."""
        self._rounds += 1
        if self._rounds % self._every == 0:
            seconds = (time.process_time() - self._began) / self._every
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append(
                {
                    "round": self._rounds,
                    "memory": pages * _PAGE,
                    "handles": len(os.listdir("/proc/self/fd")),
                    "threads": threading.active_count(),
                    "round_s": seconds,
                }
            )
            self._began = time.process_time()


def measure(arguments: argparse.Namespace) -> report.Rows:
    """A row for each way."""
    from hvd_localsgd import devices

    communicator, rows = devices.get(), []
    for way in arguments.ways:
        sampler = Sampler(max(1, arguments.rounds // _SAMPLES))
        _WAYS[way](arguments.rounds, sampler)
        everyone = list(map(json.loads, communicator.gather(json.dumps(sampler.samples).encode())))
        samples = [{key: max(s[key] for s in same) for key in same[0]} for same in zip(*everyone, strict=True)]
        half = samples[len(samples) // 2 :]
        first, last = half[0], half[-1]
        rows.append(
            {
                "way": way,
                "ranks": len(everyone),
                "rounds": arguments.rounds,
                "bytes a round": max(slope(each[len(samples) // 2 :], "memory") for each in everyone),
                "MB": last["memory"] / 1e6,
                "handles": f"{first['handles']:.0f} to {last['handles']:.0f}",
                "threads": f"{first['threads']:.0f} to {last['threads']:.0f}",
                "round_s": median(half, "round_s"),
                "ns a round": 1e9 * slope(half, "round_s"),
                "samples": samples,
            }
        )
    return rows


def slope(samples: list[dict[str, float]], key: str) -> float:
    """Of the least-squares line, per round."""
    import numpy as np

    return (
        float(np.polyfit([s["round"] for s in samples], [s[key] for s in samples], 1)[0]) if len(samples) > 1 else 0.0
    )


def median(samples: list[dict[str, float]], key: str) -> float:
    """The median."""
    import numpy as np

    return float(np.median([s[key] for s in samples]))


def fit(rounds: int, sampler: Sampler, optimizer: Any, callbacks: list[Any]) -> None:
    """Of a dense model with five weights, in epochs of 500 steps."""
    import keras
    import tensorflow as tf

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    data = tf.data.Dataset.from_tensors((tf.ones((2, 4)), tf.ones((2, 1)))).repeat()
    steps = min(rounds, 500)
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: sampler.round())
    model.fit(
        data, steps_per_epoch=steps, epochs=rounds // steps, shuffle=False, verbose=0, callbacks=[*callbacks, watch]
    )


def callback(rounds: int, sampler: Sampler) -> None:
    """``LocalSGDCallback``."""
    import hvd_localsgd as lsgd

    fit(rounds, sampler, "sgd", [lsgd.LocalSGDCallback(1)])


def optimizer(rounds: int, sampler: Sampler) -> None:
    """``LocalSGDOptimizer``."""
    import keras

    import hvd_localsgd as lsgd

    fit(rounds, sampler, lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), 1), [])


def iterates(rounds: int, sampler: Sampler) -> None:
    """``IterateAverage``, which averages over ranks at the end alone."""
    import hvd_localsgd as lsgd

    fit(rounds, sampler, "sgd", [lsgd.IterateAverage()])


def averager(rounds: int, sampler: Sampler) -> None:
    """``ModelAverager``, of numpy arrays."""
    import numpy as np

    import hvd_localsgd as lsgd

    with lsgd.ModelAverager([np.zeros(4, np.float32)], 1) as own:
        for _ in range(rounds):
            own.step()
            sampler.round()


def plain(rounds: int, sampler: Sampler) -> None:
    """Keras alone: what grows without us."""
    fit(rounds, sampler, "sgd", [])


_WAYS: dict[str, Callable[[int, Sampler], None]] = {
    "callback": callback,
    "optimizer": optimizer,
    "averager": averager,
    "iterates": iterates,
    "plain": plain,
}


def draw(figure: Any, rows: report.Rows) -> None:
    """Memory beyond the first sample, and the processor's time for a round, against rounds."""
    left, right = figure.subplots(1, 2)
    for row in rows:
        samples, label = row["samples"], f"{row['way']}, {row['ranks']} ranks"
        rounds = [s["round"] for s in samples]
        left.plot(rounds, [(s["memory"] - samples[0]["memory"]) / 1e6 for s in samples], label=label)
        right.plot(rounds, [1e3 * s["round_s"] for s in samples], label=label)
    left.set_ylabel("MB since the first sample")
    right.set_ylabel("ms a round")
    for panel in (left, right):
        panel.set_xlabel("round")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = report.parser(__doc__, repeats=1)
    parser.set_defaults(ranks=[4])
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--ways", nargs="+", choices=tuple(_WAYS), default=list(_WAYS))
    columns = ("way", "ranks", "rounds", "bytes a round", "MB", "handles", "threads", "round_s", "ns a round")
    return report.run(parser.parse_args(), measure, "What a further round costs", columns, draw)


if __name__ == "__main__":
    sys.exit(main())
