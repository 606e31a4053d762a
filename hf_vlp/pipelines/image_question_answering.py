"""Answers to questions about images, by any model with `generate`.

Takes the place of `visual-question-answering`, which transformers 5 removed. This file ships with checkpoints: it
imports only transformers, the standard library and a sibling.
"""

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForImageTextToText, GenerationConfig

from .image_to_text import ImageToTextPipeline

# BLIP-2, section 4.2: what the model was prompted with for zero-shot VQA.
PROMPT = "Question: {question} Answer:"
# Answers that are ranked in full, as in the evaluation of ALBEF and BLIP.
_SHORTLIST = 128


class ImageQuestionAnsweringPipeline(ImageToTextPipeline):
    """`pipeline("image-question-answering", model=...)(image, question="what colour is it?")`.

    Generation parameters that neither the caller nor the `generation_config.json` sets are those of the BLIP-2 paper:
    five beams, a length penalty of -1 that favours short answers, and at most ten tokens; for models that encode the
    question and decode the answer (ALBEF, BLIP) those of the BLIP code: three beams, at most ten tokens. These models
    also choose from a list of answers (`answer_list`).
    """

    _default_generation_config = GenerationConfig(max_new_tokens=10, num_beams=5, length_penalty=-1.0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._encodes_questions():
            self._generation_defaults["num_beams"] = 3
            self._generation_defaults.pop("length_penalty", None)

    def __call__(self, images: Any = None, question: Any = None, **kwargs: Any) -> Any:
        """Answers.

        Args:
            images: as in `ImageToTextPipeline`; a record is `{"image": image, "question": question}`.
            question: one for all images, or as many as images.
            prompt_template (`str`): where the question goes, `"Question: {question} Answer:"` by default, or the
                question alone for chat models and for those that were trained on bare questions (BLIP).
            answer_list (`list[str]`): answers to choose from instead of generating; for models with `rank_answers`.
            num_answers (`int`): how many of them to give, the best one by default.
            kwargs: as in `ImageToTextPipeline`.

        Returns:
            For one image, `[{"answer": "red"}]`; for a list, a list of these. Chosen answers have a `score`, their
            probability among the shortlisted ones.

        Raises:
            ValueError: an input has no question; a list of answers for a model that cannot rank; more answers asked
                for than there are.
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
        self,
        prompt_template: str | None = None,
        answer_list: Sequence[str] | None = None,
        num_answers: int | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if answer_list is not None:
            forward["answer_list"] = self._checked_answers(answer_list, num_answers or 1)
        if num_answers is not None:
            if "answer_list" not in forward and not self._is_set("answer_list"):
                raise ValueError("num_answers says how many of answer_list to give: pass both")
            forward["num_answers"] = num_answers
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

    def _is_set(self, name: str) -> bool:
        return name in getattr(self, "_forward_params", {})

    def _checked_answers(self, answers: Sequence[str], wanted: int) -> list[str]:
        if not hasattr(self.model, "rank_answers") or not hasattr(self.processor, "encode_answers"):
            raise ValueError(
                f"{type(self.model).__name__} cannot choose from answer_list: that takes a model with rank_answers "
                f"and its processor; leave answer_list out, and it generates an answer"
            )
        if isinstance(answers, str) or not answers or len(set(answers)) < len(answers):
            raise ValueError("answer_list must hold different answers, at least one")
        if not 1 <= wanted <= len(answers):
            raise ValueError(f"num_answers={wanted}, but answer_list has {len(answers)}")
        return list(answers)

    def _forward(
        self,
        model_inputs: dict[str, Any],
        answer_list: list[str] | None = None,
        num_answers: int = 1,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if answer_list is None:
            return super()._forward(model_inputs, **kwargs)
        encoded = self.processor.encode_answers(answer_list, return_tensors="pt")
        candidates = {
            "candidate_ids": encoded["labels"].to(self.device),
            "candidate_attention_mask": encoded["labels_attention_mask"].to(self.device),
        }
        chosen: list[list[dict[str, Any]]] = [[] for _ in model_inputs["prompts"]]
        for part in model_inputs["parts"]:
            names = ("pixel_values", "input_ids", "attention_mask")
            ranked = self.model.rank_answers(
                **{name: part["inputs"][name] for name in names},
                **candidates,
                top_k=min(max(num_answers, _SHORTLIST), len(answer_list)),
            )
            best = ranked.answer_index[:, :num_answers].tolist()
            scores = ranked.probabilities[:, :num_answers].tolist()
            for row, index in enumerate(part["indices"]):
                chosen[index] = [
                    {"answer": answer_list[position], "score": score}
                    for position, score in zip(best[row], scores[row], strict=True)
                ]
        return {"chosen": chosen}

    def postprocess(self, model_outputs: dict[str, Any], **kwargs: Any) -> list[list[dict[str, Any]]]:
        if "chosen" in model_outputs:
            return model_outputs["chosen"]
        return super().postprocess(model_outputs, **kwargs)

    def _takes_prompts(self) -> bool:
        """A frozen language model continues a prompt; a chat model and a model trained for VQA take the question."""
        chat = getattr(self.processor, "chat_template", None)
        return self._language_model() is not None and not chat and not self._encodes_questions()

    def result(self, text: str) -> dict[str, Any]:
        return {"answer": text}


ImageQuestionAnsweringPipeline._registered_impl = {
    "image-question-answering": {"impl": ImageQuestionAnsweringPipeline, "pt": (AutoModelForImageTextToText,)}
}
