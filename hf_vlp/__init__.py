"""hf_vlp: vision-language pretraining on the Hugging Face stack.

Importing the package is cheap: names are resolved on first use, and the Auto classes and pipelines of transformers
learn of our architectures when they are themselves first imported.
"""

from hf_vlp._exports import lazy_exports
from hf_vlp._registration import register as _register

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS = {
    "AlbefForPreTraining": "models.albef.pretraining_albef",
    "Blip2ForConditionalGeneration": "models.blip2.modeling_blip_2",
    "Blip2ForImageTextRetrieval": "models.blip2.modeling_blip_2",
    "Blip2ForPreTraining": "models.blip2.pretraining_blip_2",
    "Blip2Processor": "models.blip2.processing_blip_2",
    "CLIPForPreTraining": "models.clip.pretraining_clip",
    "CLIPModel": "models.clip.modeling_clip",
    "CLIPProcessor": "models.clip.processing_clip",
    "VLPTrainer": "training",
    "VLPTrainingArguments": "training",
    "load_pairs": "data",
    "load_shapes": "data",
    "run_evaluation": "evaluation",
    "save_for_hub": "hub",
}

__all__ = ["__version__", *_EXPORTS]
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)


_register()
