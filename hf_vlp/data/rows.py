"""From what a file's record holds to a row that Arrow can store; what it cannot store becomes a finding."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Features, Image, List, Value

from .readers import RawRecord

_LISTS = frozenset({"text", "answers"})


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of one schema out of raw records.

    Attributes:
        columns: role -> field of the record.
        root: folder that relative image paths start from.
        source: name of the file, for the report on bad records.
    """

    columns: Mapping[str, str]
    root: Path | None
    source: str

    def rows(self, records: Any) -> Iterator[dict[str, Any]]:
        """The rows of the records of a file."""
        for record in records:
            yield self.row(record)

    def row(self, record: RawRecord) -> dict[str, Any]:
        """The row of a record. What is missing in it stays missing, for the collator to find."""
        problem = record.problem
        row: dict[str, Any] = {"source": _storable(self.source), "key": _storable(record.key)}
        for role, name in self.columns.items():
            value = record.fields.get(name)
            if role == "image":
                row[role], found = _image(value, self.root)
            elif role in _LISTS:
                row[role], found = _texts(value)
            else:
                row[role], found = _text(value)
            problem = problem or found
        row["problem"] = None if problem is None else _storable(problem)
        return row


def features_for(roles: Mapping[str, str]) -> Features:
    """Columns of the rows of a `RowMaker` with these roles."""
    text = Value("string")
    columns: dict[str, Any] = {"source": text, "key": text, "problem": text}
    for role in roles:
        columns[role] = Image(decode=False) if role == "image" else List(text) if role in _LISTS else text
    return Features(columns)


def rooted(path: str, root: Path | None) -> str:
    """A path from where the images are; addresses and absolute paths stay."""
    return path if root is None or "://" in path else os.path.join(root, path)


def _image(value: Any, root: Path | None) -> tuple[dict[str, Any] | None, str | None]:
    if isinstance(value, dict):
        held = value.get("bytes")
        value = held if held is not None else value.get("path", value.get("file_name"))
    if value is None or value == "":
        return None, None
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}, None
    if not isinstance(value, str):
        return None, f"image_wrong_type: {type(value).__name__}"
    path = rooted(value, root)
    if path != _storable(path):
        return None, f"image_missing: the path is not Unicode: {_storable(path)}"
    return {"bytes": None, "path": path}, None


def _text(value: Any) -> tuple[str | None, str | None]:
    if isinstance(value, bool | int | float):
        value = str(value)
    if value is None or isinstance(value, str):
        stored = None if value is None else _storable(value)
        return (stored, None) if stored == value else (None, "text_not_unicode: surrogates or bytes outside UTF-8")
    return None, f"text_not_string: it is of type {type(value).__name__}"


def _texts(value: Any) -> tuple[list[str | None], str | None]:
    """Texts that can be stored, None in the place of those that cannot; a finding if that leaves none."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    texts: list[str | None] = []
    problem = None
    for held in values:
        if isinstance(held, dict):
            # VQA lists {"answer": …}, Karpathy {"raw": …}.
            held = held.get("answer", held.get("raw"))
        if held is None or isinstance(held, str):
            text, found = _text(held)
        else:
            text, found = None, f"text_not_string: it is of type {type(held).__name__}"
        texts.append(text)
        problem = problem or found
    return texts, problem if not any(texts) else None


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
