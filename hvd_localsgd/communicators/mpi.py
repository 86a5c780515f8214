"""MPI through mpi4py. The only file that imports it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvd_localsgd.communicators import base
from hvd_localsgd.communicators.base import Communicator, OfThisProcess, SharedVector
from hvd_localsgd.communicators.launchers import detect, slurm
from hvd_localsgd.communicators.stalls import Stalls
from hvd_localsgd.errors import INSTALL_MPI, CommunicatorError, RankDied

_ULFM = "OMPI_MCA_mpi_ft_enable"  # which mpirun --with-ft ulfm sets
_SPIN_SECONDS = 2e-3
_LONGEST_PAUSE = 1e-3
_GENTLE_SECONDS = 3e-4
_FEW = 1024  # numbers
_ANSWER_SECONDS = 5e-4


def _notices_death(method: Callable[..., Any]) -> Callable[..., Any]:
    """A rank's death, or that another has noticed it, becomes RankDied; nobody waits for it any more."""

    @functools.wraps(method)
    def call(self: MPICommunicator, *arguments: Any, **named: Any) -> Any:
        try:
            return method(self, *arguments, **named)
        except self._mpi.Exception as error:
            if not self.resilient or error.Get_error_class() not in self._lost:
                raise
            raise self._died() from error

    return call


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
        MPI = _load()
        if too_late:
            _mend_loading(MPI)
        _initialize(MPI)
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise CommunicatorError(
                "MPI was initialised with a thread level below MPI_THREAD_SERIALIZED, but TensorFlow calls the "
                "optimizer from its own threads. Leave mpi4py.rc.thread_level at its default ('multiple')."
            )
        launch, found = detect(), MPI.COMM_WORLD.Get_size()
        if launch.size > 1 and found == 1:
            library = _first_line(MPI.Get_library_version())
            raise CommunicatorError(
                slurm.alone(launch, library)
                if launch.launcher == slurm.NAME
                else f"The launcher started {launch.size} processes, but MPI ({library}) sees only this one: mpirun and the "
                "MPI library that mpi4py loaded are not the same. Use the mpirun of the environment that Python "
                "runs in (`which mpirun`), or rebuild mpi4py against the launcher's MPI."
            )
        self._mpi = MPI
        self.threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self.resilient = os.environ.get(_ULFM) in ("1", "true")
        # The last: it is in one of several requests.
        lost = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED", "ERR_IN_STATUS")
        self._lost = [getattr(MPI, name, None) for name in lost]
        self.began, self.members, self._family = found, list(range(found)), list[Any]()
        self._use(MPI.COMM_WORLD.Dup())

    def _use(self, comm: Any) -> None:
        node = comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        self._comm, notices = comm, comm.Dup()
        self._family += [comm, notices]  # shared with the sub-groups, which are shallow copies
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
        self.host = self._mpi.Get_processor_name()
        places = [place.decode().split(" ") for place in self.gather(f"{os.getpid()} {self.host}".encode())]
        self.hosts = [host for _, host in places]
        processes = [int(process) for process, _ in places]
        self._stalls = Stalls(notices, self.hosts, processes, self.resilient, self._last_seen)
        self._last: np.ndarray | None = None
        node.Free()

    def _last_seen(self, rank: int) -> str:
        return "" if self._last is None else self.seen(self._last[rank])

    @_notices_death
    def exchange(self, row: np.ndarray, timeout: float | None = None) -> np.ndarray:
        """Non-blocking allgather, polled, so that a rank that waits long does not burn a core."""
        table = np.empty(self.size, row.dtype)
        request = self._comm.Iallgather(np.ascontiguousarray(row).reshape(1).view(np.uint8), table.view(np.uint8))
        self._stalls.begin()
        started, pause = time.perf_counter(), 0.0
        while not request.Test():
            waited = time.perf_counter() - started
            self._stalls.wait(waited)
            if timeout is not None and waited > timeout:
                raise TimeoutError(f"not all ranks came within {timeout} s")
            if waited < _SPIN_SECONDS:
                os.sched_yield()
            else:
                pause = min(pause + 5e-5, _LONGEST_PAUSE)
                time.sleep(pause)
        self._stalls.end()
        self._last = table if table.dtype.names else self._last
        return table

    @_notices_death
    def allreduce(self, values: np.ndarray) -> np.ndarray:
        """MPI_Allreduce in place; polled where it is a number or two, for large ones of that kind are slow."""
        if not self.beside or values.size > _FEW:
            self._comm.Allreduce(self._mpi.IN_PLACE, values)
            return values
        request = self._comm.Iallreduce(self._mpi.IN_PLACE, values)
        while not request.Test():
            time.sleep(_GENTLE_SECONDS)
        return values

    @_notices_death
    def sendrecv(self, values: np.ndarray, to: int, received: np.ndarray, source: int) -> None:
        """MPI_Sendrecv; or its two halves, polled."""
        if not self.beside:
            self._comm.Sendrecv(values, to, recvbuf=received, source=source)
            return
        requests = [self._comm.Irecv(received, source), self._comm.Isend(values, to)]
        while not self._mpi.Request.Testall(requests):
            time.sleep(_GENTLE_SECONDS)

    @_notices_death
    def broadcast(self, array: np.ndarray) -> None:
        """MPI_Bcast of the raw bytes (MPI knows no bfloat16), in pieces."""
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, base.MOST):
            self._comm.Bcast(raw[start : start + base.MOST], root=0)

    @_notices_death
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

    @_notices_death
    def restrict(self, groups: Sequence[Sequence[int]]) -> None:
        """MPI_Comm_split."""
        colors = {rank: color for color, ranks in enumerate(groups) for rank in ranks}
        if self.rank not in colors:
            raise ValueError(f"rank {self.rank} is in none of the groups {[list(g) for g in groups]}")
        self._use(self._comm.Split(colors[self.rank], self.rank))
        self.began, self.members = self.size, list(range(self.size))

    # What a rank's death needs of MPI: ULFM, which Open MPI 5 has.

    def agree(self, well: bool) -> bool:
        """MPIX_Comm_agree, which fails, on all ranks alike, if one has died that it did not know of before."""
        if not self.resilient:
            return well
        try:
            return bool(self._comm.Agree(int(well)))
        except self._mpi.Exception as error:
            if error.Get_error_class() not in self._lost:
                raise
            return False

    def shrink(self) -> list[int]:
        """MPIX_Comm_shrink, again and again while ranks die in it. Sub-groups are lost."""
        self._revoke()
        before, members = self.rank, self.members
        while True:
            self._family = []  # a thread that still waits in a sub-group has the old one
            self._comm = self._comm.Shrink()
            try:
                self._use(self._comm)
                numbers = np.empty(self.size, np.int64)
                self._comm.Allgather(np.array([before], np.int64), numbers)
                well = True
            except (RankDied, self._mpi.Exception):
                self._revoke()
                well = False
            if self.agree(well):
                break
        self.members = [members[number] for number in numbers]
        self.generation += 1
        return numbers.tolist()

    def _revoke(self) -> None:
        """No rank waits in any of this one's communicators any more, nor in their sub-groups."""
        for comm in (self._comm, *self._family):
            with contextlib.suppress(self._mpi.Exception):
                comm.Revoke()

    def _died(self) -> RankDied:
        self._revoke()
        return RankDied(f"a rank has died (seen on rank {self.rank} on {self.host})")

    def dead(self, seconds: float) -> list[int]:
        """Whom this rank knows to be dead; who has heard of it from another may have to wait for MPI to know as well."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(self._mpi.Exception):
                failed = self._comm.Get_failed()
                if failed.size:
                    ranks = self._mpi.Group.Translate_ranks(failed, None, self._comm.Get_group())
                    return [rank for rank in ranks if 0 <= rank < self.size]
            if time.monotonic() > end:
                return []
            time.sleep(_LONGEST_PAUSE)

    def about(self) -> dict[str, Any]:
        """The library, what it can do, and what it was asked for."""
        mpi, path = self._mpi, _library_file()
        symbols: Any = ctypes.CDLL(str(path), os.RTLD_NOLOAD | os.RTLD_NOW) if path else None
        levels = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
        return {
            "library": _first_line(mpi.Get_library_version()).split(",")[0],
            "file": str(path) if path else None,
            "standard": ".".join(map(str, mpi.Get_version())),
            "threads": next(name.lower() for name in levels if mpi.Query_thread() == getattr(mpi, f"THREAD_{name}")),
            "ulfm": hasattr(symbols, "MPIX_Comm_agree"),
            "ulfm_is_on": self.resilient,
            "cuda": bool(symbols.MPIX_Query_cuda_support()) if hasattr(symbols, "MPIX_Query_cuda_support") else None,
        }

    def abort(self, status: int) -> None:
        """MPI_Abort: the launcher stops every other rank, and returns the status.

        Where it lets ranks die it may return 0 after MPI_Abort; but it does stop them all, and says so, when one ends with an error.
        """
        if self.resilient:
            self._revoke()
            os._exit(status or 1)
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


def _load() -> Any:
    """mpi4py with the library, without MPI_Init: that may end the process where the launcher does not fit."""
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            mpi4py.rc.initialize = False
            mpi4py.rc.finalize = mpi4py.rc.finalize is not False  # at exit, as if it had initialised MPI itself
        from mpi4py import MPI
    except ImportError as error:
        raise CommunicatorError(f"MPI cannot be loaded ({error}). {INSTALL_MPI}") from error
    except RuntimeError as error:
        raise CommunicatorError(f"mpi4py found no MPI library ({str(error).splitlines()[0]}). {INSTALL_MPI}") from error
    return MPI


def _initialize(mpi: Any) -> None:
    import mpi4py

    if mpi.Is_initialized():
        return
    path = _library_file()
    if refusal := slurm.refusal(detect(), os.environ, mpi.Get_library_version(), path and path.parent):
        raise CommunicatorError(refusal)
    level = mpi4py.rc.thread_level if mpi4py.rc.threads else "single"
    mpi.Init_thread(getattr(mpi, f"THREAD_{level.upper()}"))


def _library_file() -> Path | None:
    """Where the MPI library of this process lies."""
    mapped = Path("/proc/self/maps").read_text().split()
    return next((Path(name) for name in mapped if re.match(r"/.*/libmpi[^/]*\.so", name)), None)


def _first_line(library: str) -> str:
    line = library.strip().splitlines()[0].split("\x00")[0]
    return re.sub(r"\s*Version:\s*", " ", line)  # of MPICH


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
