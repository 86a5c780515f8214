"""Kinds of optimizer state that are averaged more rarely than weights."""

import keras
import numpy as np
import pytest

from . import reference

pytestmark = pytest.mark.pairs


def played(make_optimizer, interval, batches, size, every):
    """Algorithm 1 in one process; at sync n the state of each kind is averaged if its period divides n."""
    models = [reference.compiled(make_optimizer(), False) for _ in range(size)]
    parts = [reference.data(k, batches) for k in range(size)]
    for sync, start in enumerate(range(0, batches, interval), 1):
        for model, (x, y) in zip(models, parts, strict=True):
            for batch in range(start, min(batches, start + interval)):
                model.train_on_batch(x[8 * batch : 8 * batch + 8], y[8 * batch : 8 * batch + 8])
        reference.averaged(models)
        for same in zip(*(reference.slots(model.optimizer) for model in models), strict=True):
            if any(same[0].path.endswith(kind) and sync % period == 0 for kind, period in every.items()):
                mean = np.mean([v.numpy().astype("float64") for v in same], axis=0)
                for v in same:
                    v.assign(mean.astype("float32"))
    return models


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
def test_each_kind_at_its_own_syncs(lsgd, gather, layout, front_end):
    every = {"momentum": 2, "velocity": 3}

    def make():
        return keras.optimizers.Adam(0.01)

    inner = make()
    x, y = reference.data(lsgd.rank(), 14)
    if front_end == "callback":
        ours = lsgd.LocalSGDCallback(2, optimizer_state=every)
        model = reference.compiled(inner, False)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[ours])
    else:
        ours = lsgd.LocalSGDOptimizer(inner, 2, optimizer_state=every)
        model = reference.compiled(ours, False)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    expected = played(make, 2, 14, lsgd.size(), every)[lsgd.rank()]
    reference.assert_close(model, expected)
    for slot, other in zip(reference.slots(inner), reference.slots(expected.optimizer), strict=True):
        np.testing.assert_allclose(slot.numpy(), other.numpy(), rtol=1e-4, atol=1e-7, err_msg=slot.path)
    if lsgd.size() > 1:
        weights = 4 * sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        kinds = [1 + (n % 2 == 0) + (n % 3 == 0) for n in range(1, 8)]
        assert [r.bytes // weights for r in ours.timings if r.steps] == kinds, "nothing is sent that is not due"


def test_a_kind_that_there_is_not_is_named_with_those_that_there_are(lsgd):
    model = reference.compiled(keras.optimizers.SGD(0.1, momentum=0.9))
    x, y = reference.data(0, 1)
    with pytest.raises(ValueError, match=r"no optimizer keeps a 'velocity'. There are: .*momentum"):
        model.fit(x, y, verbose=0, callbacks=[lsgd.LocalSGDCallback(2, optimizer_state={"velocity": 3})])
    for wrong in ({}, {"momentum": 0}, {"momentum": 1.5}, "sometimes"):
        with pytest.raises(ValueError, match="optimizer_state must be one of"):
            lsgd.LocalSGDCallback(2, optimizer_state=wrong)
