"""What the pipelines on images share: opening images, taking any form of input, and batching through the processor.

This file ships with checkpoints: it imports only torch, transformers, Pillow and the standard library.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline
from transformers.image_utils import load_image


def open_image(source: Any, timeout: float | None = None) -> Image.Image:
    """An RGB image, turned upright by its EXIF orientation.

    Args:
        source: a PIL image, a path, an http(s) URL, a base64 string, the bytes of a file, an array `(H, W)`,
            `(H, W, 3)` or `(H, W, 4)` of `uint8`, or a dictionary `{"bytes": ..., "path": ...}` as `datasets` stores
            undecoded images.
        timeout: seconds to wait for a URL; None waits for ever.

    Raises:
        ValueError: the source can't be read as an image; the message names it.
    """
    name = _describe(source)
    try:
        if isinstance(source, Mapping) and ("bytes" in source or "path" in source):
            source = source.get("bytes") or source.get("path")
            if not source:
                raise ValueError("both 'bytes' and 'path' are empty")
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, bytes | bytearray):
            image = Image.open(BytesIO(source))
        elif isinstance(source, str | Path):
            image = load_image(str(source), timeout=timeout)
        elif hasattr(source, "__array__"):
            image = Image.fromarray(source.__array__())
        else:
            raise ValueError(f"a {type(source).__name__} is not an image")
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        # Pillow, the network and base64 raise some ten unrelated types; the user needs to know which input it was.
        raise ValueError(f"can't read the image {name}: {error}") from error


def _describe(source: Any) -> str:
    if isinstance(source, str | Path):
        text = str(source)
        return repr(text if len(text) <= 200 else text[:80] + "...")
    if isinstance(source, Mapping):
        return _describe(source.get("path") or b"")
    return f"given as {type(source).__name__}"


class _Records(Dataset):
    """A sized collection of inputs, made into records when they are asked for."""

    def __init__(self, items: Any, make: Callable[[Any], dict[str, Any]]) -> None:
        self.items = items
        self.make = make

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.make(self.items[index])


class _Stream(IterableDataset):
    def __init__(self, items: Iterable[Any], make: Callable[[Any], dict[str, Any]]) -> None:
        self.items = items
        self.make = make

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.make, self.items)


class _Results:
    """Results one by one, computed batch by batch when they are asked for; `len()` where the input has one."""

    def __init__(self, batches: Iterable[list[Any]], length: int | None) -> None:
        self._batches = batches
        self._length = length

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield from batch

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the input of the pipeline has no length")
        return self._length


class ImagePipeline(Pipeline):
    """Base of the pipelines on images.

    A subclass makes one record of one input (`record`), the model's inputs of a list of opened records (`collate`),
    runs the model (`_forward`) and gives a list with one result a record (`postprocess`).

    Differs from the pipelines of transformers: a batch is made by the processor from all its images and texts at once,
    not by padding what it gave for each alone, so that every processor can be batched.
    """

    _load_processor = None
    _load_tokenizer = None
    _load_image_processor = None
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.processor is not None:
            self.tokenizer = getattr(self.processor, "tokenizer", None) or self.tokenizer
            self.image_processor = getattr(self.processor, "image_processor", None) or self.image_processor
        missing = [name for name in ("tokenizer", "image_processor") if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"the pipeline {self.task!r} found no {' and no '.join(missing)} in "
                f"{getattr(self.model, 'name_or_path', '') or 'what it was given'}: save the processor there "
                "(`processor.save_pretrained(folder)`) or pass `processor=`"
            )

    # Inputs

    def record(self, item: Any) -> dict[str, Any]:
        """`{"image": ..., ...}` of one input of the user's.

        Raises:
            ValueError: what a record needs is missing.
        """
        raise NotImplementedError

    def run_on(self, inputs: Any, make: Callable[[Any], dict[str, Any]], **kwargs: Any) -> Any:
        """One result for one input, a list for a list, and an iterator for a dataset or any other iterable."""
        if is_single(inputs):
            return super().__call__(make(inputs), **kwargs)
        if isinstance(inputs, list | tuple):
            return super().__call__([make(item) for item in inputs], **kwargs) if inputs else []
        if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):
            return super().__call__(_Records(inputs, make), **kwargs)
        if isinstance(inputs, Iterable):
            return super().__call__((make(item) for item in inputs), **kwargs)
        raise ValueError(f"can't read images from a {type(inputs).__name__}")

    # Running

    def preprocess(self, input_: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        return {**input_, "image": open_image(input_["image"], timeout=timeout)}

    def collate(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The inputs of `_forward` for a batch of opened records."""
        raise NotImplementedError

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterable[Any]:
        open_params, collate_params = self._split_preprocess(preprocess_params)
        make = partial(self.preprocess, **open_params)
        sized = isinstance(inputs, Sized)
        loader = DataLoader(
            _Records(inputs, make) if sized else _Stream(inputs, make),
            batch_size=batch_size,
            # Every worker would run through the whole of a stream.
            num_workers=num_workers if sized else min(num_workers, 1),
            collate_fn=partial(self.collate, **collate_params),
        )
        batches = (self.postprocess(self.forward(batch, **forward_params), **postprocess_params) for batch in loader)
        return _Results(batches, len(inputs) if sized else None)

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        return next(iter(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params)))

    def _split_preprocess(self, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return (
            {name: value for name, value in params.items() if name == "timeout"},
            {name: value for name, value in params.items() if name != "timeout"},
        )

    def _to_model(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """A plain dictionary, with floating tensors in the dtype of the model."""
        return {
            name: value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in features.items()
        }


def is_single(inputs: Any) -> bool:
    """Is this one image (or one record), and not a collection of them?"""
    return isinstance(inputs, str | Path | bytes | bytearray | Image.Image | Mapping) or (
        hasattr(inputs, "__array__") and not isinstance(inputs, Sequence) and getattr(inputs, "ndim", 0) in (2, 3)
    )


def unknown_parameter(pipeline: Pipeline, names: Iterable[str]) -> TypeError:
    """The error for a parameter that a pipeline does not take."""
    return TypeError(
        f"the pipeline {pipeline.task!r} does not know the parameter(s) {sorted(names)}; "
        "arguments of the processor go into `processor_kwargs={...}`"
    )
