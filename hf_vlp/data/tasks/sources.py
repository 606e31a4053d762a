"""One function from a task and the name of a data set to rows."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..columns import DIALOGS, ENTAILMENT, GROUNDING, PAIRS, QUESTIONS, STATEMENTS, Schema
from ..readers import json_kind, load_json
from ..sources import Rows, load_rows, part_of_rows, rows_of_readers
from ..splits import ALL, by_split, canonical_split, chosen, parse_split
from .readers import RefsFile, TaskLines, TaskList, VisDialFile, VQAFile

# Task -> schema of its rows.
TASKS: dict[str, Schema] = {
    "retrieval": PAIRS,
    "captioning": PAIRS,
    "vqa": QUESTIONS,
    "visual_reasoning": STATEMENTS,
    "visual_entailment": ENTAILMENT,
    "dialog": DIALOGS,
    "grounding": GROUNDING,
}
BOX_FORMATS = ("xyxy", "xywh")
# Words in the names of files that go with the one that is read.
_COMPANIONS = ("annotations", "dense", "instances")


def load_task(
    task: str,
    spec: str | os.PathLike[str],
    split: str = "train",
    *,
    image_root: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    box_format: str = "xyxy",
    streaming: bool = False,
    seed: int = 0,
    **shapes_options: Any,
) -> Rows:
    """Rows of a task, with `source`, `key`, and `problem` where a record could not be read whole.

    | task | columns |
    |---|---|
    | `retrieval`, `captioning` | `image`, `text`, `image_id`: see `load_pairs` |
    | `vqa` | `image`, `question`, `answers`, `weights`, `question_id`, `question_type`, `answer_type`, `image_id` |
    | `visual_reasoning` | `image_0`, `image_1`, `text`, `label` (0 false, 1 true), `sentence_id`, `identifier` |
    | `visual_entailment` | `image`, `text`, `label` (0 contradicts, 1 neutral, 2 entails), `image_id`, `pair_id` |
    | `dialog` | `image`, `caption`, `turns` [{`question`, `answer`, `candidates`, `relevance`}], `image_id` |
    | `grounding` | `image`, `text`, `boxes` (left, top, right, bottom in pixels), `proposals`, `image_id` |

    A source is what `load_pairs` reads (Shapes, parquet, JSON lines, JSON, CSV, tars, saved datasets, the Hub), and
    the annotation files of VQAv2, NLVR2, SNLI-VE, VisDial v1.0 and RefCOCO, or a folder of them.

    Args:
        task: see above.
        spec: as in `load_pairs`.
        split: as in `load_pairs`; RefCOCO has `testA` and `testB` as well.
        image_root: folder with the images of annotation files; the file's own folder if left out.
        columns: role -> column, where the names do not say it. The roles are the columns above.
        annotations: the file that goes with the one of `spec`, if it is not found beside it by its name: the answers
            of VQA's questions (`"none"` for questions without answers), the dense annotations of VisDial, the
            instances of RefCOCO.
        box_format: what the four numbers of a box mean in plain data: `"xyxy"` (corners) or `"xywh"` (corner and
            size). Annotation files of RefCOCO need no word.
        streaming: give an `IterableDataset`.
        seed: of Shapes.
        shapes_options: `size`, `preset`, `turns` and `candidates` of dialogs, `questions` of VQA, and the fields of
            `ShapesConfig`.

    Raises:
        FileNotFoundError, TypeError: as `load_pairs`.
        ValueError: as `load_pairs`; unknown task or box format; the answers of VQA's questions are not found; a
            pickled file, which is never opened.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    if box_format not in BOX_FORMATS:
        raise ValueError(f"box_format={box_format!r} is none of {BOX_FORMATS}")
    spec = os.fspath(spec)
    schema = TASKS[task]
    path = Path(spec).expanduser()
    if path.suffix in (".p", ".pkl", ".pickle") and path.is_file():
        raise ValueError(_pickled(path))
    name, part = parse_split(split)
    if path.exists() and spec != "shapes":
        root = None if image_root is None else Path(image_root)
        if root is not None and not root.is_dir():
            raise ValueError(f"image_root={str(image_root)!r} is not a folder")
        given = None if annotations is None else Path(annotations)
        if given is not None and str(given) != "none" and not given.is_file():
            raise FileNotFoundError(f"there is no file annotations={str(annotations)!r}")
        readers = _official(task, path, name, given, root)
        if readers:
            if shapes_options:
                raise TypeError(f"{', '.join(sorted(shapes_options))}: only Shapes takes such options, not {spec!r}")
            return part_of_rows(rows_of_readers(readers, schema, streaming, columns, root, spec), part)
    if annotations is not None:
        raise ValueError(
            f"annotations={str(annotations)!r}: {spec!r} is no annotation file that another one goes with; give the "
            f"questions of VQA, the dialogs of VisDial or the refs of RefCOCO as the source"
        )
    if box_format != "xyxy":
        schema = Schema(task, schema, labels=schema.labels, box_format=box_format)
    return load_rows(spec, split, schema, streaming, columns, image_root, seed, shapes_options)


def _official(task: str, path: Path, split: str, annotations: Path | None, root: Path | None) -> list[Any]:
    """Readers of the annotation files at a path; none if they are not of a known benchmark."""
    if task not in _READERS:
        return []
    documents = _documents(path, split) if path.is_dir() else [path]
    readers = []
    for document in documents:
        if document.suffix not in (".json", ".jsonl", ".ndjson"):
            continue
        reader = _READERS[task](task, document, split, annotations, root or document.parent)
        if reader is not None:
            readers.append(reader)
    if readers and path.is_file() and not isinstance(readers[0], RefsFile):
        chosen(by_split([path], path), split, str(path))
    return readers


def _documents(folder: Path, split: str) -> list[Path]:
    """The JSON files of a folder that belong to a split; refs of RefCOCO, which name their splits inside, always."""
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")) or any(folder.glob("*.parquet")):
        return []
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jsonl"))
    if refs := [file for file in files if file.name.startswith("refs")]:
        if len(refs) > 1:
            names = ", ".join(file.name for file in refs)
            raise ValueError(f"{folder} holds several files of refs ({names}); name the one to read")
        return refs
    pickled = next((file for file in sorted(folder.glob("refs*.p"))), None)
    if pickled is not None:
        raise ValueError(_pickled(pickled))
    files = [file for file in files if not any(word in file.name.lower() for word in _COMPANIONS)]
    if exact := [file for file in files if file.stem == split]:
        return exact
    return chosen(by_split(files, folder), split, str(folder)) if files else []


def _vqa(task: str, path: Path, split: str, annotations: Path | None, root: Path) -> VQAFile | None:
    if path.suffix != ".json" or json_kind(path) == "lines":
        return None
    content = load_json(path)
    if not isinstance(content, dict):
        return None
    if not isinstance(content.get("questions"), list):
        listed = content.get("annotations")
        if isinstance(listed, list) and listed and isinstance(listed[0], dict) and "answers" in listed[0]:
            raise ValueError(
                f"{path} holds the answers of VQA without the questions; give the file of questions as the source and "
                f"this one as annotations"
            )
        return None
    if annotations is not None:
        return VQAFile(path, None if str(annotations) == "none" else annotations, root)
    name = path.name.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace("questions", "annotations")
    beside = path.with_name(name)
    if name != path.name and beside.is_file():
        return VQAFile(path, beside, root)
    if str(content.get("data_subtype", "")).startswith("test") or canonical_split(split) == "test":
        return VQAFile(path, None, root)
    raise ValueError(
        f"the answers are missing: there is no {name} beside {path}; name the file as annotations, or say "
        f"annotations='none' to load the questions alone"
    )


def _visdial(task: str, path: Path, split: str, annotations: Path | None, root: Path) -> VisDialFile | None:
    if path.suffix != ".json" or json_kind(path) == "lines":
        return None
    content = load_json(path)
    data = content.get("data") if isinstance(content, dict) else None
    if not (isinstance(data, dict) and isinstance(data.get("dialogs"), list)):
        return None
    missing = [name for name in ("questions", "answers") if not isinstance(data.get(name), list)]
    if missing:
        raise ValueError(f"{path} has dialogs but no list of {' and of '.join(missing)} that they name by number")
    if annotations is None:
        beside = sorted(path.parent.glob(f"{path.stem}_dense*.json"))
        annotations = beside[0] if beside else None
    return VisDialFile(path, None if str(annotations) == "none" else annotations, root)


def _refs(task: str, path: Path, split: str, annotations: Path | None, root: Path) -> RefsFile | None:
    if path.suffix != ".json" or json_kind(path) == "lines":
        return None
    content = load_json(path)
    if not (isinstance(content, list) and content and isinstance(content[0], dict)):
        return None
    if not {"ann_id", "sentences"} <= set(content[0]):
        return None
    instances = annotations or path.with_name("instances.json")
    if not instances.is_file():
        raise ValueError(f"{path} names boxes by number: give the COCO instances with them as annotations")
    reader = RefsFile(path, instances, root, split)
    if split != ALL and canonical_split(split) not in reader.splits():
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(sorted(reader.splits()))}")
    return reader


def _records(task: str, path: Path, split: str, annotations: Path | None, root: Path) -> TaskLines | TaskList | None:
    if path.suffix != ".json" or json_kind(path) == "lines":
        return TaskLines(path, task, root)
    return TaskList(path, task, root) if json_kind(path) == "list" else None


def _pickled(path: Path) -> str:
    return (
        f"{path} is a pickle, and opening one runs whatever code is in it, so it is not opened here. If you trust "
        f'where it comes from, write it as JSON once:  python -c "import json, pickle; json.dump(pickle.load(open('
        f"'{path.name}', 'rb')), open('{path.stem}.json', 'w'))\"  and name that file instead"
    )


_READERS: dict[str, Callable[[str, Path, str, Path | None, Path], Any]] = {
    "vqa": _vqa,
    "visual_reasoning": _records,
    "visual_entailment": _records,
    "dialog": _visdial,
    "grounding": _refs,
}
