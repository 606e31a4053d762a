"""One function from the name of a data set to rows: Shapes, files and folders of many kinds, and the Hub."""

import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.exceptions import DatasetNotFoundError

from .columns import KINDS, PAIRS, QUESTIONS, Schema, choose_columns
from .readers import (
    IMAGE_SUFFIXES,
    METADATA_FILES,
    CocoCaptionsFile,
    CsvFile,
    ImageFolder,
    JsonFile,
    JsonLinesFile,
    KarpathyFile,
    field_names,
    json_kind,
)
from .rows import RowMaker, features_for
from .splits import ALL, NoSplitError, as_no_split, by_split, canonical_split, chosen, parse_split, part_bounds
from .tables import all_rows, in_memory
from .tars import TAR_SUFFIXES, TarShard
from .typed import as_rows

Rows = Dataset | IterableDataset

_LINES = (".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv")
_HUB_ID = re.compile(r"^[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?$")
_KNOWN_FILES = "parquet, json, jsonl, csv, tsv or tar"
# Stored with the cached rows of tars: another number reads them anew.
_READER_VERSION = 1
_STREAM_SHARDS = 64
_PROBED_IMAGES = 20
_PROBED_FILES = 10


def load_pairs(
    spec: str | os.PathLike[str],
    split: str = "train",
    *,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **shapes_options: Any,
) -> Rows:
    """Image-text pairs of a source, as rows with `image` (not decoded), `text` (a string or a list of strings),
    `source`, `key`, `image_id` where the source has one, and `problem` where a file's record could not be read whole.

    `spec` is one of

    - `"shapes"` or `"shapes:simple"`: the built-in world, with a preset;
    - a folder with parquet files, tars, `metadata.jsonl` or `.csv` beside images, JSON lines, CSV or JSON files,
      images with `.txt` files beside them, or a dataset written by `save_to_disk` (the first of these that is found);
    - a file: parquet, JSON lines, CSV, TSV, tar (also gzipped), or JSON (a list of records, COCO captions, Karpathy);
    - `"org/name"` or `"org/name:config"`: a data set on the Hub.

    Args:
        spec: see above.
        split: `"train"`, `"validation"`, `"test"`, …; a part of one such as `"train[:1000]"`; or `"all"`. The split of
            a file is what its name or its folder's says, train if none says anything.
        streaming: give an `IterableDataset`, which reads as it goes.
        columns: role -> column, for what the names do not give away: `{"text": "text_zh"}`. The roles are
            image, text and image_id.
        image_root: folder that the image paths of a file start from; the file's own folder if left out.
        seed: of Shapes; no other source is random.
        shapes_options: `size`, `preset`, `unique` and the fields of `ShapesConfig`.

    Raises:
        FileNotFoundError: there is no such file or folder, and nothing of that name on the Hub.
        ValueError: an unknown split, column or file type; columns that cannot be guessed; a file that is not what its
            name says; an image root below which there are no images. The message says what there is and what to do.
        TypeError: an unknown option of Shapes, or options of Shapes for another source.
    """
    return load_rows(spec, split, PAIRS, streaming, columns, image_root, seed, shapes_options)


def load_questions(
    spec: str | os.PathLike[str],
    split: str = "train",
    *,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **shapes_options: Any,
) -> Rows:
    """Questions about images: rows with `image` (not decoded) and `question`, and where the source has them `answers`
    (a list), `question_id`, `question_type`, `answer_type`, `image_id`.

    Arguments and errors are those of `load_pairs`; the roles of `columns` are the names above. Shapes has the
    option `questions` (questions a scene, 1 by default) besides its others.
    """
    return load_rows(spec, split, QUESTIONS, streaming, columns, image_root, seed, shapes_options)


def load_rows(
    spec: str | os.PathLike[str],
    split: str,
    schema: Schema,
    streaming: bool,
    columns: Mapping[str, str] | None,
    image_root: str | os.PathLike[str] | None,
    seed: int,
    options: dict[str, Any],
) -> Rows:
    spec = os.fspath(spec)
    name, part = parse_split(split)
    if spec == "shapes" or spec.startswith("shapes:"):
        rows: Rows = _shapes(spec, name, part, schema, streaming, columns, image_root, seed, options)
        return part_of_rows(rows, part)
    if options:
        raise TypeError(f"{', '.join(sorted(options))}: only Shapes takes such options, not {spec!r}")
    root = None if image_root is None else Path(image_root)
    if root is not None and not root.is_dir():
        raise ValueError(f"image_root={str(image_root)!r} is not a folder")
    path = Path(spec).expanduser()
    if path.is_dir():
        return part_of_rows(_Folder(path, name, schema, streaming, columns, root).load(), part)
    if path.is_file():
        return part_of_rows(_file(path, name, schema, streaming, columns, root), part)
    if path.exists():
        raise ValueError(f"{spec} is neither a file nor a folder")
    looks_local = spec.startswith((".", "/", "~")) or spec.count("/") > 1 or path.suffix in (*_LINES, *_TABLES)
    if looks_local or path.suffix in (".parquet", ".json", *TAR_SUFFIXES) or not _HUB_ID.match(spec):
        raise FileNotFoundError(f"there is no file or folder {spec!r} (seen from {os.getcwd()})")
    return _from_hub(spec, split, schema, streaming, columns, root)


def _shapes(
    spec: str,
    split: str,
    part: str | None,
    schema: Schema,
    streaming: bool,
    columns: Mapping[str, str] | None,
    image_root: Any,
    seed: int,
    options: dict[str, Any],
) -> Rows:
    from .shapes import load_shapes, load_shapes_questions, load_shapes_task

    if columns or image_root:
        raise ValueError("columns and image_root are for files: Shapes has the columns that are needed")
    if ":" in spec:
        options = {"preset": spec.partition(":")[2], **options}
    if part is not None and "size" not in options and re.fullmatch(r"\d*:\d+", part):
        # No need to draw what is cut off again.
        options = {**options, "size": max(1, int(part.partition(":")[2]))}
    load = {"pairs": load_shapes, "vqa": load_shapes_questions}.get(schema.task) or partial(
        load_shapes_task, schema.task
    )
    return load(canonical_split(split), streaming=streaming, seed=seed, **options)


def part_of_rows(rows: Rows, part: str | None) -> Rows:
    if part is None:
        return rows
    if isinstance(rows, IterableDataset):
        start, stop = part_bounds(part, None)
        # As one shard: `take` on several would be a share of each of them.
        return IterableDataset.from_generator(
            _stream_part, features=rows.features, gen_kwargs={"rows": rows, "start": start, "stop": stop}
        )
    start, stop = part_bounds(part, len(rows))
    return rows.select(range(start, stop) if start < stop else [])


def _stream_part(rows: IterableDataset, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
    yield from islice(all_rows(rows.skip(start) if start else rows), None if stop is None else max(0, stop - start))


def _file(
    path: Path,
    split: str,
    schema: Schema,
    streaming: bool,
    columns: Mapping[str, str] | None,
    root: Path | None,
) -> Rows:
    """One file. Its kind follows from its name, and for JSON from what it holds."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet(chosen(by_split([path], path), split, str(path)), schema, streaming, columns, root, str(path))
    if name.endswith(TAR_SUFFIXES):
        files = chosen(by_split([path], path), split, str(path))
        return rows_of_readers([TarShard(file) for file in files], schema, streaming, columns, root, str(path))
    if name.endswith(_LINES):
        reader: Any = JsonLinesFile(path)
    elif name.endswith(_TABLES):
        reader = CsvFile(path)
    elif name.endswith(".json"):
        kind = json_kind(path)
        if kind == "karpathy":
            reader = KarpathyFile(path, split)
            there = reader.splits()
            if split != ALL and canonical_split(split) not in there:
                raise NoSplitError(str(path), split, sorted(there))
            return rows_of_readers([reader], schema, streaming, columns, root, str(path))
        reader = {"coco": CocoCaptionsFile, "lines": JsonLinesFile, "list": JsonFile}[kind](path)
    else:
        raise ValueError(f"{path} is of no kind that can be read; give {_KNOWN_FILES}, or a folder")
    chosen(by_split([path], path), split, str(path))
    return rows_of_readers([reader], schema, streaming, columns, root, str(path))


class _Folder:
    """A folder, by what lies in it: the first kind that is there, in the order of `load`."""

    def __init__(
        self,
        folder: Path,
        split: str,
        schema: Schema,
        streaming: bool,
        columns: Mapping[str, str] | None,
        root: Path | None,
    ) -> None:
        self.folder, self.split, self.schema = folder, split, schema
        self.streaming, self.columns, self.root = streaming, columns, root

    def load(self) -> Rows:
        if (self.folder / "dataset_dict.json").is_file() or (self.folder / "state.json").is_file():
            return self._saved()
        files = [
            path
            for path in sorted(self.folder.rglob("*"))
            if not any(part.startswith((".", "_")) for part in path.relative_to(self.folder).parts) and path.is_file()
        ]
        options = (self.schema, self.streaming, self.columns, self.root, str(self.folder))
        if parquet := [path for path in files if path.suffix == ".parquet"]:
            return _parquet(self._of_split(parquet), *options)
        if tars := [path for path in files if path.name.endswith(TAR_SUFFIXES)]:
            return rows_of_readers([TarShard(path) for path in self._of_split(tars)], *options)
        if metadata := tuple(path for path in files if path.name in METADATA_FILES):
            return self._images(metadata)
        if lines := [path for path in files if path.suffix in (*_LINES, *_TABLES)]:
            readers = [(CsvFile if path.suffix in _TABLES else JsonLinesFile)(path) for path in self._of_split(lines)]
            return rows_of_readers(readers, *options)
        if any(path.suffix == ".txt" and _image_beside(path) for path in files):
            return self._images(())
        if documents := [path for path in files if path.suffix == ".json"]:
            if len(documents) > 1:
                names = ", ".join(path.name for path in documents[:5])
                raise ValueError(
                    f"{self.folder} holds {len(documents)} JSON files ({names}); name the one to read, and "
                    f"the images' folder as image_root"
                )
            root = self.root or self.folder
            return _file(documents[0], self.split, self.schema, self.streaming, self.columns, root)
        pictures = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in files)
        if pictures:
            raise ValueError(
                f"{self.folder} holds {pictures} images but nothing that is said about them; add a metadata.jsonl or "
                f"metadata.csv with the columns file_name and text, or a .txt file beside each image"
            )
        raise ValueError(f"{self.folder} holds nothing that can be read: no {_KNOWN_FILES} file and no images")

    def _of_split(self, files: list[Path]) -> list[Path]:
        return chosen(by_split(files, self.folder), self.split, str(self.folder))

    def _images(self, metadata: tuple[Path, ...]) -> Rows:
        reader = ImageFolder(self.folder, metadata, self.split)
        there = reader.splits() or {"train"}
        if self.split != ALL and canonical_split(self.split) not in there:
            raise NoSplitError(str(self.folder), self.split, sorted(there))
        return rows_of_readers([reader], self.schema, self.streaming, self.columns, self.root, str(self.folder))

    def _saved(self) -> Rows:
        saved = datasets.load_from_disk(str(self.folder))
        if isinstance(saved, Dataset):
            if self.split not in ("train", ALL):
                raise NoSplitError(str(self.folder), self.split, ["train"])
        elif self.split == ALL:
            saved = concatenate_datasets(list(saved.values()))
        else:
            names = {canonical_split(name): name for name in saved}
            if canonical_split(self.split) not in names:
                raise NoSplitError(str(self.folder), self.split, saved)
            saved = saved[names[canonical_split(self.split)]]
        rows = as_rows(saved, self.schema, self.columns, self.root or self.folder, str(self.folder))
        return rows.to_iterable_dataset(num_shards=_shard_count(len(rows))) if self.streaming else rows


def _parquet(
    files: list[Path],
    schema: Schema,
    streaming: bool,
    columns: Mapping[str, str] | None,
    root: Path | None,
    where: str,
) -> Rows:
    for file in files:
        try:
            pq.read_schema(file)
        except Exception as error:
            raise ValueError(f"{file} is not a parquet file, or a damaged one: {error}") from error
    names = [str(file.resolve()) for file in files]
    loaded = datasets.load_dataset("parquet", data_files={"rows": names}, split="rows", streaming=streaming)
    return as_rows(loaded, schema, columns, root or files[0].parent, where)


def _from_hub(
    spec: str,
    split: str,
    schema: Schema,
    streaming: bool,
    columns: Mapping[str, str] | None,
    root: Path | None,
) -> Rows:
    name, _, config = spec.partition(":")
    base, part = parse_split(split)
    try:
        loaded = datasets.load_dataset(name, config or None, split=base, streaming=streaming)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{spec!r} is neither 'shapes', nor a file or folder here (seen from {os.getcwd()}), nor a data set that "
            f"the Hub gives: {error}"
        ) from error
    except ValueError as error:
        raise as_no_split(error, spec, base) from error
    return part_of_rows(as_rows(loaded, schema, columns, root, spec), part)


def rows_of_readers(
    readers: list[Any],
    schema: Schema,
    streaming: bool,
    columns: Mapping[str, str] | None,
    root: Path | None,
    where: str,
) -> Rows:
    """Rows of files that this package reads itself."""
    roles = _roles(readers, columns, schema, where)
    makers = [RowMaker(roles, root or _own_folder(reader), _source_name(reader, where), schema) for reader in readers]
    features = features_for(roles, schema)
    first = readers[0]
    # What has its images inside, or is too much for memory, is read once into the cache of `datasets`.
    cached = isinstance(first, TarShard) or getattr(first, "large", False)
    if not isinstance(first, TarShard):
        _check_images(makers[0], first, root, where)
    shards = list(zip(makers, readers))
    if streaming and (cached or isinstance(first, JsonLinesFile | CsvFile)):
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs={"shards": shards})
    if cached:
        status = [os.stat(file) for reader in readers for file in getattr(reader, "files", (reader.path,))]
        stamps = tuple((one.st_size, one.st_mtime_ns) for one in status)
        # The arguments name the copy in the cache: a file that changed has to give another one.
        return Dataset.from_generator(
            _rows,
            features=features,
            gen_kwargs={"shards": shards, "stamps": (_READER_VERSION, *stamps)},
        )
    rows = in_memory(_rows(shards), features)
    if not len(rows):
        raise ValueError(f"{where} holds no records")
    return rows.to_iterable_dataset(num_shards=_shard_count(len(rows))) if streaming else rows


def _roles(readers: list[Any], columns: Mapping[str, str] | None, schema: Schema, where: str) -> dict[str, str]:
    """The columns by the first records of the first file, or of the next ones where that is damaged or empty.

    Raises:
        ValueError: no record can be read, or what they hold is not what the schema wants.
    """
    names: list[str] = []
    error = ValueError(f"{where} holds no records")
    for reader in readers[:_PROBED_FILES]:
        names = list(dict.fromkeys((*names, *field_names(reader))))
        try:
            return choose_columns(names, columns, schema, where)
        except ValueError as found:
            error = found
    if not names:
        first = next((record.problem for reader in readers[:_PROBED_FILES] for record in reader), None)
        raise ValueError(f"{where} holds no record that can be read" + (f" ({first})" if first else ""))
    raise error


def _rows(shards: list[tuple[RowMaker, Any]], stamps: Any = None) -> Iterator[dict[str, Any]]:
    for maker, reader in shards:
        yield from maker.rows(reader)


def _own_folder(reader: Any) -> Path:
    return reader.folder if isinstance(reader, ImageFolder) else reader.path.parent


def _source_name(reader: Any, where: str) -> str:
    return where if isinstance(reader, ImageFolder) else str(reader.path)


def _shard_count(length: int) -> int:
    return max(1, min(_STREAM_SHARDS, length))


def _image_beside(text_file: Path) -> bool:
    return any(text_file.with_suffix(suffix).is_file() for suffix in IMAGE_SUFFIXES)


def _check_images(maker: RowMaker, reader: Any, root: Path | None, where: str) -> None:
    """A wrong image root makes every record bad; better to say so before a run starts.

    Raises:
        ValueError: none of the first images is there.
    """
    made = [maker.row(record) for record in islice(iter(reader), _PROBED_IMAGES)]
    images = [row[role] for row in made for role in maker.columns if KINDS.get(role) == "image"]
    paths = [image["path"] if image else None for image in images]
    named = [path for path in paths if path is not None and "://" not in path]
    if named and not any(os.path.exists(path) for path in named):
        given = "" if root is None else f", image_root={str(root)!r}"
        raise ValueError(
            f"{where}{given}: none of the first {len(named)} images is there, for instance {named[0]!r}; give the "
            f"folder that the paths start from as image_root"
        )
    if paths and all(path is not None and path.startswith(("http://", "https://")) for path in paths):
        raise ValueError(
            f"{where} holds addresses of images ({paths[0]}); download them first, for instance by img2dataset"
        )
