"""When the ranks synchronise: how many local steps (H) the next round has."""

from __future__ import annotations

import inspect
import math
import operator
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from hvd_localsgd.core.selection import function_words

NEVER = sys.maxsize  # a step that no training comes to


@dataclass(frozen=True, slots=True)
class Now:
    """What all ranks know alike when a round begins, from the headers of its sync.

    Attributes:
        step: local steps so far.
        round: syncs so far, in this training.
        interval: H of the round that has ended, before it was balanced; 0 before the first.
        next: H that was decided for the round that begins; 0 while it is not.
        remaining: local steps until the planned end of training; None: not known.
        rate: the learning rate, the largest of the ranks'; None: nobody asked for it (``Schedule.needs``), as all that follows.
        loss: the training loss, mean over ranks.
        seconds: since training began, the most of the ranks'.
        step_seconds: of a local step on the slowest rank; 0 before the second round.
        sync_seconds: of a sync on the slowest rank, without waiting for others; 0 before the first.
        first: the first of this training whose loss or rate was known; None: this one.
        fallen: whether the rate was lower at some sync than at the one before.
        last: the one before this.
        tracks: what a guard keeps of each rank.
        reached: the position to which every rank has come.
        trained: steps by which fragments take turns: ``step`` when training began, and from there those of each round that took most.
        parts: of the model's fragments those that are averaged at this sync.
        world: whether over all ranks; otherwise each group by itself.
        whole: whether with this sync all ranks hold the same of everything.
        encoded: whether changes are compressed, if the settings say so: not at first.
    """

    step: int
    round: int = 0
    interval: int = 0
    next: int = 0
    remaining: int | None = None
    rate: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    step_seconds: float = 0.0
    sync_seconds: float = 0.0
    first: Now | None = None
    fallen: bool = False
    last: Now | None = None
    tracks: tuple[Any, ...] = ()
    reached: float = 0.0
    trained: int = 0
    parts: frozenset[int] = frozenset({0})
    world: bool = True
    whole: bool = True
    encoded: bool = False


class Schedule(ABC):
    """Decides the interval of the next round, once per synchronisation, on all ranks alike.

    A subclass must be a pure function of ``now``: every rank evaluates it and must get the same answer.

    Attributes:
        exact: averages at these steps and at the end of training, nowhere else; otherwise also before validation and
            where an epoch ends. What validation and the callbacks of an epoch then see is each rank's own model.
        needs: of ``"rate"``, ``"loss"`` and ``"remaining"`` those that ``interval`` looks at.
    """

    exact = False
    needs: frozenset[str] = frozenset()
    _known: ClassVar[dict[str, type[Schedule]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Schedule._known[cls.__name__] = cls

    @abstractmethod
    def interval(self, now: Now) -> int:
        """Local steps (>= 1) in the round that begins now."""

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, as Keras' serialisation wants them."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        """The inverse of ``get_config``."""
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class Constant(Schedule):
    """The same number of local steps in every round: gap(I_T) = H in Stich (2018), I in Yu et al. (2018).

    Args:
        sync_every: H >= 1. With 1 the ranks average after every step, which for SGD without momentum is
            parallel mini-batch SGD.

    Raises:
        ValueError: not an integer, or below 1.
    """

    def __init__(self, sync_every: int = 16) -> None:
        self.sync_every = _positive_integer("sync_every", sync_every)

    def interval(self, now: Now) -> int:
        """Always H."""
        return self.sync_every

    def get_config(self) -> dict[str, Any]:
        """``{"sync_every": H}``."""
        return {"sync_every": self.sync_every}


class OneShot(Schedule):
    """One-shot averaging: every rank trains alone, and the weights are averaged once, at the end.

    H = T in Stich (2018), section 2: outside the theorem, which needs H = O(sqrt(T)); a baseline.
    """

    exact = True

    def interval(self, now: Now) -> int:
        """More steps than any training has."""
        return NEVER - now.step


class SyncSteps(Schedule):
    """Any set I_T of synchronisation times: average after exactly these local steps, and at the end of training.

    Stich (2018), Definition 2.1: the theorem depends on gap(I_T), the longest round.

    Args:
        steps: local steps after which to average, counted from 1, strictly increasing.

    Attributes:
        gap: the longest distance between two of them, or from 0 to the first. The round after the last one ends when
            training ends, and may be longer.

    Raises:
        ValueError: empty, not integers >= 1, or not strictly increasing.
    """

    exact = True

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = [_positive_integer("each of steps", step) for step in steps]
        if not self.steps:
            raise ValueError("steps is empty; for a single average at the end of training take OneShot().")
        if any(late <= early for early, late in pairwise(self.steps)):
            raise ValueError(f"steps must be strictly increasing. Received: {steps!r}")
        self.gap = max(late - early for early, late in pairwise([0, *self.steps]))

    def interval(self, now: Now) -> int:
        """Up to the next of the steps."""
        place = bisect_right(self.steps, now.step)
        return (self.steps[place] if place < len(self.steps) else NEVER) - now.step

    def get_config(self) -> dict[str, Any]:
        """``{"steps": [...]}``."""
        return {"steps": self.steps}

    def __repr__(self) -> str:
        return f"SyncSteps({len(self.steps)} steps up to {self.steps[-1]}, gap {self.gap})"


class Growing(Schedule):
    """Rounds that grow with the square root of time: H_t = scale sqrt(t), for when the end is unknown.

    H = O(sqrt(T / (K b))) keeps the linear speed-up (Stich 2018, Corollary 2.3); where T is unknown the paper advises
    to communicate more often at the start. This applies the rule to the time that has passed.

    Args:
        scale: > 0; the rule's is 1 / sqrt(K b) for K ranks and batches of b.
        maximum: H is never larger; None for no limit.

    Raises:
        ValueError: scale is not positive, maximum not an integer >= 1.
    """

    def __init__(self, scale: float = 1.0, maximum: int | None = None) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be > 0. Received: {scale!r}")
        self.scale = float(scale)
        self.maximum = None if maximum is None else _positive_integer("maximum", maximum)

    def interval(self, now: Now) -> int:
        """scale sqrt(step), rounded down, between 1 and ``maximum``."""
        return min(max(1, int(self.scale * math.sqrt(now.step))), self.maximum or NEVER)

    def get_config(self) -> dict[str, Any]:
        """``{"scale": ..., "maximum": ...}``."""
        return {"scale": self.scale, "maximum": self.maximum}


class PostLocal(Schedule):
    """Average after every step until a switch, then every H: post-local SGD.

    Lin, Stich, Patel & Jaggi (2020, arXiv 1808.07217): generalises better than large batches. They switch at the first drop of
    the learning rate, with H = 16 or 32 then.

    Args:
        switch: a local step (an integer >= 0); a fraction of training, such as ``"0.5dur"``; or ``"rate"``: the first sync that
            finds the learning rate lower than the sync before.
        sync_every: H >= 1 from then on.

    Raises:
        ValueError: not one of these.
    """

    def __init__(self, switch: int | str = "rate", sync_every: int = 16) -> None:
        self.switch, self.sync_every = switch, _positive_integer("sync_every", sync_every)
        self._fraction = _fraction(switch)
        whole = isinstance(switch, int) and not isinstance(switch, bool) and switch >= 0
        if not whole and switch != "rate" and self._fraction is None:
            raise ValueError(
                f'switch must be a local step, "rate", or a fraction such as "0.5dur". Received: {switch!r}'
            )
        self.needs = frozenset({"rate"} if switch == "rate" else {"remaining"} if self._fraction is not None else ())

    def interval(self, now: Now) -> int:
        """1, or H; the round before a step or a fraction ends there."""
        if self.switch == "rate":
            return self.sync_every if now.fallen else 1
        if self._fraction is not None:
            return self.sync_every if now.step >= self._fraction * (now.step + (now.remaining or 0)) else 1
        return self.sync_every if now.step >= int(self.switch) else 1

    def get_config(self) -> dict[str, Any]:
        """``{"switch": ..., "sync_every": H}``."""
        return {"switch": self.switch, "sync_every": self.sync_every}


class Warmup(Schedule):
    """H grows linearly from 1 to another schedule's over the first steps.

    The local step warm-up of Lin et al. (2020, arXiv 1808.07217, appendix): weights move fast at the start, and ranks apart.

    Args:
        steps: how many local steps the warm-up has, >= 1.
        then: the schedule, or H.

    Raises:
        ValueError: steps is not an integer >= 1, or ``then`` averages at steps of its own only.
    """

    def __init__(self, steps: int, then: int | Schedule = 16) -> None:
        self.steps, self.then = _positive_integer("steps", steps), as_schedule(then)
        if self.then.exact:
            raise ValueError(f"Warmup changes H; {self.then} says at which steps to average.")
        self.needs = self.then.needs

    def interval(self, now: Now) -> int:
        """1 + (H - 1) step / steps, rounded down, and H afterwards."""
        full = self.then.interval(now)
        return full if now.step >= self.steps else 1 + (full - 1) * now.step // self.steps

    def get_config(self) -> dict[str, Any]:
        """``{"steps": ..., "then": ...}``."""
        return {"steps": self.steps, "then": to_config(self.then)}


class Join(Schedule):
    """Schedules one after another; a round that would go beyond the end of one ends there.

    Args:
        schedules: schedules, or H; at least one.
        until: local steps at which each but the last ends, strictly increasing.

    Raises:
        ValueError: the lengths do not fit, ``until`` does not increase, or a schedule averages at steps of its own only.
    """

    def __init__(self, schedules: Sequence[int | Schedule], until: Sequence[int]) -> None:
        self.schedules = [as_schedule(each) for each in schedules]
        self.until = [_positive_integer("each of until", step) for step in until]
        if not self.schedules or len(self.until) != len(self.schedules) - 1:
            raise ValueError(
                f"Join needs a step between each two schedules. Received: {len(self.schedules)} schedules, until={until!r}"
            )
        if any(late <= early for early, late in pairwise(self.until)):
            raise ValueError(f"until must be strictly increasing. Received: {until!r}")
        if exact := [each for each in self.schedules if each.exact]:
            raise ValueError(f"Join takes schedules of H; {exact[0]} says at which steps to average.")
        self.needs = frozenset().union(*(each.needs for each in self.schedules))

    def interval(self, now: Now) -> int:
        """That of the schedule whose turn it is."""
        turn = bisect_right(self.until, now.step)
        interval = self.schedules[turn].interval(now)
        return min(interval, self.until[turn] - now.step) if turn < len(self.until) else interval

    def get_config(self) -> dict[str, Any]:
        """``{"schedules": [...], "until": [...]}``."""
        return {"schedules": [to_config(each) for each in self.schedules], "until": self.until}


class QuadraticSync(Schedule):
    """The quadratic synchronisation rule: H = max(H_base, floor((alpha / rate)^2)).

    Gu, Lyu, Arora, Huang & Bhatia (2024, arXiv 2310.14423): as the rate decays, rounds grow, and the implicit regularisation
    of local steps with them. Their ViT-B with AdamW: H_base 4, alpha 0.0175, peak rate 0.008.

    Args:
        alpha: > 0.
        sync_every: H_base >= 1.
        maximum: H is never larger; None for no limit.

    Raises:
        ValueError: out of range.
    """

    needs = frozenset({"rate"})

    def __init__(self, alpha: float, sync_every: int = 4, maximum: int | None = None) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha must be > 0. Received: {alpha!r}")
        self.alpha, self.sync_every = float(alpha), _positive_integer("sync_every", sync_every)
        self.maximum = None if maximum is None else _positive_integer("maximum", maximum)

    def interval(self, now: Now) -> int:
        """The rule, for the rate at the sync."""
        ratio = self.alpha / now.rate if now.rate else math.inf  # a rate of 0 moves nothing
        longest = self.maximum or NEVER - now.step
        return max(self.sync_every, longest if ratio**2 >= longest else int(ratio**2))

    def get_config(self) -> dict[str, Any]:
        """``{"alpha": ..., "sync_every": H_base, "maximum": ...}``."""
        return {"alpha": self.alpha, "sync_every": self.sync_every, "maximum": self.maximum}


class AdaComm(Schedule):
    """Communicate more and more often as the loss falls: H = ceil(H_0 sqrt(rate_0 / rate * loss / loss_0)) every T_0 seconds.

    Wang & Joshi (2019, arXiv 1810.08313): long rounds make the most progress per second at first, short ones reach the lower
    loss. Where the rule does not lower H, H is halved. Where H is 1, it stays.

    Args:
        sync_every: H_0 >= 1.
        every: T_0 > 0, seconds between two changes; the paper's experiments use 60.

    Raises:
        ValueError: out of range.
    """

    needs = frozenset({"rate", "loss"})

    def __init__(self, sync_every: int = 16, every: float = 60.0) -> None:
        self.sync_every, self.every = _positive_integer("sync_every", sync_every), float(every)
        if not self.every > 0:
            raise ValueError(f"every must be > 0 seconds. Received: {every!r}")

    def interval(self, now: Now) -> int:
        """As before, unless T_0 seconds have passed."""
        first, last = now.first, now.last
        if not now.interval or first is None or last is None:
            return self.sync_every
        if now.seconds // self.every == last.seconds // self.every or not (first.loss and now.loss and now.rate):
            return now.interval
        rule = math.ceil(self.sync_every * math.sqrt((first.rate or now.rate) / now.rate * now.loss / first.loss))
        return max(1, rule if rule < now.interval else now.interval // 2)

    def get_config(self) -> dict[str, Any]:
        """``{"sync_every": H_0, "every": T_0}``."""
        return {"sync_every": self.sync_every, "every": self.every}


class Stagewise(Schedule):
    """Stages that double in length, with rounds that grow from one to the next: STL-SGD.

    Shen, Cheng, Liu & Xu (2021, arXiv 2006.06377), Algorithm 2: T_{s+1} = 2 T_s, and H_{s+1} = 2 H_s where all ranks draw from
    the same data, sqrt(2) H_s where they do not. The learning rate halves with each stage: that is the optimizer's schedule.

    Args:
        steps: T_1 >= 1, local steps of the first stage.
        sync_every: H_1 >= 1.
        growth: of H from stage to stage, >= 1: 2, or sqrt(2) for ranks with different data.

    Raises:
        ValueError: out of range.
    """

    def __init__(self, steps: int, sync_every: int = 1, growth: float = 2.0) -> None:
        self.steps, self.sync_every = _positive_integer("steps", steps), _positive_integer("sync_every", sync_every)
        self.growth = float(growth)
        if not self.growth >= 1:
            raise ValueError(f"growth must be >= 1. Received: {growth!r}")

    def interval(self, now: Now) -> int:
        """H_s, rounded down; the last round of a stage ends with it."""
        stage = (now.step // self.steps + 1).bit_length() - 1  # stage s begins after (2^s - 1) T_1 steps
        end = (2 ** (stage + 1) - 1) * self.steps
        return min(int(self.sync_every * self.growth**stage), end - now.step)

    def get_config(self) -> dict[str, Any]:
        """``{"steps": T_1, "sync_every": H_1, "growth": ...}``."""
        return {"steps": self.steps, "sync_every": self.sync_every, "growth": self.growth}


class Auto(Schedule):
    """H such that averaging takes a given share of the time: H = sync (1 - share) / (share step), in seconds of each.

    Both are measured, on the slowest rank, and measured again in every round: the same H on all ranks. What is measured is the
    sync itself, not the wait for slower ranks, which a larger H does not shorten.

    Args:
        share: of the time, between 0 and 1.
        minimum, maximum: bounds of H, integers >= 1. Plain averaging tolerates 8 to 32; far more wants another method.

    Raises:
        ValueError: out of range.
    """

    def __init__(self, share: float = 0.05, minimum: int = 1, maximum: int = 256) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1. Received: {share!r}")
        self.share = float(share)
        self.minimum, self.maximum = _positive_integer("minimum", minimum), _positive_integer("maximum", maximum)
        if self.minimum > self.maximum:
            raise ValueError(f"minimum is above maximum. Received: {minimum!r}, {maximum!r}")

    def interval(self, now: Now) -> int:
        """16 until both are known."""
        interval = 16
        if now.step_seconds and now.sync_seconds:
            wanted = now.sync_seconds * (1 - self.share) / (self.share * now.step_seconds)
            interval = math.ceil(min(wanted, self.maximum))
        return min(max(interval, self.minimum), self.maximum)

    def get_config(self) -> dict[str, Any]:
        """``{"share": ..., "minimum": ..., "maximum": ...}``."""
        return {"share": self.share, "minimum": self.minimum, "maximum": self.maximum}


class Function(Schedule):
    """A function of one's own: takes some of ``step``, ``round``, ``rate``, ``loss`` and ``remaining`` by name, returns H.

    ``sync_every=function`` makes it. It must give all ranks the same, so it may look at nothing else. A function is not saved with a
    model: load that with ``compile=False``, and compile it again.

    Args:
        function: as above.

    Raises:
        ValueError: it takes something else.
    """

    def __init__(self, function: Callable[..., int]) -> None:
        if not callable(function):
            raise ValueError(
                f"A function is not saved with a model: load it with compile=False. Received: {function!r}"
            )
        self.function = function
        self._takes = list(inspect.signature(function).parameters)
        if unknown := set(self._takes) - {"step", "round", "rate", "loss", "remaining"}:
            raise ValueError(
                f"sync_every as a function takes step, round, rate, loss, remaining. Received one that takes {sorted(unknown)}"
            )
        self.needs = frozenset(self._takes) & {"rate", "loss", "remaining"}

    def interval(self, now: Now) -> int:
        """What the function says.

        Raises:
            ValueError: that is not an integer >= 1.
        """
        answer = self.function(**{name: getattr(now, name) for name in self._takes})
        return _positive_integer(f"what {self.function.__name__} returns", answer)

    def get_config(self) -> dict[str, Any]:
        """Its name, and a hash of its code, which all ranks compare."""
        return {"function": function_words(self.function)}


SCHEDULES: tuple[type[Schedule], ...] = (
    AdaComm,
    Auto,
    Constant,
    Function,
    Growing,
    Join,
    OneShot,
    PostLocal,
    QuadraticSync,
    Stagewise,
    SyncSteps,
    Warmup,
)


def as_schedule(sync_every: Any) -> Schedule:
    """An int becomes ``Constant``, ``"auto"`` ``Auto``, a function ``Function``, a config its schedule; a schedule passes.

    Raises:
        ValueError: none of these.
    """
    if isinstance(sync_every, Schedule):
        return sync_every
    if sync_every == "auto":
        return Auto()
    if isinstance(sync_every, dict):
        return from_config(sync_every)
    if callable(sync_every):
        return Function(sync_every)
    return Constant(sync_every)


def to_config(schedule: Schedule) -> dict[str, Any]:
    """Class and arguments, as JSON has them."""
    return {"schedule": type(schedule).__name__, "arguments": schedule.get_config()}


def from_config(config: dict[str, Any]) -> Schedule:
    """The inverse; the class must have been defined.

    Raises:
        ValueError: it has not.
    """
    kind = Schedule._known.get(str(config.get("schedule")))
    if kind is None:
        raise ValueError(f"There is no such schedule, or it is not imported yet. Received: {config!r}")
    return kind.from_config(config["arguments"])


def _fraction(text: Any) -> float | None:
    """0.5 of "0.5dur"; None for everything else."""
    if not (isinstance(text, str) and text.endswith("dur")):
        return None
    try:
        fraction = float(text.removesuffix("dur"))
    except ValueError:
        return None
    return fraction if 0 <= fraction <= 1 else None


def _positive_integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be an integer >= 1 (local steps per round) or a Schedule. Received: {value!r}")
    return number
