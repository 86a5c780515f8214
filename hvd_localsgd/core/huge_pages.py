"""Huge pages under the memory that is averaged.

MPI libraries move large messages between the processes of a node by having the kernel copy them page by page
(cross-memory attach). TensorFlow allocates pages of 4 KiB; pages of 2 MiB make such an allreduce about twice as fast.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1; contents and addresses stay, whoever uses the memory meanwhile


def use(array: Any) -> None:
    """Ask the kernel to put the memory of a contiguous numpy array on huge pages, now; if it will not, nothing changes.

    A tensor's memory, which may be a device's, is left as it is.
    """
    if not sys.platform.startswith("linux") or not isinstance(array, np.ndarray) or not array.size:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    first = array.ctypes.data // _PAGE * _PAGE
    for page in range(first, array.ctypes.data + array.nbytes, _PAGE):
        madvise(page, _PAGE, _MADV_COLLAPSE)  # one at a time: those at the ends may lie partly outside what is mapped
