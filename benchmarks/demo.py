"""What `make demo` runs: Local SGD with H = 1 and H = 16 on real data, two ranks, timed and drawn."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hvd_localsgd.core import timing
from hvd_localsgd.tools import launch

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "keras_fit.py"
COLORS = {"compute": "#4878a8", "input": "#9fb8d0", "wait": "#d8d8d8", "communicate": "#d1603d"}


def train(sync_every: int, ranks: int, folder: Path) -> dict[str, Any]:
    """One run of the example; what summary.json says about it."""
    arguments = ["--sync-every", str(sync_every), "--timings", str(folder)]
    line, environment = launch.command(ranks, [sys.executable, str(EXAMPLE), *arguments])
    process = subprocess.Popen(line, env=environment, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = []
    for text in process.stdout:
        print(text, end="", flush=True)
        output.append(text)
    if process.wait() != 0:
        raise SystemExit(f"training with --sync-every {sync_every} failed with status {process.returncode}")
    accuracy = re.search(r"test accuracy ([0-9.]+)", output[-1])
    assert accuracy is not None, f"no test accuracy in the last line: {output[-1]!r}"
    rounds = [read(folder, rank) for rank in range(ranks)]
    average = {key: sum(r[key] for own in rounds for r in own) / ranks for key in (*timing.PARTS, "wall", "bytes")}
    return {
        "sync_every": sync_every,
        "ranks": ranks,
        "test_accuracy": float(accuracy[1]),
        "syncs": sum(r["interval"] > 0 for r in rounds[0]),
        "bytes": int(average["bytes"]),
        "seconds": {key: average[key] for key in (*timing.PARTS, "wall")},
    }


def read(folder: Path, rank: int) -> list[dict[str, Any]]:
    """The rounds that a rank wrote down."""
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]


def draw(runs: list[dict[str, Any]], folder: Path, path: Path) -> None:
    """A row per run and rank: what it did, second by second."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(runs), 1, figsize=(10, 1.7 * len(runs)), sharex=True, squeeze=False)
    for run, panel in zip(runs, panels[:, 0], strict=True):
        rounds = {rank: read(folder / f"H{run['sync_every']}", rank) for rank in range(run["ranks"])}
        origin = min(own[0]["start"] for own in rounds.values())
        for rank, own in rounds.items():
            bars: dict[str, list[tuple[float, float]]] = {name: [] for name in COLORS}
            for record in own:
                at = record["start"] - origin
                for name in ("compute", "input", "wait", "communicate"):
                    seconds = record[name]
                    if name == "communicate":
                        seconds += record["pack"] + record["unpack"]
                    bars[name].append((at, seconds))
                    at += seconds
            for name, spans in bars.items():
                panel.broken_barh(spans, (rank - 0.4, 0.8), color=COLORS[name], label=name if rank == 0 else None)
        panel.set_yticks(range(run["ranks"]), [f"rank {rank}" for rank in range(run["ranks"])])
        panel.set_title(f"H = {run['sync_every']}: {run['syncs']} syncs", loc="left", fontsize=10)
        panel.invert_yaxis()
    panels[-1, 0].set_xlabel("seconds")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(COLORS), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train twice, compare, write summary.json and timeline.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sync-every", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)  # timings of another run would be appended to
    runs = []
    for sync_every in arguments.sync_every:
        print(f"\n=== Local SGD on {arguments.ranks} ranks, H = {sync_every} ===", flush=True)
        runs.append(train(sync_every, arguments.ranks, arguments.output / f"H{sync_every}"))
    (arguments.output / "summary.json").write_text(json.dumps({"runs": runs}, indent=2) + "\n")
    draw(runs, arguments.output, arguments.output / "timeline.png")
    print("\nBoth runs saw the same number of samples:")
    for run in runs:
        seconds = run["seconds"]
        sync = seconds["pack"] + seconds["communicate"] + seconds["unpack"]
        print(
            f"  H = {run['sync_every']:3d}: test accuracy {run['test_accuracy']:.3f}, {run['syncs']} syncs, "
            f"{run['bytes'] / 1e6:.1f} MB, {sync:.2f} s averaging, {seconds['wait']:.2f} s waiting, "
            f"{seconds['wall']:.1f} s in all"
        )
    first, last = runs[0]["seconds"], runs[-1]["seconds"]
    print(
        f"Communication time, H = {runs[0]['sync_every']} over H = {runs[-1]['sync_every']}: "
        f"{first['communicate'] / max(last['communicate'], 1e-9):.1f} times as much"
    )
    print(f"Written: {arguments.output / 'summary.json'}, {arguments.output / 'timeline.png'}, rank-K.jsonl per run")


if __name__ == "__main__":
    main()
