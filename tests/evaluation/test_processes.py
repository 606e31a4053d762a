"""Several processes give what one gives: every sample is evaluated once, whatever the division."""

from collections.abc import Callable

import pytest
import torch

from hf_vlp.data import load_shapes
from hf_vlp.data.records import ErrorRateExceeded
from hf_vlp.evaluation import (
    evaluate_captioning,
    evaluate_retrieval,
    evaluate_shapes_captions,
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
    return everything() | real_models()


@pytest.mark.parametrize(("processes", "function"), [(2, all_models), (3, everything)])
def test_processes_agree_with_one(processes: int, function: Callable[[], dict]):
    alone = function()
    together = run_ranks(function, processes, timeout=300)
    encoded = [image for result in together for image in result.pop("encoded")]
    assert sorted(encoded) == sorted(alone.pop("encoded"))
    for result in together:
        assert result == alone
