"""Checkpoints of OpenAI's and OpenCLIP's code to ours and back.

A state dict is recognised by its names: a ViT or a ResNet image tower, or the plain EVA-01 tower of EVA-CLIP. The text
tower stands at the top (`transformer....`) or under `text.`. Everything here is a pure function of a state dict except
`convert_checkpoint` and `save_original`.

What the names cannot say has to be given: the number of heads where it is not width / 64, and the activation (OpenAI
trained with `quick_gelu`, most of OpenCLIP's models use `gelu`).
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPTokenizer, PreTrainedConfig, PreTrainedModel

from hf_vlp.models.catalog import architecture_of
from hf_vlp.models.clip.processing_clip import CLIPProcessor

# Constants that OpenAI's scripted models keep beside their weights.
IGNORED = ("input_resolution", "context_length", "vocab_size")
# Widths of OpenCLIP's ViT-H, ViT-g and ViT-bigG, whose heads are wider than 64.
SIXTEEN_HEADS = (1280, 1408, 1664)

_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)
_TEXT = (
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
)
_VIT = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
)
_EVA = (
    ("visual.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual.patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.patch_embed.proj.bias", "vision_model.embeddings.patch_embedding.bias"),
    ("visual.norm.weight", "vision_model.post_layernorm.weight"),
    ("visual.norm.bias", "vision_model.post_layernorm.bias"),
    ("visual.head.weight", "visual_projection.weight"),
    ("visual.head.bias", "visual_projection.bias"),
)
_EVA_BLOCK = (
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
    ("attn.proj", "self_attn.projection"),
)
# Matrices that the original multiplies from the right, x @ P, where a Linear holds the transpose.
_TRANSPOSED = (("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"))


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The bare state dict of what a file held: training wrappers, DDP prefixes and a `text.` prefix are taken off."""
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    state = {name.removeprefix("module."): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    state = {name.replace("visual.trunk.", "visual."): value for name, value in state.items()}
    return {name.removeprefix("text."): value for name, value in state.items() if name not in IGNORED}


def model_type_of(state: Mapping[str, Tensor]) -> str:
    """`"clip"`, `"clip_resnet"` or `"eva_clip"`, by the names of an original state dict.

    Raises:
        ValueError: none of them.
    """
    if "visual.layer1.0.conv1.weight" in state:
        return "clip_resnet"
    if "visual.blocks.0.attn.qkv.weight" in state:
        return "eva_clip"
    if "visual.transformer.resblocks.0.attn.in_proj_weight" in state:
        return "clip"
    raise ValueError(
        "the state dict has no image tower of a known layout (ViT: visual.transformer.resblocks, ResNet: "
        f"visual.layer1, EVA-01: visual.blocks with attn.qkv); it has names like {sorted(state)[:5]}"
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(match[1]) for name in state if (match := pattern.match(name))), default=-1)


def config_from_original(
    state: Mapping[str, Tensor],
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    hidden_act: str = "quick_gelu",
) -> PreTrainedConfig:
    """Reads the sizes of an original model off its shapes.

    Args:
        state: unwrapped original state dict.
        vision_heads: of the image tower; by default width / 64 (ResNet: 32 * width / 64), and 16 for OpenCLIP's large
            towers.
        text_heads: of the text tower; by default width / 64, and 16 for large ones.
        hidden_act: activation of the transformers; the EVA tower always has `gelu`.

    Raises:
        ValueError: the layout is unknown.
    """

    def heads(width: int) -> int:
        return 16 if width in SIXTEEN_HEADS else max(width // 64, 1)

    model_type = model_type_of(state)
    vocab_size, text_width = state["token_embedding.weight"].shape
    text = {
        "vocab_size": vocab_size,
        "hidden_size": text_width,
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _count(state, "transformer.resblocks"),
        "num_attention_heads": text_heads or heads(text_width),
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "hidden_act": hidden_act,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
        "projection_dim": state["text_projection"].shape[1],
    }
    common = {"projection_dim": state["text_projection"].shape[1], "text_config": text}
    if model_type == "clip_resnet":
        from hf_vlp.models.clip_resnet.configuration_clip_resnet import CLIPResNetConfig

        side = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        vision = {
            "layers": [_count(state, f"visual.layer{stage}") for stage in (1, 2, 3, 4)],
            "width": state["visual.layer1.0.conv1.weight"].shape[0],
            "image_size": 32 * side,
            "num_attention_heads": vision_heads,
        }
        return CLIPResNetConfig(vision_config=vision, **common)
    if model_type == "eva_clip":
        from hf_vlp.models.eva_clip.configuration_eva_clip import EvaCLIPConfig

        width, _, patch, _ = state["visual.patch_embed.proj.weight"].shape
        side = round((state["visual.pos_embed"].shape[1] - 1) ** 0.5)
        vision = {
            "hidden_size": width,
            "intermediate_size": state["visual.blocks.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": _count(state, "visual.blocks"),
            "num_attention_heads": vision_heads or heads(width),
            "patch_size": patch,
            "image_size": patch * side,
            "qkv_bias": "visual.blocks.0.attn.q_bias" in state,
        }
        return EvaCLIPConfig(vision_config=vision, vision_projection_bias="visual.head.bias" in state, **common)
    width, _, patch, _ = state["visual.conv1.weight"].shape
    side = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    vision = {
        "hidden_size": width,
        "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _count(state, "visual.transformer.resblocks"),
        "num_attention_heads": vision_heads or heads(width),
        "patch_size": patch,
        "image_size": patch * side,
        "hidden_act": hidden_act,
        "projection_dim": common["projection_dim"],
    }
    return CLIPConfig(vision_config=vision, **common)


def _names(model_type: str, state: Mapping[str, Tensor], original: bool) -> dict[str, str]:
    """Original name -> ours of every tensor that moves unchanged. `original` says which names `state` has."""
    names = dict(_TEXT) | {"logit_scale": "logit_scale"}
    stacks = [("transformer.resblocks", "text_model.encoder.layers", _BLOCK)]
    if model_type == "clip":
        names |= dict(_VIT)
        stacks.append(("visual.transformer.resblocks", "vision_model.encoder.layers", _BLOCK))
    elif model_type == "eva_clip":
        names |= dict(_EVA)
        stacks.append(("visual.blocks", "vision_model.encoder.layers", _EVA_BLOCK))
    for theirs, ours, block in stacks:
        for index in range(_count(state, theirs if original else ours)):
            for a, b in block:
                for kind in ("weight", "bias"):
                    names[f"{theirs}.{index}.{a}.{kind}"] = f"{ours}.{index}.{b}.{kind}"
            if theirs == "visual.blocks":
                names[f"{theirs}.{index}.attn.qkv.weight"] = f"{ours}.{index}.self_attn.qkv.weight"
    if model_type == "clip_resnet":
        theirs, ours = "visual.", "vision_model."
        prefix = theirs if original else ours
        for name in state:
            if name.startswith(prefix):
                names[theirs + name[len(prefix) :]] = ours + name[len(prefix) :]
    return names


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original names to those of `CLIPModel`, `CLIPResNetModel` or `EvaCLIPModel`.

    Args:
        state: unwrapped original state dict. Values keep their dtype; `logit_bias` of a sigmoid model is left out, as
            it belongs to `CLIPForPreTraining`.

    Raises:
        ValueError: names are left that have no counterpart (layer scale, attention pooling of later OpenCLIP models).
    """
    model_type = model_type_of(state)
    names = _names(model_type, state, original=True)
    result: dict[str, Tensor] = {}
    left = []
    for name, value in state.items():
        packed = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        if name in names:
            result[names[name]] = value
        elif packed:
            tower = "vision_model" if packed[1] else "text_model"
            for part, chunk in zip("qkv", value.chunk(3)):
                result[f"{tower}.encoder.layers.{packed[2]}.self_attn.{part}_proj.{packed[3]}"] = chunk.contiguous()
        elif name in dict(_TRANSPOSED) and not (model_type == "eva_clip" and name == "visual.proj"):
            result[dict(_TRANSPOSED)[name]] = value.T.contiguous()
        elif model_type == "eva_clip" and name.endswith(".attn.q_bias"):
            zeros = torch.zeros_like(value)
            bias = torch.cat([value, zeros, state[name.replace("q_bias", "v_bias")]])
            result[f"vision_model.encoder.layers.{name.split('.')[2]}.self_attn.qkv.bias"] = bias
        elif not (name == "logit_bias" or name.endswith((".attn.v_bias", ".attn.k_bias", "attn_mask"))):
            left.append(name)
    if left:
        raise ValueError(f"tensors of the original without a counterpart in {model_type!r}: {left[:8]}")
    return result


def to_original(state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Inverse of `from_original`.

    Args:
        state: state dict of an inference model of ours.
        model_type: `"clip"`, `"clip_resnet"` or `"eva_clip"`.

    Raises:
        ValueError: another type, or tensors that the original does not have.
    """
    if model_type not in ("clip", "clip_resnet", "eva_clip"):
        raise ValueError(f"there is no original format for {model_type!r}, only for clip, clip_resnet and eva_clip")
    names = {ours: theirs for theirs, ours in _names(model_type, state, original=False).items()}
    transposed = {ours: theirs for theirs, ours in _TRANSPOSED}
    result: dict[str, Tensor] = {}
    left = []
    for name, value in state.items():
        part = re.fullmatch(
            r"(vision|text)_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name
        )
        if name in names:
            result[names[name]] = value
        elif name in transposed:
            result[transposed[name]] = value.T.contiguous()
        elif part:
            if part[3] == "q":
                prefix = "visual." if part[1] == "vision" else ""
                parts = [state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
                result[f"{prefix}transformer.resblocks.{part[2]}.attn.in_proj_{part[4]}"] = torch.cat(parts)
        elif name.endswith(".self_attn.qkv.bias"):
            # The original has no bias of keys, and none is lost: softmax does not see it.
            query, _, values = value.chunk(3)
            block = f"visual.blocks.{name.split('.')[3]}.attn"
            result[f"{block}.q_bias"], result[f"{block}.v_bias"] = query.contiguous(), values.contiguous()
        elif not name.endswith("position_ids"):
            left.append(name)
    if left:
        raise ValueError(f"tensors that the original of {model_type!r} does not have: {left[:8]}")
    return result


def read_original(path: str | Path, *, allow_torchscript: bool = False) -> dict[str, Tensor]:
    """Reads a checkpoint file into an unwrapped state dict without running code from it.

    Args:
        path: `.safetensors`, or a file of `torch.save`, which is read with `weights_only=True`.
        allow_torchscript: also read scripted models, the form in which OpenAI published CLIP. Loading one runs the
            program that it is, so only for files whose source you trust.

    Raises:
        ValueError: a scripted model without `allow_torchscript`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return unwrap_state_dict(load_file(path))
    if not _is_scripted(path):
        return unwrap_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    if not allow_torchscript:
        raise ValueError(
            f"{path} is a scripted model, which is a program and not only weights; if you trust its source, pass "
            "allow_torchscript=True"
        )
    return unwrap_state_dict(torch.jit.load(path, map_location="cpu").state_dict())


def _is_scripted(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def model_from_original(state: Mapping[str, Tensor], **config_options: Any) -> PreTrainedModel:
    """The inference model of ours with the weights of an original state dict, in float32.

    Args:
        state: unwrapped original state dict.
        config_options: of `config_from_original`.
    """
    config = config_from_original(state, **config_options)
    model = architecture_of(config).load("model")(config)
    weights = {
        name: value.float() if value.is_floating_point() else value for name, value in from_original(state).items()
    }
    model.load_state_dict(weights)
    return model.eval()


def convert_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    tokenizer: CLIPTokenizer | None = None,
    allow_torchscript: bool = False,
    **config_options: Any,
) -> PreTrainedModel:
    """Writes an original checkpoint as a folder for `from_pretrained`, with a processor if there is a tokenizer.

    Args:
        path: original file.
        out: folder to write.
        tokenizer: e.g. from `clip_tokenizer_from_bpe_file`; None writes no processor.
        allow_torchscript: see `read_original`.
        config_options: of `config_from_original` (`vision_heads`, `text_heads`, `hidden_act`).
    """
    model = model_from_original(read_original(path, allow_torchscript=allow_torchscript), **config_options)
    model.save_pretrained(out)
    if tokenizer is not None:
        CLIPProcessor.for_image_size(tokenizer, model.config.vision_config.image_size).save_pretrained(out)
    return model


def save_original(model: PreTrainedModel, path: str | Path) -> None:
    """Writes an inference model of ours under the original names, as safetensors."""
    state = to_original(model.state_dict(), model.config.model_type)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in state.items()}, path, metadata={"format": "pt"}
    )


__all__ = [
    "config_from_original",
    "convert_checkpoint",
    "from_original",
    "model_from_original",
    "model_type_of",
    "read_original",
    "save_original",
    "to_original",
    "unwrap_state_dict",
]
