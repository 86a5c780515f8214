"""Where what was built for this machine is kept."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def folder() -> Path:
    """Outside the tree: ``$XDG_CACHE_HOME/hvd_localsgd``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_localsgd"


def library(stem: str, *built_from: str) -> Path:
    """The shared library that was built from this source, and whatever else it depends on: other sources have other names."""
    return folder() / f"{stem}-{hashlib.sha256(chr(10).join(built_from).encode()).hexdigest()[:12]}.so"


def load(path: Path, loader: Callable[[str], Any], what: str, errors: tuple[type[Exception], ...] = (OSError,)) -> Any:
    """What the loader makes of a library; None if it has not been built, or, with a warning, not for a machine like this."""
    if not path.exists():
        return None
    try:
        return loader(str(path))
    except errors as error:
        warnings.warn(f"going on without the compiled {what}; build it on this machine: {error}", stacklevel=3)
        return None
