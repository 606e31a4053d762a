"""Training objectives as pure functions of tensors: no model, no config, no state. Resolved on first use."""

from importlib import import_module
from typing import Any

_EXPORTS: dict[str, str] = {
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


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
