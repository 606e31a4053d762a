"""ALBEF from the command line: pretraining and its ablations, and every fine-tuning that it has."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTModel

from hf_vlp.models.catalog import load_class
from tests.scripts.running import COMMON, FOLDER, script
from tests.tiny import blip2 as tiny_blip2

NANO = ["--size", "nano", "--image_size", "32", "--vocab_size", "400", "--queue_size", "32", "--rerank", "3"]
SILENT = ["--eval_split", "none", "--max_steps", "1"]
# Script -> role of what it exports, and further options.
TASKS = {
    "finetune_retrieval": ("retrieval", ["--rerank", "3"]),
    "finetune_vqa": ("vqa", ["--max_answer_length", "6"]),
    "finetune_nlvr2": ("visual_reasoning", ["--image_size", "48"]),
    "finetune_entailment": ("visual_entailment", []),
}


def albef(folder: Path, *options: str) -> dict[str, float]:
    return script("albef").main([*COMMON, *NANO, *options, "--output_dir", str(folder)])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("albef")
    metrics = albef(folder, "--save_strategy", "steps", "--save_steps", "2")
    return folder, metrics


def test_pretraining_reports_its_terms_and_retrieval(pretrained):
    folder, metrics = pretrained
    assert {"eval_loss_itc", "eval_loss_itm", "eval_loss_mlm", "eval_t2i_r1_itc", "eval_t2i_r1_itm"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    card = (folder / "model" / "README.md").read_text()
    assert "shapes" in card and "t2i_r1_itm" in card and "learning_rate" in card
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    # Two of four steps of the first epoch: alpha is at 0 and then at a quarter of 0.4.
    assert [entry["alpha"] for entry in logged if "alpha" in entry] == pytest.approx([0.0, 0.1])


def test_alpha_warms_up_over_the_first_epoch(pretrained):
    folder, _ = pretrained
    config = json.loads((folder / "checkpoint-2" / "config.json").read_text())
    assert config["pretraining"]["alpha_warmup_steps"] == 4, "24 rows in batches of 6"
    assert config["text_config"]["mask_token_id"] is not None
    assert "pretraining" not in json.loads((folder / "model" / "config.json").read_text())


def test_pretraining_goes_on_from_its_folder_with_twin_queue_and_step_count(pretrained, tmp_path, capsys):
    from hf_vlp.models.albef.pretraining_albef import AlbefForPreTraining

    folder, _ = pretrained
    options = ["--model_name_or_path", str(folder / "model"), *SILENT, "--alpha", "0.2", "--size", "nano"]
    script("albef").main([*COMMON, *options, "--output_dir", str(tmp_path)])
    assert "not used: --size (--model_name_or_path brings its own)" in capsys.readouterr().out
    model = AlbefForPreTraining.from_pretrained(tmp_path / "model")
    assert int(model.steps) == 3
    assert int(model.queue.position) == 18
    assert len(model.queue) == 32


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        (["--objectives", "itc", "--mlm_probability", "0.3"], {"itc"}),
        (["--objectives", "itc", "itm", "--negatives", "random"], {"itc", "itm"}),
        (["--distill", "false", "--momentum", "0.5", "--across_ranks", "local"], {"itc", "itm", "mlm"}),
    ],
)
def test_ablations(tmp_path, options, terms):
    metrics = albef(tmp_path, *options, "--save_strategy", "steps", "--save_steps", "2")
    found = {name.removeprefix("eval_loss_") for name in metrics if name.startswith("eval_loss_")}
    assert found == terms
    assert ("eval_t2i_r1_itm" in metrics) == ("itm" in terms), "an untrained matching head ranks nothing"
    settings = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())["pretraining"]
    assert set(settings["objectives"]) == terms
    assert settings["mlm_probability"] == (0.3 if "--mlm_probability" in options else 0.15)
    assert settings["negatives"] == ("random" if "random" in options else "hard")
    assert settings["distill"] is ("--distill" not in options)
    if "--distill" in options:
        assert settings["momentum"] == 0.5 and settings["across_ranks"] == "local"


def test_it_starts_from_any_vit_and_bert(tmp_path):
    tokenizer = tiny_blip2.bert_tokenizer()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(hidden_size=24, image_size=32, patch_size=16, **sizes), add_pooling_layer=False)
    bert = BertForMaskedLM(BertConfig(hidden_size=32, vocab_size=len(tokenizer), **sizes))
    vit.save_pretrained(tmp_path / "vit")
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    towers = ["--vision_model", str(tmp_path / "vit"), "--text_model", str(tmp_path / "bert")]
    more = ["--image_size", "48", "--projection_dim", "12", "--queue_size", "12", "--learning_rate", "0", *SILENT]
    script("albef").main([*COMMON, *towers, *more, "--output_dir", str(tmp_path / "out")])
    model = load_class(tmp_path / "out" / "model", "retrieval").from_pretrained(tmp_path / "out" / "model")
    assert model.config.vision_config.image_size == 48
    assert model.config.text_config.fusion_layer == 1
    kept = model.albef.text_model.embeddings.word_embeddings.weight
    assert torch.equal(kept, bert.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("name", TASKS)
def test_fine_tuning(pretrained, tmp_path, name):
    folder, _ = pretrained
    role, options = TASKS[name]
    command = ["--model_name_or_path", str(folder / "model"), *options, "--output_dir", str(tmp_path)]
    metrics = script(name).main([*COMMON, *command])
    assert any(key.startswith("eval_loss_") for key in metrics)
    scores = [key for key in metrics if not key.startswith(("eval_loss", "eval_runtime")) and key != "epoch"]
    assert scores, "the task's own metrics"
    kind = load_class(tmp_path / "model", role)
    model = kind.from_pretrained(tmp_path / "model")
    if "--image_size" in options:
        assert model.config.vision_config.image_size == 48
        processor = load_class(tmp_path / "model", "processor").from_pretrained(tmp_path / "model")
        assert processor.image_processor.size["height"] == 48
    assert scores[0].removeprefix("eval_") in (tmp_path / "model" / "README.md").read_text()


def test_text_assignment_prepares_pairs_of_images(pretrained, tmp_path, capsys):
    folder, _ = pretrained
    options = [
        "--text_assignment",
        "--model_name_or_path",
        str(folder / "model"),
        "--image_size",
        "48",
        "--alpha",
        "0.2",
        "--output_dir",
        str(tmp_path / "ta"),
    ]
    metrics = script("albef").main([*COMMON, *options])
    assert "eval_loss_ta" in metrics
    assert "not used: --alpha (text assignment has one term and no twin)" in capsys.readouterr().out
    config = json.loads((tmp_path / "ta" / "model" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 48
    command = ["--model_name_or_path", str(tmp_path / "ta" / "model"), *SILENT, "--output_dir", str(tmp_path / "out")]
    script("finetune_nlvr2").main([*COMMON, *command])
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("albef", ["--vision_model", "somewhere"], "go together"),
        ("albef", ["--text_assignment"], "--model_name_or_path is missing"),
        *((name, [], "--model_name_or_path is missing") for name in TASKS),
        ("finetune_captioning", [], "--model_name_or_path is missing"),
        ("finetune_dialog", [], "--model_name_or_path is missing"),
    ],
)
def test_missing_arguments_are_named(name, argv, message):
    with pytest.raises(SystemExit, match=message):
        script(name).main(argv)


@pytest.mark.parametrize("name", ["albef", "blip", *TASKS, "finetune_captioning", "finetune_dialog"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path):
    missing = str(tmp_path / "modle")
    with pytest.raises(SystemExit, match=f"{name}.py: --model_name_or_path .*modle: there is no such folder"):
        script(name).main(["--model_name_or_path", missing, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(("name", "role"), [("finetune_captioning", "captioning"), ("finetune_dialog", "dialog")])
def test_a_task_that_the_architecture_lacks_is_refused_with_those_that_it_has(pretrained, tmp_path, name, role):
    folder, _ = pretrained
    command = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(tmp_path)]
    with pytest.raises(KeyError, match=f"ALBEF.*no 'finetune_{role}' class; it has: .*finetune_vqa"):
        script(name).main([*COMMON, *command])


def test_a_stream_needs_the_length_of_alphas_warm_up(tmp_path):
    with pytest.raises(ValueError, match="alpha_warmup_steps is needed with --streaming"):
        albef(tmp_path, "--streaming", *SILENT)


def command(folder: Path) -> list[str]:
    return [
        str(FOLDER / "albef.py"), *COMMON, *NANO, "--eval_split", "none", "--max_steps", "6", "--save_strategy",
        "steps", "--save_steps", "2", "--learning_rate", "1e-3", "--output_dir", str(folder),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_same_command_after_a_kill_ends_with_the_same_weights_twin_and_queue(tmp_path):
    subprocess.run([sys.executable, *command(tmp_path / "whole")], check=True, timeout=300)
    argv = [sys.executable, *command(tmp_path / "killed")]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint-2").is_dir():
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run(argv, check=True, timeout=300)
    for name in ("model.safetensors", "pretraining_extras.safetensors"):
        whole, killed = (load_file(tmp_path / run / "model" / name) for run in ("whole", "killed"))
        assert set(whole) == set(killed)
        assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert any(key.startswith("momentum.") for key in whole) and "queue.images" in whole
