"""The compiled kernel, where ``tools/build_kernel.py`` has built it.

Optional: without it TensorFlow reads and assigns every small variable by an operation of its own, and to find that no sync
is due costs ten microseconds more.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import tensorflow as tf

from hvd_localsgd import cache

SOURCE = Path(__file__).with_name("kernel.cc")
DTYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)


def path() -> Path:
    """Where the kernel for this TensorFlow, this machine and this source is kept."""
    flags = [flag for flag in tf.sysconfig.get_compile_flags() if not flag.startswith("-I")]
    return cache.library(
        f"kernel-tf{tf.__version__}", tf.version.GIT_VERSION, platform.machine(), *flags, SOURCE.read_text()
    )


@functools.cache
def load() -> Any:
    """The module of the kernel's operations, or None if it has not been built, or not for a machine like this."""
    return cache.load(path(), tf.load_op_library, "kernel", (OSError, tf.errors.OpError))
