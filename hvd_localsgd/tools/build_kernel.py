"""Build the compiled kernel for this environment's TensorFlow, once: ``python -m hvd_localsgd.tools.build_kernel``.

Optional: without it TensorFlow reads and assigns every small variable by an operation of its own, which matters for models
that have thousands of them (docs/performance.md). It needs a C++ compiler and about 20 seconds, and is kept outside the
tree (``$XDG_CACHE_HOME/hvd_localsgd``, by default below ``~/.cache``), where every process that averages finds it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tensorflow as tf

from hvd_localsgd.backends.tensorflow import kernel
from hvd_localsgd.errors import BuildError
from hvd_localsgd.tools.build_horovod import find_compiler


def build() -> Path:
    """Compile it, unless it is there.

    Raises:
        BuildError: there is no compiler, or it fails.
        OSError: the compiler that ``CXX`` names cannot be started, or the cache cannot be written.
    """
    library = kernel.path()
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or find_compiler("The kernel")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        output = Path(temporary) / library.name
        flags = [*tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags()]
        line = [*compiler.split(), "-w", "-O2", "-shared", "-fPIC", str(kernel.SOURCE), "-o", str(output), *flags]
        if subprocess.run(line).returncode != 0:
            raise BuildError(f"failed: {' '.join(line)}")
        output.replace(library)  # at once: others may be building, or loading, the same
    return library


def main() -> int:
    """Build it, try it; the exit status."""
    try:
        print(f"building a kernel for TensorFlow {tf.__version__} ...", flush=True)
        library = build()
        if (operations := kernel.load()) is None:
            raise BuildError(f"{library} cannot be loaded. Remove it, and build it again.")
        variables = [tf.Variable([1.0, 2.0]), tf.Variable([[3.0]], dtype=tf.float16)]
        handles = [tf.stack([v.handle for v in variables])]
        operations.hvd_localsgd_write_variables(handles=handles, flat=tf.constant([4.0, 5.0, 6.0]))
        flat = operations.hvd_localsgd_read_variables(handles=handles, T=tf.float32, size=3)
        if flat.numpy().tolist() != [4.0, 5.0, 6.0]:
            raise BuildError(f"{library} was built, but does not work: {flat}")
        print(f"the kernel works: {library}")
    except (BuildError, OSError) as error:
        print(f"hvd_localsgd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
