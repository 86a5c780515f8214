"""Where what was built for this machine is kept."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """Outside the tree: ``$XDG_CACHE_HOME/hvd_localsgd``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_localsgd"
