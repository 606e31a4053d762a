"""Captions from images alone, by any model with `generate`.

transformers 5 sends the task name `image-to-text` to `image-text-to-text`, which refuses an image without a text. This
pipeline gives the name back its meaning. It is installed by `import hf_vlp`, and it ships with our checkpoints
(`custom_pipelines` in `config.json`), so that plain transformers runs it with `trust_remote_code=True`.

This file ships with checkpoints: it imports only torch, transformers, the standard library and a sibling.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, ProcessorMixin

from .image_pipeline import ImagePipeline, unknown_parameter

# What a chat model is asked where the user asks nothing.
DEFAULT_INSTRUCTION = "Describe the image in one sentence."

# Arguments of `generate` that `GenerationConfig` does not list.
_GENERATE_ONLY = frozenset(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
_GENERATION_PARAMETERS = _GENERATE_ONLY | {
    name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"
}


class ImageToTextPipeline(ImagePipeline):
    """`pipeline("image-to-text", model=...)(image)`.

    Works for every model that `AutoModelForImageTextToText` loads: with a `processor` that takes images alone (BLIP,
    BLIP-2, GIT, ...), with one whose prompt holds an image token or a chat template (LLaVA, ...), and with an image
    processor and a tokenizer side by side (`VisionEncoderDecoderModel`).

    Generation parameters that neither the caller nor the `generation_config.json` sets: `max_new_tokens=50`.
    """

    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=50)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.model.can_generate():
            raise ValueError(
                f"the pipeline {self.task!r} needs a model with `generate`; {type(self.model).__name__} has none "
                "(a contrastive model goes into 'zero-shot-image-classification' or 'image-text-matching')"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self._padding_is_exact() and not self._encoder_decoder():
            # The next token is read off the last position.
            self.tokenizer.padding_side = "left"
        if self.processor is not None and getattr(self.processor, "num_query_tokens", 0) is None:
            # Folders from before processors kept the number: without it the picture would be ignored.
            self.processor.num_query_tokens = self.model.config.num_query_tokens

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Captions.

        Args:
            images: one image or a list, tuple, dataset or iterator of images. An image is anything that `open_image`
                reads (PIL image, path, URL, base64, bytes, array, `{"bytes": ..., "path": ...}`), or a record
                `{"image": image, "text": prompt}`. Also called `inputs`.
            text: what the text starts with: one for all images, or as many as images. Also called `prompt`. A chat
                model takes it as the user's turn.
            batch_size (`int`): images to run at once, 1 by default.
            num_workers (`int`): processes that open images and prepare batches, 0 by default.
            timeout (`float`): seconds to wait for the image of a URL.
            return_full_text (`bool`): put the prompt in front of what was generated.
            generate_kwargs (`dict`) or any parameter of `generate`: `max_new_tokens`, `num_beams`, `do_sample`, ...
            processor_kwargs (`dict`): passed to the processor.

        Returns:
            For one image, `[{"generated_text": "a red square"}]`, with `num_return_sequences` entries; for a list, a
            list of these; for a dataset or iterator, an iterator over them.

        Raises:
            ValueError: an image can't be read, or the number of prompts differs from that of images.
            TypeError: a parameter is not known.
        """
        for alias in ("inputs", "image"):
            if images is None:
                images = kwargs.pop(alias, None)
        if text is None:
            text = kwargs.pop("prompt", None)
        if images is None:
            raise ValueError(f"the pipeline {self.task!r} needs an image: pipe(image)")
        if isinstance(text, list | tuple):
            images = _paired(images, text)
            text = None
        return self.run_on(images, partial(self.record, text=text), **kwargs)

    def record(self, item: Any, text: str | None = None) -> dict[str, Any]:
        if isinstance(item, dict) and "image" in item:
            own = item.get("text")
            # A row of a data set of pairs: its captions are not a prompt.
            return {"image": item["image"], "text": own if isinstance(own, str) and text is None else text}
        return {"image": item, "text": text}

    def _sanitize_parameters(
        self,
        timeout: float | None = None,
        return_full_text: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        generation = dict(generate_kwargs or {})
        for name in list(kwargs):
            if name in _GENERATION_PARAMETERS or name in inspect.signature(self.model.generate).parameters:
                if name in generation:
                    raise ValueError(f"{name!r} is given twice: in `generate_kwargs` and on its own")
                generation[name] = kwargs.pop(name)
        if kwargs:
            raise unknown_parameter(self, kwargs)
        preprocess = {"timeout": timeout, "processor_kwargs": processor_kwargs}
        preprocess = {name: value for name, value in preprocess.items() if value is not None}
        forward = {"generate_kwargs": generation} if generation else {}
        postprocess = {} if return_full_text is None else {"return_full_text": return_full_text}
        return preprocess, forward, postprocess

    # From records to the model's inputs

    def collate(self, records: list[dict[str, Any]], processor_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        """Groups of records whose texts may share a batch, each as the inputs of `generate`.

        Where padding would change the result (positions that do not come from the attention mask), a group holds only
        texts of the same length, so that a batch gives what its images give one by one.
        """
        texts = [self.prompt(record["text"]) for record in records]
        groups: dict[int, list[int]] = {}
        for index, text in enumerate(texts):
            padded = text is None or self._padding_is_exact()
            groups.setdefault(0 if padded else len(self.tokenizer(text).input_ids), []).append(index)
        parts = []
        for indices in groups.values():
            images = [records[index]["image"] for index in indices]
            group = [texts[index] for index in indices]
            features = self.features(images, None if group[0] is None else group, **(processor_kwargs or {}))
            parts.append({"indices": indices, "inputs": self._to_model(features)})
        return {"parts": parts, "prompts": [record["text"] for record in records]}

    def prompt(self, text: str | None) -> str | None:
        """The text that the processor needs for a user's prompt, None where images alone are enough."""
        processor = self.processor
        if processor is None:
            if text:
                raise ValueError(f"{type(self.model).__name__} has no processor that joins a prompt to an image")
            return None
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text or DEFAULT_INSTRUCTION}]
            return processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        if getattr(processor, "num_query_tokens", None) is not None:
            # The processor puts the image tokens in front, but only of a text.
            return text or ""
        token = _placeholder(processor)
        if token is not None and token not in (text or ""):
            return token + (text or "")
        return text

    def features(self, images: list[Any], texts: list[str] | None, **processor_kwargs: Any) -> Any:
        """What the processor makes of a batch: `pixel_values` and, with texts, `input_ids` and `attention_mask`."""
        if self.processor is None:
            return self.image_processor(images=images, return_tensors="pt", **processor_kwargs)
        if texts is None:
            return self.processor(images=images, return_tensors="pt", **processor_kwargs)
        if self.model.config.model_type == "git":
            # GIT continues its text: the separator at its end would end it.
            cls = self.tokenizer.cls_token_id
            ids = [[cls, *self.tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
            features = self.processor(images=images, return_tensors="pt", **processor_kwargs)
            features["input_ids"] = torch.tensor(ids)
            features["attention_mask"] = torch.ones_like(features["input_ids"])
            return features
        return self.processor(images=images, text=texts, return_tensors="pt", **{"padding": True, **processor_kwargs})

    def _language_model(self) -> torch.nn.Module | None:
        for name in ("language_model", "model.language_model", "text_model"):
            module = self.model
            for part in name.split("."):
                module = getattr(module, part, None)
            if isinstance(module, torch.nn.Module):
                return module
        return None

    def _encodes_questions(self) -> bool:
        """Does the text go to an encoder of its own, whose states a decoder answers from (ALBEF's and BLIP's VQA)?"""
        parts = ("text_encoder", "text_decoder")
        return hasattr(self.model, "encode_questions") or all(hasattr(self.model, part) for part in parts)

    def _encoder_decoder(self) -> bool:
        """Does `generate` return only new tokens, because the prompt went to an encoder?"""
        if self._encodes_questions():
            return True
        language_model = self._language_model()
        config = self.model.config if language_model is None else language_model.config
        return bool(getattr(config, "is_encoder_decoder", False) or self.model.config.is_encoder_decoder)

    def _padding_is_exact(self) -> bool:
        """Do positions follow the attention mask, so that padding in front changes nothing?"""
        # The native class of BLIP lets its decoder look at padded positions of the question.
        if self._encodes_questions():
            return hasattr(self.model, "encode_questions")
        language_model = self._language_model()
        if language_model is None:
            return False
        return self._encoder_decoder() or "position_ids" in inspect.signature(language_model.forward).parameters

    # Running

    def _forward(self, model_inputs: dict[str, Any], generate_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        generate_kwargs = self._generation_arguments(dict(generate_kwargs or {}))
        sequences: list[list[Tensor]] = [[] for _ in model_inputs["prompts"]]
        for part in model_inputs["parts"]:
            inputs, indices = part["inputs"], part["indices"]
            generated = self.model.generate(**inputs, **generate_kwargs)
            generated = getattr(generated, "sequences", generated)  # (len(indices) * candidates, length)
            candidates = len(generated) // len(indices)
            new = self._without_prompt(generated, inputs.get("input_ids"), candidates)
            for row, tokens in enumerate(new):
                sequences[indices[row // candidates]].append(tokens)
        return {"sequences": sequences, "prompts": model_inputs["prompts"]}

    def _generation_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """The caller's parameters, then those of the folder's `generation_config.json`, then this pipeline's."""
        arguments = self._prepare_generate_kwargs(given)
        if "generation_config" in arguments or type(self.model).generate is GenerationMixin.generate:
            return arguments
        # BLIP and BLIP-2 hand `generate` on to their language model, which has not read the folder's settings.
        stored = self.model.generation_config.to_diff_dict()
        if stored.get("_from_model_config"):
            # Its token ids were derived from the model's config, as those of the language model were, which may know
            # better: it may have been told which token ends a caption.
            stored = {name: value for name, value in stored.items() if not name.endswith("_token_id")}
        arguments = {**{name: value for name, value in stored.items() if name in _GENERATION_PARAMETERS}, **arguments}
        if hasattr(self.model, "text_decoder"):
            # BLIP's `generate` names these two itself and would be given them twice.
            arguments = {name: v for name, v in arguments.items() if name not in ("pad_token_id", "eos_token_id")}
        return arguments

    def _without_prompt(self, generated: Tensor, input_ids: Tensor | None, candidates: int) -> Tensor:
        """Cuts off the prompt where `generate` gives it back.

        Some models replace its first token and drop its last (BLIP), some return it as it is, some not at all.
        """
        if input_ids is None or self._encoder_decoder():
            return generated
        prompt = input_ids.to(generated.device).repeat_interleave(candidates, dim=0)
        for length in (prompt.shape[1], prompt.shape[1] - 1):
            start = 1 if length > 1 else 0
            if 0 < length <= generated.shape[1] and torch.equal(prompt[:, start:length], generated[:, start:length]):
                return generated[:, length:]
        return generated

    def postprocess(self, model_outputs: dict[str, Any], return_full_text: bool = False) -> list[list[dict[str, Any]]]:
        results = []
        for sequences, prompt in zip(model_outputs["sequences"], model_outputs["prompts"], strict=True):
            texts = [text.strip() for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]
            if return_full_text and prompt:
                texts = [f"{prompt.rstrip()} {text}" for text in texts]
            results.append([self.result(text) for text in texts])
        return results

    def result(self, text: str) -> dict[str, Any]:
        """One entry of the output."""
        return {"generated_text": text}


def _placeholder(processor: ProcessorMixin) -> str | None:
    """The token that a prompt must hold for each image, None where the processor adds what it needs itself."""
    stock = getattr(ProcessorMixin, "replace_image_token", None)
    if stock is None or type(processor).replace_image_token is stock or "PaliGemma" in type(processor).__name__:
        return None
    token = getattr(processor, "image_token", None)
    return token if isinstance(token, str) else getattr(token, "content", None)


def _paired(images: Any, texts: list[str] | tuple[str, ...]) -> list[dict[str, Any]]:
    if not isinstance(images, list | tuple):
        raise ValueError(f"a list of {len(texts)} prompts needs a list of as many images, got {type(images).__name__}")
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} image(s) but {len(texts)} prompt(s): give one prompt, or one for each image")
    return [{"image": image, "text": text} for image, text in zip(images, texts, strict=True)]


# What `Pipeline.save_pretrained` writes into `custom_pipelines` of `config.json`.
ImageToTextPipeline._registered_impl = {
    "image-to-text": {"impl": ImageToTextPipeline, "pt": (AutoModelForImageTextToText,)}
}
