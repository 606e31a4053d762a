"""Training objectives as pure functions of tensors: no model, no config, no state. Resolved on first use."""

from hf_vlp._exports import lazy_exports

# Public name -> module that defines it.
_EXPORTS = {
    "AllLabelsIgnoredError": "language",
    "ContrastiveOutput": "contrastive",
    "HardNegatives": "matching",
    "MaskedTokens": "language",
    "NoNegativesError": "matching",
    "PaddingInLabelsError": "language",
    "cached_backward": "gradient_cache",
    "cached_step": "gradient_cache",
    "contrastive_loss": "contrastive",
    "distillation_loss": "distillation",
    "distilled_targets": "distillation",
    "gather": "distributed",
    "global_mean": "distributed",
    "hard_negatives": "matching",
    "language_modeling_loss": "language",
    "mask_tokens": "language",
    "matching_loss": "matching",
    "query_contrastive_loss": "contrastive",
    "sigmoid_loss": "sigmoid",
    "world": "distributed",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
