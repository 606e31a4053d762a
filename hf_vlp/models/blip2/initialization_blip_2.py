"""Where BLIP-2's weights come from when there is no BLIP-2 checkpoint yet: a vision tower and a BERT."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, Blip2QFormerConfig, PreTrainedConfig, PreTrainedModel

from hf_vlp.models.catalog import ARCHITECTURES

# Config entries that BERT and the Q-Former have in common.
_SHARED_WITH_BERT = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)


@dataclass
class Start:
    """A config and the weights that are known before training; what `state` does not name starts at random.

    Attributes:
        config: of the retrieval model.
        state: weights of the retrieval model by name.
        head: weights of the image-grounded text head by name.
    """

    config: PreTrainedConfig
    state: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)

    def load_into(self, model: nn.Module, prefix: str = "") -> None:
        """Copies `state` into the parameters of `model`; a larger embedding keeps its further rows."""
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.state.items():
                parameter = own.get(prefix + name)
                if parameter is not None:
                    parameter[: len(value)].copy_(value)


def resize_positions(table: Tensor, grid: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Position embeddings for another number of patches: bicubic, the class token's kept.

    Args:
        table: (1 + old patches, hidden), of a square grid.
        grid: new rows and columns of patches.
        align_corners: False as LAVIS does for EVA-ViT, True as it does for CLIP-ViT.

    Raises:
        ValueError: the old patches do not form a square.
    """
    old = round((len(table) - 1) ** 0.5)
    if old * old != len(table) - 1:
        raise ValueError(f"{len(table) - 1} patch positions form no square grid, so they cannot be resized")
    if (old, old) == grid:
        return table
    patches = table[1:].T.reshape(1, -1, old, old).float()
    patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=align_corners)
    return torch.cat([table[:1], patches[0].flatten(1).T.to(table.dtype)])


def load_vision_tower(
    source: str | PreTrainedModel | PreTrainedConfig, drop_last_layers: int | None = None
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Config and weights of a vision tower in the native EVA layout (`Blip2VisionModel`).

    Args:
        source: a BLIP-2 or EVA-CLIP folder or Hub id, a `Blip2VisionModel` or a model that has one, or a
            `Blip2VisionConfig` for a tower from scratch.
        drop_last_layers: how many of the last blocks to leave out. By default one for EVA-CLIP, whose last block has
            specialised in its own objective (section 3.1: "the second last layer's output features"), and none for a
            BLIP-2, whose tower is cut already.

    Returns:
        The `Blip2VisionConfig` and the weights by their names in `Blip2VisionModel`; without weights for a config. A
        tower that was cut has no `post_layernorm` among them, as that belonged to the last block.

    Raises:
        ValueError: `source` has no tower of this layout, or fewer layers than are to be dropped.
    """
    if isinstance(source, str):
        model_type = AutoConfig.from_pretrained(source).model_type if not _is_ours(source) else "eva_clip"
        if model_type == "eva_clip":
            source = ARCHITECTURES["eva_clip"].load("model").from_pretrained(source)
        elif model_type == "blip-2":
            config = AutoConfig.from_pretrained(source)
            source = getattr(transformers, config.architectures[0]).from_pretrained(source)
        else:
            source = transformers.AutoModel.from_pretrained(source)
    if isinstance(source, PreTrainedConfig):
        config, state, trained_with = copy.deepcopy(source), {}, source.model_type
    else:
        trained_with = source.config.model_type
        tower = getattr(source, "vision_model", source)
        config, state = copy.deepcopy(tower.config), dict(tower.state_dict())
    if config.model_type != "blip_2_vision_model":
        raise ValueError(
            f"{config.model_type!r} is not the layout of BLIP-2's native vision tower (blip_2_vision_model); a "
            "tower of another kind makes a model of type 'blip2_any_vision'"
        )
    drop = drop_last_layers if drop_last_layers is not None else int(trained_with == "eva_clip")
    if not drop:
        return config, state
    if drop >= config.num_hidden_layers:
        raise ValueError(f"cannot drop {drop} of {config.num_hidden_layers} vision layers")
    config.num_hidden_layers -= drop
    dropped = tuple(f"encoder.layers.{config.num_hidden_layers + i}." for i in range(drop))
    return config, {name: v for name, v in state.items() if not name.startswith((*dropped, "post_layernorm."))}


def _is_ours(source: str) -> bool:
    return PreTrainedConfig.get_config_dict(source)[0].get("model_type") == "eva_clip"


def qformer_config_from_bert(
    bert: PreTrainedConfig, *, vocab_size: int, cross_attention_frequency: int, encoder_hidden_size: int
) -> Blip2QFormerConfig:
    """The Q-Former that BERT's weights fit into, with a text branch.

    Raises:
        ValueError: `bert` is not of type BERT.
    """
    if bert.model_type not in ("bert", "blip_2_qformer"):
        raise ValueError(f"the Q-Former starts from BERT, not from a model of type {bert.model_type!r}")
    if bert.model_type == "bert" and bert.hidden_act != "gelu":
        raise ValueError(f"the Q-Former's activation is 'gelu', this BERT's {bert.hidden_act!r}")
    return Blip2QFormerConfig(
        **{name: getattr(bert, name) for name in _SHARED_WITH_BERT},
        vocab_size=vocab_size,
        cross_attention_frequency=cross_attention_frequency,
        encoder_hidden_size=encoder_hidden_size,
        use_qformer_text_input=True,
    )


def qformer_from_bert(bert: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """BERT's weights under the names of the retrieval model, and those of its prediction head.

    The feed-forward of each layer goes to the text branch and, as in LAVIS, also to the queries' branch. BERT's
    segment embeddings have no place in the Q-Former; cross-attention has none in BERT.

    Args:
        bert: state dict of `BertModel`, `BertForMaskedLM` or `BertForPreTraining`.

    Returns:
        Weights of `Blip2ForImageTextRetrieval` and weights of `ImageGroundedTextHead` (empty without a prediction
        head).
    """
    bert = {name.removeprefix("bert."): value for name, value in bert.items()}
    state = {
        f"embeddings.{name}": bert[f"embeddings.{name}"]
        for name in ("word_embeddings.weight", "position_embeddings.weight")
    }
    for end in ("weight", "bias"):
        state[f"qformer.layernorm.{end}"] = bert[f"embeddings.LayerNorm.{end}"]
    for name, value in bert.items():
        if not name.startswith("encoder.layer."):
            continue
        name = "qformer." + name.replace(".attention.self.", ".attention.attention.")
        state[name] = value
        _, _, _, index, part, *rest = name.split(".")
        if part in ("intermediate", "output"):
            state[".".join(["qformer.encoder.layer", index, f"{part}_query", *rest])] = value
    head = {
        own: bert[f"cls.predictions.{theirs}"]
        for own, theirs in (
            ("dense.weight", "transform.dense.weight"),
            ("dense.bias", "transform.dense.bias"),
            ("LayerNorm.weight", "transform.LayerNorm.weight"),
            ("LayerNorm.bias", "transform.LayerNorm.bias"),
            ("bias", "bias"),
        )
        if f"cls.predictions.{theirs}" in bert
    }
    return state, head


def start_from_vision_and_qformer(
    vision: str | PreTrainedModel | PreTrainedConfig,
    qformer: str | PreTrainedModel | PreTrainedConfig,
    *,
    vocab_size: int | None = None,
    num_query_tokens: int = 32,
    cross_attention_frequency: int = 2,
    image_text_hidden_size: int = 256,
    image_size: int | None = None,
    drop_last_layers: int | None = None,
) -> Start:
    """The retrieval model of stage 1 before its first step; see "
    "`Blip2ForPreTraining.from_vision_qformer_pretrained`."""
    vision_config, tower = load_vision_tower(vision, drop_last_layers)
    if image_size is not None and image_size != vision_config.image_size:
        vision_config.image_size = image_size
        if tower:
            side = image_size // vision_config.patch_size
            name = "embeddings.position_embedding"
            tower[name] = resize_positions(tower[name][0], (side, side))[None]
    bert: Mapping[str, Tensor] = {}
    if isinstance(qformer, str):
        qformer = AutoModelForMaskedLM.from_pretrained(qformer, dtype=torch.float32)
    if isinstance(qformer, PreTrainedModel):
        bert, qformer = qformer.state_dict(), qformer.config
    config = transformers.Blip2Config(
        vision_config=vision_config.to_dict(),
        qformer_config=qformer_config_from_bert(
            qformer,
            vocab_size=vocab_size or qformer.vocab_size + 1,
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=vision_config.hidden_size,
        ).to_dict(),
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=image_text_hidden_size,
    )
    start = Start(config, {f"vision_model.{name}": value for name, value in tower.items()})
    if bert:
        state, start.head = qformer_from_bert(bert)
        start.state |= state
    return start


def text_free_config(config: Any) -> dict[str, Any]:
    """The Q-Former config of stage 2, which has no text branch."""
    return {**config.to_dict(), "use_qformer_text_input": False}


__all__ = ["Start", "load_vision_tower", "qformer_from_bert", "resize_positions", "start_from_vision_and_qformer"]
