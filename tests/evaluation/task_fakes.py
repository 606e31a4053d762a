"""Models of the tasks whose every answer is known beforehand: pictures are numbered, and the number is the answer."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.evaluation.fakes import number_of


class TaskProcessor:
    """Pictures become their colour, words numbers; texts are padded on the right."""

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(model_max_length=64, padding_side="right")
        self.texts: list[str] = []

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if images is not None:
            inputs["pixel_values"] = torch.stack([torch.tensor(image.getpixel((0, 0))).float() for image in images])
        if text is not None:
            self.texts += text
            rows = [[ord(character) for character in one] for one in text]
            if options.get("return_tensors") is None:
                return inputs | {"input_ids": [one.split() for one in text]}
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            inputs |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
        return inputs

    def encode_answers(self, answers: Any, *, max_length: int | None = None, return_tensors: str = "pt") -> Any:
        made = self(text=list(answers), return_tensors="pt")
        return {"labels": made["input_ids"], "labels_attention_mask": made["attention_mask"]}

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool = True) -> list[str]:
        return ["".join(chr(one) for one in row if one) for row in ids.tolist()]


class Classifier(nn.Module):
    """Says class `answers[i]` of picture i; of two pictures the first counts."""

    def __init__(self, answers: list[int], classes: int, names: dict[int, str] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers, self.classes = answers, classes
        self.config = SimpleNamespace(id2label=names)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert not self.training
        first = pixel_values[:, 0] if pixel_values.ndim == 3 else pixel_values
        chosen = torch.tensor([self.answers[number] for number in number_of(first).tolist()])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(chosen, self.classes).float())


class Scorer(nn.Module):
    """Gives candidate c of picture i the score `scores[i][c]`."""

    def __init__(self, scores: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scores = scores

    def candidate_scores(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        candidate_ids: Tensor,
        candidate_attention_mask: Tensor,
        candidates_per_dialog: Tensor,
    ) -> Tensor:
        assert len(candidate_ids) == int(candidates_per_dialog.sum())
        numbers = number_of(pixel_values).tolist()
        rows = [self.scores[number][:count] for number, count in zip(numbers, candidates_per_dialog.tolist())]
        return torch.tensor([score for row in rows for score in row])


class Pointer(nn.Module):
    """Gives picture i the map `maps[i]`."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.maps = maps

    def grounding_maps(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: Any = None, source: str = ""
    ) -> Any:
        return SimpleNamespace(maps=self.maps[number_of(pixel_values)])


class Ranker(nn.Module):
    """Puts answer `best[i]` of the list first for picture i."""

    def __init__(self, best: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.best = best
        self.top_k: list[int] = []
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(is_encoder_decoder=True))

    def rank_answers(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        candidate_ids: Tensor,
        candidate_attention_mask: Tensor,
        top_k: int,
    ) -> Any:
        self.top_k.append(top_k)
        chosen = torch.tensor([self.best[number] for number in number_of(pixel_values).tolist()])
        return SimpleNamespace(answer_index=chosen[:, None])
