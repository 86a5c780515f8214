"""Encoded changes: what all ranks get, against the exchange written a second time in numpy, error feedback included."""

import ml_dtypes
import numpy as np
import pytest

from hvd_localsgd.core import codecs, compression

BLOCK, SIZE, ROUNDS = 512, 2 * 512 * 3 + 100, 6


@pytest.fixture(autouse=True)
def one_chunk(monkeypatch, lsgd):
    monkeypatch.setenv("HVD_LOCALSGD_CHUNK_MB", "2")


def rounded(name, values):
    """What a codec makes of numbers: each block by its largest magnitude, in float32."""
    blocks = values.astype(np.float32).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(1, keepdims=True)
    top = np.float32(127 if name == "int8" else 1)
    scaled = blocks * np.divide(top, largest, out=np.zeros_like(largest), where=largest > 0)
    cast = {"int8": np.rint, "fp16": lambda v: v.astype(np.float16), "bf16": lambda v: v.astype(ml_dtypes.bfloat16)}
    return (cast[name](scaled).astype(np.float32) * largest / top).reshape(-1)


class Exchange:
    """All ranks in one process: each sends every other one a part of its change, whose owner adds up and sends the sum."""

    def __init__(self, name, size):
        self.name, self.size = name, size
        self.share = -(-SIZE // (size * BLOCK)) * BLOCK
        self.lost = np.zeros((size, size * self.share))
        self.lost_sums = np.zeros((size, self.share))

    def mean(self, changes):
        weighted = self.lost.copy()
        weighted[:, :SIZE] += changes / self.size
        parts = weighted.reshape(self.size, self.size, self.share)
        result = []
        for owner in range(self.size):
            total = self.lost_sums[owner] + parts[owner, owner]
            for rank in set(range(self.size)) - {owner}:
                sent = rounded(self.name, parts[rank, owner])
                parts[rank, owner] -= sent
                total = total + sent
            parts[owner, owner] = 0
            result.append(rounded(self.name, total))
            self.lost_sums[owner] = total - result[-1]
        self.lost = weighted
        return np.concatenate(result)[:SIZE]


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("name", ["bf16", "fp16", "int8"])
def test_the_exchange_is_numpys_round_after_round(lsgd, gather, name):
    random = np.random.default_rng([2, lsgd.rank()])
    x, small = np.zeros(SIZE, np.float32), np.zeros(compression.SMALL - 1, np.float32)
    statistics, double = np.zeros(SIZE, np.float32), np.zeros(SIZE)
    exchange, expected = Exchange(name, lsgd.size()), np.zeros(SIZE)
    averager = lsgd.ModelAverager([x, small, double], 1, statistics=[statistics], compression=name)
    with averager:
        for number in range(1, codecs.WARM_UP + ROUNDS + 1):
            changes = np.array(gather(random.normal(size=SIZE).astype(np.float32)))
            for each in (x, small, statistics, double):
                each += changes[lsgd.rank()][: each.size]
            averager.step()
            plain = number <= codecs.WARM_UP
            expected += changes.mean(0) if plain else exchange.mean(changes)
            # A number that lies between two codes may be rounded either way.
            np.testing.assert_allclose(
                x, expected, atol=1e-5 if plain else {"int8": 0.05, "fp16": 2e-3, "bf16": 0.02}[name]
            )
            close = np.isclose(x, expected, atol=2e-6)
            assert close.mean() > 0.9
            expected = x.astype(np.float64)
            assert len(set(gather(x.tobytes()))) == 1
    means = [np.mean([each[k] for each in gather([small, statistics, double])], axis=0) for k in range(3)]
    for own, mean in zip((small, statistics, double), means, strict=True):
        np.testing.assert_array_equal(own, mean.astype(own.dtype))
    encoded = [each for each in averager.timings if each.interval][codecs.WARM_UP :]
    least, most = {"int8": (1e-3, 0.02), "fp16": (1e-5, 1e-3), "bf16": (1e-4, 5e-3)}[name]
    assert all(least < each.error < most for each in encoded)
    full = averager.timings[0].bytes
    assert full == 4 * (2 * SIZE + small.size) + 8 * SIZE
    parts = lsgd.size() * exchange.share
    assert encoded[0].bytes == full - 4 * SIZE + parts * {"int8": 1}.get(name, 2) + parts // BLOCK * 4


@pytest.mark.pairs
@pytest.mark.usefixtures("several_ranks")
def test_what_is_lost_once_is_made_up_for(lsgd, gather):
    """A change far below a code of its block is lost in each round, and arrives all the same."""
    x = np.zeros(8 * BLOCK, np.float32)
    with lsgd.ModelAverager([x], 1, compression="int8") as averager:
        for _ in range(400):
            x[0] += 1.0
            x[1:] += 0.001
            averager.step()
    np.testing.assert_allclose(x[1:], 0.4, rtol=0.05)
    np.testing.assert_allclose(x[0], 400, rtol=1e-4)
