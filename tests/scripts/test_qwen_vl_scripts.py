"""InstructBLIP and Qwen-VL from the command line: from tiny parts to the exported folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
from tests.scripts.running import COMMON, script
from tests.tiny import blip2 as tiny_blip2


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tower, a language model and a stage-1 folder, all tiny and random."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**tower, image_size=32, patch_size=8)).save_pretrained(folder / "tower")
    tokenizer = tiny_blip2.llama_tokenizer()
    config = tiny_blip2.llama_config(vocab_size=len(tokenizer), max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    tiny_blip2.pretraining_model().export(folder / "stage1")
    tiny_blip2.retrieval_processor().save_pretrained(folder / "stage1")
    return folder


def test_instructblip(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    metrics = script("instructblip").main(
        [
            *COMMON, "--stage1", str(parts / "stage1"), "--language_model", str(parts / "lm"), "--shapes_short",
            "--output_dir", str(tmp_path / "one"),
        ]
    )  # fmt: skip
    assert {"eval_exact", "eval_exact_first_turn"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    model, info = transformers.InstructBlipForConditionalGeneration.from_pretrained(
        tmp_path / "one" / "model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "instructblip" in (tmp_path / "one" / "model" / "README.md").read_text()
    capsys.readouterr()
    metrics = script("instructblip").main(
        [
            *COMMON, "--model_name_or_path", str(tmp_path / "one" / "model"), "--stage", "qformer",
            "--sources", "captioning=shapes", "vqa=shapes@2.0", "conversation=shapes", "--lora_r", "2",
            "--output_dir", str(tmp_path / "two"),
        ]
    )  # fmt: skip
    assert "no evaluation: --sources are training data" in capsys.readouterr().out
    assert not any(name.startswith("eval_") for name in metrics or {})
    again = transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "two" / "model")
    assert not torch.equal(again.query_tokens, model.query_tokens)
    assert torch.equal(again.vision_model.post_layernorm.weight, model.vision_model.post_layernorm.weight)


def test_qwen_vl_in_three_stages(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = script("qwen_vl").main
    new = [
        "--vision_model", str(parts / "tower"), "--language_model", str(parts / "lm"), "--num_query_tokens", "4",
        "--resampler_heads", "2",
    ]  # fmt: skip
    metrics = run([*COMMON, *new, "--stage", "pretrain", "--output_dir", str(tmp_path / "1")])
    assert np.isfinite(metrics["eval_cider"])
    first = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "1" / "model")
    metrics = run(
        [
            *COMMON, "--stage", "multitask", "--model_name_or_path", str(tmp_path / "1" / "model"), "--image_size",
            "48", "--group_by_length", "true", "--num_query_tokens", "9", "--output_dir", str(tmp_path / "2"),
        ]
    )  # fmt: skip
    assert "not used: --num_query_tokens (--model_name_or_path brings its own)" in capsys.readouterr().out
    assert 0 <= metrics["eval_exact"] <= 1
    second = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "2" / "model")
    assert second.config.vision_config.image_size == 48
    assert not torch.equal(second.vision_model.position_embedding, first.vision_model.position_embedding)
    run(
        [
            *COMMON, "--stage", "sft", "--model_name_or_path", str(tmp_path / "2" / "model"), "--lora_r", "2",
            "--pack_to", "256",
            "--eval_split", "none", "--output_dir", str(tmp_path / "3"),
        ]
    )  # fmt: skip
    third = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "3" / "model")
    assert torch.equal(third.vision_model.position_embedding, second.vision_model.position_embedding)
    assert not torch.equal(third.resampler.query, second.resampler.query)
    config = json.loads((tmp_path / "3" / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"].endswith("QwenVLForConditionalGeneration")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("instructblip", [], "--stage1 and --language_model are missing"),
        ("instructblip", ["--model_name_or_path", "x", "--streaming", "--max_steps", "1"], "data sets of known size"),
        ("instructblip", ["--model_name_or_path", "x", "--sources", "vqa"], "takes FAMILY=DATA"),
        (
            "instructblip",
            ["--model_name_or_path", "x", "--sources", "vqqa=shapes"],
            "no family 'vqqa'; there",
        ),
        ("instructblip", ["--model_name_or_path", "x", "--sources", "vqa=shapes@two"], "weight 'two' is no number"),
        ("qwen_vl", [], "--vision_model and --language_model are missing"),
        ("qwen_vl", ["--stage", "sft", "--vision_model", "x", "--language_model", "y"], "goes on from an earlier one"),
        ("qwen_vl", ["--model_name_or_path", "x", "--pack_to", "64"], "pretrain reads captions"),
    ],
)
def test_what_is_missing_is_said(name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        script(name).main(["--use_cpu", *arguments])
