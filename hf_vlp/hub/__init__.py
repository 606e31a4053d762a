"""Saving models so that the world can load them: folders with their code, model cards, verification, push."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "CardData": "hf_vlp.hub.card",
    "Metric": "hf_vlp.hub.card",
    "metrics_from_result": "hf_vlp.hub.card",
    "render_card": "hf_vlp.hub.card",
    "write_card": "hf_vlp.hub.card",
    "recipe_of": "hf_vlp.hub.card",
    "complete_folder": "hf_vlp.hub.saving",
    "save_for_hub": "hf_vlp.hub.saving",
    "VerificationError": "hf_vlp.hub.verification",
    "VerificationReport": "hf_vlp.hub.verification",
    "verify_folder": "hf_vlp.hub.verification",
    "FolderError": "hf_vlp.hub.pushing",
    "PushError": "hf_vlp.hub.pushing",
    "check_folder": "hf_vlp.hub.pushing",
    "push": "hf_vlp.hub.pushing",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
