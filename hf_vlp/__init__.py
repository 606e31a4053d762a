"""hf_vlp: vision-language pretraining on the Hugging Face stack.

Importing the package is cheap: names are resolved on first use, and the Auto classes and pipelines of transformers
learn of our architectures when they are themselves first imported.
"""

from importlib import import_module
from typing import Any

from hf_vlp._registration import register as _register

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS: dict[str, str] = {}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_register()
