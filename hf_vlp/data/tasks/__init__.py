"""Data of the tasks on top: sources, records and collators for question answering, reasoning, entailment, dialogs and
grounding. Names are resolved on first use."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "TASKS": "sources",
    "DialogCollator": "collators",
    "TaskDataset": "records",
    "TaskIterableDataset": "records",
    "VQACollator": "collators",
    "VisualEntailmentCollator": "collators",
    "VisualReasoningCollator": "collators",
    "dialog_text": "dialogs",
    "load_task": "sources",
    "task_records": "records",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
