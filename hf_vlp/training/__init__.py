"""Training: the trainer and its arguments, stages, LoRA, checkpoints, the sanity pass, the feature cache."""

from importlib import import_module
from typing import Any

# Public name -> module that defines it; resolved on first use, so that `import hf_vlp.training` stays cheap.
_EXPORTS: dict[str, str] = {
    "DataArguments": "data",
    "VLPTrainingArguments": "arguments",
    "parse_arguments": "arguments",
    "apply_stage": "freezing",
    "StageReport": "freezing",
    "VLPTrainer": "trainer",
    "LoraArguments": "lora",
    "add_lora": "lora",
    "merged_state_dict": "lora",
    "FeatureCache": "feature_cache",
    "newest_checkpoint": "checkpoints",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
