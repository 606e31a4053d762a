"""Which column of a source is the image, which the text: by name, by guess, or an error that says what to write."""

from collections.abc import Iterable, Mapping, Sequence

# What a role's values are, where its name does not say that it is a text.
KINDS: dict[str, str] = {
    "image": "image",
    "image_0": "image",
    "image_1": "image",
    "answers": "texts",
    "weights": "numbers",
    "label": "label",
    "turns": "turns",
    "boxes": "boxes",
    "proposals": "boxes",
}


class Schema(dict[str, tuple[str, ...]]):
    """Role -> names of columns that are taken for it.

    Args:
        task: what the rows are for.
        names: the roles with their names.
        several_texts: the role `text` is a list of alternative texts rather than one.
        labels: names of the classes that the role `label` numbers, in order.
        box_format: how the numbers of a box in the data are meant, `"xyxy"` or `"xywh"`.
    """

    def __init__(
        self,
        task: str,
        names: Mapping[str, tuple[str, ...]],
        *,
        several_texts: bool = False,
        labels: tuple[str, ...] = (),
        box_format: str = "xyxy",
    ) -> None:
        super().__init__(names)
        self.task, self.several_texts, self.labels, self.box_format = task, several_texts, labels, box_format

    def kind(self, role: str) -> str:
        """`"image"`, `"text"`, `"texts"`, `"numbers"`, `"label"`, `"turns"` or `"boxes"`."""
        return "texts" if role == "text" and self.several_texts else KINDS.get(role, "text")


# Schema -> role -> names that are taken for it, first come first taken. A role in REQUIRED must be found.
_IMAGE = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "photo",
    "image_bytes",
    "image_path",
    "img_path",
    "image_file",
    "image_filename",
    "file_name",
    "filename",
    "filepath",
    "file",
    "path",
)
_TEXT = (
    "text",
    "texts",
    "caption",
    "captions",
    "txt",
    "sentence",
    "sentences",
    "alt_text",
    "alt",
    "title",
    "description",
    "prompt",
)
_IMAGE_ID = ("image_id", "imgid", "img_id", "cocoid")
PAIRS = Schema("pairs", {"image": _IMAGE, "text": _TEXT, "image_id": _IMAGE_ID}, several_texts=True)
QUESTIONS = Schema(
    "vqa",
    {
        "image": _IMAGE,
        "question": ("question", "questions", "query"),
        "answers": ("answers", "answer", "multiple_choice_answer", "label"),
        "weights": ("weights", "answer_weights"),
        "image_id": _IMAGE_ID,
        "question_id": ("question_id",),
        "question_type": ("question_type",),
        "answer_type": ("answer_type",),
    },
)
STATEMENTS = Schema(
    "visual_reasoning",
    {
        "image_0": ("image_0", "image0", "img_0", "left_image", "image_left", "left", "jpg_0"),
        "image_1": ("image_1", "image1", "img_1", "right_image", "image_right", "right", "jpg_1"),
        "text": ("text", "sentence", "statement", "caption"),
        "label": ("label", "answer", "truth"),
        "sentence_id": ("sentence_id",),
        "identifier": ("identifier", "uid"),
    },
    labels=("false", "true"),
)
ENTAILMENT = Schema(
    "visual_entailment",
    {
        "image": _IMAGE,
        "text": ("hypothesis", "sentence2", *_TEXT),
        "label": ("label", "gold_label"),
        "image_id": _IMAGE_ID,
        "pair_id": ("pair_id", "pairid"),
    },
    labels=("contradiction", "neutral", "entailment"),
)
DIALOGS = Schema(
    "dialog",
    {"image": _IMAGE, "caption": ("caption", *_TEXT), "turns": ("turns", "dialog", "dialogue"), "image_id": _IMAGE_ID},
)
GROUNDING = Schema(
    "grounding",
    {
        "image": _IMAGE,
        "text": ("expression", "phrase", "referring_expression", "sent", *_TEXT),
        "boxes": ("boxes", "bboxes", "box", "bbox"),
        "proposals": ("proposals",),
        "image_id": _IMAGE_ID,
    },
)
REQUIRED = frozenset({"image", "image_0", "image_1", "text", "question", "caption", "turns", "boxes"})


def choose_columns(
    available: Sequence[str],
    given: Mapping[str, str] | None,
    schema: Mapping[str, Sequence[str]],
    where: str,
    image_like: Iterable[str] = (),
) -> dict[str, str]:
    """Role -> column of the source.

    Args:
        available: the source's columns.
        given: the user's choice for some roles, `{"text": "text_zh"}`.
        schema: `PAIRS`, `QUESTIONS`, ….
        where: name of the source, for errors.
        image_like: columns whose type says that they hold images, taken if no name does.

    Raises:
        ValueError: a role that there is not, a column that there is not, or a required role that nothing was found
            for; the message lists the columns and says what to write.
    """
    given = dict(given or {})
    unknown = sorted(set(given) - set(schema))
    if unknown:
        raise ValueError(
            f"columns={given}: {unknown[0]!r} is no role; map the roles {', '.join(schema)} to columns of the data"
        )
    for role, column in given.items():
        if column not in available:
            raise ValueError(f"columns: {where} has no column {column!r} for {role!r}; it has {_listed(available)}")
    chosen = dict(given)
    lower = {name.lower(): name for name in reversed(available)}
    for role, names in schema.items():
        if role in chosen:
            continue
        taken = set(chosen.values())
        found = [lower[name] for name in names if name in lower and lower[name] not in taken]
        if KINDS.get(role) == "image" and not found:
            found = [name for name in image_like if name not in taken]
        # "json.caption" in a tar is the caption of the record's JSON member.
        found = found or [name for word in names for name in available if name.lower() == f"json.{word}"]
        if found:
            chosen[role] = found[0]
        elif role in REQUIRED:
            raise ValueError(_not_found(role, available, where))
    return chosen


def _not_found(role: str, available: Sequence[str], where: str) -> str:
    lower = {name.lower() for name in available}
    message = (
        f"{where}: no column looks like the {role}. It has {_listed(available)}. Say which one it is: "
        f'columns={{"{role}": "…"}} (in a script or on the command line: --columns {role}=…)'
    )
    if len(available) == 1 and ";" in available[0]:
        message += ". Its values are separated by semicolons: give commas (.csv) or tabs (.tsv)"
    if KINDS.get(role) == "image" and lower & {"url", "urls", "image_url", "img_url", "jpg_0"}:
        message += ". The data holds addresses of images, not images: download them first, for instance by img2dataset"
    return message


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:40])
    return f"the columns {shown}" if names else "no columns"
