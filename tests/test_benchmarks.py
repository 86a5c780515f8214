"""The benchmarks run, start their own ranks, and write what they promise; what they measure is not a test's business."""

import argparse
import json
import shutil
import sys

import numpy as np
import pytest

from . import launched

sys.path[:0] = [str(launched.ROOT / "benchmarks"), str(launched.ROOT / "benchmarks" / "papers")]


def run(path, script, *arguments, timeout=180):
    """The rows of the JSON file that it writes; the plot must lie beside it."""
    line = [sys.executable, f"benchmarks/{script}", *map(str, arguments), "--json", str(path / "x.json")]
    result = launched.start(line, timeout)
    assert result.status == 0, result.output
    assert (path / "x.png").stat().st_size > 5000
    written = json.loads((path / "x.json").read_text())
    assert written["machine"]["versions"]["keras"]
    return written["rows"]


@pytest.mark.parametrize("memory", ["in place", "tensors"])
def test_sync_cost(tmp_path, memory):
    way = ("--ranks", 2, "--memory", memory, "--gbit", 10)
    (row,) = run(tmp_path, "sync_cost.py", "--models", "resnet50", "--repeats", 2, *way)
    assert row["memory"] == memory
    assert (row["model"], row["ranks"], row["transport"], row["variables"]) == ("resnet50", 2, "memory", 214)
    assert row["bytes"] == 4 * 25_583_592
    assert 1e-3 < row["raw_allreduce_s"] < 10, "100 MB within one machine"
    assert row["sync_s"] > row["parts_s"]["communicate"] > 1e-3, "sending is a part of it"
    assert row["line_s"] == pytest.approx(25_583_592 * 32 / 10e9 * 1538 / 1448), "half of the bytes, there and back"


def test_step_overhead(tmp_path):
    rows = run(tmp_path, "step_overhead.py", "--widths", 8, "--repeats", 20, "--models", 2)
    assert [row["way"] for row in rows] == ["plain", "callback", "plain again", "optimizer"]
    assert all(row["step_s"] > 0 for row in rows)


def test_throughput(tmp_path):
    sizes = ("--repeats", 1, "--steps", 4, "--filters", 2, "--batch", 4)
    rows = run(tmp_path, "throughput.py", "--ranks", 2, "--sync-every", 1, 2, *sizes)
    assert [row["way"] for row in rows][:3] == ["no communication", "Local SGD, H = 1", "Local SGD, H = 2"]
    assert all(row["images/s"] > 0 for row in rows)
    assert 0 < rows[1]["compute %"] + rows[1]["wait %"] + rows[1]["communicate %"] <= 100.1


def test_time_to_accuracy(tmp_path):
    random = np.random.default_rng(0)
    y = random.integers(0, 10, 600)
    x = (25 * np.eye(10)[y][:, :, None] * np.ones(78)).reshape(600, 780) + random.integers(0, 25, (600, 780))
    images = np.pad(x, [(0, 0), (0, 4)]).reshape(600, 28, 28).astype("uint8")
    np.savez(tmp_path / "d.npz", x_train=images[:500], y_train=y[:500], x_test=images[500:], y_test=y[500:])
    sizes = ("--ways", "2,compression=int8", "--width", 16, "--evaluate-every", 10, "--limit", 30, "--accuracy", 0.9)
    (row,) = run(tmp_path, "time_to_accuracy.py", "--data", tmp_path / "d.npz", "--ranks", 2, *sizes)
    assert row["way"] == "H = 2, compression int8"
    assert row["of the limit"] > 0
    assert row["accuracy"] >= 0.9
    assert row["seconds"] == row["history"][-1][0] > 0
    assert row["steps"] == 10 * len(row["history"])


def test_scaling(tmp_path):
    sizes = ("--fit-ranks", 2, "--repeats", 1, "--compute-ms", 1, "--bytes", 65536)
    rows = run(tmp_path, "scaling.py", "--ranks", 3, *sizes)
    assert {row["kind"] for row in rows} == {"model", "fit", "validation", "prediction"}
    predicted = {(row["ranks"], row["H"]): row for row in rows if row["kind"] == "prediction"}
    assert all(row["predicted_s"] >= interval * 1e-3 for (_, interval), row in predicted.items())
    for ranks in (2, 64, 4096):
        efficiency = [predicted[ranks, interval]["efficiency"] for interval in (1, 4, 16, 64, 256)]
        assert 0 < efficiency[0] < efficiency[-1] < 1
        assert efficiency == sorted(efficiency), "fewer syncs cost less"


def test_the_model_of_a_sync_counts_messages_and_bytes():
    import scaling

    assert scaling.regressors(4, 1000, ring=True) == [6, 1500]  # 3 neighbours' parts in, 3 out; a quarter in each
    assert scaling.regressors(5, 1000, ring=False) == [6, 1600]  # 3 levels up, 3 down


def test_the_model_of_stragglers_is_right_about_normal_steps():
    import scaling

    drawn = np.random.default_rng(0).normal(0.01, 0.002, (4000, 16, 9)).sum(2).max(1)
    assert scaling.slowest_of(16, 9, 0.01, 0.2) == pytest.approx(drawn.mean(), rel=0.01)


def test_unequal_speeds(tmp_path):
    rows = run(tmp_path, "unequal_speeds.py", "--ranks", 2, "--slow", 3, "--seconds", 1, "--step-ms", 3)
    assert [row["way"] for row in rows] == ["no communication", "plain", "balanced", "async"]
    assert all(row["steps/s"] > 0 for row in rows)


@pytest.fixture
def libsvm(tmp_path):
    """A small problem with two classes: the file, and f* by scikit-learn."""
    from sklearn.datasets import dump_svmlight_file
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(1)
    x = random.integers(0, 2, (300, 6)).astype(float)
    y = np.where(x @ np.linspace(-2, 2, 6) + random.normal(size=300) > 0, 1, -1)
    dump_svmlight_file(x, y, str(tmp_path / "data"), zero_based=False)
    solution = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, y).coef_[0]
    value = np.mean(np.log1p(np.exp(-y * (x @ solution)))) + solution @ solution / 600
    return tmp_path / "data", value


def test_stich(tmp_path, libsvm):
    file, optimum = libsvm
    sizes = ("--batch", 4, "--epsilon", 0.05, "--limit", 2000, "--mpi", 2)
    rows = run(tmp_path, "papers/stich_w8a.py", "--data", file, "--ranks", 1, 2, "--sync-every", 1, 3, *sizes)
    assert [(row["ranks"], row["sync_every"]) for row in rows] == [(1, 1), (2, 1), (1, 3), (2, 3)]
    for row in rows:
        assert row["optimum"] == pytest.approx(optimum, abs=1e-6)
        assert optimum - 1e-6 < row["objective"] <= optimum + 0.05 + 1e-6
        if row["ranks"] == 2:
            assert row["difference"] < 1e-6, "the MPI ranks' iterates are not the simulation's"


def test_what_was_tuned_is_not_tuned_again(tmp_path, libsvm, monkeypatch):
    import stich_w8a

    problem = stich_w8a.Problem(libsvm[0])
    work, near = tmp_path / "work.jsonl", None
    for run, epsilon in (((1, 1, 4), 0.05), ((2, 3, 4), 0.05), ((1, 1, 4), 1e-9)):
        near = stich_w8a.Tuned(problem, libsvm[1], 300, work).best(run, epsilon, near)
        expected = stich_w8a.tune(problem, libsvm[1], run, epsilon, 300, None)
        assert (near is None) == (expected is None) == (epsilon < 1e-6)
    monkeypatch.delattr(stich_w8a, "tune")
    again = stich_w8a.Tuned(problem, libsvm[1], 300, work)
    assert again.best((1, 1, 4), 1e-9, None) is None
    steps, value, config = again.best((2, 3, 4), 0.05, None)
    simulation = stich_w8a.Simulation(problem, config)
    for step in stich_w8a.looks(steps - 1):
        simulation.advance(step)
        assert simulation.value() > libsvm[1] + 0.05, "it is the first step that is near enough"
    simulation.advance(steps)
    assert simulation.value() == value <= libsvm[1] + 0.05
    with pytest.raises(NameError):
        again.best((2, 3, 4), 0.04, None)


@pytest.mark.parametrize("decaying", [False, True])
def test_the_simulation_is_algorithm_1(libsvm, decaying):
    import stich_w8a
    from sklearn.datasets import load_svmlight_file

    a, y = load_svmlight_file(str(libsvm[0]))
    a, n = a.toarray(), len(y)
    simulation = stich_w8a.Simulation(
        stich_w8a.Problem(libsvm[0]), stich_w8a.Config(2, 3, 4, c=1 / 8, decaying=decaying)
    )
    draws = [np.random.default_rng([7, rank]).integers(0, n, (256, 4)) for rank in range(2)]
    x, means = np.zeros((2, 6)), []
    for t in range(11):
        rate = min(32, n / 8 / (t + 1)) if decaying else 4
        for k in range(2):
            chosen = draws[k][t]
            slope = -y[chosen] / (1 + np.exp(y[chosen] * (a[chosen] @ x[k])))
            x[k] = x[k] - rate * (slope @ a[chosen] / 4 + x[k] / n)
        if t + 1 in (3, 6, 9):
            x[:] = x.mean(0)
        means.append(x.mean(0))
        if t in (0, 3, 10):
            simulation.advance(t + 1)
            np.testing.assert_allclose(simulation.x, x, rtol=1e-6)  # its rates are float32
            uniform, linear, quadratic = (np.average(means, 0, np.arange(1.0, t + 2) ** p) for p in range(3))
            np.testing.assert_allclose(simulation.averages, [uniform, linear, quadratic], rtol=1e-6)


def test_stichs_speed_ups_are_against_one_rank_that_sends_nothing():
    import stich_w8a

    def found(ranks, interval, steps):
        return steps, 0.5, stich_w8a.Config(ranks, interval, 4, c=0.25, decaying=True)

    alone = found(1, 1, 600)
    row = stich_w8a.result(4, 10, 4, 0.1, found(4, 10, 200), alone)
    assert row["speedup_steps"] == 3
    assert row["speedup_rho25"] == 3 / 16  # each round of 10 gradients sends 6 vectors of 25: 160 instead of 10
    row = stich_w8a.result(4, 10, 4, 0.1, None, alone)
    assert (row["steps"], row["speedup_steps"], row["speedup_rho25"]) == (None, None, None), "not reached"


def test_heterogeneous(tmp_path, libsvm):
    sizes = ("--sync-every", 1, 4, "--steps", 8, "--batch", 4)
    rows = run(tmp_path, "papers/heterogeneous.py", "--data", libsvm[0], "--ranks", 2, *sizes)
    assert [row["shards"] for row in rows] == ["shuffled", "shuffled", "contiguous", "contiguous"]
    assert all(row["suboptimality"] > -1e-6 for row in rows)


def test_vrl(tmp_path, libsvm):
    sizes = ("--sync-every", 20, "--steps", 400, "--batch", 4, "--learning-rates", 0.3)
    rows = run(tmp_path, "papers/vrl.py", "--data", libsvm[0], "--ranks", 2, *sizes)
    assert [row["way"] for row in rows] == ["plain", "control variates"]
    assert 0 < rows[1]["suboptimality"] < rows[0]["suboptimality"]
    assert [step for step, _ in rows[0]["history"]] == [200, 400]


def test_resnet20_is_he_et_als():
    import prsgd_cifar10

    model = prsgd_cifar10.resnet20(10)
    assert sum(int(np.prod(w.shape)) for w in model.trainable_weights) == 269_722  # 0.27 million
    assert len([layer for layer in model.layers if "conv2d" in layer.name]) == 19


def test_a_curve_on_cifar_goes_on_and_is_not_trained_twice(tmp_path, monkeypatch):
    import keras
    import prsgd_cifar10

    def dense(classes):
        return keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(classes)])

    monkeypatch.setattr(prsgd_cifar10, "resnet20", dense)
    numbers, trained = np.random.default_rng(0), []
    data = numbers.random((64, 32, 32, 3), np.float32), numbers.integers(0, 3, 64)
    fit = keras.Model.fit
    monkeypatch.setattr(keras.Model, "fit", lambda *own, **words: (trained.append(words["epochs"]), fit(*own, **words)))

    def curve(**words):
        chosen = {"batch": 16, "epochs": 2, "learning_rate": 0.01, "momentum": 0.9, "falls": [3, 4]}
        chosen |= {"no_augmentation": False, **words}
        return prsgd_cifar10.train(argparse.Namespace(**chosen), 2, (*data, *data), tmp_path / "1-ranks-2")

    first = curve()
    assert [row["epoch"] for row in first] == [1, 2]
    assert curve() == first
    further = curve(epochs=3)
    assert further[:2] == first
    assert [row["epoch"] for row in further] == [1, 2, 3]
    assert trained == [2, 3]
    with pytest.raises(SystemExit, match=r"a curve of \{'falls': \[3, 4\]\}"):
        curve(falls=[1, 2])
    shutil.rmtree(tmp_path / "1-ranks-2")
    with pytest.raises(SystemExit, match="no checkpoints"):
        curve(epochs=4)
    assert curve(epochs=3) == further, "a record without checkpoints is not lost"


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--hosts", "9"], "2 to 8"), (["--rate", "fast"], "must look like"), ([], "Emulate")]
)
def test_the_emulated_cluster_refuses_nonsense(arguments, words):
    command = ["--", "true"] if arguments else []
    result = launched.start(["benchmarks/cluster/run", *arguments, *command], 30)
    assert result.status == 2
    assert words in result.output


def test_many_ranks(tmp_path):
    rows = run(tmp_path, "many_ranks.py", "--sizes", 4, 4096, "--repeats", 1)
    assert [row["ranks"] for row in rows] == [4, 4096]
    few, many = rows
    assert many["header bytes"] == 1024 * few["header bytes"]
    assert many["table lines"] < 20, "more ranks than lines"


def test_long_run(tmp_path):
    rows = run(tmp_path, "long_run.py", "--ranks", 2, "--rounds", 4, "--ways", "callback", "averager")
    assert [(row["way"], row["ranks"], len(row["samples"])) for row in rows] == [("callback", 2, 4), ("averager", 2, 4)]
    assert all(sample["memory"] > 1e6 and sample["threads"] >= 1 for row in rows for sample in row["samples"])


def test_traffic(tmp_path):
    ways = ("--ways", "plain", "int8", "overlap", "fragments", "groups")
    rows = run(tmp_path, "traffic.py", "--model", "tiny", *ways, "--repeats", 1, "--sync-every", 4)
    plain, int8, overlap, fragments, groups = rows
    assert plain["given MB"] == pytest.approx(4 * (15_000_000 + 3000 * 64) / 1e6)
    assert int8["given MB"] == pytest.approx(plain["given MB"] / 4, rel=0.05)
    assert overlap["hidden_s"] >= 0
    assert all(row["sync_s"] > 0 for row in rows)
    assert fragments["given MB"] >= plain["given MB"]
    assert groups["given MB"] > plain["given MB"], "two sums inside the group where all meet, and one where they do not"


def test_methods(tmp_path):
    few = ("--epochs", 2, "--repeats", 1, "--learning-rates", 0.3)
    rows = run(tmp_path, "methods.py", "--methods", "H = 4", "H = 32, SlowMo", *few)
    assert [row["way"] for row in rows] == ["H = 4", "H = 32, SlowMo"]
    steps = 2 * -(-750 // 16)
    assert [row["steps"] for row in rows] == [steps, steps]
    assert [row["syncs"] for row in rows] == [2 * -(-47 // 4), 2 * -(-47 // 32)]
    assert all(row["megabytes"] == pytest.approx(row["syncs"] * 4 * (65 + 129) * 128 / 1e6, rel=0.1) for row in rows)
    assert all(0.5 < row["accuracy"] <= 1 for row in rows)


def test_trainings_of_a_grid_do_not_know_of_each_other():
    import grid

    random = np.random.default_rng(0)
    data = random.random((64, 32, 32, 3), np.float32), random.integers(0, 10, 64)
    arguments = argparse.Namespace(table="momentum", steps=128, batch=8, accuracy=1.0)

    def train(seed, **words):
        case = {"optimizer": "SGD, momentum 0.9", "state": "keep", "outer": "mean", "H": 4, **words}
        row = grid.train_one(case, seed, (*data, *data), arguments)
        return {name: value for name, value in row.items() if name != "seconds"}

    first = train(0)
    assert train(1) != first
    train(0, outer="SlowMo", rate=4)
    assert train(0) == first
    assert train(0, rate=2) != first


def test_a_table_of_a_grid_has_a_column_for_each_value_across():
    import grid

    accuracies = {4: (0.5, 0.25, 0.75), 16: (0.125, 0.125, 0.125)}
    common = {"ranks": 2, "seconds": 1.0}
    rows = [
        {**common, **case, "seed": seed, "accuracy": accuracies[case["H"]][seed] + (case["state"] == "reset")}
        for case in grid.momentum()
        for seed in range(3)
        if case["H"] in accuracies
    ]
    table = grid.summary(rows, "H")
    assert len(table) == 2 * 3 * 2
    assert {row["H = 4"] for row in table if row["state"] == "keep"} == {"0.500 (0.250 to 0.750)"}
    assert {row["H = 16"] for row in table if row["state"] == "reset"} == {"1.125 (1.125 to 1.125)"}
    assert [row["seeds"] for row in table] == [3] * len(table)


def test_a_grid_goes_on_where_it_was(tmp_path):
    import grid

    random = np.random.default_rng(0)
    labels = np.arange(512) % 10
    images = (random.integers(0, 20, (512, 8, 8)) + 20 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:128], y_test=labels[:128])
    *known, last = grid.rounds()
    facts = {"table": "rounds", "ranks": 2, "steps": 256, "images": 256, "seed": 0}
    numbers = {"loss": 1.0, "local steps": 1, "syncs": 1, "megabytes": 1.0}
    lines = [{**facts, **case, **numbers, "accuracy": place / 10} for place, case in enumerate(known)]
    lines.append({**lines[0], "seed": 1, "accuracy": 0.3})
    lines.append({**lines[0], "steps": 512, "accuracy": 0.9})  # of another table
    work = tmp_path / "work.jsonl"
    work.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = ("--steps", 256, "--subset", 256, "--repeats", 1, "--accuracy", 0.11)
    rows = run(tmp_path, "grid.py", "rounds", "--data", tmp_path / "data.npz", "--work", work, *sizes)
    assert [(row["outer"], row["H"]) for row in rows] == [(case["outer"], case["H"]) for case in (*known, last)]
    assert [row["accuracy"] for row in rows[:-1]] == [0.15, 0.1, 0.2, 0.3, 0.4]
    assert (rows[0]["seeds"], rows[0]["least"], rows[0]["most"]) == (2, 0.0, 0.3)
    trained = [json.loads(line) for line in work.read_text().splitlines()][len(lines) :]
    assert [(row["H"], row["outer"]) for row in trained] == [(last["H"], last["outer"])]
    assert trained[0]["local steps"] == 128 * len(trained[0]["history"])
    assert trained[0]["syncs"] == len(trained[0]["history"])
    weights = 4 * ((32 * 32 * 3 + 1) * 128 + 129 * 128 + 129 * 10)
    assert trained[0]["megabytes"] == pytest.approx(trained[0]["syncs"] * weights / 1e6, rel=0.01)
    assert trained[0]["history"][-1] >= 0.11
