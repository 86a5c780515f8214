"""Build the kernel for small variables for this environment's TensorFlow, once: ``python -m hvd_localsgd.build_kernel``.

Optional: without it TensorFlow reads and assigns every small variable by an operation of its own, which matters for models
that have thousands of them (docs/performance.md). It needs a C++ compiler and about 20 seconds, and is kept outside the
tree (``$XDG_CACHE_HOME/hvd_localsgd``, by default below ``~/.cache``), where every process that averages finds it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import tensorflow as tf

from hvd_localsgd.build_horovod import cache, find_compiler
from hvd_localsgd.communicators import CommunicatorError

SOURCE = Path(__file__).with_name("small_variables.cc")
DTYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)


def path() -> Path:
    """Where the kernel for this TensorFlow, this machine and this source is kept."""
    flags = [flag for flag in tf.sysconfig.get_compile_flags() if not flag.startswith("-I")]
    key = "\n".join([tf.version.GIT_VERSION, platform.machine(), *flags, SOURCE.read_text()])
    return cache() / f"small_variables-tf{tf.__version__}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.so"


@functools.cache
def load() -> Any:
    """The module of the kernel's operations, or None if it has not been built, or not for a machine like this."""
    library = path()
    if not library.exists():
        return None
    try:
        return tf.load_op_library(str(library))
    except (tf.errors.OpError, OSError) as error:
        warnings.warn(
            f"going on without the kernel for small variables; build it on this machine: {error}", stacklevel=2
        )
        return None


def build() -> Path:
    """Compile it, unless it is there.

    Raises:
        CommunicatorError: there is no compiler, or it fails.
        OSError: the compiler that ``CXX`` names cannot be started, or the cache cannot be written.
    """
    library = path()
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or find_compiler("The kernel")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        output = Path(temporary) / library.name
        flags = [*tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags()]
        line = [*compiler.split(), "-w", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(output), *flags]
        if subprocess.run(line).returncode != 0:
            raise CommunicatorError(f"failed: {' '.join(line)}")
        output.replace(library)  # at once: others may be building, or loading, the same
    return library


def main() -> int:
    """Build it, try it; the exit status."""
    try:
        print(f"building a kernel for TensorFlow {tf.__version__} ...", flush=True)
        library = build()
        if (kernel := load()) is None:
            raise CommunicatorError(f"{library} cannot be loaded. Remove it, and build it again.")
        variables = [tf.Variable([1.0, 2.0]), tf.Variable([[3.0]], dtype=tf.float16)]
        handles = [tf.stack([v.handle for v in variables])]
        kernel.hvd_localsgd_write_variables(handles=handles, flat=tf.constant([4.0, 5.0, 6.0]))
        flat = kernel.hvd_localsgd_read_variables(handles=handles, T=tf.float32, size=3)
        if flat.numpy().tolist() != [4.0, 5.0, 6.0]:
            raise CommunicatorError(f"{library} was built, but does not work: {flat}")
        print(f"the kernel works: {library}")
    except (CommunicatorError, OSError) as error:
        print(f"hvd_localsgd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
