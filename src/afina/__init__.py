"""Afina: from a file of examples to a language model that answers, with proof at every step.

    import afina
    run = afina.train("recipe.yaml")
    afina.evaluate(run)
    afina.export(run)

Importing this loads no torch: the verbs load what they need.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["AfinaError", "chat", "evaluate", "export", "init", "open_artifact", "run", "train"]

_HOMES = {
    "AfinaError": ("afina.errors", "AfinaError"),
    "chat": ("afina.pipeline", "chat"),
    "evaluate": ("afina.pipeline", "evaluate"),
    "export": ("afina.pipeline", "export"),
    "init": ("afina.pipeline", "init"),
    "open_artifact": ("afina.artifact", "open_artifact"),
    "run": ("afina.pipeline", "run"),
    "train": ("afina.pipeline", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afina' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
