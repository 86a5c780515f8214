"""``hvd-localsgd doctor``: each check is provoked for real where this machine can, and by facts that are given where it cannot."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import sys
import time

import pytest

from hvd_localsgd.tools.doctor import checks, facts, report

from . import launched

DOCTOR = ["-m", "hvd_localsgd.tools.cli", "doctor"]
ULFM = launched.ROOT / ".venv-ulfm" / "bin"


@pytest.fixture
def light(tmp_path):
    """The environment of a process that finds a TensorFlow which loads at once, and fails: most tests ask for other things."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise ImportError('libcudart.so.12: not there')")
    return {"PYTHONPATH": f"{tmp_path}:{launched.ROOT}"}


def parsed(result):
    """The one JSON that was printed, without the launcher's words around it."""
    assert result.output.count('"findings"') == 1, result.output
    text = result.output.replace("\r", "")
    return json.loads(text[text.index("{\n") : text.rindex("\n}") + 2])


def said(result, level):
    return [finding["what"] for finding in parsed(result)["findings"] if finding["level"] == level]


def mpirun(*words, environment, timeout=90):
    line, defaults = launched.launch.command(1, [])
    line = [line[0], "--oversubscribe", "--bind-to", "none", *words]
    return launched.start(line, timeout, {**defaults, **environment})


# --- for real


def test_alone_it_says_what_is_here_and_that_it_is_alone():
    result = launched.start([sys.executable, *DOCTOR, "--json"], 120)
    found = parsed(result)
    assert result.status == 0, result.output
    assert found["versions"]["keras"] == importlib.metadata.version("keras")
    loaded = found["ranks"][0]["framework"]
    assert (loaded["gpus"], loaded["backend"]) == (0, "tensorflow")
    if importlib.util.find_spec("horovod"):
        assert set(loaded["horovod"]) & {"MPI", "Gloo"}
    assert [finding["level"] for finding in found["findings"]] == ["note"]
    assert said(result, "note") == ["This is one process (no launcher), so nothing can be said of ranks."]


def test_another_backend_of_keras(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "class config:\n    list_physical_devices = staticmethod(lambda kind: [])\n"
    )
    environment = {"KERAS_BACKEND": "jax", "PYTHONPATH": f"{tmp_path}:{launched.ROOT}"}
    result = launched.start([sys.executable, *DOCTOR, "--json"], 60, environment)
    assert said(result, "wrong") == ["Keras' backend is jax."]
    assert result.status == 1


def test_ranks_on_one_core_that_talk_by_tcp(light):
    result = mpirun(
        "--mca",
        "btl",
        "tcp,self",
        "-np",
        "2",
        "taskset",
        "-c",
        "0",
        sys.executable,
        *DOCTOR,
        "--json",
        environment=light,
    )
    found = parsed(result)
    assert [rank["cores"] for rank in found["ranks"]] == [[0], [0]]
    (link,) = found["links"]
    assert (link["a"], link["b"]) == (0, 1)
    assert 0 < link["latency"] < 1e6
    assert link["bandwidth"] > 1
    host = found["ranks"][0]["host"]
    bound, tcp = said(result, "slow")
    assert bound == f"Ranks 0, 1 on {host} are bound to core 0."
    assert tcp.startswith(f"Ranks on {host} talk to each other by TCP over lo, not through shared memory.")
    assert "OMPI_MCA_btl=tcp,self" in tcp
    (wrong,) = said(result, "wrong")
    assert wrong.endswith("libcudart.so.12: not there")
    assert result.status == 1


def test_ranks_that_differ(light, tmp_path):
    other = tmp_path / "other" / "keras-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: keras\nVersion: 9.9\n")
    path = f"PYTHONPATH={tmp_path / 'other'}:{light['PYTHONPATH']}"
    program = [sys.executable, *DOCTOR, "--json"]
    first = ["-np", "1", "taskset", "-c", "0", *program]
    second = ["-np", "1", "env", path, "MPI4PY_RC_THREAD_LEVEL=serialized", *program]
    result = mpirun(*first, ":", *second, environment=light)
    (version,) = [words for words in said(result, "wrong") if words.startswith("keras")]
    assert version.endswith("on rank 0 and 9.9 on rank 1.")
    (overlap,) = said(result, "slow")
    assert overlap.startswith("Ranks 0, 1 on ")
    assert overlap.endswith("overlap on core 0, and not on others.")
    assert any("one thread at a time on rank 1" in words for words in said(result, "note"))


def test_more_ranks_than_cores_and_the_verdict_in_words(light):
    cores = len(launched.os.sched_getaffinity(0))
    ranks = cores + 1
    result = mpirun("-np", str(ranks), sys.executable, *DOCTOR, environment=light)
    assert result.output.count("Verdict") == 1, "rank 0 alone prints"
    assert f"share {cores} core" in result.output
    assert "what to do: Start no more ranks on a host than it has cores." in result.output
    assert max(len(line.rstrip()) for line in result.output.splitlines() if "──" in line) <= 80


@pytest.mark.skipif(len(launched.os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_one_rank_bound_to_one_of_several_cores(light):
    result = mpirun("-np", "1", "taskset", "-c", "0", sys.executable, *DOCTOR, "--json", environment=light)
    cores = len(launched.os.sched_getaffinity(0))
    (words,) = said(result, "slow")
    assert words.endswith(f"1 rank may run on 1 core of {cores}.")


def test_ranks_that_were_told_to_be_alone(light):
    alone = {"HVD_LOCALSGD_COMMUNICATOR": "serial", **light}
    result = mpirun("-np", "2", sys.executable, *DOCTOR, "--json", environment=alone)
    assert "mpirun of Open MPI started 2 processes, and each would train alone." in said(result, "wrong")
    assert said(result, "slow") == [], "nothing is known of the other's cores"


def test_the_launcher_of_another_mpi(light):
    """Without another MPI here: what MPICH's mpirun tells its processes, told to two that Open MPI leaves alone."""
    for rank in ("1", "0"):
        environment = {"PMI_SIZE": "2", "PMI_RANK": rank, **light}
        result = launched.start([sys.executable, *DOCTOR, "--json"], 60, environment)
        if rank == "1":
            assert "findings" not in result.output, "rank 0 alone prints"
    assert any("The launcher started 2 processes, but MPI" in words for words in said(result, "wrong"))
    assert result.status == 1


@pytest.mark.skipif(not ULFM.exists(), reason="there is no Open MPI 5: make .venv-ulfm/ready")
def test_an_mpi_with_ulfm_that_was_not_asked(light):
    for flags, noted in (([], True), (["--with-ft", "ulfm"], False)):
        line = [str(ULFM / "mpirun"), *flags, "--bind-to", "none", "--oversubscribe", "-np", "2"]
        environment = {**launched.launch.command(1, [])[1], **light}
        result = launched.start([*line, str(ULFM / "python"), *DOCTOR, "--json"], 90, environment)
        assert any("ULFM" in words for words in said(result, "note")) == noted, result.output


@pytest.mark.skipif(not ULFM.exists(), reason="there is no Open MPI 5: make .venv-ulfm/ready")
def test_an_mpirun_of_another_open_mpi_does_not_hang(light):
    line = [str(ULFM / "mpirun"), "--bind-to", "none", "--oversubscribe", "-np", "2"]
    environment = {**launched.launch.command(1, [])[1], **light}
    result = launched.start([*line, sys.executable, *DOCTOR, "--json", "--timeout", "20"], 90, environment)
    assert result.status != 0, result.output
    words = ("sees only this one", "MPI_Init has ended this process", "is not through after 20 s")
    assert any(text in result.output for text in words), result.output


# --- never hang


def test_a_rank_that_never_comes_to_mpi_is_missed_and_who_waits_says_so(light):
    began = time.monotonic()
    doctor = [sys.executable, *DOCTOR, "--timeout", "4"]
    result = mpirun("-np", "1", *doctor, ":", "-np", "1", "sleep", "300", environment=light)
    assert time.monotonic() - began < 60
    assert result.status != 0
    (line,) = [line for line in result.output.splitlines() if line.startswith("hvd-localsgd doctor")]
    assert "rank 0 of 2 on " in line
    assert "is not through after 4 s. It is joining the others (MPI_Init)" in line


STAYS_AWAY = "from hvd_localsgd.communicators import choose; import time; choose(); print('joined'); time.sleep(300)"


def test_a_rank_that_joins_and_does_not_answer_is_named(light):
    began = time.monotonic()
    doctor = [sys.executable, *DOCTOR, "--timeout", "10"]
    program = ["-np", "1", *doctor, ":", "-np", "1", sys.executable, "-c", STAYS_AWAY]
    result = mpirun(*program, environment=light)
    assert time.monotonic() - began < 60
    assert result.status != 0
    (line,) = [line for line in result.output.splitlines() if line.startswith("hvd-localsgd doctor")]
    assert re.search(r"rank 0 on .* has waited for \d s .* for rank 1 on ", line), line


HANGS_AT_THE_END = """
import ctypes
from hvd_localsgd.tools.doctor.watch import Watch
watch = Watch(2, "rank 7")
watch.stage("ending")
ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).pause)  # as mpi4py has MPI_Finalize called, when Python is no more
"""


def test_the_watch_lasts_until_the_process_is_gone():
    result = launched.start([sys.executable, "-c", HANGS_AT_THE_END], 30)
    assert result.status == -9
    assert result.output == "hvd-localsgd doctor: rank 7 is not through after 2 s. It is ending.\n"


def test_a_process_that_is_gone_has_what_it_was_at_explained():
    program = "import os; from hvd_localsgd.tools.doctor.watch import Watch; w = Watch(20, 'rank 7')\n"
    for explanation, said in (("It is gone.", "hvd-localsgd doctor: rank 7: It is gone.\n"), ("", "")):
        result = launched.start([sys.executable, "-c", f"{program}w.stage('x', {explanation!r}); os._exit(3)"], 30)
        assert (result.status, result.output) == (3, said)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(seconds):
    result = launched.start([sys.executable, *DOCTOR, "--timeout", seconds], 60)
    assert result.status == 2
    assert "--timeout must be seconds > 0. Received: " in result.output


# --- from given facts: what this machine does not have

H100 = "NVIDIA H100 80GB HBM3"


def rank(number, host="a", **changes):
    given = facts.Rank(
        number, host, "mpirun of Open MPI", 2, None, "", {"keras": "3.15.1"}, [number], 8, [], [], {}, {}, {}, "mpi"
    )
    return dataclasses.replace(given, **changes)


def judged(check, *ranks, **changes):
    job = facts.Job(list(ranks), {"keras": ">=3.9"}, **changes)
    report.show(job, checks.findings(job))  # whatever there is, it can be printed
    json.loads(report.as_json(job, checks.findings(job)))
    return [finding.what for finding in check(job)]


def test_two_ranks_on_one_gpu_are_named():
    both = [("GPU-1", H100), ("GPU-2", H100)]
    assert judged(checks.own_gpu, rank(0, gpus=both), rank(1, gpus=both)) == []
    assert judged(checks.own_gpu, rank(0, gpus=both[:1]), rank(1, gpus=both[:1])) == [
        "Ranks 0, 1 on a share one GPU, GPU-1."
    ]
    assert judged(checks.own_gpu, *(rank(n, gpus=both) for n in range(3))) == ["Ranks 0, 2 on a share one GPU, GPU-1."]
    assert judged(checks.own_gpu, rank(0, gpus=both), rank(1, "b")) == [
        "No GPU is visible to rank 1, and others have one."
    ]
    # MIG: parts of one GPU are not one GPU
    parts = [[(f"MIG-{n}", "a part of a GPU")] for n in (1, 2)]
    assert judged(checks.own_gpu, rank(0, gpus=parts[0]), rank(1, gpus=parts[1])) == []


def test_gpus_that_tensorflow_does_not_see():
    gpus = [("GPU-1", H100)]
    (words,) = judged(checks.tensorflow_sees_gpus, rank(0, gpus=gpus, framework={"gpus": 0, "backend": "tensorflow"}))
    assert words == "a has 1 GPU, and TensorFlow sees 0."
    assert judged(checks.tensorflow_sees_gpus, rank(0, gpus=gpus, framework={"gpus": 1, "backend": "tensorflow"})) == []


TABLE = f"GPU-aa1, {H100}\nGPU-ab2, {H100}\nGPU-ac3, {H100}\n"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["GPU-aa1", "GPU-ab2", "GPU-ac3"]),
        ("", []),
        ("2,0", ["GPU-ac3", "GPU-aa1"]),
        ("1, 7, 0", ["GPU-ab2"]),
        ("-1", []),
        ("GPU-ac", ["GPU-ac3"]),
        ("MIG-9", ["MIG-9"]),
    ],
)
def test_which_gpus_cuda_shows(visible, expected):
    assert [uuid for uuid, _ in facts.visible_gpus(TABLE, visible)] == expected
    assert facts.visible_gpus("NVIDIA-SMI has failed\n", visible if visible != "MIG-9" else None) == []


def network(name, kind, gbits, moved=0.0):
    return facts.Network(name, kind, gbits and gbits * 1000.0, moved)


def test_traffic_on_the_slow_network():
    def on(*networks, **changes):
        return judged(
            checks.fastest_network,
            rank(0, networks=list(networks), sent=(0.0, 1e7), **changes),
            rank(1, "b", networks=[], sent=(0.0, 1e7)),
        )

    ethernet, ib = network("eth0", "ethernet", 1, 1.1e7), network("ib0", "ip over ib", 100)
    assert on(ethernet, ib) == ["On a traffic is on eth0 (1000 Mbit/s) though ib0 (100000 Mbit/s) is up."]
    assert on(ethernet, network("ib0", "ip over ib", None)) == [
        "On a traffic is on eth0 (1000 Mbit/s) though ib0 is up."
    ]
    (words,) = on(ethernet, ib, steering={"OMPI_MCA_btl_tcp_if_include": "eth0"})
    assert words.endswith("The environment says OMPI_MCA_btl_tcp_if_include=eth0.")
    adapter = network("mlx5_0:1", "infiniband", 100)
    (words,) = on(network("ib0", "ip over ib", 100, 1.1e7), adapter)
    assert words.startswith("On a traffic is on ib0 (100000 Mbit/s) by TCP/IP, though InfiniBand is there.")
    assert on(network("eth0", "ethernet", 1), network("mlx5_0:1", "infiniband", 100, 1.1e7)) == []
    assert on(ethernet) == []
    assert judged(checks.fastest_network, rank(0, networks=[ethernet, ib])) == [], "nothing was sent"


def test_interfaces_are_read_from_the_kernels_files(tmp_path):
    def put(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    for name, kind, state, speed in (
        ("eth0", "1", "up", "25000"),
        ("eth1", "1", "down", "100000"),
        ("ib0", "32", "up", "-1"),
    ):
        put(f"net/{name}/type", kind)
        put(f"net/{name}/operstate", state)
        put(f"net/{name}/speed", speed)
        put(f"net/{name}/statistics/tx_bytes", "1000")
        (tmp_path / "net" / name / "device").mkdir()
    put("infiniband/mlx5_0/ports/1/state", "4: ACTIVE")
    put("infiniband/mlx5_0/ports/1/rate", "100 Gb/sec (4X EDR)")
    put("infiniband/mlx5_0/ports/1/counters/port_xmit_data", "250")
    put("infiniband/mlx5_0/ports/2/state", "1: DOWN")
    found = facts.networks(tmp_path)
    assert [(n.name, n.kind, n.mbits) for n in found] == [
        ("eth0", "ethernet", 25000.0),
        ("ib0", "ip over ib", None),
        ("mlx5_0:1", "infiniband", 100000.0),
    ]
    assert [facts.sent_bytes(tmp_path, n) for n in found] == [1000.0, 1000.0, 1000.0]


def test_a_slow_link_is_named():
    links = [facts.Link(a, b, 5.0, 1000.0) for a in range(3) for b in range(a + 1, 3)]
    ranks = [rank(number, host) for number, host in enumerate("abc")]
    assert judged(checks.even_links, *ranks, links=links) == []
    links[2].bandwidth = 100.0
    (words,) = judged(checks.even_links, *ranks, links=links)
    assert words == "Some links are much slower than the median of 1000 MB/s: rank 1 (b) and rank 2 (c): 100 MB/s."


def test_ranks_bound_to_few_of_many_cores():
    assert judged(checks.idle_cores, rank(0), rank(1)) == ["On a 2 ranks may run on 2 cores of 8."]
    assert judged(checks.idle_cores, rank(0, cores=list(range(8)))) == []
    four = [rank(number, cores=[2]) for number in range(4)]
    assert judged(checks.own_cores, *four) == ["Ranks 0, 1, 2, 3 on a are bound to core 2."]
    assert judged(checks.own_cores, *(rank(n, cores=[0, 1], job_cores=2) for n in range(4))) == [
        "Ranks 0, 1, 2, 3 on a share 2 cores."
    ]
    assert judged(checks.own_cores, rank(0), rank(1), rank(2, "b", cores=[0])) == []


def test_versions_that_are_too_old_and_a_horovod_that_does_not_load():
    assert judged(checks.needed_versions, rank(0, versions={"keras": "2.15.0"})) == [
        "keras 2.15.0 is installed, and >=3.9 is needed."
    ]
    assert judged(checks.needed_versions, rank(0)) == []
    broken = {"gpus": 0, "backend": "tensorflow", "horovod_error": "undefined symbol"}
    (words,) = judged(checks.framework_loads, rank(0, framework=broken))
    assert words == "Horovod is installed, but cannot be loaded: undefined symbol"


def test_what_travels_comes_back():
    given = rank(0, gpus=[("GPU-1", H100)], networks=[network("eth0", "ethernet", 1)])
    assert facts.Rank.from_json(given.to_json()) == dataclasses.replace(given, sent=[0.0, 0.0])
