"""The decision is a pure function of the header table: no MPI here."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_localsgd.core import header, protocol
from hvd_localsgd.core.groups import Groups
from hvd_localsgd.core.progress import Progress
from hvd_localsgd.core.schedules import Growing, Now
from hvd_localsgd.core.settings import Settings

RANK = st.fixed_dictionaries(
    {
        "model": st.just(7),
        "position": st.sampled_from([0.0, 1.0, 2.0, np.inf]),
        "group": st.integers(0, 3),
        "steps": st.integers(0, 1000),
        "before": st.one_of(st.just(0), st.integers(0, 1000)),
        "total": st.integers(0, 10**6),
        "samples": st.floats(0, 1e9),
        "due": st.booleans(),
        "pace": st.one_of(st.just(0.0), st.floats(1e-6, 1e3)),
        "finite": st.booleans(),
        "stop": st.booleans(),
        "rate": st.one_of(st.just(np.nan), st.floats(0, 10)),
        "loss": st.one_of(st.just(np.nan), st.floats(-1e9, 1e9)),
    }
)


def table_of(rows):
    """Their headers; ``before``: steps of earlier rounds that are not in all of the averages yet."""
    rows = [{"before": 0, **row} for row in rows]
    recent = [(row.pop("before") + row["steps"], row.get("samples", 0.0)) for row in rows]
    return np.stack([header.row(**row, recent=n, recent_samples=m) for row, (n, m) in zip(rows, recent, strict=True)])


TABLES = st.lists(RANK, min_size=1, max_size=64).map(table_of)
SETTINGS = st.builds(
    Settings,
    st.one_of(st.integers(1, 100), st.builds(Growing, st.floats(0.1, 10))),
    weighting=st.sampled_from(["equal", "samples"]),
    interval=st.sampled_from(["equal", "balanced"]),
)


@given(TABLES, SETTINGS)
def test_weights_sum_to_one_or_nobody_steps_and_who_did_not_step_has_none(table, settings):
    decision = protocol.decide(table, settings)
    assert (decision.weights >= 0).all()
    assert (decision.weights[table["recent"] == 0] == 0).all()
    if table["recent"].any():
        assert decision.weights.sum() == pytest.approx(1, abs=1e-9)
    else:
        assert not decision.weights.any()
        assert not decision.average


@given(TABLES, SETTINGS, st.sampled_from(["skip_rank", "rollback"]))
def test_a_rank_that_is_not_finite_is_left_out_of_a_sync_of_everything(table, settings, policy):
    settings = dataclasses.replace(settings, on_nonfinite=policy, fragments=1)
    decision, finite = protocol.decide(table, settings, Now(0, round=3)), table["finite"]
    assert (decision.weights[~finite] == 0).all()
    assert decision.goes_on == finite.any()
    if table["recent"].any() and finite.any():
        assert decision.weights.sum() == pytest.approx(1, abs=1e-9)
    if not finite.all():
        fragments = dataclasses.replace(settings, interval="equal", sync_every=8, fragments=4)
        assert protocol.decide(table, fragments, Now(0, round=3)).now.whole


@given(TABLES, st.sampled_from(["equal", "samples"]), st.integers(0, 20), st.integers(2, 5))
def test_groups_weigh_their_own_ranks_until_all_meet(table, weighting, rounds, every):
    settings = Settings(5, weighting=weighting, groups=Groups("node", every))
    table["position"] = 0.0
    decision = protocol.decide(table, settings, Now(0, round=rounds))
    assert decision.now.world == ((rounds + 1) % every == 0)
    groups = [table["group"] >= 0] if decision.now.world else [table["group"] == each for each in set(table["group"])]
    counted = table["recent" if decision.now.world else "steps"] > 0
    for group in groups:
        if counted[group].any():
            assert decision.weights[group].sum() == pytest.approx(1, abs=1e-9)
            assert (decision.weights[group & ~counted] == 0).all()
        elif not decision.now.world:
            np.testing.assert_allclose(decision.weights[group], 1 / group.sum())
    table["position"] = 1.0  # all have come further, to an epoch's end perhaps
    assert protocol.decide(table, settings, Now(0, round=rounds)).now.whole


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 100))
def test_every_fragment_has_its_turn_once_in_h_steps_wherever_training_begins(fragments, interval, start):
    settings = Settings(interval, fragments=fragments)

    def syncs(step, until):
        """The fragments at each step that is a sync's."""
        last, found = protocol.decide(table_of([{"total": step, "steps": 0}]), settings).now, {}
        while last.step < until:
            assert last.next >= 1
            step = last.step + last.next
            last = protocol.decide(table_of([{"total": step, "steps": last.next, "due": True}]), settings, last).now
            found[step] = sorted(last.parts)
        return found

    found = syncs(start, start + 3 * interval)
    for first in range(start, start + 2 * interval):
        turns = [part for step, parts in found.items() if first < step <= first + interval for part in parts]
        assert sorted(turns) == list(range(fragments))
    resumed = min(found)
    later = syncs(resumed, start + 3 * interval)
    assert later == {step: parts for step, parts in found.items() if step > resumed}


def test_fragments_have_their_turns_while_the_rank_that_has_come_farthest_waits():
    settings = Settings(8, fragments=4)
    last = protocol.decide(table_of([{"total": 100, "steps": 0}] * 2), settings).now
    turns = []
    for sync in range(1, 9):
        waits = {"total": 150, "steps": 0, "before": 1, "position": 1.0, "due": True}
        trains = {"total": 100 + 2 * sync, "steps": 2, "due": True}
        last = protocol.decide(table_of([waits, trains]), settings, last).now
        assert last.next == 2
        turns += last.parts
    assert turns == [2, 3, 0, 1, 2, 3, 0, 1]  # step 100 is in the middle of a round of 8


@given(TABLES, SETTINGS, st.randoms())
def test_another_order_of_ranks_only_changes_the_order_of_the_answer(table, settings, random):
    order = list(range(len(table)))
    random.shuffle(order)
    one, other = protocol.decide(table, settings), protocol.decide(table[order], settings)
    np.testing.assert_array_equal(one.weights[order], other.weights)  # to the bit
    np.testing.assert_array_equal(one.intervals[order], other.intervals)
    assert sorted(order.index(rank) for rank in one.unfinite) == list(other.unfinite)
    rest = {"weights", "intervals", "unfinite"}
    for each in dataclasses.fields(protocol.Decision):
        assert each.name in rest or getattr(one, each.name) == getattr(other, each.name), each.name


@given(TABLES, SETTINGS)
def test_it_is_the_same_on_every_rank_and_changes_nothing(table, settings):
    before = table.copy()
    one, other = protocol.decide(table, settings), protocol.decide(table.copy(), settings)
    assert table.tobytes() == before.tobytes()
    assert one.weights.tobytes() == other.weights.tobytes()
    assert one.intervals.tobytes() == other.intervals.tobytes()


@given(TABLES, SETTINGS)
def test_every_round_has_steps_and_h_is_the_schedules_unless_balanced(table, settings):
    intervals = protocol.decide(table, settings).intervals
    assert (intervals >= 1).all()
    if settings.interval == "equal":
        assert set(intervals.tolist()) == {settings.schedule.interval(Now(int(table["total"].max())))}


def test_the_weights_of_thousands_of_ranks_are_exact():
    random = np.random.default_rng(0)
    samples = random.uniform(0, 1e6, 4096)
    groups = random.integers(0, 500, 4096)
    rows = [{"steps": 3, "total": 3, "samples": s, "group": g} for s, g in zip(samples, groups, strict=True)]
    table = table_of(rows)
    weights = protocol.decide(table, Settings(5, weighting="samples")).weights
    assert weights.tolist() == [float(s) / math.fsum(samples) for s in samples]
    own = protocol.decide(table, Settings(5, weighting="samples", groups=Groups("node", 9)), Now(0, round=1)).weights
    sums = [math.fsum(samples[groups == group]) for group in range(500)]
    assert own.tolist() == [float(s) / sums[g] for s, g in zip(samples, groups, strict=True)]


def test_by_hand():
    rows = [
        {"steps": 4, "total": 12, "samples": 30.0, "due": True, "pace": 0.1, "position": 2.0, "finite": True},
        {"steps": 2, "total": 10, "samples": 10.0, "due": False, "pace": 0.2, "position": 1.0, "finite": False},
        {
            "steps": 0,
            "total": 8,
            "samples": 0.0,
            "due": False,
            "pace": 0.1,
            "position": 3.0,
            "finite": True,
            "stop": True,
        },
    ]
    table = table_of(rows)
    decision = protocol.decide(table, Settings(10, weighting="samples", interval="balanced"))
    assert decision.weights.tolist() == [0.75, 0.25, 0.0]
    # Speeds 10, 5 and 10 steps a second: 10 on average take 10 / (25 / 3) = 1.2 s, six steps of the slowest.
    assert decision.intervals.tolist() == [12, 6, 12]
    assert (decision.average, decision.stop, decision.unfinite) == (True, True, (1,))
    assert (decision.reached, decision.now.step) == (1.0, 12)
    assert protocol.decide(table, Settings(10, interval="balanced")).weights.tolist() == [0.5, 0.5, 0.0]
    assert not protocol.decide(table[1:], Settings(10)).average, "nobody's round is over"


def test_steps_of_an_average_that_is_lost_are_averaged_again_and_recorded_once():
    progress = Progress()
    progress.begin(Now(0), 4, several=1)
    records = []
    for steps in (4, 4):
        progress.steps += steps
        records.append(progress.round())
        progress.landing = 2
        progress.begin_round(Now(progress.total + progress.steps), 4)
    progress.steps = 2
    progress.take_back()  # the second is lost: its 4 steps and 2 more are this round's
    assert (progress.steps, progress.total) == (6, 4)
    records.append(progress.round())
    assert [record["steps"] for record in records] == [4, 4, 2]
    assert [record["first_step"] for record in records] == [1, 5, 9]
    assert records[-1]["last_step"] == 10
