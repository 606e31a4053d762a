"""hf_vlp: vision-language pretraining on the Hugging Face stack.

Importing the package is cheap: names are resolved on first use, and the Auto classes and pipelines of transformers
learn of our architectures when they are themselves first imported.
"""

from importlib import import_module
from typing import Any

from hf_vlp._registration import register as _register

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS: dict[str, str] = {
    "AlbefForPreTraining": "hf_vlp.models.albef.pretraining_albef",
    "Blip2ForConditionalGeneration": "hf_vlp.models.blip2.modeling_blip_2",
    "Blip2ForImageTextRetrieval": "hf_vlp.models.blip2.modeling_blip_2",
    "Blip2ForPreTraining": "hf_vlp.models.blip2.pretraining_blip_2",
    "Blip2Processor": "hf_vlp.models.blip2.processing_blip_2",
    "CLIPForPreTraining": "hf_vlp.models.clip.pretraining_clip",
    "CLIPModel": "hf_vlp.models.clip.modeling_clip",
    "CLIPProcessor": "hf_vlp.models.clip.processing_clip",
    "VLPTrainer": "hf_vlp.training",
    "VLPTrainingArguments": "hf_vlp.training",
    "load_pairs": "hf_vlp.data",
    "load_shapes": "hf_vlp.data",
    "run_evaluation": "hf_vlp.evaluation",
    "save_for_hub": "hf_vlp.hub",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_register()
