"""BLIP from the command line: pretraining, and every fine-tuning that it has."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    ViTConfig,
    ViTModel,
)

from hf_vlp.models.catalog import architecture_of
from tests.scripts.running import COMMON, script
from tests.tiny import blip2 as tiny_blip2

NANO = ["--size", "nano", "--image_size", "32", "--vocab_size", "400", "--queue_size", "32", "--rerank", "3"]
SILENT = ["--eval_split", "none", "--max_steps", "1"]
# Script -> role of what it exports, and further options.
TASKS = {
    "finetune_retrieval": ("retrieval", ["--rerank", "3"]),
    "finetune_captioning": ("captioning", ["--prompt", "a picture of", "--max_new_tokens", "6", "--num_beams", "2"]),
    "finetune_vqa": ("vqa", ["--max_answer_length", "6"]),
    "finetune_nlvr2": ("visual_reasoning", ["--image_size", "48"]),
    "finetune_dialog": ("dialog", ["--negatives", "2"]),
}


def blip(folder: Path, *options: str) -> dict[str, float]:
    return script("blip").main([*COMMON, *NANO, *options, "--output_dir", str(folder)])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("blip")
    return folder, blip(folder, "--save_strategy", "steps", "--save_steps", "2")


def test_pretraining_reports_its_terms_and_retrieval(pretrained):
    folder, metrics = pretrained
    assert {"eval_loss_itc", "eval_loss_itm", "eval_loss_lm", "eval_t2i_r1_itc", "eval_t2i_r1_itm"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    config = json.loads((folder / "checkpoint-2" / "config.json").read_text())
    assert config["pretraining"]["alpha_warmup_steps"] == 8, "two epochs of 24 rows in batches of 6"


@pytest.mark.parametrize("native", [BlipForImageTextRetrieval, BlipForConditionalGeneration])
def test_what_it_exports_is_native(pretrained, native):
    _, info = native.from_pretrained(pretrained[0] / "model", output_loading_info=True)
    assert not info["missing_keys"]


def test_pretraining_goes_on_from_its_folder(pretrained, tmp_path):
    from hf_vlp.models.blip.pretraining_blip import BlipForPreTraining

    options = ["--model_name_or_path", str(pretrained[0] / "model"), *SILENT, "--objectives", "itc", "itm"]
    script("blip").main([*COMMON, *options, "--output_dir", str(tmp_path)])
    model = BlipForPreTraining.from_pretrained(tmp_path / "model")
    assert int(model.steps) == 3
    assert int(model.queue.position) == 18


def test_it_starts_from_any_vit_and_bert(tmp_path):
    tokenizer = tiny_blip2.bert_tokenizer()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(hidden_size=24, image_size=32, patch_size=16, **sizes), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "vit")
    BertForMaskedLM(BertConfig(hidden_size=32, vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    towers = ["--vision_model", str(tmp_path / "vit"), "--text_model", str(tmp_path / "bert")]
    more = ["--image_size", "48", "--projection_dim", "12", "--queue_size", "12", *SILENT]
    script("blip").main([*COMMON, *towers, *more, "--output_dir", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 48
    assert config["image_text_hidden_size"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_fine_tuning(pretrained, tmp_path, name):
    role, options = TASKS[name]
    command = ["--model_name_or_path", str(pretrained[0] / "model"), *options, "--output_dir", str(tmp_path)]
    metrics = script(name).main([*COMMON, *command])
    assert "eval_loss" in metrics
    scores = [key for key in metrics if not key.startswith(("eval_loss", "eval_runtime")) and key != "epoch"]
    assert scores, "the task's own metrics"
    kind = architecture_of(tmp_path / "model").load(role)
    model = kind.from_pretrained(tmp_path / "model")
    if "--image_size" in options:
        assert model.config.vision_config.image_size == 48


def test_missing_tower_is_named():
    with pytest.raises(SystemExit, match=r"blip.py: --vision_model and --text_model go together"):
        script("blip").main(["--text_model", "somewhere"])
