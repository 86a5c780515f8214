"""When a training is kept, who says that all of it is on the disk, and how all ranks go on from the same.

What one rank keeps lies between two syncs of its own, the same two on every rank: in between ranks are independent of each other, so that
together these are a state of the whole training. A thread writes it while training goes on. It makes no collective call: that its file is
there a rank says in the next header.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from hvd_localsgd.core import failures, protocol, reducers
from hvd_localsgd.core.agreement import fingerprint
from hvd_localsgd.core.averages import Averages
from hvd_localsgd.core.checkpoints import Folder
from hvd_localsgd.core.header import row
from hvd_localsgd.core.preemption import Requests
from hvd_localsgd.core.progress import BEGIN, Progress
from hvd_localsgd.core.protocol import Decision
from hvd_localsgd.core.settings import Settings, as_count
from hvd_localsgd.core.state import State, below, under, value, words
from hvd_localsgd.errors import CheckpointError, Preempted, RanksDiffer


class Source(Protocol):
    """Who has what is to be kept, besides the engine: a front end."""

    def facts(self) -> dict[str, Any]:
        """What must be the same in the training that goes on, as JSON takes it: by name, in words."""

    def state(self) -> State:
        """What to keep now; it is copied."""

    def load(self, state: State, ranks: int) -> list[str]:
        """The inverse, of a job of so many ranks. What of it is not taken over, in words."""


class Keeper:
    """Keeps nothing: a training without checkpoints."""

    found: State | None = None  # what this rank goes on from
    due = False  # whether ``take`` has something to do
    waits = False  # the front end cannot be looked at in the middle of a sync, and calls ``take`` itself

    def begin(self, progress: Progress, averages: Averages) -> None:
        """All ranks have begun."""

    def look(self) -> dict[str, bool]:
        """What the header says of this rank."""
        return {}

    def see(self, decision: Decision) -> None:
        """After a sync (collective)."""

    def take(self, between_steps: bool = False) -> None:
        """What is due is kept now, unless an average is on its way (collective, if training ends with it)."""


class Checkpoints(Keeper):
    """Keeps a training in a folder, every so many averages and when a rank is asked to end; and goes on from there.

    Args:
        folder: of this training alone; on a filesystem that all hosts share, or on each host's own.
        every_rounds: averages after which a checkpoint is written; None: only where training ends.
        keep: how many are kept.
        exit_status: of a job that is asked to end.
        max_minutes: after which this process must have ended, from the moment when this is made; None: SLURM's limit, if there is one.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every_rounds: int | None = 100,
        *,
        keep: int = 3,
        exit_status: int = 75,
        max_minutes: float | None = None,
    ) -> None:
        self.folder = os.fspath(folder)
        count = as_count(1, "every_rounds must be a number of averages >= 1, or None")
        self.every_rounds = None if every_rounds is None else count(every_rounds)
        self.keep = as_count(1, "keep must be a number of checkpoints >= 1")(keep)
        self.exit_status = as_count(0, "exit_status must be 0 to 255")(exit_status)
        if max_minutes is not None and not max_minutes > 0:
            raise ValueError(f"max_minutes must be > 0, or None. Received: {max_minutes!r}")
        if self.exit_status > 255:
            raise ValueError(f"exit_status must be 0 to 255. Received: {exit_status!r}")
        self.requests = Requests(max_minutes)
        self._writing: _Writing | None = None

    # Before training begins.

    def resume(self, communicator: Any, source: Source) -> bool:
        """Whether there is something to go on from; it has been loaded into the front end then (collective).

        Raises:
            CheckpointError: on all ranks alike: what is there is damaged, or of something else. Nothing has changed.
            RanksDiffer: on all ranks alike: they would go on from different checkpoints.
        """
        self._communicator, self._source = communicator, source
        self.folder_of_rank = Folder(self.folder, communicator.rank)
        self.due = self._ends = False
        self._rounds = self._round = 0
        self._longest, self._seconds, self._synced = 0.0, 0.0, time.perf_counter()
        self._writing = None
        self.requests.listen()
        try:
            return self._resume(communicator, source)
        except BaseException:
            self.requests.ignore()
            raise

    def _resume(self, communicator: Any, source: Source) -> bool:
        said = {"every_rounds": self.every_rounds, "keep": self.keep, "exit_status": self.exit_status}
        description = json.dumps([{"checkpoints": str(said)}, [], []])
        with failures.together(None):
            protocol.agree(communicator, row(model=fingerprint(description), position=BEGIN), description)
            manifest = self._choose()
            if manifest is None:
                self._identity = communicator.gather(os.urandom(8).hex().encode())[0].decode()
                self.found, self._alike = None, True
                return False
            self._identity, self._alike = manifest["training"], manifest["ranks"] == communicator.size
            found = self._read(manifest)
        dropped = source.load(below("source", found), manifest["ranks"])
        if not self._alike:
            found = {name: array for name, array in found.items() if not name.startswith("engine/averages/own/")}
        self.found = below("engine", found)
        if self._together_as_then:
            reducers.prefer(communicator, manifest["reducer"])
        self._say(manifest, dropped)
        return True

    def _choose(self) -> dict[str, Any] | None:
        """The manifest of the newest that all ranks have."""
        folder, who = self.folder_of_rank, self._communicator
        own: dict[str, Any] = {"training": "", "rounds": [], "highest": 0, "error": ""}
        try:
            own |= folder.found()
        except (CheckpointError, OSError) as error:
            own["error"] = str(error)
        entries = [json.loads(entry) for entry in who.gather(json.dumps(own).encode())]
        self._refuse([entry["error"] for entry in entries])
        self._number = max(entry["highest"] for entry in entries)  # nothing that is there is written over
        common = set.intersection(*(set(map(tuple, entry["rounds"])) for entry in entries))
        if len({entry["training"] for entry in entries}) == 1 and (common or not entries[0]["training"]):
            return folder.manifest(max(common)[0]) if common else None
        names = who.hosts
        has = [f"rank {k} on {names[k]} {_words(entry)}" for k, entry in enumerate(entries)]
        differ = [words for k, words in enumerate(has) if _words(entries[k]) != _words(entries[0])][:7]
        raise RanksDiffer(
            f"Ranks would not go on from the same checkpoint in {self.folder}: {', '.join([has[0], *differ])}. The folder must be on a "
            "filesystem that all hosts share, or be on every host what it was when the job ended; to begin anew remove it everywhere."
        )

    def _read(self, manifest: dict[str, Any]) -> State:
        """This rank's file; where there were other ranks, what they had in common from rank 0's."""
        folder, who, error, state = self.folder_of_rank, self._communicator, "", State()
        try:
            facts, unsaid = self._source.facts(), Settings().description()  # an option that a later version has
            for name in {**manifest["facts"], **facts}:
                before = manifest["facts"].get(name, unsaid.get(name))
                if before != facts.get(name, unsaid.get(name)):
                    was, now = _first_difference(before, facts.get(name))
                    raise CheckpointError(
                        f"{self.folder} is of another training: {name} was {was}, and is {now}. Choose another folder, or go on as it was."
                    )
            state = folder.read(manifest, who.rank % manifest["ranks"])
            if not self._alike and who.rank % manifest["ranks"]:
                state |= under("engine", below("engine", folder.read(manifest, 0)))
            reducers.check(manifest["reducer"])
        except (CheckpointError, ValueError) as found:
            error = str(found)
        entries = [json.loads(entry) for entry in who.gather(json.dumps([error, who.local_size]).encode())]
        self._refuse([error for error, _ in entries])
        self._together_as_then = [size for _, size in entries] == [
            file.get("ranks on its host") for file in manifest["files"]
        ]
        return state

    def _refuse(self, errors: list[str]) -> None:
        """On all ranks alike, if any has found something wrong (collective)."""
        if any(errors):
            names = self._communicator.hosts
            rank = next(rank for rank, error in enumerate(errors) if error)
            raise CheckpointError(f"rank {rank} on {names[rank]}: {errors[rank]}")

    def _say(self, manifest: dict[str, Any], dropped: list[str]) -> None:
        if self._communicator.rank:
            return
        lost = (
            []
            if self._alike
            else [*dropped, "what each rank alone kept of averages (error feedback, corrections, guards)"]
        )
        of = "" if self._alike else f", which {manifest['ranks']} ranks have written"
        than = f"; not taken over: {', '.join(lost)}" if lost else ""
        print(
            f"hvd_localsgd: goes on from round {manifest['round']} in {self.folder}{of}{than}",
            file=sys.stderr,
            flush=True,
        )

    # While it goes on.

    def begin(self, progress: Progress, averages: Averages) -> None:
        """With the engine's own part of what was found."""
        self._progress, self._averages = progress, averages
        if self.found:
            progress.load(value(self.found["progress"]), self._alike)
            averages.load(below("averages", self.found))
        self.found = None

    def look(self) -> dict[str, bool]:
        """Whether this rank is asked to end, and has nothing left to write."""
        now = time.perf_counter()
        self._longest, self._synced = max(self._longest, now - self._synced), now
        self.requests.see_time(self._longest + 2 * self._seconds)
        asked = bool(self.requests.reason)
        if asked and not self._ends:
            who = self._communicator
            print(
                f"hvd_localsgd: rank {who.rank} on {who.host} is asked to end: {self.requests.reason}",
                file=sys.stderr,
                flush=True,
            )
        return {"asked": asked, "written": self._writing is None or not self._writing.is_alive()}

    def see(self, decision: Decision) -> None:
        """Files that all ranks have written become a checkpoint; another one may be due."""
        self._rounds += decision.average
        if self._writing is not None and decision.written:
            self._commit()
        self._ends |= decision.asked
        turn = self.every_rounds is not None and self._rounds >= self.every_rounds
        self.due |= self._ends or (turn and self._writing is None)
        self._round = decision.now.round

    def take(self, between_steps: bool = False) -> None:
        """A copy of everything, which a thread writes; if training ends here it is waited for.

        Args:
            between_steps: the front end is there where it waits to be.

        Raises:
            Preempted: on all ranks alike.
        """
        if not self.due or (self.waits and not between_steps) or self._averages.flies:
            return
        if self._ends and self._writing is not None:
            self._commit()
        self.due, self._rounds = False, 0
        self._write()
        if self._ends:
            while not self._commit():
                self._write()
            self._leave()

    def finish(self) -> None:
        """Training has ended on all ranks: that is kept too (collective)."""
        if self._writing is not None:
            self._commit()
        self._write()
        while not self._commit():
            self._write()
        self.requests.ignore()

    def _write(self) -> None:
        engine = {"progress": words(self._progress.state()), **under("averages", self._averages.state())}
        state = under("engine", engine) | under("source", self._source.state())
        copy = {name: np.array(array) for name, array in state.items()}
        self._facts, who = self._source.facts(), self._communicator
        self._number = max(self._number + 1, self._round)
        self.folder_of_rank, self._generation = Folder(self.folder, who.rank), who.generation
        self._writing = _Writing(self.folder_of_rank, self._number, who.rank, copy)

    def _commit(self) -> bool:
        """Collective: what the manifest says of each file comes from the rank that has written it.

        Returns:
            Whether it is there now: not if a rank died meanwhile.

        Raises:
            CheckpointError: on all ranks alike: one could not write.
        """
        assert self._writing is not None
        who, number = self._communicator, self._writing.number
        self._writing.join()
        self._seconds = max(self._seconds, self._writing.seconds)
        own, self._writing = self._writing.seal | {"ranks on its host": who.local_size}, None
        files = [json.loads(entry) for entry in self._gather(json.dumps(own))]
        if who.generation != self._generation:
            return False  # of ranks that are no more, and of numbers that others have now
        self._refuse([file.get("error", "") for file in files])
        failed = ""
        if who.local_rank == 0:  # on a filesystem that hosts share all of these write the same, to the byte
            manifest = {
                "training": self._identity,
                "round": number,
                "ranks": who.size,
                "reducer": reducers.chosen(who),
                "facts": self._facts,
                "files": files,
            }
            try:
                self.folder_of_rank.commit(manifest, self.keep)
            except (CheckpointError, OSError) as error:
                failed = f"cannot write to {self.folder} ({error})"
        self._refuse(self._gather(failed))
        return True

    def _gather(self, word: str) -> list[str]:
        """Every rank's (collective)."""
        return [entry.decode() for entry in self._averages.survivors.gather(word.encode())]

    def _leave(self) -> None:
        self.requests.ignore()
        if self._communicator.rank == 0:
            print(
                f"hvd_localsgd: round {self._number} is in {self.folder}; all ranks end with exit status {self.exit_status}",
                file=sys.stderr,
                flush=True,
            )
        failures.end_all(self.exit_status)
        raise Preempted(self.exit_status)


class _Writing(threading.Thread):
    """A rank's file on its way to the disk.

    Attributes:
        number: of the round.
        seal: what the manifest will say of it, or ``{"error": ...}``.
        seconds: how long it took.
    """

    seconds = 0.0

    def __init__(self, folder: Folder, number: int, rank: int, state: State) -> None:
        super().__init__(daemon=True)  # a rank that fails must not wait for it
        self.number = number
        self._folder, self._rank, self._state = folder, rank, state
        self.seal: dict[str, Any] = {}
        self.start()

    def run(self) -> None:
        """All of it."""
        began = time.perf_counter()
        try:
            self.seal = self._folder.write(self.number, self._rank, self._state)
        except Exception as error:  # which all ranks hear of when they put the checkpoint together
            self.seal = {"error": f"cannot write to {self._folder.path} ({type(error).__name__}: {error})"}
        del self._state
        self.seconds = time.perf_counter() - began


def _words(entry: Mapping[str, Any]) -> str:
    rounds = entry["rounds"]
    return f"has round {rounds[-1][0]} of training {entry['training'][:6]}" if rounds else "has none"


def _first_difference(was: Any, now: Any) -> tuple[Any, Any]:
    """Of two lists, what differs first."""
    if not (isinstance(was, list) and isinstance(now, list)):
        return was, now
    pairs = [(one, other) for one, other in zip(was, now, strict=False) if one != other]
    return pairs[0] if pairs else (f"{len(was)} of them", f"{len(now)} of them")
