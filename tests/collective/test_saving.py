"""What is written to a file, or copied, comes back as it was: models, weights, checkpoints, callbacks."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_localsgd

from . import reference

pytestmark = pytest.mark.pairs

INNER = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "decaying": lambda: keras.optimizers.SGD(hvd_localsgd.InverseTimeDecay(2.0, 40.0)),
    "adam": lambda: keras.optimizers.Adam(0.02),
    "ema": lambda: keras.optimizers.Adam(0.02, use_ema=True, ema_overwrite_frequency=5),
    "accumulating": lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2),
    "scaled inside": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.02), initial_scale=8.0),
}
OPTIONS = {
    "none": lambda: {},
    "steps": lambda: {"sync_every": hvd_localsgd.SyncSteps([2, 7])},
    "growing": lambda: {"sync_every": hvd_localsgd.Growing(1.0)},
    "once": lambda: {"sync_every": hvd_localsgd.OneShot(), "optimizer_state": "average"},
    "reset": lambda: {"sync_every": hvd_localsgd.Constant(3), "optimizer_state": "reset"},
    "samples": lambda: {"sync_every": 3, "weighting": "samples"},
    "balanced": lambda: {"sync_every": 3, "interval": "balanced"},
    "async": lambda: {"sync_every": 3, "mode": "async"},
}


def compiled(optimizer, build=False):
    model = reference.compiled(optimizer)
    if build:
        optimizer.build(model.trainable_variables)
    return model


def train(lsgd, model, epochs=1, **arguments):
    model.make_train_function(force=True)  # traced anew, as that of a loaded model is
    x, y = reference.data(lsgd.rank(), 5)
    model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **arguments)
    return model


def assert_same_state(mine, other):
    for one, another in zip(mine.variables, other.variables, strict=True):
        if one.name != "before_sync":  # which a training decides when it begins
            np.testing.assert_array_equal(one.numpy(), another.numpy(), err_msg=one.path)


def local_steps(optimizer):
    """None yet, if there is no counter."""
    return sum(int(v.numpy()) for v in optimizer.variables if v.name == "local_steps")


def saved_and_loaded(model, path):
    model.save(path)
    loaded = keras.models.load_model(path)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert local_steps(loaded.optimizer) == local_steps(model.optimizer)
    return loaded


@pytest.mark.alone
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_a_model_saved_before_or_after_training_goes_on_as_if_nothing_had_been(lsgd, inner, tmp_path):
    model = compiled(lsgd.LocalSGDOptimizer(INNER[inner](), sync_every=2))
    for steps in (5, 10):
        loaded = saved_and_loaded(model, tmp_path / "model.keras")
        if steps > 5:
            assert_same_state(loaded.optimizer, model.optimizer)
        assert_same_state(train(lsgd, loaded), train(lsgd, model))
        assert_same_state(loaded.optimizer, model.optimizer)
        assert local_steps(loaded.optimizer) == steps


@pytest.mark.alone
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_every_option_is_saved_and_loaded(lsgd, options, tmp_path):
    chosen = OPTIONS[options]()
    fresh = compiled(lsgd.LocalSGDOptimizer(INNER["momentum"](), timings=tmp_path / "timings", **chosen))
    trained = train(lsgd, saved_and_loaded(fresh, tmp_path / "model.keras"))
    assert local_steps(trained.optimizer) == 5
    loaded = saved_and_loaded(trained, tmp_path / "model.keras")
    assert_same_state(loaded.optimizer, trained.optimizer)
    config = loaded.optimizer.get_config()
    assert config["timings"] == str(tmp_path / "timings")
    schedule = chosen.pop("sync_every", lsgd.Constant(16))
    if isinstance(schedule, lsgd.Schedule):
        assert config["sync_every"]["class_name"] == type(schedule).__name__
        assert config["sync_every"]["config"] == schedule.get_config()
    assert {name: config[name] for name in chosen} == chosen


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_under_mixed_precision(lsgd, trained, tmp_path):
    """Keras wraps the optimizer that it is given into a LossScaleOptimizer."""
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = compiled(lsgd.LocalSGDOptimizer(INNER["adam"](), sync_every=2))
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        if trained:
            train(lsgd, model)
        loaded = saved_and_loaded(model, tmp_path / "model.keras")
        if trained:
            assert_same_state(loaded.optimizer, model.optimizer)
        assert_same_state(train(lsgd, loaded), train(lsgd, model))
        assert_same_state(loaded.optimizer, model.optimizer)
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_under_a_mirrored_strategy(lsgd, tmp_path):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = train(lsgd, compiled(lsgd.LocalSGDOptimizer(INNER["adam"](), sync_every=2, weighting="samples")))
        loaded = saved_and_loaded(model, tmp_path / "model.keras")
    assert local_steps(loaded.optimizer) == 5
    assert_same_state(loaded.optimizer, model.optimizer)


@pytest.mark.parametrize("inner", ["sgd", "adam", "scaled inside"])
def test_weights_alone_bring_the_optimizers_state_to_one_that_is_built(lsgd, inner, tmp_path):
    model = train(lsgd, compiled(lsgd.LocalSGDOptimizer(INNER[inner](), sync_every=2)))
    model.save_weights(tmp_path / "w.weights.h5")
    other = compiled(lsgd.LocalSGDOptimizer(INNER[inner](), sync_every=2), build=True)
    other.load_weights(tmp_path / "w.weights.h5")
    assert_same_state(other, model)
    assert_same_state(other.optimizer, model.optimizer)
    assert_same_state(train(lsgd, other), train(lsgd, model))


def test_an_optimizer_that_is_not_built_says_that_it_takes_no_state(lsgd, tmp_path):
    model = train(lsgd, compiled(lsgd.LocalSGDOptimizer(INNER["sgd"](), sync_every=2)))
    model.save_weights(tmp_path / "w.weights.h5")
    other = compiled(lsgd.LocalSGDOptimizer(INNER["sgd"](), sync_every=2))
    with pytest.warns(UserWarning, match=r"local_steps.*optimizer\.build\(model\.trainable_variables\)"):
        other.load_weights(tmp_path / "w.weights.h5")
    assert_same_state(other, model)


@pytest.mark.parametrize("inner", ["sgd", "momentum", "decaying", "adam"])
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_weights_go_to_and_from_a_model_with_the_plain_optimizer(lsgd, inner, tmp_path):
    with_ours = train(lsgd, compiled(lsgd.LocalSGDOptimizer(INNER[inner](), sync_every=2)))
    plain = train(lsgd, compiled(INNER[inner]()))
    for source, target in ((with_ours, compiled(INNER[inner](), build=True)), (plain, with_ours)):
        source.save_weights(tmp_path / "w.weights.h5")
        target.load_weights(tmp_path / "w.weights.h5")
        assert_same_state(target, source)
    assert local_steps(with_ours.optimizer) == 5


class Reload(keras.callbacks.Callback):
    def __init__(self, path, batch):
        super().__init__()
        self.path, self.batch = path, batch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            self.model.load_weights(self.path)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_weights_loaded_in_the_middle_of_a_training(lsgd, gather, wrapped, batch, tmp_path):
    """After 2 of 5 steps, or after the last one: training goes on from what the file says."""
    ours = lsgd.LocalSGDOptimizer(INNER["adam"](), sync_every=3)
    model = reference.compiled(keras.optimizers.LossScaleOptimizer(ours) if wrapped else ours, False)
    train(lsgd, model)
    model.save_weights(tmp_path / "w.weights.h5")
    train(lsgd, model, callbacks=[Reload(tmp_path / "w.weights.h5", batch)])
    assert local_steps(model.optimizer) == 5 + (5 - batch - 1)
    reference.assert_same_everywhere(gather, model)
    train(lsgd, model)
    assert local_steps(model.optimizer) == 5 + (5 - batch - 1) + 5
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize("weights_only", [False, True])
def test_model_checkpoint(lsgd, gather, weights_only, tmp_path):
    tmp_path = Path(gather(str(tmp_path))[0])
    name = "{epoch}.weights.h5" if weights_only else "{epoch}.keras"
    model = compiled(lsgd.LocalSGDOptimizer(INNER["adam"](), sync_every=2))
    train(lsgd, model, 2, callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / name, save_weights_only=weights_only)])
    if weights_only:
        for epoch in (1, 2):
            with h5py.File(tmp_path / f"{epoch}.weights.h5") as file:
                assert file["optimizer/vars/local_steps"][()] == 5 * epoch
                assert file["optimizer/inner_optimizer/vars/0"][()] == 5 * epoch, "Adam's iterations"
        loaded = compiled(lsgd.LocalSGDOptimizer(INNER["adam"](), sync_every=2), build=True)
        loaded.load_weights(tmp_path / "1.weights.h5")
    else:
        loaded = keras.models.load_model(tmp_path / "1.keras")
    assert local_steps(loaded.optimizer) == 5
    assert local_steps(train(lsgd, loaded).optimizer) == 10


class Killed(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.alone  # an error ends the other ranks
def test_a_backup_is_restored(lsgd, tmp_path):
    model = compiled(lsgd.LocalSGDOptimizer(INNER["adam"](), sync_every=2))
    with pytest.raises(KeyboardInterrupt):
        train(lsgd, model, 2, callbacks=[keras.callbacks.BackupAndRestore(tmp_path), Killed()])
    again = compiled(lsgd.LocalSGDOptimizer(INNER["adam"](), sync_every=2))
    train(lsgd, again, 2, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])
    assert local_steps(again.optimizer) == 10
    straight = train(lsgd, compiled(lsgd.LocalSGDOptimizer(INNER["adam"](), sync_every=2)), 2)
    reference.assert_close(again, straight)


def test_a_backup_is_restored_on_every_rank(lsgd, gather, tmp_path):
    """One epoch, whose backup is kept; then another process' model goes on from there."""
    tmp_path = gather(str(tmp_path))[0]
    for epochs in (1, 2):
        # Momentum is averaged: where each rank keeps its own, all begin again with rank 0's.
        callback, model = lsgd.LocalSGDCallback(2, optimizer_state="average"), compiled(INNER["momentum"]())
        backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
        train(lsgd, model, epochs, callbacks=[callback, backup])
        assert [r.last_step for r in callback.timings if r.interval] == [[2, 4, 5], [7, 9, 10]][epochs - 1]
    expected, _ = reference.local_sgd(INNER["momentum"], 2, [5] * lsgd.size(), epochs=2, state="average")
    reference.assert_close(model, expected[0])
    reference.assert_same_everywhere(gather, model)


@pytest.mark.alone
@pytest.mark.parametrize(
    "imports",
    ["import hvd_localsgd, keras", "import keras, hvd_localsgd", "import hvd_localsgd; from tensorflow import keras"],
)
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_a_model_is_loaded_where_the_package_is_imported_and_nothing_else(lsgd, imports, tmp_path):
    if lsgd.rank() > 0:
        return
    schedule = hvd_localsgd.InverseTimeDecay(3.0, 7.0)
    model = compiled(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(schedule), hvd_localsgd.SyncSteps([4, 9])))
    model.save(tmp_path / "model.keras")
    program = f"""{imports}
import json, warnings
warnings.simplefilter("ignore")
optimizer = keras.models.load_model({str(tmp_path / "model.keras")!r}).optimizer
print(json.dumps([type(optimizer).__name__, optimizer.get_config()["sync_every"]["config"],
                  optimizer.inner_optimizer._learning_rate.get_config()]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == ["LocalSGDOptimizer", {"steps": [4, 9]}, {"mu": 3.0, "a": 7.0}]


@pytest.mark.alone
def test_importing_the_package_and_then_keras_brings_nothing_of_ours_but_names(lsgd):
    if lsgd.rank() > 0:
        return
    program = """
import sys, hvd_localsgd
assert not {"keras", "tensorflow", "numpy"} & set(sys.modules), "light"
import keras
assert "hvd_localsgd.frontends.optimizer" not in sys.modules, "Keras may be running on something else"
print(sorted(name for name in keras.saving.get_custom_objects()))
assert keras.__spec__.loader.get_source("keras") and keras.__file__
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for name in ("LocalSGDOptimizer", "InverseTimeDecay", "Constant", "OneShot", "SyncSteps", "Growing"):
        assert f"hvd_localsgd>{name}" in result.stdout


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda each: pickle.loads(pickle.dumps(each))}


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_of_a_callback_starts_afresh_with_the_same_options(lsgd, gather, make_copy, trained, tmp_path):
    callback = lsgd.LocalSGDCallback(3, optimizer_state="average", weighting="samples", timings=tmp_path / "timings")
    if trained:
        train(lsgd, compiled(INNER["momentum"]()), callbacks=[callback])
    rounds = len(callback.timings)
    twin = COPIES[make_copy](callback)
    assert twin.timings == []
    assert twin.totals == []
    assert twin.settings.get_config().keys() == callback.settings.get_config().keys()
    assert twin.settings.description() == callback.settings.description()
    model = train(lsgd, compiled(INNER["momentum"]()), callbacks=[twin])
    batches = [5] * lsgd.size()
    expected, _ = reference.local_sgd(INNER["momentum"], 3, batches, state="average", weighting="samples")
    reference.assert_close(model, expected[0])
    reference.assert_same_everywhere(gather, model)
    assert len(callback.timings) == rounds, "the original is left alone"
    written = (tmp_path / "timings" / f"rank-{lsgd.rank()}.jsonl").read_text().splitlines()
    assert len(written) == rounds + len(twin.timings)


@pytest.mark.alone
@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_of_an_average_of_iterates_starts_afresh(lsgd, make_copy, trained):
    callback = lsgd.IterateAverage("linear", 2.0)
    if trained:
        train(lsgd, compiled(INNER["sgd"]()), callbacks=[lsgd.LocalSGDCallback(3), callback])
    twin = COPIES[make_copy](callback)
    assert not hasattr(twin, "_averages")
    train(lsgd, compiled(INNER["sgd"]()), callbacks=[lsgd.LocalSGDCallback(3), twin])
    again = lsgd.IterateAverage("linear", 2.0)
    train(lsgd, compiled(INNER["sgd"]()), callbacks=[lsgd.LocalSGDCallback(3), again])
    for one, other in zip(twin.value, again.value, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.alone
@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_a_copy_of_a_model_with_our_optimizer(lsgd, make_copy, trained):
    model = compiled(lsgd.LocalSGDOptimizer(INNER["adam"](), sync_every=2))
    if trained:
        train(lsgd, model)
    twin = COPIES[make_copy](model)
    assert local_steps(twin.optimizer) == 5 * trained
    assert_same_state(train(lsgd, twin), train(lsgd, model))
    assert_same_state(twin.optimizer, model.optimizer)
