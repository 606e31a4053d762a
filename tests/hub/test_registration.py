"""What `import hf_vlp` does to transformers, and what it costs."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, pipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

import hf_vlp
from hf_vlp import _registration
from hf_vlp._registration import LazyEntries
from hf_vlp.models.auto_classes import classes_of
from hf_vlp.models.catalog import ARCHITECTURES
from tests.hub import tiny

OWN = [architecture for architecture in ARCHITECTURES.values() if not architecture.native]


def run(code: str) -> dict:
    """The JSON that a fresh interpreter prints last."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(hf_vlp.__file__).parent.parent,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_imports_next_to_nothing() -> None:
    """Its cost in seconds is measured by benchmarks/import_cost.py; here, what it would be made of."""
    report = run(
        """
        import json, sys
        import transformers
        before = set(sys.modules)
        import hf_vlp
        new = set(sys.modules) - before
        print(json.dumps({"new": sorted(new), "torch": "torch" in sys.modules}))
        """
    )
    assert not report["torch"]
    foreign = [name for name in report["new"] if not name.startswith("hf_vlp")]
    assert len(foreign) <= 5, foreign  # modules of the standard library
    assert len(report["new"]) <= 12, report["new"]


@pytest.mark.slow
def test_before_or_after_transformers(tmp_path: Path) -> None:
    """Auto classes and pipelines that were imported first, and functions already held, learn of it as well."""
    code = """
        import json
        {first}
        {second}
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.pipelines import PIPELINE_REGISTRY
        import sys
        lazy = not any(name.startswith("hf_vlp.models.clip_resnet.") for name in sys.modules)
        config = CONFIG_MAPPING["clip_resnet"]
        print(json.dumps({{
            "lazy": lazy,
            "model": AutoModel._model_mapping[config].__name__,
            "processor": AutoProcessor.__name__,
            "task": pipelines.check_task("image-to-text")[0],
            "tasks": sorted(set(PIPELINE_REGISTRY.get_supported_tasks()) & {{"image-to-text", "image-text-matching"}}),
        }}))
    """
    theirs = "from transformers import AutoModel, AutoProcessor, pipelines"
    expected = {
        "lazy": True,
        "model": "CLIPResNetModel",
        "processor": "AutoProcessor",
        "task": "image-to-text",
        "tasks": ["image-text-matching", "image-to-text"],
    }
    assert run(code.format(first=theirs, second="import hf_vlp")) == expected
    assert run(code.format(first="import hf_vlp", second=theirs)) == expected


@pytest.mark.slow
def test_importing_a_model_that_ours_build_on_is_no_circle() -> None:
    report = run(
        """
        import json
        import hf_vlp
        from transformers.models.blip_2.modeling_blip_2 import Blip2Model
        from transformers import AutoConfig
        print(json.dumps({"name": AutoConfig.for_model("blip2_any_vision").model_type}))
        """
    )
    assert report == {"name": "blip2_any_vision"}


@pytest.mark.parametrize("architecture", OWN, ids=lambda architecture: architecture.model_type)
def test_own_types_are_known(architecture: object) -> None:
    config_class = architecture.load("config")
    assert architecture.model_type in CONFIG_MAPPING
    assert CONFIG_MAPPING[architecture.model_type] is config_class
    assert type(AutoConfig.for_model(architecture.model_type)) is config_class
    assert config_class in MODEL_MAPPING
    found = MODEL_MAPPING[config_class]
    assert architecture.load("model") in (found if isinstance(found, tuple) else (found,))
    assert len(classes_of(architecture)["AutoModel"]) == (len(found) if isinstance(found, tuple) else 1)


def test_native_types_stay_native() -> None:
    for architecture in ARCHITECTURES.values():
        if architecture.native:
            config = AutoConfig.for_model(architecture.model_type)
            assert type(config).__module__.startswith("transformers.")
            found = MODEL_MAPPING[type(config)]
            assert found.__module__.startswith("transformers.")


def test_models_from_a_config() -> None:
    config = AutoConfig.for_model(
        "clip_resnet",
        vision_config={"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "num_attention_heads": 4,
                       "projection_dim": 16},
        text_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
                     "vocab_size": 40},
        projection_dim=16,
    )  # fmt: skip
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        assert type(auto.from_config(config)) is ARCHITECTURES["clip_resnet"].load("model")
    assert type(config) in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING


def test_registering_twice_changes_nothing() -> None:
    finders = list(sys.meta_path)
    _registration.register()
    assert sys.meta_path == finders


def test_every_hook_names_a_module_of_transformers() -> None:
    for name in _registration._HOOKS:
        __import__(name)


def test_lazy_entries() -> None:
    entries = LazyEntries({"a": 1})
    entries.pending["b"] = "json:dumps"
    entries.pending["c"] = ("json:dumps", "json:loads")
    assert "b" in entries
    assert "d" not in entries
    assert list(entries.keys()) == ["a", "b", "c"]
    assert entries.pending
    assert entries["b"] is json.dumps
    assert entries["c"] == (json.dumps, json.loads)
    assert not entries.pending
    assert entries.get("d", 4) == 4
    with pytest.raises(KeyError):
        entries["d"]
    assert dict(entries) == {"a": 1, "b": json.dumps, "c": (json.dumps, json.loads)}
    assert len(entries) == 3
    by_class = LazyEntries()
    by_class.pending["decimal:Decimal"] = "json:dumps"
    from decimal import Decimal

    assert Decimal in by_class
    assert int not in by_class
    assert by_class.keys() == [Decimal]
    assert by_class[Decimal] is json.dumps


def test_an_import_that_fails_is_reported_again() -> None:
    entries = LazyEntries()
    entries.pending["x"] = "no_such_module_of_ours:Thing"
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_of_ours"):
            entries["x"]


def test_pipelines_that_other_folders_carry_are_left_alone(tmp_path: Path) -> None:
    model, processor = tiny.blip2()
    own = {"impl": "image_to_text.ImageToTextPipeline", "pt": ["AutoModelForImageTextToText"]}
    model.config.custom_pipelines = {"image-to-text": own}
    folder = tiny.save((model, processor), tmp_path / "ours")
    captioner = pipeline("image-to-text", model=folder)
    assert type(captioner).__module__ == "hf_vlp.pipelines.image_to_text"
    model.config.custom_pipelines = {"image-to-text": {**own, "impl": "their_file.TheirPipeline"}}
    folder = tiny.save((model, processor), tmp_path / "theirs")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("image-to-text", model=folder)
    # Other tasks of the folder never needed the flag.
    assert pipeline("image-text-to-text", model=folder).task == "image-text-to-text"
