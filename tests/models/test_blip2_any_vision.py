"""BLIP-2 on vision towers that the native type cannot hold, and the folders that carry their code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CLIPVisionConfig,
    Dinov2Config,
    PreTrainedConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

from hf_vlp.models.blip2.any_vision_blip_2 import (
    Blip2AnyVisionForConditionalGeneration,
    Blip2AnyVisionForImageTextRetrieval,
)
from hf_vlp.models.blip2.configuration_blip2_any_vision import Blip2AnyVisionConfig
from hf_vlp.models.blip2.initialization_blip_2 import load_vision_tower
from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForConditionalGeneration
from hf_vlp.models.blip2.pretraining_blip_2 import Blip2ForPreTraining
from tests.tiny.blip2 import (
    QUERIES,
    TEXTS,
    generation_processor,
    images,
    llama_config,
    pixels,
    pretraining_batch,
    text_batch,
)

_SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TOWERS: dict[str, PreTrainedConfig] = {
    "clip": CLIPVisionConfig(**_SIZES),
    "vit": ViTConfig(**_SIZES),
    "dinov2": Dinov2Config(**_SIZES),
    "siglip": SiglipVisionConfig(**_SIZES),
    "swin": SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.0
    ),
}


def tower(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(TOWERS[kind]).eval()


def pretraining(kind: str, **options: Any) -> Blip2ForPreTraining:
    bert = BertConfig(
        vocab_size=len(text_batch()["input_ids"]) + 200,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    torch.manual_seed(1)
    return Blip2ForPreTraining.from_vision_qformer_pretrained(
        tower(kind), bert, num_query_tokens=QUERIES, image_text_hidden_size=12, **options
    )


@pytest.mark.parametrize("kind", TOWERS)
def test_trains_on_any_tower(kind: str) -> None:
    model = pretraining(kind)
    assert type(model.retrieval) is Blip2AnyVisionForImageTextRetrieval
    assert model.config.model_type == "blip2_any_vision"
    model.retrieval.vision_model.tower.requires_grad_(False)
    model.train()
    assert not model.retrieval.vision_model.tower.training
    states = model.retrieval.tower_states(pixels())
    assert not states.requires_grad
    output = model(**pretraining_batch(), generator=torch.Generator().manual_seed(0))
    output.loss.backward()
    assert model.retrieval.vision_model.post_layernorm.weight.grad is not None
    ring = {"negative_image_index": output.negative_image_index, "negative_text_index": output.negative_text_index}
    model.eval()
    expected = model(**pretraining_batch(), **ring).loss
    assert torch.equal(model(image_embeds=states, **text_batch(), **ring).loss, expected)


@pytest.mark.parametrize(("kind", "index"), [("clip", -2), ("vit", -1), ("dinov2", -1), ("siglip", -1)])
def test_the_layer_that_is_read(kind: str, index: int) -> None:
    """CLIP: the second-last, before any norm, class token kept. Others: what the last block gives."""
    plain = tower(kind)
    blocks: list[torch.Tensor] = []
    stack = next(m for m in plain.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    for layer in stack:
        layer.register_forward_hook(
            lambda m, i, output: blocks.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        plain(pixels())
    model = pretraining(kind).retrieval
    assert model.config.vision_config.num_hidden_layers == 3 + index + 1
    torch.testing.assert_close(model.tower_states(pixels()), blocks[index])
    both = pretraining(kind, drop_last_layers=2).retrieval
    torch.testing.assert_close(both.tower_states(pixels()), blocks[-3])


def test_other_resolutions() -> None:
    model = pretraining("clip").retrieval.eval()
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model.tower_states(pixels(size=24))
    assert model.tower_states(pixels(size=24), interpolate_pos_encoding=True).shape == (4, 10, 24)
    dino = pretraining("dinov2").retrieval.eval()
    assert dino.tower_states(pixels(size=24), interpolate_pos_encoding=True).shape == (4, 10, 24)
    resized = pretraining("clip", image_size=24)
    assert resized.retrieval.tower_states(pixels(size=24)).shape == (4, 10, 24)
    with pytest.raises(ValueError, match="cannot be resized on loading"):
        pretraining("vit", image_size=24)


def test_towers_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="SwinModel is no plain stack of blocks.*drop_last_layers=0"):
        load_vision_tower(tower("swin"), drop_last_layers=1)
    assert pretraining("swin").config.vision_output == "last_hidden_state"
    with pytest.raises(ValueError, match="does not say its `hidden_size`"):
        Blip2AnyVisionConfig(vision_config=transformers.ResNetConfig().to_dict())
    broken = Blip2AnyVisionConfig(vision_config=TOWERS["swin"].to_dict(), vision_output="last_layer")
    broken.vision_config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="SwinModel has no stack of 7 blocks"):
        Blip2AnyVisionForImageTextRetrieval(broken)


def test_towers_come_from_whole_models_and_folders(tmp_path: Path) -> None:
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 99,
    }
    torch.manual_seed(0)
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=dict(_SIZES), text_config=text))
    clip.save_pretrained(tmp_path / "clip")
    clip.vision_model.save_pretrained(tmp_path / "tower")
    expected_config, expected = load_vision_tower(clip)
    assert expected_config.num_hidden_layers == 2
    for source in ("clip", "tower"):
        config, state = load_vision_tower(str(tmp_path / source))
        assert config.num_hidden_layers == 2
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


SCRIPT = """
import sys
import torch
import transformers
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
inputs = torch.load(folder + "/inputs.pt")
code = {"trust_remote_code": True}
retrieval = AutoModel.from_pretrained(folder + "/stage1", **code).eval()
generation = AutoModelForImageTextToText.from_pretrained(folder + "/stage2", **code).eval()
processor = AutoProcessor.from_pretrained(folder + "/stage2", **code)
assert not any(name.startswith("hf_vlp") for name in sys.modules)
with torch.no_grad():
    logits = retrieval(**inputs["stage1"], use_image_text_matching_head=True).logits_per_image
ids = generation.generate(**inputs["stage2"], num_beams=2, max_new_tokens=5)
names = [type(retrieval).__name__, type(generation).__name__, type(processor).__name__]
torch.save({"stage1": logits, "stage2": ids, "names": names}, folder + "/out.pt")
"""


@pytest.mark.slow
def test_folders_carry_their_code(tmp_path: Path) -> None:
    stage1 = pretraining("clip")
    stage1.export(tmp_path / "stage1")
    torch.manual_seed(2)
    processor = generation_processor("llama")
    stage2 = Blip2ForConditionalGeneration.from_stage1(
        tmp_path / "stage1", AutoModelForCausalLM.from_config(llama_config()), processor
    ).eval()
    assert type(stage2) is Blip2AnyVisionForConditionalGeneration
    stage2.save_pretrained(tmp_path / "stage2")
    processor.save_pretrained(tmp_path / "stage2")
    for folder, auto in (("stage1", "AutoModel"), ("stage2", "AutoModelForImageTextToText")):
        auto_map = json.loads((tmp_path / folder / "config.json").read_text())["auto_map"]
        assert auto_map["AutoConfig"] == "configuration_blip2_any_vision.Blip2AnyVisionConfig"
        assert auto_map[auto].startswith("modeling_blip2_any_vision.Blip2AnyVisionFor")
    inputs = {
        "stage1": pretraining_batch(),
        "stage2": dict(processor(images(), return_tensors="pt")),
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin"},
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "out.pt")
    assert result["names"] == [
        "Blip2AnyVisionForImageTextRetrieval",
        "Blip2AnyVisionForConditionalGeneration",
        "Blip2Processor",
    ]
    with torch.no_grad():
        expected = stage1.retrieval.eval()(**inputs["stage1"], use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(result["stage1"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(result["stage2"], stage2.generate(**inputs["stage2"], num_beams=2, max_new_tokens=5))
    again = Blip2AnyVisionForConditionalGeneration.from_pretrained(tmp_path / "stage2")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in stage2.state_dict().items())
    batch = processor.training_inputs(images(), TEXTS)
    torch.testing.assert_close(again.eval()(**batch).loss, stage2(**batch).loss)
