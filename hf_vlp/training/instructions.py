"""What scripts that train on conversations share: their arguments, their rows."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_vlp.training.arguments import option
from hf_vlp.training.data import DataArguments, parse_columns


@dataclass
class ConversationArguments:
    """How conversations are written and batched."""

    _argument_group_name: ClassVar[str] = "conversations"

    template: str = option(
        "vicuna_v1", "Format of conversations: vicuna_v1, v0, llama_2, mpt, plain, …, or chat for the tokenizer's own."
    )
    pack_to: int | None = option(None, "Conversations are packed to rows of so many tokens; left out: no packing.")
    shapes_short: bool = option(False, "Shapes: short answers, without a sentence around them.")
    shapes_text_only: float = option(0.0, "Shapes: share of conversations without an image.")
    shapes_max_turns: int = option(3, "Shapes: most questions of a conversation.")

    def shapes_options(self) -> dict[str, Any]:
        """Options of `load_shapes_instructions`."""
        return {"short": self.shapes_short, "text_only": self.shapes_text_only, "max_turns": self.shapes_max_turns}


def conversation_rows(data: DataArguments, conversations: ConversationArguments, *, train: bool, seed: int = 0) -> Any:
    """Rows of the training or of the evaluation split; None with `--eval_split none`."""
    from hf_vlp.data.conversations import load_conversations

    spec = data.train_data if train else data.eval_data or data.train_data
    split = data.train_split if train else data.eval_split
    limit = data.max_train_samples if train else data.max_eval_samples
    if not train and split.lower() == "none":
        return None
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


def conversation_dataset(rows: Any, *, seed: int, transform: Any = None) -> Any:
    """Records of rows; a stream stays a stream."""
    from hf_vlp.data.conversations import ConversationDataset, ConversationIterableDataset

    kind = ConversationDataset if hasattr(rows, "__len__") else ConversationIterableDataset
    return kind(rows, seed=seed, transform=transform)
