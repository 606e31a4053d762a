"""Data of the tasks on top: sources, records and collators for question answering, reasoning, entailment, dialogs and
grounding. Names are resolved on first use."""

from hf_vlp._exports import lazy_exports

# Public name -> module that defines it.
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
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
