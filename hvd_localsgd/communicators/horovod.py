"""Horovod's core operations, over the MPI, Gloo or NCCL that it was built with. The only file that imports it."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvd_localsgd.communicators import base
from hvd_localsgd.communicators.base import Communicator, OfThisProcess, in_pieces
from hvd_localsgd.communicators.stalls import patience
from hvd_localsgd.errors import CommunicatorError


class HorovodCommunicator(Communicator):
    """``horovod.tensorflow``, initialised here if nobody has.

    Raises:
        CommunicatorError: Horovod is not installed, or was not built for this TensorFlow.
    """

    name = "horovod"
    takes_tensors = True
    _hvd = OfThisProcess()

    def __init__(self) -> None:
        # Sub-groups are made after hvd.init(), which Horovod must be told before.
        os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
        try:
            os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(math.ceil(patience.warning)))
            if patience.timeout is not None:
                os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(math.ceil(patience.timeout)))
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
        self._process_sets: dict[tuple[int, ...], Any] = {}  # shared with the sub-groups, which are shallow copies
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.host = socket.gethostname()
        self._know_the_others()

    def _know_the_others(self) -> None:
        self.hosts = [host.decode() for host in self.gather(self.host.encode())]
        self.began, self.members = self.size, list(range(self.size))

    def exchange(self, row: np.ndarray, timeout: float | None = None) -> np.ndarray:
        """An allgather of bytes. Horovod itself warns after 60 s which ranks are missing."""
        raw = np.ascontiguousarray(row).reshape(1).view(np.uint8)
        gathered = _within(timeout, lambda: self._allgather(raw, "header"))
        return gathered.view(row.dtype)

    def allreduce(self, values: Any) -> Any:
        """Where a tensor is: NCCL takes it from a GPU if Horovod was built with it. Arrays go through a tensor in the
        host's memory.
        """
        if isinstance(values, np.ndarray):
            with self._tf.device("/CPU:0"):
                values[:] = self._allreduce(self._tf.constant(values)).numpy()
            return values
        total = self._allreduce(values)
        if "GPU" in total.device:
            self._tf.test.experimental.sync_devices()  # else the time would be counted to what comes next
        return total

    # Horovod matches the ranks' calls by name and process set, allows one process set for the same ranks, and is not told our names:
    # eagerly TensorFlow calls every operation by its kind. So a second thread uses other kinds, which do the same.

    def _allreduce(self, tensor: Any) -> Any:
        if (size := tensor.shape[0]) > base.MOST:
            pieces = [tensor[start : start + base.MOST] for start in range(0, size, base.MOST)]
            return self._tf.concat([self._allreduce(piece) for piece in pieces], 0)
        if self.beside:
            return self._hvd.grouped_allreduce([tensor], op=self._hvd.Sum, process_set=self._set)[0]
        name = f"hvd_localsgd.allreduce.{tensor.dtype.name}.{tensor.shape}.{self._set.process_set_id}"
        return self._hvd.allreduce(tensor, op=self._hvd.Sum, name=name, process_set=self._set)

    def broadcast(self, array: np.ndarray) -> None:
        """Of the raw bytes: Horovod does not know every dtype."""
        raw = array.reshape(-1).view(np.uint8)
        if raw.size:
            with self._tf.device("/CPU:0"):
                root = self._set.ranks[0] if self._set.process_set_id else 0
                name = f"hvd_localsgd.broadcast.{self._set.process_set_id}"
                raw[:] = self._hvd.broadcast(raw, root, name=name, process_set=self._set).numpy()

    def gather(self, data: bytes) -> list[bytes]:
        """Lengths first, then an allgather of unequal parts, in pieces."""
        lengths = self._allgather(np.array([len(data)], np.int64).view(np.uint8), "lengths").view(np.int64)
        return in_pieces(data, lengths, lambda own, counts: self._allgather(own, "bytes"))

    def alltoall(self, parts: np.ndarray, received: np.ndarray) -> None:
        """Horovod's, of equal parts; averages alone call it, which go one after another."""
        with self._tf.device("/CPU:0"):
            name = f"hvd_localsgd.alltoall.{self._set.process_set_id}"
            came = self._hvd.alltoall(self._tf.constant(parts.reshape(-1)), name=name, process_set=self._set)
            received[:] = came.numpy().reshape(received.shape)

    def allgather(self, part: np.ndarray, received: np.ndarray) -> None:
        """Horovod's."""
        received[:] = self._allgather(part, "parts").reshape(received.shape)

    def restrict(self, groups: Sequence[Sequence[int]]) -> None:
        """Horovod's process sets, of ranks of the whole job."""
        own = self._hvd.rank()
        members = [self._set.ranks[rank] for rank in range(self.size)] if self._set.process_set_id else range(self.size)
        mine = None
        for ranks in (sorted(members[rank] for rank in group) for group in groups):
            process_set = self._process_set(ranks)
            if own in ranks:
                mine = process_set, ranks
        if mine is None:
            raise ValueError(f"rank {self.rank} is in none of the groups {[list(g) for g in groups]}")
        self._set, ranks = mine
        self.rank, self.size = ranks.index(own), len(ranks)
        self._know_the_others()
        self.local_size = self.hosts.count(self.host)
        self.local_rank = self.hosts[: self.rank].count(self.host)

    def _process_set(self, ranks: list[int]) -> Any:
        """Horovod allows one for the same ranks."""
        if len(ranks) == self._hvd.size():
            return self._hvd.global_process_set
        if tuple(ranks) not in self._process_sets:
            try:
                self._process_sets[tuple(ranks)] = self._hvd.add_process_set(self._hvd.ProcessSet(ranks))
            except ValueError as error:
                raise CommunicatorError(
                    f"Horovod cannot make sub-groups now ({error}) Let lsgd.init(communicator='horovod') initialise Horovod, "
                    "or set that variable before hvd.init()."
                ) from error
        return self._process_sets[tuple(ranks)]

    def about(self) -> dict[str, Any]:
        """What it was built with."""
        return {"built_with": built_with()}

    def abort(self, status: int) -> None:
        """The launcher stops all others when one process ends with an error."""
        os._exit(status)

    def _allgather(self, raw: np.ndarray, what: str) -> np.ndarray:
        with self._tf.device("/CPU:0"):
            if self.beside:
                return self._hvd.grouped_allgather([self._tf.constant(raw)], process_set=self._set)[0].numpy()
            name = f"hvd_localsgd.{what}.{self._set.process_set_id}"
            return self._hvd.allgather(self._tf.constant(raw), name=name, process_set=self._set).numpy()


def built_with() -> list[str]:
    """What the Horovod of this environment can use, loading it and TensorFlow but joining nobody.

    Raises:
        ImportError, OSError: it does not fit this TensorFlow; or what TensorFlow raises then.
    """
    import horovod.tensorflow as hvd

    parts = {"MPI": hvd.mpi_built, "Gloo": hvd.gloo_built, "NCCL": hvd.nccl_built, "CUDA": hvd.cuda_built}
    return [name for name, built in parts.items() if built()]


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
