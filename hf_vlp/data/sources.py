"""One function from the name of a data set to rows."""

from typing import Any

from datasets import Dataset, IterableDataset


def load_pairs(
    spec: str,
    split: str = "train",
    *,
    streaming: bool = False,
    columns: dict[str, str] | None = None,
    image_root: str | None = None,
    seed: int = 0,
    **shapes_options: Any,
) -> Dataset | IterableDataset:
    """Image-text rows of a source."""
    if spec == "shapes":
        from .shapes import load_shapes

        return load_shapes(split, streaming=streaming, seed=seed, **shapes_options)
    raise NotImplementedError(spec)
