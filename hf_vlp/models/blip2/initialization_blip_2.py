"""Where BLIP-2's weights come from when there is no BLIP-2 checkpoint yet: a vision tower and a BERT."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, Blip2QFormerConfig, PreTrainedConfig, PreTrainedModel

from hf_vlp.models.catalog import ARCHITECTURES, saved_settings
from hf_vlp.models.loading import load_backbone

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


# Towers trained by contrast alone: the last block has specialised in that, so BLIP-2 takes "the second last layer's
# output features" (section 3.1).
_CUT_BY_DEFAULT = ("eva_clip", "clip", "clip_vision_model")
NATIVE_TOWER = "blip_2_vision_model"


def load_vision_tower(
    source: str | PreTrainedModel | PreTrainedConfig, drop_last_layers: int | None = None
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Config and weights of a vision tower, cut to the depth at which BLIP-2 reads it.

    Args:
        source: folder or Hub id of a BLIP-2, EVA-CLIP, CLIP or any vision model of transformers; such a model; or a
            vision config for a tower from scratch.
        drop_last_layers: how many of the last blocks to leave out. By default one for EVA-CLIP and CLIP, and none
            otherwise (a BLIP-2's tower is cut already) or for a config.

    Returns:
        The tower's config, and its weights by their names in the tower; none for a config. A native tower that was
        cut has no `post_layernorm` among them, as that belonged to the last block.

    Raises:
        MissingWeightsError: the checkpoint lacks weights of the tower.
        ValueError: the tower has no plain stack of blocks to be cut, or too few.
    """
    if isinstance(source, str):
        model_type = saved_settings(source).get("model_type")
        kind: Any = transformers.AutoModel
        if model_type in ("eva_clip", "blip2_any_vision"):
            kind = ARCHITECTURES[model_type].load("model")
        elif model_type == "blip-2":
            kind = getattr(transformers, AutoConfig.from_pretrained(source).architectures[0])
        # A ViT's pooler stands behind the states that are read; many checkpoints have none.
        source = load_backbone(kind, source, part="vision_model", optional=("pooler.",))
    if isinstance(source, PreTrainedConfig):
        tower, config, state = None, copy.deepcopy(source), {}
    else:
        tower = getattr(source, "vision_model", source)
        tower = getattr(tower, "tower", tower)
        config, state = copy.deepcopy(tower.config), dict(tower.state_dict())
    if drop_last_layers is None:
        drop_last_layers = int(tower is not None and source.config.model_type in _CUT_BY_DEFAULT)
    if not drop_last_layers:
        return config, state
    depth = config.num_hidden_layers
    if drop_last_layers >= depth:
        raise ValueError(f"cannot drop {drop_last_layers} of {depth} vision layers")
    config = _of_depth(config, depth - drop_last_layers)
    if tower is None:
        return config, state
    stack = next(
        (name for name, part in tower.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth), None
    )
    if stack is None or is_hierarchical(config):
        raise ValueError(
            f"{type(tower).__name__} is no plain stack of blocks, so none can be left out; pass drop_last_layers=0"
        )
    gone = [f"{stack}.{config.num_hidden_layers + i}." for i in range(drop_last_layers)]
    if config.model_type == NATIVE_TOWER:
        gone.append("post_layernorm.")
    return config, {name: value for name, value in state.items() if not name.startswith(tuple(gone))}


def _of_depth(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The config with fewer layers, and without the names of layers that it may have listed."""
    listed = ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names")
    settings = {name: value for name, value in config.to_dict().items() if name not in listed}
    return type(config)(**{**settings, "num_hidden_layers": depth})


def is_hierarchical(config: PreTrainedConfig) -> bool:
    """Whether a vision model works in stages of growing width (Swin, PVT): only its final output is meaningful."""
    return any(hasattr(config, name) for name in ("depths", "hidden_sizes", "embed_dims"))


def resize_tower(config: PreTrainedConfig, state: dict[str, Tensor], image_size: int) -> None:
    """Fits a tower's config and weights to another image size, in place, as LAVIS does when it loads one.

    Raises:
        ValueError: the tower's position table is of no known layout.
    """
    old = config.image_size
    if image_size == old or [image_size, image_size] == list(old if isinstance(old, list | tuple) else ()):
        return
    config.image_size = image_size
    if not state:
        return
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    grid = (image_size // patch, image_size // patch)
    if config.model_type == NATIVE_TOWER:
        name = "embeddings.position_embedding"
        state[name] = resize_positions(state[name][0], grid)[None]
    elif config.model_type == "clip_vision_model":
        name = "embeddings.position_embedding.weight"
        state[name] = resize_positions(state[name], grid, align_corners=True)
    else:
        raise ValueError(
            f"the position embeddings of a {config.model_type!r} tower cannot be resized on loading; leave "
            "image_size out and call the model with interpolate_pos_encoding=True"
        )


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
    """The retrieval model of stage 1 before its first step.

    Args: as of `Blip2ForPreTraining.from_vision_qformer_pretrained`; `vocab_size` is the number of word embeddings, by
        default one more than BERT's, for [DEC].

    Raises:
        MissingWeightsError: a checkpoint lacks weights of the tower or of BERT.
    """
    vision_config, tower = load_vision_tower(vision, drop_last_layers)
    if image_size is not None:
        resize_tower(vision_config, tower, image_size)
    bert: Mapping[str, Tensor] = {}
    if isinstance(qformer, str):
        # Without BERT's prediction head that of image-grounded generation is new.
        qformer = load_backbone(AutoModelForMaskedLM, qformer, optional=("cls.",), dtype=torch.float32)
    if isinstance(qformer, PreTrainedModel):
        bert, qformer = qformer.state_dict(), qformer.config
    native = vision_config.model_type == NATIVE_TOWER
    config_class = ARCHITECTURES["blip-2" if native else "blip2_any_vision"].load("config")
    extra = {"vision_output": "last_hidden_state"} if is_hierarchical(vision_config) else {}
    config = config_class(
        vision_config=vision_config.to_dict(),
        qformer_config=qformer_config_from_bert(
            qformer,
            vocab_size=vocab_size or qformer.vocab_size + 1,
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=vision_config.hidden_size,
        ).to_dict(),
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=image_text_hidden_size,
        **extra,
    )
    prefix = "vision_model." if native else "vision_model.tower."
    start = Start(config, {prefix + name: value for name, value in tower.items()})
    if bert:
        state, start.head = qformer_from_bert(bert)
        start.state |= state
    return start


def start_from_generation(source: str, bert: str | None = None, *, vocab_size: int) -> Start:
    """The retrieval model of stage 1 before its first step, from a BLIP-2 that has a language model already.

    Tower, queries and the queries' side of the Q-Former are that model's, whose language model is not read. The text
    side is what such a model lacks: word embeddings and feed-forwards come from a BERT, or are new.

    Args:
        source: folder or Hub id, e.g. of `hf-vlp new`.
        bert: folder or Hub id of the BERT that the text side starts from; it has to be of the Q-Former's sizes.
        vocab_size: number of word embeddings.

    Raises:
        MissingWeightsError: a checkpoint lacks weights of the tower, of the queries' side, or of BERT.
        ValueError: the BERT has other sizes.
    """
    architecture = ARCHITECTURES[saved_settings(source)["model_type"]]
    saved = architecture.load("config").from_pretrained(source)
    qformer = saved.qformer_config
    extra = ("vision_output", "vision_layer_norm_eps")
    config = architecture.load("config")(
        vision_config=saved.vision_config.to_dict(),
        qformer_config={**qformer.to_dict(), "use_qformer_text_input": True, "vocab_size": vocab_size},
        num_query_tokens=saved.num_query_tokens,
        image_text_hidden_size=saved.image_text_hidden_size,
        **{name: getattr(saved, name) for name in extra if hasattr(saved, name)},
    )
    new = (
        *("embeddings.", "vision_projection.", "text_projection.", "itm_head."),
        *(
            f"qformer.encoder.layer.{index}.{part}."
            for index in range(qformer.num_hidden_layers)
            for part in ("intermediate", "output")
        ),
    )
    # The class that is to be trained refuses what lacks its heads; here they are known to be new.
    retrieval = load_backbone(
        architecture.load("retrieval"), source, optional=new, config=config, allow_missing=True, dtype=torch.float32
    )
    start = Start(config, {name: value for name, value in retrieval.state_dict().items() if not name.startswith(new)})
    if bert is not None:
        words = load_backbone(AutoModelForMaskedLM, bert, optional=("cls.",), dtype=torch.float32)
        sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
        for name in sizes:
            if getattr(words.config, name) != getattr(qformer, name):
                raise ValueError(
                    f"the Q-Former of {source} has {name} {getattr(qformer, name)}, {bert} has "
                    f"{getattr(words.config, name)}; give the BERT that it was made from, or none"
                )
        state, start.head = qformer_from_bert(words.state_dict())
        start.state |= {name: value for name, value in state.items() if name.startswith(new)}
    return start


def text_free_config(config: Any) -> dict[str, Any]:
    """The Q-Former config of stage 2, which has no text branch."""
    return {**config.to_dict(), "use_qformer_text_input": False}


__all__ = [
    "Start",
    "load_vision_tower",
    "qformer_from_bert",
    "resize_positions",
    "start_from_generation",
    "start_from_vision_and_qformer",
]
