"""Published CogVLM and CogVLM2 checkpoints to ours and back.

The original names are those of the code that lies beside the checkpoints on the Hub (THUDM/cogvlm-chat-hf,
THUDM/cogvlm2-llama3-chat-19B). Query, key and value are one matrix a kind of token there and three here, so that the
language model keeps the names and the form that transformers gives it. The functions on state dicts do not need the
models, so they also rename gradients.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from .configuration_cogvlm import CogVLMConfig, CogVLMVisionConfig
from .modeling_cogvlm import CogVLMForConditionalGeneration

_QKV = ("q_proj", "k_proj", "v_proj")
# (original, ours) prefixes outside the layers of the language model.
_OUTER = (
    ("lm_head.", "language_model.lm_head."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.norm.", "language_model.model.norm."),
    ("model.vision.boi", "projector.begin"),
    ("model.vision.eoi", "projector.end"),
    ("model.vision.conv.", "projector.conv."),
    ("model.vision.linear_proj.linear_proj.", "projector.linear."),
    ("model.vision.linear_proj.norm1.", "projector.norm."),
    ("model.vision.linear_proj.gate_proj.", "projector.gate_proj."),
    ("model.vision.linear_proj.dense_h_to_4h.", "projector.up_proj."),
    ("model.vision.linear_proj.dense_4h_to_h.", "projector.down_proj."),
    ("model.vision.patch_embedding.cls_embedding", "vision_model.class_embedding"),
    ("model.vision.patch_embedding.position_embedding.", "vision_model.position_embedding."),
    ("model.vision.patch_embedding.proj.", "vision_model.patch_embedding."),
    ("model.vision.transformer.layers.", "vision_model.layers."),
)
# (original, ours) inside a layer; {} is the layer's number.
_LAYER = (
    ("input_layernorm.", "language_model.model.layers.{}.input_layernorm."),
    ("post_attention_layernorm.", "language_model.model.layers.{}.post_attention_layernorm."),
    ("self_attn.language_expert_dense.", "language_model.model.layers.{}.self_attn.o_proj."),
    ("self_attn.vision_expert_dense.", "visual_experts.{}.o_proj."),
    ("mlp.language_mlp.", "language_model.model.layers.{}.mlp."),
    ("mlp.vision_mlp.", "visual_experts.{}."),
)
_FUSED = (
    ("self_attn.language_expert_query_key_value.", "language_model.model.layers.{}.self_attn."),
    ("self_attn.vision_expert_query_key_value.", "visual_experts.{}."),
)
# Original shapes of what is a plain vector here.
_SHAPES = {"projector.begin": (1, 1, -1), "projector.end": (1, 1, -1), "vision_model.class_embedding": (1, -1)}


def from_original(state: Mapping[str, Tensor], config: CogVLMConfig) -> dict[str, Tensor]:
    """Tensors under our names.

    Args:
        state: under the original names; the rotary frequencies, which are no weights, are left out.
        config: tells how the fused projections are cut.

    Raises:
        ValueError: a name that CogVLM does not have.
    """
    text = config.text_config
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    sizes = [text.num_attention_heads * head, *[text.num_key_value_heads * head] * 2]
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = re.match(r"model\.layers\.(\d+)\.(.+)", name)
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if layer is None:
            ours = _swap(name, _OUTER)
            converted[ours] = value.reshape(-1) if ours in _SHAPES else value
            continue
        number, rest = layer.groups()
        fused = next(((old, new) for old, new in _FUSED if rest.startswith(old)), None)
        if fused is None:
            converted[_swap(rest, _LAYER, name).format(number)] = value
            continue
        for part, piece in zip(_QKV, value.split(sizes), strict=True):
            converted[f"{fused[1].format(number)}{part}.{rest.removeprefix(fused[0])}"] = piece
    return converted


def to_original(state: Mapping[str, Tensor], config: CogVLMConfig) -> dict[str, Tensor]:
    """The inverse of `from_original`, with the rotary frequencies, which the original code keeps among the weights."""
    back = tuple((ours, original) for original, ours in _OUTER)
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = re.match(r"(language_model\.model\.layers\.|visual_experts\.)(\d+)\.(.+)", name)
        if layer is None:
            shape = _SHAPES.get(name)
            converted[_swap(name, back)] = value if shape is None else value.reshape(shape)
            continue
        number = layer.group(2)
        prefix = f"model.layers.{number}."
        part = re.search(r"([qkv]_proj)\.(weight|bias)$", name)
        if part is None:
            pairs = tuple((ours.format(number), original) for original, ours in _LAYER)
            converted[prefix + _swap(name, pairs)] = value
        elif part.group(1) == "q_proj":
            pieces = [state[name.replace("q_proj", one)] for one in _QKV]
            pairs = tuple((ours.format(number), original) for original, ours in _FUSED)
            stem = name.removesuffix(f"q_proj.{part.group(2)}")
            converted[f"{prefix}{_swap(stem, pairs)}{part.group(2)}"] = torch.cat(pieces)
    text = config.text_config
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    if any(name.startswith("language_model.") for name in state):
        frequencies = _rope_theta(text) ** -(torch.arange(0, head, 2, dtype=torch.float32) / head)
        for number in range(text.num_hidden_layers):
            converted[f"model.layers.{number}.self_attn.rotary_emb.inv_freq"] = frequencies.clone()
    return converted


def _swap(name: str, pairs: tuple[tuple[str, str], ...], whole: str | None = None) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"CogVLM has no tensor {whole or name!r}; expected the names of THUDM/cogvlm-chat-hf's own code")


def _rope_theta(text: Any) -> float:
    return float(text.rope_parameters["rope_theta"])


def config_from_original(original: Mapping[str, Any], *, version: int, **changes: Any) -> CogVLMConfig:
    """The config of a checkpoint.

    Args:
        original: its `config.json`.
        version: 1 or 2, see `version_of`. What the original code fixes by version: rotary base, convolution, biases.
        changes: fields of `CogVLMConfig`.
    """
    vision = dict(original["vision_config"])
    if vision["num_positions"] != (vision["image_size"] // vision["patch_size"]) ** 2 + 1:
        raise ValueError(f"{vision['num_positions']} positions do not fit images of {vision['image_size']} pixels")
    heads = original["num_attention_heads"]
    text = LlamaConfig(
        vocab_size=original["vocab_size"],
        hidden_size=original["hidden_size"],
        intermediate_size=original["intermediate_size"],
        num_hidden_layers=original["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=original.get("num_multi_query_heads", heads),
        hidden_act=original.get("hidden_act", "silu"),
        rms_norm_eps=original.get("rms_norm_eps", 1e-5),
        max_position_embeddings=original.get("max_position_embeddings", 2048),
        initializer_range=original.get("initializer_range", 0.02),
        tie_word_embeddings=original.get("tie_word_embeddings", False),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(original.get("rope_theta") or (500000 if version == 2 else 10000)),
        },
        **{name: original.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    settings = {
        "vision_config": CogVLMVisionConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_hidden_layers=vision["num_hidden_layers"],
            num_attention_heads=vision["num_heads"],
            num_channels=vision["in_channels"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act=vision["hidden_act"],
            layer_norm_eps=vision["layer_norm_eps"],
            dropout_prob=vision["dropout_prob"],
        ),
        "text_config": text,
        "downsample": 2 if version == 2 else 1,
        "visual_expert_qkv_bias": version == 2,
        "image_token_id": original.get("pad_token_id"),
    }
    return CogVLMConfig(**{**settings, **changes})


def config_to_original(config: CogVLMConfig) -> dict[str, Any]:
    """The `config.json` of the original code.

    Raises:
        ValueError: what the original code has no word for, as another language model than Llama.
    """
    text, vision = config.text_config, config.vision_config
    version = 2 if config.downsample == 2 else 1
    fits = config.downsample in (1, 2) and config.visual_expert_qkv_bias == (version == 2)
    if text.model_type != "llama" or not fits or config.projector_hidden_size != text.intermediate_size:
        raise ValueError(
            "only CogVLM and CogVLM2 on a Llama can go back to the original format, not downsample "
            f"{config.downsample} with biases {config.visual_expert_qkv_bias} on {text.model_type!r}"
        )
    original = {
        name: getattr(text, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "rms_norm_eps", "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id",
            "eos_token_id", "tie_word_embeddings",
        )
    }  # fmt: skip
    if version == 2:
        original["num_multi_query_heads"] = text.num_key_value_heads
    elif text.num_key_value_heads != text.num_attention_heads:
        raise ValueError("the code of CogVLM 1 knows no grouped-query attention")
    return original | {
        "architectures": ["CogVLMForCausalLM"],
        "rope_theta": _rope_theta(text),
        "vision_config": {
            "in_channels": vision.num_channels,
            "hidden_size": vision.hidden_size,
            "patch_size": vision.patch_size,
            "num_positions": vision.grid_size**2 + 1,
            "num_heads": vision.num_attention_heads,
            "intermediate_size": vision.intermediate_size,
            "hidden_act": vision.hidden_act,
            "layer_norm_eps": vision.layer_norm_eps,
            "num_hidden_layers": vision.num_hidden_layers,
            "dropout_prob": vision.dropout_prob,
            "image_size": vision.image_size,
        },
    }


def version_of(names: Any) -> int:
    """1 or 2, told by the convolution of CogVLM2.

    Args:
        names: of the tensors of a checkpoint.

    Raises:
        ValueError: this is no CogVLM.
    """
    names = set(names)
    if not any(".vision_expert_query_key_value." in name for name in names):
        raise ValueError(
            f"this is no CogVLM checkpoint: it has names such as {sorted(names)[:3]}, but no visual expert"
        )
    return 2 if "model.vision.conv.weight" in names else 1


def model_from_original(
    state: Mapping[str, Tensor], original: Mapping[str, Any], **changes: Any
) -> CogVLMForConditionalGeneration:
    """The model of a checkpoint, in eval mode, with the checkpoint's own dtype.

    Args:
        state: all tensors under the original names.
        original: its `config.json`.
        changes: fields of `CogVLMConfig`.

    Raises:
        ValueError: tensors are missing or too many.
    """
    config = config_from_original(original, version=version_of(state), **changes)
    converted = from_original(state, config)
    dtype = converted["language_model.model.norm.weight"].dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = CogVLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    if config.tie_word_embeddings:
        converted.setdefault("language_model.lm_head.weight", converted["language_model.model.embed_tokens.weight"])
    missing, unexpected = model.load_state_dict(converted, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"this checkpoint does not fit its config: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval()


def read_original(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of a folder of the Hub's own layout; pickles are read without running code from them.

    Raises:
        FileNotFoundError: no config or no weights.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: give a folder such as a download of THUDM/cogvlm-chat-hf"
        )
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors and no pytorch_model*.bin")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    return state, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def save_original(model: CogVLMForConditionalGeneration, folder: str | Path) -> None:
    """Writes weights and config under the original names, for use beside the original code.

    Raises:
        ValueError: see `config_to_original`.
    """
    original = config_to_original(model.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = to_original(model.state_dict(), model.config)
    # Safetensors keep no tensor twice.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(original, indent=2) + "\n", encoding="utf-8")
