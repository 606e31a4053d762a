"""Images with a class: data that has no text, and so is no source of pairs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset, load_from_disk

from hf_vlp.data import load_pairs
from hf_vlp.data.records import texts_of
from hf_vlp.data.splits import by_split, chosen

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".tar", ".tgz", ".gz")


def load_labelled(
    data: str | os.PathLike[str],
    split: str = "test",
    *,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """Rows with `image` (not decoded) and a class, for zero-shot classification.

    Args:
        data: a parquet file or a folder of them, a dataset written by `save_to_disk`, a folder with one folder of
            images a class (perhaps below `test/`), a Hub id, Shapes; or a JSON, CSV or tar source of `load_pairs`
            whose records name a class under `label`.
        split: which part.
        columns: role -> column, `{"image": "img", "label": "fine_label"}`.
        options: of `load_pairs`.

    Raises:
        FileNotFoundError, ValueError: nothing there, no such split, no column of images.
    """
    columns = dict(columns or {})
    path = Path(data).expanduser()
    parquet = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if parquet:
        files = chosen(by_split(parquet, path), split, str(path))
        rows = load_dataset("parquet", data_files={"rows": [str(file.resolve()) for file in files]}, split="rows")
    elif path.is_dir() and _class_folders(path):
        rows = load_dataset("imagefolder", data_files={"rows": _images(path, split)}, split="rows")
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        rows = saved if isinstance(saved, Dataset) else saved[split]
    elif str(data).startswith("shapes"):
        rows = load_pairs(data, split, columns=columns or None, **options)
    elif path.exists() or path.suffix in _TABLES:
        # Readers of files keep the columns that have a role: the class takes that of the text.
        roles = {role: name for role, name in columns.items() if role != "label"}
        rows = load_pairs(data, split, columns=roles | {"text": columns.get("label", "label")}, **options)
        labels = [texts_of(text)[:1] for text in rows["text"]]
        rows = rows.remove_columns("text").add_column("label", [label[0] if label else None for label in labels])
        columns = {}
    else:
        rows = load_dataset(str(data), split=split)
    return _renamed(rows, columns, str(data))


def _class_folders(path: Path) -> bool:
    """Whether images lie in folders of their own, with nothing that describes them."""
    files = [file for file in path.rglob("*") if file.is_file()]
    described = any(file.suffix in (".txt", *_TABLES) for file in files)
    return bool(files) and not described and all(file.parent != path for file in files)


def _images(path: Path, split: str) -> list[str]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return [str(file.resolve()) for file in chosen(by_split(files, path), split, str(path))]


def _renamed(rows: Dataset, columns: Mapping[str, str], where: str) -> Dataset:
    for role, name in columns.items():
        if name not in rows.column_names:
            raise ValueError(f"{where} has no column {name!r} for {role!r}; it has {sorted(rows.column_names)}")
        if name != role:
            rows = rows.remove_columns(role) if role in rows.column_names else rows
            rows = rows.rename_column(name, role)
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if "image" not in rows.column_names and len(pictures) == 1:
        rows, pictures = rows.rename_column(pictures[0], "image"), ["image"]
    if "image" not in rows.column_names:
        raise ValueError(
            f"{where} has no column 'image'; it has {sorted(rows.column_names)}. Say which one holds the pictures: "
            'columns={"image": "…"}'
        )
    if "image" in pictures or isinstance(rows.features["image"], dict):
        rows = rows.cast_column("image", Image(decode=False))
    return rows
