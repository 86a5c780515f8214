"""Which variables are averaged, by name or by a function."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any


class Names:
    """Patterns of names, or a function that takes a variable and says whether it is meant.

    A pattern has ``*`` and ``?`` as file names do, and means a variable by its whole path, by the end of it, or by a layer it is
    in: ``"moving_mean"``, ``"dense_3/kernel"``, ``"encoder"``.

    Args:
        chosen: a pattern, several, or a function.

    Raises:
        ValueError: something else, or nothing.
    """

    def __init__(self, chosen: Any) -> None:
        patterns = [chosen] if isinstance(chosen, str) else chosen
        if not callable(patterns):
            patterns = list(patterns) if isinstance(patterns, list | tuple | set | frozenset) else []
            if not patterns or not all(isinstance(each, str) and each for each in patterns):
                raise ValueError(f"Expected a pattern of names, several, or a function. Received: {chosen!r}")
        self._patterns: Any = patterns

    def __contains__(self, named: tuple[str, Any]) -> bool:
        path, variable = named
        if callable(self._patterns):
            return bool(self._patterns(variable))
        return any(_means(pattern, path) for pattern in self._patterns)

    def get_config(self) -> dict[str, Any]:
        """The patterns; of a function its name, and a hash of its code, which all ranks compare."""
        return {"chosen": function_words(self._patterns) if callable(self._patterns) else self._patterns}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Names:
        """The inverse; a function is not saved, only its words, which match nothing."""
        return cls(config["chosen"])

    def __repr__(self) -> str:
        return repr(self.get_config()["chosen"])


def as_names(chosen: Any) -> Names | None:
    """None passes, and so do ``Names``; all else is made one."""
    return chosen if chosen is None or isinstance(chosen, Names) else Names(chosen)


def select(
    variables: Sequence[Any], name: Callable[[Any], str], include: Names | None, exclude: Names | None
) -> list[Any]:
    """Those that are included, if anything is said of that, and not excluded.

    Raises:
        ValueError: a choice means none of the variables.
    """
    named = [(name(variable), variable) for variable in variables]
    for option, names in (("include", include), ("exclude", exclude)):
        if names is not None and not any(pair in names for pair in named):
            known = ", ".join(path for path, _ in named[:8])
            raise ValueError(f"{option}={names!r} means none of the variables that would be averaged: {known}, ...")
    chosen = [pair for pair in named if include is None or pair in include]
    return [variable for path, variable in chosen if exclude is None or (path, variable) not in exclude]


def path_of(variable: Any) -> str:
    """Keras' path, or a name; arrays have none."""
    return str(getattr(variable, "path", getattr(variable, "name", "")))


def means_and_variances(variables: Sequence[Any]) -> list[tuple[Any, Any]]:
    """BatchNorm's moving means, each with the variance that belongs to it: by their names."""
    pairs, waiting = [], dict[str, list[Any]]()  # layers may share a name: then the first mean has the first variance
    for variable in variables:
        path = path_of(variable)
        if "moving_mean" in path:
            waiting.setdefault(path.replace("moving_mean", "moving_variance"), []).append(variable)
        elif waiting.get(path):
            pairs.append((waiting[path].pop(0), variable))
    return pairs


def function_words(function: Any) -> str:
    """Its name, and a hash of its code: the same on two ranks only if the functions are."""
    code = getattr(function, "__code__", None)
    digest = hashlib.sha256(code.co_code + repr(code.co_consts).encode()).hexdigest()[:12] if code else ""
    return f"{getattr(function, '__qualname__', function)} {digest}"


def _means(pattern: str, path: str) -> bool:
    return fnmatchcase(f"/{path}/", f"*/{pattern}/*")
