"""The annotation files of VQAv2, NLVR2, SNLI-VE, VisDial and RefCOCO as records under the names of this package.

What a file says about a record goes into `RawRecord.fields` by role; what makes one unusable goes into `problem`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..readers import JsonFile, JsonLinesFile, RawRecord, load_json
from ..splits import ALL, canonical_split


@dataclass
class _Places:
    """Finds images of which only the number is known: the name that worked last is tried first."""

    root: Path
    _last: int = 0

    def find(self, names: Sequence[str]) -> str:
        """The first of the names that is a file below the root; the first name if none is."""
        for number in (self._last, *range(len(names))):
            if number < len(names) and os.path.exists(self.root / names[number]):
                self._last = number
                return names[number]
        return names[0]


def _coco_names(number: int, subset: str, prefix: str = "COCO") -> list[str]:
    """Where the image of a number may lie: by its name in COCO's folders, or in one folder, with or without prefix."""
    full, short = f"{prefix}_{subset}_{number:012d}.jpg", f"{number:012d}.jpg"
    return [full, f"{subset}/{full}", f"images/{subset}/{full}", short, f"{subset}/{short}"]


@dataclass(frozen=True)
class VQAFile:
    """Questions of VQA (v1 and v2) with the answers of the annotation file, where there is one.

    Attributes:
        path: `v2_OpenEnded_mscoco_train2014_questions.json`.
        annotations: `v2_mscoco_train2014_annotations.json`, or None for a split without answers.
        root: folder that images are looked for in.
    """

    path: Path
    annotations: Path | None
    root: Path

    def __iter__(self) -> Iterator[RawRecord]:
        content = load_json(self.path)
        subset = str(content.get("data_subtype", ""))
        answered = {} if self.annotations is None else self._answered(self.annotations)
        prefix = "COCO" if content.get("data_type", "mscoco") == "mscoco" else str(content["data_type"])
        places = _Places(self.root)
        for number, asked in enumerate(content["questions"]):
            try:
                key = str(asked["question_id"])
                image = int(asked["image_id"])
            except (TypeError, KeyError, ValueError):
                yield RawRecord(f"question {number}", problem="record_unparsable: no question_id or no image_id")
                continue
            annotation = answered.get(key, {})
            yield RawRecord(
                key,
                {
                    "image": places.find(_coco_names(image, subset, prefix)),
                    "question": asked.get("question"),
                    "answers": annotation.get("answers"),
                    "image_id": str(image),
                    "question_id": key,
                    "question_type": annotation.get("question_type"),
                    "answer_type": annotation.get("answer_type"),
                },
            )

    @staticmethod
    def _answered(path: Path) -> dict[str, dict[str, Any]]:
        content = load_json(path)
        listed = content.get("annotations") if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise ValueError(f"{path} is no annotation file of VQA: it has no list of annotations")
        return {str(one.get("question_id")): one for one in listed if isinstance(one, dict)}


def _nlvr2(record: RawRecord, places: _Places) -> RawRecord:
    """A record with `left_url`/`identifier` of NLVR2, with a list `images`, or with columns of its own."""
    fields = record.fields
    if "identifier" in fields and "image_0" not in fields and "images" not in fields:
        identifier = str(fields["identifier"])
        parts = identifier.split("-")
        if len(parts) != 4:
            record.problem = f"record_unparsable: identifier {identifier!r} is not split-set-pair-sentence"
            return record
        split, folder = parts[0], fields.get("directory")
        below = ["", f"{split}/", f"images/{split}/"]
        if folder is not None:
            below += [f"{folder}/", f"{split}/{folder}/", f"images/{split}/{folder}/"]
        for number in range(2):
            name = f"{'-'.join(parts[:3])}-img{number}.png"
            fields[f"image_{number}"] = places.find([f"{one}{name}" for one in below])
        fields.setdefault("sentence_id", "-".join((parts[0], parts[1], parts[3])))
        record.key = identifier
    elif "images" in fields and "image_0" not in fields:
        images = fields["images"]
        if not isinstance(images, list | tuple) or len(images) != 2:
            number = len(images) if isinstance(images, list | tuple) else images
            record.problem = f"image_count: a statement is about two images, not {number}"
            images = (None, None)
        fields["image_0"], fields["image_1"] = images
    return record


def _snli_ve(record: RawRecord, places: _Places) -> RawRecord:
    """A record with the `Flickr30K_ID` and `sentence2` of SNLI-VE, or with columns of its own."""
    fields = record.fields
    number = next((fields[name] for name in ("Flickr30K_ID", "Flikr30kID", "Flickr30kID") if name in fields), None)
    if number is None and isinstance(fields.get("image"), int):
        number = fields["image"]
    if number is not None:
        name = str(number)
        name = name if name.endswith(".jpg") else f"{name}.jpg"
        fields["image"] = places.find([name, *(f"{one}/{name}" for one in _FLICKR_FOLDERS)])
        fields.setdefault("image_id", name.removesuffix(".jpg"))
        if "pairID" in fields:
            record.key = str(fields["pairID"])
    return record


_FLICKR_FOLDERS = ("flickr30k_images", "flickr30k-images", "images")
_CONVERSIONS: dict[str, Callable[[RawRecord, _Places], RawRecord]] = {
    "visual_reasoning": _nlvr2,
    "visual_entailment": _snli_ve,
}


@dataclass(frozen=True)
class TaskLines(JsonLinesFile):
    """JSON lines of NLVR2 or SNLI-VE.

    Attributes:
        task: of `load_task`.
        root: folder that images are looked for in.
    """

    task: str = "visual_reasoning"
    root: Path = field(default_factory=Path)

    def __iter__(self) -> Iterator[RawRecord]:
        places = _Places(self.root)
        for record in super().__iter__():
            yield record if record.problem else _CONVERSIONS[self.task](record, places)


@dataclass(frozen=True)
class TaskList(JsonFile):
    """A JSON list of such records. Attributes as in `TaskLines`."""

    task: str = "visual_reasoning"
    root: Path = field(default_factory=Path)

    def __iter__(self) -> Iterator[RawRecord]:
        places = _Places(self.root)
        for record in super().__iter__():
            yield record if record.problem else _CONVERSIONS[self.task](record, places)


@dataclass(frozen=True)
class VisDialFile:
    """Dialogs of VisDial v1.0: questions and answers are listed once and named by number.

    Attributes:
        path: `visdial_1.0_train.json`.
        dense: file with the relevance of the candidates of one turn a dialog, or None.
        root: folder that images are looked for in.
    """

    path: Path
    dense: Path | None
    root: Path
    # A hundred candidates a turn are too much to hold in memory.
    large = True

    @property
    def files(self) -> tuple[Path, ...]:
        """What the records are made of."""
        return (self.path,) if self.dense is None else (self.path, self.dense)

    def __iter__(self) -> Iterator[RawRecord]:
        content = load_json(self.path)
        data, split = content["data"], str(content.get("split", ""))
        relevance = {} if self.dense is None else self._relevance(self.dense)
        places = _Places(self.root)
        for number, dialog in enumerate(data["dialogs"]):
            try:
                image = int(dialog["image_id"])
                turns = [
                    self._turn(turn, data["questions"], data["answers"], relevance.get((image, position + 1)))
                    for position, turn in enumerate(dialog["dialog"])
                ]
            except (TypeError, KeyError, ValueError, IndexError) as error:
                problem = f"turns_wrong: {type(error).__name__}: {error}"
                yield RawRecord(f"dialog {number}", problem=problem)
                continue
            names = [f"VisualDialog_{split}2018_{image:012d}.jpg"]
            names += [f"VisualDialog_{split}2018/{names[0]}", f"{split}/{names[0]}"]
            names += [*_coco_names(image, "train2014"), *_coco_names(image, "val2014")]
            fields = {
                "image": places.find(names),
                "caption": dialog.get("caption"),
                "turns": turns,
                "image_id": str(image),
            }
            yield RawRecord(str(image), fields)

    @staticmethod
    def _turn(
        turn: dict[str, Any], questions: list[str], answers: list[str], relevance: list[float] | None
    ) -> dict[str, Any]:
        def said(listed: list[str], number: int) -> str:
            if number < 0:
                raise IndexError(f"number {number} in the list of texts")
            return listed[number]

        options = turn.get("answer_options")
        candidates = None if options is None else [said(answers, number) for number in options]
        answer = said(answers, turn["answer"]) if turn.get("answer") is not None else None
        if candidates is not None and turn.get("gt_index") is not None:
            right = said(candidates, turn["gt_index"])
            if answer is not None and right != answer:
                raise ValueError(f"gt_index names {right!r}, the answer is {answer!r}")
            answer = right
        return {
            "question": said(questions, turn["question"]),
            "answer": answer,
            "candidates": candidates,
            "relevance": relevance,
        }

    @staticmethod
    def _relevance(path: Path) -> dict[tuple[int, int], list[float]]:
        listed = load_json(path)
        try:
            return {
                (int(one["image_id"]), int(one["round_id"])): one.get("gt_relevance", one.get("relevance"))
                for one in listed
            }
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} does not hold dense annotations of VisDial (image_id, round_id, gt_relevance): {error!r}"
            ) from None


@dataclass(frozen=True)
class RefsFile:
    """Referring expressions of RefCOCO, RefCOCO+ and RefCOCOg, from refs written as JSON and `instances.json`.

    A record for every sentence; its box is that of the annotation that the expression refers to.

    Attributes:
        path: the refs.
        instances: COCO annotations with `images` and `annotations`.
        root: folder that images are looked for in.
        split: of the refs (`train`, `val`, `testA`, `testB`, `test`).
    """

    path: Path
    instances: Path
    root: Path
    split: str = ALL

    def __iter__(self) -> Iterator[RawRecord]:
        content = load_json(self.instances)
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        boxes = {annotation["id"]: annotation.get("bbox") for annotation in content["annotations"]}
        places, wanted = _Places(self.root), canonical_split(self.split)
        for number, ref in enumerate(load_json(self.path)):
            if not isinstance(ref, dict) or not isinstance(ref.get("sentences"), list):
                yield RawRecord(f"ref {number}", problem="record_unparsable: a ref without sentences")
                continue
            if wanted not in (ALL, canonical_split(str(ref.get("split", "")))):
                continue
            image, box = names.get(ref.get("image_id")), boxes.get(ref.get("ann_id"))
            problem = None
            if image is None:
                problem = f"image_missing: image {ref.get('image_id')} is not in {self.instances.name}"
            elif not isinstance(box, list | tuple) or len(box) != 4:
                problem = f"box_missing: annotation {ref.get('ann_id')} has no box in {self.instances.name}"
            for position, sentence in enumerate(ref["sentences"]):
                fields: dict[str, Any] = {"image": None, "text": None, "boxes": None, "image_id": None}
                if problem is None:
                    left, top, width, height = box
                    fields = {
                        "image": places.find([image, f"train2014/{image}", f"images/{image}"]),
                        "text": sentence.get("sent", sentence.get("raw")) if isinstance(sentence, dict) else sentence,
                        "boxes": [[left, top, left + width, top + height]],
                        "image_id": str(ref["image_id"]),
                    }
                yield RawRecord(f"{ref.get('ref_id', number)}.{position}", fields, problem)

    def splits(self) -> set[str]:
        """The splits that the refs name."""
        return {canonical_split(str(ref.get("split", ""))) for ref in load_json(self.path) if isinstance(ref, dict)}
