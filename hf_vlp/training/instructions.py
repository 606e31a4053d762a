"""What scripts that train on conversations share: their arguments, their rows, and where answers end."""

from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from hf_vlp.models.generation_settings import drop_idle_settings
from hf_vlp.training.arguments import option
from hf_vlp.training.data import DataArguments, parse_columns

# A picture by which an image processor tells how many tokens pictures take.
_PICTURE = (64, 64)


@dataclass
class ShapesConversations:
    """What conversations about Shapes are like."""

    _argument_group_name: ClassVar[str] = "conversations"

    shapes_short: bool = option(False, "Shapes: short answers, without a sentence around them.")
    shapes_text_only: float = option(0.0, "Shapes: share of conversations without an image.")
    shapes_max_turns: int = option(3, "Shapes: most questions of a conversation.")

    def shapes_options(self) -> dict[str, Any]:
        """Options of `load_shapes_instructions`."""
        return {"short": self.shapes_short, "text_only": self.shapes_text_only, "max_turns": self.shapes_max_turns}


@dataclass
class ConversationBatches(ShapesConversations):
    """How conversations are batched.

    Raises:
        ValueError: packed and grouped by length at once.
    """

    pack_to: int | None = option(None, "Conversations are packed to rows of so many tokens; left out: no packing.")
    group_by_length: bool = option(
        False, "Batches hold conversations of like length, those with images apart; for batches that are not packed."
    )

    def __post_init__(self) -> None:
        if self.group_by_length and self.pack_to is not None:
            raise ValueError(
                "--group_by_length and --pack_to: packed rows have no padding that grouping could save; leave one out"
            )


@dataclass
class ConversationArguments(ConversationBatches):
    """How conversations are written and batched.

    Raises:
        ValueError: as the parent, or an unknown template.
    """

    template: str = option(
        "vicuna_v1", "Format of conversations: vicuna_v1, v0, llama_2, mpt, plain, …, or chat for the tokenizer's own."
    )

    def __post_init__(self) -> None:
        from hf_vlp.data.conversations import template_names

        super().__post_init__()
        names = template_names()
        if self.template not in names:
            raise ValueError(f"--template: unknown template {self.template!r}; there are {', '.join(names)}")


def conversation_rows(data: DataArguments, conversations: ShapesConversations, *, train: bool, seed: int = 0) -> Any:
    """Rows of the training split; or those of the evaluation split, or None, as of `DataArguments.eval_rows`.

    Raises:
        NoSplitError: the data has no split of the name that was asked for.
    """
    if train:
        return _rows(data, conversations, True, seed)
    return data.for_evaluation(lambda: _rows(data, conversations, False, seed))


def _rows(data: DataArguments, conversations: ShapesConversations, train: bool, seed: int) -> Any:
    from hf_vlp.data.conversations import load_conversations

    spec = data.train_data if train else data.eval_data or data.train_data
    split = data.train_split if train else data.eval_split
    limit = data.max_train_samples if train else data.max_eval_samples
    options: dict[str, Any] = {}
    if spec == "shapes":
        options = {"preset": data.shapes_preset, **conversations.shapes_options()}
        wanted = data.shapes_size if train else limit
        if wanted is not None:
            options["size"] = wanted
    elif spec.startswith("shapes:"):
        options = conversations.shapes_options()
    rows = load_conversations(
        spec,
        split,
        streaming=train and data.streaming,
        columns=parse_columns(data.columns),
        image_root=data.image_root,
        seed=seed,
        **options,
    )
    if limit is None:
        return rows
    return rows.take(limit) if train and data.streaming else rows.select(range(min(limit, len(rows))))


def conversation_dataset(rows: Any, *, seed: int, transform: Any = None, group_for: Any = None) -> Any:
    """Records of rows; a stream stays a stream.

    Args:
        rows: of `conversation_rows`.
        seed: of order and augmentation.
        transform: augmentation of the images.
        group_for: the processor, if batches are to hold conversations of like length: it tells how many tokens a
            picture takes (a square one, where that depends on the picture).

    Raises:
        ValueError: a stream cannot be grouped.
    """
    from hf_vlp.data.conversations import ConversationDataset, ConversationIterableDataset

    if not hasattr(rows, "__len__"):
        if group_for is not None:
            raise ValueError("--group_by_length needs all lengths before the first batch; leave out it or --streaming")
        return ConversationIterableDataset(rows, seed=seed, transform=transform)
    if group_for is None:
        return ConversationDataset(rows, seed=seed, transform=transform)
    image_tokens = group_for.prepare_images([Image.new("RGB", _PICTURE)])[1][0]
    return ConversationDataset(
        rows, seed=seed, transform=transform, group_by_length=True, image_tokens=int(image_tokens)
    )


def stop_at_turns(model: Any, processor: Any, template: str) -> None:
    """Has a model's `generate` stop where the template ends an answer, as well as where it stopped before.

    `generation_config` can name an end that is one token, such as mpt's `<|im_end|>`. One of several, as v0's `###` is
    in most vocabularies, only the caller can: `generate(..., stop_strings=["###"], tokenizer=processor.tokenizer)`.

    Args:
        template: name of the template that the model is trained with.
    """
    from hf_vlp.data.conversations import make_template
    from hf_vlp.data.conversations.prompts import stop_ids

    known = model.generation_config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or ())
    ends += [number for number in stop_ids(processor, make_template(template, processor)) if number not in ends]
    if ends != ([known] if isinstance(known, int) else known):
        drop_idle_settings(model.generation_config)
        model.generation_config.eos_token_id = ends
