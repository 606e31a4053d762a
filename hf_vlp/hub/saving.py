"""Folders that load anywhere: model, processor, generation settings, the code that must travel, and the card."""

import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from hf_vlp.hub.card import CardData, role_of, write_card
from hf_vlp.models.auto_classes import classes_of
from hf_vlp.models.catalog import Architecture, architecture_of

# Role -> task -> (file of hf_vlp/pipelines, class, Auto classes that load its model).
SHIPPED_PIPELINES: dict[str, dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "captioning": {
        "image-to-text": ("image_to_text", "ImageToTextPipeline", ("AutoModelForImageTextToText",)),
        "visual-question-answering": (
            "image_question_answering",
            "ImageQuestionAnsweringPipeline",
            ("AutoModelForImageTextToText",),
        ),
        "image-question-answering": (
            "image_question_answering",
            "ImageQuestionAnsweringPipeline",
            ("AutoModelForImageTextToText",),
        ),
    },
    "retrieval": {
        "image-text-matching": (
            "image_text_matching",
            "ImageTextMatchingPipeline",
            ("AutoModelForZeroShotImageClassification",),
        ),
    },
}
SHIPPED_PIPELINES["zero_shot"] = SHIPPED_PIPELINES["retrieval"]
SHIPPED_PIPELINES["vqa"] = dict.fromkeys(
    ("visual-question-answering", "image-question-answering"),
    ("image_question_answering", "ImageQuestionAnsweringPipeline", ("AutoModelForVisualQuestionAnswering",)),
)


def save_for_hub(
    model: PreTrainedModel,
    processor: ProcessorMixin | None,
    folder: str | Path,
    *,
    card: CardData | None = None,
    repo_id: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = False,
) -> Path:
    """Writes a folder that `AutoModel`, `AutoProcessor` and `pipeline` load, here and without this package.

    The folder appears whole or not at all: everything is written beside it and then moved into place.

    Args:
        model: the model; of a pretraining model the inference model is saved; LoRA is merged into a copy.
        processor: its processor; None keeps the folder without one, which no pipeline can use.
        folder: where to.
        card: what the model card says.
        repo_id: the name under which it will be pushed, for the snippets of the card.
        max_shard_size: bytes, or a string as `"5GB"`, of the largest weight file.
        overwrite: replace a folder that has other contents than a saved model.
        verify: load the folder in a process without this package and compare (`verify_folder`).

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something else and `overwrite` is False.
        ValueError: the model's type is not in the catalogue, or a parameter is on the meta device.
        VerificationError: what was loaded differs.
    """
    folder = Path(folder)
    model = merge_adapters(getattr(model, "inference_model", model))
    architecture = architecture_of(model)
    on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if on_meta:
        raise ValueError(f"parameter {on_meta[0]!r} and {len(on_meta) - 1} more hold no values (meta device)")
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; give a folder")
    replaced = folder.is_dir() and any(folder.iterdir())
    if replaced and not overwrite and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} is not empty and holds no saved model; choose another or pass overwrite=True")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        if not architecture.native:
            ship_code(model, architecture)
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        if processor is not None:
            keep_padding_side(processor)
            processor.save_pretrained(staging)
        complete_folder(staging)
        write_card(staging, card, repo_id or folder.name)
        staging.chmod(0o755)
        _put_in_place(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if verify:
        from hf_vlp.hub.verification import verify_folder

        verify_folder(folder, model=model, processor=processor)
    return folder


def _put_in_place(staging: Path, folder: Path) -> None:
    if not folder.is_dir():
        staging.rename(folder)
        return
    # A rename can't replace a folder that is not empty: the old one steps aside, and is back if the new one fails.
    old = folder.with_name(f".{folder.name}.old-{staging.name.rsplit('-', 1)[-1]}")
    folder.rename(old)
    try:
        staging.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def keep_padding_side(processor: ProcessorMixin) -> None:
    """Has the tokenizer save the side on which it pads.

    transformers saves what a tokenizer was made with, not what was set later; a folder of a decoder-only model would
    come back padding on the right, and a batch of prompts would be continued from its padding.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The model with LoRA weights merged into the layers they adapt: a copy, or the model itself if it has none.

    The adapters may wrap the whole model or one part of it (the language model).
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(module, PeftModel | BaseTunerLayer) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    if isinstance(model, PeftModel):
        return model.merge_and_unload()
    for name, module in list(model.named_modules()):
        if isinstance(module, PeftModel):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.merge_and_unload())
    # `inject_adapter_in_model` and `add_adapter` put the layers in without a wrapper.
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
    return model


def ship_code(model: PreTrainedModel, architecture: Architecture) -> None:
    """Has `save_pretrained` of this class, now and later, write its code beside the weights.

    A class whose file needs this package can't travel; it writes the code of a class that can by itself.
    """
    for cls in (type(model.config), type(model)):
        if cls._auto_class is not None or not _self_contained(cls):
            continue
        if cls is type(model):
            names = auto_classes(cls.__name__, architecture)
            if not names:
                raise ValueError(f"{cls.__name__} is no inference model of {architecture.model_type!r}; save that")
            # The most telling one: `AutoModel` is added to every folder anyway.
            cls.register_for_auto_class(names[-1])
        else:
            cls.register_for_auto_class()


def _self_contained(cls: type) -> bool:
    file = sys.modules[cls.__module__].__file__
    files = [file, *get_relative_import_files(file)]
    return not any("hf_vlp" in get_imports(entry) for entry in files if Path(entry).is_file())


def auto_classes(class_name: str, architecture: Architecture) -> list[str]:
    """The Auto classes that may give the class of this name."""
    return [
        name
        for name, references in classes_of(architecture).items()
        if any(reference.endswith(f":{class_name}") for reference in references)
    ]


def complete_folder(folder: Path) -> None:
    """Adds to a folder of `save_pretrained` what its `config.json` should name: Auto classes and pipelines."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    architecture = architecture_of(folder)
    class_name = (config.get("architectures") or [""])[0]
    if not architecture.native:
        auto_map = config.get("auto_map", {})
        models = [value for key, value in auto_map.items() if key != "AutoConfig"]
        if "AutoConfig" not in auto_map or not models:
            raise ValueError(f"{folder}: no code was saved for {class_name}, without which nobody else can load it")
        for name in auto_classes(class_name, architecture):
            auto_map.setdefault(name, models[0])
    pipelines = SHIPPED_PIPELINES.get(role_of(config, architecture), {})
    if pipelines:
        config["custom_pipelines"] = {
            task: {"impl": f"{module}.{name}", "pt": list(auto)} for task, (module, name, auto) in pipelines.items()
        }
    source = Path(__file__).resolve().parent.parent / "pipelines"
    for module in {module for module, _, _ in pipelines.values()}:
        main = source / f"{module}.py"
        for file in [main, *map(Path, get_relative_import_files(main))]:
            shutil.copyfile(file, folder / file.name)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
