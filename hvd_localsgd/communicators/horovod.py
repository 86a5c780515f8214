"""Horovod's core operations, over the MPI, Gloo or NCCL that it was built with. The only file that imports it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvd_localsgd.communicators import Communicator, CommunicatorError


class HorovodCommunicator(Communicator):
    """``horovod.tensorflow``, initialised here if nobody has.

    Raises:
        CommunicatorError: Horovod is not installed, or was not built for this TensorFlow.
    """

    name = "horovod"
    takes_tensors = True

    def __init__(self) -> None:
        # Sub-groups are made after hvd.init(), which Horovod must be told before.
        os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
        try:
            import horovod.tensorflow as hvd
            import tensorflow as tf

            hvd.init()
        except (ImportError, OSError, tf_errors()) as error:
            raise CommunicatorError(
                f"Horovod for TensorFlow cannot be loaded ({error}). It must be built against this environment's "
                "TensorFlow and MPI; docs/horovod.md tells how (in a checkout: make horovod)."
            ) from error
        self._hvd, self._tf = hvd, tf
        self._set: Any = hvd.global_process_set
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.host = socket.gethostname()

    def exchange(self, row: np.ndarray, timeout: float | None = None) -> np.ndarray:
        """An allgather of bytes. Horovod itself warns after 60 s which ranks are missing."""
        raw = np.ascontiguousarray(row).reshape(1).view(np.uint8)
        gathered = _within(timeout, lambda: self._allgather(raw, "header"))
        return gathered.view(row.dtype)

    def tune(self, payload: int) -> None:
        """Horovod tunes itself."""

    def allreduce(self, buffer: np.ndarray) -> None:
        """Through a tensor in the host's memory."""
        with self._tf.device("/CPU:0"):
            buffer[:] = self.allreduce_tensor(self._tf.constant(buffer), 1.0).numpy()

    def allreduce_tensor(self, tensor: Any, weight: float) -> Any:
        """Sum over ranks where the tensor is: NCCL takes it from a GPU if Horovod was built with it."""
        name = f"hvd_localsgd.allreduce.{tensor.dtype.name}.{tensor.shape}.{self._set.process_set_id}"
        return self._hvd.allreduce(
            tensor * self._tf.cast(weight, tensor.dtype), op=self._hvd.Sum, name=name, process_set=self._set
        )

    def broadcast(self, array: np.ndarray) -> None:
        """Of the raw bytes: Horovod does not know every dtype."""
        raw = array.reshape(-1).view(np.uint8)
        if raw.size:
            with self._tf.device("/CPU:0"):
                root = self._set.ranks[0] if self._set.process_set_id else 0
                name = f"hvd_localsgd.broadcast.{self._set.process_set_id}"
                raw[:] = self._hvd.broadcast(raw, root, name=name, process_set=self._set).numpy()

    def gather(self, data: bytes) -> list[bytes]:
        """Lengths first, then an allgather of unequal parts."""
        lengths = self._allgather(np.array([len(data)], np.int64).view(np.uint8), "lengths").view(np.int64)
        everything = self._allgather(np.frombuffer(data, np.uint8), "bytes") if lengths.any() else np.empty(0, np.uint8)
        ends = np.cumsum(lengths)
        return [everything[end - n : end].tobytes() for end, n in zip(ends, lengths, strict=True)]

    def subgroup(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """Horovod's process sets."""
        mine: HorovodCommunicator | None = None
        for ranks in map(sorted, groups):
            everyone = len(ranks) == self._hvd.size()
            process_set = self._hvd.global_process_set if everyone else self._add(self._hvd.ProcessSet(ranks))
            if self._hvd.rank() in ranks:
                mine = object.__new__(HorovodCommunicator)
                mine.__dict__.update(self.__dict__)
                mine._set = process_set
                mine.rank, mine.size = ranks.index(self._hvd.rank()), len(ranks)
        if mine is None:
            raise ValueError(f"rank {self._hvd.rank()} is in none of the groups {[list(g) for g in groups]}")
        names = [host.decode() for host in mine.gather(mine.host.encode())]
        mine.local_size = names.count(mine.host)
        mine.local_rank = names[: mine.rank].count(mine.host)
        return mine

    def _add(self, process_set: Any) -> Any:
        try:
            return self._hvd.add_process_set(process_set)
        except ValueError as error:
            raise CommunicatorError(
                f"Horovod cannot make sub-groups now ({error}) Let lsgd.init(communicator='horovod') initialise Horovod, "
                "or set that variable before hvd.init()."
            ) from error

    def abort(self) -> None:
        """The launcher stops all others when one process ends with an error."""
        os._exit(1)

    def _allgather(self, raw: np.ndarray, what: str) -> np.ndarray:
        with self._tf.device("/CPU:0"):
            name = f"hvd_localsgd.{what}.{self._set.process_set_id}"
            return self._hvd.allgather(self._tf.constant(raw), name=name, process_set=self._set).numpy()


def tf_errors() -> type[BaseException]:
    """What TensorFlow raises when a library does not fit it."""
    from tensorflow.errors import NotFoundError

    return NotFoundError


def _within(timeout: float | None, call: Callable[[], np.ndarray]) -> np.ndarray:
    """The call's result; Horovod's calls cannot be given up, so one with a limit runs in a thread of its own."""
    if timeout is None:
        return call()
    results: list[np.ndarray] = []

    def attempt() -> None:
        with contextlib.suppress(Exception):  # Horovod was shut down: as good as no answer
            results.append(call())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout)
    if not results:
        raise TimeoutError(f"not all ranks came within {timeout} s")
    return results[0]
