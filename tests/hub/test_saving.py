"""What is in a saved folder, and that it is there whole or not at all."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, pipeline

from hf_vlp.hub import save_for_hub
from hf_vlp.hub.saving import SHIPPED_PIPELINES, merge_adapters
from tests.hub import tiny
from tests.hub.models import CAPTIONERS, OWN_CODE, SAVED
from tests.tiny import blip2

SHIPPABLE = {"torch", "transformers", "numpy", "PIL", "huggingface_hub"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {name: save_for_hub(*make(), root / name) for name, make in SAVED.items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", SAVED)
def test_contents(folders: dict[str, Path], name: str) -> None:
    folder = folders[name]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert ("generation_config.json" in names) == (name in CAPTIONERS)
    config = config_of(folder)
    own = name in OWN_CODE
    assert bool(config.get("auto_map")) == own
    if own:
        wanted = {"AutoConfig", "AutoModel"}
        wanted |= (
            {"AutoModelForImageTextToText"} if name in CAPTIONERS else {"AutoModelForZeroShotImageClassification"}
        )
        assert wanted <= set(config["auto_map"])
    named = {f"{entry.split('.')[0]}.py" for entry in config.get("auto_map", {}).values()}
    named |= {f"{entry['impl'].split('.')[0]}.py" for entry in config["custom_pipelines"].values()}
    assert named <= names
    tasks = set(config["custom_pipelines"])
    assert tasks == ({"image-to-text", "image-question-answering", "visual-question-answering"} if name in CAPTIONERS
                     else {"image-text-matching"})  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_the_code_in_a_folder_needs_nothing_of_ours(folders: dict[str, Path], name: str) -> None:
    for path in folders[name].glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert (path.parent / f"{node.module}.py").is_file(), f"{path.name} needs {node.module}"
                continue
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                root = module.split(".")[0]
                assert root in SHIPPABLE or root in sys.stdlib_module_names, f"{path.name} imports {module}"


def test_the_tables_of_pipelines_agree() -> None:
    """What a folder names is what the package installs under the same name."""
    from hf_vlp import pipelines
    from hf_vlp._registration import REVIVED_TASKS, TASKS

    for tasks in SHIPPED_PIPELINES.values():
        for task, (module, name, _) in tasks.items():
            assert TASKS[REVIVED_TASKS.get(task, task)][0] == f"hf_vlp.pipelines.{module}.{name}"
            assert hasattr(pipelines, name)


@pytest.mark.parametrize("name", [name for name in SAVED if name not in OWN_CODE])
def test_native_weights_are_unchanged(folders: dict[str, Path], name: str) -> None:
    """Native model -> our class -> folder -> plain class: the same names and the same bits."""
    model, _ = SAVED[name]()
    stored = load_file(folders[name] / "model.safetensors")
    native = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models."))
    loaded, info = native.from_pretrained(folders[name], output_loading_info=True)
    assert not any(info.values()), info
    state = loaded.state_dict()
    for key, value in stored.items():
        assert torch.equal(state[key], value), key
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


def test_tokenizers_keep_their_padding_side(folders: dict[str, Path]) -> None:
    assert AutoProcessor.from_pretrained(folders["blip2-opt"]).tokenizer.padding_side == "left"
    assert AutoProcessor.from_pretrained(folders["blip2-t5"]).tokenizer.padding_side == "right"
    assert AutoProcessor.from_pretrained(folders["clip"]).tokenizer.padding_side == "right"


def test_auto_model_takes_the_class_that_the_folder_names(folders: dict[str, Path]) -> None:
    retrieval = AutoModel.from_pretrained(folders["any-vision-retrieval"])
    assert type(retrieval).__name__ == "Blip2AnyVisionForImageTextRetrieval"
    captioner = AutoModel.from_pretrained(folders["any-vision-opt"])
    assert type(captioner).__name__ == "Blip2AnyVisionForConditionalGeneration"


def test_the_pipeline_saves_itself(folders: dict[str, Path], tmp_path: Path) -> None:
    """`Pipeline.save_pretrained` of transformers ships the same file."""
    captioner = pipeline("image-to-text", model=str(folders["blip2-opt"]))
    captioner.save_pretrained(tmp_path)
    assert (tmp_path / "image_to_text.py").is_file()
    assert (tmp_path / "image_pipeline.py").is_file()
    assert config_of(tmp_path)["custom_pipelines"]["image-to-text"]["impl"] == "image_to_text.ImageToTextPipeline"


def test_a_pretraining_model_is_saved_as_what_it_trains(tmp_path: Path) -> None:
    model = blip2.pretraining_model()
    folder = save_for_hub(model, blip2.retrieval_processor(), tmp_path / "stage1")
    assert config_of(folder)["architectures"] == ["Blip2ForImageTextRetrieval"]
    assert set(load_file(folder / "model.safetensors")) == set(model.retrieval.state_dict())


def _with_lora(model: PreTrainedModel, wrapped: bool) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if wrapped:
        model.language_model = get_peft_model(model.language_model, config)
    else:
        inject_adapter_in_model(config, model.language_model)
    return model.eval()


@pytest.mark.parametrize("wrapped", [True, False])
def test_lora_is_merged_into_a_copy(tmp_path: Path, wrapped: bool) -> None:
    plain = blip2.generation_model("opt")
    processor = blip2.generation_processor("opt")
    inputs = processor(images=blip2.images(2), return_tensors="pt")
    with torch.no_grad():
        before = plain(**inputs).logits
        model = _with_lora(plain, wrapped)
        adapted = model(**inputs).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    names = set(model.state_dict())
    folder = save_for_hub(model, processor, tmp_path / "merged")
    assert set(model.state_dict()) == names, "the model itself was changed"
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, adapted, rtol=1e-4, atol=1e-4)


def test_a_model_without_adapters_is_not_copied() -> None:
    model = blip2.generation_model("opt")
    assert merge_adapters(model) is model


def test_a_sharded_model(tmp_path: Path) -> None:
    model, processor = SAVED["blip2-opt"]()
    folder = save_for_hub(model, processor, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert AutoModelForImageTextToText.from_pretrained(folder)


# Failures


class _Failing:
    """A processor that writes half of itself."""

    tokenizer = None

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError("no space left on device")


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    model, processor = SAVED["blip2-opt"]()
    with pytest.raises(OSError, match="no space left"):
        save_for_hub(model, _Failing(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    folder = save_for_hub(model, processor, tmp_path / "model")
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(OSError, match="no space left"):
        save_for_hub(model, _Failing(), tmp_path / "model")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == contents
    assert list(tmp_path.iterdir()) == [folder]


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    model, processor = SAVED["blip2-opt"]()
    folder = save_for_hub(model, processor, tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    save_for_hub(model, processor, folder)
    assert not (folder / "pytorch_model.bin").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    model, processor = tiny.blip2()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and holds no saved model"):
        save_for_hub(model, processor, tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        save_for_hub(model, processor, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    save_for_hub(model, processor, tmp_path, overwrite=True)
    assert (tmp_path / "config.json").is_file()


def test_a_model_that_holds_nothing(tmp_path: Path) -> None:
    with torch.device("meta"):
        model, processor = tiny.blip2()
    with pytest.raises(ValueError, match="hold no values"):
        save_for_hub(model, processor, tmp_path / "model")


def test_a_type_that_the_catalogue_lacks(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="is of type 'vit', which hf_vlp does not train"):
        save_for_hub(model, None, tmp_path / "model")
    assert not (tmp_path / "model").exists()
