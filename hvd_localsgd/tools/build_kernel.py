"""Build what is compiled, once: ``python -m hvd_localsgd.tools.build_kernel``.

That is the kernel for this environment's TensorFlow, the codecs of ``compression=`` and the weighting of what is sent. Optional: without
these numpy does their work, in several times the time; without the kernel TensorFlow reads and assigns every small variable by an
operation of its own, which matters for models that have thousands of them (docs/performance.md). It needs a C++ compiler and
about 20 seconds, and is kept outside the tree (``$XDG_CACHE_HOME/hvd_localsgd``, by default below ``~/.cache``), where every process that averages finds it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from hvd_localsgd.backends import native
from hvd_localsgd.backends.tensorflow import kernel
from hvd_localsgd.core.codecs import BLOCK, CODECS
from hvd_localsgd.errors import BuildError
from hvd_localsgd.tools.build_horovod import find_compiler


def build(source: Path, library: Path, flags: Sequence[str]) -> Path:
    """Compile it, unless it is there.

    Raises:
        BuildError: there is no compiler, or it fails.
        OSError: the compiler that ``CXX`` names cannot be started, or the cache cannot be written.
    """
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or find_compiler("The kernel")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        output = Path(temporary) / library.name
        line = [*compiler.split(), "-w", "-shared", "-fPIC", str(source), "-o", str(output), *flags]
        if subprocess.run(line).returncode != 0:
            raise BuildError(f"failed: {' '.join(line)}")
        output.replace(library)  # at once: others may be building, or loading, the same
    return library


def try_kernel(library: Path) -> None:
    """Raises BuildError if it does not work."""
    if (operations := kernel.load()) is None:
        raise BuildError(f"{library} cannot be loaded. Remove it, and build it again.")
    variables = [tf.Variable([1.0, 2.0]), tf.Variable([[3.0]], dtype=tf.float16)]
    handles = [tf.stack([v.handle for v in variables])]
    operations.hvd_localsgd_write_variables(handles=handles, flat=tf.constant([4.0, 5.0, 6.0]))
    flat = operations.hvd_localsgd_read_variables(handles=handles, T=tf.float32, size=3)
    if flat.numpy().tolist() != [4.0, 5.0, 6.0]:
        raise BuildError(f"{library} was built, but does not work: {flat}")


def try_codecs(library: Path) -> None:
    """Raises BuildError if they do not work."""
    values = np.linspace(-1, 1, BLOCK, dtype=np.float32)
    for name, plain in CODECS.items():
        raw, expected = np.zeros((2, plain.bytes(BLOCK)), np.uint8)
        native.codec(name).encode(values.copy(), raw)
        plain.encode(values.copy(), expected)
        if native.load() is None or raw.tobytes() != expected.tobytes():
            raise BuildError(f"{library} cannot be loaded, or does not work. Remove it, and build it again.")


def main() -> int:
    """Build both, try them; the exit status."""
    try:
        print(f"building a kernel for TensorFlow {tf.__version__}, and codecs ...", flush=True)
        codecs = build(native.SOURCE, native.path(), native.FLAGS)
        try_codecs(codecs)
        flags = ["-O2", *tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags()]
        library = build(kernel.SOURCE, kernel.path(), flags)
        try_kernel(library)
        print(f"the codecs work: {codecs}\nthe kernel works: {library}")
    except (BuildError, OSError) as error:
        print(f"hvd_localsgd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
