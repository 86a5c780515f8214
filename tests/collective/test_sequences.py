"""Any number of steps on any rank, any sizes and dtypes, several models at once: what comes out is what a simple model in numpy says."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_localsgd import devices

pytestmark = pytest.mark.usefixtures("several_ranks")

SHAPES = st.lists(st.sampled_from([(), (0,), (1,), (3,), (2, 5), (70, 9), (4, 0, 2)]), min_size=1, max_size=4)
DTYPES = st.sampled_from(["float16", "float32", "float64"])
MODELS = st.lists(st.tuples(SHAPES, DTYPES, st.integers(1, 7)), min_size=1, max_size=3)


def change(rank, step, model, shape, dtype):
    """Of a local step: multiples of 1/4, which half precision adds up exactly."""
    draw = np.random.default_rng([rank, step, model, len(shape)])
    return (draw.integers(-8, 9, shape) / 4).astype(dtype)


def simulated(counts, model, shapes, dtype, every, by_samples):
    """The protocol, of all ranks: each takes up to H steps, then those that took any are averaged, and all have the average.

    Rank k sees k + 1 samples in a step.
    """
    values = [np.zeros(shape, dtype) for shape in shapes]
    done = [0] * len(counts)
    while any(done[rank] < counts[rank] for rank in range(len(counts))):
        ends, weights = [], []
        for rank, count in enumerate(counts):
            own, steps = [value.copy() for value in values], range(done[rank], min(done[rank] + every, count))
            for step in steps:
                for value, shape in zip(own, shapes, strict=True):
                    value += change(rank, step, model, shape, dtype)
            done[rank] += len(steps)
            if steps:
                ends.append(own)
                weights.append(len(steps) * (rank + 1) if by_samples else 1)
        wire = "float64" if dtype == "float64" else "float32"
        share = np.array(weights, wire) / sum(weights)
        values = [
            np.array(sum(end[i].astype(wire) * part for end, part in zip(ends, share, strict=True)), dtype)
            for i in range(len(shapes))
        ]
    return values


@given(models=MODELS, counts=st.lists(st.integers(0, 20), min_size=4, max_size=4), by_samples=st.booleans())
def test_all_ranks_end_with_what_numpy_says(lsgd, models, counts, by_samples):
    counts, rank = counts[: lsgd.size()], lsgd.rank()
    own = [[np.zeros(shape, dtype) for shape in shapes] for shapes, dtype, _ in models]
    settings = {"weighting": "samples"} if by_samples else {}
    with contextlib.ExitStack() as stack:
        training = [
            stack.enter_context(lsgd.ModelAverager(arrays, every, **settings))
            for arrays, (_, _, every) in zip(own, models, strict=True)
        ]
        for step in range(counts[rank]):
            for number, (shapes, dtype, _) in enumerate(models):
                for array, shape in zip(own[number], shapes, strict=True):
                    array += change(rank, step, number, shape, dtype)
                training[number].step(1, rank + 1)
    for number, (shapes, dtype, every) in enumerate(models):
        expected = simulated(counts, number, shapes, dtype, every, by_samples)
        for array, value in zip(own[number], expected, strict=True):
            tolerance = {"float16": 2e-3, "float32": 1e-6, "float64": 1e-12}[dtype]
            np.testing.assert_allclose(array, value, rtol=tolerance, atol=tolerance * 20)
        bits = b"".join(array.tobytes() for array in own[number])
        assert len(set(devices.get().gather(bits))) == 1
