"""Original BLIP checkpoints to the native names and back.

The original names are those of github.com/salesforce/BLIP: a timm-like ViT `visual_encoder`, `text_encoder`,
`text_decoder`, twins with the suffix `_m`. Text parts and heads keep their names. The functions on state dicts do not
need the models, so they also rename gradients.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import BlipConfig, PreTrainedModel

from hf_vlp.models.albef.conversion_albef import queue_from_original as _queue_from_original
from hf_vlp.models.albef.conversion_albef import queue_to_original as _queue_to_original
from hf_vlp.models.albef.conversion_albef import read_original
from hf_vlp.models.albef.modeling_albef import interpolate_positions
from hf_vlp.models.pretraining import EXTRAS_FILE

_VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("norm.", "post_layernorm."),
)
_BLOCK = (
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("attn.qkv.", "self_attn.qkv."),
    ("attn.proj.", "self_attn.projection."),
    ("mlp.fc1.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.fc2."),
)
# Parts that exist once in a checkpoint, whose names both sides share, and those that have a twin.
_TWINNED = ("text_encoder", "vision_proj", "text_proj")
_SINGLE = ("text_decoder", "itm_head", "cls_head")
# What the heads are called here where the name differs.
_RENAMED = {"cls_head": "classifier"}


def _swap(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"unknown tensor {name!r} in an image tower: expected a timm-like ViT of BLIP")


def vision_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's tensors, without prefix, under the native names."""
    converted = {}
    for name, value in state.items():
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            converted[_swap(name, _VISION)] = value
        else:
            converted[f"encoder.layers.{block.group(1)}.{_swap(block.group(2), _BLOCK)}"] = value
    return converted


def vision_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `vision_from_original`."""
    whole = tuple((ours, original) for original, ours in _VISION)
    block = tuple((ours, original) for original, ours in _BLOCK)
    converted = {}
    for name, value in state.items():
        layer = re.match(r"encoder\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            converted[_swap(name, whole)] = value
        else:
            converted[f"blocks.{layer.group(1)}.{_swap(layer.group(2), block)}"] = value
    return converted


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def kind_of(state: Mapping[str, Tensor]) -> str:
    """`"pretraining"`, `"retrieval"`, `"vqa"`, `"nlvr"`, `"caption"`, `"itm"` or `"base"`, by the names.

    Raises:
        ValueError: this is no BLIP checkpoint.
    """

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state)

    if not has("visual_encoder.") or not (has("text_encoder.") or has("text_decoder.")):
        raise ValueError(
            f"this is no BLIP checkpoint: it has names such as {sorted(state)[:3]}, but no visual_encoder.* with "
            "text_encoder.* or text_decoder.*"
        )
    if has("cls_head."):
        return "nlvr"
    if has("text_decoder."):
        if has("itm_head."):
            return "pretraining"
        return "vqa" if has("text_encoder.") else "caption"
    if has("itm_head."):
        return "retrieval" if "idx_queue" in state else "itm"
    return "base"


def from_original(state: Mapping[str, Tensor], *, twin: bool = False) -> dict[str, Tensor]:
    """The tensors under our names, or those of the momentum twin; queues are left to `queue_from_original`."""
    suffix = "_m" if twin else ""
    vision = vision_from_original(_under(state, f"visual_encoder{suffix}."))
    converted = {f"vision_model.{name}": value for name, value in vision.items()}
    for part in _TWINNED + (() if twin else _SINGLE):
        for name, value in _under(state, f"{part}{suffix if part in _TWINNED else ''}.").items():
            if not name.endswith("position_ids"):
                converted[f"{_RENAMED.get(part, part)}.{name}"] = value
    if "temp" in state and not twin:
        converted["temperature"] = state["temp"]
    return converted


def to_original(state: Mapping[str, Tensor], *, twin: bool = False) -> dict[str, Tensor]:
    """The inverse of `from_original`."""
    suffix = "_m" if twin else ""
    vision = vision_to_original(_under(state, "vision_model."))
    converted = {f"visual_encoder{suffix}.{name}": value for name, value in vision.items()}
    for part in _TWINNED + (() if twin else _SINGLE):
        for name, value in _under(state, f"{_RENAMED.get(part, part)}.").items():
            converted[f"{part}{suffix if part in _TWINNED else ''}.{name}"] = value
    if "temperature" in state and not twin:
        converted["temp"] = state["temperature"]
    return converted


def queue_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The queues as the state of a `FeatureQueue`; the pointer has another name in retrieval."""
    pointer = state["ptr_queue"] if "ptr_queue" in state else state["queue_ptr"]
    return _queue_from_original({**state, "queue_ptr": pointer})


def queue_to_original(queue: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `queue_from_original`."""
    original = _queue_to_original(queue)
    if "idx_queue" in original:
        original["ptr_queue"] = original.pop("queue_ptr")
    return original


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found.group(1)) for name in state if (found := re.match(pattern, name)))


def config_from_original(
    state: Mapping[str, Tensor],
    *,
    text_config: Mapping[str, Any] | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    dec_token_id: int | None = None,
    enc_token_id: int | None = None,
    sep_token_id: int = 102,
) -> BlipConfig:
    """Reads the sizes from the shapes.

    Args:
        state: an original state dict.
        text_config: fields of the original `med_config.json` that shapes do not show (dropout, `hidden_act`, …).
        vision_heads: attention heads of the image tower; default: 64 wide each, as released.
        text_heads: the same for the text model.
        dec_token_id: [DEC]; default: the last but one token.
        enc_token_id: [ENC]; default: the last token.
        sep_token_id: [SEP].
    """
    kind = kind_of(state)
    text = _under(state, "text_decoder.bert." if kind == "caption" else "text_encoder.")
    width, _, patch, _ = state["visual_encoder.patch_embed.proj.weight"].shape
    side = round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
    vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
    known = (
        "hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "pad_token_id",
        "initializer_range", "num_attention_heads",
    )  # fmt: skip
    fields = {name: value for name, value in (text_config or {}).items() if name in known}
    dec = vocabulary - 2 if dec_token_id is None else dec_token_id
    fields.update(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=_layers(text, r"encoder\.layer\.(\d+)\."),
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        num_attention_heads=text_heads or fields.get("num_attention_heads") or hidden // 64,
        bos_token_id=dec,
        sep_token_id=sep_token_id,
        eos_token_id=sep_token_id,
        enc_token_id=vocabulary - 1 if enc_token_id is None else enc_token_id,
        label_smoothing=0.1,
    )
    vision = {
        "hidden_size": width,
        "num_hidden_layers": _layers(state, r"visual_encoder\.blocks\.(\d+)\."),
        "num_attention_heads": vision_heads or width // 64,
        "intermediate_size": state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": side * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }
    config = BlipConfig(vision_config=vision, text_config=fields)
    if "vision_proj.weight" in state:
        config.image_text_hidden_size = state["vision_proj.weight"].shape[0]
    return config


def load(model: torch.nn.Module, state: Mapping[str, Tensor], ignore: tuple[str, ...] = ()) -> None:
    """Loads a converted state; names under `ignore` may be missing or left over, everything else must fit.

    A position embedding of another size is interpolated to the model's.

    Raises:
        ValueError: tensors are missing, left over, or do not fit.
    """
    own = model.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(ignore or ("\0",))}
    for name in [name for name in state if name.endswith("embeddings.position_embedding")]:
        if name in own and own[name].shape != state[name].shape:
            state[name] = interpolate_positions(state[name], own[name].shape[1] - 1)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith(ignore or ("\0",))]
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit {type(model).__name__}: it lacks {missing[:5]} and has {unexpected[:5]}"
        )


def inference_model(
    state: Mapping[str, Tensor],
    *,
    image_size: int | None = None,
    config: BlipConfig | None = None,
    merge_from: int | None = None,
    **config_options: Any,
) -> PreTrainedModel:
    """Builds the inference model of an original state dict.

    Args:
        state: an original state dict of any kind but the bare feature extractor (`"base"`), whose two parts are in
            every other checkpoint.
        image_size: interpolate the position embedding to it.
        config: instead of one read from the shapes.
        merge_from: first layer of an NLVR checkpoint that merges; default: the first with a merge layer.
        config_options: see `config_from_original`.

    Raises:
        ValueError: tensors are missing or do not fit.
    """
    from hf_vlp.models.blip import modeling_blip

    kind = kind_of(state)
    config = config or config_from_original(state, **config_options)
    converted = from_original(state)
    if kind == "nlvr" or (kind == "vqa" and config.vision_config.hidden_size != config.text_config.hidden_size):
        from hf_vlp.models.blip import tasks_blip

        model = tasks_blip.from_converted(kind, config, converted)
    elif kind == "caption":
        model = modeling_blip.BlipForConditionalGeneration(config)
    elif kind == "vqa":
        model = modeling_blip.BlipForQuestionAnswering(config)
    elif kind == "pretraining":
        from hf_vlp.models.blip.med_blip import BlipMED

        model = BlipMED(config)
    elif kind in ("retrieval", "itm"):
        model = modeling_blip.BlipForImageTextRetrieval(config)
    else:
        raise ValueError("a checkpoint without heads has no inference model; load its parts with from_original")
    load(model, converted, ignore=("temperature",))
    if image_size is not None and image_size != config.vision_config.image_size:
        model.set_image_size(image_size)
    return model.eval()


def training_model(state: Mapping[str, Tensor], *, config: BlipConfig | None = None, **options: Any) -> Any:
    """Builds the training model of an original pretraining or retrieval state dict, with its twin and queues.

    Args:
        state: an original state dict.
        config: instead of one read from the shapes.
        options: fields of `BlipMomentumSettings`, and options of `config_from_original`.

    Raises:
        ValueError: another kind of checkpoint (its inference model is the training model), or it does not fit.
    """
    from hf_vlp.models.blip.momentum_blip import BlipMomentumSettings
    from hf_vlp.models.blip.pretraining_blip import BlipForPreTraining
    from hf_vlp.models.blip.retrieval_blip import BlipForRetrievalFineTuning

    kind = kind_of(state)
    kinds = {"pretraining": BlipForPreTraining, "retrieval": BlipForRetrievalFineTuning}
    if kind not in kinds:
        raise ValueError(f"a {kind} checkpoint has no momentum twin: its inference model is trained as it is")
    settings = {key: options.pop(key) for key in list(options) if key in BlipMomentumSettings.__dataclass_fields__}
    settings.setdefault("queue_size", state["image_queue"].shape[1])
    config = config or config_from_original(state, **options)
    model = kinds[kind](config, **settings)
    online = from_original(state)
    load(model.inference_model, online, ignore=("temperature",))
    with torch.no_grad():
        model.temperature.copy_(online["temperature"])
    load(model.momentum, from_original(state, twin=True))
    model.queue.load_state_dict(queue_from_original(state))
    model.tie_weights()
    return model


def training_state_to_original(model: Any) -> dict[str, Tensor]:
    """The whole state of a pretraining or retrieval training under the original names: model, twin, queues."""
    online = dict(model.inference_model.state_dict()) | {"temperature": model.temperature.detach()}
    twin = to_original(model.momentum.state_dict(), twin=True)
    return to_original(online) | twin | queue_to_original(model.queue.state_dict())


def convert(
    source: str | Path, folder: str | Path, *, image_size: int | None = None, **config_options: Any
) -> PreTrainedModel:
    """Writes an original checkpoint file (`.pth`, read with `weights_only=True`, or `.safetensors`) as a Hub folder.

    Args:
        source: the file.
        folder: where to write.
        image_size: interpolate the position embedding to it.
        config_options: see `config_from_original`.
    """
    model = inference_model(read_original(source), image_size=image_size, **config_options)
    model.save_pretrained(folder)
    return model


def load_folder(folder: str | Path) -> PreTrainedModel:
    """Opens a folder of ours as the class that has all of its tensors.

    That is `BlipForPreTraining` where twin and queues lie beside the weights, `BlipMED` where both text stacks are
    there under the name of the retrieval class, and else the class that the config names.
    """
    from hf_vlp.models.blip import modeling_blip, tasks_blip
    from hf_vlp.models.blip.med_blip import BlipMED
    from hf_vlp.models.blip.pretraining_blip import BlipForPreTraining

    folder = Path(folder)
    if (folder / EXTRAS_FILE).is_file():
        return BlipForPreTraining.from_pretrained(folder)
    name = (json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""])[0]
    cls = getattr(modeling_blip, name, None) or getattr(tasks_blip, name, None)
    if cls is None or not issubclass(cls, PreTrainedModel):
        raise ValueError(f"{folder}: its config names the class {name!r}, which is no model of BLIP")
    if name == "BlipForImageTextRetrieval" and _has_decoder(folder):
        cls = BlipMED
    return cls.from_pretrained(folder)


def _has_decoder(folder: Path) -> bool:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if any(name.startswith("text_decoder.") for name in file.keys()):  # noqa: SIM118
                return True
    return False


def save_original(model: PreTrainedModel, path: str | Path) -> None:
    """Writes a model under the original names, as safetensors; of a training model twin and queues too.

    Args:
        model: of any class that `inference_model` and `training_model` give.
        path: the file.
    """
    state = training_state_to_original(model) if hasattr(model, "momentum") else to_original(model.state_dict())
    save_file(
        {name: v.detach().cpu().clone().contiguous() for name, v in state.items()}, path, metadata={"format": "pt"}
    )


__all__ = [
    "config_from_original",
    "convert",
    "from_original",
    "inference_model",
    "kind_of",
    "load",
    "load_folder",
    "queue_from_original",
    "queue_to_original",
    "read_original",
    "save_original",
    "to_original",
    "training_model",
    "training_state_to_original",
]
