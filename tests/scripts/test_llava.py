"""LLaVA's two scripts from the command line to answers of plain pipelines, on a few Shapes and two steps."""

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from hf_vlp.cli.main import main as command
from hf_vlp.data.conversations import make_template
from hf_vlp.models.clip.image_processing_clip import CLIPImageProcessorPil
from tests.scripts.running import COMMON, script
from tests.tiny import llava as tiny

pytestmark = pytest.mark.slow
INSTRUCTIONS = [
    "--shapes_preset",
    "simple",
    "--shapes_short",
    "true",
    "--shapes_size",
    "12",
    "--max_eval_samples",
    "4",
]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    """Parts, stage 1, stage 2 with all of the language model, and with adapters on packed rows."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    tiny.vision_tower(image_size=32).save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "vision"
    )
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tiny.language_model(len(words)).save_pretrained(folder / "language")
    words.save_pretrained(folder / "language")
    start = ["--model_name_or_path", str(folder / "stage1" / "model"), *INSTRUCTIONS]
    rates = ["--part_learning_rates", "model.multi_modal_projector=1e-4"]
    commands = {
        "stage1": ["--vision_model", str(folder / "vision"), "--language_model", str(folder / "language")],
        "stage2": [*start, *rates, "--template", "mpt", "--group_by_length", "true"],
        "lora": [
            *[*start, *rates, "--template", "llama_2", "--pack_to", "400"],
            *["--lora_r", "2", "--lora_targets", "q_proj", "down_proj"],
        ],
    }
    metrics = {
        name: script("llava_stage1" if name == "stage1" else "llava_stage2").main(
            [*COMMON, *options, "--output_dir", str(folder / name)]
        )
        for name, options in commands.items()
    }
    return folder, metrics


def test_each_stage_is_evaluated(line) -> None:
    _, metrics = line
    assert "eval_loss" in metrics["stage1"]
    for name in ("stage2", "lora"):
        assert {"eval_loss", "eval_exact", "eval_exact_first_turn"} <= set(metrics[name])


def test_what_changes_in_each_stage(line) -> None:
    folder, _ = line
    weights = {name: load_file(folder / name / "model" / "model.safetensors") for name in ("stage1", "stage2", "lora")}
    first = weights["stage1"]
    changed = {
        name: {key for key, value in weights[name].items() if not torch.equal(value, first[key])}
        for name in ("stage2", "lora")
    }
    assert not any(key.startswith("vision_tower") for keys in changed.values() for key in keys)
    assert any("v_proj" in key for key in changed["stage2"])
    assert all("projector" in key or "q_proj" in key or "down_proj" in key for key in changed["lora"])


@pytest.mark.parametrize(("run", "template"), [("stage2", "mpt"), ("lora", "llama_2")])
def test_what_is_exported_prompts_and_stops_as_it_was_trained(line, run: str, template: str) -> None:
    model = line[0] / run / "model"
    processor = AutoProcessor.from_pretrained(model)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}]
    expected = make_template(template, processor).prompt(asked).text
    assert processor.apply_chat_template(asked, add_generation_prompt=True) == expected
    ends = AutoModelForImageTextToText.from_pretrained(model).generation_config.eos_token_id
    stop = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends == ([2, stop] if template == "mpt" else 2)


def test_adapters_merge_to_the_exported_model(line, tmp_path: Path) -> None:
    folder, _ = line
    assert command(["merge", str(folder / "lora" / "adapters"), str(tmp_path / "merged")]) == 0
    templates = [
        AutoProcessor.from_pretrained(path).chat_template for path in (tmp_path / "merged", folder / "lora" / "model")
    ]
    assert templates[0] == templates[1]
    merged, exported = (
        load_file(path / "model.safetensors") for path in (tmp_path / "merged", folder / "lora" / "model")
    )
    assert set(merged) == set(exported)
    for name, value in exported.items():
        torch.testing.assert_close(merged[name], value)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")) is (
        transformers.LlavaForConditionalGeneration
    )


def test_pipelines(line) -> None:
    import hf_vlp  # noqa: F401  (for image-to-text)

    folder, _ = line
    model = str(folder / "stage2" / "model")
    picture = Image.new("RGB", (40, 30), "red")
    message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what ?"}]}
    answers = pipeline("image-text-to-text", model=model)(text=[message], max_new_tokens=3)
    assert answers[0]["generated_text"][-1]["role"] == "assistant"
    captions = pipeline("image-to-text", model=model)(picture, max_new_tokens=3)
    assert isinstance(captions[0]["generated_text"], str)
    assert AutoProcessor.from_pretrained(model).tokenizer.padding_side == "left"


def test_a_folder_to_go_on_from_brings_its_own_parts(line, capsys: pytest.CaptureFixture) -> None:
    stage1 = script("llava_stage1")
    given = stage1.ModelArguments(model_name_or_path=str(line[0] / "stage1" / "model"), connector="linear")
    model, _ = stage1.load_parts(given)
    assert model.config.projector_hidden_act == "gelu"
    assert "not used: --connector (--model_name_or_path brings its own)" in capsys.readouterr().out


def test_missing_parts() -> None:
    with pytest.raises(SystemExit, match="--vision_model and --language_model"):
        script("llava_stage1").main(["--output_dir", "x"])
    with pytest.raises(SystemExit, match="llava_stage1"):
        script("llava_stage2").main(["--output_dir", "x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template", "nonsense"], "unknown template 'nonsense'; there are chat, "),
        (["--group_by_length", "true", "--pack_to", "64"], "packed rows have no padding"),
    ],
)
def test_options_that_cannot_be(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("llava_stage2").main(["--output_dir", "x", "--model_name_or_path", "x", "--use_cpu", *options])
    assert message in capsys.readouterr().err
