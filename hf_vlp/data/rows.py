"""From what a file's record holds to a row that Arrow can store; what it cannot store becomes a finding."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features, Image, List, Value

from .columns import Schema
from .readers import RawRecord


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of one schema out of raw records.

    Attributes:
        columns: role -> field of the record.
        root: folder that relative image paths start from.
        source: name of the file, for the report on bad records.
        schema: what kind of value each role has.
    """

    columns: Mapping[str, str]
    root: Path | None
    source: str
    schema: Schema

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
            kind = self.schema.kind(role)
            if kind == "image":
                row[role], found = _image(value, self.root)
            elif kind == "label":
                row[role], found = label_number(value, self.schema.labels)
            elif kind == "boxes":
                row[role], found = boxes_of(value, self.schema.box_format)
            else:
                row[role], found = _PLAIN[kind](value)
            problem = problem or found
        row["problem"] = None if problem is None else _storable(problem)
        return row


def features_for(roles: Mapping[str, str], schema: Schema) -> Features:
    """Columns of the rows of a `RowMaker` with these roles."""
    text = Value("string")
    columns: dict[str, Any] = {"source": text, "key": text, "problem": text}
    for role in roles:
        columns[role] = feature_of(schema.kind(role), schema.labels)
    return Features(columns)


def feature_of(kind: str, labels: tuple[str, ...] = ()) -> Any:
    """How values of a kind (see `Schema.kind`) are stored."""
    text = Value("string")
    numbers = List(Value("float64"))
    if kind == "label":
        return ClassLabel(names=list(labels))
    return {
        "image": Image(decode=False),
        "text": text,
        "texts": List(text),
        "numbers": numbers,
        "boxes": List(numbers),
        "turns": List({"question": text, "answer": text, "candidates": List(text), "relevance": numbers}),
    }[kind]


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


def label_number(value: Any, names: tuple[str, ...]) -> tuple[int | None, str | None]:
    """The number of a class given by name (any case) or number, and the finding if it is none of the task's.

    Args:
        value: a name, a number, a bool (0 or 1), or None for no label.
        names: of the classes, in order.
    """
    if value is None:
        return None, None
    if isinstance(value, str):
        lower = [name.lower() for name in names]
        word = value.strip().lower()
        if word in lower:
            return lower.index(word), None
        if word.isdecimal() and int(word) < len(names):
            return int(word), None
    elif isinstance(value, int) and 0 <= value < len(names):
        return int(value), None
    shown = repr(value)[:60]
    return None, f"label_outside: {shown} is none of 0 to {len(names) - 1} and none of {', '.join(names)}"


def boxes_of(value: Any, box_format: str = "xyxy") -> tuple[list[list[float]] | None, str | None]:
    """Boxes (left, top, right, bottom) of one box or a list of them, and what is wrong with them.

    Args:
        value: four numbers, or a list of such.
        box_format: `"xyxy"`, or `"xywh"` for left, top, width, height.
    """
    if value is None:
        return None, None
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if len(listed) == 4 and all(_is_number(one) for one in listed):
        listed = [listed]
    boxes = []
    for box in listed:
        if not (isinstance(box, list | tuple) and len(box) == 4 and all(_is_number(one) for one in box)):
            return None, f"box_wrong: {repr(box)[:60]} is not four numbers"
        left, top, right, bottom = (float(one) for one in box)
        if box_format == "xywh":
            right, bottom = left + right, top + bottom
        if not (right > left and bottom > top):
            return None, (
                f"box_wrong: {repr(list(box))[:60]} read as {box_format} has no area"
                + ("; is it left, top, width, height? then say box_format='xywh'" if box_format == "xyxy" else "")
            )
        boxes.append([left, top, right, bottom])
    return boxes, None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any) -> tuple[list[float] | None, str | None]:
    if value is None:
        return None, None
    if isinstance(value, list | tuple) and all(_is_number(one) for one in value):
        return [float(one) for one in value], None
    return None, f"weights_wrong: {repr(value)[:60]} is not a list of numbers"


def _turns(value: Any) -> tuple[list[dict[str, Any]] | None, str | None]:
    """Turns with the entries of the contract; other entries of theirs are dropped."""
    if value is None:
        return None, None
    if not isinstance(value, list | tuple) or not all(isinstance(turn, dict) for turn in value):
        return None, "turns_wrong: the turns must be a list of {question, answer, candidates}"
    turns: list[dict[str, Any]] = []
    for turn in value:
        question, wrong_question = _text(turn.get("question"))
        answer, wrong_answer = _text(turn.get("answer"))
        candidates, wrong_candidates = _texts(turn.get("candidates", turn.get("answer_options")))
        relevance, wrong_relevance = _numbers(turn.get("relevance"))
        found = wrong_question or wrong_answer or wrong_candidates or wrong_relevance
        if found:
            return None, found
        turns.append(
            {"question": question, "answer": answer, "candidates": candidates or None, "relevance": relevance}
        )
    return turns, None


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


_PLAIN: dict[str, Callable[[Any], tuple[Any, str | None]]] = {
    "text": _text,
    "texts": _texts,
    "numbers": _numbers,
    "turns": _turns,
}
