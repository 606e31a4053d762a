"""Datasets that come with types (parquet, the Hub, saved ones) as rows: columns renamed, images left undecoded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, LargeList, List, Value

from .columns import Schema, choose_columns
from .rows import boxes_of, feature_of, label_number, rooted

_STRINGS = ("string", "large_string")
_BYTES = ("binary", "large_binary")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


def as_rows(
    loaded: Dataset | IterableDataset,
    schema: Schema,
    columns: Mapping[str, str] | None,
    root: Path | None,
    where: str,
) -> Dataset | IterableDataset:
    """The dataset with its columns under the names of their roles. Other columns stay.

    Args:
        loaded: a dataset with typed columns; a streamed one whose types are not known is looked into.
        schema: roles: `PAIRS`, `QUESTIONS`, ….
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
        _check_type(role, schema.kind(role), name, features[name], where)
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
    for role in roles:
        rows = _converted(rows, role, schema, root, where)
    return _named(rows, where)


def _converted(
    rows: Dataset | IterableDataset, role: str, schema: Schema, root: Path | None, where: str
) -> Dataset | IterableDataset:
    """The rows with the values of one role as the schema wants them."""
    features = _features(rows, where)
    kind, feature = schema.kind(role), features[role]
    wanted = feature_of(kind, schema.labels)

    def through(function: Any, **arguments: Any) -> Dataset | IterableDataset:
        made = Features({**features, role: wanted})
        if function in _FINDING:
            made["problem"] = Value("string")
        return rows.map(function, fn_kwargs={"role": role, **arguments}, features=made)

    if kind == "image":
        if _is_string(feature):
            return through(_rooted, root=root)
        return rows if isinstance(feature, Image) else rows.cast_column(role, wanted)
    if role == "answers" and isinstance(_element(feature), dict):
        return through(_plain_answers)
    own = getattr(feature, "names", None)
    if kind == "label" and own != list(schema.labels):
        if own and all(label_number(name, schema.labels)[0] is None for name in own):
            raise ValueError(
                f"{where}: the classes of the label are {', '.join(own[:10])}, but {schema.task} has "
                f"{', '.join(schema.labels)}; rename them in the data"
            )
        return through(_numbered_label, own=own, names=schema.labels)
    if kind == "boxes" and (schema.box_format != "xyxy" or _element(_element(feature)) is None):
        return through(_plain_boxes, box_format=schema.box_format)
    return rows


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


def _check_type(role: str, kind: str, name: str, feature: Any, where: str) -> None:
    element = _element(feature)
    if kind == "image":
        fits = isinstance(feature, Image) or _is_string(feature) or _is_value(feature, _BYTES)
        fits = fits or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
        wanted = "images, bytes, paths, or pairs of bytes and path"
    elif kind == "texts" or role == "text":
        fits = _is_string(feature) or _is_string(element)
        fits = fits or (role == "answers" and isinstance(element, dict) and "answer" in element)
        wanted = "strings or lists of strings"
    elif kind == "label":
        fits = isinstance(feature, ClassLabel) or _is_value(feature, (*_STRINGS, *_INTEGERS, "bool"))
        wanted = "numbers or names of classes"
    elif kind == "boxes":
        inner = _element(element) if element is not None else None
        fits, wanted = isinstance(inner or element, Value), "four numbers or lists of four numbers"
    elif kind == "numbers":
        fits, wanted = isinstance(element, Value) and not _is_string(element), "lists of numbers"
    elif kind == "turns":
        fits = isinstance(element, dict) and "question" in element
        wanted = "lists of {question, answer, candidates}"
    elif role.endswith("_id") or role == "identifier":
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


def _rooted(row: dict[str, Any], role: str, root: Path | None) -> dict[str, Any]:
    path = row[role]
    return {role: path if path is None else {"bytes": None, "path": rooted(path, root)}}


def _plain_answers(row: dict[str, Any], role: str) -> dict[str, Any]:
    return {role: [entry["answer"] for entry in row[role] or ()]}


def _numbered_label(
    row: dict[str, Any], role: str, own: Sequence[str] | None, names: tuple[str, ...]
) -> dict[str, Any]:
    """A label by this package's numbers; one that is none of the classes stays as no label."""
    value = row[role]
    if own is not None and isinstance(value, int) and 0 <= value < len(own):
        value = own[value]
    number, problem = label_number(value, names)
    return {role: number, **_noted(row, problem)}


def _plain_boxes(row: dict[str, Any], role: str, box_format: str) -> dict[str, Any]:
    boxes, problem = boxes_of(row[role], box_format)
    return {role: boxes, **_noted(row, problem)}


def _noted(row: dict[str, Any], problem: str | None) -> dict[str, Any]:
    return {"problem": row.get("problem") or problem}


# What may find something wrong with a row, and says so in the column `problem`.
_FINDING = (_numbered_label, _plain_boxes)


def _with_source(row: dict[str, Any], source: str) -> dict[str, Any]:
    return {"source": source}
