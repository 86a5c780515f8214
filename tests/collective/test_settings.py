"""An option is one field of ``Settings``: everything else follows."""

import inspect
from dataclasses import dataclass

import keras
import numpy as np
import pytest

from hvd_localsgd.core import settings

pytestmark = pytest.mark.pairs


@dataclass(frozen=True)
class WithColour(settings.Settings):
    colour: str = settings.option("red", ("red", "blue"), "what it looks like.")


@pytest.fixture
def colour(monkeypatch):
    monkeypatch.setattr(settings, "Settings", WithColour)


@pytest.fixture(params=["callback", "optimizer", "averager"])
def front_end(request, lsgd):
    """Makes each front end with some options."""
    return {
        "callback": lsgd.LocalSGDCallback,
        "optimizer": lambda **options: lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), **options),
        "averager": lambda **options: lsgd.ModelAverager([np.zeros(2)], **options),
    }[request.param]


@pytest.mark.usefixtures("colour")
def test_a_new_option_is_refused_when_it_is_wrong(front_end):
    front_end(colour="blue")
    with pytest.raises(ValueError, match=r"colour must be one of \('red', 'blue'\). Received: 'green'"):
        front_end(colour="green")


def test_an_option_that_does_not_exist_is_refused_with_those_that_do(front_end):
    with pytest.raises(TypeError, match="no option 'colour'. Options are: sync_every, optimizer_state, weighting"):
        front_end(colour="blue")


@pytest.mark.usefixtures("colour")
def test_a_new_option_is_compared_over_ranks(lsgd):
    own = "blue" if lsgd.rank() == lsgd.size() - 1 else "red"
    averager = lsgd.ModelAverager([np.zeros(2)], colour=own)
    if lsgd.size() == 1:
        pytest.skip("nobody to differ from")
    with pytest.raises(
        ValueError, match=r"Settings differ: rank \d+ on .* has colour='blue', rank 0 on .* has colour='red'"
    ):
        averager.begin()


@pytest.mark.usefixtures("colour")
def test_a_new_option_is_saved_with_a_model(lsgd, tmp_path):
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), lsgd.SyncSteps([2, 5]), colour="blue")
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert copy.get_config()["colour"] == "blue"
    assert copy.get_config() == optimizer.get_config()


def test_options_are_in_the_signature_and_the_documentation_of_every_front_end(lsgd):
    for front_end in (lsgd.LocalSGDCallback, lsgd.LocalSGDOptimizer, lsgd.ModelAverager):
        names = set(inspect.signature(front_end).parameters)
        assert {"sync_every", "optimizer_state", "weighting", "mode", "interval"} <= names
        assert "options" not in names
        assert "weighting: ranks count" in front_end.__doc__
