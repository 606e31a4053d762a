"""Loading that fails loudly: a backbone whose weights are not in its checkpoint is never left random."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel


class MissingWeightsError(ValueError):
    """A checkpoint lacks weights of the model that was asked for; `names` holds them."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


def load_backbone(
    kind: Any, source: str, *, part: str | None = None, optional: Sequence[str] = (), **options: Any
) -> PreTrainedModel:
    """`kind.from_pretrained(source)`, except that a backbone which did not load is an error.

    transformers draws what a checkpoint lacks at random and logs it; frozen, such a tower gives noise for features.

    Args:
        kind: a model class, or an Auto class.
        source: folder or Hub id.
        part: the submodule that is wanted; the rest of the model may be missing. Without one of that name, and by
            default, the whole model is wanted.
        optional: beginnings of the names of weights that may be missing, as nobody reads them or they are to be new.
        options: of `from_pretrained`.

    Raises:
        MissingWeightsError: the checkpoint lacks weights; the message names some of them.
    """
    model, info = kind.from_pretrained(source, output_loading_info=True, **options)
    wanted = f"{part}." if part is not None and hasattr(model, part) else ""
    missing = sorted(
        name for name in info["missing_keys"] if name.startswith(wanted) and not name.startswith(tuple(optional))
    )
    if missing:
        shown = ", ".join(missing[:6]) + (f", … ({len(missing)} in all)" if len(missing) > 6 else "")
        raise MissingWeightsError(
            f"{source} lacks weights of {type(model).__name__}: {shown}. They would stay random; check that it is a "
            "whole checkpoint, and of this kind of model",
            missing,
        )
    return model


__all__ = ["MissingWeightsError", "load_backbone"]
