"""Saving models so that the world can load them: folders with their code, model cards, verification, push."""

from hf_vlp._exports import lazy_exports

# Public name -> module that defines it.
_EXPORTS = {
    "CardData": "card",
    "Metric": "card",
    "metrics_from_result": "card",
    "name_repository": "card",
    "render_card": "card",
    "write_card": "card",
    "recipe_of": "card",
    "complete_folder": "saving",
    "save_for_hub": "saving",
    "VerificationError": "verification",
    "VerificationReport": "verification",
    "verify_folder": "verification",
    "FolderError": "pushing",
    "PushError": "pushing",
    "check_folder": "pushing",
    "push": "pushing",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
