"""What BLIP's models share: loading that fails loudly, image size, special tokens, starting from other models."""

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, BlipConfig, PreTrainedConfig, PreTrainedModel

from hf_vlp.models.albef.modeling_albef import _load_tower, interpolate_positions
from hf_vlp.models.blip.vision_blip import encode_images
from hf_vlp.models.blip2.backbone_blip_2 import SMALLEST_SANE_STD, MissingWeightsError

# The original's losses smooth their labels by so much everywhere, in ranking too.
LABEL_SMOOTHING = 0.1


@contextmanager
def _sane_initialisation(config: BlipConfig) -> Any:
    """The native vision config's `initializer_range` of 1e-10 means "comes from a checkpoint": a tower that starts
    from it has no signal. The config itself is left as it was.
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


def enc_token_id(config: BlipConfig) -> int:
    """Id of [ENC], the first token of texts that look at an image.

    The native config does not name it; in its checkpoints it is the token behind [DEC], which is `bos_token_id`.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    text = config.text_config
    own = getattr(text, "enc_token_id", None)
    if own is None and text.bos_token_id is not None:
        own = text.bos_token_id + 1
    if own is None or not 0 <= own < text.vocab_size:
        raise ValueError(
            f"[ENC] would be token {own}, but the text model has {text.vocab_size}: set "
            "config.text_config.enc_token_id"
        )
    return own


def use_tokenizer(config: BlipConfig, tokenizer: Any) -> None:
    """Takes the ids of [PAD], [SEP], [DEC] and [ENC] from a tokenizer that `BlipProcessor` prepared.

    Raises:
        ValueError: the tokenizer lacks one of them, or has more tokens than the text model.
    """
    text = config.text_config
    enc = tokenizer.convert_tokens_to_ids("[ENC]")
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
        "enc_token_id": enc,
    }
    lacking = [name for name, value in ids.items() if value is None or value == tokenizer.unk_token_id]
    if lacking:
        raise ValueError(
            f"the tokenizer has no {lacking}: take a BERT tokenizer and prepare it with add_blip_tokens(tokenizer)"
        )
    if max(ids.values()) >= text.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text model {text.vocab_size}")
    for name, value in ids.items():
        setattr(text, name, value)


class BlipBackboneMixin:
    """Mixed in before a native BLIP class: kernels, image sizes, and weights that must be there."""

    # The way through the modules here takes the kernels that transformers offers; the native classes write theirs out.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        # A copy: the native classes refuse a config that names a kernel which these classes know.
        config = copy.deepcopy(config)
        for part in (config.vision_config, config.text_config):
            part._attn_implementation_internal = "eager"
        with _sane_initialisation(config):
            super().__init__(config, *args, **kwargs)
        implementation = self.config._attn_implementation
        for module in self.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config._attn_implementation_internal = implementation

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        allow_missing: bool = False,
        image_size: int | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, except that weights which the checkpoint lacks are an error.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            allow_missing: initialise missing weights at random, to train a new head.
            image_size: interpolate the position embedding to it.

        Raises:
            MissingWeightsError: the checkpoint lacks weights; the message names the parts.
        """
        model, information = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = sorted(information["missing_keys"])
        if missing and not allow_missing:
            parts = sorted({name.split(".")[0] for name in missing})
            raise MissingWeightsError(
                f"{pretrained_model_name_or_path} has no {cls.__name__}: it lacks {len(missing)} weights in {parts}, "
                f"such as {missing[0]}. Load it with the class that saved it (`architectures` in config.json), or "
                "pass allow_missing=True to train a new head",
                missing,
            )
        if image_size is not None:
            model.set_image_size(image_size)
        return (model, information) if output_loading_info else model

    def encode_images(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(I, 3, H, W) to all tokens of the image encoder (I, K, width), the class token first."""
        return encode_images(self.vision_model, pixel_values, interpolate_pos_encoding)

    def set_image_size(self, image_size: int) -> None:
        """Interpolates the position embedding for images of another size (bicubic, as the original does on loading).

        Args:
            image_size: new height and width in pixels, a multiple of the patch size.
        """
        resize_tower(self.vision_model, image_size)
        self.config.vision_config.image_size = image_size

    @property
    def enc_token_id(self) -> int:
        """Id of [ENC]."""
        return enc_token_id(self.config)

    @property
    def dec_token_id(self) -> int:
        """Id of [DEC], the first token of texts that the decoder reads."""
        if self.config.text_config.bos_token_id is None:
            raise ValueError("config.text_config.bos_token_id is not set: it names [DEC]")
        return self.config.text_config.bos_token_id


def resize_tower(tower: nn.Module, image_size: int) -> None:
    """Interpolates the position embedding of a native vision model in place."""
    embeddings = tower.embeddings
    patch = embeddings.patch_size
    if image_size % patch:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch size {patch}")
    patches = (image_size // patch) ** 2
    positions = embeddings.position_embedding
    if positions.shape[1] != patches + 1:
        resized = interpolate_positions(positions.data, patches)
        embeddings.position_embedding = nn.Parameter(resized, requires_grad=positions.requires_grad)
    embeddings.image_size = tower.config.image_size = image_size
    embeddings.num_patches, embeddings.num_positions = patches, patches + 1


def text_fields(text: PreTrainedConfig, vocab_size: int) -> dict[str, Any]:
    """Fields of `BlipTextConfig` for a BERT with a vocabulary of another size."""
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        "hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "pad_token_id",
        "initializer_range",
    )  # fmt: skip
    return {name: getattr(text, name) for name in names} | {"vocab_size": vocab_size}


def vision_fields(vision: PreTrainedConfig) -> dict[str, Any]:
    """Fields of `BlipVisionConfig` for a ViT."""
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
        "hidden_act", "layer_norm_eps",
    )  # fmt: skip
    return {name: getattr(vision, name) for name in names}


def vision_state(vision: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of a ViT of transformers under the names of a `BlipVisionModel`.

    Raises:
        ValueError: this is neither a ViT nor a BLIP vision model.
    """
    from hf_vlp.models.albef.conversion_albef import vision_to_original
    from hf_vlp.models.blip.conversion_blip import vision_from_original

    state = vision.state_dict()
    if vision.config.model_type == "blip_vision_model":
        return state
    if vision.config.model_type == "deit":
        raise ValueError("a DeiT with a distillation token does not fit; take a ViT (model_type 'vit')")
    if vision.config.model_type != "vit":
        raise ValueError(f"BLIP's image encoder is a ViT (model_type 'vit'); got a {vision.config.model_type!r}")
    kept = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    return vision_from_original(vision_to_original(kept))


def load_text_source(name: str) -> tuple[dict[str, Tensor], PreTrainedConfig]:
    """Weights of a BERT under the names of `BlipTextLMHeadModel` (`bert.…`, `cls.predictions.…`), and its config.

    Raises:
        ValueError: this is no BERT.
    """
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "bert":
        raise ValueError(f"{name} is a {config.model_type!r} model; BLIP's text side is a BERT (model_type 'bert')")
    model, information = AutoModelForMaskedLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    missing = [key for key in information["missing_keys"] if not key.startswith("cls.")]
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} parameters of a BERT, such as {missing[0]}")
    state = {n: v for n, v in model.state_dict().items() if "token_type" not in n and "pooler" not in n}
    return state, config


@torch.no_grad()
def load_rows(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Copies weights whose names `module` has; of larger tables (new tokens) the first rows. Gives what it lacked."""
    own = dict(module.state_dict(keep_vars=True))
    for name, value in state.items():
        if name in own:
            own[name].data[: len(value)].copy_(value)
    return sorted(set(own) - set(state))


def load_vision(name: str) -> PreTrainedModel:
    """A vision model of transformers, by folder or Hub id."""
    vision = _load_tower(name)
    return getattr(vision, "vision_model", vision)
