"""BLIP-2 checkpoints of LAVIS, to the native format and back.

LAVIS writes one state dict for everything (`visual_encoder.`, `Qformer.`, `opt_model.` …), often without the parts
that it froze: those are taken from their own files.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_vlp.models.catalog import ARCHITECTURES, architecture_of
from hf_vlp.models.loading import MissingWeightsError

# Names by which an original checkpoint is known.
_ORIGINAL_PREFIXES = ("Qformer.", "visual_encoder.", "ln_vision.", "opt_model.", "t5_model.", "opt_proj.", "t5_proj.")

# Original prefix -> ours, in the order in which they are tried.
_QFORMER = (
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.embeddings.word_embeddings.", "embeddings.word_embeddings."),
    ("Qformer.bert.embeddings.position_embeddings.", "embeddings.position_embeddings."),
    ("Qformer.bert.encoder.", "qformer.encoder."),
    ("ln_vision.", "vision_model.post_layernorm."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("itm_head.", "itm_head."),
    ("query_tokens", "query_tokens"),
    ("opt_proj.", "language_projection."),
    ("t5_proj.", "language_projection."),
    ("opt_model.", "language_model."),
    ("t5_model.", "language_model."),
)
# Original name -> name in the pretraining model, beside the retrieval model.
_EXTRAS = {
    "temp": "temperature",
    "Qformer.cls.predictions.bias": "itg_head.bias",
    "Qformer.cls.predictions.transform.dense.weight": "itg_head.dense.weight",
    "Qformer.cls.predictions.transform.dense.bias": "itg_head.dense.bias",
    "Qformer.cls.predictions.transform.LayerNorm.weight": "itg_head.LayerNorm.weight",
    "Qformer.cls.predictions.transform.LayerNorm.bias": "itg_head.LayerNorm.bias",
}
# Second names of tensors that the original stores twice: copy -> original.
_TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
    "opt_model.lm_head.weight": "opt_model.model.decoder.embed_tokens.weight",
    "t5_model.encoder.embed_tokens.weight": "t5_model.shared.weight",
    "t5_model.decoder.embed_tokens.weight": "t5_model.shared.weight",
}
_EVA = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
)
_EVA_BLOCK = (
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("attn.proj.", "self_attn.projection."),
    ("attn.qkv.weight", "self_attn.qkv.weight"),
    ("mlp.", "mlp."),
)
_CLIP = (
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1.", "embeddings.patch_embedding."),
    ("ln_pre.", "pre_layrnorm."),
)
_CLIP_BLOCK = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
# What a vision file holds beside the tower that BLIP-2 reads.
_NOT_READ = ("fc_norm.", "head.", "norm.", "ln_post.", "proj", "mask_token", "lm_head.")


def is_original(names: Any) -> bool:
    """Whether tensor names are those of LAVIS."""
    return any(name.startswith(_ORIGINAL_PREFIXES) for name in names)


def read_original(path: str | Path) -> dict[str, Tensor]:
    """Reads a checkpoint file without running code from it; `{"model": ...}` and DDP prefixes are taken off.

    Args:
        path: `.safetensors`, or a file of `torch.save`, which is read with `weights_only=True`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        checkpoint: Mapping[str, Any] = load_file(path)
    else:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    return {name.removeprefix("module."): value for name, value in checkpoint.items() if isinstance(value, Tensor)}


def original_weights(folder: str | Path) -> dict[str, Tensor] | None:
    """The weights of a local folder whose tensors have LAVIS' names; None for any other folder, Hub id or none."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    for path in [folder / "model.safetensors", folder / "pytorch_model.bin", *sorted(folder.glob("*.pth"))]:
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                if not is_original(file.keys()):
                    continue
        state = read_original(path)
        if is_original(state):
            return state
    return None


def vision_kind(state: Mapping[str, Tensor]) -> str | None:
    """`"eva"`, `"clip"`, or None for a checkpoint without its tower."""
    if any(name.startswith("visual_encoder.blocks.") for name in state):
        return "eva"
    if any(name.startswith("visual_encoder.transformer.resblocks.") for name in state):
        return "clip"
    return None


def _rename(name: str, table: tuple[tuple[str, str], ...], *, back: bool = False) -> str | None:
    for theirs, ours in table:
        source, target = (ours, theirs) if back else (theirs, ours)
        if name == source or (source.endswith((".", "qkv.weight")) and name.startswith(source)):
            return target + name[len(source) :]
    return None


def _tower_from_original(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Weights under the names of `Blip2VisionModel` or `CLIPVisionModel`, from names without `visual_encoder.`."""
    own: dict[str, Tensor] = {}
    table, block, blocks = (
        (_EVA, _EVA_BLOCK, "blocks") if kind == "eva" else (_CLIP, _CLIP_BLOCK, "transformer.resblocks")
    )
    left = []
    for name, value in state.items():
        match = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", name)
        if not match:
            renamed = _rename(name, table)
            if renamed is not None:
                own[renamed] = value
            elif not name.startswith(_NOT_READ):
                left.append(name)
            continue
        prefix, rest = f"encoder.layers.{match[1]}.", match[2]
        renamed = _rename(rest, block)
        if renamed is not None:
            own[prefix + renamed] = value
        elif kind == "eva" and rest == "attn.q_bias":
            # The original fixes the keys' bias at zero, which the softmax would not see anyway.
            values = state[f"{blocks}.{match[1]}.attn.v_bias"]
            own[f"{prefix}self_attn.qkv.bias"] = torch.cat([value, torch.zeros_like(value), values])
        elif kind == "clip" and rest.startswith("attn.in_proj_"):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                own[f"{prefix}self_attn.{letter}_proj.{rest.removeprefix('attn.in_proj_')}"] = part.contiguous()
        elif rest != "attn.v_bias":
            left.append(name)
    if left:
        raise ValueError(f"the original vision tower has tensors without a counterpart: {left[:8]}")
    return own


def from_original(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Original names to native ones.

    Args:
        state: what `read_original` gives; may lack parts that were frozen.

    Returns:
        Weights of the inference model (of stage 1 or 2), and weights that only `Blip2ForPreTraining` has, under its
        names.

    Raises:
        ValueError: tensors without a counterpart; the message names them.
    """
    kind = vision_kind(state)
    model: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    left = []
    tower = {
        name.removeprefix("visual_encoder."): v for name, v in state.items() if name.startswith("visual_encoder.")
    }
    if tower:
        prefix = "vision_model." if kind == "eva" else "vision_model.tower."
        model |= {prefix + name: value for name, value in _tower_from_original(tower, kind or "eva").items()}
    for name, value in state.items():
        if name.startswith("visual_encoder.") or name.endswith("position_ids"):
            continue
        if name in _EXTRAS:
            extras[_EXTRAS[name]] = value
        elif name in _TIED:
            if name.startswith(("opt_model", "t5_model")):
                model["language_model." + name.split(".", 1)[1]] = value
        else:
            renamed = _rename(name, _QFORMER)
            if renamed is None:
                left.append(name)
            else:
                if renamed.startswith("qformer."):
                    renamed = re.sub(r"\.(attention|crossattention)\.self\.", r".\1.attention.", renamed)
                model[renamed] = value
    if left:
        raise ValueError(f"tensors of the original without a counterpart in BLIP-2: {left[:8]}")
    return model, extras


def to_original(
    state: Mapping[str, Tensor], extras: Mapping[str, Tensor] | None = None, *, language_model: str | None = None
) -> dict[str, Tensor]:
    """Inverse of `from_original`.

    Args:
        state: state dict of an inference model of stage 1 or 2.
        extras: `Blip2ForPreTraining.pretraining_extras()`, if there are any.
        language_model: `"opt"` or `"t5"`, for a model of stage 2.

    Raises:
        ValueError: tensors that the original does not have, or no `language_model` for a model of stage 2.
    """
    if any(name.startswith("language_model.") for name in state) and language_model not in ("opt", "t5"):
        raise ValueError("say which language model of LAVIS this is: language_model='opt' or 't5'")
    table = tuple(
        (theirs, ours)
        for theirs, ours in _QFORMER
        if not theirs.startswith({"opt": "t5_", "t5": "opt_"}.get(language_model, " "))
    )
    original: dict[str, Tensor] = {}
    left = []
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        if name.startswith("vision_model.") and not name.startswith("vision_model.post_layernorm."):
            renamed = _tower_to_original(name, value, state, original)
        else:
            renamed = _rename(name, table, back=True)
        if renamed is None:
            left.append(name)
        elif renamed:
            renamed = re.sub(r"(\.layer\.\d+\.(?:cross)?attention)\.attention\.", r"\1.self.", renamed)
            original[renamed] = value
    for theirs, ours in _EXTRAS.items():
        if extras and ours in extras:
            original[theirs] = extras[ours]
    for copy_name, name in _TIED.items():
        if name in original and not (copy_name.startswith("Qformer.cls") and not extras):
            original.setdefault(copy_name, original[name])
    if left:
        raise ValueError(f"tensors that the original does not have: {left[:8]}")
    return original


def _tower_to_original(
    name: str, value: Tensor, state: Mapping[str, Tensor], original: dict[str, Tensor]
) -> str | None:
    """Original name of a tower's tensor; an empty one if it was dealt with here, None if there is none."""
    clip = name.startswith("vision_model.tower.")
    name = name.removeprefix("vision_model.").removeprefix("tower.")
    if clip and name.startswith("post_layernorm."):
        return ""
    table, block, blocks = (_CLIP, _CLIP_BLOCK, "transformer.resblocks") if clip else (_EVA, _EVA_BLOCK, "blocks")
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if not match:
        renamed = _rename(name, table, back=True)
        return None if renamed is None else f"visual_encoder.{renamed}"
    prefix, rest = f"visual_encoder.{blocks}.{match[1]}.", match[2]
    renamed = _rename(rest, block, back=True)
    if renamed is not None:
        return prefix + renamed
    if not clip and rest == "self_attn.qkv.bias":
        query, _, values = value.chunk(3)
        original[f"{prefix}attn.q_bias"], original[f"{prefix}attn.v_bias"] = query.contiguous(), values.contiguous()
        return ""
    packed = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest)
    if clip and packed:
        if packed[1] == "q":
            parts = [
                state[f"vision_model.tower.encoder.layers.{match[1]}.self_attn.{x}_proj.{packed[2]}"] for x in "qkv"
            ]
            original[f"{prefix}attn.in_proj_{packed[2]}"] = torch.cat(parts)
        return ""
    return None


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    found = [int(m[1]) for name in state if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return 1 + max(found, default=-1)


def config_from_original(
    state: Mapping[str, Tensor],
    *,
    text_config: PreTrainedConfig | None = None,
    vision_heads: int | None = None,
    qformer_heads: int | None = None,
    image_token_id: int | None = None,
    num_text_positions: int = 512,
) -> PreTrainedConfig:
    """Reads the sizes of an original model off its shapes.

    Args:
        state: original state dict with its vision tower.
        text_config: of the language model, for stage 2.
        vision_heads: by default width / 88 for EVA-ViT and width / 64 for CLIP, as in the published towers.
        qformer_heads: by default width / 64.
        image_token_id: of the stage-2 processor.
        num_text_positions: of a Q-Former without text branch, which has no table of them.

    Raises:
        ValueError: the checkpoint has no vision tower, or a language model but no `text_config`.
    """
    kind = vision_kind(state)
    if kind is None:
        raise ValueError(
            "the checkpoint has no vision tower (LAVIS leaves frozen parts out); pass the tower's own file as `vision`"
        )
    stage2 = "opt_proj.weight" in state or "t5_proj.weight" in state
    if stage2 and text_config is None:
        raise ValueError("this is a checkpoint of stage 2: pass the config of its language model as `text_config`")
    encoder = "visual_encoder."
    if kind == "eva":
        width, _, patch, _ = state[encoder + "patch_embed.proj.weight"].shape
        positions = state[encoder + "pos_embed"].shape[1]
        vision = {
            "hidden_size": width,
            "intermediate_size": state[encoder + "blocks.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": _depth(state, encoder + "blocks"),
            "num_attention_heads": vision_heads or max(width // 88, 1),
            "qkv_bias": encoder + "blocks.0.attn.q_bias" in state,
        }
    else:
        width, _, patch, _ = state[encoder + "conv1.weight"].shape
        positions = state[encoder + "positional_embedding"].shape[0]
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": state[encoder + "transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _depth(state, encoder + "transformer.resblocks"),
            "num_attention_heads": vision_heads or max(width // 64, 1),
            "hidden_act": "quick_gelu",
        }
    vision |= {"patch_size": patch, "image_size": patch * round((positions - 1) ** 0.5)}
    _, queries, hidden = state["query_tokens"].shape
    layers = "Qformer.bert.encoder.layer"
    crossing = sorted(
        int(m[1]) for name in state if (m := re.match(rf"{layers}\.(\d+)\.crossattention\.self\.key\.weight", name))
    )
    depth = _depth(state, layers)
    words = state.get("Qformer.bert.embeddings.word_embeddings.weight")
    places = state.get("Qformer.bert.embeddings.position_embeddings.weight")
    qformer = {
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": qformer_heads or max(hidden // 64, 1),
        "intermediate_size": state[f"{layers}.0.intermediate_query.dense.weight"].shape[0],
        "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else depth,
        "encoder_hidden_size": width,
        "use_qformer_text_input": f"{layers}.0.intermediate.dense.weight" in state,
        "max_position_embeddings": num_text_positions if places is None else places.shape[0],
    }
    if words is not None:
        qformer["vocab_size"] = words.shape[0]
    extra: dict[str, Any] = {}
    if text_config is not None:
        text_config = exact_gelu(text_config)
        extra |= {"text_config": text_config.to_dict(), "image_token_index": image_token_id}
    if "vision_proj.weight" in state:
        extra["image_text_hidden_size"] = state["vision_proj.weight"].shape[0]
    config_class = ARCHITECTURES["blip-2" if kind == "eva" else "blip2_any_vision"].load("config")
    return config_class(vision_config=vision, qformer_config=qformer, num_query_tokens=queries, **extra)


def exact_gelu(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a T5 as LAVIS runs it: the gated feed-forward with the exact GELU, where Flan-T5's has its tanh
    form.

    transformers reads `"gated-gelu"` as the tanh form whatever `dense_act_fn` says, so the exact one goes by its
    other name. Other configs are returned as they are.
    """
    if getattr(config, "feed_forward_proj", None) != "gated-gelu":
        return config
    return type(config)(
        **{**config.to_dict(), "feed_forward_proj": "gated-gelu_python", "dense_act_fn": "gelu_python"}
    )


def with_vision_file(state: Mapping[str, Tensor], vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An original checkpoint completed by the tower's own file, whose last block BLIP-2 does not read.

    Args:
        state: without tower.
        vision: of EVA-ViT (`blocks.…`) or OpenAI's CLIP (`visual.transformer.…`, or without `visual.`).
    """
    vision = {name.removeprefix("visual."): value for name, value in vision.items()}
    blocks = "blocks" if "blocks.0.attn.qkv.weight" in vision else "transformer.resblocks"
    last = f"{blocks}.{_depth(vision, blocks) - 1}."
    known = (
        "cls_token",
        "pos_embed",
        "patch_embed.",
        "class_embedding",
        "positional_embedding",
        "conv1.",
        "ln_pre.",
        f"{blocks}.",
    )
    tower = {name: v for name, v in vision.items() if name.startswith(known) and not name.startswith(last)}
    return {**state, **{f"visual_encoder.{name}": value for name, value in tower.items()}}


def model_from_original(
    state: Mapping[str, Tensor],
    *,
    vision: Mapping[str, Tensor] | None = None,
    language_model: PreTrainedModel | None = None,
    config: PreTrainedConfig | None = None,
    **config_options: Any,
) -> PreTrainedModel:
    """The model that an original checkpoint holds, in float32.

    Args:
        state: original state dict.
        vision: state dict of the tower's own file, if `state` lacks it.
        language_model: the language model, if `state` lacks it; its `config` serves as `text_config`.
        config: by default `config_from_original(state, **config_options)`.

    Returns:
        `Blip2ForPreTraining` if the checkpoint has the heads of stage 1, else `Blip2ForConditionalGeneration` (stage
        2).

    Raises:
        MissingWeightsError: parts are missing and were not given; ValueError: as of `config_from_original`.
    """
    if vision is not None:
        state = with_vision_file(state, vision)
    if language_model is not None:
        config_options.setdefault("text_config", language_model.config)
    config = config or config_from_original(state, **config_options)
    weights, extras = from_original(state)
    weights = {name: v.float() if v.is_floating_point() else v for name, v in weights.items()}
    stage1 = "itm_head.weight" in state
    model = architecture_of(config).load("retrieval" if stage1 else "captioning")(config)
    if language_model is not None:
        weights |= {f"language_model.{name}": value for name, value in language_model.state_dict().items()}
    load_native_weights(model, weights)
    if not stage1:
        return model.eval()
    pretraining = architecture_of(config).load("pretraining").from_inference_model(model)
    if extras:
        pretraining.load_extras({name: value.float() for name, value in extras.items()})
    return pretraining.eval()


def load_native_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Loads converted weights into a native model, complete or not at all.

    Raises:
        MissingWeightsError: `weights` lack some.
    """
    head, embedding = "language_model.lm_head.weight", "language_model.shared.weight"
    if head in weights and embedding in weights and not torch.equal(weights[head], weights[embedding]):
        # transformers ties T5's output head to its embeddings whatever the config says.
        model.language_model.lm_head.weight = torch.nn.Parameter(weights[head].clone())
    own = model.state_dict()
    optional = ("vision_model.tower.post_layernorm.", "vision_model.tower.embeddings.position_ids")
    missing = [
        name
        for name in own
        if name not in weights and not name.startswith(optional) and not name.endswith("position_ids")
    ]
    if missing:
        raise MissingWeightsError(
            f"the original checkpoint lacks weights of {type(model).__name__}: {missing[:8]}", missing
        )
    model.load_state_dict({**own, **weights}, strict=True)


def convert_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    language_model: PreTrainedModel | None = None,
    **config_options: Any,
) -> PreTrainedModel:
    """Writes an original checkpoint as a native folder (with the side file of stage 1).

    Args:
        path: file of LAVIS.
        out: folder to write.
        vision: the tower's own file, if `path` lacks it.
        language_model: the language model, if `path` lacks it.
        config_options: of `config_from_original`.
    """
    tower = None if vision is None else read_original(vision)
    model = model_from_original(read_original(path), vision=tower, language_model=language_model, **config_options)
    if hasattr(model, "export"):
        model.export(out)
    else:
        model.save_pretrained(out)
    return model


def save_original(model: PreTrainedModel, path: str | Path) -> None:
    """Writes a model of either stage under LAVIS' names, as safetensors."""
    extras, language_model = None, None
    if hasattr(model, "retrieval"):
        extras, model = model.pretraining_extras(), model.retrieval
    elif hasattr(model, "language_model"):
        language_model = "opt" if model.config.use_decoder_only_language_model else "t5"
    state = to_original(model.state_dict(), extras, language_model=language_model)
    save_file(
        {name: v.detach().cpu().clone().contiguous() for name, v in state.items()}, path, metadata={"format": "pt"}
    )


__all__ = [
    "config_from_original",
    "convert_checkpoint",
    "from_original",
    "is_original",
    "load_native_weights",
    "model_from_original",
    "original_weights",
    "read_original",
    "save_original",
    "to_original",
    "with_vision_file",
]
