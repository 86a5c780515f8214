"""The algorithm, with numpy alone: no Keras, no TensorFlow, no MPI. ``engine.LocalSGD`` is where to begin."""

from hvd_localsgd.core import (
    agreement,
    engine,
    failures,
    header,
    huge_pages,
    layout,
    outer,
    pipeline,
    progress,
    protocol,
    reducers,
    schedules,
    settings,
    stages,
    theory,
    timing,
)

__all__ = [
    "agreement",
    "engine",
    "failures",
    "header",
    "huge_pages",
    "layout",
    "outer",
    "pipeline",
    "progress",
    "protocol",
    "reducers",
    "schedules",
    "settings",
    "stages",
    "theory",
    "timing",
]
