"""MPI through mpi4py. The only file that imports it."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvd_localsgd.communicators import base
from hvd_localsgd.communicators.base import Communicator, OfThisProcess, SharedVector
from hvd_localsgd.communicators.launchers import launched_size
from hvd_localsgd.errors import CommunicatorError

_SPIN_SECONDS = 2e-3
_LONGEST_PAUSE = 1e-3
_GENTLE_SECONDS = 3e-4
_FEW = 1024  # numbers
_ANSWER_SECONDS = 5e-4
STALL_SECONDS = float(os.environ.get("HVD_LOCALSGD_STALL_WARNING", "60"))  # of waiting, until it is said for whom


class MPICommunicator(Communicator):
    """A duplicate of MPI.COMM_WORLD: our messages can never meet the user's own.

    Raises:
        CommunicatorError: mpi4py or an MPI library is missing, the thread level is too low, or the launcher
            that started this process is not the one of the MPI library that was loaded.
    """

    name = "mpi"
    _comm = OfThisProcess()

    def __init__(self) -> None:
        too_late = not _prepare_loading()
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise CommunicatorError(
                f"MPI cannot be loaded ({error}). Load your cluster's MPI module, or install one as a wheel: "
                "pip install 'hvd-localsgd[mpi]'."
            ) from error
        except RuntimeError as error:
            raise CommunicatorError(
                f"mpi4py found no MPI library ({str(error).splitlines()[0]}). Load your cluster's MPI module, or "
                "install one as a wheel: pip install 'hvd-localsgd[mpi]'."
            ) from error
        if too_late:
            _mend_loading(MPI)
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise CommunicatorError(
                "MPI was initialised with a thread level below MPI_THREAD_SERIALIZED, but TensorFlow calls the "
                "optimizer from its own threads. Leave mpi4py.rc.thread_level at its default ('multiple')."
            )
        expected, found = launched_size(), MPI.COMM_WORLD.Get_size()
        if expected > 1 and found == 1:
            library = MPI.Get_library_version().strip().splitlines()[0].split("\x00")[0]
            raise CommunicatorError(
                f"The launcher started {expected} processes, but MPI ({library}) sees only this one: mpirun and the "
                "MPI library that mpi4py loaded are not the same. Use the mpirun of the environment that Python "
                "runs in (`which mpirun`), or rebuild mpi4py against the launcher's MPI."
            )
        self._mpi = MPI
        self.threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._use(MPI.COMM_WORLD.Dup())

    def _use(self, comm: Any) -> None:
        node = comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        self._comm, self._notices = comm, comm.Dup()
        self._exchanges, self._arrived = 0, np.zeros(comm.Get_size(), np.int64)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
        self.host = self._mpi.Get_processor_name()
        self._hosts = [host.decode() for host in self.gather(self.host.encode())]
        node.Free()

    def exchange(self, row: np.ndarray, timeout: float | None = None) -> np.ndarray:
        """Non-blocking allgather, polled, so that a rank that waits long does not burn a core."""
        table = np.empty(self.size, row.dtype)
        request = self._comm.Iallgather(np.ascontiguousarray(row).reshape(1).view(np.uint8), table.view(np.uint8))
        self._exchanges += 1
        started, pause, said = time.perf_counter(), 0.0, 0
        while not request.Test():
            waited = time.perf_counter() - started
            if waited > (STALL_SECONDS if said else STALL_SECONDS / 10) * max(said, 1):
                self._say_who_is_missing(waited, said)
                said += 1
            if timeout is not None and waited > timeout:
                raise TimeoutError(f"not all ranks came within {timeout} s")
            if waited < _SPIN_SECONDS:
                os.sched_yield()
            else:
                pause = min(pause + 5e-5, _LONGEST_PAUSE)
                time.sleep(pause)
        self._read_notices()
        return table

    def _say_who_is_missing(self, waited: float, said: int) -> None:
        """First tell ranks 0 and 1 that this one is waiting; later they, who know who else is, say who is not."""
        if not said:
            here = np.array([self.rank, self._exchanges], np.int64)
            others = [rank for rank in (0, 1) if rank != self.rank and rank < self.size]
            self._sent = here, [self._notices.Isend(here, rank) for rank in others]  # kept until they have arrived
            return
        self._read_notices()
        self._arrived[self.rank] = self._exchanges
        missing = np.flatnonzero(self._arrived < self._exchanges)
        speaker = 0 if self._arrived[0] == self._exchanges else 1
        if self.rank == speaker and missing.size:
            names = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in missing[:8])
            more = f" and {missing.size - 8} more" if missing.size > 8 else ""
            print(
                f"hvd_localsgd: rank {self.rank} on {self.host} has waited for {waited:.0f} s; not here: {names}{more}",
                file=sys.stderr,
                flush=True,
            )

    def _read_notices(self) -> None:
        notice = np.empty(2, np.int64)
        while self._notices.Iprobe():
            self._notices.Recv(notice)
            self._arrived[notice[0]] = notice[1]

    def allreduce(self, values: np.ndarray) -> np.ndarray:
        """MPI_Allreduce in place; polled where it is a number or two, for large ones of that kind are slow."""
        if not self.beside or values.size > _FEW:
            self._comm.Allreduce(self._mpi.IN_PLACE, values)
            return values
        request = self._comm.Iallreduce(self._mpi.IN_PLACE, values)
        while not request.Test():
            time.sleep(_GENTLE_SECONDS)
        return values

    def sendrecv(self, values: np.ndarray, to: int, received: np.ndarray, source: int) -> None:
        """MPI_Sendrecv; or its two halves, polled."""
        if not self.beside:
            self._comm.Sendrecv(values, to, recvbuf=received, source=source)
            return
        requests = [self._comm.Irecv(received, source), self._comm.Isend(values, to)]
        while not self._mpi.Request.Testall(requests):
            time.sleep(_GENTLE_SECONDS)

    def broadcast(self, array: np.ndarray) -> None:
        """MPI_Bcast of the raw bytes (MPI knows no bfloat16), in pieces."""
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, base.MOST):
            self._comm.Bcast(raw[start : start + base.MOST], root=0)

    def gather(self, data: bytes) -> list[bytes]:
        """Lengths first, then MPI_Allgatherv, in pieces."""
        lengths = np.empty(self.size, np.int64)
        self._comm.Allgather(np.array([len(data)], np.int64), lengths)

        def piece(own: np.ndarray, counts: list[int]) -> np.ndarray:
            everything = np.empty(sum(counts), np.uint8)
            self._comm.Allgatherv(own, [everything, counts])
            return everything

        return base.in_pieces(data, lengths, piece)

    def share(self, values: np.ndarray) -> SharedVector:
        """An MPI window."""
        try:
            return _Window(self._mpi, self._comm, values, several_hosts=self.local_size < self.size)
        except self._mpi.Exception as error:
            raise CommunicatorError(
                f"mode='async' needs one-sided MPI, which {self._mpi.Get_library_version().splitlines()[0]} does not offer "
                f"here ({error}). Some libraries have it only inside a host or on InfiniBand; mode='sync' works everywhere."
            ) from error

    def restrict(self, groups: Sequence[Sequence[int]]) -> None:
        """MPI_Comm_split."""
        colors = {rank: color for color, ranks in enumerate(groups) for rank in ranks}
        if self.rank not in colors:
            raise ValueError(f"rank {self.rank} is in none of the groups {[list(g) for g in groups]}")
        self._use(self._comm.Split(colors[self.rank], self.rank))

    def abort(self, status: int) -> None:
        """MPI_Abort: the launcher stops every other rank, and returns the status."""
        self._comm.Abort(status)


class _Window(SharedVector):
    """Evenly spread over the ranks, so that none is a bottleneck; open to all from the first moment to the last."""

    _window = OfThisProcess()

    def __init__(self, mpi: Any, comm: Any, values: np.ndarray, several_hosts: bool) -> None:
        self._mpi = mpi
        self._bounds = np.linspace(0, values.size, comm.Get_size() + 1).astype(int)
        own = values[slice(*self._bounds[comm.Get_rank() :][:2])]
        self._window = mpi.Win.Allocate(max(own.nbytes, values.itemsize), values.itemsize, comm=comm)
        np.frombuffer(self._window.tomemory(), values.dtype)[: own.size] = own
        self._window.Lock_all(mpi.MODE_NOCHECK)
        self._window.Sync()
        comm.Barrier()
        # Inside a host others reach our memory by themselves. Over TCP the library answers them only when it is called.
        self._freed = threading.Event()
        self._helper = threading.Thread(target=self._answer, args=(comm,), daemon=True)
        if several_hosts and mpi.Query_thread() == mpi.THREAD_MULTIPLE:
            self._helper.start()

    def _answer(self, comm: Any) -> None:
        while not self._freed.wait(_ANSWER_SECONDS):
            comm.Iprobe()

    def _pieces(self, size: int, at: int) -> Iterator[tuple[int, slice, int]]:
        """Owner, which part of the buffer, place in the owner's stretch."""
        first, last = np.searchsorted(self._bounds, [at, at + size - 1], "right") - 1
        for owner in range(first, last + 1):
            start, stop = max(at, self._bounds[owner]), min(at + size, self._bounds[owner + 1])
            if start < stop:
                yield owner, slice(start - at, stop - at), int(start - self._bounds[owner])

    def add(self, values: np.ndarray, at: int, before: np.ndarray) -> None:
        for owner, part, place in self._pieces(values.size, at):
            self._window.Get_accumulate(values[part], before[part], owner, place, op=self._mpi.SUM)
            self._window.Flush(owner)

    def read(self, values: np.ndarray, at: int) -> None:
        for owner, part, place in self._pieces(values.size, at):
            self._window.Get(values[part], owner, place)
            self._window.Flush(owner)

    def free(self) -> None:
        self._window.Unlock_all()
        self._freed.set()
        if self._helper.is_alive():
            self._helper.join()
        self._window.Free()


def _prepare_loading() -> bool:
    """Traps between mpi4py, an Open MPI that was installed as a wheel, and TensorFlow; False if the last has closed already."""
    # A process that was not started by the wheel's own mpirun does not know where that Open MPI lies.
    if (Path(sys.prefix) / "bin" / "orted").exists() and (Path(sys.prefix) / "lib" / "libmpi.so.40").exists():
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
    # TensorFlow and MPI each have an hwloc inside, of different versions and open to all. If MPI's is global TensorFlow
    # calls it and complains (hwloc_topology_set_flags() failed). If MPI's names are bound lazily, Open MPI 4.1.8 starts
    # with its own and, once TensorFlow is there, ends with TensorFlow's: a crash in MPI_Finalize.
    try:
        from mpi4py import _mpiabi
    except ImportError:
        return True  # mpi4py built from source: bound when it is loaded
    if _mpiabi.LIBMPI_MODE is not None:
        return True  # set here before, or by somebody who knows
    _mpiabi.LIBMPI_MODE = os.RTLD_NOW | os.RTLD_LOCAL
    loaded = "mpi4py.MPI" in sys.modules and hasattr(vars(_mpiabi)["_get_mpiabi"], "mpiabi")  # and by _mpiabi
    return not loaded or bool(os.environ.get("LD_BIND_NOW"))


def _mend_loading(mpi: Any) -> None:
    """What can still be done where the script has imported mpi4py.MPI, lazily bound, before it called us."""
    library = mpi.Get_library_version().split(",")[0]
    imported = list(sys.modules)
    if "Open MPI v4" not in library:
        return  # Open MPI 5, MPICH and Intel MPI end well all the same
    if "tensorflow" not in imported:
        # What is global first is everybody's: TensorFlow will complain of an hwloc that is not its own, and nothing crashes.
        ctypes.CDLL("libmpi.so.40", os.RTLD_NOLOAD | os.RTLD_GLOBAL)
    elif imported.index("mpi4py.MPI") < imported.index("tensorflow") and mpi.COMM_WORLD.Get_rank() == 0:
        warnings.warn(
            f"mpi4py.MPI was imported first, then TensorFlow, then lsgd.init() was called: with {library} this process will "
            "crash in MPI_Finalize when it ends (signal 11, after training). Call lsgd.init() before `from mpi4py import MPI`, "
            "or import tensorflow before it, or set LD_BIND_NOW=1 in the environment of mpirun.",
            stacklevel=2,
        )
