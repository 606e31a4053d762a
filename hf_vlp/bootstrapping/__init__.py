"""CapFilt (arXiv 2201.12086, section 3.3): captions are proposed and noisy texts dropped, as a resumable data job."""

from importlib import import_module
from typing import Any

# Public name -> module that defines it.
_EXPORTS = {
    "CapFiltArguments": "arguments",
    "CapFiltSettings": "job",
    "Captioner": "captioner",
    "JobError": "ledger",
    "SeededNucleus": "sampling",
    "SettingsChanged": "ledger",
    "Source": "sources",
    "TextFilter": "text_filter",
    "capfilt": "job",
    "model_fingerprint": "fingerprint",
    "open_source": "sources",
    "read_texts": "ledger",
    "run_arguments": "arguments",
    "sampling_seed": "sampling",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
