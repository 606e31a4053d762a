"""LLaVA's original checkpoints to the native format and back.

The original keeps projector, newline and (for NeXT) vision tower among the weights of the language model; LLaVA 1 and
1.5 leave the tower in a checkpoint of its own, which `config.json` names as `mm_vision_tower`. An image is the number
-200 there, which is no token: the native format needs one, so a row is added to the embeddings if the caller names no
free token. That row is never written and takes no part in the loss.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaNextConfig, PreTrainedConfig, PreTrainedModel

from hf_vlp.models.blip2.backbone_blip_2 import MissingWeightsError
from hf_vlp.models.llava.initialization_llava import load_vision_tower
from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

# Original -> native, by the beginning of the name; the first that fits decides.
PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_tower.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.mm_projector.", "model.multi_modal_projector.linear_1."),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
TEXT_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
PROJECTORS = {"linear": "linear", "mlp2x_gelu": "gelu"}
FEATURES = {"patch": "default", "cls_patch": "full"}


class OriginalFormatError(ValueError):
    """An original checkpoint that the native format cannot hold."""


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under native names; a single linear projector gets the identity as its second layer.

    Raises:
        OriginalFormatError: a projector of another form.
    """
    native: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(("position_ids", "rotary_emb.inv_freq")):
            continue
        old, new = next((pair for pair in PREFIXES if name.startswith(pair[0])), ("", ""))
        if not old:
            raise OriginalFormatError(f"{name!r} is no weight of an original LLaVA on a Llama-type language model")
        if old == "model.mm_projector." and name.removeprefix(old) not in ("weight", "bias"):
            raise OriginalFormatError(
                f"{name!r} belongs to a projector that is neither 'linear' nor 'mlp2x_gelu'; the native format holds "
                "these two only"
            )
        native[new + name.removeprefix(old)] = value
    first, second = "model.multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_2.weight"
    if first in native and second not in native:
        width = native[first].shape[0]
        native[second] = torch.eye(width, dtype=native[first].dtype)
        native[second.replace("weight", "bias")] = torch.zeros(width, dtype=native[first].dtype)
    return native


def to_original(
    state: Mapping[str, Tensor], *, linear: bool, words: int | None = None, tower_prefix: str = "vision_model."
) -> dict[str, Tensor]:
    """Weights (or their gradients) under the original names.

    Args:
        state: by native names, whole or in part.
        linear: whether the projector is v1's single layer, whose second, the identity, is left out.
        words: rows of the embeddings without those added for the image; None keeps all.
        tower_prefix: what stands between the tower and its parts; "vision_model." for CLIP.
    """
    original = {}
    for name, value in state.items():
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            value = value[:words]
        if name.startswith("model.multi_modal_projector."):
            layer, _, rest = name.removeprefix("model.multi_modal_projector.").partition(".")
            if not linear:
                original[f"model.mm_projector.{ {'linear_1': 0, 'linear_2': 2}[layer] }.{rest}"] = value
            elif layer == "linear_1":
                original[f"model.mm_projector.{rest}"] = value
        elif name.startswith("model.vision_tower."):
            part = name.removeprefix("model.vision_tower.")
            original[f"model.vision_tower.vision_tower.{tower_prefix}{part}"] = value
        else:
            original[name.replace("model.language_model.", "model.", 1)] = value
    return original


def config_from_original(
    settings: Mapping[str, Any],
    *,
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    image_token_id: int,
    tiles: bool | None = None,
) -> LlavaConfig | LlavaNextConfig:
    """The native config of an original `config.json`.

    Args:
        settings: the `mm_…` entries, `image_aspect_ratio`, `image_grid_pinpoints` (width, height).
        tiles: whether it is LLaVA-NeXT; by default whether `image_aspect_ratio` is "anyres".

    Raises:
        OriginalFormatError: a projector or a feature choice that the native format does not have.
    """
    projector = settings.get("mm_projector_type", "linear")
    feature = settings.get("mm_vision_select_feature", "patch")
    if projector not in PROJECTORS:
        raise OriginalFormatError(
            f"mm_projector_type {projector!r}: the native format holds {sorted(PROJECTORS)} only"
        )
    if feature not in FEATURES:
        raise OriginalFormatError(f"mm_vision_select_feature may be one of {sorted(FEATURES)}, not {feature!r}")
    common: dict[str, Any] = {
        "vision_config": vision_config.to_dict(),
        "text_config": text_config.to_dict(),
        "image_token_index": image_token_id,
        "image_seq_length": (vision_config.image_size // vision_config.patch_size) ** 2 + (feature == "cls_patch"),
        "projector_hidden_act": PROJECTORS[projector],
        "vision_feature_layer": settings.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": FEATURES[feature],
        "tie_word_embeddings": bool(text_config.tie_word_embeddings),
    }
    if tiles is None:
        tiles = settings.get("image_aspect_ratio") == "anyres"
    if not tiles:
        return LlavaConfig(**common)
    pinpoints = settings.get("image_grid_pinpoints")
    if not pinpoints:
        raise OriginalFormatError("LLaVA-NeXT needs image_grid_pinpoints, which config.json lacks")
    return LlavaNextConfig(**common, image_grid_pinpoints=[[height, width] for width, height in pinpoints])


def model_from_original(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    vision: PreTrainedModel | None = None,
    image_token_id: int | None = None,
    tiles: bool | None = None,
) -> LlavaForConditionalGeneration | LlavaNextForConditionalGeneration:
    """The native model of original weights.

    Args:
        state: by original names.
        settings: as of `config_from_original`; `mm_patch_merge_type` is honoured too.
        vision: the tower, where `state` lacks it.
        image_token_id: a token that stands for a picture; by default a new one behind the vocabulary.

    Raises:
        MissingWeightsError: `state` (with `vision`) lacks weights; the message names them.
    """
    native = from_original(state)
    if vision is not None:
        native = {f"model.vision_tower.{name}": value for name, value in vision.state_dict().items()} | native
    words = native["model.language_model.embed_tokens.weight"].shape[0]
    token = words if image_token_id is None else image_token_id
    names = ["model.language_model.embed_tokens.weight", *(["lm_head.weight"] if "lm_head.weight" in native else [])]
    if token >= words:
        for name in names:
            mean = native[name].float().mean(dim=0, keepdim=True).to(native[name].dtype)
            native[name] = torch.cat([native[name], mean.expand(token + 1 - words, -1)])
        text_config = type(text_config)(**{**text_config.to_dict(), "vocab_size": token + 1})
    if "lm_head.weight" not in native and text_config.tie_word_embeddings:
        native["lm_head.weight"] = native[names[0]]
    config = config_from_original(
        settings, text_config=text_config, vision_config=vision_config, image_token_id=token, tiles=tiles
    )
    if isinstance(config, LlavaNextConfig):
        merge_type = settings.get("mm_patch_merge_type", "flat")
        model = LlavaNextForConditionalGeneration(config, merge_type=merge_type)
        if merge_type != "spatial_unpad":
            # Such models have no newline; the native parameter is there and unused.
            native.setdefault("model.image_newline", torch.zeros(text_config.hidden_size))
    else:
        model = LlavaForConditionalGeneration(config)
    missing = sorted(set(model.state_dict()) - set(native))
    if missing:
        raise MissingWeightsError(
            f"the original checkpoint lacks weights of {type(model).__name__}: {missing[:8]}", missing
        )
    model.load_state_dict(native, strict=True)
    if token >= words:
        model.generation_config.suppress_tokens = list(range(words, token + 1))
    return model.eval()


def read_settings(folder: str | Path) -> dict[str, Any]:
    """`config.json` of an original checkpoint folder."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def read_original(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and weights of an original checkpoint folder; pickles are read with `weights_only=True`."""
    folder = Path(folder)
    settings = read_settings(folder)
    state: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder} has neither .safetensors nor .bin files")
    for file in files:
        if file.suffix == ".safetensors":
            state |= load_file(file)
        else:
            state |= torch.load(file, map_location="cpu", weights_only=True)
    return settings, state


def is_original(folder: str | Path) -> bool:
    """Whether a folder holds LLaVA in its authors' form."""
    path = Path(folder) / "config.json"
    return path.is_file() and "mm_vision_tower" in json.loads(path.read_text(encoding="utf-8"))


def load_original(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    vision: str | PreTrainedModel | None = None,
    image_token_id: int | None = None,
) -> LlavaForConditionalGeneration | LlavaNextForConditionalGeneration:
    """The native model of an original folder.

    Args:
        folder: a whole model, or stage 1's output (`mm_projector.bin` beside a `config.json`).
        base: folder of the language model that the projector belongs to, where `folder` holds the projector alone.
        vision: tower, its folder or Hub id; by default what `config.json` names.
        image_token_id: as of `model_from_original`.

    Raises:
        OriginalFormatError: not an original LLaVA on Llama or Mistral.
    """
    settings, state = read_original(folder)
    model_type = settings.get("model_type")
    if model_type not in TEXT_TYPES:
        raise OriginalFormatError(
            f"{folder} is of type {model_type!r}; known are the original types {sorted(TEXT_TYPES)}"
        )
    if base is not None:
        weights: dict[str, Tensor] = {}
        for file in sorted(Path(base).glob("*.safetensors")):
            weights |= load_file(file)
        state = weights | state
    text = {name: value for name, value in settings.items() if not name.startswith("mm_") and name != "model_type"}
    text_config = AutoConfig.for_model(TEXT_TYPES[model_type], **text)
    inside = any(name.startswith("model.vision_tower.") for name in state)
    tower = load_vision_tower(vision or settings["mm_vision_tower"]) if vision is not None or not inside else None
    if tower is not None:
        vision_config = tower.config
    else:
        config = AutoConfig.from_pretrained(settings["mm_vision_tower"])
        vision_config = getattr(config, "vision_config", config)
    return model_from_original(
        state,
        settings,
        text_config=text_config,
        vision_config=vision_config,
        vision=None if inside else tower,
        image_token_id=image_token_id,
    )


def words_of(model: PreTrainedModel) -> int:
    """Rows of the vocabulary without those that were added behind it for the image."""
    suppressed = set(model.generation_config.suppress_tokens or [])
    rows = model.lm_head.weight.shape[0]
    while rows - 1 in suppressed and rows - 1 >= 0:
        rows -= 1
    return rows


def original_settings(model: PreTrainedModel, vision: str) -> dict[str, Any]:
    """`config.json` as the authors wrote it, for a model on Llama or Mistral."""
    config, text = model.config, model.config.text_config
    types = {text_type: name for name, text_type in TEXT_TYPES.items() if name != "llava"}
    if text.model_type not in types:
        raise OriginalFormatError(f"the original code has no language model of type {text.model_type!r}")
    features = {strategy: feature for feature, strategy in FEATURES.items()}
    settings = {
        **text.to_dict(),
        "model_type": types[text.model_type],
        "vocab_size": words_of(model),
        "mm_vision_tower": vision,
        "mm_projector_type": "linear" if model.linear_projector else "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        "mm_hidden_size": config.vision_config.hidden_size,
        "image_aspect_ratio": "pad",
    }
    if isinstance(config, LlavaNextConfig):
        settings["image_aspect_ratio"] = "anyres"
        settings["mm_patch_merge_type"] = model.model.merge_type
        settings["image_grid_pinpoints"] = [[width, height] for height, width in config.image_grid_pinpoints]
    return settings


def save_original(model: PreTrainedModel, folder: str | Path, *, vision: str) -> None:
    """Writes a model under the authors' names, as safetensors with their `config.json`.

    Args:
        vision: what the config is to name as the tower (its weights are written too).
    """
    folder = Path(folder)
    settings = original_settings(model, vision)
    folder.mkdir(parents=True, exist_ok=True)
    state = to_original(model.state_dict(), linear=model.linear_projector, words=words_of(model))
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")


__all__ = [
    "OriginalFormatError",
    "config_from_original",
    "from_original",
    "is_original",
    "load_original",
    "model_from_original",
    "read_original",
    "read_settings",
    "save_original",
    "to_original",
]
