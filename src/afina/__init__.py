"""Afina: from a file of examples to a language model that answers, with proof at every step.

    import afina
    run = afina.train("recipe.yaml")
    afina.evaluate(run)
    afina.export(run)

Importing this loads no torch: the verbs load what they need.
"""

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "AfinaError",
    "chat",
    "evaluate",
    "export",
    "export_ratings",
    "init",
    "open_artifact",
    "prune",
    "rate",
    "run",
    "serve",
    "train",
]

_HOMES = {
    "AfinaError": ("afina.errors", "AfinaError"),
    "chat": ("afina.pipeline", "chat"),
    "evaluate": ("afina.pipeline", "evaluate"),
    "export": ("afina.pipeline", "export"),
    "init": ("afina.pipeline", "init"),
    "export_ratings": ("afina.pipeline", "export_ratings"),
    "open_artifact": ("afina.artifact", "open_artifact"),
    "prune": ("afina.compression", "prune"),
    "rate": ("afina.pipeline", "rate"),
    "run": ("afina.pipeline", "run"),
    "serve": ("afina.pipeline", "serve"),
    "train": ("afina.pipeline", "train"),
}


class _Package(ModuleType):
    """Keeps `afina.train` the verb: importing the room of that name would otherwise put the room in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afina' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
