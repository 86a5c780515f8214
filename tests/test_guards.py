"""Whose change counts: pure functions of the norms, no MPI here."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hvd_localsgd as lsgd
from hvd_localsgd.core import header, protocol
from hvd_localsgd.core.settings import Settings

NORMS = st.lists(st.floats(0, 1e30), min_size=1, max_size=16)


def table(norms, steps=1):
    return np.stack([header.row(steps=steps, recent=steps, norm=norm, finite=True, due=True) for norm in norms])


def syncs(guard, rounds):
    """The weights at each sync."""
    last, weights = None, []
    for norms in rounds:
        decision = protocol.decide(table(norms), Settings(1, guard=guard), last)
        last = decision.now
        weights.append(decision.weights)
    return weights


@given(st.lists(st.lists(st.floats(0, 1e30), min_size=3, max_size=3), min_size=1, max_size=12))
def test_weights_sum_to_one_or_nobody_counts(rounds):
    for weights in syncs(lsgd.Outliers(2.0, 0.3, 2), rounds):
        assert (weights >= 0).all()
        assert weights.sum() == pytest.approx(1) or not weights.any()


@given(NORMS)
def test_the_farther_the_less(norms):
    (weights,) = syncs("norms", [norms])
    expected = np.exp(-(np.array(norms) - min(norms)))
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-9, atol=1e-300)


def test_a_rank_without_steps_has_no_weight():
    rows = table([1.0, 2.0, 3.0])
    rows["steps"][0] = rows["recent"][0] = 0
    for guard in ("norms", lsgd.Outliers(warm_up=1)):
        weights = protocol.decide(rows, Settings(1, guard=guard)).weights
        assert weights[0] == 0
        assert weights.sum() == pytest.approx(1)


def test_an_outlier_is_left_out_and_not_learned_from():
    """Mean and variance by numpy: while fewer than 1 / decay, plain ones of what counted."""
    random = np.random.default_rng(0)
    rounds = [list(1 + 0.1 * random.normal(size=2)) for _ in range(8)]
    rounds[6][1] = 1000.0
    weights = syncs(lsgd.Outliers(3.0, 0.02, 5), rounds)
    assert [w.tolist() for w in weights[:6]] == [[0.5, 0.5]] * 6
    assert weights[6].tolist() == [1.0, 0.0]
    assert weights[7].tolist() == [0.5, 0.5], "m and s are those of before"
    counted = np.array([norms[1] for norms in rounds[:6]])
    z = (1000.0 - counted.mean()) / counted.std()
    assert z > 3
    inside = [*counted[:5], counted[:5].mean() + 2.9 * counted[:5].std()]
    outside = [*counted[:5], counted[:5].mean() + 3.1 * counted[:5].std()]
    for norms, expected in ((inside, 0.5), (outside, 0.0)):
        assert syncs(lsgd.Outliers(3.0, 0.02, 5), [[1.0, norm] for norm in norms])[-1][1] == expected


def test_nobody_is_left_out_before_the_warm_up():
    assert syncs(lsgd.Outliers(3.0, 0.02, 5), [[1.0, 1.0], [1.0, 1e6]])[-1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guard": "nobody"}, r"guard must be None, one of .* Received: 'nobody'"),
        ({"clip_change": 0}, "clip_change must be a norm > 0, or None. Received: 0"),
        ({"guard": "norms", "mode": "async"}, "changes of all ranks are never there together"),
        ({"clip_change": 1.0, "mode": "async"}, "changes of all ranks are never there together"),
    ],
)
def test_nonsense_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        Settings(4, **options)
    with pytest.raises(ValueError, match="threshold=0"):
        lsgd.Outliers(0)
