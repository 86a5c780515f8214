"""What of ours is found in the files of saved models, whichever of Keras and this package is imported first.

Nothing here loads Keras: ``import hvd_localsgd`` calls ``when_keras_is_there``. What the core lets users choose is registered itself, what is made
of TensorFlow by a stand-in.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "hvd_localsgd"
_NEED_TENSORFLOW = ("InverseTimeDecay", "LocalSGDOptimizer")


class StandIn:
    """Registered under the name of one of our classes until that is imported, and registers itself.

    Keras calls ``from_config`` and nothing else. The class itself would bring TensorFlow, which Keras may be running on
    or not, and which itself imports Keras before it is complete.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def from_config(self, config: dict[str, Any]) -> Any:
        """An object of the class."""
        return getattr(import_module(PACKAGE), self.name).from_config(config)


class AfterKeras(MetaPathFinder):
    """Finds Keras as the other finders do, and registers our names once it has run.

    Keras reads a dictionary of its own, and has no entry point or other hook to fill it at its import.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of Keras; None for everything else, which is then looked for elsewhere."""
        if fullname != "keras":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Tell Keras the classes of the core, and a stand-in for each of the others that is not imported yet."""
    saving: Any = getattr(sys.modules["keras"], "saving", None)
    if not hasattr(saving, "get_custom_objects"):
        return  # an old Keras, which nobody has asked to work with us yet
    from hvd_localsgd.core import groups, guards, outer, schedules, selection

    chosen = (groups.Groups, guards.Norms, guards.Outliers, selection.Names)
    for part in (*schedules.SCHEDULES, *outer.OUTERS, *chosen):
        saving.register_keras_serializable(PACKAGE)(part)
    for name in _NEED_TENSORFLOW:
        saving.get_custom_objects().setdefault(f"{PACKAGE}>{name}", StandIn(name))


def when_keras_is_there() -> None:
    """Register now, or when Keras is imported."""
    if sys.modules.get("keras") is not None:
        register()
    else:
        sys.meta_path.insert(0, AfterKeras())
