"""The trainable form of `blip2_any_vision`: the shipping classes with everything that our BLIP-2 classes add.

A saved folder carries the shipping files, not this one.
"""

import os
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from hf_vlp.models.blip2 import modeling_blip2_any_vision as shipping
from hf_vlp.models.blip2.backbone_blip_2 import trains
from hf_vlp.models.blip2.configuration_blip2_any_vision import Blip2AnyVisionConfig
from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval


class AnyVisionMixin:
    """What differs from the native type: where the tower's parts are, and how a folder is saved."""

    shipping_class: ClassVar[type[PreTrainedModel]]

    def tower_parts(self) -> dict[str, nn.Module]:
        return {"vision_model.tower": self.vision_model.tower}

    def tower_states(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        self._check_image_size(pixel_values, interpolate_pos_encoding)
        frozen = not trains(self.vision_model.tower)
        with torch.no_grad() if frozen else nullcontext():
            return self.vision_model.states(pixel_values, interpolate_pos_encoding)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        if kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            # Only the class and its file are looked at.
            custom_object_save(object.__new__(self.shipping_class), save_directory, config=self.config)
        super().save_pretrained(save_directory, *args, **kwargs)


class Blip2AnyVisionForImageTextRetrieval(
    AnyVisionMixin, Blip2ForImageTextRetrieval, shipping.Blip2AnyVisionForImageTextRetrieval
):
    """`Blip2ForImageTextRetrieval` on any vision model of transformers."""

    config: Blip2AnyVisionConfig
    config_class = Blip2AnyVisionConfig
    shipping_class = shipping.Blip2AnyVisionForImageTextRetrieval
    _auto_class = None


class Blip2AnyVisionForConditionalGeneration(
    AnyVisionMixin, Blip2ForConditionalGeneration, shipping.Blip2AnyVisionForConditionalGeneration
):
    """`Blip2ForConditionalGeneration` on any vision model of transformers."""

    config: Blip2AnyVisionConfig
    config_class = Blip2AnyVisionConfig
    shipping_class = shipping.Blip2AnyVisionForConditionalGeneration
    _auto_class = None


__all__ = ["Blip2AnyVisionForConditionalGeneration", "Blip2AnyVisionForImageTextRetrieval"]
