"""Local steps that anybody can predict, and what averages make of them, in numpy."""

from bisect import bisect_right

import numpy as np
from ml_dtypes import bfloat16


def change(rank, step, model, shape, dtype):
    """Of a local step: multiples of 1/4, which half precision adds up exactly."""
    draw = np.random.default_rng([rank, step, model, len(shape)])
    return (draw.integers(-8, 9, shape) / 4).astype(bfloat16 if dtype == "bfloat16" else dtype)


def round_of(every, step):
    """H of the round that begins after so many steps; ``every``: H, or all steps after which to average."""
    if isinstance(every, int):
        return every
    place = bisect_right(every, step)
    return every[place] - step if place < len(every) else 1 << 30


def simulated(counts, model, shapes, dtype, every, by_samples=False, bad=(), died=()):
    """The protocol, of all ranks: each takes up to H steps, then those that took any are averaged, and all have the average.

    Rank k sees k + 1 samples in a step.

    Args:
        counts: steps that each rank has data for.
        bad: (rank, step) where something becomes NaN: that rank is left out of the average that follows, if there is something to break.
        died: (rank, step): the rank that is killed in this step, as ``change`` counts them, and is in no average that follows.
    """
    wire = "float64" if dtype == "float64" else "float32"
    dtype = bfloat16 if dtype == "bfloat16" else dtype
    values = [np.zeros(shape, dtype) for shape in shapes]
    done, begun, dead = [0] * len(counts), 0, set()
    breaks = any(np.prod(shape) for shape in shapes)
    while any(done[rank] < counts[rank] for rank in range(len(counts)) if rank not in dead):
        ends, weights, interval = [], [], round_of(every, begun)
        for rank, count in enumerate(counts):
            own, steps = [value.copy() for value in values], range(done[rank], min(done[rank] + interval, count))
            for step in steps:
                for value, shape in zip(own, shapes, strict=True):
                    value += change(rank, step, model, shape, dtype)
            done[rank] += len(steps)
            dead |= {rank for who, step in died if who == rank and step in steps}
            broken = breaks and any((rank, step) in bad for step in steps)
            if steps and rank not in dead and not broken:
                ends.append(own)
                weights.append(len(steps) * (rank + 1) if by_samples else 1)
        begun += interval
        if ends:
            share = np.array(weights, wire) / sum(weights)
            values = [
                np.array(sum(end[i].astype(wire) * part for end, part in zip(ends, share, strict=True)), dtype)
                for i in range(len(shapes))
            ]
    return values
