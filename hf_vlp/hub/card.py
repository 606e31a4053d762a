"""Model cards: a template of `model_cards/` an architecture, filled with what the user and the folder know.

Metrics are written twice: as `model-index` in the card's metadata, which every tool reads, and, where their data set
is on the Hub, as `.eval_results/<data set>.yaml`, which the Hub's newer leaderboards read.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_vlp.models.catalog import ARCHITECTURES, Architecture
from hf_vlp.resources import resource_folder

CARD_FILE = "README.md"
EVAL_RESULTS_FOLDER = ".eval_results"


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
        name: identifier, as the evaluation names it (`"t2i_r1"`, `"cider_d"`).
        value: the number.
        dataset: readable name of the data it was measured on.
        dataset_id: id of that data set on the Hub; only with it can the Hub rank the result.
        split: split of the data set.
        task: task of the Hub's list (`"image-to-text"`, ...); the model's own where None.
        config: configuration of the data set; the `task_id` of `.eval_results`.
        label: readable name; `name` where None.
        notes: how it was measured (`"ITM re-ranking of the top 128"`).
    """

    name: str
    value: float
    dataset: str
    dataset_id: str | None = None
    split: str | None = None
    task: str | None = None
    config: str | None = None
    label: str | None = None
    notes: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise ValueError(f"metric {self.name!r} on {self.dataset!r}: its value is no number: {self.value!r}")


@dataclass
class CardData:
    """What a card says beyond what the folder itself shows. Everything is optional; nothing is made up.

    Attributes:
        license: identifier of the Hub's list (`"mit"`, `"apache-2.0"`, ...) or `"other"`. The user has to choose it:
            the default says that nobody has.
        name: title of the card; the name of the repository where None.
        data: what the model was trained on, in prose.
        datasets: ids of these data sets on the Hub.
        recipe: stage -> settings, each a mapping or a sentence.
        command: the command line, or lines, that trained it.
        metrics: what was measured.
        base_models: Hub ids of the checkpoints it started from.
        language: codes of the texts' languages.
        tags: added to the tags of the template.
        limits: what it is not good for, in prose, after the limits of the architecture.
        authors: who trained it.
    """

    license: str = "unknown"
    name: str | None = None
    data: str | None = None
    datasets: list[str] = field(default_factory=list)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None
    metrics: list[Metric] = field(default_factory=list)
    base_models: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    limits: str | None = None
    authors: str | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> "CardData":
        """Reads a YAML or JSON file with these attributes; `metrics` is a list of mappings, one a `Metric`.

        Raises:
            ValueError: the file is no mapping, or has a field that a card does not know; the message lists those it
                knows.
        """
        path = Path(path)
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a card file is a mapping of fields, got {type(values).__name__}")
        _check_fields(cls, values, path)
        for row in values.get("metrics", []):
            if not isinstance(row, dict):
                raise ValueError(f"{path}: each entry of 'metrics' is a mapping, got {row!r}")
            _check_fields(Metric, row, path)
        return cls(**{**values, "metrics": [Metric(**row) for row in values.get("metrics", [])]})


def _check_fields(cls: type, values: Mapping[str, Any], path: Path) -> None:
    known = {entry.name for entry in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path}: unknown field(s) {unknown} of a {cls.__name__}; known: {sorted(known)}")


def metrics_from_result(result: Mapping[str, Any], *, dataset_id: str | None = None) -> list[Metric]:
    """The metrics of a result of `hf_vlp.evaluation`.

    Args:
        result: what `run_evaluation` gives or wrote.
        dataset_id: id of the data set on the Hub, if it is there.

    Raises:
        ValueError: this is no result of an evaluation.
    """
    if not isinstance(result.get("metrics"), Mapping):
        raise ValueError("no result of an evaluation: it has no 'metrics'")
    from hf_vlp.evaluation.results import to_eval_results

    return [
        Metric(
            name=entry.metric_type,
            value=entry.metric_value,
            dataset=entry.dataset_name,
            dataset_id=dataset_id,
            split=entry.dataset_split,
            task=entry.task_type,
            label=entry.metric_name,
        )
        for entry in to_eval_results(dict(result))
    ]


# Settings of `TrainingArguments` that a reader needs to repeat a run.
_RECIPE_FIELDS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
)


def recipe_of(arguments: Any) -> dict[str, Any]:
    """The settings of a `TrainingArguments` that a card lists."""
    recipe = {}
    for name in _RECIPE_FIELDS:
        value = getattr(arguments, name, None)
        value = getattr(value, "value", value)
        if (
            value is not None
            and not (name in ("bf16", "fp16") and not value)
            and not (name == "max_steps" and value < 0)
        ):
            recipe[name] = value
    return recipe


def role_of(config: Mapping[str, Any], architecture: Architecture) -> str:
    """Which of the architecture's models a folder holds: the role in the catalogue of the class that it names."""
    name = (config.get("architectures") or [""])[0]
    roles = list(dict.fromkeys(["captioning", "zero_shot", "retrieval", "vqa", *architecture.classes]))
    for role in roles:
        if architecture.classes.get(role, "").endswith(f":{name}"):
            return role
    # A base class of transformers' (`Blip2Model`): it can do what the architecture is first of all for.
    return next(role for role in roles if role in architecture.classes)


# Role -> task of the Hub's list.
PIPELINE_TAGS = {
    "captioning": "image-to-text",
    "retrieval": "zero-shot-image-classification",
    "zero_shot": "zero-shot-image-classification",
    "vqa": "visual-question-answering",
}


def render_card(folder: str | Path, card: CardData | None = None, repo_id: str | None = None) -> str:
    """The text of the card of a saved folder.

    Args:
        folder: a folder that `save_pretrained` wrote.
        card: what the user says about it.
        repo_id: the name that the snippets load; the folder's name where None.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: its model type is not in the catalogue.
    """
    folder = Path(folder)
    card = card or CardData()
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: a card is written for a folder of `save_pretrained`")
    config = json.loads(path.read_text(encoding="utf-8"))
    architecture = ARCHITECTURES.get(config.get("model_type", ""))
    if architecture is None:
        raise ValueError(
            f"{folder}: model type {config.get('model_type')!r} has no card template; known: {sorted(ARCHITECTURES)}"
        )
    role = role_of(config, architecture)
    tag = PIPELINE_TAGS.get(role, "image-feature-extraction")
    name = card.name or (repo_id or folder.resolve().name).split("/")[-1]
    metadata = ModelCardData(
        license=card.license,
        library_name="transformers",
        pipeline_tag=tag,
        language=card.language or None,
        datasets=card.datasets or None,
        base_model=card.base_models or None,
        metrics=sorted({metric.name for metric in card.metrics}) or None,
        tags=["hf_vlp", "vision-language", architecture.model_type, *card.tags],
        model_name=name,
        eval_results=[_model_index_entry(metric, tag) for metric in card.metrics] or None,
    )
    environment = Environment(
        loader=FileSystemLoader(resource_folder("model_cards")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.select_template([f"{architecture.model_type}.md", "_default.md"]).render(
        metadata=metadata.to_yaml(),
        name=name,
        repo_id=repo_id or folder.resolve().name,
        architecture=architecture,
        role=role,
        config=config,
        card=card,
        parameters=_parameters(folder),
        custom_pipelines=config.get("custom_pipelines", {}),
        remote=", trust_remote_code=True" if config.get("auto_map") else "",
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def write_card(folder: str | Path, card: CardData | None = None, repo_id: str | None = None) -> Path:
    """Writes `README.md` and the `.eval_results` of a saved folder; gives the path of the card back."""
    folder = Path(folder)
    text = render_card(folder, card, repo_id)
    path = folder / CARD_FILE
    path.write_text(text, encoding="utf-8")
    entries: dict[str, list[EvalResultEntry]] = {}
    for metric in card.metrics if card else ():
        if metric.dataset_id:
            entries.setdefault(metric.dataset_id, []).append(
                EvalResultEntry(
                    dataset_id=metric.dataset_id,
                    task_id=metric.config or "default",
                    value=metric.value,
                    notes="; ".join(filter(None, (metric.label or metric.name, metric.split, metric.notes))),
                )
            )
    for dataset_id, results in entries.items():
        target = folder / EVAL_RESULTS_FOLDER / f"{_slug(dataset_id)}.yaml"
        target.parent.mkdir(exist_ok=True)
        target.write_text(yaml.safe_dump(eval_result_entries_to_yaml(results), sort_keys=False), encoding="utf-8")
    return path


# What a card's snippets load, where it is a folder's bare name and no repository.
_BARE_NAME = re.compile(r'(from_pretrained\(|model=)"([^"/]+)"')


def name_repository(folder: str | Path, repo_id: str) -> None:
    """Has a card that was written before its repository was known name it: in the snippets, which until then load the
    folder's bare name, and in a title that is this name. A card whose snippets load a repository is left as it is.

    Args:
        folder: with a card.
        repo_id: `"organisation/name"`.
    """
    path = Path(folder) / CARD_FILE
    text = path.read_text(encoding="utf-8")
    names = {name for _, name in _BARE_NAME.findall(text)}
    if len(names) != 1:
        return
    (name,) = names
    text = _BARE_NAME.sub(lambda found: f'{found[1]}"{repo_id}"', text)
    title = repo_id.rpartition("/")[2]
    text = re.sub(rf"^(# |- name: ){re.escape(name)}$", lambda found: found[1] + title, text, flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8")


def _model_index_entry(metric: Metric, task: str) -> EvalResult:
    return EvalResult(
        task_type=metric.task or task,
        dataset_type=metric.dataset_id or _slug(metric.dataset),
        dataset_name=metric.dataset,
        dataset_split=metric.split,
        dataset_config=metric.config,
        metric_type=metric.name,
        metric_name=metric.label,
        metric_value=metric.value,
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _parameters(folder: Path) -> int:
    """Parameters in the folder's safetensors, from their headers alone."""
    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")
    return total
