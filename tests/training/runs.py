"""Tiny training runs in memory: rows, models and trainers for the tests of `hf_vlp.training`."""

import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig

from hf_vlp.data import CaptioningCollator, ImageTextCollator, PairDataset
from hf_vlp.models.clip.pretraining_clip import CLIPForPreTraining
from hf_vlp.training import VLPTrainer, VLPTrainingArguments, apply_stage
from tests.tiny import albef as tiny_albef
from tests.tiny import blip2 as tiny_blip2
from tests.tiny import clip as tiny_clip

_TEXTS = tiny_clip.TEXTS


def rows(count: int = 22, *, bad: tuple[int, ...] = (), size: int = 20) -> list[dict[str, Any]]:
    """Rows with PNG bytes of noise and one to three texts each; those of `bad` hold no image."""
    found = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        texts = [f"{_TEXTS[(index + n) % len(_TEXTS)]} {index % 10}" for n in range(1 + index % 3)]
        content = b"this is not a picture" if index in bad else buffer.getvalue()
        found.append({"image": {"bytes": content, "path": None}, "text": texts, "source": "tiny", "key": str(index)})
    return found


def arguments(folder: str | Path, **changes: Any) -> VLPTrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "sanity": False,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    return VLPTrainingArguments(**(settings | changes))


def clip_model(*, dropout: float = 0.0, **settings: Any) -> tuple[CLIPForPreTraining, Any]:
    """A tiny CLIP and its processor."""
    processor = tiny_clip.processor()
    text = tiny_clip.text_config_of(processor, attention_dropout=dropout)
    vision = tiny_clip.vision_config(attention_dropout=dropout)
    torch.manual_seed(3)
    model = CLIPForPreTraining(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24), **settings)
    return model, processor


def clip_trainer(
    folder: str | Path,
    *,
    data: list[dict[str, Any]] | None = None,
    dropout: float = 0.0,
    stage: str = "pretrain",
    model_settings: dict[str, Any] | None = None,
    collator_options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    **changes: Any,
) -> VLPTrainer:
    model, processor = clip_model(dropout=dropout, **(model_settings or {}))
    apply_stage(model, stage)
    return VLPTrainer(
        model,
        arguments(folder, **changes),
        ImageTextCollator(processor, **(collator_options or {})),
        PairDataset(rows() if data is None else data, seed=1),
        processing_class=processor,
        **(trainer_options or {}),
    )


def stage1_trainer(folder: str | Path, *, dropout: float = 0.0, **changes: Any) -> VLPTrainer:
    model = tiny_blip2.pretraining_model(
        seed=3, qformer={"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    )
    processor = tiny_blip2.retrieval_processor()
    apply_stage(model, "stage1")
    return VLPTrainer(
        model, arguments(folder, **changes), ImageTextCollator(processor), PairDataset(rows(), seed=1),
        processing_class=processor,
    )  # fmt: skip


def albef_model(*, dropout: float = 0.0, **settings: Any) -> tuple[nn.Module, Any]:
    """A tiny ALBEF in pretraining, whose queue wraps around within a few batches, and its processor."""
    from hf_vlp.models.albef.pretraining_albef import AlbefForPreTraining
    from hf_vlp.models.albef.processing_albef import AlbefProcessor

    tokenizer = tiny_blip2.bert_tokenizer()
    config = tiny_albef.albef_config()
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = dropout
    config.use_tokenizer(tokenizer)
    torch.manual_seed(3)
    model = AlbefForPreTraining(config, **({"queue_size": 13, "alpha_warmup_steps": 3, "momentum": 0.9} | settings))
    tiny_albef.spread_weights(model.retrieval)
    model.reset_momentum()
    return model, AlbefProcessor.for_image_size(tokenizer, tiny_albef.IMAGE_SIZE)


def albef_trainer(
    folder: str | Path, *, dropout: float = 0.0, model_settings: dict[str, Any] | None = None, **changes: Any
) -> VLPTrainer:
    model, processor = albef_model(dropout=dropout, **(model_settings or {}))
    apply_stage(model, "pretrain")
    return VLPTrainer(
        model, arguments(folder, **changes), ImageTextCollator(processor), PairDataset(rows(), seed=1),
        processing_class=processor,
    )  # fmt: skip


def blip_trainer(
    folder: str | Path, *, dropout: float = 0.0, model_settings: dict[str, Any] | None = None, **changes: Any
) -> VLPTrainer:
    """A tiny BLIP in pretraining, whose queue wraps around within a few batches."""
    from hf_vlp.models.blip.pretraining_blip import BlipForPreTraining
    from hf_vlp.models.blip.processing_blip import BlipProcessor, add_blip_tokens
    from hf_vlp.training.presets import blip_config

    tokenizer = add_blip_tokens(tiny_blip2.bert_tokenizer())
    config = blip_config("nano", tokenizer, image_size=16, patch_size=8, projection_dim=16, dropout=dropout)
    for part in (config.vision_config, config.text_config):
        part.num_hidden_layers, part.hidden_size, part.intermediate_size, part.num_attention_heads = 2, 32, 48, 2
    config.text_config.encoder_hidden_size = 32
    torch.manual_seed(3)
    settings = {"queue_size": 13, "alpha_warmup_steps": 3, "momentum": 0.9} | (model_settings or {})
    model = BlipForPreTraining(config, **settings)
    apply_stage(model, "pretrain")
    return VLPTrainer(
        model, arguments(folder, **changes), ImageTextCollator(BlipProcessor.for_image_size(tokenizer, 16)),
        PairDataset(rows(), seed=1), processing_class=BlipProcessor.for_image_size(tokenizer, 16),
    )  # fmt: skip


def stage2_trainer(folder: str | Path, *, lora_r: int = 0, **changes: Any) -> VLPTrainer:
    from hf_vlp.training.lora import LoraArguments, add_lora

    model, processor = tiny_blip2.generation_model(seed=3), tiny_blip2.generation_processor()
    apply_stage(model, "stage2")
    add_lora(model, LoraArguments(lora_r=lora_r, lora_dropout=0.1))
    return VLPTrainer(
        model, arguments(folder, **changes), CaptioningCollator(processor), PairDataset(rows(), seed=1),
        processing_class=processor,
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Equal for bit-identical weights only."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def losses(trainer: VLPTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
