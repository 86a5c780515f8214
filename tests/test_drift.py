"""How far a rank is from the average, against numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_localsgd.core.drift import Drift
from hvd_localsgd.core.layout import Block, plan

SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=8)


def arrays_and_plan(sizes, dtypes, chunk_bytes, parts=1):
    wires = [np.dtype(np.float64 if dtype == np.float64 else np.float32) for dtype in dtypes]
    blocks = [Block(n, wire, dtype == wire) for n, wire, dtype in zip(sizes, wires, dtypes, strict=True)]
    return [np.empty(n, dtype) for n, dtype in zip(sizes, dtypes, strict=True)], plan(blocks, chunk_bytes, parts)


@given(SIZES, st.data(), st.integers(64, 20_000), st.integers(1, 3))
def test_of_a_small_model_it_is_exact(sizes, data, chunk_bytes, parts):
    kinds = st.sampled_from([np.float16, np.float32, np.float64])
    dtypes = data.draw(st.lists(kinds, min_size=len(sizes), max_size=len(sizes)))
    arrays, chunks = arrays_and_plan(sizes, dtypes, chunk_bytes, parts)
    random = np.random.default_rng(sum(sizes))
    before = [random.normal(size=array.size).astype(array.dtype) for array in arrays]
    after = [random.normal(size=array.size).astype(array.dtype) for array in arrays]
    drift, part = Drift(chunks), data.draw(st.integers(0, parts - 1))
    for array, values in zip(arrays, before, strict=True):
        array[:] = values
    drift.look(arrays, [chunk for chunk in chunks if chunk.part == part])
    for array, values in zip(arrays, after, strict=True):
        array[:] = values
    difference = np.concatenate([np.float64(a) - np.float64(b) for a, b in zip(after, before, strict=True)])
    first, last = (sum(sizes) * each // parts for each in (part, part + 1))
    assert drift.squared(arrays) == pytest.approx(np.sum(difference[first:last] ** 2), rel=1e-4, abs=1e-6)


@given(st.lists(st.integers(1, 300_000), min_size=1, max_size=5), st.integers(4096, 1 << 20))
def test_of_a_large_model_it_is_what_it_is_at_the_beginnings_of_chunks(sizes, chunk_bytes):
    arrays, chunks = arrays_and_plan(sizes, [np.dtype(np.float32)] * len(sizes), chunk_bytes)
    for array in arrays:
        array[:] = 1
    drift = Drift(chunks)
    for moved in (0.5, 2.0):  # as far everywhere: wherever it looks, that is what it finds
        drift.look(arrays, chunks)
        for array in arrays:
            array += moved
        assert drift.squared(arrays) == pytest.approx(moved**2 * sum(sizes), rel=1e-4)


def test_what_is_not_finite_is_seen_where_it_looks():
    arrays, chunks = arrays_and_plan([1000], [np.dtype(np.float32)], None)
    arrays[0][:] = 0
    drift = Drift(chunks)
    drift.look(arrays, chunks)
    arrays[0][700] = np.nan
    assert np.isnan(drift.squared(arrays))
