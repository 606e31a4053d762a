"""Original ALBEF checkpoints to ours and back.

The original names are those of github.com/salesforce/ALBEF: a timm-like ViT `visual_encoder`, a BERT `text_encoder`
(in pretraining checkpoints `text_encoder.bert` with `text_encoder.cls`), twins with the suffix `_m`. The functions on
state dicts do not need the models, so they also rename gradients.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig

from hf_vlp.models.momentum import TwinSettings
from hf_vlp.models.pretraining import EXTRAS_FILE, PreTrainingMixin

from .configuration_albef import AlbefConfig, AlbefTextConfig
from .finetuning_albef import (
    AlbefForQuestionAnsweringFineTuning,
    AlbefForRetrievalFineTuning,
    AlbefForTextAssignment,
    AlbefForVisualEntailmentFineTuning,
    AlbefForVisualReasoningFineTuning,
)
from .modeling_albef import AlbefForImageTextRetrieval, AlbefPreTrainedModel, interpolate_positions
from .modeling_albef_tasks import AlbefForQuestionAnswering, AlbefForVisualEntailment, AlbefForVisualReasoning
from .momentum_albef import AlbefMomentumSettings
from .pretraining_albef import AlbefForPreTraining

# (original, ours) inside the image tower; the fused query-key-value projection is handled beside it.
_VISION = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("norm.", "layernorm."),
)
_VISION_BLOCK = (
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.proj.", "attention.o_proj."),
    ("mlp.fc1.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.fc2."),
)
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Layout:
    """How the tensors of one kind of checkpoint are called.

    Attributes:
        kind: `"pretraining"`, `"retrieval"`, `"vqa"`, `"nlvr"`, `"ve"` or `"text_assignment"`.
        fusion_layer: first layer with cross-attention.
        twins: fusion layers come in pairs (two images).
    """

    kind: str
    fusion_layer: int
    twins: bool

    @classmethod
    def of(cls, state: Iterable[str], fusion_layer: int | None = None) -> "Layout":
        """Recognises an original checkpoint by its names.

        Raises:
            ValueError: this is no ALBEF checkpoint.
        """
        names = set(state)
        heads = {
            "text_decoder.": "vqa",
            "ta_head.": "text_assignment",
            "text_encoder.cls.": "pretraining",
            "itm_head.": "retrieval",
        }
        kind = next((kind for prefix, kind in heads.items() if any(n.startswith(prefix) for n in names)), None)
        pattern = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.crossattention\.")
        with_cross = {int(m.group(1)) for name in names if (m := pattern.match(name))}
        if not with_cross or not any(name.startswith("visual_encoder.") for name in names):
            shown = sorted(names)[:3]
            raise ValueError(
                f"this is no ALBEF checkpoint: it has names such as {shown}, but no visual_encoder.* and "
                "text_encoder.*.crossattention.*"
            )
        if kind is None and any(name.startswith("cls_head.") for name in names):
            # The two classifiers have the same names: the pair model's are told by shared keys, see `_is_pair_model`.
            kind = "ve"
        if kind is None:
            raise ValueError("the checkpoint has no head: expected itm_head, text_decoder, cls_head or ta_head")
        return cls(kind, min(with_cross) if fusion_layer is None else fusion_layer, kind == "text_assignment")


def _is_pair_model(state: Mapping[str, Tensor], fusion_layer: int) -> bool:
    """Twin layers hold the same keys and values under two names."""
    name = "text_encoder.encoder.layer.{}.crossattention.self.{}.weight"
    pairs = [(name.format(fusion_layer, part), name.format(fusion_layer + 1, part)) for part in ("key", "value")]
    return all(a in state and b in state and torch.equal(state[a], state[b]) for a, b in pairs)


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    """Recognises the kind of an original checkpoint by its names and, for the two classifiers, by its tied tensors."""
    layout = Layout.of(state)
    if layout.kind == "ve" and _is_pair_model(state, layout.fusion_layer):
        return Layout("nlvr", layout.fusion_layer, True)
    return layout


def vision_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's tensors, without prefix, under transformers' names."""
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            converted[_swap(name, _VISION)] = value
            continue
        prefix, rest = f"layers.{block.group(1)}.", block.group(2)
        if rest.startswith("attn.qkv."):
            for part, piece in zip(_QKV, value.chunk(3), strict=True):
                converted[f"{prefix}attention.{part}.{rest.removeprefix('attn.qkv.')}"] = piece
        else:
            converted[prefix + _swap(rest, _VISION_BLOCK)] = value
    return converted


def vision_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `vision_from_original`."""
    back = [(ours, original) for original, ours in _VISION]
    back_block = [(ours, original) for original, ours in _VISION_BLOCK]
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = re.match(r"layers\.(\d+)\.(.+)", name)
        if layer is None:
            converted[_swap(name, back)] = value
            continue
        prefix, rest = f"layers.{layer.group(1)}.attention.", layer.group(2)
        part = re.match(r"attention\.([qkv]_proj)\.(weight|bias)", rest)
        if part is None:
            converted[f"blocks.{layer.group(1)}.{_swap(rest, back_block)}"] = value
        elif part.group(1) == "q_proj":
            pieces = [state[f"{prefix}{one}.{part.group(2)}"] for one in _QKV]
            converted[f"blocks.{layer.group(1)}.attn.qkv.{part.group(2)}"] = torch.cat(pieces)
    return converted


def text_from_original(state: Mapping[str, Tensor], fusion_layer: int, twins: bool = False) -> dict[str, Tensor]:
    """The text tower's tensors, without prefix: ours are BERT's names, except that twins are paired."""
    converted = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        layer = re.match(r"encoder\.layer\.(\d+)\.(.+)", name)
        if twins and layer is not None and int(layer.group(1)) >= fusion_layer:
            pair, second = divmod(int(layer.group(1)) - fusion_layer, 2)
            if second and re.match(r"crossattention\.self\.(key|value)\.", layer.group(2)):
                continue
            name = f"encoder.layer.{fusion_layer + pair}.{'second' if second else 'first'}.{layer.group(2)}"
        converted[name] = value
    return converted


def text_to_original(state: Mapping[str, Tensor], fusion_layer: int) -> dict[str, Tensor]:
    """The inverse of `text_from_original`; shared keys and values appear under both names again."""
    converted = {}
    for name, value in state.items():
        twin = re.match(r"encoder\.layer\.(\d+)\.(first|second)\.(.+)", name)
        if twin is None:
            converted[name] = value
            continue
        layer = fusion_layer + 2 * (int(twin.group(1)) - fusion_layer) + (twin.group(2) == "second")
        converted[f"encoder.layer.{layer}.{twin.group(3)}"] = value
        if re.match(r"crossattention\.self\.(key|value)\.", twin.group(3)):
            converted[f"encoder.layer.{layer + 1}.{twin.group(3)}"] = value
    return converted


def _swap(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"unknown tensor {name!r} in an image tower: expected a timm-like ViT of ALBEF")


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _put(target: dict[str, Tensor], prefix: str, state: Mapping[str, Tensor]) -> None:
    target.update({prefix + name: value for name, value in state.items()})


def _head_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`cls.predictions.*`: the decoder's two tensors are tied and not stored twice."""
    return {name: value for name, value in state.items() if not name.startswith("decoder.")}


# Heads of one tensor pair: original name -> (kinds, ours).
_HEADS = (
    ("vision_proj{}.", "vision_projection."),
    ("text_proj{}.", "text_projection."),
    ("itm_head.", "itm_head."),
    ("cls_head{}.", "classifier."),
    ("ta_head.", "assignment_head."),
)


def from_original(state: Mapping[str, Tensor], layout: Layout, *, twin: bool = False) -> dict[str, Tensor]:
    """The inference model's tensors, or those of its momentum twin.

    Args:
        state: an original state dict.
        layout: from `layout_of`.
        twin: take the tensors with the suffix `_m`.

    Returns:
        State under the names of the inference class of `layout.kind`; a pretraining checkpoint's MLM head is under
        `mlm_head.`, and its queues are left to `queue_from_original`.
    """
    suffix = "_m" if twin else ""
    converted: dict[str, Tensor] = {}
    _put(converted, "albef.vision_model.", vision_from_original(_under(state, f"visual_encoder{suffix}.")))
    text = _under(state, f"text_encoder{suffix}.")
    if layout.kind == "pretraining":
        _put(converted, "mlm_head.", _head_from_original(_under(text, "cls.predictions.")))
        text = _under(text, "bert.")
    _put(converted, "albef.text_model.", text_from_original(text, layout.fusion_layer, layout.twins))
    decoder = _under(state, f"text_decoder{suffix}.")
    _put(converted, "decoder.text_model.", text_from_original(_under(decoder, "bert."), 0))
    _put(converted, "decoder.lm_head.", _head_from_original(_under(decoder, "cls.predictions.")))
    for original, ours in _HEADS:
        if "{}" in original or not twin:
            _put(converted, ours, _under(state, original.format(suffix)))
    if "temp" in state and not twin:
        converted["temperature"] = state["temp"]
    return converted


def to_original(state: Mapping[str, Tensor], layout: Layout, *, twin: bool = False) -> dict[str, Tensor]:
    """The inverse of `from_original`. Tied tensors appear under all their original names."""
    suffix = "_m" if twin else ""
    converted: dict[str, Tensor] = {}
    _put(converted, f"visual_encoder{suffix}.", vision_to_original(_under(state, "albef.vision_model.")))
    inner = "bert." if layout.kind == "pretraining" else ""
    text = text_to_original(_under(state, "albef.text_model."), layout.fusion_layer)
    _put(converted, f"text_encoder{suffix}.{inner}", text)
    for ours, original, words in (
        ("mlm_head.", f"text_encoder{suffix}.cls.predictions.", text),
        ("decoder.lm_head.", f"text_decoder{suffix}.cls.predictions.", _under(state, "decoder.text_model.")),
    ):
        head = _head_from_original(_under(state, ours))
        if head:
            _put(converted, original, head)
            tied = {"decoder.weight": words.get("embeddings.word_embeddings.weight"), "decoder.bias": head.get("bias")}
            _put(converted, original, {name: value for name, value in tied.items() if value is not None})
    _put(converted, f"text_decoder{suffix}.bert.", _under(state, "decoder.text_model."))
    for original, ours in _HEADS:
        if "{}" in original or not twin:
            _put(converted, original.format(suffix), _under(state, ours))
    if "temperature" in state and not twin:
        converted["temp"] = state["temperature"]
    return converted


def queue_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The queues of a pretraining or retrieval checkpoint as the state of a `FeatureQueue`: (D, K) becomes (K, D)."""
    queue = {
        "images": state["image_queue"].t().contiguous(),
        "texts": state["text_queue"].t().contiguous(),
        "position": state["queue_ptr"].long().reshape(()),
        "filled": torch.tensor(state["image_queue"].shape[1]),
    }
    if "idx_queue" in state:
        queue["ids"] = state["idx_queue"].flatten().long()
    return queue


def queue_to_original(queue: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `queue_from_original`."""
    original = {
        "image_queue": queue["images"].t().contiguous(),
        "text_queue": queue["texts"].t().contiguous(),
        "queue_ptr": queue["position"].reshape(1),
    }
    if "ids" in queue:
        original["idx_queue"] = queue["ids"].reshape(1, -1)
    return original


def config_from_original(
    state: Mapping[str, Tensor],
    layout: Layout,
    *,
    text_config: Mapping[str, Any] | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> AlbefConfig:
    """Reads the sizes from the shapes.

    Args:
        state: an original state dict.
        layout: from `layout_of`.
        text_config: fields of the original `config_bert.json` that shapes do not show (dropout, `hidden_act`, …).
        vision_heads: attention heads of the image tower; default: 64 wide each, as released.
        text_heads: the same for the text tower.
    """
    vision = _under(state, "visual_encoder.")
    text = _under(state, "text_encoder.bert." if layout.kind == "pretraining" else "text_encoder.")
    width, _, patch, _ = vision["patch_embed.proj.weight"].shape
    positions = vision["pos_embed"].shape[1] - 1
    vision_config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=_number_of_layers(vision, "blocks."),
        num_attention_heads=vision_heads or width // 64,
        intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0],
        layer_norm_eps=1e-6,
        patch_size=patch,
        image_size=round(positions**0.5) * patch,
    )
    vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
    layers = _number_of_layers(text, "encoder.layer.")
    if layout.twins:
        layers = layout.fusion_layer + (layers - layout.fusion_layer) // 2
    fields = {
        name: value
        for name, value in (text_config or {}).items()
        if name not in ("model_type", "architectures", "add_cross_attention", "num_hidden_layers")
    }
    fields.update(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        fusion_layer=layout.fusion_layer,
        encoder_width=width,
        images_per_text=2 if layout.twins else 1,
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=text["embeddings.token_type_embeddings.weight"].shape[0],
        num_attention_heads=text_heads or fields.get("num_attention_heads") or hidden // 64,
    )
    config = AlbefConfig(vision_config=vision_config.to_dict(), text_config=fields)
    if "vision_proj.weight" in state:
        config.projection_dim = state["vision_proj.weight"].shape[0]
    if "temp" in state:
        config.temperature_init_value = float(state["temp"])
    if "cls_head.2.weight" in state:
        config.num_labels = state["cls_head.2.weight"].shape[0]
    if layout.kind == "vqa":
        config = config.with_decoder()
        decoder = _under(state, "text_decoder.bert.")
        config.decoder_config.num_hidden_layers = _number_of_layers(decoder, "encoder.layer.")
    return config


def _number_of_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


INFERENCE_CLASSES: dict[str, type[AlbefPreTrainedModel]] = {
    "pretraining": AlbefForImageTextRetrieval,
    "retrieval": AlbefForImageTextRetrieval,
    "vqa": AlbefForQuestionAnswering,
    "nlvr": AlbefForVisualReasoning,
    "ve": AlbefForVisualEntailment,
}


def read_original(path: str | Path) -> dict[str, Tensor]:
    """Reads an original `.pth` (only tensors: `weights_only=True`) or `.safetensors` file.

    Raises:
        ValueError: the file does not hold a state dict.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    loaded = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} does not hold a state dict of tensors (under 'model' or on its own)")
    return loaded


def inference_model(
    state: Mapping[str, Tensor],
    *,
    image_size: int | None = None,
    config: AlbefConfig | None = None,
    **config_options: Any,
) -> AlbefPreTrainedModel:
    """Builds the inference model of an original state dict.

    Args:
        state: an original state dict of any kind but text assignment.
        image_size: interpolate the position embedding to it.
        config: instead of one read from the shapes.
        config_options: see `config_from_original`.

    Raises:
        ValueError: tensors are missing or do not fit.
    """
    layout = layout_of(state)
    if layout.kind not in INFERENCE_CLASSES:
        raise ValueError("a text-assignment checkpoint has no inference head: it starts AlbefForVisualReasoning")
    config = config or config_from_original(state, layout, **config_options)
    model = INFERENCE_CLASSES[layout.kind](config)
    load(model, from_original(state, layout), ignore=("mlm_head.",))
    if image_size is not None and image_size != config.vision_config.image_size:
        model.set_image_size(image_size)
    return model.eval()


def load(model: torch.nn.Module, state: Mapping[str, Tensor], ignore: tuple[str, ...] = (), prefix: str = "") -> None:
    """Loads a converted state; tied tensors need not be there, everything else must.

    A position embedding of another size is interpolated to the model's.

    Raises:
        ValueError: tensors are missing, left over, or do not fit.
    """
    state = {name: value for name, value in state.items() if not name.startswith(ignore or ("\0",))}
    own = model.state_dict()
    for name in [name for name in state if name.endswith("embeddings.position_embeddings")]:
        if name in own and own[name].shape != state[name].shape:
            state[name] = interpolate_positions(state[name], own[name].shape[1] - 1)
    missing, unexpected = model.load_state_dict(state, strict=False)
    # The vocabulary's matrix of a prediction head is that of the word embeddings, its bias that of the head.
    missing = [name for name in missing if not re.search(r"(mlm|lm)_head\.decoder\.(weight|bias)$", prefix + name)]
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit {type(model).__name__}: it lacks {missing[:5]} and has {unexpected[:5]}"
        )


TRAINING_CLASSES: dict[str, type[AlbefPreTrainedModel]] = {
    "pretraining": AlbefForPreTraining,
    "retrieval": AlbefForRetrievalFineTuning,
    "vqa": AlbefForQuestionAnsweringFineTuning,
    "nlvr": AlbefForVisualReasoningFineTuning,
    "ve": AlbefForVisualEntailmentFineTuning,
}


def training_model(
    state: Mapping[str, Tensor], *, config: AlbefConfig | None = None, **options: Any
) -> AlbefPreTrainedModel:
    """Builds the training model of an original state dict, with its momentum twin and, where it has them, queues.

    Args:
        state: an original state dict of any kind. A released checkpoint of pretraining starts fine-tuning through
            `inference_model`, `save_pretrained` and `from_pretrained` of the task's training class.
        config: instead of one read from the shapes.
        options: fields of `AlbefMomentumSettings` or `TwinSettings`, and options of `config_from_original`.

    Raises:
        ValueError: tensors are missing or do not fit.
    """
    layout = layout_of(state)
    queued = layout.kind in ("pretraining", "retrieval")
    fields = (AlbefMomentumSettings if queued else TwinSettings).__dataclass_fields__
    settings = {key: options.pop(key) for key in list(options) if key in fields}
    config = config or config_from_original(state, layout, **options)
    online = from_original(state, layout)
    if layout.kind == "text_assignment":
        model = AlbefForTextAssignment(config)
        classifier = {n: v for n, v in model.reasoning.state_dict().items() if n.startswith("classifier.")}
        own = {n: v for n, v in online.items() if n.startswith("albef.")}
        load(model.reasoning, own | classifier)
        load(model.vision_projection, _under(online, "vision_projection."))
        load(model.assignment_head, _under(online, "assignment_head."))
        return model
    if queued:
        settings.setdefault("queue_size", state["image_queue"].shape[1])
    model = TRAINING_CLASSES[layout.kind](config, **settings)
    load(model.inference_model, online, ignore=("mlm_head.",))
    if head := _under(online, "mlm_head."):
        load(model.mlm_head, head, prefix="mlm_head.")
    if model.momentum is not None:
        load(model.momentum, from_original(state, layout, twin=True))
    if queued:
        model.queue.load_state_dict(queue_from_original(state))
    model.tie_weights()
    return model


def training_state_to_original(model: AlbefPreTrainedModel) -> dict[str, Tensor]:
    """The whole state of a training under the original names: model, twin, queues."""
    if isinstance(model, AlbefForTextAssignment):
        return _assignment_to_original(model)
    kind = next(kind for kind, cls in TRAINING_CLASSES.items() if type(model) is cls)
    text = model.config.text_config
    layout = Layout(kind, text.fusion_layer, text.images_per_text == 2)
    online = model.inference_model.state_dict()
    if kind == "pretraining":
        online |= {f"mlm_head.{name}": value for name, value in model.mlm_head.state_dict().items()}
    state = to_original(online, layout)
    if model.momentum is not None:
        state |= to_original(model.momentum.state_dict(), layout, twin=True)
    return state | (queue_to_original(model.queue.state_dict()) if hasattr(model, "queue") else {})


def _assignment_to_original(model: AlbefForTextAssignment) -> dict[str, Tensor]:
    layout = Layout("text_assignment", model.config.text_config.fusion_layer, True)
    online = {f"albef.{name}": value for name, value in model.albef_model.state_dict().items()}
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("reasoning.")}
    return to_original(online | own, layout)


def model_from_original(
    state: Mapping[str, Tensor], *, image_size: int | None = None, **options: Any
) -> AlbefPreTrainedModel:
    """Builds the model that keeps all of an original state dict that a folder of ours can hold.

    That is the training model of a pretraining, whose `export` keeps MLM head, twin and queue beside the inference
    model, and of text assignment, which has no other; of every other kind the inference model.

    Args:
        state: an original state dict of any kind.
        image_size: interpolate the position embedding to it.
        options: see `config_from_original`.

    Raises:
        ValueError: tensors are missing or do not fit.
    """
    kind = layout_of(state).kind
    if kind == "text_assignment" or (kind == "pretraining" and "image_queue" in state):
        model = training_model(state, **options)
        if image_size is not None and image_size != model.config.vision_config.image_size:
            model.set_image_size(image_size)
        return model.eval()
    return inference_model(state, image_size=image_size, **options)


def convert(
    source: str | Path, folder: str | Path, *, image_size: int | None = None, **config_options: Any
) -> AlbefPreTrainedModel:
    """Writes an original checkpoint file as a Hub folder; returns the inference model.

    Of a pretraining the MLM head, the twin and the queue are kept in the side file from which training goes on.

    Args:
        source: `.pth` or `.safetensors`.
        folder: where to write.
        image_size: interpolate the position embedding to it.
        config_options: see `config_from_original`.
    """
    model = model_from_original(read_original(source), image_size=image_size, **config_options)
    if isinstance(model, PreTrainingMixin):
        model.export(folder)
        return model.inference_model
    model.save_pretrained(folder)
    return model


def load_folder(folder: str | Path) -> AlbefPreTrainedModel:
    """Opens a folder of ours as the class that has all of its tensors: `AlbefForPreTraining` where MLM head, twin and
    queue lie beside the weights, and else the class that the config names.

    Raises:
        ValueError: the config names no model with a head.
    """
    folder = Path(folder)
    name = (AlbefConfig.from_pretrained(folder).architectures or [""])[0]
    if name == AlbefForImageTextRetrieval.__name__ and (folder / EXTRAS_FILE).is_file():
        return AlbefForPreTraining.from_pretrained(folder)
    cls = next((cls for cls in INFERENCE_CLASSES.values() if cls.__name__ == name), None)
    if cls is None:
        raise ValueError(
            f"{folder}: its config names the class {name!r}; the original code has checkpoints of "
            f"{sorted({cls.__name__ for cls in INFERENCE_CLASSES.values()})}"
        )
    return cls.from_pretrained(folder)


def save_original(model: AlbefPreTrainedModel, path: str | Path) -> None:
    """Writes a model under the original names, as safetensors; of a training model twin and queues too.

    Args:
        model: of any class that `inference_model` and `training_model` give.
        path: the file.
    """
    if isinstance(model, PreTrainingMixin):
        state = training_state_to_original(model)
    else:
        # `AlbefForImageTextRetrieval` is the class of two kinds: without an MLM head it is a fine-tuned one.
        kinds = {cls: kind for kind, cls in INFERENCE_CLASSES.items()}
        text = model.config.text_config
        layout = Layout(kinds[type(model)], text.fusion_layer, text.images_per_text == 2)
        state = to_original(model.state_dict(), layout)
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in state.items()},
        path,
        metadata={"format": "pt"},
    )


__all__ = [
    "AlbefTextConfig",
    "Layout",
    "config_from_original",
    "convert",
    "from_original",
    "inference_model",
    "layout_of",
    "load",
    "load_folder",
    "model_from_original",
    "queue_from_original",
    "queue_to_original",
    "read_original",
    "save_original",
    "to_original",
    "training_model",
    "training_state_to_original",
]
