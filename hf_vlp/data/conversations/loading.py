"""Conversations of a source as rows: Shapes instructions, LLaVA's JSON, chat messages in files or on the Hub."""

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.exceptions import DatasetNotFoundError

from ..readers import IMAGE_SUFFIXES, JsonFile, JsonLinesFile, RawRecord, json_kind
from ..rows import rooted
from ..sources import part_of_rows
from ..splits import ALL, NoSplitError, as_no_split, by_split, canonical_split, chosen, parse_split
from ..tables import in_memory
from ..tars import TAR_SUFFIXES, TarShard
from .messages import MessagesError, to_messages

Rows = Dataset | IterableDataset

_TEXT = Value("string")
FEATURES = Features(
    {
        "images": List(Image(decode=False)),
        "messages": List({"role": _TEXT, "content": List({"type": _TEXT, "text": _TEXT})}),
        "kind": _TEXT,
        "source": _TEXT,
        "key": _TEXT,
        "problem": _TEXT,
    }
)
ROLES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "turns"),
    "images": ("images", "image", "image_path", "file_name", "jpg", "png", "jpeg", "webp"),
    "kind": ("kind", "category", "type"),
    "key": ("id", "key", "question_id"),
}
_LINES = (".jsonl", ".ndjson")
_PROBED = 20
_STREAM_SHARDS = 64


def load_conversations(
    spec: str | os.PathLike[str],
    split: str = "train",
    *,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **shapes_options: Any,
) -> Rows:
    """Conversations of a source, as rows with `images` (not decoded, none, one or several), `messages`
    (`[{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}]`), `kind` (such as conversation, detail,
    reasoning; None where the source does not say), `source`, `key`, and `problem` where a record could not be read.

    `spec` is one of

    - `"shapes"` or `"shapes:simple"`: instructions about the built-in world, with a preset;
    - a file: LLaVA's JSON (`id`, `image`, `conversations` of `from` and `value`), JSON or JSON lines of chat
      `messages`, parquet, or a tar whose JSON members hold the conversations beside their pictures;
    - a folder with such files, or a dataset written by `save_to_disk`;
    - `"org/name"` or `"org/name:config"` on the Hub.

    LLaVA's form is turned into messages here; `<image>` in a turn becomes an image entry.

    Args:
        split: `"train"`, `"validation"`, …; a part such as `"train[:1000]"`; or `"all"`.
        streaming: give an `IterableDataset`.
        columns: role -> column, for names that do not say it: `{"messages": "dialogue", "images": "picture"}`.
        image_root: folder that image paths start from; the file's own folder if left out.
        seed: of Shapes.
        shapes_options: of `load_shapes_instructions`: `size`, `preset`, `max_turns`, … and those of `ShapesConfig`.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        NoSplitError: the source has no such split.
        ValueError: unknown column or file type; no column with conversations; an image root below which there are no
            images.
        TypeError: options of Shapes for another source.
    """
    spec = os.fspath(spec)
    name, part = parse_split(split)
    if spec == "shapes" or spec.startswith("shapes:"):
        from ..shapes.instructions import load_shapes_instructions

        if columns or image_root:
            raise ValueError("columns and image_root are for files: Shapes has the columns that are needed")
        if ":" in spec:
            shapes_options = {"preset": spec.partition(":")[2], **shapes_options}
        rows: Rows = load_shapes_instructions(canonical_split(name), streaming=streaming, seed=seed, **shapes_options)
        return part_of_rows(rows, part)
    if shapes_options:
        raise TypeError(f"{', '.join(sorted(shapes_options))}: only Shapes takes such options, not {spec!r}")
    root = None if image_root is None else Path(image_root)
    if root is not None and not root.is_dir():
        raise ValueError(f"image_root={str(image_root)!r} is not a folder")
    _check_roles(columns)
    path = Path(spec).expanduser()
    if path.is_dir():
        return part_of_rows(_folder(path, name, streaming, columns, root), part)
    if path.is_file():
        files = chosen(by_split([path], path), name, str(path))
        return part_of_rows(_files(files, streaming, columns, root, str(path)), part)
    if path.suffix or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise FileNotFoundError(f"there is no file or folder {spec!r} (seen from {os.getcwd()})")
    dataset, _, config = spec.partition(":")
    try:
        loaded = datasets.load_dataset(dataset, config or None, split=name, streaming=streaming)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{spec!r} is neither 'shapes', nor a file or folder here (seen from {os.getcwd()}), nor a data set that "
            f"the Hub gives: {error}"
        ) from error
    except ValueError as error:
        raise as_no_split(error, spec, name) from error
    return part_of_rows(_typed(loaded, columns, root, spec), part)


def conversation_row(
    fields: Mapping[str, Any],
    columns: Mapping[str, str] | None,
    root: Path | None,
    source: str,
    key: str,
    problem: str | None = None,
) -> dict[str, Any]:
    """The row of a record; what is wrong with it stands in `problem`, for the collator to count.

    Args:
        fields: what the file says, by its own names.
        columns: role -> name, in place of a guess.
        root: folder that image paths start from.
        source, key: of the record, for reports; an `id` of its own goes before `key`.
    """
    found = {role: _field(fields, role, columns) for role in ROLES}
    row: dict[str, Any] = {"images": [], "messages": [], "kind": None, "source": source, "problem": problem}
    row["key"] = _storable(str(found["key"])) if isinstance(found["key"], str | int) else _storable(key)
    row["kind"] = found["kind"] if isinstance(found["kind"], str) else None
    if problem is not None:
        return row
    try:
        row["messages"], inline = to_messages(found["messages"])
        row["images"] = [_image(value, root) for value in (_listed(found["images"]) or inline)]
        for message in row["messages"]:
            for entry in message["content"]:
                (entry["text"] or "").encode("utf-8")
    except MessagesError as error:
        row |= {"messages": [], "images": [], "problem": _storable(f"messages_wrong: {error}")}
    except UnicodeEncodeError as error:
        row |= {"messages": [], "images": [], "problem": f"text_not_unicode: {error.reason}"}
    return row


def _field(fields: Mapping[str, Any], role: str, columns: Mapping[str, str] | None) -> Any:
    if columns and role in columns:
        return fields.get(columns[role])
    for name in ROLES[role]:
        for spelled in (name, f"json.{name}"):
            if fields.get(spelled) is not None:
                return fields[spelled]
    return None


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _image(value: Any, root: Path | None) -> dict[str, Any]:
    if isinstance(value, Mapping):
        held = value.get("bytes")
        value = held if held is not None else value.get("path", value.get("url", value.get("file_name")))
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str | os.PathLike):
        return {"bytes": None, "path": _storable(rooted(os.fspath(value).removeprefix("file://"), root))}
    if value is not None and not isinstance(value, str):
        raise MessagesError(f"an image is of type {type(value).__name__}, which is neither a path nor bytes")
    return {"bytes": None, "path": None}


def _check_roles(columns: Mapping[str, str] | None) -> None:
    unknown = sorted(set(columns or ()) - set(ROLES))
    if unknown:
        raise ValueError(
            f"columns: {unknown[0]!r} is no role; map the roles {', '.join(ROLES)} to columns of the data"
        )


def _folder(path: Path, split: str, streaming: bool, columns: Mapping[str, str] | None, root: Path | None) -> Rows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, Dataset):
            if canonical_split(split) not in ("train", ALL):
                raise NoSplitError(str(path), split, ["train"])
        else:
            names = {canonical_split(name): name for name in saved}
            if split != ALL and canonical_split(split) not in names:
                raise NoSplitError(str(path), split, saved)
            parts = list(saved.values()) if split == ALL else [saved[names[canonical_split(split)]]]
            saved = datasets.concatenate_datasets(parts)
        rows = _typed(saved, columns, root or path, str(path))
        return rows.to_iterable_dataset(num_shards=max(1, min(_STREAM_SHARDS, len(rows)))) if streaming else rows
    there = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for suffixes in ((".parquet",), TAR_SUFFIXES, _LINES, (".json",)):
        files = [file for file in there if file.name.endswith(suffixes)]
        if files:
            return _files(chosen(by_split(files, path), split, str(path)), streaming, columns, root, str(path))
    raise ValueError(f"{path} holds no conversations: no parquet, tar, .jsonl or .json file")


def _files(
    files: list[Path], streaming: bool, columns: Mapping[str, str] | None, root: Path | None, where: str
) -> Rows:
    first = files[0].name.lower()
    if first.endswith(".parquet"):
        names = [str(file.resolve()) for file in files]
        loaded = datasets.load_dataset("parquet", data_files={"rows": names}, split="rows", streaming=streaming)
        return _typed(loaded, columns, root or files[0].parent, where)
    shards = [_Shard(file, root or file.parent, columns) for file in files]
    if not (first.endswith(TAR_SUFFIXES) or first.endswith((*_LINES, ".json"))):
        raise ValueError(f"{where} is of no kind that conversations are read from; give parquet, json, jsonl or tar")
    shards[0].check(where)
    if streaming:
        return IterableDataset.from_generator(_rows, features=FEATURES, gen_kwargs={"shards": shards})
    rows = in_memory(_rows(shards), FEATURES)
    if not len(rows):
        raise ValueError(f"{where} holds no records")
    return rows


class _Shard:
    """The rows of one file."""

    def __init__(self, path: Path, root: Path, columns: Mapping[str, str] | None) -> None:
        self.path, self.root, self.columns = path, root, columns

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for record in self._records():
            yield conversation_row(record.fields, self.columns, self.root, str(self.path), record.key, record.problem)

    def _records(self) -> Iterable[RawRecord]:
        name = self.path.name.lower()
        if name.endswith(TAR_SUFFIXES):
            return map(_with_pictures, TarShard(self.path))
        if name.endswith(_LINES) or json_kind(self.path) == "lines":
            return JsonLinesFile(self.path)
        return JsonFile(self.path)

    def check(self, where: str) -> None:
        """Raises `ValueError` if the first records have no conversations, or none of their images is there."""
        records = list(islice(iter(self._records()), _PROBED))
        fields = [record.fields for record in records if record.problem is None]
        if fields and all(_field(one, "messages", self.columns) is None for one in fields):
            names = sorted({name for one in fields for name in one})
            raise ValueError(
                f"{where}: no column looks like conversations. It has {', '.join(names)}. Say which one it is: "
                f'columns={{"messages": "…"}}'
            )
        rows = [conversation_row(one, self.columns, self.root, where, "") for one in fields]
        paths = [image["path"] for row in rows for image in row["images"] if image["bytes"] is None]
        named = [path for path in paths if path is not None and "://" not in path]
        if named and not any(os.path.exists(path) for path in named):
            raise ValueError(
                f"{where}: none of the first {len(named)} images is there, for instance {named[0]!r}; give the "
                f"folder that the paths start from as image_root"
            )


def _with_pictures(record: RawRecord) -> RawRecord:
    """A record of a tar whose pictures are those of the tar, in the order of their names."""
    pictures = [
        record.fields[name]
        for name in sorted(record.fields)
        if isinstance(record.fields[name], bytes) and f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES
    ]
    if not pictures:
        return record
    kept = {name: value for name, value in record.fields.items() if not isinstance(value, bytes)}
    return RawRecord(record.key, {**kept, "images": pictures}, record.problem)


def _rows(shards: list[_Shard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield from shard


def _typed(loaded: Rows, columns: Mapping[str, str] | None, root: Path | None, where: str) -> Rows:
    """A dataset with typed columns, each row turned into a row of conversations as it is read."""
    features = loaded.features or loaded._resolve_features().features or {}
    names = list(features)
    for role, name in (columns or {}).items():
        if name not in names:
            raise ValueError(f"columns: {where} has no column {name!r} for {role!r}; it has {', '.join(names)}")
    if not (columns and "messages" in columns) and not set(ROLES["messages"]) & set(names):
        raise ValueError(
            f"{where}: no column looks like conversations. It has {', '.join(names)}. Say which one it is: "
            f'columns={{"messages": "…"}}'
        )
    rows = loaded
    for name, feature in features.items():
        element = getattr(feature, "feature", None)
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(element, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows.map(
        _typed_row,
        with_indices=True,
        fn_kwargs={"columns": dict(columns or {}), "root": root, "where": where},
        remove_columns=names,
        features=FEATURES,
    )


def _typed_row(
    row: dict[str, Any], index: int, columns: Mapping[str, str], root: Path | None, where: str
) -> dict[str, Any]:
    made = conversation_row(row, columns, root, where, str(index), row.get("problem"))
    return {**made, "source": row.get("source") or where} if isinstance(row.get("source"), str) else made


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
