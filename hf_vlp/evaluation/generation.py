"""Generates one text for each image, in batches, on one or several processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_vlp.evaluation.images import Failure, ImageRows, Skipped
from hf_vlp.evaluation.runtime import evaluating, gather_lists, progress, shard, to_device


def new_tokens(outputs: Tensor, input_ids: Tensor | None) -> Tensor:
    """What `generate` added: decoder-only models give the prompt back in front, encoder-decoder models do not.

    BLIP gives it back with another first token, and without the last one.

    Args:
        outputs: (n, length) of `generate`.
        input_ids: (n, prompt length) given to it, or None.
    """
    if input_ids is None:
        return outputs
    for length in (input_ids.shape[1], input_ids.shape[1] - 1):
        start = min(1, length - 1)
        if 0 < length <= outputs.shape[1] and torch.equal(outputs[:, start:length], input_ids[:, start:length]):
            return outputs[:, length:]
    return outputs


@contextmanager
def prompts_end_together(model: nn.Module, processor: Any) -> Iterator[None]:
    """Pads prompts on the left while a decoder-only model generates: it goes on from their common end."""
    tokenizer = processor.tokenizer
    side = tokenizer.padding_side
    if not getattr(model.config.get_text_config(), "is_encoder_decoder", False):
        tokenizer.padding_side = "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def generate_texts(
    model: nn.Module,
    processor: Any,
    rows: Any,
    indices: Sequence[int],
    prompts: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    workers: int = 0,
    description: str = "generating",
    show_progress: bool = True,
    **generation: Any,
) -> tuple[list[tuple[int, str]], Skipped]:
    """One generated text for each of `indices`; each process generates its part, all get all.

    Args:
        model: `generate(pixel_values=, input_ids=, attention_mask=, **generation)`.
        processor: makes the inputs from images, or from images and prompts.
        rows: with an `image`.
        indices: positions in `rows`; a row may occur several times (several questions about one image).
        prompts: a text for each of `indices`, or None for the processor's own start (an unprompted caption).
        generation: passed to `generate` (`num_beams`, `max_new_tokens`, …).

    Returns:
        (position in `indices`, text) in order, those with an unreadable image left out, and what was left out.

    Raises:
        ValueError: `generation` asks for several texts an image.
    """
    if generation.get("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: evaluation compares one text an image; leave it at 1")

    # A question that an encoder of its own reads is never given back, but an answer may begin with its words.
    gives_back = not hasattr(model, "encode_questions")

    def generate(inputs: dict[str, Any]) -> list[str]:
        outputs = model.generate(**inputs, **generation)
        added = new_tokens(outputs, inputs.get("input_ids") if gives_back else None)
        return [text.strip() for text in processor.batch_decode(added, skip_special_tokens=True)]

    with prompts_end_together(model, processor):
        return produce_texts(
            model,
            processor,
            rows,
            indices,
            generate,
            prompts,
            batch_size=batch_size,
            workers=workers,
            description=description,
            show_progress=show_progress,
        )


def produce_texts(
    model: nn.Module,
    processor: Any,
    rows: Any,
    indices: Sequence[int],
    produce: Callable[[dict[str, Any]], list[str]],
    prompts: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    workers: int = 0,
    description: str = "generating",
    show_progress: bool = True,
) -> tuple[list[tuple[int, str]], Skipped]:
    """One text for each of `indices`, by whatever makes texts of a batch of inputs. Otherwise as `generate_texts`.

    Args:
        produce: inputs on the model's device to one text an image.
    """
    own = shard(len(indices))
    source = ImageRows(rows, processor, batch_size=batch_size, workers=workers)
    texts: list[tuple[int, str]] = []
    failures: list[Failure] = []
    parameter = next(model.parameters())
    with evaluating(model):
        mine = [indices[position] for position in own]
        batches = source.batches(mine, None if prompts is None else [prompts[position] for position in own])
        for batch in progress(batches, description, total=-(-len(own) // batch_size), show=show_progress):
            failures += batch["failures"]
            if batch["inputs"] is None:
                continue
            made = produce(to_device(dict(batch["inputs"]), parameter.device, parameter.dtype))
            texts += zip((own[position] for position in batch["positions"]), made, strict=True)
    return gather_lists(texts), Skipped(gather_lists(failures), len(indices))


def common_result(task: str, metrics: dict[str, float], skipped: Skipped, **samples: Any) -> dict[str, Any]:
    """The part that the results of all generation tasks share."""
    return {"task": task, "metrics": metrics, "samples": samples | skipped.summary()}
