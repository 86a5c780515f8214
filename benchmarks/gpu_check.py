"""What has to be seen once on a GPU, in under six minutes: ranks that share one train as they do on the CPU, and what a sync costs there.

python benchmarks/gpu_check.py                                   the first GPU, 2 and 4 ranks
python benchmarks/gpu_check.py --data cifar10.npz                and ResNet-20, I = 1 and 16, for as many epochs as fit
python benchmarks/gpu_check.py --device cpu --ranks 2            the script itself, without a GPU

Each case is trained on the CPU and on the device, from the same start on the same batches; *difference* is the largest of a weight, of
the largest weight. XLA is what Keras chooses by itself on GPUs. Then ``sync_cost.py`` on variables that lie there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report

FOLDER = Path(__file__).resolve().parent
WAYS = (("callback", False), ("callback", True), ("optimizer", False))  # which cannot call MPI from inside XLA
COLUMNS = ("front", "xla", "ranks", "device", "difference", "seconds")
BOUND = 1e-3  # float32, in another order, after 24 steps
SECONDS = 330


def train(case: dict[str, Any]) -> None:
    """On this job's ranks; rank 0 writes the weights."""
    import keras
    import numpy as np
    import tensorflow as tf

    import hvd_localsgd as lsgd

    lsgd.init("mpi")
    tf.config.experimental.enable_tensor_float_32_execution(False)  # which has ten bits
    keras.utils.set_random_seed(3)
    convolution = keras.layers.Conv2D(8, 3, activation="relu")
    layers = [convolution, keras.layers.BatchNormalization(), keras.layers.Flatten(), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((16, 16, 3)), *layers])
    random = np.random.default_rng(lsgd.rank())
    x, y = random.normal(size=(192, 16, 16, 3)).astype("float32"), random.integers(0, 10, 192)
    optimizer: Any = keras.optimizers.SGD(0.01, momentum=0.9)
    callbacks = [lsgd.LocalSGDCallback(4)] if case["front"] == "callback" else []
    if not callbacks:
        optimizer = lsgd.LocalSGDOptimizer(optimizer, 4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=case["xla"])
    began = time.perf_counter()
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    devices = {weight.value.device.rpartition("/")[2] for weight in model.trainable_variables}
    if lsgd.rank() == 0:
        arrays = {str(place): weight for place, weight in enumerate(model.get_weights())}
        np.savez(case["file"], devices=sorted(devices), seconds=time.perf_counter() - began, **arrays)


def trained(ranks: int, case: dict[str, Any], visible: bool) -> Any:
    """What these ranks came to."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "weights.npz")
        environment = {"TF_FORCE_GPU_ALLOW_GROWTH": "true"} | ({} if visible else {"CUDA_VISIBLE_DEVICES": "-1"})
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            status = report.launch.run(ranks, [sys.executable, __file__, "--case", json.dumps(case | {"file": file})])
        finally:
            os.environ.clear()
            os.environ.update(before)
        if status:
            raise SystemExit(f"{case} on {ranks} ranks ended with status {status}")
        with np.load(file) as written:
            return {key: written[key] for key in written.files}


def compare(ranks: int, case: dict[str, Any]) -> dict[str, Any]:
    """A row: the same training on the CPU and on the device."""
    here, there = (trained(ranks, case, visible) for visible in (False, True))
    names = [name for name in here if name.isdigit()]
    largest = max(abs(here[name]).max() for name in names)
    difference = float(max(abs(here[name] - there[name]).max() for name in names) / largest)
    found = ", ".join(there["devices"].tolist())
    return {**case, "ranks": ranks, "device": found, "difference": difference, "seconds": float(there["seconds"])}


def main() -> int:
    """Compare, measure, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--data", type=Path, help="CIFAR-10, with Keras' keys")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu_check.json"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        train(arguments.case)
        return 0
    began = time.monotonic()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    ways = itertools.product(arguments.ranks, WAYS)
    rows = [compare(ranks, {"front": front, "xla": xla}) for ranks, (front, xla) in ways]
    report.show("The same training on the CPU and on the device", rows, COLUMNS)
    arguments.json.write_text(json.dumps({"machine": report.software(), "rows": rows}, indent=2) + "\n")
    wrong = [row for row in rows if not row["difference"] < BOUND or arguments.device.upper() not in row["device"]]
    for row in wrong:
        print("NOT AS ON THE CPU, or not on that device:", row)
    failed = [line[0] for line in measurements(arguments) if not within(line, SECONDS - (time.monotonic() - began))]
    for script in failed:
        print("FAILED:", script)
    return 1 if wrong or failed else 0


def measurements(arguments: argparse.Namespace) -> list[list[str]]:
    """The lines of other benchmarks."""
    sync, cifar10 = (arguments.json.with_name(f"gpu_check_{name}") for name in ("sync.json", "cifar10"))
    ranks = ["--ranks", *map(str, arguments.ranks)]
    sizes = ["--models", "resnet50", "tiny", "--repeats", "5", "--json", str(sync)]
    lines = [[str(FOLDER / "sync_cost.py"), "--device", arguments.device, *ranks, *sizes]]
    if arguments.data:
        learn = ["--ranks", "2", "--interval", "16", "1", "--epochs", "100", "--falls", "50", "75"]
        where = ["--data", str(arguments.data), "--work", str(cifar10)]
        lines.append([str(FOLDER / "papers" / "prsgd_cifar10.py"), *learn, *where])
    return lines


def within(line: list[str], seconds: float) -> bool:
    """Run it, for so long at most; whether it has not failed."""
    process = subprocess.Popen([sys.executable, *line], start_new_session=True)
    try:
        return process.wait(max(1.0, seconds)) == 0
    except subprocess.TimeoutExpired:
        print(f"{Path(line[0]).name}: no time left; what has ended is kept", flush=True)
        os.killpg(process.pid, signal.SIGTERM)  # its ranks too
        process.wait()
        return True


if __name__ == "__main__":
    sys.exit(main())
