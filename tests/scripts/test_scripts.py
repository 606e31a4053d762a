"""Every training script from the command line to the exported folder, on a few Shapes and two steps."""

import ast
import json
import re
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
)

import hf_vlp
from hf_vlp.training.presets import qformer_config
from tests.scripts.running import COMMON, FOLDER, script
from tests.tiny import clip as tiny_clip
from tests.tiny.blip2 import QUERIES, generation_processor, llama_config

TRAINING = ("clip", "blip2_stage1", "blip2_stage2", "language_model")
# Every script, those of other tests as well.
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
NO_PAPER = ("language_model", "evaluate")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    """The whole line: dual encoder, language model, stage 1, stage 2; each starts from the folders before it."""
    folder = tmp_path_factory.mktemp("chain")
    tower = ["--model_type", "eva_clip", "--size", "nano", "--image_size", "32", "--vocab_size", "600"]
    commands = {
        "clip": tower,
        "language_model": ["--hidden_size", "32", "--num_hidden_layers", "2", "--vocab_size", "400"],
        "blip2_stage1": [
            "--vision_model", str(folder / "clip" / "model"), "--qformer_size", "nano", "--num_query_tokens", "4",
            "--rerank", "3", "--feature_cache", str(folder / "cache"), "--feature_dtype", "float32",
        ],
        "blip2_stage2": [
            "--stage1", str(folder / "blip2_stage1" / "model"), "--lora_r", "2", "--prompt", "a photo of",
            "--language_model", str(folder / "language_model" / "model"), "--feature_cache", str(folder / "cache"),
        ],
    }  # fmt: skip
    metrics = {
        name: script(name).main([*COMMON, *options, "--output_dir", str(folder / name)])
        for name, options in commands.items()
    }
    return folder, metrics


@pytest.mark.slow
def test_each_stage_is_evaluated_on_its_task(chain):
    _, metrics = chain
    assert {"eval_loss_itc", "eval_t2i_r1_itc", "eval_i2t_r10_itc"} <= set(metrics["clip"])
    assert {"eval_loss_itm", "eval_loss_itg", "eval_t2i_r1_itm"} <= set(metrics["blip2_stage1"])
    assert {"eval_loss", "eval_cider"} <= set(metrics["blip2_stage2"])
    assert "eval_loss" in metrics["language_model"]
    assert all(np.isfinite(value) for found in metrics.values() for value in found.values())


def test_a_language_model_reads_of_scenes(tmp_path):
    options = ["--told_scenes", "9", "--shapes_preset", "row", "--model_type", "llama", "--hidden_size", "32"]
    options += ["--num_hidden_layers", "1", "--vocab_size", "300", "--max_position_embeddings", "512"]
    metrics = script("language_model").main([*COMMON, *options, "--output_dir", str(tmp_path)])
    assert not any(name.startswith("eval_") for name in metrics)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "llama"
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert words.decode(words("USER: what color is the ring?").input_ids[1:]) == "USER: what color is the ring?"


def test_what_the_stages_export_is_native(chain):
    folder, _ = chain
    retrieval = Blip2ForImageTextRetrieval.from_pretrained(folder / "blip2_stage1" / "model", output_loading_info=True)
    captioning = Blip2ForConditionalGeneration.from_pretrained(
        folder / "blip2_stage2" / "model", output_loading_info=True
    )
    for _, info in (retrieval, captioning):
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    for name in TRAINING[:-1]:
        assert (folder / name / "model" / "README.md").is_file()
        assert (folder / name / "eval_results.json").is_file()
    processor = AutoProcessor.from_pretrained(folder / "blip2_stage2" / "model")
    inputs = processor(images=Image.new("RGB", (32, 32)), text="a photo of", return_tensors="pt")
    tokens = captioning[0].generate(**inputs, max_new_tokens=3)
    assert tokens.shape[0] == 1


def test_stages_go_on_from_their_own_folders(chain, tmp_path, capsys):
    folder, _ = chain
    for name in ("clip", "blip2_stage1"):
        model = str(folder / name / "model")
        options = ["--model_name_or_path", model, "--eval_split", "none", "--max_steps", "1", "--vocab_size", "700"]
        assert script(name).main([*COMMON, *options, "--output_dir", str(tmp_path / name)]) == {}
        assert "not used: --vocab_size (" in capsys.readouterr().out
    other = ["--model_name_or_path", str(folder / "blip2_stage2" / "model"), "--eval_split", "none"]
    script("blip2_stage2").main([*COMMON, *other, "--output_dir", str(tmp_path / "stage2")])


@pytest.mark.parametrize(
    ("name", "start", "score"),
    [
        ("finetune_retrieval", "clip", "eval_t2i_r1_itc"),
        ("finetune_retrieval", "blip2_stage1", "eval_t2i_r1_itm"),
        ("finetune_captioning", "blip2_stage2", "eval_cider"),
    ],
)
def test_tasks_of_other_architectures(chain, tmp_path, name, start, score):
    folder, _ = chain
    options = ["--model_name_or_path", str(folder / start / "model"), "--output_dir", str(tmp_path)]
    options += ["--rerank", "3"] if name == "finetune_retrieval" else ["--num_beams", "1", "--max_new_tokens", "4"]
    assert score in script(name).main([*COMMON, *options])
    assert (tmp_path / "model" / "README.md").is_file()
    # None of them has a momentum twin or a queue.
    if name == "finetune_retrieval":
        with pytest.raises(ValueError, match="no setting 'alpha'"):
            script(name).main([*COMMON, *options, "--alpha", "0.4"])


def test_the_card_tells_the_recipe(chain):
    folder, _ = chain
    card = (folder / "blip2_stage1" / "model" / "README.md").read_text()
    assert "shapes" in card
    assert "learning_rate" in card
    assert "t2i_r1_itm" in card


def test_evaluation(chain, tmp_path, capsys):
    folder, _ = chain
    output = tmp_path / "result.json"
    result = script("evaluate").main(
        ["--task", "retrieval", "--model", str(folder / "blip2_stage1" / "model"), "--limit", "6", "--rerank", "3",
         "--output", str(output), "--options", "ks=[1, 5]"]
    )  # fmt: skip
    assert {"t2i_r1_itc", "t2i_r1_itm", "i2t_r5_itc"} <= set(result["metrics"])
    assert json.loads(output.read_text())["metrics"] == result["metrics"]
    assert "re-ranked" in capsys.readouterr().out
    captions = script("evaluate").main(
        ["--task", "captioning", "--model", str(folder / "blip2_stage2" / "model"), "--limit", "4", "--options",
         "num_beams=1", "max_new_tokens=4"]
    )  # fmt: skip
    assert "cider" in captions["metrics"]


@pytest.mark.parametrize("model_type", ["clip", "clip_resnet", "align"])
def test_every_kind_of_dual_encoder_trains_from_scratch(tmp_path, model_type):
    options = ["--model_type", model_type, "--size", "nano", "--image_size", "64", "--vocab_size", "600"]
    metrics = script("clip").main([*COMMON, *options, "--output_dir", str(tmp_path)])
    assert np.isfinite(metrics["eval_loss_itc"])
    if model_type == "clip":
        CLIPModel.from_pretrained(tmp_path / "model")


def test_a_new_text_tower_learns_to_read_a_locked_image_tower(tmp_path):
    torch.manual_seed(0)
    start = CLIPModel(tiny_clip.clip_config())
    start.save_pretrained(tmp_path / "start")
    tiny_clip.processor().save_pretrained(tmp_path / "start")
    options = ["--vision_model", str(tmp_path / "start"), "--stage", "locked_image", "--size", "nano"]
    options += ["--vocab_size", "600", "--eval_split", "none", "--learning_rate", "0.1"]
    script("clip").main([*COMMON, *options, "--output_dir", str(tmp_path / "out")])
    trained = CLIPModel.from_pretrained(tmp_path / "out" / "model")
    for name, value in start.vision_model.state_dict().items():
        assert torch.equal(trained.vision_model.state_dict()[name], value), name
    assert trained.config.text_config.hidden_size == 128
    size = AutoProcessor.from_pretrained(tmp_path / "out" / "model").image_processor.crop_size
    assert (size["height"], size["width"]) == (tiny_clip.IMAGE_SIZE,) * 2


def test_stage_2_on_any_vision_model_goes_on(tmp_path):
    torch.manual_seed(0)
    processor = generation_processor("llama")
    model = hf_vlp.Blip2ForConditionalGeneration.from_vision_qformer_language_pretrained(
        CLIPVisionModel(CLIPVisionConfig(**{**tiny_clip.vision_config(), "image_size": 16, "patch_size": 8})),
        qformer_config("nano", 64, layers=1),
        LlamaForCausalLM(llama_config()),
        processor,
        num_query_tokens=QUERIES,
    )
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    options = ["--model_name_or_path", str(tmp_path / "start"), "--eval_split", "none", "--save_strategy", "no"]
    script("blip2_stage2").main([*COMMON, *options, "--output_dir", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["model_type"] == "blip2_any_vision"
    assert config["vision_config"]["model_type"] == "clip_vision_model"


def test_own_data_from_a_parquet_folder(tmp_path):
    """As the emoji set has it: parquet files named after their splits, columns image and text and others."""
    import datasets

    def picture(index: int) -> dict:
        buffer = BytesIO()
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    for split, count in {"train": 14, "validation": 6}.items():
        rows = {
            "image": [picture(index) for index in range(count)],
            "text": [f"picture number {index}" for index in range(count)],
            "keywords": [["some", "words"]] * count,
        }
        data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        (tmp_path / "data").mkdir(exist_ok=True)
        data.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    options = ["--train_data", str(tmp_path / "data"), "--size", "nano", "--image_size", "32", "--crop_scale", "0.8"]
    metrics = script("clip").main([*COMMON, *options, "--output_dir", str(tmp_path / "out")])
    assert np.isfinite(metrics["eval_loss_itc"])


def test_a_stream_needs_no_index(tmp_path):
    options = ["--streaming", "--size", "nano", "--image_size", "32", "--eval_split", "none"]
    script("clip").main([*COMMON, *options, "--output_dir", str(tmp_path)])
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_reads_well(name, capsys):
    with pytest.raises(SystemExit) as stop:
        script(name).main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    module = script(name)
    assert module.__doc__.strip().splitlines()[0] in text
    assert max(map(len, text.splitlines())) <= 125
    undocumented = re.findall(r"^  --\w+ \S+$\n^  --", text, flags=re.MULTILINE)
    assert not undocumented


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_thin_and_say_how_they_are_run(name):
    text = (FOLDER / f"{name}.py").read_text()
    description = ast.get_docstring(ast.parse(text)).splitlines()
    assert sum(bool(line.strip()) for line in text.splitlines()) - len(description) <= 180
    assert f"python training_scripts/{name}.py" in text
    assert "arXiv" in text or name in NO_PAPER


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_name_arguments_that_exist(path, tmp_path, monkeypatch):
    named = [name for name in SCRIPTS if path.stem.startswith(f"{name}_")]
    name = "clip" if path.stem == "align_paper" else max(named, key=len)
    module = script(name)
    values = yaml.safe_load(path.read_text())
    parsed = {}

    def stop(types, argv, description=None):
        from hf_vlp.training import parse_arguments

        # No GPU here: the precision of the preset is checked by its value alone.
        trains = name != "capfilt"
        for found in parse_arguments(types, [*argv, *(["--bf16", "false", "--use_cpu"] if trains else [])]):
            parsed.update(vars(found))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "parse_arguments", stop)
    with pytest.raises(KeyboardInterrupt):
        module.main(["--config", str(path), "--output" if name == "capfilt" else "--output_dir", str(tmp_path)])
    for key, value in values.items():
        if key not in ("bf16", "use_cpu"):
            assert parsed[key] == value, key
    if path.stem.endswith("_paper"):
        assert "2.0" in path.read_text() or "arXiv" in path.read_text() or re.search(r"\d{4}\.\d{5}", path.read_text())


@pytest.mark.parametrize("path", sorted((FOLDER / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_launcher_configs_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes in (2, 8)


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("clip", ["--stage", "locked_image"], "--vision_model is missing"),
        ("clip", ["--text_model", "somewhere"], "--vision_model is missing"),
        ("blip2_stage1", [], "--vision_model is missing"),
        ("blip2_stage2", ["--stage1", "somewhere"], "--stage1 and --language_model are missing"),
        ("language_model", ["--text_file", "a.txt", "--told_scenes", "3"], "--text_file and --told_scenes are two"),
        ("evaluate", [], "--model is missing"),
        ("evaluate", ["--model", "m", "--options", "beams"], "NAME=VALUE"),
    ],
)
def test_missing_arguments_are_named(name, argv, message):
    with pytest.raises(SystemExit, match=message):
        script(name).main(argv)


@pytest.mark.slow
def test_a_folder_of_the_wrong_stage_is_refused(chain, tmp_path):
    folder, _ = chain
    language_model = str(folder / "language_model" / "model")
    options = ["--stage1", str(folder / "clip" / "model"), "--language_model", language_model]
    with pytest.raises(ValueError, match="stage.1|stage-1"):
        script("blip2_stage2").main([*COMMON, *options, "--output_dir", str(tmp_path)])


def command(folder: Path, batch_size: int, *extra: str) -> list[str]:
    return [
        str(FOLDER / "clip.py"), "--size", "nano", "--image_size", "32", "--vocab_size", "600", "--shapes_size", "26",
        "--shapes_preset", "simple", "--eval_split", "none", "--max_steps", "6", "--logging_steps", "1",
        "--save_steps", "2", "--disable_tqdm", "true", "--learning_rate", "1e-3",
        "--per_device_train_batch_size", str(batch_size), "--output_dir", str(folder), *extra,
    ]  # fmt: skip


def loss_curve(folder: Path) -> list[float]:
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry["loss_itc"] for entry in state["log_history"] if "loss_itc" in entry]


@pytest.mark.slow
def test_accelerate_launch_on_two_processes_has_the_curve_of_one(tmp_path):
    subprocess.run([sys.executable, *command(tmp_path / "one", 8, "--use_cpu")], check=True, timeout=300)
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--cpu"]
    # 26 records: batches of 8, 8, 8 and 2 over both processes.
    launched = subprocess.run(
        [*launcher, *command(tmp_path / "two", 4)], check=True, timeout=300, capture_output=True, text=True
    )
    assert "starting all of them" in launched.stdout
    one, two = loss_curve(tmp_path / "one"), loss_curve(tmp_path / "two")
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-4)
    settings = json.loads((tmp_path / "two" / "checkpoint-6" / "settings.json").read_text())
    assert settings["arguments"]["world_size"] == 2


@pytest.mark.slow
def test_the_same_command_after_a_kill_ends_with_the_same_weights(tmp_path):
    from safetensors.torch import load_file

    subprocess.run([sys.executable, *command(tmp_path / "whole", 8, "--use_cpu")], check=True, timeout=300)
    argv = [sys.executable, *command(tmp_path / "killed", 8, "--use_cpu")]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint-2").is_dir():
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run(argv, check=True, timeout=300)
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert set(whole) == set(killed)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
