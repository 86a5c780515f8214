"""Every rule for H, against the rule as it was published: no MPI here."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hvd_localsgd as lsgd
from hvd_localsgd.core import header, protocol, schedules
from hvd_localsgd.core.settings import Settings


def run(schedule, steps, rate=lambda step: np.nan, loss=lambda step: np.nan, remaining=False, pace=0.0, sync=0.0):
    """The steps at which a training of two equal ranks synchronises, decided as in a training, and H of each round."""
    settings, last, step, at, rounds = Settings(schedule), None, 0, [], []
    while step < steps:
        seen = {"rate": rate(step), "loss": loss(step), "remaining": steps - step if remaining else np.nan}
        own = header.row(total=step, steps=rounds[-1] if rounds else 0, pace=pace, sync=sync, clock=float(step), **seen)
        decision = protocol.decide(np.stack([own, own]), settings, last)
        if decision.trouble is not None:
            raise decision.trouble
        last = decision.now
        rounds.append(last.next)
        step += last.next
        at.append(step)
    return at, rounds


def test_post_local_switches_at_a_step():
    assert run(lsgd.PostLocal(5, 4), 20)[1] == [1] * 5 + [4] * 4


def test_post_local_switches_at_a_fraction():
    assert run(lsgd.PostLocal("0.5dur", 4), 20, remaining=True)[1] == [1] * 10 + [4, 4, 2]


def test_post_local_switches_where_the_rate_falls_for_the_first_time():
    """After a warm-up, and for good, though the rate rises again later."""
    rates = [0.1, 0.2, 0.3, 0.3, 0.3, 0.03, *[0.5] * 100]
    assert run(lsgd.PostLocal("rate", 8), 20, rate=lambda step: rates[step])[1] == [1] * 5 + [8, 8]


def test_warm_up_is_linear():
    assert run(lsgd.Warmup(10, 21), 70)[1] == [1, 3, 9, 21, 21, 21]  # at 0, 1, 4, 13, 34, 55: 1 + 20 t / 10
    with pytest.raises(ValueError, match="says at which steps to average"):
        lsgd.Warmup(10, lsgd.SyncSteps([3]))


def test_schedules_one_after_another():
    joined = lsgd.Join([2, lsgd.Constant(4), lsgd.Growing(1.0, 3)], until=[5, 12])
    assert run(joined, 20)[0] == [2, 4, 5, 9, 12, 15, 18, 21]
    with pytest.raises(ValueError, match="a step between each two"):
        lsgd.Join([2, 4], until=[])
    with pytest.raises(ValueError, match="strictly increasing"):
        lsgd.Join([2, 4, 6], until=[5, 5])


@given(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0), st.integers(1, 50))
def test_the_quadratic_rule(alpha, rate, base):
    schedule = lsgd.QuadraticSync(alpha, base)
    assert schedule.interval(lsgd.Now(0, rate=rate)) == max(base, math.floor((alpha / rate) ** 2))
    assert lsgd.QuadraticSync(alpha, base, maximum=base).interval(lsgd.Now(0, rate=rate)) == base


def test_the_quadratic_rule_is_clipped_to_what_remains():
    """A cosine from 0.008 to 0, alpha 0.0175, base 4: the settings of the paper's ViT-B."""
    steps = 400
    at, rounds = run(
        lsgd.QuadraticSync(0.0175), steps, rate=lambda t: 0.004 * (1 + math.cos(math.pi * t / steps)), remaining=True
    )
    expected, t = [], 0
    while t < steps:
        rate = 0.004 * (1 + math.cos(math.pi * t / steps))
        expected.append(min(max(4, math.floor((0.0175 / rate) ** 2)), steps - t))
        t += expected[-1]
    assert rounds == expected
    assert at[-1] == steps


def test_adacomm():
    """One step a second, T_0 = 10: the rule where it lowers H, half of H where it does not."""
    losses = {0: 4.0, 8: 4.0, 16: 1.0, 20: 1.0, 24: 1.0, 28: 1.0}
    at, rounds = run(lsgd.AdaComm(8, every=10), 40, rate=lambda t: 0.1, loss=lambda t: losses.get(t, 0.9))
    # At 16 s, after the first 10: ceil(8 sqrt(1/4)) = 4. At 20: ceil(8 / 2) = 4 is not lower, so 2. At 30: ceil(8 sqrt(0.9/4)) = 4, so 1.
    assert rounds[:4] == [8, 8, 4, 2]
    assert rounds[at.index(30) + 1] == 1
    assert set(rounds[at.index(30) + 1 :]) == {1}
    falling = run(lsgd.AdaComm(8, every=10), 24, rate=lambda t: 0.1 if t < 16 else 0.4, loss=lambda t: 4.0)[1]
    assert falling[:3] == [8, 8, 4], "ceil(8 sqrt(0.1 / 0.4))"


@pytest.mark.parametrize("growth", [2.0, math.sqrt(2)])
def test_stages(growth):
    rounds = run(lsgd.Stagewise(16, 2, growth), 16 * 7)[1]
    expected = []
    for stage in range(3):
        left, h = 16 * 2**stage, int(2 * growth**stage)
        expected += [h] * (left // h) + ([left % h] if left % h else [])
    assert rounds == expected


@given(st.floats(1e-5, 10), st.floats(1e-5, 10), st.floats(0.01, 0.5))
def test_auto_gives_averaging_its_share(step, sync, share):
    h = lsgd.Auto(share, maximum=10**9).interval(lsgd.Now(0, step_seconds=step, sync_seconds=sync))
    assert sync / (sync + h * step) <= share * (1 + 1e-9), "no more than that"
    assert h == 1 or sync / (sync + (h - 1) * step) > share * (1 - 1e-9), "and H no larger than needed"


def test_auto_has_bounds_and_begins_at_16():
    assert run("auto", 48)[1] == [16, 16, 16]
    assert run(lsgd.Auto(0.05, 2, 40), 80, pace=0.01, sync=10.0)[1] == [40, 40]
    assert run(lsgd.Auto(0.05, 20, 40), 80, pace=1.0, sync=1e-3)[1] == [20] * 4
    with pytest.raises(ValueError, match="minimum is above maximum"):
        lsgd.Auto(0.1, 9, 8)


def test_a_function():
    def rule(step, round, rate):
        return 1 + round if rate > 0.1 else 7

    assert run(rule, 12, rate=lambda step: 0.2 if step < 6 else 0.1)[1] == [1, 2, 3, 7]
    with pytest.raises(ValueError, match="Received one that takes .'temperature'."):
        Settings(lambda temperature: 1)
    with pytest.raises(ValueError, match=r"what <lambda> returns must be an integer >= 1 .*Received: 0"):
        run(lambda step: 0, 5)
    descriptions = [Settings(function).description() for function in (rule, lambda step: 3, lambda step: 4)]
    assert len({description["sync_every"] for description in descriptions}) == 3


MADE = {
    "AdaComm": lambda: lsgd.AdaComm(9, 3.0),
    "Auto": lambda: lsgd.Auto(0.2, 3, 9),
    "Constant": lambda: lsgd.Constant(5),
    "Growing": lambda: lsgd.Growing(0.5, 8),
    "Join": lambda: lsgd.Join([lsgd.PostLocal(3, 5), lsgd.Warmup(4, lsgd.Growing(2.0))], [10]),
    "OneShot": lambda: lsgd.OneShot(),
    "PostLocal": lambda: lsgd.PostLocal("0.25dur", 6),
    "QuadraticSync": lambda: lsgd.QuadraticSync(0.3, 2, 50),
    "Stagewise": lambda: lsgd.Stagewise(10, 2, 1.5),
    "SyncSteps": lambda: lsgd.SyncSteps([2, 5, 30]),
    "Warmup": lambda: lsgd.Warmup(10, lsgd.QuadraticSync(0.3)),
}


@pytest.mark.parametrize("name", MADE)
def test_it_survives_serialisation_and_needs_the_same(name):
    assert set(MADE) | {"Function"} == {kind.__name__ for kind in schedules.SCHEDULES}
    schedule = MADE[name]()
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    assert type(copy) is type(schedule)
    assert copy.needs == schedule.needs
    assert repr(copy) == repr(schedule)
    seen = {"rate": lambda t: 0.1 / (1 + t), "loss": lambda t: 1 / (1 + t), "remaining": True, "pace": 0.1, "sync": 0.2}
    assert run(copy, 50, **seen) == run(schedule, 50, **seen)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lsgd.PostLocal("half"), 'or a fraction such as "0.5dur". Received: .half.'),
        (lambda: lsgd.PostLocal("1.5dur"), "Received: .1.5dur."),
        (lambda: lsgd.PostLocal(-1), "Received: -1"),
        (lambda: lsgd.QuadraticSync(0.0), "alpha must be > 0"),
        (lambda: lsgd.AdaComm(4, 0), "every must be > 0 seconds"),
        (lambda: lsgd.Stagewise(4, 1, 0.5), "growth must be >= 1"),
        (lambda: lsgd.Auto(1.0), "share must lie between 0 and 1"),
        (lambda: Settings("sometimes"), "Received: 'sometimes'"),
        (
            lambda: lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), lsgd.AdaComm()),
            "needs the loss, which LocalSGDOptimizer",
        ),
        (lambda: lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), lsgd.PostLocal("0.5dur")), "needs the remaining"),
    ],
)
def test_nonsense_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()
