"""What is compiled of the arithmetic, where ``tools/build_kernel.py`` has built it: one pass instead of several, and the same bits.

Optional, as the kernel for TensorFlow's variables is.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import numpy as np

from hvd_localsgd import cache
from hvd_localsgd.core import stages
from hvd_localsgd.core.codecs import BLOCK, CODECS, Codec, Scaled
from hvd_localsgd.core.layout import Array

SOURCE = Path(__file__).with_name("codecs.cc")
# A product and a sum are rounded one after the other, as numpy does it.
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


def path() -> Path:
    """Where the codecs for this machine and this source are kept."""
    return cache.library("codecs", platform.machine(), *FLAGS, SOURCE.read_text())


@functools.cache
def load() -> Any:
    """The library, or None if it has not been built, or not for a machine like this."""
    if library := cache.load(path(), ctypes.CDLL, "codecs"):
        library.scale.restype = ctypes.c_float
        library.scale.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_float)
    return library


def codec(name: str) -> Codec:
    """The compiled one, or numpy's."""
    library, plain = load(), CODECS[name]
    return plain if library is None else Compiled(library, name, plain)


def scale(values: Array, weight: float) -> tuple[Array, float]:
    """As ``core.stages.scale``."""
    if (library := load()) is None or not isinstance(values, np.ndarray) or values.dtype != np.float32:
        return stages.scale(values, weight)
    # values.ctypes.data takes five microseconds more between two reductions, which leave nothing of Python in the caches.
    address = ctypes.addressof(ctypes.c_char.from_buffer(values.data))
    return values, library.scale(address, values.size, weight)


class Compiled:
    """As the ``Codec`` of that name in ``core.codecs``."""

    def __init__(self, library: Any, name: str, plain: Scaled) -> None:
        self._encode, self._decode, self._add = (
            getattr(library, f"{name}_{what}") for what in ("encode", "decode", "add")
        )
        self._plain = plain

    def bytes(self, elements: int) -> int:
        """Scales in front."""
        return self._plain.bytes(elements)

    def encode(self, values: np.ndarray, raw: np.ndarray) -> tuple[float, float]:
        """One pass, in C++."""
        scales, codes = self._plain.split(raw)
        sums = np.zeros(2)
        self._encode(
            _address(values), ctypes.c_int64(values.size // BLOCK), _address(scales), _address(codes), _address(sums)
        )
        return float(sums[0]), float(sums[1])

    def decode(self, raw: np.ndarray, values: np.ndarray) -> None:
        """One pass, in C++."""
        self._read(self._decode, raw, values)

    def add(self, raw: np.ndarray, values: np.ndarray) -> None:
        """One pass, in C++."""
        self._read(self._add, raw, values)

    def _read(self, function: Any, raw: np.ndarray, values: np.ndarray) -> None:
        scales, codes = self._plain.split(raw)
        function(_address(codes), _address(scales), _address(values), ctypes.c_int64(min(values.size, codes.size)))


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
