"""A folder of checkpoints: what is damaged, foreign, old or hostile is refused in words, and nothing changes."""

import io
import json
import os
import pickle
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest

import hvd_localsgd as lsgd
from hvd_localsgd.core import state
from hvd_localsgd.core.checkpoints import Folder
from hvd_localsgd.core.keeper import Checkpoints
from hvd_localsgd.core.preemption import Requests
from hvd_localsgd.core.progress import Progress
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.errors import CheckpointError

KEPT = {"engine/a": np.arange(5.0), "source/b": np.array(3), "source/empty": np.zeros((0, 2), np.float32)}


def write(path, number, training="t", keep=3, rank=0):
    folder = Folder(path, rank)
    seal = folder.write(number, 0, KEPT)
    manifest = {"training": training, "round": number, "ranks": 1, "reducer": None, "facts": {}, "files": [seal]}
    folder.commit(manifest, keep)
    return folder


def read(folder):
    found = folder.found()
    return folder.read(folder.manifest(found["rounds"][-1][0]), 0)


def rounds(folder):
    return [number for number, _ in folder.found()["rounds"]]


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_what_is_written_is_read_and_older_ones_go(tmp_path):
    for number in (4, 8, 12, 16):
        folder = write(tmp_path / "new" / "folder", number, keep=2)
    assert rounds(folder) == [12, 16]
    assert (folder.found()["training"], folder.found()["highest"]) == ("t", 16)
    kept = read(folder)
    assert kept.keys() == KEPT.keys()
    assert all(kept[name].dtype == KEPT[name].dtype and (kept[name] == KEPT[name]).all() for name in KEPT)
    assert not [name for name in os.listdir(folder.path / "round-00000016") if name.startswith(".")]


def test_what_has_no_name_yet_does_not_count(tmp_path):
    folder = write(tmp_path, 4)
    folder.write(8, 0, KEPT)  # no manifest: the job was killed before all had written
    (tmp_path / "round-00000008" / ".rank-1.npz.1").write_bytes(b"half")
    assert rounds(folder) == [4]
    write(tmp_path, 12, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "round-00000012"]


def test_an_empty_folder_has_nothing(tmp_path):
    for path in (tmp_path, tmp_path / "not there"):
        assert Folder(path, 0).found() == {"training": "", "rounds": [], "highest": 0}


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hostile(path):
    """A file of pickles in a place of its own, and a manifest that fits it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        body = io.BytesIO()
        np.lib.format.write_array(body, np.array([{"a": 1}], object), allow_pickle=True)
        archive.writestr("engine/a.npy", body.getvalue())
    assert pickle.dumps({}) is not None
    (path / "round-00000004" / "rank-0.npz").write_bytes(stream.getvalue())
    reseal(path, stream.getvalue())


def reseal(path, data):
    import hashlib

    manifest = path / "round-00000004" / "manifest.json"
    edited(manifest, files=[{"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}])
    edited(path / "latest", manifest=hashlib.sha256(manifest.read_bytes()).hexdigest())


def array_file(path):
    """In place of an archive."""
    file = path / "round-00000004" / "rank-0.npz"
    with file.open("wb") as stream:
        np.save(stream, np.arange(3))
    return file.read_bytes()


def replaced_by_a_link(path):
    outside = path.parent / "outside.npz"
    file = path / "round-00000004" / "rank-0.npz"
    os.replace(file, outside)
    file.symlink_to(outside)


def folder_replaced_by_a_link(path):
    os.replace(path / "round-00000004", path.parent / "outside")
    (path / "round-00000004").symlink_to(path.parent / "outside")


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda p: os.truncate(p / "round-00000004/rank-0.npz", 100), "has 100 bytes, and had"),
    "one bit": (lambda p: flipped(p / "round-00000004/rank-0.npz"), "is not what was written .sha256"),
    "missing": (lambda p: os.remove(p / "round-00000004/rank-0.npz"), "is not there. Where hosts share no"),
    "manifest": (lambda p: flipped(p / "round-00000004/manifest.json"), "is not the one that was written"),
    "no manifest": (lambda p: os.remove(p / "round-00000004/manifest.json"), "cannot be read .No such file"),
    "pointer": (lambda p: os.truncate(p / "latest", 10), "latest is damaged"),
    "foreign": (lambda p: (p / "latest").write_text('{"model": 1}'), "is not of a checkpoint of hvd_localsgd"),
    "foreign file": (lambda p: (p / "latest").write_text("model_checkpoint_path: 'ckpt-3'"), "latest is damaged"),
    "older": (lambda p: edited(p / "latest", format=0), "is of format 0, and this version reads 1"),
    "pointer leads out": (lambda p: edited(p / "latest", round="../../x"), "has no proper round"),
    "negative": (lambda p: edited(p / "latest", round=-1), "has no proper round"),
    "pickles": (hostile, "cannot be read .ValueError: Object arrays cannot be loaded"),
    "no npz": (lambda p: (p / "round-00000004/rank-0.npz").write_bytes(b"x") and reseal(p, b"x"), "cannot be read"),
    "a pipe": (lambda p: (os.remove(p / "latest"), os.mkfifo(p / "latest")), "latest is no file"),
    "a link that leads nowhere": (
        lambda p: (os.remove(p / "latest"), (p / "latest").symlink_to("x")),
        "cannot be read",
    ),
    "an array": (lambda p: reseal(p, array_file(p)), "cannot be read"),
    "nested": (lambda p: (p / "latest").write_text("[" * 10**5), "latest is damaged"),
    "a link": (replaced_by_a_link, "cannot be read .*symbolic"),
    "a linked folder": (folder_replaced_by_a_link, "is a link, and leads elsewhere"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_wrong_is_said_and_nothing_changes(what, tmp_path):
    path = tmp_path / "folder"
    folder = write(path, 4)
    damage, words = DAMAGE[what]
    damage(path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        read(folder)
    assert contents(tmp_path) == before


def test_names_in_a_manifest_are_not_used(tmp_path):
    path, outside = tmp_path / "folder", tmp_path / "outside"
    outside.mkdir()
    (outside / "rank-0.npz").write_bytes(b"not ours")
    folder = write(path, 4)
    manifest = folder.manifest(4)
    manifest["files"][0] |= {"name": "../outside/rank-0.npz", "path": str(outside / "rank-0.npz")}
    assert folder.read(manifest, 0).keys() == KEPT.keys()
    folder.commit({**manifest, "folder": str(outside)}, keep=1)
    assert contents(outside) == {(outside / "rank-0.npz").relative_to(outside): b"not ours"}


def test_temporary_files_do_not_follow_links(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    (tmp_path / "round-00000004").mkdir()
    (tmp_path / "round-00000004" / ".rank-0.npz.0").symlink_to(target)
    write(tmp_path, 4)
    assert target.read_bytes() == b"mine"


def test_a_linked_round_is_not_written_to(tmp_path):
    outside, path = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    path.mkdir()
    (path / "round-00000004").symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link, and leads elsewhere"):
        write(path, 4)
    assert not list(outside.iterdir())


def test_who_removes_a_damaged_one_goes_on_from_the_one_before(tmp_path):
    for number in (4, 8):
        folder = write(tmp_path, number)
    flipped(tmp_path / "round-00000008/manifest.json")
    with pytest.raises(CheckpointError, match=r"Remove \S+round-00000008, on all hosts, to go on from round 4\."):
        read(folder)
    shutil.rmtree(tmp_path / "round-00000008")
    assert rounds(folder) == [4]
    assert read(folder).keys() == KEPT.keys()
    shutil.rmtree(tmp_path / "round-00000004")
    with pytest.raises(CheckpointError, match="which is not there, and there is none before it"):
        read(folder)


def test_an_older_one_that_is_damaged_is_passed_over(tmp_path):
    for number in (4, 8):
        folder = write(tmp_path, number)
    (tmp_path / "round-00000004/manifest.json").write_text("[" * 10**5)
    assert rounds(folder) == [8]


def test_nothing_that_counts_is_written_over(tmp_path):
    """Lives that average nothing more, and so are at the same round, have checkpoints of their own."""

    def live(steps):
        array = np.zeros(3, np.float32)
        with lsgd.ModelAverager([array], 2, checkpoint=Checkpoints(tmp_path, 1)) as training:
            for _ in range(training.steps, steps):
                array += 1
                training.step()
        return array, contents(tmp_path)

    _, before = live(6)
    array, after = live(6)
    assert array.tolist() == [6.0] * 3
    assert max(rounds(Folder(tmp_path, 0))) > max(int(str(name)[6:14]) for name in before if "round" in str(name))
    kept = [name for name in before if name in after and name.name != "latest"]
    assert kept
    assert all(after[name] == before[name] for name in kept)


def test_progress_comes_back_from_json():
    first = Now(3, loss=0.1, parts=frozenset({0}))
    now = Now(9, round=2, rate=1 / 3, first=first, last=Now(6), tracks=((0.1, 0.2, 3),), parts=frozenset({0, 2}))
    progress, again = Progress(), Progress()
    progress.begin(now, 5, 3)
    progress.steps, progress.samples, progress.landing = 2, 7.5, 1
    progress.earlier.append((4, 1.0))
    progress.seen = {"rate": 0.1, "loss": 1 / 7}
    again.begin(Now(0), 1, 3)
    again.load(state.value(state.words(progress.state())), alike=True)
    again.began = progress.began
    assert again == progress


def test_random_numbers_go_on():
    kept = state.drawn()
    drawn = [np.random.normal(), np.random.randint(9)]
    state.draw_as(kept)
    assert [np.random.normal(), np.random.randint(9)] == drawn


def test_bfloat16_comes_back(tmp_path):
    folder = Folder(tmp_path, 0)
    from ml_dtypes import bfloat16

    values = np.arange(4).astype(bfloat16)
    seal = folder.write(1, 0, {"a": values})
    found = folder.read({"round": 1, "files": [seal]}, 0)["a"]
    assert found.tobytes() == values.tobytes()


@pytest.fixture
def requests():
    made = Requests(None)
    yield made
    made.ignore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_noted_and_handed_on(number, requests):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(1))
    try:
        requests.listen()
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert requests.reason == signal.Signals(number).name
        assert heard == [1, 1]
        requests.ignore()
        os.kill(os.getpid(), number)
        assert heard == [1, 1, 1]
    finally:
        signal.signal(number, before)


def test_a_forked_child_ends_as_before(requests):
    requests.listen()
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert requests.reason == ""


def test_time_is_up_when_what_comes_would_not_end_in_time(monkeypatch):
    requests = Requests(1)
    requests.see_time(50)
    assert not requests.reason
    requests.see_time(61)
    assert requests.reason == "the time limit"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 30))
    requests = Requests(None)
    requests.see_time(20)
    assert not requests.reason
    requests.see_time(31)
    assert requests.reason == "the time limit"
