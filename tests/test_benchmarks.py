"""The benchmarks run, start their own ranks, and write what they promise; what they measure is not a test's business."""

import json

import pytest

from . import programs


def test_sync_cost(tmp_path):
    line = [
        programs.sys.executable,
        "benchmarks/sync_cost.py",
        "--ranks",
        "2",
        "--models",
        "resnet50",
        "--repeats",
        "2",
    ]
    result = programs.start([*line, "--json", str(tmp_path / "x.json")], 180)
    assert result.status == 0, result.output
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["machine"]["ranks"] == 2
    (row,) = written["rows"]
    assert (row["model"], row["ranks"], row["transport"], row["variables"]) == ("resnet50", 2, "memory", 214)
    assert row["bytes"] == 4 * 25_583_592
    assert row["ratio_raw"] == pytest.approx((row["sync_s"] + row["next_step_extra_s"]) / row["raw_allreduce_s"])
    assert row["raw_allreduce_s"] > 0


def test_step_overhead(tmp_path):
    path = tmp_path / "x.json"
    arguments = ["--widths", "8", "--steps", "5", "--repeats", "1", "--json", str(path)]
    result = programs.start([programs.sys.executable, "benchmarks/step_overhead.py", *arguments], 120)
    assert result.status == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == ["plain", "callback", "optimizer"]
    assert all(row["step_s"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--hosts", "9"], "2 to 8"), (["--rate", "fast"], "must look like"), ([], "Emulate")]
)
def test_the_emulated_cluster_refuses_nonsense(arguments, words):
    command = ["--", "true"] if arguments else []
    result = programs.start(["benchmarks/cluster/run", *arguments, *command], 30)
    assert result.status == 2
    assert words in result.output
