"""Training: the trainer and its arguments, stages, LoRA, checkpoints, the sanity pass, the feature cache."""

from hf_vlp._exports import lazy_exports

# Public name -> module that defines it.
_EXPORTS = {
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

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
