"""Makes transformers know our architectures and tasks, without importing either of them.

`register()` costs a few microseconds: it only leaves hooks for the modules of transformers that hold the tables. A
hook fires when its module has been imported (at once, if it was imported before us) and enters *names*; our classes
are imported when somebody first asks a table for them. So `import hf_vlp` needs no torch, and importing a single model
of transformers never pulls ours in (which would be a circular import for the ones we build on).

After it:

- `AutoConfig`, `AutoModel`, `AutoModelFor...` and `AutoProcessor` resolve the types of the catalogue that transformers
  does not have, with no `trust_remote_code`;
- `pipeline("image-to-text")` captions from the image alone, `pipeline("visual-question-answering")` and
  `pipeline("vqa")` exist again, `pipeline("image-text-matching")` and `pipeline("image-question-answering")` are new.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hf_vlp.models.auto_classes import classes_of
from hf_vlp.models.catalog import ARCHITECTURES, Architecture

# Task -> (class of the pipeline, Auto classes that load its model, type, default checkpoint).
TASKS: dict[str, tuple[str, tuple[str, ...], str, tuple[str, str] | None]] = {
    "image-to-text": (
        "hf_vlp.pipelines.image_to_text.ImageToTextPipeline",
        ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
        "multimodal",
        ("Salesforce/blip-image-captioning-base", "main"),
    ),
    "image-question-answering": (
        "hf_vlp.pipelines.image_question_answering.ImageQuestionAnsweringPipeline",
        ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVisualQuestionAnswering"),
        "multimodal",
        ("Salesforce/blip2-opt-2.7b", "main"),
    ),
    "image-text-matching": (
        "hf_vlp.pipelines.image_text_matching.ImageTextMatchingPipeline",
        ("AutoModelForZeroShotImageClassification", "AutoModel"),
        "multimodal",
        ("Salesforce/blip2-itm-vit-g", "main"),
    ),
}

# Names that transformers 5 removed -> the task that answers to them here.
REVIVED_TASKS = {
    "image-to-text": "image-to-text",
    "visual-question-answering": "image-question-answering",
    "vqa": "image-question-answering",
}


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def _reference(value: Any) -> str | None:
    """`"module:Class"` of a class, the key itself for anything else."""
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    return value if isinstance(value, str) else None


class LazyEntries(dict):
    """The dictionary of registered extras of a table of transformers, with entries that are still to be imported.

    Attributes:
        pending: key -> `"module:Class"` of the value, or several, of which an Auto class takes the one that
            `architectures` of the `config.json` names. A key is a model type, or, in the tables that go from a config
            class to something else, the `"module:Class"` of that config.
    """

    def __init__(self, entries: dict[Any, Any] | None = None) -> None:
        super().__init__(entries or {})
        self.pending: dict[str, str | tuple[str, ...]] = {}

    def _resolve(self, key: str) -> None:
        pending = self.pending[key]
        value = _load(pending) if isinstance(pending, str) else tuple(_load(entry) for entry in pending)
        self.setdefault(_load(key) if ":" in key else key, value)
        # Only now: a failed import must be reported again at the next try.
        self.pending.pop(key, None)

    def _resolve_all(self) -> None:
        for key in list(self.pending):
            self._resolve(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or _reference(key) in self.pending

    def __missing__(self, key: Any) -> Any:
        reference = _reference(key)
        if reference not in self.pending:
            raise KeyError(key)
        self._resolve(reference)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401  (it is this method)

    def __len__(self) -> int:
        return super().__len__() + len(self.pending)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys())

    def keys(self) -> list[Any]:  # type: ignore[override]
        if any(":" in key for key in self.pending):
            self._resolve_all()
        return [*super().keys(), *self.pending]

    def values(self) -> Any:
        self._resolve_all()
        return super().values()

    def items(self) -> Any:
        self._resolve_all()
        return super().items()


def _own_architectures() -> list[Architecture]:
    return [architecture for architecture in ARCHITECTURES.values() if not architecture.native]


def _enter(mapping: Any, key: str, value: str | tuple[str, ...]) -> None:
    """Adds a pending entry to one of transformers' tables."""
    if not isinstance(mapping._extra_content, LazyEntries):
        mapping._extra_content = LazyEntries(mapping._extra_content)
    if key not in mapping._extra_content:
        mapping._extra_content.pending[key] = value


def _register_configs(module: ModuleType) -> None:
    for architecture in _own_architectures():
        _enter(module.CONFIG_MAPPING, architecture.model_type, architecture.classes["config"])


def _register_models(module: ModuleType) -> None:
    for architecture in _own_architectures():
        for name, classes in classes_of(architecture).items():
            if hasattr(module, name):
                mapping = getattr(module, name)._model_mapping
                _enter(mapping, architecture.classes["config"], classes[0] if len(classes) == 1 else classes)


def _register_processors(module: ModuleType) -> None:
    for architecture in _own_architectures():
        if "processor" in architecture.classes:
            _enter(module.PROCESSOR_MAPPING, architecture.classes["config"], architecture.classes["processor"])


class _ConfigLoader:
    """Stands for `AutoConfig` inside `transformers.pipelines`.

    A folder that we saved names the pipeline file that it carries (`custom_pipelines`), for machines without this
    package. Here the same pipelines are installed, so those entries are hidden and no `trust_remote_code` is asked
    for. Pipelines that other people's folders carry are left alone.
    """

    def __init__(self, auto_config: type) -> None:
        self._auto_config = auto_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._auto_config, name)

    def from_pretrained(self, name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = self._auto_config.from_pretrained(name_or_path, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        custom = getattr(config, "custom_pipelines", None)
        # With no task named, the entries of a local folder are what the task is guessed from.
        if custom and (kwargs.get("_from_pipeline") is not None or not os.path.isdir(name_or_path)):
            ours = {_shipped_name(impl) for impl, *_ in TASKS.values()}
            rest = {task: info for task, info in custom.items() if info.get("impl") not in ours}
            if rest:
                config.custom_pipelines = rest
            else:
                del config.custom_pipelines
        return loaded


class _ProcessorLoader:
    """Stands for `AutoProcessor` inside `transformers.pipelines`.

    A BLIP folder names the native processor, which neither cleans texts as the model was trained nor encodes answers;
    ours has the same saved name and reads the same files.
    """

    def __init__(self, auto_processor: type) -> None:
        self._auto_processor = auto_processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._auto_processor, name)

    def from_pretrained(self, name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        processor = self._auto_processor.from_pretrained(name_or_path, *args, **kwargs)
        if "blip" not in ARCHITECTURES:
            return processor
        own = ARCHITECTURES["blip"].load("processor")
        if isinstance(processor, own.__base__) and not isinstance(processor, own):
            kwargs.pop("_from_pipeline", None)
            return own.from_pretrained(name_or_path, *args, **kwargs)
        return processor


def _shipped_name(impl: str) -> str:
    """`package.module.Class` -> `module.Class`, as `config.json` of a saved folder has it."""
    return ".".join(impl.split(".")[-2:])


def _register_pipelines(module: ModuleType) -> None:
    from transformers.models.auto import modeling_auto

    from hf_vlp.pipelines.loading import AnsweringLoader, RetrievalLoader, ZeroShotLoader

    registry = module.PIPELINE_REGISTRY
    for task, (impl, auto_classes, kind, default) in TASKS.items():
        loaders: list[type] = [getattr(modeling_auto, name) for name in auto_classes if hasattr(modeling_auto, name)]
        if task in (own := {"image-text-matching": RetrievalLoader, "image-question-answering": AnsweringLoader}):
            loaders.insert(0, own[task])
        entry: dict[str, Any] = {"impl": impl, "pt": tuple(loaders), "type": kind}
        if default is not None:
            entry["default"] = {"model": default}
        registry.supported_tasks.setdefault(task, entry)

    stock = registry.supported_tasks.get("zero-shot-image-classification")
    if stock is not None:
        stock["impl"] = "hf_vlp.pipelines.zero_shot_image_classification.ProtocolZeroShotPipeline"
        stock["pt"] = (ZeroShotLoader, *stock["pt"])

    resolve = module._resolve_deprecated_task

    def resolve_task(task: str) -> str:
        return REVIVED_TASKS.get(task) or resolve(task)

    module._resolve_deprecated_task = resolve_task
    module.AutoConfig = _ConfigLoader(module.AutoConfig)
    module.AutoProcessor = _ProcessorLoader(module.AutoProcessor)


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processors,
    "transformers.pipelines": _register_pipelines,
}


Hook = Callable[[ModuleType], None]


def _followed_by(run: Hook, hook: Hook) -> Hook:
    def exec_module(module: ModuleType) -> None:
        run(module)
        hook(module)

    return exec_module


class _Finder(MetaPathFinder):
    """Finds the modules of `_HOOKS` as the other finders do, and calls the hook after they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hook = _HOOKS.get(fullname)
        if hook is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                # On the instance: the loader keeps its type, so that `inspect` and resource readers work as before.
                spec.loader.exec_module = _followed_by(spec.loader.exec_module, hook)  # type: ignore[method-assign]
                return spec
        return None


def register() -> None:
    """Leaves the hooks; safe to call more than once. Called by `import hf_vlp`."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, hook in _HOOKS.items():
        if name in sys.modules:
            hook(sys.modules[name])
