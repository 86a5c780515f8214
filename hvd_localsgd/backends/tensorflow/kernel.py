"""The compiled kernel, where ``tools/build_kernel.py`` has built it.

Optional: without it TensorFlow reads and assigns every small variable by an operation of its own, and to find that no sync
is due costs ten microseconds more.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import warnings
from pathlib import Path
from typing import Any

import tensorflow as tf

from hvd_localsgd import cache

SOURCE = Path(__file__).with_name("kernel.cc")
DTYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)


def path() -> Path:
    """Where the kernel for this TensorFlow, this machine and this source is kept."""
    flags = [flag for flag in tf.sysconfig.get_compile_flags() if not flag.startswith("-I")]
    key = "\n".join([tf.version.GIT_VERSION, platform.machine(), *flags, SOURCE.read_text()])
    return cache.folder() / f"kernel-tf{tf.__version__}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.so"


@functools.cache
def load() -> Any:
    """The module of the kernel's operations, or None if it has not been built, or not for a machine like this."""
    library = path()
    if not library.exists():
        return None
    try:
        return tf.load_op_library(str(library))
    except (tf.errors.OpError, OSError) as error:
        warnings.warn(f"going on without the compiled kernel; build it on this machine: {error}", stacklevel=2)
        return None
