"""Build Horovod 0.28.1 for this environment's TensorFlow and MPI, once: ``python -m hvd_localsgd.tools.build_horovod``.

Horovod comes as source only. It is built with this environment's own TensorFlow and MPI, kept as a wheel outside the tree
(``$XDG_CACHE_HOME/hvd_localsgd``, by default below ``~/.cache``), installed, and tried out by an allreduce on two ranks.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from hvd_localsgd import cache
from hvd_localsgd.errors import INSTALL_MPI, BuildError, LocalSGDError
from hvd_localsgd.tools import launch

VERSION = "0.28.1"
NEEDS = ["cloudpickle", "psutil", "pyyaml", "packaging"]
# From TensorFlow 2.19 on, one file of Horovod no longer compiles: XLA's headers are gone. Told that TensorFlow is ancient, that
# file compiles to nothing; the rest must know the true version. So the compiler is wrapped.
COMPILER = """#!/bin/sh
case "$*" in
 *"-c "*xla_mpi_ops.cc*) exec {compiler} "$@" -UTENSORFLOW_VERSION -DTENSORFLOW_VERSION=0 ;;
 *) exec {compiler} "$@" ;;
esac
"""
CHECK = (
    "import tensorflow as tf, horovod.tensorflow as hvd; hvd.init(); "
    "s = float(hvd.allreduce(tf.constant(hvd.rank() + 1.0), op=hvd.Sum)); assert s == 3.0, s; "
    "print(f'Horovod works on rank {hvd.rank()} of {hvd.size()}')"
)


def build(gloo: bool = False, gpu: bool = False) -> Path:
    """The wheel for this environment, from the cache or built now (about three minutes on two cores).

    Args:
        gloo: with Gloo instead of MPI; ``horovodrun --gloo`` then needs no MPI at all.
        gpu: with NCCL for tensors on GPUs.

    Raises:
        BuildError: a compiler, cmake, TensorFlow or MPI is missing, or the build fails.
    """
    tensorflow = _tensorflow_version()
    mpicxx = None if gloo else shutil.which("mpicxx", path=_path())
    if not gloo and mpicxx is None:
        raise BuildError(f"mpicxx was not found. {INSTALL_MPI}")
    mpi = "gloo" if gloo else _output([str(mpicxx), "--showme:version"], [str(mpicxx), "-show"])
    key = "\n".join(
        [VERSION, tensorflow, mpi, sys.version, platform.platform(), str(gpu), sys.prefix if mpicxx else ""]
    )
    folder = cache.folder() / f"horovod-{VERSION}-tf{tensorflow}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (wheels := sorted(folder.glob("*.whl"))):
        compiler = find_compiler("Horovod")
        _pip("install", "setuptools", "wheel", "packaging", *([] if shutil.which("cmake") else ["cmake<4"]))
        with tempfile.TemporaryDirectory() as temporary:
            wrapper = Path(temporary) / "cxx"
            wrapper.write_text(COMPILER.format(compiler=compiler))
            wrapper.chmod(0o755)
            environment = {
                "CXX": str(wrapper),
                "MAKEFLAGS": f"-j{os.cpu_count() or 2}",
                "HOROVOD_WITH_TENSORFLOW": "1",
                "HOROVOD_WITHOUT_PYTORCH": "1",
                "HOROVOD_WITHOUT_MXNET": "1",
                **({"HOROVOD_WITH_GLOO": "1", "HOROVOD_WITHOUT_MPI": "1"} if gloo else {}),
                **({} if gloo else {"HOROVOD_WITH_MPI": "1", "HOROVOD_WITHOUT_GLOO": "1"}),
                **({"HOROVOD_GPU_OPERATIONS": "NCCL"} if gpu else {}),
            }
            print(f"building Horovod {VERSION} for TensorFlow {tensorflow}, some minutes ...", flush=True)
            built = Path(temporary) / "wheels"
            # Without pip's cache, which would give us a wheel built for another TensorFlow or MPI.
            options = ["--no-cache-dir", "--no-deps", "--no-build-isolation", "-w", str(built)]
            _pip("wheel", *options, f"horovod=={VERSION}", environment=environment)
            folder.mkdir(parents=True, exist_ok=True)
            for wheel in built.glob("*.whl"):
                shutil.copy(wheel, folder)
        wheels = sorted(folder.glob("*.whl"))
    return wheels[0]


def find_compiler(user: str) -> str:
    """The C++ compiler that ``user`` needs.

    Raises:
        BuildError: there is none.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise BuildError(f"{user} needs a C++ compiler: apt-get install g++, or load a compiler module.")
    return compiler


def install_and_check(wheel: Path, gloo: bool = False) -> None:
    """Install the wheel; add over two ranks.

    Raises:
        BuildError: it does not work.
    """
    _pip("install", "--no-deps", "--force-reinstall", str(wheel))
    _pip("install", *NEEDS)
    if gloo:
        line = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", "2", sys.executable, "-c", CHECK]
        status = subprocess.run(line, timeout=300).returncode
    else:
        line, environment = launch.command(2, [sys.executable, "-c", CHECK])
        status = subprocess.run(line, env=environment, timeout=300).returncode
    if status != 0:
        raise BuildError(f"Horovod was built, but an allreduce on two ranks failed (status {status}).")


def _tensorflow_version() -> str:
    for name in ("tensorflow", "tensorflow-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise BuildError("TensorFlow is not installed here, and Horovod is built against it.")


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _output(*lines: list[str]) -> str:
    for line in lines:
        result = subprocess.run(line, capture_output=True, text=True)
        if result.returncode == 0:
            return result.stdout
    return ""


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    line = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]]
    if subprocess.run(line, env={**os.environ, "PATH": _path(), **(environment or {})}).returncode != 0:
        raise BuildError(f"failed: {' '.join(line)}")


def main() -> int:
    """Build or find the wheel, install it, try it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gloo", action="store_true", help="with Gloo instead of MPI")
    parser.add_argument("--gpu", action="store_true", help="with NCCL for tensors on GPUs")
    arguments = parser.parse_args()
    try:
        install_and_check(build(arguments.gloo, arguments.gpu), arguments.gloo)
    except LocalSGDError as error:
        print(f"hvd_localsgd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
