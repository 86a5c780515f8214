"""A folder of checkpoints: one folder for each, in it a file for each rank and a manifest; beside them a pointer to the latest.

    latest                       the last thing that is written: which one to resume
    round-00000120/
        manifest.json            what belongs to it, written when all files are there
        rank-0.npz, ...          what each rank keeps

Nothing is ever half there: every file gets its name when all of it is on the disk. Nothing is ever a pickle. Names are made here and never
read from a file, and a link is not followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hvd_localsgd.core.state import State
from hvd_localsgd.errors import CheckpointError

FORMAT = 1
_LARGEST = 1 << 28  # bytes, of a pointer or a manifest


class Folder:
    """The checkpoints of one training.

    Args:
        path: where; on a filesystem that all hosts share, or on each host's own.
        writer: tells this process' temporary files from those of others.
    """

    def __init__(self, path: str | os.PathLike[str], writer: int) -> None:
        self.path, self._writer = Path(path), writer

    # Writing.

    def write(self, number: int, rank: int, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """A rank's file; what the manifest says of it."""
        made = self._round(number)
        made.mkdir(parents=True, exist_ok=True)
        self._refuse_links(made)
        seal = _Seal()

        def save(file: BinaryIO) -> None:
            seal.file = file
            np.savez(seal, **state)  # type: ignore[arg-type]

        self._put(made / f"rank-{rank}.npz", save)
        return {"bytes": seal.bytes, "sha256": seal.hash.hexdigest()}

    def commit(self, manifest: Mapping[str, Any], keep: int) -> None:
        """All files of a checkpoint are there: it counts from now on, and older ones go, but for ``keep``.

        May be called by one process of each host, with the same manifest.
        """
        text = json.dumps({"format": FORMAT, **manifest}, indent=1).encode()
        number = manifest["round"]
        pointer = {"format": FORMAT, "round": number, "training": manifest["training"], "manifest": _sha256(text)}
        self._put(self._round(number) / "manifest.json", lambda file: file.write(text))
        self._put(self.path / "latest", lambda file: file.write(json.dumps(pointer).encode()))
        complete = [each for each in self._numbers() if each <= number and self._manifest_path(each).exists()]
        for each in self._numbers():
            if each < number and each not in complete[-keep:]:
                shutil.rmtree(self._round(each), ignore_errors=True)  # perhaps another host's process was here

    def _put(self, path: Path, write: Callable[[BinaryIO], Any]) -> None:
        self._refuse_links(path.parent)
        temporary = path.with_name(f".{path.name}.{self._writer}")
        temporary.unlink(missing_ok=True)  # of a job that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        for folder in (path.parent, path.parent.parent):
            _sync(folder)

    # Reading. Whatever is wrong is a CheckpointError, and nothing has changed.

    def found(self) -> dict[str, Any]:
        """``{"training": ..., "rounds": [[number, sha256 of the manifest], ...], "highest": ...}``.

        Of the training that the pointer names, what is complete, oldest first; and the highest number that is taken. Who removes the folder of
        a damaged checkpoint goes on from the one before.

        Raises:
            CheckpointError: the pointer, or the manifest that it names, is not one.
        """
        highest = max(self._numbers(), default=0) if self.path.exists() else 0
        if not os.path.lexists(self.path / "latest"):
            return {"training": "", "rounds": [], "highest": highest}
        latest = self._json(self.path / "latest", {"round": int, "training": str, "manifest": str})
        newest = latest["round"]
        if os.path.lexists(self._round(newest)):
            if _sha256(self._bytes(self._manifest_path(newest))) != latest["manifest"]:
                raise CheckpointError(
                    f"{self._manifest_path(newest)} is not the one that was written. {self._way_out(newest)}"
                )
            self.manifest(newest)
        rounds = [(n, self._seal_of(n, latest["training"])) for n in self._numbers() if n <= newest]
        if not any(seal for _, seal in rounds):
            raise CheckpointError(
                f"{self.path / 'latest'} names {self._round(newest)}, which is not there, and there is none before it. Remove {self.path} to "
                "begin anew."
            )
        return {"training": latest["training"], "rounds": [pair for pair in rounds if pair[1]], "highest": highest}

    def _seal_of(self, number: int, training: str) -> str:
        """The manifest's SHA-256, if it is there and of that training."""
        try:
            manifest = self.manifest(number)
        except CheckpointError:
            return ""
        return _sha256(self._bytes(self._manifest_path(number))) if manifest["training"] == training else ""

    def manifest(self, number: int) -> dict[str, Any]:
        """What was committed.

        Raises:
            CheckpointError: it cannot be read, or is another version's.
        """
        kinds = {"round": int, "training": str, "ranks": int, "files": list, "facts": dict}  # and a reducer, or None
        path = self._manifest_path(number)
        manifest = self._json(path, kinds)
        seals = [each for each in manifest["files"] if isinstance(each, dict) and {"bytes", "sha256"} <= set(each)]
        if manifest["round"] != number or len(seals) != manifest["ranks"] or not seals or "reducer" not in manifest:
            raise CheckpointError(f"{path} contradicts itself. {self._way_out(number)}")
        return manifest

    def read(self, manifest: Mapping[str, Any], rank: int) -> State:
        """What a rank has kept.

        Raises:
            CheckpointError: it is missing, truncated or changed.
        """
        number, seal = manifest["round"], manifest["files"][rank]
        path = self._round(number) / f"rank-{rank}.npz"
        try:
            with self._open(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != seal["bytes"]:
                    raise CheckpointError(f"{path} has {size} bytes, and had {seal['bytes']}. {self._way_out(number)}")
                if _sha256_of(file) != seal["sha256"]:
                    raise CheckpointError(f"{path} is not what was written (sha256). {self._way_out(number)}")
                file.seek(0)
                with np.load(file, allow_pickle=False) as arrays:
                    return {name: arrays[name] for name in arrays.files}
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is not there. Where hosts share no filesystem, each has the files of its own ranks only: start the job on the "
                "same hosts with the same ranks on each, or copy the files."
            ) from None
        except CheckpointError:
            raise
        except Exception as error:  # whatever a file that is none makes numpy and zipfile raise
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}: {error}). {self._way_out(number)}"
            ) from None

    def _json(self, path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
        try:
            value = json.loads(self._bytes(path))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error}). Remove {self.path} to begin anew.") from None
        if not isinstance(value, dict) or "format" not in value:
            raise CheckpointError(f"{path} is not of a checkpoint of hvd_localsgd. Choose another folder.")
        if value["format"] != FORMAT:
            raise CheckpointError(
                f"{path} is of format {value['format']!r}, and this version reads {FORMAT}. Resume it with the version that has written "
                "it, or choose another folder."
            )
        wrong = [name for name, kind in kinds.items() if type(value.get(name)) is not kind]
        if wrong or (isinstance(value.get("round"), int) and value["round"] < 0):
            raise CheckpointError(f"{path} has no proper {', '.join(wrong) or 'round'}. Choose another folder.")
        return value

    def _bytes(self, path: Path) -> bytes:
        try:
            with self._open(path) as file:
                if os.fstat(file.fileno()).st_size > _LARGEST:
                    raise CheckpointError(f"{path} is too large to be what it should be. Choose another folder.")
                return file.read()
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}). Remove {self.path} to begin anew."
            ) from None

    def _open(self, path: Path) -> BinaryIO:
        self._refuse_links(path.parent)
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would be waited for
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise CheckpointError(f"{path} is no file.")
        return open(handle, "rb")

    def _refuse_links(self, folder: Path) -> None:
        if folder != self.path and folder.is_symlink():
            raise CheckpointError(f"{folder} is a link, and leads elsewhere: it is not followed.")

    def _way_out(self, number: int) -> str:
        others = [each for each in self._numbers() if each != number and self._manifest_path(each).exists()]
        if not others:
            return f"Remove {self.path} to begin anew."
        return f"Remove {self._round(number)}, on all hosts, to go on from round {others[-1]}."

    def _numbers(self) -> list[int]:
        names = [re.fullmatch(r"round-(\d{8,15})", each.name) for each in self.path.iterdir() if not each.is_symlink()]
        return sorted(int(name[1]) for name in names if name)

    def _round(self, number: int) -> Path:
        return self.path / f"round-{number:08d}"

    def _manifest_path(self, number: int) -> Path:
        return self._round(number) / "manifest.json"


class _Seal:
    """A file that is only written to, and what a manifest says of it."""

    file: BinaryIO

    def __init__(self) -> None:
        self.hash, self.bytes = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Onwards, and counted."""
        self.hash.update(data)
        self.bytes += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        """Done when all is written."""

    def read(self) -> bytes:
        """Never; numpy asks whether there is such a method."""
        raise OSError("only written to")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha256_of(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while data := file.read(1 << 20):
        found.update(data)
    return found.hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
