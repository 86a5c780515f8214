"""From facts to findings: each check is a pure function, and sees everything.

A finding is ``"wrong"`` (ranks cannot train, or train what nobody meant), ``"slow"`` (they lose time), or a ``"note"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from hvd_localsgd.errors import listed
from hvd_localsgd.tools.doctor.facts import Job, Network, Rank

_UNEVEN = 4  # a link this many times slower than the median is named
_MOST = 0.5  # the part of what ranks sent that an interface must have carried to be the one
_IB_MBITS = 40_000.0  # of an InfiniBand interface that does not say how fast it is


@dataclass
class Finding:
    """What was found, and what to change."""

    level: str
    what: str
    do: str = ""


def ranks_meet(job: Job) -> Iterator[Finding]:
    """What the launcher started is together."""
    first = job.ranks[0]
    if job.trouble:
        yield Finding("wrong", job.trouble)
    elif first.launched > len(job.ranks):
        yield Finding(
            "wrong",
            f"{first.launcher} started {first.launched} processes, and each would train alone.",
            "Unset HVD_LOCALSGD_COMMUNICATOR.",
        )


def one_process(job: Job) -> Iterator[Finding]:
    """Somebody may have meant to start more."""
    if len(job.ranks) == 1 and job.ranks[0].launched == 1 and not job.trouble:
        yield Finding(
            "note",
            job.ranks[0].hint or f"This is one process ({job.ranks[0].launcher}), so nothing can be said of ranks.",
            "" if job.ranks[0].hint else "Start it as you start training: mpirun -np 4 hvd-localsgd doctor",
        )


def same_versions(job: Job) -> Iterator[Finding]:
    """Every rank has the same of everything."""
    for name in sorted({name for rank in job.ranks for name in rank.versions}):
        having: dict[str, list[int]] = {}
        for rank in job.ranks:
            having.setdefault(rank.versions.get(name, "missing"), []).append(rank.rank)
        if len(having) > 1:
            words = " and ".join(f"{version} on {_numbers(ranks)}" for version, ranks in having.items())
            yield Finding("wrong", f"{name} is {words}.", "Use one environment, on a filesystem that all hosts see.")


def needed_versions(job: Job) -> Iterator[Finding]:
    """What is installed is new enough."""
    installed = job.ranks[0].versions
    for name, needed in job.needs.items():
        if name in installed and not SpecifierSet(needed).contains(installed[name], prereleases=True):
            yield Finding("wrong", f"{name} {installed[name]} is installed, and {needed} is needed.", "Upgrade it.")


def framework_loads(job: Job) -> Iterator[Finding]:
    """TensorFlow, Keras on top of it, and Horovod where it is installed."""
    found, launcher = job.ranks[0].framework, job.ranks[0].launcher
    if error := found.get("error"):
        yield Finding(
            "wrong",
            f"TensorFlow and Keras cannot be loaded: {error}",
            "pip install tensorflow (or tensorflow-cpu); only loops with numpy arrays train without.",
        )
    if found.get("backend", "tensorflow") != "tensorflow":
        yield Finding("wrong", f"Keras' backend is {found['backend']}.", "Set KERAS_BACKEND=tensorflow.")
    if error := found.get("horovod_error"):
        yield Finding(
            "wrong" if "horovodrun" in launcher else "note",
            f"Horovod is installed, but cannot be loaded: {error}",
            "Build it for this TensorFlow and MPI: python -m hvd_localsgd.tools.build_horovod. MPI alone does without.",
        )


def tensorflow_sees_gpus(job: Job) -> Iterator[Finding]:
    """What the driver lists, TensorFlow can use."""
    there, seen = len(job.ranks[0].gpus), job.ranks[0].framework.get("gpus")
    if seen is not None and seen < there:
        yield Finding(
            "wrong",
            f"{job.ranks[0].host} has {_count(there, 'GPU')}, and TensorFlow sees {seen}.",
            "Install TensorFlow with CUDA (pip install 'tensorflow[and-cuda]'), for the driver that nvidia-smi shows.",
        )


def own_gpu(job: Job) -> Iterator[Finding]:
    """No two ranks on one GPU; and either all ranks have one, or none."""
    using: dict[tuple[str, str], list[Rank]] = {}
    without = [rank.rank for rank in job.ranks if not rank.gpus]
    for rank in job.ranks:
        if gpu := job.gpu(rank):
            using.setdefault((rank.host, gpu[0]), []).append(rank)
    for (host, uuid), ranks in using.items():
        if len(ranks) > 1:
            yield Finding(
                "slow",
                f"{_numbers([r.rank for r in ranks], 'Rank')} on {host} share one GPU, {uuid}.",
                "Start as many ranks on a host as it has GPUs, and let each see all of them or one of its own "
                "(CUDA_VISIBLE_DEVICES; srun --gpus-per-task=1).",
            )
    if using and without:
        yield Finding(
            "slow",
            f"No GPU is visible to {_numbers(without)}, and others have one.",
            "Ask for GPUs on every host (srun --gpus-per-node), and look at CUDA_VISIBLE_DEVICES there.",
        )


def own_cores(job: Job) -> Iterator[Finding]:
    """No more ranks than cores, and none that is bound to where others are."""
    for host, ranks in job.hosts().items():
        for group in _overlapping(ranks):
            cores = sorted({core for rank in group for core in rank.cores})
            names = f"{_numbers([r.rank for r in group], 'Rank')} on {host}"
            if len(cores) < len(group) and len(cores) < group[0].job_cores:
                yield Finding("slow", f"{names} are bound to {_cores(cores)}.", _unbind(group[0]))
            elif len(cores) < len(group):
                yield Finding(
                    "slow",
                    f"{names} share {_count(len(cores), 'core')}.",
                    "Start no more ranks on a host than it has cores.",
                )
            elif len(group) > 1 and any(rank.cores != group[0].cores for rank in group):
                shared = sorted(c for c in cores if 1 < sum(c in rank.cores for rank in group) < len(group))
                shared = shared or sorted(set(group[0].cores).intersection(*(rank.cores for rank in group)))
                yield Finding("slow", f"{names} overlap on {_cores(shared)}, and not on others.", _unbind(group[0]))


def idle_cores(job: Job) -> Iterator[Finding]:
    """Ranks are not bound to a few cores of many."""
    if job.ranks[0].launched > len(job.ranks):
        return  # others, of whom nothing is known, may run on the rest
    for host, ranks in job.hosts().items():
        used, there = len({core for rank in ranks for core in rank.cores}), max(rank.job_cores for rank in ranks)
        if used < there and used >= len(ranks):
            yield Finding(
                "slow",
                f"On {host} {_count(len(ranks), 'rank')} may run on {_count(used, 'core')} of {there}.",
                _unbind(ranks[0]),
            )


def thread_level(job: Job) -> Iterator[Finding]:
    """MPI may be called from several threads at once."""
    low = [rank.rank for rank in job.ranks if rank.mpi.get("threads", "multiple") != "multiple"]
    if low:
        yield Finding(
            "note",
            f"MPI allows one thread at a time on {_numbers(low)}: overlap= will be refused.",
            "Leave mpi4py.rc.thread_level and MPI4PY_RC_THREAD_LEVEL at 'multiple'.",
        )


def fault_tolerance(job: Job) -> Iterator[Finding]:
    """An MPI that survives the death of a rank was asked to."""
    mpi = job.ranks[0].mpi
    if mpi.get("ulfm") and not mpi["ulfm_is_on"] and mpi["library"].startswith("Open MPI"):
        yield Finding(
            "note",
            "This MPI can go on when a rank dies (ULFM), but was not asked to.",
            "If you want on_failure=: mpirun --with-ft ulfm",
        )


def shared_memory(job: Job) -> Iterator[Finding]:
    """Ranks of one host do not send to each other through the network's code."""
    for host, ranks in job.hosts().items():
        sent = sum(rank.sent[0] for rank in ranks)
        loopback = [n for n in ranks[0].networks if n.kind == "loopback" and n.moved > _MOST * sent]
        if sent and loopback:
            yield Finding(
                "slow",
                f"Ranks on {host} talk to each other by TCP over {loopback[0].name}, not through shared memory."
                + _because(ranks[0]),
                "Leave the choice to MPI (no OMPI_MCA_btl); in containers give ranks one /dev/shm and one IPC namespace.",
            )


def fastest_network(job: Job) -> Iterator[Finding]:
    """What goes between hosts goes over the fastest interface that is up."""
    for host, ranks in job.hosts().items():
        sent = sum(rank.sent[1] for rank in ranks)
        real = [n for n in ranks[0].networks if n.kind in ("ethernet", "ip over ib", "infiniband")]
        used = [network for network in real if sent and network.moved > _MOST * sent]
        if not used:
            continue
        best, taken = max(real, key=_speed), max(used, key=_speed)
        advice = "Name the fast one: mpirun --mca btl_tcp_if_include {0}; UCX_NET_DEVICES={0}; FI_TCP_IFACE={0}."
        if _speed(best) > _speed(taken):
            yield Finding(
                "slow",
                f"On {host} traffic is on {_named(taken)} though {_named(best)} is up.{_because(ranks[0])}",
                advice.format(best.name),
            )
        elif not any(n.kind == "infiniband" for n in used) and any(n.kind == "infiniband" for n in real):
            yield Finding(
                "slow",
                f"On {host} traffic is on {_named(taken)} by TCP/IP, though InfiniBand is there.{_because(ranks[0])}",
                "Use an MPI with UCX or libfabric for it: mpirun --mca pml ucx, or your cluster's MPI module.",
            )


def even_links(job: Job) -> Iterator[Finding]:
    """No two ranks, on one host or on two, are much worse connected than others."""
    hosts = {rank.rank: rank.host for rank in job.ranks}
    for inside in (True, False):
        links = job.links_where(inside)
        if len(links) < 3:
            continue
        middle = sorted(link.bandwidth for link in links)[len(links) // 2]
        slow = [link for link in links if link.bandwidth * _UNEVEN < middle]
        if slow:
            words = [
                f"rank {link.a} ({hosts[link.a]}) and rank {link.b} ({hosts[link.b]}): {link.bandwidth:.0f}"
                for link in slow
            ]
            yield Finding(
                "slow",
                f"Some links are much slower than the median of {middle:.0f} MB/s: {listed(words, '; ')} MB/s.",
                "Look at these hosts' cables, switches and interfaces, or leave them out.",
            )


CHECKS: Sequence[Callable[[Job], Iterator[Finding]]] = (
    ranks_meet, one_process, same_versions, needed_versions, framework_loads, tensorflow_sees_gpus, own_gpu, own_cores,
    idle_cores, thread_level, fault_tolerance, shared_memory, fastest_network, even_links,
)  # fmt: skip


def findings(job: Job) -> list[Finding]:
    """Of all checks, the worst first."""
    found = [finding for check in CHECKS for finding in check(job)]
    return sorted(found, key=lambda finding: ("wrong", "slow", "note").index(finding.level))


def _overlapping(ranks: list[Rank]) -> list[list[Rank]]:
    """Those that have cores in common, directly or through others."""
    groups: list[list[Rank]] = []
    for rank in ranks:
        met = [group for group in groups if any(set(rank.cores) & set(other.cores) for other in group)]
        groups = [group for group in groups if group not in met] + [[*(r for group in met for r in group), rank]]
    return groups


def _unbind(rank: Rank) -> str:
    if rank.launcher == "srun":
        return "srun --cpus-per-task=N, or --cpu-bind=none."
    return (
        "mpirun --bind-to none (MPICH and Intel MPI: -bind-to none)" if "mpirun" in rank.launcher else "Do not bind it."
    )


def _speed(network: Network) -> float:
    return network.mbits or (_IB_MBITS if network.kind != "ethernet" else 0.0)


def _named(network: Network) -> str:
    return f"{network.name} ({network.mbits:.0f} Mbit/s)" if network.mbits else network.name


def _because(rank: Rank) -> str:
    """What the environment says about ways, which may be the reason."""
    words = [f"{name}={value}" for name, value in rank.steering.items()]
    return f" The environment says {listed(words)}." if words else ""


def _numbers(ranks: list[int], word: str = "rank") -> str:
    return f"{word}{'s' * (len(ranks) > 1)} {listed([str(rank) for rank in ranks])}"


def _cores(cores: list[int]) -> str:
    return f"core{'s' * (len(cores) > 1)} {listed([str(core) for core in cores])}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
