"""Proposes captions: any model with the role "captioning", by nucleus sampling or beam search."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import LogitsProcessorList

from hf_vlp.bootstrapping.fingerprint import model_fingerprint
from hf_vlp.bootstrapping.sampling import SeededNucleus
from hf_vlp.evaluation.generation import new_tokens
from hf_vlp.evaluation.runtime import to_device

METHODS = ("nucleus", "beam")


@dataclass(frozen=True)
class CaptionSettings:
    """How captions are made; all of it decides what they are.

    Attributes:
        method: `"nucleus"` or `"beam"`.
        top_p: of nucleus sampling; 0.9 in section 4.3 of the paper.
        temperature: of nucleus sampling.
        top_k: of nucleus sampling: tokens that are drawn from at most, 0 for all.
        num_beams: of beam search.
        samples: captions an image; more than one only by nucleus sampling.
        max_new_tokens: longest caption, in tokens.
        min_new_tokens: shortest caption, in tokens.
        repetition_penalty: divisor of the scores of tokens that were said before; 1 for none.
        prompt: words that captions go on from; None for the processor's own start.

    Raises:
        ValueError: a value out of range.
    """

    method: str = "nucleus"
    top_p: float = 0.9
    temperature: float = 1.0
    top_k: int = 0
    num_beams: int = 3
    samples: int = 1
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: captions are made by one of {METHODS}")
        if self.method == "beam" and self.samples != 1:
            raise ValueError(f"samples={self.samples}: beam search gives one caption an image; use nucleus sampling")
        for name in ("num_beams", "samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is not between 0 and max_new_tokens={self.max_new_tokens}"
            )
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: it must be positive")
        # Says what is wrong with the two others.
        SeededNucleus([], top_p=self.top_p, temperature=self.temperature, top_k=self.top_k)


class Captioner:
    """Captions for images.

    Args:
        model: `generate(pixel_values=, input_ids=, attention_mask=, **generation)`.
        processor: makes the inputs from images, or from images and a prompt, and has `batch_decode`.
        settings: how captions are made.
    """

    def __init__(self, model: nn.Module, processor: Any, settings: CaptionSettings | None = None) -> None:
        self.model, self.processor, self.settings = model, processor, settings or CaptionSettings()
        self.fingerprint = model_fingerprint(model, processor)

    def with_settings(self, **changes: Any) -> "Captioner":
        """The same model with other settings."""
        twin = object.__new__(Captioner)
        twin.model, twin.processor, twin.fingerprint = self.model, self.processor, self.fingerprint
        twin.settings = replace(self.settings, **changes)
        return twin

    def recorded(self) -> dict[str, Any]:
        """What decides the captions, for the settings of the set. Arguments that the method does not use stay out."""
        unused = ("top_p", "temperature", "top_k") if self.settings.method == "beam" else ("num_beams",)
        used = {name: value for name, value in asdict(self.settings).items() if name not in unused}
        return {"model": self.fingerprint, **used}

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Model inputs of images, on the CPU."""
        text = {}
        if self.settings.prompt is not None:
            text = {"text": [self.settings.prompt] * len(images), "padding": True}
        return dict(self.processor(images=list(images), return_tensors="pt", **text))

    def __call__(self, inputs: dict[str, Any], seeds: Sequence[Sequence[int]]) -> list[list[str]]:
        """Captions of each image of a batch; gradients off and `eval()` are the caller's part.

        Args:
            inputs: of `inputs`.
            seeds: `samples` seeds for each image; not read by beam search.
        """
        settings = self.settings
        generation: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "repetition_penalty": settings.repetition_penalty,
        }
        if settings.min_new_tokens:
            generation["min_new_tokens"] = settings.min_new_tokens
        if settings.method == "beam":
            generation |= {"num_beams": settings.num_beams, "do_sample": False}
        else:
            rows = [seed for own in seeds for seed in own]
            nucleus = SeededNucleus(rows, top_p=settings.top_p, temperature=settings.temperature, top_k=settings.top_k)
            generation |= {
                # Sampling from the one token that is left: several samples an image then share its encoding.
                "do_sample": True,
                "num_beams": 1,
                "num_return_sequences": settings.samples,
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
                "logits_processor": LogitsProcessorList([nucleus]),
            }
        parameter = next(self.model.parameters())
        moved = to_device(inputs, parameter.device, parameter.dtype)
        with _generator_untouched(parameter.device):
            outputs = self.model.generate(**moved, **generation)
        prompts = moved.get("input_ids")
        if prompts is not None and settings.samples > 1:
            prompts = prompts.repeat_interleave(settings.samples, dim=0)
        texts = self.processor.batch_decode(new_tokens(outputs, prompts), skip_special_tokens=True)
        texts = [self._without_prompt(text.strip()) for text in texts]
        return [texts[start : start + settings.samples] for start in range(0, len(texts), settings.samples)]

    def _without_prompt(self, text: str) -> str:
        prompt = (self.settings.prompt or "").strip()
        return text[len(prompt) :].strip() if prompt and text.startswith(prompt) else text


class _generator_untouched:  # noqa: N801  used as a function
    """Leaves torch's random state as it was: drawing from one token takes a number from it all the same."""

    def __init__(self, device: torch.device) -> None:
        devices = [device] if device.type == "cuda" else []
        self.fork = torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self.fork.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)
