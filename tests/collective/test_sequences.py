"""Any number of steps on any rank, sizes, dtypes, sync times, several models, NaN: what comes out is what a simple model in numpy says."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from hvd_localsgd import devices

from ..programs.steps import change, simulated

pytestmark = pytest.mark.usefixtures("several_ranks")

SHAPES = st.lists(st.sampled_from([(), (0,), (1,), (3,), (2, 5), (70, 9), (4, 0, 2)]), min_size=1, max_size=4)
DTYPES = st.sampled_from(["float16", "float32", "float64", "bfloat16"])
TOLERANCES = {"float16": 2e-3, "float32": 1e-6, "float64": 1e-12, "bfloat16": 2e-2}
TIMES = st.lists(st.integers(1, 25), min_size=1, max_size=6, unique=True).map(sorted)
MODELS = st.lists(st.tuples(SHAPES, DTYPES, st.integers(1, 7) | TIMES), min_size=1, max_size=3)
BROKEN = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 2)), max_size=3)  # step, model


def variables(shapes, dtype):
    """Arrays, or, as numpy has no bfloat16, TensorFlow's variables; and what adds to one of them."""
    if dtype != "bfloat16":
        return [np.zeros(shape, dtype) for shape in shapes], lambda array, value: np.add(array, value, out=array)
    import tensorflow as tf

    return [tf.Variable(np.zeros(shape, bfloat16)) for shape in shapes], lambda variable, value: variable.assign_add(
        value
    )


@given(
    models=MODELS, counts=st.lists(st.integers(0, 20), min_size=4, max_size=4), broken=BROKEN, by_samples=st.booleans()
)
@pytest.mark.filterwarnings("ignore:NaN or infinity")
def test_all_ranks_end_with_what_numpy_says(lsgd, models, counts, broken, by_samples):
    """NaN comes up on rank 0; the last rank has the most steps, so that there is always somebody to average."""
    counts, rank = [*counts[: lsgd.size() - 1], 20], lsgd.rank()
    own = [variables(shapes, dtype) for shapes, dtype, _ in models]
    settings = {"weighting": "samples"} if by_samples else {}
    with contextlib.ExitStack() as stack:
        training = [
            stack.enter_context(
                lsgd.ModelAverager(
                    arrays,
                    every if isinstance(every, int) else lsgd.SyncSteps(every),
                    on_nonfinite="skip_rank",
                    **settings,
                )
            )
            for (arrays, _), (_, _, every) in zip(own, models, strict=True)
        ]
        for step in range(counts[rank]):
            for number, (arrays, add) in enumerate(own):
                shapes, dtype, _ = models[number]
                for array, shape in zip(arrays, shapes, strict=True):
                    value = change(rank, step, number, shape, dtype)
                    add(array, value * np.nan if rank == 0 and (step, number) in broken else value)
                training[number].step(1, rank + 1)
    for number, (shapes, dtype, every) in enumerate(models):
        bad = {(0, step) for step, model in broken if model == number}
        expected = simulated(counts, number, shapes, dtype, every, by_samples, bad)
        arrays = [np.asarray(array) for array in own[number][0]]
        for array, value in zip(arrays, expected, strict=True):
            tolerance = TOLERANCES[dtype]
            np.testing.assert_allclose(array.astype(float), value.astype(float), rtol=tolerance, atol=tolerance * 20)
        assert len(set(devices.get().gather(b"".join(array.tobytes() for array in arrays)))) == 1
