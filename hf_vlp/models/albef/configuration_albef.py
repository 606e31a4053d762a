"""Configuration of ALBEF (Li et al. 2021, "Align before Fuse", arXiv 2107.07651)."""

import copy
from typing import Any

from transformers import AutoConfig, BertConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class AlbefTextConfig(BertConfig):
    """BERT whose upper layers look at an image: BERT's own fields and those below.

    Args:
        fusion_layer: layers below it encode the text alone; each layer from it on has cross-attention. 0 gives every
            layer cross-attention (the answer decoder), `num_hidden_layers` gives none.
        encoder_width: width of what the cross-attention looks at (the vision tower's width; for the answer decoder
            the text encoder's).
        images_per_text: 1, or 2 for statements about a pair of images: each fusion layer then becomes two, the first
            of which looks at the first image and the second at the second.
        mask_token_id: [MASK], for masked language modelling.

    `is_decoder` makes self-attention causal; `bos_token_id` and `eos_token_id` are the tokens that answers start and
    end with ([CLS] and [SEP]).
    """

    model_type = "albef_text"
    base_config_key = "text_config"

    fusion_layer: int = 6
    encoder_width: int = 768
    images_per_text: int = 1
    mask_token_id: int | None = None

    @property
    def num_fusion_layers(self) -> int:
        """Number of layers with cross-attention, twins counted as two."""
        return (self.num_hidden_layers - self.fusion_layer) * self.images_per_text

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 <= self.fusion_layer <= self.num_hidden_layers:
            raise ValueError(
                f"fusion_layer is {self.fusion_layer}, but the text tower has {self.num_hidden_layers} layers: "
                f"choose 0 to {self.num_hidden_layers}"
            )
        if self.images_per_text not in (1, 2):
            raise ValueError(f"images_per_text is {self.images_per_text}: a text looks at 1 or 2 images")


class AlbefConfig(PreTrainedConfig):
    """Configuration of every ALBEF model.

    Args:
        vision_config: the image encoder, any vision model of transformers whose first token is the class token
            (default: ViT-B/16 at 256 px, layer norms with the 1e-6 of the original).
        text_config: text and fusion encoder in one stack, see `AlbefTextConfig`.
        decoder_config: the answer decoder, only for `AlbefForQuestionAnswering`; made from `text_config` when that
            class is built without it.
        projection_dim: width of the space in which image and text are contrasted.
        temperature_init_value: start of the learned temperature, by which similarities are divided.
    """

    model_type = "albef"
    _auto_class = "AutoConfig"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="vit", init_kwargs={"image_size": 256, "layer_norm_eps": 1e-6}
        ),
        "text_config": AlbefTextConfig,
        "decoder_config": SubConfigSpec(config_class=AlbefTextConfig, optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    temperature_init_value: float = 0.07
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.text_config.encoder_width = self.vision_config.hidden_size

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Takes the ids of [PAD], [CLS], [SEP] and [MASK] from a tokenizer.

        Raises:
            ValueError: the tokenizer lacks one of them, or has more tokens than the text tower.
        """
        names = {"pad_token": "pad", "cls_token": "bos", "sep_token": "eos", "mask_token": "mask"}
        lacking = [name for name in names if getattr(tokenizer, f"{name}_id", None) is None]
        if lacking:
            raise ValueError(f"the tokenizer has no {lacking}: take a BERT-like one with [PAD] [CLS] [SEP] [MASK]")
        if len(tokenizer) > self.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the text tower {self.text_config.vocab_size}: "
                "resize the embeddings (model.resize_token_embeddings) or take the tokenizer of this BERT"
            )
        for part in (self.text_config, self.decoder_config):
            for name, ours in names.items():
                if part is not None:
                    setattr(part, f"{ours}_token_id", getattr(tokenizer, f"{name}_id"))

    def with_decoder(self) -> "AlbefConfig":
        """A copy that has an answer decoder: as deep as the fusion encoder, over the text encoder's states."""
        config = copy.deepcopy(self)
        if config.decoder_config is None:
            decoder = copy.deepcopy(self.text_config)
            decoder.num_hidden_layers = self.text_config.num_hidden_layers - self.text_config.fusion_layer
            decoder.fusion_layer = 0
            decoder.encoder_width = self.text_config.hidden_size
            decoder.is_decoder = True
            config.decoder_config = decoder
        return config


__all__ = ["AlbefConfig", "AlbefTextConfig"]
