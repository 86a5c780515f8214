"""Numbers in fewer bits, against numpy's own casts; the exchange of encoded changes is in tests/collective/test_compression.py."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_localsgd.backends import native
from hvd_localsgd.core import stages
from hvd_localsgd.core.codecs import BLOCK, CODECS

TOP = {"bf16": 1, "fp16": 1, "int8": 127}


def by_numpy(name, values):
    """Of blocks scaled by their largest magnitude, each number rounded to the nearest."""
    blocks = values.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(1, keepdims=True)
    scaled = blocks * np.divide(np.float32(TOP[name]), largest, out=np.zeros_like(largest), where=largest > 0)
    cast = {
        "bf16": lambda v: v.astype(ml_dtypes.bfloat16),
        "fp16": lambda v: v.astype(np.float16),
        "int8": lambda v: np.rint(v).astype(np.int8),
    }[name]
    scale = largest if name != "int8" else np.nextafter(largest / np.float32(127), np.float32(0))
    return (cast(scaled).astype(np.float32) * scale).reshape(-1)


@pytest.fixture(params=["numpy", "compiled"], autouse=True, scope="module")
def codec_of(request):
    if request.param == "numpy":
        return CODECS.__getitem__
    if native.load() is None:
        pytest.skip("the codecs are not built: python -m hvd_localsgd.tools.build_kernel")
    return native.codec


def through(codec, values):
    """Decoded, what is said to be lost, and the bytes."""
    lost = values.copy()
    raw = np.zeros(codec.bytes(values.size), np.uint8)
    with np.errstate(over="ignore"):  # of the squares, which are float32
        squares = codec.encode(lost, raw)
    expected = [each @ each for each in (values.astype(np.float64), lost.astype(np.float64))]
    if max(expected) < 1e37:
        np.testing.assert_allclose(squares, expected, rtol=1e-4, atol=1e-30)
    decoded = np.full_like(values, np.nan)
    codec.decode(raw, decoded)
    return decoded, lost, raw


@pytest.mark.parametrize("name", CODECS)
@given(st.integers(0, 2**32), st.integers(1, 300), st.floats(-30, 30))
def test_decoded_is_numpys_rounding_and_the_rest_is_lost(codec_of, name, seed, blocks, exponent):
    random = np.random.default_rng(seed)
    values = random.normal(size=blocks * BLOCK) * 10.0 ** random.uniform(-3, 3, blocks).repeat(BLOCK)
    values = (values * 10.0**exponent).clip(-3e38, 3e38).astype(np.float32)
    values[random.random(values.size) < 0.1] = 0.0
    decoded, lost, raw = through(codec_of(name), values)
    np.testing.assert_array_equal(decoded, by_numpy(name, values))
    np.testing.assert_array_equal(lost, values - decoded)
    total = values.copy()
    codec_of(name).add(raw, total)
    np.testing.assert_array_equal(total, values + decoded)
    part = np.zeros(values.size - 7, np.float32)
    codec_of(name).decode(raw, part)
    np.testing.assert_array_equal(part, decoded[:-7])


@pytest.mark.parametrize("name", CODECS)
def test_how_much_is_lost_and_sent(codec_of, name):
    values = np.random.default_rng(1).normal(size=64 * BLOCK).astype(np.float32)
    decoded, _, raw = through(codec_of(name), values)
    assert raw.size == {"bf16": 2, "fp16": 2, "int8": 1}[name] * values.size + 4 * 64
    lost = np.linalg.norm(values - decoded) / np.linalg.norm(values)
    assert lost < {"bf16": 2**-8, "fp16": 2**-11, "int8": 0.02}[name]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-45, -3e-40, np.finfo(np.float32).tiny, 1.0, -np.finfo(np.float32).max], ids=str
)
def test_zeros_denormals_and_the_largest_numbers(codec_of, name, value):
    values = np.full(BLOCK, value, np.float32)
    decoded, lost, _ = through(codec_of(name), values)
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded + lost, values)
    if abs(value) > 1e-37 or not value:
        np.testing.assert_allclose(decoded, values, rtol=1e-6)


@pytest.mark.parametrize("name", CODECS)
def test_a_block_does_not_suffer_from_its_neighbours(codec_of, name):
    values = np.random.default_rng(2).uniform(0.5, 1, 2 * BLOCK).astype(np.float32)
    values[:BLOCK] *= 1e30
    decoded, _, _ = through(codec_of(name), values)
    np.testing.assert_allclose(decoded, values, rtol=0.01)


@given(st.integers(1, 300), st.data(), st.sampled_from([np.nan, np.inf, -np.inf]), st.sampled_from([0.0, 0.25, 1 / 3]))
def test_a_weight_is_given_and_what_is_not_finite_is_seen(codec_of, size, data, bad, weight):
    scale = stages.scale if codec_of == CODECS.__getitem__ else native.scale
    random = np.random.default_rng(size)
    values = np.append(random.normal(size=size) * 10.0 ** random.uniform(-44, 18, size), 1).astype(np.float32)
    expected = values[:size] * np.float32(weight)
    own, witness = scale(values[:size], weight)
    np.testing.assert_array_equal(own, expected)
    assert np.shares_memory(own, values), "in place"
    assert values[size] == 1, "and no farther"
    assert np.isfinite(witness)
    own[data.draw(st.integers(0, size - 1))] = bad
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(scale(own, weight)[1])
