"""`hf-vlp convert` of InstructBLIP and Qwen-VL, both ways."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_vlp.cli.errors import EXIT_USAGE
from hf_vlp.cli.main import main
from hf_vlp.models.instructblip.modeling_instructblip import InstructBlipForConditionalGeneration
from hf_vlp.models.qwen_vl.conversion_qwen_vl import config_from_original
from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
from hf_vlp.models.qwen_vl.processing_qwen_vl import QwenVLProcessor
from tests.models.test_qwen_vl_processing import original_config, rank_file
from tests.tiny import blip2, instructblip


def test_qwen_vl(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = blip2.wake(QwenVLForConditionalGeneration(config_from_original(original_config()))).eval()
    source.save_pretrained(tmp_path / "ours")
    original = tmp_path / "original"
    original.mkdir()
    assert main(["convert", "to-qwen-vl", str(tmp_path / "ours"), str(original / "model.safetensors")]) == 0
    rank_file(original / "qwen.tiktoken")
    (original / "config.json").write_text(json.dumps(original_config()))
    assert main(["convert", "qwen-vl", str(original), str(tmp_path / "back")]) == 0
    back = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "back")
    for name, value in source.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert QwenVLProcessor.from_pretrained(tmp_path / "back").num_query_tokens == 4
    assert "2308.12966" in (tmp_path / "back" / "README.md").read_text()
    assert (tmp_path / "back" / "modeling_qwen_vl.py").is_file()


def test_instructblip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = instructblip.model()
    model.save_pretrained(tmp_path / "ours")
    path = tmp_path / "lavis.safetensors"
    assert main(["convert", "to-lavis-instructblip", str(tmp_path / "ours"), str(path)]) == 0
    assert "llm_proj.weight" in load_file(path)
    language = LlamaForCausalLM(model.language_model.config)
    language.load_state_dict(model.language_model.state_dict())
    language.save_pretrained(tmp_path / "lm")
    blip2.llama_tokenizer().save_pretrained(tmp_path / "lm")
    blip2.bert_tokenizer().save_pretrained(tmp_path / "bert")
    line = ["convert", "lavis-instructblip", str(path), str(tmp_path / "back"), "--vision_heads", "2"]
    assert main(line) == EXIT_USAGE
    assert "needs --language_model" in capsys.readouterr().err
    assert main([*line, "--language_model", str(tmp_path / "lm"), "--tokenizer", str(tmp_path / "bert")]) == 0
    back = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "back")
    for name in ("query_tokens", "language_projection.weight", "qformer.embeddings.layernorm.weight"):
        assert torch.equal(back.state_dict()[name], model.state_dict()[name]), name
    assert "2305.06500" in (tmp_path / "back" / "README.md").read_text()
