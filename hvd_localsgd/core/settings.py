"""Every option, once: its name, what it may be, what it does. All that depends on options asks here.

A field of ``Settings`` is an argument of the callback, the optimizer and ``ModelAverager``; it is checked, compared over
ranks, and saved with a model.
"""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from hvd_localsgd.core.codecs import CODECS
from hvd_localsgd.core.groups import as_groups
from hvd_localsgd.core.guards import as_clip, as_guard
from hvd_localsgd.core.outer import Mean, Outer, as_outer
from hvd_localsgd.core.schedules import Constant, Now, Schedule, as_schedule
from hvd_localsgd.core.selection import as_names


def option(default: Any, allowed: tuple[Any, ...] | Callable[[Any], Any], text: str) -> Any:
    """A field of ``Settings``.

    Args:
        default: what it is if nobody says.
        allowed: the values it may have; or a function that makes its value from what the user gave, or raises.
        text: what it does, as in a docstring.
    """
    return field(default=default, metadata={"allowed": allowed, "text": text})


def as_state_policy(policy: Any) -> Any:
    """A word, or the period of each kind of optimizer state, in syncs.

    Raises:
        ValueError: something else.
    """
    words = ("keep", "average", "reset")
    if isinstance(policy, dict) and policy:
        if all(isinstance(name, str) and type(every) is int and every >= 1 for name, every in policy.items()):
            return dict(policy)
    elif policy in words:
        return policy
    raise ValueError(
        f'optimizer_state must be one of {words}, or a dict such as {{"momentum": 3}} with a number of syncs >= 1. Received: {policy!r}'
    )


def as_count(minimum: int, words: str) -> Callable[[Any], int]:
    """A check: an integer of at least ``minimum``, or ValueError with these words."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{words}. Received: {value!r}")
        return value

    return check


def as_period(value: Any) -> int | None:
    """A number of syncs, or None.

    Raises:
        ValueError: something else.
    """
    return None if value is None else as_count(1, "audit_every must be None, or a number of syncs >= 1")(value)


@dataclass(frozen=True)
class Settings:
    """What the user chose, checked.

    Raises:
        ValueError: an unknown choice, or choices that do not go together.
    """

    sync_every: Any = option(
        16,
        as_schedule,
        'H, local steps between two syncs; or a ``Schedule``; ``"auto"``, which is ``Auto()``; or a function of some of '
        "``step``, ``round``, ``rate``, ``loss`` and ``remaining`` that gives H.",
    )
    optimizer_state: Any = option(
        "keep",
        as_state_policy,
        'what happens to momentum and moments at a sync: ``"keep"`` each rank\'s own, ``"average"`` them like weights '
        '(more to send), or ``"reset"`` them to what the optimizer starts with; or a dict such as ``{"momentum": 3, "velocity": '
        "6}``, which averages each of these at every so manieth sync, and keeps the others.",
    )
    weighting: Literal["equal", "samples"] = option(
        "equal", ("equal", "samples"), 'ranks count ``"equal"``, or by the ``"samples"`` of their round.'
    )
    mode: Literal["sync", "async"] = option(
        "sync",
        ("sync", "async"),
        '``"async"`` lets no rank wait for another (Stich 2018, Algorithm 2): each adds its progress to a global average '
        "in one-sided MPI memory and goes on from there. Logs are then each rank's own; a rank that stops training stops "
        "all. Only at the end all ranks meet, and get the same model.",
    )
    interval: Literal["equal", "balanced"] = option(
        "equal",
        ("equal", "balanced"),
        '``"balanced"`` gives each rank steps in proportion to its speed, H on average, so that all come to a sync '
        "together (Yu et al. 2018, workers of unequal speed). Fast ranks need more data for that: repeat the dataset, and "
        "give each rank its own ``steps_per_epoch``.",
    )

    outer: Any = option(
        "mean",
        as_outer,
        'what becomes of the average: ``"mean"``, itself; ``"slowmo"`` or ``SlowMo(alpha, beta)``; ``"diloco"`` or '
        "``Nesterov(learning_rate, momentum)``; or any Keras optimizer, whose gradient is the change since the last sync.",
    )

    guard: Any = option(
        None,
        as_guard,
        'whose change counts: ``"outliers"`` or ``Outliers(threshold, decay, warm_up)`` leaves a rank out of a round whose change is far '
        'larger than its changes were; ``"norms"`` weighs ranks less the farther they have moved.',
    )
    clip_change: float | None = option(None, as_clip, "the norm that the change of the average may have at most.")
    include: Any = option(
        None,
        as_names,
        "which variables are averaged: a pattern of names or layers, several, or a function of a variable; None: all that "
        "training changes, weights and statistics. All start alike in any case.",
    )
    exclude: Any = option(None, as_names, "which of these are not averaged, in the same words.")
    variance: Literal["mean", "pooled"] = option(
        "mean",
        ("mean", "pooled"),
        'BatchNorm\'s variances are averaged as all else, or ``"pooled"``: mean of the variances + variance of the means, that '
        "of all ranks' data together. Nothing more is sent.",
    )
    overlap: int = option(
        0,
        as_count(0, "overlap must be a number of local steps >= 0"),
        "local steps that go on while an average is on its way; they are kept: x <- average + (x - what was sent). 0: it is waited for.",
    )
    fragments: int = option(
        1,
        as_count(1, "fragments must be a number of parts >= 1"),
        "P parts of the model, of which one is averaged every H/P steps, each once in H steps.",
    )
    compression: Literal[None, "bf16", "fp16", "int8"] = option(
        None,
        (None, *CODECS),
        "how the ranks' changes are sent; what is lost is made up for in the next sync. Statistics, small variables and "
        "the first rounds are sent as they are.",
    )
    groups: Any = option(
        None,
        as_groups,
        'ranks that average among themselves every H steps, and with all others at every fourth sync: ``"node"``, lists of ranks, or '
        "``Groups(ranks, every)``.",
    )
    control_variates: bool = option(
        False,
        (False, True),
        "each rank's gradients are corrected by how much they differ from the mean of all ranks', for ranks with different data (VRL-SGD, "
        "Liang et al. 2019). Nothing more is sent. Of the optimizer and ``ModelAverager``, with plain SGD.",
    )

    on_nonfinite: Literal["raise", "skip_rank", "rollback"] = option(
        "raise",
        ("raise", "skip_rank", "rollback"),
        'what happens to a rank with NaN or infinity in its weights at a sync: all ranks ``"raise"``; or it is left out of the average, and goes '
        'on from the others\' average (``"skip_rank"``), with an optimizer that starts anew too (``"rollback"``).',
    )
    audit_every: int | None = option(
        None,
        as_period,
        "syncs of all ranks after which it is checked that they hold the same bits; None: never.",
    )
    on_failure: Literal["abort", "continue"] = option(
        "abort",
        ("abort", "continue"),
        'what happens when a rank dies: the job ends, or the others ``"continue"`` without it, from their own weights, at the sync at which '
        "they notice; under ``mpirun --with-ft ulfm`` of Open MPI 5.",
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value, allowed = getattr(self, each.name), each.metadata["allowed"]
            if callable(allowed):
                object.__setattr__(self, each.name, allowed(value))
            elif value not in allowed:
                raise ValueError(f"{each.name} must be one of {allowed}. Received: {value!r}")
        for refuse in REFUSALS:
            if reason := refuse(self):
                raise ValueError(reason)

    @property
    def schedule(self) -> Schedule:
        """``sync_every``, which an integer is no more."""
        assert isinstance(self.sync_every, Schedule)
        return self.sync_every

    @property
    def syncs_per_average(self) -> int:
        """In how many syncs in a row the whole model is averaged over all ranks."""
        if self.groups is not None:
            return self.groups.every
        return min(self.fragments, self.schedule.interval(Now(0))) if self.fragments > 1 else 1

    def audits(self, now: Now) -> bool:
        """Whether ranks look if they hold the same."""
        return self.audit_every is not None and now.world and now.round % self.audit_every == 0

    @property
    def measures_change(self) -> bool:
        """Whether something is made of the change since the last sync."""
        return not isinstance(self.outer, Mean) or self.has_anchor or self.control_variates

    @property
    def has_anchor(self) -> bool:
        """Whether the weights after the last sync are kept, apart from an outer step's own."""
        return self.guard is not None or self.clip_change is not None or self.compression is not None

    @property
    def parts_weights(self) -> bool:
        """Whether weights and statistics are not treated alike, or not all at once."""
        return self.measures_change or self.variance == "pooled" or self.overlap > 0 or self.fragments > 1

    @property
    def needs(self) -> frozenset[str]:
        """Of rate, loss and what remains, those that somebody looks at."""
        variates = frozenset({"rate"} if self.control_variates else ())
        return self.schedule.needs | getattr(self.outer, "needs", frozenset()) | variates

    def get_config(self) -> dict[str, Any]:
        """Name and value of each option."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def others(self) -> dict[str, Any]:
        """Name and value of each option that is not as it is if nobody says."""
        config = self.get_config()
        return {
            e.name: config[e.name]
            for e in fields(self)
            if config[e.name] != e.default and not isinstance(config[e.name], Mean)
        }

    def description(self) -> dict[str, str]:
        """Name and value of each option, in words that are the same on two ranks only if the values are."""
        return {name: _words(value) for name, value in self.get_config().items()}

    def of_results(self) -> dict[str, str]:
        """Of these, what results depend on where nothing goes wrong."""
        others = ("on_nonfinite", "audit_every", "on_failure")
        return {name: words for name, words in self.description().items() if name not in others}


def _async_is_alone(chosen: Settings) -> str | None:
    if chosen.mode == "async" and (chosen.weighting, chosen.interval) != ("equal", "equal"):
        return (
            "mode='async' gives every rank weight 1/K and lets each go at its own pace. "
            f"Received: weighting={chosen.weighting!r}, interval={chosen.interval!r}"
        )
    return None


_NEED_ALL_RANKS = {
    "outer": "there is no moment for an outer step of all ranks",
    "guard": "the changes of all ranks are never there together",
    "clip_change": "the changes of all ranks are never there together",
    "variance": "variances cannot be pooled one rank at a time",
    "overlap": "nobody is waited for, and a rank reads the average as it is at that moment",
    "fragments": "ranks have no turn that is the same for all",
    "compression": "what is added cannot be decoded by whoever owns it, who does not take part",
    "groups": "ranks meet nobody",
    "on_failure": "what a rank owned of it is lost when it dies",
    "audit_every": "no two ranks hold the same",
}


def _async_adds_one_rank_at_a_time(chosen: Settings) -> str | None:
    if chosen.mode == "sync":
        return None
    if isinstance(chosen.optimizer_state, dict):
        return (
            f"mode='async' knows no sync of all ranks to count by. Received: optimizer_state={chosen.optimizer_state!r}"
        )
    others = chosen.others()
    for name, reason in _NEED_ALL_RANKS.items():
        if name in others:
            return f"mode='async' adds each rank's progress to the average as it comes: {reason}. Received: {name}={others[name]!r}"
    return None


def _corrections_are_of_all_steps(chosen: Settings) -> str | None:
    if chosen.control_variates and chosen.on_nonfinite != "raise":
        return (
            "control_variates take a rank's way to the average for its gradients, and that of a rank that is left out leads nowhere. Received: "
            f"on_nonfinite={chosen.on_nonfinite!r}"
        )
    return None


def _exact_is_equal(chosen: Settings) -> str | None:
    if chosen.interval == "balanced" and chosen.schedule.exact:
        return f"interval='balanced' gives each rank its own steps, {chosen.schedule} the same to all."
    return None


def _overlap_ends_in_its_round(chosen: Settings) -> str | None:
    steps = max(1, chosen.schedule.interval(Now(0)) // chosen.fragments) if isinstance(chosen.schedule, Constant) else 0
    if chosen.overlap and 0 < steps <= chosen.overlap:
        return (
            f"overlap={chosen.overlap} must be below the {steps} local steps between two syncs: the next average begins with what "
            "this one has brought."
        )
    return None


def _fragments_come_in_turn(chosen: Settings) -> str | None:
    if chosen.fragments == 1:
        return None
    if not isinstance(chosen.schedule, Constant):
        return f"fragments take turns by the local step, which needs a constant sync_every. Received: sync_every={chosen.schedule!r}"
    whole = {
        "guard": "looks at the change of the whole model",
        "groups": "counts averages of the whole model",
        "interval": "gives ranks different steps, by which fragments would take turns",
        "variance": "needs means and variances together",
    }
    others = chosen.others()
    for name, reason in whole.items():
        if name in others:
            return f"fragments average a part of the model at a time, and {name}={others[name]!r} {reason}."
    if isinstance(chosen.optimizer_state, dict):
        return f"fragments have their own period, H. Received: optimizer_state={chosen.optimizer_state!r}"
    if not isinstance(chosen.outer, Outer):
        return f"fragments average a part of the model at a time, and outer={chosen.outer!r} steps the whole: use a rule such as Nesterov()."
    return None


def _groups_measure_no_outliers(chosen: Settings) -> str | None:
    if chosen.groups is not None and chosen.guard is not None:
        return f"guard={chosen.guard!r} compares the changes of all ranks at each sync, which groups make among themselves."
    return None


def _variates_are_of_equal_ranks(chosen: Settings) -> str | None:
    alike = (chosen.mode, chosen.weighting, chosen.interval) == ("sync", "equal", "equal") and chosen.guard is None
    if chosen.control_variates and not alike:
        return (
            "control_variates sum to zero only if all ranks are in each average, count equally and take as many steps: leave mode, "
            f"weighting, interval and guard as they are. Received: mode={chosen.mode!r}, weighting={chosen.weighting!r}, "
            f"interval={chosen.interval!r}, guard={chosen.guard!r}"
        )
    return None


def _variates_need_the_average_itself(chosen: Settings) -> str | None:
    others = chosen.others()
    for name in ("outer", "overlap", "fragments", "compression", "groups"):
        if chosen.control_variates and name in others:
            return (
                "control_variates are published for ranks that go on from the average of all, as it is and all at once. "
                f"Received: {name}={others[name]!r}"
            )
    return None


# Combinations that cannot work: each says why, or nothing.
REFUSALS: tuple[Callable[[Settings], str | None], ...] = (
    _async_is_alone,
    _async_adds_one_rank_at_a_time,
    _exact_is_equal,
    _overlap_ends_in_its_round,
    _fragments_come_in_turn,
    _groups_measure_no_outliers,
    _variates_are_of_equal_ranks,
    _variates_need_the_average_itself,
    _corrections_are_of_all_steps,
)


def choose(sync_every: Any, options: dict[str, Any]) -> Settings:
    """The settings for a front end's arguments.

    Raises:
        TypeError: there is no such option.
        ValueError: as ``Settings``.
    """
    names = [each.name for each in fields(Settings)]
    if unknown := [name for name in options if name not in names]:
        raise TypeError(f"There is no option {unknown[0]!r}. Options are: {', '.join(names)}.")
    chosen = Settings(sync_every=sync_every, **options)
    if not isinstance(chosen.outer, Mean) and not isinstance(chosen.schedule, Constant):
        warnings.warn(
            f"With {chosen.schedule} rounds have different lengths, and outer={chosen.outer!r} takes their changes as equal: with "
            "growing rounds it is published to be worse than plain averaging. Prefer a constant sync_every.",
            stacklevel=3,
        )
    return chosen


def check_needs(chosen: Settings, known: Collection[str], front_end: str) -> None:
    """Raise unless the front end knows what the schedule and the outer step look at.

    Raises:
        ValueError: it does not.
    """
    if unknown := chosen.needs - set(known):
        raise ValueError(
            f"{chosen.schedule} needs the {' and the '.join(sorted(unknown))}, which {front_end} does not see. LocalSGDCallback does, and "
            "ModelAverager is told by tell()."
        )


_Class = TypeVar("_Class", bound=type)


def shown(front_end: _Class) -> _Class:
    """Decorates a class whose constructor takes ``sync_every`` and ``**options``: help() shows each by name.

    ``{options}`` in its docstring becomes their documentation.
    """
    described = []
    for each in fields(Settings):
        text = f"{each.name}: {each.metadata['text']}"
        described.append(textwrap.fill(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 12))
    if front_end.__doc__:
        front_end.__doc__ = front_end.__doc__.replace("        {options}", "\n".join(described))
    signature = inspect.signature(front_end.__init__)  # type: ignore[misc]
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for each in fields(Settings):
        if each.name not in signature.parameters:
            parameters.append(inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default))
    front_end.__init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[misc]
    return front_end


def _words(value: Any) -> str:
    if not hasattr(value, "get_config"):
        return repr(value)
    config = {key: item for key, item in value.get_config().items() if key != "name"}  # Keras numbers its objects
    return f"{type(value).__name__} {config}"
