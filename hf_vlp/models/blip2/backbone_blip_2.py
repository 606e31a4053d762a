"""What both BLIP-2 models share: the frozen vision tower and its cached outputs, loading that fails loudly, guards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from hf_vlp.models.blip2.conversion_blip_2 import from_original, original_weights
from hf_vlp.models.loading import MissingWeightsError

SMALLEST_SANE_STD = 1e-6


class ImageTokenError(ValueError):
    """The number of image tokens in `input_ids` is not the number of query tokens of the model."""


@contextmanager
def _sane_initialisation(config: PreTrainedConfig) -> Iterator[None]:
    """Initialises a vision tower that has no checkpoint with a standard deviation at which it can learn.

    The native vision config's `initializer_range` of 1e-10 means "comes from a checkpoint": a tower that starts from
    it has no signal and no gradient. The config itself is left as it was.
    """
    vision = config.vision_config
    stored = getattr(vision, "initializer_range", None)
    if stored is None or stored >= SMALLEST_SANE_STD:
        yield
        return
    vision.initializer_range = config.initializer_range
    try:
        yield
    finally:
        vision.initializer_range = stored


# Modules of the Q-Former whose parts `qformer.py` calls one by one.
WALKED_MODULES = {
    "Blip2QFormerMultiHeadAttention",
    "Blip2TextEmbeddings",
    "InstructBlipQFormerMultiHeadAttention",
    "InstructBlipQFormerEmbeddings",
}


def drop_walked_modules(model: nn.Module) -> None:
    """Keeps FSDP from making units of modules whose own `forward` is never called, which would stay sharded."""
    model._no_split_modules = set(model._no_split_modules or ()) - WALKED_MODULES


class Blip2BackboneMixin:
    """What both models share: the frozen tower, its cached outputs, loading that fails loudly, training guards."""

    # Parameters whose type matters in training; the language model answers for itself.
    _master_weight_modules: ClassVar[tuple[str, ...]] = ("qformer",)

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        with _sane_initialisation(config):
            super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        super().post_init()
        drop_walked_modules(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # The native class starts from zeros: queries that are all alike get the same gradient and stay alike.
            init.normal_(self.query_tokens, std=self.config.qformer_config.initializer_range)

    @classmethod
    def weights_from_original(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under LAVIS' names as weights of this class."""
        return from_original(state)[0]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        allow_missing: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, except that weights which the checkpoint lacks are an error.

        Args:
            pretrained_model_name_or_path: folder or Hub id; also a local folder with a native `config.json` and
                weights under LAVIS' names, as its authors saved them.
            allow_missing: initialise missing weights at random, as transformers does.

        Raises:
            MissingWeightsError: the checkpoint lacks weights; the message names the parts and the keys.
        """
        source = pretrained_model_name_or_path
        original = original_weights(source) if isinstance(source, str | PathLike) else None
        if original is not None:
            # Not by transformers' registry of conversions: it would write LAVIS' names into every folder saved from a
            # model that was made in memory.
            kwargs["state_dict"] = cls.weights_from_original(original)
            if kwargs.get("config") is None:
                kwargs["config"] = cls.config_class.from_pretrained(source)
            source = None
        model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing and not allow_missing:
            raise MissingWeightsError(_missing_message(cls, pretrained_model_name_or_path, missing), missing)
        return (model, info) if output_loading_info else model

    def tower_parts(self) -> dict[str, nn.Module]:
        """The vision tower by its modules, less the LayerNorm behind it, which BLIP-2 trains."""
        return {
            "vision_model.embeddings": self.vision_model.embeddings,
            "vision_model.encoder": self.vision_model.encoder,
        }

    def frozen_parts(self) -> dict[str, nn.Module]:
        """Towers that may be frozen: they run without autograd and in eval mode while none of their weights train."""
        return {name: part for name, part in self.tower_parts().items() if not trains(part)}

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for part in self.frozen_parts().values():
            part.eval()
        return self

    def tower_states(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Output of the vision tower before its trained LayerNorm; what a feature cache stores.

        Args:
            pixel_values: (B, 3, H, W).
            interpolate_pos_encoding: resize the position table to the image; needed at other resolutions.

        Returns:
            (B, 1 + patches, vision hidden). Without autograd if the tower is frozen.
        """
        tower = self.vision_model
        self._check_image_size(pixel_values, interpolate_pos_encoding)
        frozen = not any(map(trains, self.tower_parts().values()))
        with torch.no_grad() if frozen else nullcontext():
            states = tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
            return tower.encoder(inputs_embeds=states).last_hidden_state

    def _check_image_size(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> None:
        size = self.vision_model.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if tuple(pixel_values.shape[-2:]) != size and not interpolate_pos_encoding:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[-2:])} pixels, the vision tower was made for {size}: "
                "resize the images with the model's processor, or pass interpolate_pos_encoding=True"
            )

    def image_features(
        self,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Image features as the Q-Former sees them: (B, 1 + patches, vision hidden), after the trained LayerNorm.

        Args:
            pixel_values: (B, 3, H, W) images, or
            image_embeds: (B, 1 + patches, vision hidden) their cached `tower_states`, in any float type.

        Raises:
            ValueError: none or both were given, or the features do not have the tower's width.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("pass either pixel_values or image_embeds (cached outputs of the vision tower), not both")
        if image_embeds is None:
            image_embeds = self.tower_states(pixel_values, interpolate_pos_encoding)
        norm = self.vision_model.post_layernorm
        if image_embeds.shape[-1] != norm.normalized_shape[0]:
            raise ValueError(
                f"image_embeds are {image_embeds.shape[-1]} wide, this model's vision tower "
                f"{norm.normalized_shape[0]}; they were cached from another tower"
            )
        return norm(image_embeds.to(norm.weight.dtype))

    def check_master_weights(self) -> None:
        """Refuses to train float16 master weights, which overflow and round small updates away.

        Raises:
            TypeError: a trainable weight of the Q-Former is float16.
        """
        for part in self._master_weight_modules:
            for name, parameter in getattr(self, part).named_parameters():
                if parameter.dtype == torch.float16 and parameter.requires_grad:
                    raise TypeError(
                        f"{part}.{name} is a float16 master weight, which BLIP-2's Q-Former cannot be trained "
                        "with; load the model with dtype=torch.float32 and use mixed precision (bf16=True or "
                        "fp16=True in the training arguments), or call model.float()"
                    )


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _missing_message(cls: type, source: Any, missing: Sequence[str]) -> str:
    parts = sorted({name.split(".")[0] for name in missing})
    shown = ", ".join(missing[:8]) + (f", … ({len(missing)} in all)" if len(missing) > 8 else "")
    advice = "check that it is a whole checkpoint of this class"
    if issubclass(cls, transformers.Blip2ForImageTextRetrieval) and "itm_head" in parts:
        advice = "stage-2 checkpoints have no retrieval heads; use the stage-1 checkpoint"
    return (
        f"{source} lacks weights of {cls.__name__} in {parts}: {shown}. Training would go on with random ones; "
        f"{advice}, or pass allow_missing=True if that is meant"
    )


def reject_unknown(cls: type, kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        raise TypeError(f"{cls.__name__} does not know the arguments {sorted(kwargs)}; it would ignore them")
