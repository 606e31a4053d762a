"""Several processes give what one gives: every sample is evaluated once, whatever the division."""

from collections.abc import Callable

import pytest
import torch

from hf_vlp.data import load_shapes
from hf_vlp.data.records import ErrorRateExceeded
from hf_vlp.evaluation import (
    evaluate_captioning,
    evaluate_dialog,
    evaluate_grounding,
    evaluate_retrieval,
    evaluate_shapes_captions,
    evaluate_visual_entailment,
    evaluate_visual_reasoning,
    evaluate_vqa,
    evaluate_zero_shot,
)
from tests.distributed import run_ranks
from tests.evaluation.fakes import (
    FakeProcessor,
    FakeRetrievalModel,
    FakeWriter,
    FakeWriterProcessor,
    numbered_image,
    rows_for,
)
from tests.evaluation.task_fakes import Classifier, Pointer, Ranker, Scorer, TaskProcessor
from tests.tiny import blip2

OWNERS = sorted([*range(7), 0, 0, 3, 6])


def broken(rows: list[dict]) -> list[dict]:
    rows[4]["image"] = {"bytes": b"", "path": None}
    return rows


def everything() -> dict:
    """All evaluations with details, on images that do not divide evenly and one that cannot be read."""
    generator = torch.Generator().manual_seed(0)
    shape = (7, len(OWNERS))
    similarity = torch.randint(0, 9, shape, generator=generator) / 9
    model = FakeRetrievalModel(similarity, torch.rand(shape, generator=generator))
    options = {"details": True, "show_progress": False, "max_bad_rate": 0.5, "batch_size": 2}
    rows = broken(rows_for(OWNERS))
    labelled = [row | {"label": f"t{image % 3}"} for image, row in enumerate(rows)]
    answers = ["a red circle", "two dots", "", "a star", "unseen", "yes", "no"]
    asked = [{"image": numbered_image(i), "question": f"q{i}?", "answers": [answers[i]] * 10} for i in range(7)]
    results = {
        "retrieval": evaluate_retrieval(model, FakeProcessor(), rows, rerank=3, folds=2, **options),
        "zero_shot": evaluate_zero_shot(model, FakeProcessor(), labelled, templates=("{}",), **options),
        "captioning": evaluate_captioning(FakeWriter(answers), FakeWriterProcessor(), rows, **options),
        "vqa": evaluate_vqa(FakeWriter(answers), FakeWriterProcessor(), broken(asked), **options),
    }
    # Fewer images than processes.
    two = FakeRetrievalModel(torch.eye(2))
    results["two images"] = evaluate_retrieval(two, FakeProcessor(), rows_for([0, 1]), show_progress=False)
    # A bad image that one process alone reads stops all of them.
    with pytest.raises(ErrorRateExceeded, match="1 of 7 images cannot be used.*row 4"):
        evaluate_retrieval(model, FakeProcessor(), rows, show_progress=False)
    # Every image that can be read is encoded by one process, each time.
    results["encoded"] = model.images_encoded
    return results


def tasks() -> dict:
    """The evaluations of the tasks, with a record that cannot be used."""
    options = {"details": True, "show_progress": False, "max_bad_rate": 0.5, "batch_size": 2}
    answers = [0, 1, 1, 0, 1, 0, 1]
    statements = [
        {"image_0": numbered_image(i), "image_1": numbered_image(9), "text": f"s{i}", "label": i % 2, "sentence_id": i}
        for i in range(7)
    ]
    hypotheses = [{"image": numbered_image(i), "text": f"h{i}", "label": i % 3} for i in range(7)]
    hypotheses[4]["label"] = 5
    turns = [
        {"question": f"q{i}", "answer": "b", "candidates": ["a", "b", "c"], "relevance": [0.5, 1.0, 0.0]}
        for i in range(2)
    ]
    dialogs = [{"image": numbered_image(i), "caption": "c", "turns": turns[: 1 + i % 2]} for i in range(5)]
    dialogs[2]["turns"] = [{**turns[0], "answer": "d"}]
    scores = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).tolist()
    heat = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(2))
    boxes = [[[0.0, 0.0, 1.0, 2.0]]] * 5
    objects = [{"image": numbered_image(i), "text": f"o{i}", "boxes": boxes[i]} for i in range(5)]
    asked = [{"image": numbered_image(i), "question": f"q{i}?", "answers": ["x"] * 10} for i in range(5)]
    processor = TaskProcessor()
    return {
        "reasoning": evaluate_visual_reasoning(Classifier(answers, 2), processor, statements, **options),
        "entailment": evaluate_visual_entailment(Classifier(answers, 3), processor, hypotheses, **options),
        "dialog": evaluate_dialog(Scorer(scores), processor, dialogs, **options),
        "grounding": evaluate_grounding(Pointer(heat), processor, objects, **options),
        "ranked": evaluate_vqa(Ranker([0, 1, 0, 0, 1]), processor, broken(asked), answer_list=["x", "y"], **options),
    }


def real_models() -> dict:
    rows = load_shapes("test", size=5)
    options = {"details": True, "show_progress": False, "batch_size": 2}
    return {
        "retrieval of BLIP-2": evaluate_retrieval(
            blip2.retrieval_model(), blip2.retrieval_processor(), rows, rerank=3, max_length=20, **options
        ),
        "shapes": evaluate_shapes_captions(
            blip2.generation_model("opt"), blip2.generation_processor("opt"), rows, max_new_tokens=6, **options
        ),
    }


def all_models() -> dict:
    return everything() | real_models() | tasks()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "function"), [(2, all_models), (3, everything)])
def test_processes_agree_with_one(processes: int, function: Callable[[], dict]):
    alone = function()
    together = run_ranks(function, processes, timeout=300)
    encoded = [image for result in together for image in result.pop("encoded")]
    assert sorted(encoded) == sorted(alone.pop("encoded"))
    for result in together:
        assert result == alone
