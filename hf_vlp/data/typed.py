"""Datasets that come with types (parquet, the Hub, saved ones) as rows: columns renamed, images left undecoded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, LargeList, List, Value

from .columns import choose_columns
from .rows import rooted

_STRINGS = ("string", "large_string")
_BYTES = ("binary", "large_binary")


def as_rows(
    loaded: Dataset | IterableDataset,
    schema: Mapping[str, Sequence[str]],
    columns: Mapping[str, str] | None,
    root: Path | None,
    where: str,
) -> Dataset | IterableDataset:
    """The dataset with its columns under the names of their roles. Other columns stay.

    Args:
        loaded: a dataset with typed columns; a streamed one whose types are not known is looked into.
        schema: roles, `PAIRS` or `QUESTIONS`.
        columns: the user's choice of columns.
        root: folder that image paths start from.
        where: name of the source, which becomes the column `source`.

    Raises:
        ValueError: columns that cannot be found, or are of a type that the role cannot have.
    """
    features = _features(loaded, where)
    image_like = [name for name, feature in features.items() if isinstance(feature, Image)]
    roles = choose_columns(list(features), columns, schema, where, image_like)
    for role, name in roles.items():
        _check_type(role, name, features[name], where)
    rows = loaded
    # First of all: renaming a column of a stream decodes its images on the way.
    for name, feature in features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    taken = set(roles.values())
    hidden = [name for name in features if name in schema and name not in taken]
    rows = rows.remove_columns(hidden) if hidden else rows
    # In two steps, because one role's name may be another one's column.
    rows = rows.rename_columns({name: f"__role_{role}" for role, name in roles.items()})
    rows = rows.rename_columns({f"__role_{role}": role for role in roles})
    features = _features(rows, where)
    if _is_string(features["image"]):
        stored = Features({**features, "image": Image(decode=False)})
        rows = rows.map(_rooted, fn_kwargs={"root": root}, features=stored)
    elif not isinstance(features["image"], Image):
        rows = rows.cast_column("image", Image(decode=False))
    if "answers" in roles and isinstance(_element(features["answers"]), dict):
        rows = rows.map(_plain_answers, features=Features({**rows.features, "answers": List(Value("string"))}))
    return _named(rows, where)


def _named(rows: Dataset | IterableDataset, where: str) -> Dataset | IterableDataset:
    """Adds the columns `source` and `key` where the data has none. A streamed row is named by its place instead."""
    columns = set(rows.features)
    if isinstance(rows, IterableDataset):
        if "source" in columns:
            return rows
        named = Features({**rows.features, "source": Value("string")})
        return rows.map(_with_source, fn_kwargs={"source": where}, features=named)
    if "source" not in columns:
        rows = rows.add_column("source", [where] * len(rows), feature=Value("string"))
    if "key" not in columns:
        rows = rows.add_column("key", [str(index) for index in range(len(rows))], feature=Value("string"))
    return rows


def _features(rows: Dataset | IterableDataset, where: str) -> Features:
    if rows.features is not None:
        return rows.features
    # A stream without declared types: its first rows tell.
    resolved = rows._resolve_features().features
    if not resolved:
        raise ValueError(f"{where} holds no records")
    return resolved


def _check_type(role: str, name: str, feature: Any, where: str) -> None:
    if role == "image":
        fits = isinstance(feature, Image) or _is_string(feature) or _is_value(feature, _BYTES)
        fits = fits or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
        wanted = "images, bytes, paths, or pairs of bytes and path"
    elif role in ("text", "answers"):
        element = _element(feature)
        fits = _is_string(feature) or _is_string(element)
        fits = fits or (role == "answers" and isinstance(element, dict) and "answer" in element)
        wanted = "strings or lists of strings"
    elif role == "image_id":
        fits, wanted = isinstance(feature, Value), "numbers or strings"
    else:
        fits, wanted = _is_string(feature), "strings"
    if not fits:
        raise ValueError(
            f"{where}: column {name!r} holds {feature}, but {role} must be {wanted}; name another one by columns="
            f'{{"{role}": "…"}}'
        )


def _is_value(feature: Any, kinds: Sequence[str]) -> bool:
    return isinstance(feature, Value) and feature.dtype in kinds


def _is_string(feature: Any) -> bool:
    return _is_value(feature, _STRINGS)


def _element(feature: Any) -> Any:
    return feature.feature if isinstance(feature, List | LargeList) else None


def _rooted(row: dict[str, Any], root: Path | None) -> dict[str, Any]:
    path = row["image"]
    return {"image": path if path is None else {"bytes": None, "path": rooted(path, root)}}


def _plain_answers(row: dict[str, Any]) -> dict[str, Any]:
    return {"answers": [entry["answer"] for entry in row["answers"] or ()]}


def _with_source(row: dict[str, Any], source: str) -> dict[str, Any]:
    return {"source": source}
