"""Answers to questions about images, by any model with `generate`.

Takes the place of `visual-question-answering`, which transformers 5 removed. This file ships with checkpoints: it
imports only transformers, the standard library and a sibling.
"""

from typing import Any

from transformers import AutoModelForImageTextToText, GenerationConfig

from .image_to_text import ImageToTextPipeline

# BLIP-2, section 4.2: what the model was prompted with for zero-shot VQA.
PROMPT = "Question: {question} Answer:"


class ImageQuestionAnsweringPipeline(ImageToTextPipeline):
    """`pipeline("image-question-answering", model=...)(image, question="what colour is it?")`.

    Generation parameters that neither the caller nor the `generation_config.json` sets are those of the BLIP-2 paper:
    five beams, a length penalty of -1 that favours short answers, and at most ten tokens.
    """

    _default_generation_config = GenerationConfig(max_new_tokens=10, num_beams=5, length_penalty=-1.0)

    def __call__(self, images: Any = None, question: Any = None, **kwargs: Any) -> Any:
        """Answers.

        Args:
            images: as in `ImageToTextPipeline`; a record is `{"image": image, "question": question}`.
            question: one for all images, or as many as images.
            prompt_template (`str`): where the question goes, `"Question: {question} Answer:"` by default, or the
                question alone for chat models and for those that were trained on bare questions (BLIP).
            kwargs: as in `ImageToTextPipeline`.

        Returns:
            For one image, `[{"answer": "red"}]`; for a list, a list of these.

        Raises:
            ValueError: an input has no question.
        """
        if isinstance(question, list | tuple):
            question = list(question)
        return super().__call__(images, text=question, **kwargs)

    def record(self, item: Any, text: str | None = None) -> dict[str, Any]:
        if isinstance(item, dict) and "image" in item:
            question = text if text is not None else item.get("question", item.get("text"))
            item = item["image"]
        else:
            question = text
        if not isinstance(question, str) or not question.strip():
            raise ValueError(
                f"the pipeline {self.task!r} needs a question for each image: pipe(image, question='...')"
            )
        return {"image": item, "text": question}

    def _sanitize_parameters(
        self, prompt_template: str | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if prompt_template is not None:
            if "{question}" not in prompt_template:
                raise ValueError(f"prompt_template must hold '{{question}}', got {prompt_template!r}")
            preprocess["prompt_template"] = prompt_template
        return preprocess, forward, postprocess

    def collate(
        self, records: list[dict[str, Any]], prompt_template: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if prompt_template is None:
            prompt_template = PROMPT if self._takes_prompts() else "{question}"
        prompted = [{**record, "text": prompt_template.format(question=record["text"])} for record in records]
        return super().collate(prompted, **kwargs)

    def _takes_prompts(self) -> bool:
        """A frozen language model continues a prompt; a chat model and a model trained for VQA take the question."""
        chat = getattr(self.processor, "chat_template", None)
        return self._language_model() is not None and not chat

    def result(self, text: str) -> dict[str, Any]:
        return {"answer": text}


ImageQuestionAnsweringPipeline._registered_impl = {
    "image-question-answering": {"impl": ImageQuestionAnsweringPipeline, "pt": (AutoModelForImageTextToText,)}
}
