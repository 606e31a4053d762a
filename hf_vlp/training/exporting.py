"""What a trained model is saved as for use."""

from pathlib import Path
from typing import Any

from torch import nn

from hf_vlp.models.catalog import ARCHITECTURES
from hf_vlp.models.pretraining import PreTrainingMixin
from hf_vlp.training.lora import ADAPTER_FOLDER, lora_layers, save_adapter


def export_model(model: nn.Module, processor: Any, folder: Path, card: Any = None) -> None:
    """Saves a trained model for use: see `VLPTrainer.export`. A type outside the catalogue is saved as it is."""
    from hf_vlp.hub import save_for_hub

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in ARCHITECTURES:
        save_for_hub(model, processor, folder, card=card)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    if isinstance(model, PreTrainingMixin):
        model.save_extras(folder)
    if lora_layers(model):
        save_adapter(model, folder / ADAPTER_FOLDER)
