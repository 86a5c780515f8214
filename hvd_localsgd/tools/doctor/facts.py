"""What is true here: of one rank, of all of them. Nothing is judged."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from hvd_localsgd.communicators.launchers.base import Launch
from hvd_localsgd.version import __version__

_PACKAGES = ("numpy", "mpi4py", "tensorflow", "tensorflow-cpu", "keras", "horovod")
# What says which way messages go, whoever set it.
_STEERING = r"OMPI_MCA_(pml|btl|mtl)|UCX_(NET_DEVICES|TLS)|FI_(PROVIDER|.*IFACE)|MPIR_CVAR_.*|I_MPI_(FABRICS|OFI_PROVIDER)|NCCL_.*IFNAME"
# Loads what takes seconds, and may crash: in a process of its own.
_PROBE = """
import json, os
from importlib.util import find_spec
import tensorflow as tf
found = {"gpus": len(tf.config.list_physical_devices("GPU")), "backend": os.environ.get("KERAS_BACKEND", "tensorflow")}
if found["backend"] == "tensorflow":  # the libraries of others may not be here, and Horovod loads Keras too
    import keras
    found["backend"] = keras.config.backend()
    if find_spec("horovod"):
        try:
            from hvd_localsgd.communicators.horovod import built_with
            found["horovod"] = built_with()
        except Exception as error:
            found["horovod_error"] = str(error)
print(json.dumps(found))
"""


@dataclass
class Network:
    """An interface that is up.

    Attributes:
        kind: ``"loopback"``, ``"ethernet"``, ``"virtual"``, ``"ip over ib"`` or ``"infiniband"`` (verbs, a port of an adapter).
        mbits: its speed, Mbit/s; None: it does not say.
        moved: bytes that it sent while ranks measured their links.
    """

    name: str
    kind: str
    mbits: float | None = None
    moved: float = 0.0


@dataclass
class Rank:
    """What one rank knows.

    Attributes:
        cores: that it may run on.
        job_cores: how many the launcher has for its job on this host, as far as can be known.
        gpus: UUID and name of each that is visible to it, in order.
        mpi: ``about`` of its communicator; empty: there is none.
        framework: what loading TensorFlow, Keras and Horovod showed; on rank 0 only.
        steering: variables of the environment that say which way messages go.
        sent: bytes that it sent while links were measured: inside its host, and to others.
    """

    rank: int
    host: str
    launcher: str
    launched: int
    slots: int | None
    hint: str
    versions: dict[str, str]
    cores: list[int]
    job_cores: int
    gpus: list[tuple[str, str]]
    networks: list[Network]
    steering: dict[str, str]
    framework: dict[str, Any] = field(default_factory=dict)
    mpi: dict[str, Any] = field(default_factory=dict)
    communicator: str = "none"
    sent: tuple[float, float] = (0.0, 0.0)

    def to_json(self) -> bytes:
        """As it travels to rank 0."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Rank:
        """What ``to_json`` wrote."""
        values = json.loads(text)
        values["networks"] = [Network(**network) for network in values["networks"]]
        values["gpus"] = [(uuid, name) for uuid, name in values["gpus"]]
        return cls(**values)


@dataclass
class Link:
    """Between two ranks, each sending to the other: microseconds of a small message, MB/s of a large one in one direction."""

    a: int
    b: int
    latency: float
    bandwidth: float


@dataclass
class Job:
    """Everything, as rank 0 has it.

    Attributes:
        ranks: by rank; this process alone where they could not meet.
        needs: what of other packages this one needs, as in pyproject.toml.
        links: that were measured.
        allreduce: microseconds of a small one, and MB/s of a large one; None: not measured.
        trouble: why ranks could not meet.
    """

    ranks: list[Rank]
    needs: dict[str, str]
    links: list[Link] = field(default_factory=list)
    allreduce: tuple[float, float] | None = None
    trouble: str = ""

    def hosts(self) -> dict[str, list[Rank]]:
        """The ranks of each host."""
        hosts: dict[str, list[Rank]] = {}
        for rank in self.ranks:
            hosts.setdefault(rank.host, []).append(rank)
        return hosts

    def links_where(self, inside: bool) -> list[Link]:
        """Those between ranks of one host; or those between hosts."""
        hosts = {rank.rank: rank.host for rank in self.ranks}
        return [link for link in self.links if (hosts[link.a] == hosts[link.b]) == inside]

    def gpu(self, rank: Rank) -> tuple[str, str] | None:
        """UUID and name of the one that ``lsgd.init`` gives to a rank: of those it sees, that of its local rank."""
        if not rank.gpus:
            return None
        return rank.gpus[self.hosts()[rank.host].index(rank) % len(rank.gpus)]


def of_this_process(launch: Launch) -> Rank:
    """What one process can see without asking others."""
    return Rank(
        launch.rank,
        socket.gethostname(),
        launch.launcher,
        launch.size,
        launch.slots,
        launch.hint,
        versions(),
        sorted(os.sched_getaffinity(0)),
        _job_cores(os.environ),
        visible_gpus(_nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        networks(Path("/sys/class")),
        {name: value for name, value in sorted(os.environ.items()) if re.match(_STEERING, name)},
    )


def versions() -> dict[str, str]:
    """Of this package, Python and what is installed of those that matter."""
    found = {"hvd_localsgd": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def needs() -> dict[str, str]:
    """What this package asks of those, for example ``{"keras": ">=3.9"}``; empty where it is not installed."""
    try:
        required = [Requirement(text) for text in metadata.requires("hvd-localsgd") or []]
    except metadata.PackageNotFoundError:
        return {}
    extras = ("", "tensorflow", "tensorflow-cpu")
    met = [r for r in required if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
    return {r.name: str(r.specifier) for r in met if r.name in _PACKAGES}


def _job_cores(environment: Mapping[str, str]) -> int:
    """A launcher's daemon is bound to all that the job has; SLURM's is not, and says how many there are."""
    if environment.get("SLURM_CPUS_ON_NODE", "").isdigit() and "SLURM_STEP_NUM_TASKS" in environment:
        return int(environment["SLURM_CPUS_ON_NODE"])
    try:
        return len(os.sched_getaffinity(os.getppid()))
    except OSError:
        return len(os.sched_getaffinity(0))


def _nvidia_smi() -> str:
    line = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def visible_gpus(table: str, visible: str | None) -> list[tuple[str, str]]:
    """UUID and name of each GPU that CUDA shows to this process, in order.

    Args:
        table: what ``nvidia-smi --query-gpu=uuid,name --format=csv,noheader`` printed.
        visible: CUDA_VISIBLE_DEVICES, which names them by number, UUID or the beginning of it; None: not set.
    """
    rows = [line.split(", ", 1) for line in table.splitlines() if line.startswith("GPU-")]
    everything = [(uuid, name) for uuid, name in rows]
    if visible is None:
        return everything
    chosen: list[tuple[str, str]] = []
    for word in filter(None, visible.replace(" ", "").split(",")):
        if word.startswith("MIG-"):
            chosen.append((word, "a part of a GPU"))
        elif word.isdigit() and int(word) < len(everything):
            chosen.append(everything[int(word)])
        elif found := [gpu for gpu in everything if word.startswith("GPU-") and gpu[0].startswith(word)]:
            chosen.append(found[0])
        else:
            break  # CUDA ignores whatever follows a name that it does not know
    return chosen


def networks(sys_class: Path) -> list[Network]:
    """What is up, by name; from the kernel's ``/sys/class``."""
    found = []
    for folder in sorted((sys_class / "net").glob("*")):
        kind = _text(folder / "type")
        is_loopback = kind == "772"
        if _text(folder / "operstate") != "up" and not is_loopback:
            continue
        words = "loopback" if is_loopback else "ip over ib" if kind == "32" else "ethernet"
        if words == "ethernet" and not (folder / "device").exists():
            words = "virtual"
        found.append(Network(folder.name, words, _positive(_text(folder / "speed"))))
    for port in sorted((sys_class / "infiniband").glob("*/ports/*")):
        if "ACTIVE" in _text(port / "state"):
            rate = _positive(_text(port / "rate").split(" ")[0])
            found.append(Network(f"{port.parts[-3]}:{port.name}", "infiniband", rate and rate * 1000))
    return found


def sent_bytes(sys_class: Path, network: Network) -> float:
    """How many an interface has sent since it is there."""
    if network.kind == "infiniband":
        adapter, port = network.name.split(":")
        words = _text(sys_class / "infiniband" / adapter / "ports" / port / "counters" / "port_xmit_data")
        return 4 * (_positive(words) or 0.0)  # the counter counts words of four bytes
    return _positive(_text(sys_class / "net" / network.name / "statistics" / "tx_bytes")) or 0.0


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # an interface without a speed answers with an error
        return ""


def _positive(text: str) -> float | None:
    try:
        return float(text) if float(text) > 0 else None
    except ValueError:
        return None


class Probe:
    """TensorFlow, Keras and Horovod are loaded in another process, while this one goes on."""

    def __init__(self) -> None:
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROBE],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self, seconds: float) -> dict[str, Any]:
        """``gpus`` (how many TensorFlow sees), ``backend`` (of Keras), ``horovod`` (what it was built with); or ``error``."""
        try:
            output, errors = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"error": f"it takes longer than {seconds:.0f} s"}
        if self._process.returncode == 0:
            return json.loads(output.splitlines()[-1])
        last = errors.strip().splitlines()[-1:] or [f"it ended with status {self._process.returncode}"]
        return {"error": last[0]}
