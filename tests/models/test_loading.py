"""Backbones from checkpoints that lack their weights: refused by name, never drawn at random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, ViTConfig, ViTForImageClassification, ViTModel

from hf_vlp.models.blip2.initialization_blip_2 import load_vision_tower, start_from_vision_and_qformer
from hf_vlp.models.blip2.language_blip_2 import load_language_model
from hf_vlp.models.blip2.modeling_blip_2 import stage1_model
from hf_vlp.models.catalog import architecture_of
from hf_vlp.models.clip.modeling_clip import CLIPModel
from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration
from hf_vlp.models.eva_clip.modeling_eva_clip import EvaCLIPModel
from hf_vlp.models.llava.initialization_llava import load_vision_tower as llava_tower
from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration
from hf_vlp.models.loading import MissingWeightsError
from hf_vlp.models.qwen_vl.initialization_qwen_vl import from_vision_language_pretrained as new_qwen_vl
from tests.tiny import blip2, cogvlm
from tests.tiny import clip as tiny_clip

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def vit(folder: Path) -> None:
    ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(folder)


def bert(folder: Path) -> None:
    BertForMaskedLM(BertConfig(**SIZES, vocab_size=99, max_position_embeddings=40)).save_pretrained(folder)


def opt(folder: Path) -> None:
    transformers.OPTForCausalLM(blip2.opt_config()).save_pretrained(folder)


def t5(folder: Path) -> None:
    transformers.T5ForConditionalGeneration(blip2.t5_config()).save_pretrained(folder)


def clip(folder: Path) -> None:
    CLIPModel(tiny_clip.clip_config()).save_pretrained(folder)


def eva_clip(folder: Path) -> None:
    EvaCLIPModel(tiny_clip.eva_clip_config()).save_pretrained(folder)


def native_blip2(folder: Path) -> None:
    blip2.retrieval_model().save_pretrained(folder)


def start(folder: str) -> Any:
    return start_from_vision_and_qformer(ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)), folder)


def from_vision(folder: str) -> Any:
    return CLIPModel.from_vision_text_pretrained(folder, text_config=tiny_clip.clip_config().text_config)


def from_text(folder: str) -> Any:
    return CLIPModel.from_vision_text_pretrained(folder, folder)


def without(folder: Path, dropped: str) -> int:
    """Takes the weights with `dropped` in their names out of a folder; returns how many there were."""
    path = folder / "model.safetensors"
    state = load_file(path)
    kept = {name: value for name, value in state.items() if dropped not in name}
    save_file(kept, path, metadata={"format": "pt"})
    return len(state) - len(kept)


@pytest.mark.parametrize(
    ("save", "load", "dropped"),
    [
        (vit, load_vision_tower, "layer.1."),
        (clip, load_vision_tower, "vision_model.embeddings.patch"),
        (eva_clip, load_vision_tower, "vision_model.encoder.layers.0."),
        (native_blip2, load_vision_tower, "vision_model.embeddings.class"),
        (clip, from_vision, "vision_model.encoder.layers.1.mlp"),
        (clip, from_text, "text_model.embeddings.token"),
        (bert, start, "encoder.layer.0.output"),
        (opt, load_language_model, "layers.1.fc1"),
        (t5, load_language_model, "decoder.block.0"),
        (clip, llava_tower, "vision_model.encoder.layers.1.mlp"),
        (vit, llava_tower, "layer.1."),
    ],
)
def test_a_backbone_that_did_not_load_is_refused(
    tmp_path: Path, save: Callable[[Path], None], load: Callable[[str], Any], dropped: str
) -> None:
    torch.manual_seed(0)
    save(tmp_path)
    load(str(tmp_path))
    gone = without(tmp_path, dropped)
    assert gone
    with pytest.raises(MissingWeightsError, match=f"{tmp_path.name} lacks weights of .*stay random") as found:
        load(str(tmp_path))
    assert len(found.value.names) == gone


@pytest.mark.parametrize("build", [LlavaForConditionalGeneration.from_vision_language_pretrained, new_qwen_vl])
def test_the_language_model_of_a_chat_model_is_whole(tmp_path: Path, build: Callable[..., Any]) -> None:
    opt(tmp_path)
    assert without(tmp_path, "layers.1.fc1")
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8))
    with pytest.raises(MissingWeightsError, match="lacks weights of OPTForCausalLM"):
        build(tower, str(tmp_path), object())


def test_visual_experts_are_no_copies_of_noise(tmp_path: Path) -> None:
    """The network's file travels with checkpoints, so its error is a plain one."""
    cogvlm.language_model().save_pretrained(tmp_path)
    options: dict[str, Any] = {"vision_config": cogvlm.vision_config()}
    CogVLMForConditionalGeneration.from_language_pretrained(tmp_path, **options)
    assert without(tmp_path, "layers.1.mlp")
    with pytest.raises(ValueError, match=rf"{tmp_path.name} lacks weights of Llama.*layers\.1\.mlp.*stay random"):
        CogVLMForConditionalGeneration.from_language_pretrained(tmp_path, **options)


def test_a_tower_of_another_kind_is_refused(tmp_path: Path) -> None:
    """transformers would give a CLIP tower without a single weight of the checkpoint."""
    vit(tmp_path)
    with pytest.raises(MissingWeightsError, match="lacks weights of CLIPVisionModel"):
        from_vision(str(tmp_path))


def test_what_nobody_reads_may_be_missing(tmp_path: Path) -> None:
    """A ViT without pooler, a CLIP without its text tower, a BERT without its prediction head."""
    vit(tmp_path / "vit")
    assert not any("pooler" in name for name in load_file(tmp_path / "vit" / "model.safetensors"))
    load_vision_tower(str(tmp_path / "vit"))
    clip(tmp_path / "clip")
    assert without(tmp_path / "clip", "text_model.")
    load_vision_tower(str(tmp_path / "clip"))
    config = BertConfig(**SIZES, vocab_size=99, max_position_embeddings=40)
    BertModel(config).save_pretrained(tmp_path / "bert")
    found = start(str(tmp_path / "bert"))
    assert "qformer.encoder.layer.0.attention.attention.query.weight" in found.state


@pytest.mark.parametrize("load", [architecture_of, load_vision_tower, load_language_model, stage1_model])
def test_the_output_folder_of_a_run_is_told_from_the_model_in_it(tmp_path: Path, load: Callable[[str], Any]) -> None:
    with pytest.raises(FileNotFoundError, match="has no config.json, so it holds no saved model$"):
        load(str(tmp_path))
    opt(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=f"the model of this run is in {tmp_path / 'model'}$"):
        load(str(tmp_path))
    for gone in (str(tmp_path / "gone"), "./gone"):
        with pytest.raises(FileNotFoundError, match="there is no folder .*gone"):
            load(gone)
