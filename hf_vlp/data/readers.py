"""Files with records that name or hold images: JSON, JSON lines, CSV, image folders, COCO captions, Karpathy splits.

A reader gives `RawRecord`s: whatever fields a record has, under the record's own names. Nothing is judged here but
what cannot be represented at all, which goes into `problem`, to be counted when the record's turn comes.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .splits import ALL, canonical_split, split_of

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}
)
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass
class RawRecord:
    """One record of a file.

    Attributes:
        key: its name within the file.
        fields: what it holds, by the file's own names.
        problem: why it could not be read whole, as `"reason: detail"`, or None.
    """

    key: str
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class JsonLinesFile:
    """One JSON object a line. A line that is none is a bad record; the others are read."""

    path: Path

    def __iter__(self) -> Iterator[RawRecord]:
        # Bytes that are not UTF-8 survive as surrogates, so that they spoil one record and not the file.
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                key = f"line {number}"
                try:
                    fields = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield RawRecord(key, problem=f"record_unparsable: {error}")
                    continue
                if isinstance(fields, dict):
                    yield RawRecord(key, fields)
                else:
                    yield RawRecord(key, problem=f"record_unparsable: {type(fields).__name__} instead of an object")


@dataclass(frozen=True)
class CsvFile:
    """Comma- or tab-separated values below a line of column names."""

    path: Path

    def __iter__(self) -> Iterator[RawRecord]:
        delimiter = "\t" if self.path.suffix == ".tsv" else ","
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter)
            header = next(rows, [])
            while True:
                try:
                    values = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield RawRecord(f"line {rows.line_num}", problem=f"record_unparsable: {error}")
                    continue
                if not values:
                    continue
                key = f"line {rows.line_num}"
                if len(values) != len(header):
                    yield RawRecord(key, problem=f"record_unparsable: {len(values)} values for {len(header)} columns")
                else:
                    yield RawRecord(key, dict(zip(header, values)))


@dataclass(frozen=True)
class JsonFile:
    """A JSON document: a list of objects, or an object that holds one under `data`, `annotations` or `rows`."""

    path: Path

    def __iter__(self) -> Iterator[RawRecord]:
        records = load_json(self.path)
        if isinstance(records, dict):
            records = next((records[name] for name in ("data", "annotations", "rows") if name in records), None)
        if not isinstance(records, list):
            raise ValueError(
                f"{self.path} is neither a list of records, nor COCO captions (images, annotations), nor a Karpathy "
                f"file (images with sentences)"
            )
        for number, fields in enumerate(records):
            if isinstance(fields, dict):
                yield RawRecord(f"record {number}", fields)
            else:
                yield RawRecord(
                    f"record {number}", problem=f"record_unparsable: {type(fields).__name__} instead of an object"
                )


@dataclass(frozen=True)
class CocoCaptionsFile:
    """The captions file of COCO: an image has all its captions. Images without a caption are bad records."""

    path: Path

    def __iter__(self) -> Iterator[RawRecord]:
        content = load_json(self.path)
        captions: dict[Any, list[Any]] = {}
        for annotation in content["annotations"]:
            if isinstance(annotation, dict):
                captions.setdefault(annotation.get("image_id"), []).append(annotation.get("caption"))
        for image in content["images"]:
            number = image.get("id") if isinstance(image, dict) else None
            if number is None or not isinstance(image.get("file_name"), str):
                yield RawRecord("?", problem=f"record_unparsable: an image without id or file_name: {image!r}"[:200])
                continue
            texts = captions.pop(number, [])
            yield RawRecord(str(number), {"image": image["file_name"], "text": texts, "image_id": str(number)})
        for number in captions:
            yield RawRecord(str(number), problem="image_missing: captions of an image that the file does not list")


@dataclass(frozen=True)
class KarpathyFile:
    """A Karpathy split file (`dataset_coco.json`, `dataset_flickr30k.json`): images with sentences and a split.

    `restval` belongs to train, as everywhere.
    """

    path: Path
    split: str = ALL

    def __iter__(self) -> Iterator[RawRecord]:
        wanted = canonical_split(self.split)
        for number, image in enumerate(load_json(self.path)["images"]):
            if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
                yield RawRecord(f"image {number}", problem="record_unparsable: an image without filename")
                continue
            if wanted not in (ALL, canonical_split(str(image.get("split", "")))):
                continue
            sentences = image.get("sentences", ())
            texts = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
            name = str(image.get("cocoid", image.get("imgid", number)))
            path = os.path.join(str(image.get("filepath", "")), image["filename"])
            yield RawRecord(name, {"image": path, "text": texts, "image_id": name})

    def splits(self) -> set[str]:
        """The splits that the file names."""
        images = load_json(self.path)["images"]
        return {canonical_split(str(image.get("split", ""))) for image in images if isinstance(image, dict)}


@dataclass(frozen=True)
class ImageFolder:
    """Images in folders with what is said about them in `metadata.jsonl` / `metadata.csv` (a `file_name` column, paths
    relative to the file), or in a text file beside each image (`0001.jpg`, `0001.txt`).

    Attributes:
        folder: read with everything below it.
        metadata: the metadata files; empty for text files beside the images.
        split: only images below a first-level folder of that split; all of them if there are no such folders.
    """

    folder: Path
    metadata: tuple[Path, ...] = ()
    split: str = ALL

    def __iter__(self) -> Iterator[RawRecord]:
        wanted = canonical_split(self.split) if self.splits() else ALL
        for record in self._described() if self.metadata else self._beside():
            name = record.key.split(os.sep)[0]
            if wanted == ALL or record.problem is not None or split_of(name) == wanted:
                yield record

    def splits(self) -> set[str]:
        """The splits that first-level folders name."""
        folders = (entry.name for entry in os.scandir(self.folder) if entry.is_dir())
        return {split for split in map(split_of, folders) if split is not None}

    def _described(self) -> Iterator[RawRecord]:
        for path in self.metadata:
            for record in (JsonLinesFile if path.suffix == ".jsonl" else CsvFile)(path):
                name = record.fields.get("file_name")
                if isinstance(name, str):
                    record.fields["file_name"] = str(path.parent / name)
                    record.key = os.path.relpath(path.parent / name, self.folder)
                else:
                    record.key = f"{path.name} {record.key}"
                yield record

    def _beside(self) -> Iterator[RawRecord]:
        for path in images_below(self.folder):
            try:
                text = path.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="surrogateescape")
            except OSError:
                text = None
            yield RawRecord(str(path.relative_to(self.folder)), {"image": str(path), "text": text})


def images_below(folder: Path) -> Iterator[Path]:
    """Image files of a folder and of all below it, in an order that does not depend on the file system."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(root, name)


def load_json(path: Path) -> Any:
    """A JSON document.

    Raises:
        ValueError: it is not JSON; the message names the file.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}; if it holds one object a line, call it .jsonl") from None


def json_kind(path: Path) -> str:
    """What a `.json` file is: `"lines"`, `"coco"`, `"karpathy"` or `"list"`."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        first = next((line for line in file if line.strip()), "")
        second = next((line for line in file if line.strip()), "")
    if _is_object(first) and _is_object(second):
        return "lines"
    content = load_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and isinstance(content.get("annotations"), list):
        return "coco"
    if isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images[:100]):
        return "karpathy"
    return "list"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def field_names(records: Iterable[RawRecord], limit: int = 20) -> list[str]:
    """Names of the fields of the first records that could be read."""
    names: dict[str, None] = {}
    for number, record in enumerate(records):
        names.update(dict.fromkeys(record.fields))
        if number + 1 >= limit and names:
            break
    return list(names)
