"""Models from scratch by name and size: configs of the CLIP family, vision towers and Q-Formers of BLIP-2."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

# Width, layers and heads of a transformer tower, and the width of the joint space.
_TOWERS: dict[str, dict[str, tuple[int, int, int]]] = {
    "nano": {"vision": (128, 4, 4), "text": (128, 2, 4)},
    "tiny": {"vision": (192, 6, 3), "text": (192, 6, 3)},
    "small": {"vision": (384, 12, 6), "text": (384, 12, 6)},
    # CLIP's own (2103.00020, table 20).
    "base": {"vision": (768, 12, 12), "text": (512, 12, 8)},
    "large": {"vision": (1024, 24, 16), "text": (768, 12, 12)},
}
_QFORMERS = {
    "nano": (128, 4, 4),
    "tiny": (192, 6, 3),
    "small": (384, 6, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
_JOINT = {"nano": 128, "tiny": 192, "small": 384, "base": 512, "large": 768}
_RESNETS: dict[str, dict[str, Any]] = {
    "nano": {"layers": [1, 1, 1, 1], "width": 16},
    "tiny": {"layers": [2, 2, 2, 2], "width": 32},
    "small": {"layers": [3, 4, 6, 3], "width": 48},
}
_PUBLISHED_RESNETS = {"base": "RN50", "large": "RN50x16"}
# EfficientNet's compound scaling (1905.11946): width, depth; ALIGN (2102.05918) trains the last with BERT-large.
_EFFICIENTNETS = {
    "nano": (0.25, 0.3),
    "tiny": (0.5, 0.5),
    "small": (1.0, 1.0),
    "base": (1.4, 1.8),
    "large": (2.0, 3.1),
}

SIZES = tuple(_TOWERS)
# Image size and patch at which each size is meant to start, where the caller names none.
_PATCHES = {"nano": 8, "tiny": 8, "small": 16, "base": 32, "large": 14}
_IMAGE_SIZES = {"nano": 64, "tiny": 64, "small": 224, "base": 224, "large": 224}


def default_image_size(size: str) -> int:
    """Side in pixels of the images that a size is meant for."""
    return _IMAGE_SIZES[_known(size)]


def clip_family_config(
    model_type: str, size: str, tokenizer: Any, *, image_size: int | None = None, patch_size: int | None = None
) -> PreTrainedConfig:
    """Config of a dual encoder from scratch.

    Args:
        model_type: `"clip"`, `"clip_resnet"`, `"eva_clip"` or `"align"`.
        size: one of `SIZES`; `"base"` and `"large"` are the published ones.
        tokenizer: gives the text tower its vocabulary, special tokens and longest text.
        image_size: side in pixels.
        patch_size: of the ViT towers.

    Raises:
        ValueError: unknown type or size, a tokenizer without the special tokens that the text tower needs, or an
            image that the patches do not tile.
    """
    _known(size)
    image_size = image_size or _IMAGE_SIZES[size]
    patch_size = patch_size or _PATCHES[size]
    text_width, text_layers, text_heads = _TOWERS[size]["text"]
    text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": text_heads,
        "vocab_size": len(tokenizer),
        **_special_tokens(tokenizer, needs_end=model_type != "align"),
    }
    joint = _JOINT[size]
    if model_type == "align":
        return _align_config(size, text, image_size)
    text["max_position_embeddings"] = min(tokenizer.model_max_length, 512)
    if model_type == "clip_resnet":
        from hf_vlp.models.clip_resnet.configuration_clip_resnet import CLIPResNetConfig

        if size in _PUBLISHED_RESNETS:
            vision = {"vocab_size": text["vocab_size"], **_special_tokens(tokenizer, needs_end=True)}
            vision["max_position_embeddings"] = text["max_position_embeddings"]
            return CLIPResNetConfig.preset(_PUBLISHED_RESNETS[size], text_config=vision)
        vision = {**_RESNETS[size], "image_size": image_size}
        return CLIPResNetConfig(text_config=text, vision_config=vision, projection_dim=joint)

    if image_size % patch_size:
        raise ValueError(f"--image_size {image_size} is not a multiple of --patch_size {patch_size}")
    width, layers, heads = _TOWERS[size]["vision"]
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    if model_type == "clip":
        from transformers import CLIPConfig

        return CLIPConfig(text_config=text, vision_config=vision, projection_dim=joint)
    if model_type == "eva_clip":
        from hf_vlp.models.eva_clip.configuration_eva_clip import EvaCLIPConfig

        # CLIP's rule (`width ** -0.5`): with BERT's fixed 0.02 the layers of a narrow tower hardly say anything.
        vision["initializer_range"] = width**-0.5
        return EvaCLIPConfig(text_config=text, vision_config=vision, projection_dim=joint)
    raise ValueError(f"--model_type may be clip, clip_resnet, eva_clip or align, not {model_type!r}")


def _align_config(size: str, text: dict[str, Any], image_size: int) -> PreTrainedConfig:
    from transformers import AlignConfig, AlignVisionConfig

    from hf_vlp.models.align.modeling_align import image_width

    width, depth = _EFFICIENTNETS[size]
    vision = {"image_size": image_size, "width_coefficient": width, "depth_coefficient": depth}
    # ALIGN does not project images: the joint space is as wide as the tower's last block.
    return AlignConfig(text_config=text, vision_config=vision, projection_dim=image_width(AlignVisionConfig(**vision)))


def _special_tokens(tokenizer: Any, *, needs_end: bool) -> dict[str, int]:
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if needs_end and tokens["eos_token_id"] is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token, which the text tower pools; use a "
            "CLIP tokenizer, or let the script train one by leaving out --tokenizer"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no padding token; set tokenizer.pad_token")
    tokens["pad_token_id"] = tokenizer.pad_token_id
    return {name: token for name, token in tokens.items() if token is not None}


def _known(size: str) -> str:
    if size not in _TOWERS:
        raise ValueError(f"--size may be one of {list(SIZES)}, not {size!r}")
    return size


def new_clip_processor(
    model_type: str,
    image_size: int,
    *,
    tokenizer: Any = None,
    texts: Iterable[str] = (),
    vocab_size: int = 8192,
    context_length: int = 77,
) -> Any:
    """The processor of a dual encoder from scratch.

    Args:
        model_type: as in `clip_family_config`.
        image_size: side in pixels.
        tokenizer: left out, one is trained on `texts`.
        texts: training text of the tokenizer.
        vocab_size: of a trained tokenizer, at most.
        context_length: longest text of a trained tokenizer, in tokens.
    """
    if model_type == "align":
        from hf_vlp.data.tokenizers import train_bert_tokenizer
        from hf_vlp.models.align.processing_align import align_processor

        tokenizer = tokenizer or train_bert_tokenizer(texts, vocab_size, max_length=context_length)
        return align_processor(tokenizer, image_size)

    from hf_vlp.models.clip.processing_clip import CLIPProcessor
    from hf_vlp.models.clip.tokenization_clip import train_clip_tokenizer

    tokenizer = tokenizer or train_clip_tokenizer(texts, vocab_size, context_length)
    return CLIPProcessor.for_image_size(tokenizer, image_size)


def clip_from_towers(
    vision: str,
    text: str | None = None,
    *,
    size: str,
    tokenizer: str | None = None,
    texts: Iterable[str] = (),
    vocab_size: int = 8192,
    context_length: int = 77,
) -> tuple[Any, Any]:
    """A CLIP on a trained image tower, as in LiT (2111.07991), and its processor, whose images are the tower's.

    Args:
        vision: folder or Hub id with a CLIP image tower.
        text: folder or Hub id with a CLIP text tower; left out, one of `size` is drawn.
        size: one of `SIZES`, of a new text tower.
        tokenizer: folder or Hub id; by default that of `text`, or one trained on `texts`.
        texts: training text of the tokenizer.
        vocab_size: of a trained tokenizer, at most.
        context_length: longest text of a trained tokenizer, in tokens.

    Raises:
        ValueError: an unknown size, or a tokenizer without the special tokens that a text tower needs.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    from hf_vlp.models.clip.modeling_clip import CLIPModel
    from hf_vlp.models.clip.processing_clip import CLIPProcessor
    from hf_vlp.models.clip.tokenization_clip import train_clip_tokenizer

    named = tokenizer or text
    words = AutoTokenizer.from_pretrained(named) if named else train_clip_tokenizer(texts, vocab_size, context_length)
    text_config = None if text else clip_family_config("clip", size, words).text_config
    model = CLIPModel.from_vision_text_pretrained(vision, text, text_config=text_config)
    return model, CLIPProcessor(AutoImageProcessor.from_pretrained(vision), words)


def new_bert_tokenizer(texts: Iterable[str], vocab_size: int = 8192, max_length: int = 64) -> Any:
    """A WordPiece tokenizer for the Q-Former's texts, trained on `texts`."""
    from hf_vlp.data.tokenizers import train_bert_tokenizer

    return train_bert_tokenizer(texts, vocab_size, max_length=max_length)


def qformer_config(
    size: str, max_length: int = 512, *, layers: int | None = None, dropout: float = 0.1
) -> PreTrainedConfig:
    """Sizes of a Q-Former from scratch, as the config of the BERT that it would have started from.

    Args:
        size: one of `SIZES`; `"base"` is BERT-base, as in the paper.
        max_length: longest text in tokens.
        layers: depth, if not that of the size.
        dropout: of hidden states and attention weights.
    """
    from transformers import BertConfig

    width, depth, heads = _QFORMERS[_known(size)]
    return BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        # BERT's 0.02 at its width of 768; the same number in a narrow layer is next to nothing.
        initializer_range=0.02 * (768 / width) ** 0.5,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


# Vision and text tower of the fusion models (ALBEF, BLIP): width, layers, heads.
_FUSION_TOWERS: dict[str, dict[str, tuple[int, int, int]]] = {
    "nano": {"vision": (128, 4, 4), "text": (128, 4, 4)},
    "tiny": {"vision": (192, 6, 3), "text": (192, 6, 3)},
    "small": {"vision": (384, 12, 6), "text": (384, 12, 6)},
    # 2107.07651, section 3.1: ViT-B/16 and BERT-base.
    "base": {"vision": (768, 12, 12), "text": (768, 12, 12)},
    "large": {"vision": (1024, 24, 16), "text": (768, 12, 12)},
}
_FUSION_PATCHES = {"nano": 8, "tiny": 8, "small": 16, "base": 16, "large": 16}


def fusion_towers(
    size: str, tokenizer: Any, *, image_size: int, patch_size: int | None = None, dropout: float = 0.1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the vision and of the text tower of a fusion model from scratch.

    Args:
        size: one of `SIZES`; `"base"` is ViT-B/16 with BERT-base, `"large"` ViT-L/16 with BERT-base.
        tokenizer: gives the vocabulary and the longest text.
        image_size: side in pixels.
        patch_size: of the vision tower.
        dropout: of the text tower; the vision towers have none.

    Raises:
        ValueError: an unknown size, or an image that the patches do not tile.
    """
    patch_size = patch_size or _FUSION_PATCHES[_known(size)]
    if image_size % patch_size:
        raise ValueError(f"--image_size {image_size} is not a multiple of --patch_size {patch_size}")
    towers = []
    for width, layers, heads in _FUSION_TOWERS[size].values():
        towers.append(
            {
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                # As for the Q-Former: 0.02 is BERT's at a width of 768.
                "initializer_range": 0.02 * (768 / width) ** 0.5 if width < 768 else 0.02,
            }
        )
    vision, text = towers
    vision |= {"image_size": image_size, "patch_size": patch_size}
    text |= {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": min(max(tokenizer.model_max_length, 64), 512),
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return vision, text


def albef_config(
    size: str,
    tokenizer: Any,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    fusion_layer: int | None = None,
    projection_dim: int = 256,
    dropout: float = 0.1,
) -> PreTrainedConfig:
    """Config of an ALBEF from scratch.

    Args:
        size, patch_size, dropout: as in `fusion_towers`.
        tokenizer: of a BERT.
        image_size: side in pixels; 256 for the published sizes.
        fusion_layer: first text layer that looks at the image; half of the layers if left out.
        projection_dim: width of the contrastive features.
    """
    from hf_vlp.models.albef.configuration_albef import AlbefConfig

    image_size = image_size or (256 if _known(size) in ("base", "large") else _IMAGE_SIZES[size])
    vision, text = fusion_towers(size, tokenizer, image_size=image_size, patch_size=patch_size, dropout=dropout)
    text["fusion_layer"] = text["num_hidden_layers"] // 2 if fusion_layer is None else fusion_layer
    config = AlbefConfig(
        vision_config={"model_type": "vit", "layer_norm_eps": 1e-6, **vision},
        text_config=text,
        projection_dim=projection_dim,
        # Of the layers that neither tower brings along: projections, cross-attention, heads.
        initializer_range=text["initializer_range"],
    )
    config.use_tokenizer(tokenizer)
    return config


def blip_config(
    size: str,
    tokenizer: Any,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    projection_dim: int = 256,
    dropout: float = 0.1,
) -> PreTrainedConfig:
    """Config of a BLIP from scratch.

    Args:
        size, patch_size, dropout: as in `fusion_towers`.
        tokenizer: of a BERT, with BLIP's tokens.
        image_size: side in pixels; 224 for the published sizes.
        projection_dim: width of the contrastive features.
    """
    from transformers import BlipConfig

    from hf_vlp.models.blip.backbone_blip import use_tokenizer

    image_size = image_size or _IMAGE_SIZES[_known(size)]
    vision, text = fusion_towers(size, tokenizer, image_size=image_size, patch_size=patch_size, dropout=dropout)
    text["encoder_hidden_size"] = vision["hidden_size"]
    # The native defaults are those of a larger vocabulary.
    text |= {"bos_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.sep_token_id}
    config = BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=projection_dim)
    use_tokenizer(config, tokenizer)
    return config
