"""The examples and the demo, as a user runs them: on two ranks, to a good accuracy."""

import argparse
import json
import re

import numpy as np
import pytest

from hvd_localsgd.tools import plan

from . import launched


def accuracy(output: str) -> float:
    found = re.findall(r"<stdout>:test accuracy (\d\.\d+)", output)
    assert len(found) == 1, output
    return float(found[0])


@pytest.mark.parametrize("example", ["keras_fit.py", "custom_loop.py", "mirrored_strategy.py", "plain_numpy.py"])
def test_example_reaches_its_accuracy(example):
    result = launched.mpirun(2, f"examples/{example}", timeout=180)
    assert result.status == 0, result.output
    assert accuracy(result.output) >= 0.95, result.output


def test_keras_fit_without_a_launcher_reads_a_file(tmp_path):
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    images = (labels[:, None, None] * 200 + random.integers(0, 50, (400, 8, 8))).astype("uint8")
    path = tmp_path / "data.npz"
    np.savez(path, x_train=images[:300], y_train=labels[:300], x_test=images[300:], y_test=labels[300:])
    line = [launched.sys.executable, "examples/keras_fit.py", "--data", str(path), "--epochs", "2"]
    result = launched.start(line, 120)
    assert result.status == 0, result.output
    assert re.search(r"test accuracy (0\.9|1\.0)", result.output.splitlines()[-1]), result.output


def test_keras_fit_says_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"not a zip file")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name, words in (("bad.npz", "cannot be read"), ("other.npz", "lacks"), ("none.npz", "cannot be read")):
        line = [launched.sys.executable, "examples/keras_fit.py", "--data", str(tmp_path / name)]
        result = launched.start(line, 120)
        assert result.status != 0
        assert words in result.output, result.output


def test_demo(tmp_path):
    line = [launched.sys.executable, "benchmarks/demo.py", "--output", str(tmp_path)]
    result = launched.start(line, 240)
    assert result.status == 0, result.output
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [(run["sync_every"], run["ranks"]) for run in runs] == [(1, 2), (16, 2)]
    for run in runs:
        assert run["test_accuracy"] >= 0.95
        seconds = run["seconds"]
        assert sum(s for part, s in seconds.items() if part != "wall") == pytest.approx(seconds["wall"], rel=0.01)
    steps = runs[0]["syncs"]
    assert runs[1]["syncs"] < steps / 8
    assert runs[0]["bytes"] / runs[0]["syncs"] == runs[1]["bytes"] / runs[1]["syncs"] > 0
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_plan_prints_what_theory_allows():
    numbers = ["--samples", "1000000", "--epochs", "10", "--ranks", "10", "--batch", "10", "--compute-ms", "10"]
    network = ["--model-mb", "100", "--bandwidth", "1", "--latency", "0"]
    line = [launched.sys.executable, "-m", "hvd_localsgd.tools.cli", "plan", *numbers, *network]
    result = launched.start(line, 60)
    assert result.status == 0, result.output
    # T = 100,000; sqrt(T / (K b)) = 31.6; 2 * 9/10 * 100 MB at 125 MB/s = 1.44 s
    assert "T = 100000" in result.output
    assert "1440 ms" in result.output
    rows = re.split(r"\n *\n", result.output)
    (convex,) = [row for row in rows if "strongly" in row]
    assert convex.split()[:3] == ["31", "3226", "581"]
    assert convex.rstrip().endswith("theory up to a constant (1)")
    assert [row.split()[0] for row in rows if row.rstrip().endswith("rule of thumb")] == ["16"]
    assert max(map(len, result.output.splitlines())) <= 80
    assert launched.start([*line, "--ranks", "0"], 60).status == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--compute-ms", "inf"),
        ("--bandwidth", "nan"),
        ("--model-mb", "-1"),
        ("--ranks", "0"),
        ("--epochs", "1e30"),
        ("--mu", "nan"),
    ],
)
def test_plan_refuses_what_is_no_number_and_what_is_absurd(option, value):
    """In this process: the command loads little, and there are many."""
    numbers = "--samples 1000 --epochs 1 --ranks 2 --batch 1 --compute-ms 1 --model-mb 1 --bandwidth 1"
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    with pytest.raises(ValueError, match=rf"{option} must be from .* to .*\. Received: "):
        plan.show(parser.parse_args([*numbers.split(), option, value]))


def test_plan_of_the_largest_numbers_is_a_plan(capsys):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    for end in (0, 1):
        plan.show(parser.parse_args([f"{plan.option(name)}={limits[end]}" for name, limits in plan.NUMBERS.items()]))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_notebook_runs(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(launched.ROOT / "examples" / "two_ranks.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert float(re.findall(r"accuracy ([\d.]+)$", printed.strip())[0]) > 0.9, printed
    assert "2 ranks" in printed, printed  # the table
